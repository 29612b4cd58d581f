//! Wire structs of the FUSE protocol, up to version 7.45 (`linux/fuse.h`).
//!
//! Every struct is plain little-endian memory without padding, as the kernel lays it out on a
//! 64-bit machine. `tests/abi.rs` checks sizes, offsets and values against the kernel's own header, and that
//! no struct of it is missing but those of other transports: `/dev/fuse`, CUSE and io_uring.

#[macro_use]
mod wire;
mod mappings;
mod notifications;
mod structs;

pub use self::mappings::*;
pub use self::notifications::*;
pub use self::structs::*;
pub use self::wire::Layout;

/// The protocol's major version; it never changed since Linux 2.6.
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor version that is known here.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// The oldest minor version of guests that is known here (Linux 4.20).
pub const OLDEST_MINOR_VERSION: u32 = 27;
/// Node id of the root.
pub const ROOT_ID: u64 = 1;
/// `uid` or `gid` in a request header that has no meaning to the file system (idmapped mounts).
pub const INVALID_UIDGID: u32 = u32::MAX;
/// Extension type of [`SuppGroups`]; types up to 31 are the number of labels ([`Secctx`]).
pub const EXT_GROUPS: u32 = 32;
/// Bytes of `fuse_init_in` that guests below minor 36 send.
pub const COMPAT_INIT_IN_SIZE: usize = 16;
/// Bytes of `fuse_setxattr_in` without SETXATTR_EXT.
pub const COMPAT_SETXATTR_IN_SIZE: usize = 8;
/// `typ` of a shared lock in [`FileLock`].
pub const F_RDLCK: u32 = 0;
/// `typ` of an exclusive lock.
pub const F_WRLCK: u32 = 1;
/// `typ` of no lock.
pub const F_UNLCK: u32 = 2;
/// Records of variable length are padded to this many bytes.
pub const RECORD_ALIGN: usize = 8;

/// Layouts of all wire structs, for comparison with the kernel's header.
pub fn layouts() -> impl Iterator<Item = &'static Layout> {
    structs::LAYOUTS.iter().chain(mappings::LAYOUTS).chain(notifications::LAYOUTS)
}
