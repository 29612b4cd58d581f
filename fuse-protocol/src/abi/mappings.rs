//! Mappings of files in a DAX window.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::Layout;

wire! {
    /// Arguments of SETUPMAPPING.
    struct SetupMappingIn("fuse_setupmapping_in") {
        fh: u64,
        foffset: u64,
        len: u64,
        flags: u64,
        moffset: u64,
    }

    /// Arguments of REMOVEMAPPING; `count` items follow.
    struct RemoveMappingIn("fuse_removemapping_in") {
        count: u32,
    }

    /// One item of a REMOVEMAPPING.
    struct RemoveMappingOne("fuse_removemapping_one") {
        moffset: u64,
        len: u64,
    }
}
