//! A file system that the guest cannot change.

use std::ffi::CStr;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Context, FileSystem, Opened, Result};
use crate::fuse::flags::OpenRequestFlags;
use crate::fuse::ids::{HandleId, NodeId};
use crate::fuse::name::Name;
use crate::fuse::reply::{Attributes, Entry};
use crate::fuse::request::{CopyFileRange, Create, Rename, Setattr, Tmpfile, Write};
use crate::sys::guest_buffers::GuestReader;

/// `W_OK` of access(2).
const W_OK: u32 = 2;

/// Answers EROFS to all that would change the file system below.
pub struct ReadOnly<F>(F);

impl<F: FileSystem> ReadOnly<F> {
    /// Makes `fs` read-only.
    pub fn new(fs: F) -> ReadOnly<F> {
        ReadOnly(fs)
    }
}

impl<F: FileSystem> FileSystem for ReadOnly<F> {
    fn below(&self) -> Result<&dyn FileSystem> {
        Ok(&self.0)
    }

    fn open(&self, ctx: &Context, node: NodeId, flags: u32, open_flags: OpenRequestFlags) -> Result<Opened> {
        let flags_set = OFlags::from_bits_retain(flags);
        if flags_set & OFlags::RWMODE != OFlags::RDONLY || flags_set.contains(OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        self.0.open(ctx, node, flags, open_flags)
    }

    fn access(&self, ctx: &Context, node: NodeId, mask: u32) -> Result<()> {
        if mask & W_OK != 0 { Err(Errno::ROFS) } else { self.0.access(ctx, node, mask) }
    }

    fn setattr(&self, _: &Context, _: NodeId, _: &Setattr) -> Result<Attributes> {
        Err(Errno::ROFS)
    }

    fn symlink(&self, _: &Context, _: NodeId, _: Name<'_>, _: &CStr) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn mknod(&self, _: &Context, _: NodeId, _: Name<'_>, _: u32, _: u32, _: u32) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn mkdir(&self, _: &Context, _: NodeId, _: Name<'_>, _: u32, _: u32) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn unlink(&self, _: &Context, _: NodeId, _: Name<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn rmdir(&self, _: &Context, _: NodeId, _: Name<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn rename(&self, _: &Context, _: NodeId, _: &Rename<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn link(&self, _: &Context, _: NodeId, _: NodeId, _: Name<'_>) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn create(&self, _: &Context, _: NodeId, _: &Create<'_>) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }

    fn tmpfile(&self, _: &Context, _: NodeId, _: &Tmpfile) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }

    fn write(&self, _: &Context, _: NodeId, _: &Write, _: &mut GuestReader<'_>) -> Result<usize> {
        Err(Errno::ROFS)
    }

    fn fallocate(&self, _: &Context, _: NodeId, _: HandleId, _: u32, _: u64, _: u64) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn copy_file_range(&self, _: &Context, _: NodeId, _: &CopyFileRange) -> Result<u64> {
        Err(Errno::ROFS)
    }

    fn setxattr(&self, _: &Context, _: NodeId, _: &CStr, _: &[u8], _: u32, _: bool) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn removexattr(&self, _: &Context, _: NodeId, _: &CStr) -> Result<()> {
        Err(Errno::ROFS)
    }
}
