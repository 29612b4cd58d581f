//! A file system that the guest can only read.
//!
//! Whatever would change the share is refused with EROFS, and where a read-only mount of Linux has
//! a better answer (a name that is there already is EEXIST), with that. Locks are taken: they
//! change nothing.
//!
//! Every operation is listed here, either passed on or refused. One that is missing is answered
//! ENOSYS, so that a new operation changes nothing until it is listed.

use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::transfer::{Load, Transfer};
use super::{Agreement, Context, DeviceDescriptors, FileSystem, Opened, Result, XattrReply, errno};
use crate::metrics::Gauges;
use crate::migration::{MigrationError, Snapshot};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::ioctl;
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{
    Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Ioctl, Link, Listxattr, Lock,
    Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr, Rename,
    Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};

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
        match self.inner.lookup(ctx, parent, &Lookup { name: LookupName::Entry(name) }) {
            Ok(entry) => {
                self.inner.take_back_lookup(ctx, entry.node);
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
        fn agreement() -> Result<&Arc<Agreement>>;
        fn keep_back(device: DeviceDescriptors);
        fn destroy();
        fn lookup(ctx: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry>;
        fn forget(ctx: &Context, node: NodeId, count: u64);
        fn take_back_lookup(ctx: &Context, node: NodeId);
        fn getattr(ctx: &Context, node: NodeId, getattr: &Getattr) -> Result<Attributes>;
        fn statx(ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply>;
        fn readlink(ctx: &Context, node: NodeId) -> Result<Vec<u8>>;
        fn read(ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize>;
        fn may_begin() -> bool;
        fn gauges() -> Gauges;
        fn begin_read(
            ctx: &Context, node: NodeId, read: &Read, load: Load
        ) -> Result<Option<Box<dyn Transfer>>>;
        fn statfs(ctx: &Context, node: NodeId) -> Result<abi::Kstatfs>;
        fn release(ctx: &Context, node: NodeId, release: &Release) -> Result<()>;
        fn fsync(ctx: &Context, node: NodeId, fsync: &Fsync) -> Result<()>;
        fn flush(ctx: &Context, node: NodeId, flush: &Flush) -> Result<()>;
        fn opendir(ctx: &Context, node: NodeId, opendir: &Opendir) -> Result<Opened>;
        fn readdir(
            ctx: &Context, node: NodeId, readdir: &Readdir, out: &mut DirectoryWriter<'_>
        ) -> Result<()>;
        fn releasedir(ctx: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()>;
        fn fsyncdir(ctx: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()>;
        fn lseek(ctx: &Context, node: NodeId, lseek: &Lseek) -> Result<u64>;
        fn syncfs(ctx: &Context, node: NodeId) -> Result<()>;
        fn getxattr(ctx: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply>;
        fn listxattr(ctx: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply>;
        fn getlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock>;
        fn setlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        fn setlkw(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        fn interrupt(unique: Unique) -> Result<()>;
        fn put_back(unique: Unique);
        fn interrupt_all();
        fn prepare_save();
        fn resume();
        fn cancel_save();
        fn save() -> std::result::Result<Snapshot, MigrationError>;
        fn load(snapshot: Snapshot) -> std::result::Result<(), MigrationError>;
    }

    fn offered_flags(&self) -> InitFlags {
        self.inner.offered_flags() - InitFlags::WRITEBACK_CACHE
    }

    fn open(&self, ctx: &Context, node: NodeId, open: &Open) -> Result<Opened> {
        if writes(open.flags) {
            return Err(Errno::ROFS);
        }
        self.inner.open(ctx, node, open)
    }

    /// O_CREAT may be set on an open that only reads what is there.
    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        if writes(create.flags) || create.flags & OFlags::EXCL.bits() != 0 {
            return match self.refuse_new(ctx, parent, create.name) {
                Errno::EXIST if create.flags & OFlags::EXCL.bits() == 0 => Err(Errno::ROFS),
                errno => Err(errno),
            };
        }
        let lookup = Lookup { name: LookupName::Entry(create.name) };
        let entry = match self.inner.lookup(ctx, parent, &lookup) {
            Err(Errno::NOENT) => return Err(Errno::ROFS),
            found => found?,
        };
        let open = Open { flags: create.flags, open_flags: create.open_flags };
        match self.inner.open(ctx, entry.node, &open) {
            Ok(opened) => Ok((entry, opened)),
            Err(errno) => {
                self.inner.take_back_lookup(ctx, entry.node);
                Err(errno)
            }
        }
    }

    fn access(&self, ctx: &Context, node: NodeId, access: &Access) -> Result<()> {
        if access.mask & WRITE_ACCESS != 0 {
            let attributes = self.inner.getattr(ctx, node, &Getattr { handle: None })?;
            // Devices, FIFOs and sockets can be written to on a read-only file system.
            let kind = FileType::from_raw_mode(attributes.attr.mode);
            if matches!(kind, FileType::RegularFile | FileType::Directory | FileType::Symlink) {
                return Err(Errno::ROFS);
            }
        }
        self.inner.access(ctx, node, access)
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, symlink: &Symlink<'_>) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, symlink.name))
    }

    fn mknod(&self, ctx: &Context, parent: NodeId, mknod: &Mknod<'_>) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, mknod.name))
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, mkdir: &Mkdir<'_>) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, mkdir.name))
    }

    fn link(&self, ctx: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry> {
        Err(self.refuse_new(ctx, parent, link.name))
    }

    fn tmpfile(&self, _: &Context, _: NodeId, _: &Tmpfile) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }

    fn unlink(&self, _: &Context, _: NodeId, _: &Unlink<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn rmdir(&self, _: &Context, _: NodeId, _: &Rmdir<'_>) -> Result<()> {
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

    fn begin_write(&self, _: &Context, _: NodeId, _: &Write, _: Load) -> Result<Option<Box<dyn Transfer>>> {
        Err(Errno::ROFS)
    }

    fn fallocate(&self, _: &Context, _: NodeId, _: &Fallocate) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn copy_file_range(&self, _: &Context, _: NodeId, _: &CopyFileRange) -> Result<u64> {
        Err(Errno::ROFS)
    }

    fn setxattr(&self, _: &Context, _: NodeId, _: &Setxattr<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn ioctl(&self, ctx: &Context, node: NodeId, ioctl: &Ioctl<'_>) -> Result<ioctl::Reply> {
        if ioctl.command().map_err(|error| errno(error.errno()))?.changes() {
            return Err(Errno::ROFS);
        }
        self.inner.ioctl(ctx, node, ioctl)
    }

    fn removexattr(&self, _: &Context, _: NodeId, _: &Removexattr<'_>) -> Result<()> {
        Err(Errno::ROFS)
    }
}
