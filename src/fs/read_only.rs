//! A file system that the guest may only look at.
//!
//! Whatever would change the share is refused with EROFS, and where a read-only mount of Linux has
//! a better answer (a name that is there already is EEXIST), with that. Locks are taken: they
//! change nothing.
//!
//! Every operation is listed here, either passed on or refused. One that is missing is answered
//! ENOSYS, so that a new operation changes nothing until somebody has thought about it.

use std::ffi::CStr;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::{Context, DeviceDescriptors, FileSystem, Opened, Result, XattrReply};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::flags::{FsyncFlags, InitFlags, OpenRequestFlags, ReleaseFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId, Unique};
use fuse_protocol::init::Negotiated;
use fuse_protocol::ioctl::{Command, Reply};
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{CopyFileRange, Create, Lock, Read, Rename, Setattr, Statx, Tmpfile, Write};

/// `W_OK` of access(2).
const WRITE_ACCESS: u32 = 2;

/// The file system `F` without its changing operations.
#[derive(Debug)]
pub struct ReadOnly<F> {
    inner: F,
}

impl<F: FileSystem> ReadOnly<F> {
    /// Makes `inner` read-only for the guest.
    pub fn new(inner: F) -> ReadOnly<F> {
        ReadOnly { inner }
    }

    /// Why `name` cannot be made: because it exists, or because nothing can.
    fn refuse_new(&self, ctx: &Context, parent: NodeId, name: Name<'_>) -> Errno {
        match self.inner.lookup(ctx, parent, LookupName::Entry(name)) {
            Ok(entry) => {
                self.inner.forget(entry.node, 1);
                Errno::EXIST
            }
            Err(Errno::NOENT) => Errno::ROFS,
            Err(errno) => errno,
        }
    }
}

/// Whether an open(2) with these flags writes.
fn writes(flags: u32) -> bool {
    let flags = OFlags::from_bits_retain(flags);
    flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

/// Operations that change nothing: the file system inside serves them.
macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self, $($argument: $kind),*) $(-> $result)? {
            self.inner.$name($($argument),*)
        })*
    };
}

impl<F: FileSystem> FileSystem for ReadOnly<F> {
    pass_on! {
        fn required_flags() -> InitFlags;
        fn init(negotiated: &Negotiated);
        fn keep_back(device: DeviceDescriptors);
        fn destroy();
        fn lookup(ctx: &Context, parent: NodeId, name: LookupName<'_>) -> Result<Entry>;
        fn forget(node: NodeId, count: u64);
        fn getattr(ctx: &Context, node: NodeId, handle: Option<HandleId>) -> Result<Attributes>;
        fn statx(ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply>;
        fn readlink(ctx: &Context, node: NodeId) -> Result<Vec<u8>>;
        fn read(ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize>;
        fn statfs(ctx: &Context, node: NodeId) -> Result<abi::Kstatfs>;
        fn release(
            ctx: &Context, node: NodeId, handle: HandleId, flags: ReleaseFlags, owner: LockOwner
        ) -> Result<()>;
        fn fsync(ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()>;
        fn flush(ctx: &Context, node: NodeId, handle: HandleId, owner: LockOwner) -> Result<()>;
        fn opendir(ctx: &Context, node: NodeId, flags: u32) -> Result<Opened>;
        fn readdir(
            ctx: &Context, node: NodeId, handle: HandleId, offset: u64, out: &mut DirectoryWriter<'_>
        ) -> Result<()>;
        fn releasedir(ctx: &Context, node: NodeId, handle: HandleId) -> Result<()>;
        fn fsyncdir(ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()>;
        fn lseek(ctx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64>;
        fn syncfs(ctx: &Context, node: NodeId) -> Result<()>;
        fn getxattr(ctx: &Context, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply>;
        fn listxattr(ctx: &Context, node: NodeId, size: u32) -> Result<XattrReply>;
        fn getlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock>;
        fn setlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        fn setlkw(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        fn interrupt(unique: Unique) -> Result<()>;
        fn put_back(unique: Unique);
        fn interrupt_all();
    }

    fn offered_flags(&self) -> InitFlags {
        self.inner.offered_flags() - InitFlags::WRITEBACK_CACHE
    }

    fn open(&self, ctx: &Context, node: NodeId, flags: u32, open_flags: OpenRequestFlags) -> Result<Opened> {
        if writes(flags) {
            return Err(Errno::ROFS);
        }
        self.inner.open(ctx, node, flags, open_flags)
    }

    /// O_CREAT may be set on an open that only reads what is there.
    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        if writes(create.flags) || create.flags & OFlags::EXCL.bits() != 0 {
            return match self.refuse_new(ctx, parent, create.name) {
                Errno::EXIST if create.flags & OFlags::EXCL.bits() == 0 => Err(Errno::ROFS),
                errno => Err(errno),
            };
        }
        let entry = match self.inner.lookup(ctx, parent, LookupName::Entry(create.name)) {
            Err(Errno::NOENT) => return Err(Errno::ROFS),
            found => found?,
        };
        match self.inner.open(ctx, entry.node, create.flags, create.open_flags) {
            Ok(opened) => Ok((entry, opened)),
            Err(errno) => {
                self.inner.forget(entry.node, 1);
                Err(errno)
            }
        }
    }

    fn access(&self, ctx: &Context, node: NodeId, mask: u32) -> Result<()> {
        if mask & WRITE_ACCESS != 0 {
            let attributes = self.inner.getattr(ctx, node, None)?;
            // Devices, FIFOs and sockets can be written to on a read-only file system.
            let kind = FileType::from_raw_mode(attributes.attr.mode);
            if matches!(kind, FileType::RegularFile | FileType::Directory | FileType::Symlink) {
                return Err(Errno::ROFS);
            }
        }
        self.inner.access(ctx, node, mask)
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, name: Name<'_>, _target: &CStr) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, name))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: NodeId,
        name: Name<'_>,
        _mode: u32,
        _rdev: u32,
        _umask: u32,
    ) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, name))
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, name: Name<'_>, _mode: u32, _umask: u32) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, name))
    }

    fn link(&self, ctx: &Context, _node: NodeId, new_parent: NodeId, name: Name<'_>) -> Result<Entry> {
        Err(self.refuse_new(ctx, new_parent, name))
    }

    fn tmpfile(&self, _: &Context, _: NodeId, _: &Tmpfile) -> Result<(Entry, Opened)> {
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

    fn setattr(&self, _: &Context, _: NodeId, _: &Setattr) -> Result<Attributes> {
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

    fn ioctl(&self, ctx: &Context, node: NodeId, handle: HandleId, command: Command) -> Result<Reply> {
        if command.changes() {
            return Err(Errno::ROFS);
        }
        self.inner.ioctl(ctx, node, handle, command)
    }

    fn removexattr(&self, _: &Context, _: NodeId, _: &CStr) -> Result<()> {
        Err(Errno::ROFS)
    }
}
