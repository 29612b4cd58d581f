//! How wire structs are declared, and what is known of their layout.

/// Layout of one wire struct: the C name, its size, and the offset of every field.
#[derive(Debug)]
pub struct Layout {
    /// Name in `linux/fuse.h`.
    pub c_name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Field names as here (`typ` stands for `type`) and their offsets in bytes.
    pub fields: &'static [(&'static str, usize)],
}

macro_rules! wire {
    ($($(#[$doc:meta])* struct $name:ident($c_name:literal) { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
            #[allow(missing_docs, reason = "the fields carry the kernel's names and meaning")]
            pub struct $name { $(pub $field: $type,)* }
        )*
        /// Layouts of these structs, for comparison with the kernel's header.
        pub(super) const LAYOUTS: &[Layout] = &[
            $(Layout {
                c_name: $c_name,
                size: size_of::<$name>(),
                fields: &[$((stringify!($field), offset_of!($name, $field)),)*],
            },)*
        ];
    };
}
