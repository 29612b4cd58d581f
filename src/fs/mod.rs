//! The interface between the server and a file system.
//!
//! [`FileSystem`] has one method per FUSE operation; each takes the struct of its operation
//! ([`fuse_protocol::request`]). All take `&self`, since many workers call at once. A method that is not
//! overridden passes the call on to the file system below, or answers ENOSYS.

mod agreement;
pub mod null;
pub mod passthrough;
pub mod read_only;
pub mod transfer;

use std::sync::Arc;

use rustix::io::Errno;

pub use self::agreement::Agreement;
use self::transfer::{Load, Transfer};
pub use crate::limits::DeviceDescriptors;
use crate::metrics::Gauges;
use crate::migration::{MigrationError, Snapshot};
use crate::state_file::Effects;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::extensions::Labels;
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::{GuestGid, GuestUid, NodeId, Unique};
use fuse_protocol::ioctl;
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
pub use fuse_protocol::reply::{Opened, XattrReply};
use fuse_protocol::request::{
    self, Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Ioctl, Link, Listxattr,
    Lock, Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr,
    Rename, Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};

/// The errno that the guest gets, or a value.
pub type Result<T> = std::result::Result<T, Errno>;

/// An error of the protocol as the host's.
pub fn errno(errno: fuse_protocol::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno.raw())
}

/// What a wait ends with that [`FileSystem::put_back`] has ended; no guest gets it. (The number is
/// Linux' ERESTARTSYS, which is for its inside, too.)
pub const PUT_BACK: Errno = Errno::from_raw_os_error(512);

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The guest's number for the request.
    pub unique: Unique,
    /// The caller's user.
    pub uid: GuestUid,
    /// The caller's group.
    pub gid: GuestGid,
    /// The caller's process in the guest.
    pub pid: u32,
    /// The one supplementary group that matters for creating calls.
    pub supplementary_group: Option<GuestGid>,
    /// Security labels of what is created.
    pub labels: Labels<'a>,
    /// What the request does that must not be done twice if it is served again.
    pub effects: Effects<'a>,
}

impl<'a> Context<'a> {
    /// Who sent the request, whose effects are noted there.
    #[inline]
    pub fn of(request: &request::Request<'a>, effects: Effects<'a>) -> Context<'a> {
        let header = &request.header;
        Context {
            unique: header.unique,
            uid: header.uid,
            gid: header.gid,
            pid: header.pid,
            supplementary_group: header.supplementary_group,
            labels: request.labels,
            effects,
        }
    }
}

/// The operations of a file system that is served to a guest.
pub trait FileSystem: Send + Sync {
    /// The file system that this one wraps: it serves what this one does not. Without one that is
    /// ENOSYS.
    fn below(&self) -> Result<&dyn FileSystem> {
        Err(Errno::NOSYS)
    }

    /// The INIT flags that this file system can honour.
    fn offered_flags(&self) -> InitFlags {
        self.below().map_or(InitFlags::empty(), FileSystem::offered_flags)
    }

    /// The INIT flags without which a guest is not to be served.
    fn required_flags(&self) -> InitFlags {
        self.below().map_or(InitFlags::empty(), FileSystem::required_flags)
    }

    /// What INIT negotiated: the server writes it, the file system reads it. ENOSYS for a file system that
    /// does not need it.
    fn agreement(&self) -> Result<&Arc<Agreement>> {
        self.below()?.agreement()
    }

    /// The device has taken descriptors, or given some back: what is held for the guest is to leave it those
    /// that it may still take.
    fn keep_back(&self, device: DeviceDescriptors) {
        if let Ok(fs) = self.below() {
            fs.keep_back(device);
        }
    }

    /// A session ends, by DESTROY, reset or disconnect: inodes, handles and locks are dropped.
    fn destroy(&self) {
        if let Ok(fs) = self.below() {
            fs.destroy();
        }
    }

    /// Finds an entry; its inode's lookup count goes up by one.
    fn lookup(&self, ctx: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry> {
        self.below()?.lookup(ctx, parent, lookup)
    }

    /// Takes `count` off the lookup count of an inode, for FORGET and each item of a BATCH_FORGET.
    fn forget(&self, ctx: &Context, node: NodeId, count: u64) {
        if let Ok(fs) = self.below() {
            fs.forget(ctx, node, count);
        }
    }

    /// Takes back the lookup that the request has counted last: the guest does not get the entry.
    fn take_back_lookup(&self, ctx: &Context, node: NodeId) {
        match self.below() {
            Ok(fs) => fs.take_back_lookup(ctx, node),
            Err(_) => self.forget(ctx, node, 1),
        }
    }

    /// Attributes of an inode.
    fn getattr(&self, ctx: &Context, node: NodeId, getattr: &Getattr) -> Result<Attributes> {
        self.below()?.getattr(ctx, node, getattr)
    }

    /// Changes attributes and returns the new ones.
    fn setattr(&self, ctx: &Context, node: NodeId, setattr: &Setattr) -> Result<Attributes> {
        self.below()?.setattr(ctx, node, setattr)
    }

    /// Extended attributes of an inode as statx(2) has them.
    fn statx(&self, ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply> {
        self.below()?.statx(ctx, node, statx)
    }

    /// Target of a symbolic link.
    fn readlink(&self, ctx: &Context, node: NodeId) -> Result<Vec<u8>> {
        self.below()?.readlink(ctx, node)
    }

    /// Creates a symbolic link.
    fn symlink(&self, ctx: &Context, parent: NodeId, symlink: &Symlink<'_>) -> Result<Entry> {
        self.below()?.symlink(ctx, parent, symlink)
    }

    /// Creates a file of any type but directory and symbolic link.
    fn mknod(&self, ctx: &Context, parent: NodeId, mknod: &Mknod<'_>) -> Result<Entry> {
        self.below()?.mknod(ctx, parent, mknod)
    }

    /// Creates a directory.
    fn mkdir(&self, ctx: &Context, parent: NodeId, mkdir: &Mkdir<'_>) -> Result<Entry> {
        self.below()?.mkdir(ctx, parent, mkdir)
    }

    /// Removes a name that is no directory.
    fn unlink(&self, ctx: &Context, parent: NodeId, unlink: &Unlink<'_>) -> Result<()> {
        self.below()?.unlink(ctx, parent, unlink)
    }

    /// Removes an empty directory.
    fn rmdir(&self, ctx: &Context, parent: NodeId, rmdir: &Rmdir<'_>) -> Result<()> {
        self.below()?.rmdir(ctx, parent, rmdir)
    }

    /// Renames an entry of `parent`.
    fn rename(&self, ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        self.below()?.rename(ctx, parent, rename)
    }

    /// Gives an inode another name, in `parent`.
    fn link(&self, ctx: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry> {
        self.below()?.link(ctx, parent, link)
    }

    /// Opens a regular file.
    fn open(&self, ctx: &Context, node: NodeId, open: &Open) -> Result<Opened> {
        self.below()?.open(ctx, node, open)
    }

    /// Creates (or opens, without O_EXCL) a regular file and opens it.
    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        self.below()?.create(ctx, parent, create)
    }

    /// Creates and opens a file without a name.
    fn tmpfile(&self, ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)> {
        self.below()?.tmpfile(ctx, parent, tmpfile)
    }

    /// Reads into guest memory; returns the bytes read, fewer than asked for only at end of file.
    /// `data` has room for exactly `read.size` bytes.
    fn read(&self, ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        self.below()?.read(ctx, node, read, data)
    }

    /// Writes out of guest memory; `data` holds exactly `write.size` bytes. Returns the bytes
    /// written: fewer only if an error came after the first byte.
    fn write(&self, ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        self.below()?.write(ctx, node, write, data)
    }

    /// What the guest has, for the counters. May take as long as a listing.
    fn gauges(&self) -> Gauges {
        self.below().map_or_else(|_| Gauges::default(), |fs| fs.gauges())
    }

    /// Whether there may be files whose READs and WRITEs are for an engine, just now. Asked for each of them: it must cost
    /// next to nothing.
    fn may_begin(&self) -> bool {
        false
    }

    /// Begins a READ whose system call an engine makes; `None` if [`FileSystem::read`] is to serve it. What it changes
    /// for the thread that calls is undone.
    fn begin_read(
        &self,
        _ctx: &Context,
        _node: NodeId,
        _read: &Read,
        _load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        // A file system that does something of its own with data must not be left out.
        Ok(None)
    }

    /// The same for a WRITE.
    fn begin_write(
        &self,
        _ctx: &Context,
        _node: NodeId,
        _write: &Write,
        _load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        Ok(None)
    }

    /// File system figures.
    fn statfs(&self, ctx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        self.below()?.statfs(ctx, node)
    }

    /// Closes a file handle.
    fn release(&self, ctx: &Context, node: NodeId, release: &Release) -> Result<()> {
        self.below()?.release(ctx, node, release)
    }

    /// Makes a file durable.
    fn fsync(&self, ctx: &Context, node: NodeId, fsync: &Fsync) -> Result<()> {
        self.below()?.fsync(ctx, node, fsync)
    }

    /// One descriptor of an open file was closed in the guest; drops the owner's POSIX locks.
    fn flush(&self, ctx: &Context, node: NodeId, flush: &Flush) -> Result<()> {
        self.below()?.flush(ctx, node, flush)
    }

    /// Opens a directory.
    fn opendir(&self, ctx: &Context, node: NodeId, opendir: &Opendir) -> Result<Opened> {
        self.below()?.opendir(ctx, node, opendir)
    }

    /// Lists a directory until `out` is full. With `out.plus()` each entry but `.` and `..` counts as looked
    /// up once.
    fn readdir(
        &self,
        ctx: &Context,
        node: NodeId,
        readdir: &Readdir,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        self.below()?.readdir(ctx, node, readdir, out)
    }

    /// Closes a directory handle.
    fn releasedir(&self, ctx: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()> {
        self.below()?.releasedir(ctx, node, releasedir)
    }

    /// Makes a directory durable.
    fn fsyncdir(&self, ctx: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()> {
        self.below()?.fsyncdir(ctx, node, fsyncdir)
    }

    /// access(2) for the caller.
    fn access(&self, ctx: &Context, node: NodeId, access: &Access) -> Result<()> {
        self.below()?.access(ctx, node, access)
    }

    /// fallocate(2).
    fn fallocate(&self, ctx: &Context, node: NodeId, fallocate: &Fallocate) -> Result<()> {
        self.below()?.fallocate(ctx, node, fallocate)
    }

    /// lseek(2) for SEEK_DATA and SEEK_HOLE; returns the offset found.
    fn lseek(&self, ctx: &Context, node: NodeId, lseek: &Lseek) -> Result<u64> {
        self.below()?.lseek(ctx, node, lseek)
    }

    /// copy_file_range(2); returns the bytes copied.
    fn copy_file_range(&self, ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64> {
        self.below()?.copy_file_range(ctx, node, copy)
    }

    /// Makes the whole file system durable.
    fn syncfs(&self, ctx: &Context, node: NodeId) -> Result<()> {
        self.below()?.syncfs(ctx, node)
    }

    /// setxattr(2).
    fn setxattr(&self, ctx: &Context, node: NodeId, setxattr: &Setxattr<'_>) -> Result<()> {
        self.below()?.setxattr(ctx, node, setxattr)
    }

    /// getxattr(2); `size` 0 asks for the length alone, a value longer than `size` is ERANGE.
    fn getxattr(&self, ctx: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply> {
        self.below()?.getxattr(ctx, node, getxattr)
    }

    /// listxattr(2), with `size` as for [`FileSystem::getxattr`].
    fn listxattr(&self, ctx: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply> {
        self.below()?.listxattr(ctx, node, listxattr)
    }

    /// removexattr(2).
    fn removexattr(&self, ctx: &Context, node: NodeId, removexattr: &Removexattr<'_>) -> Result<()> {
        self.below()?.removexattr(ctx, node, removexattr)
    }

    /// The lock that stands in the way of `lock`, or one of kind unlock.
    fn getlk(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock> {
        self.below()?.getlk(ctx, node, lock)
    }

    /// Takes or drops a lock without waiting; EAGAIN if it is held.
    fn setlk(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        self.below()?.setlk(ctx, node, lock)
    }

    /// Takes a lock, waiting for it on the calling thread; EINTR after [`FileSystem::interrupt`]
    /// or [`FileSystem::interrupt_all`], and [`PUT_BACK`] after [`FileSystem::put_back`].
    fn setlkw(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        self.below()?.setlkw(ctx, node, lock)
    }

    /// Reads or changes the flags of an open file or directory ([`Ioctl::command`]); ENOTTY for any other
    /// command.
    fn ioctl(&self, ctx: &Context, node: NodeId, ioctl: &Ioctl<'_>) -> Result<ioctl::Reply> {
        self.below()?.ioctl(ctx, node, ioctl)
    }

    /// INTERRUPT: ends the wait of request `unique`. EAGAIN if it does not wait: it may not have come so far
    /// yet, and the guest should try again.
    fn interrupt(&self, unique: Unique) -> Result<()> {
        self.below()?.interrupt(unique)
    }

    /// Ends the wait of request `unique`, if it waits, so that it can be served once more. It is called
    /// again until the wait has ended.
    fn put_back(&self, unique: Unique) {
        match self.below() {
            Ok(fs) => fs.put_back(unique),
            // Not put back, but ended.
            Err(_) => drop(self.interrupt(unique)),
        }
    }

    /// The guest may be saved soon: what takes long can be prepared, beside requests. It is called again when the memory
    /// log begins again.
    fn prepare_save(&self) {
        if let Ok(fs) = self.below() {
            fs.prepare_save();
        }
    }

    /// The memory log ends: the guest will not be saved after all, or was. What was given up for another daemon stays so until
    /// [`FileSystem::resume`].
    fn cancel_save(&self) {
        if let Ok(fs) = self.below() {
            fs.cancel_save();
        }
    }

    /// All that the guest knows. It serves no request meanwhile, and can go on afterwards.
    fn save(&self) -> std::result::Result<Snapshot, MigrationError> {
        self.below().map_err(|_| MigrationError::unsupported())?.save()
    }

    /// The share is served again, perhaps after it was saved: what was given up for another daemon is taken again.
    fn resume(&self) {
        if let Ok(fs) = self.below() {
            fs.resume();
        }
    }

    /// Takes over what another daemon has saved. It has served no request and has no session. After an error the caller
    /// destroys it.
    fn load(&self, snapshot: Snapshot) -> std::result::Result<(), MigrationError> {
        self.below().map_err(|_| MigrationError::unsupported())?.load(snapshot)
    }

    /// Ends all waits for locks, since the session ends. It is called again until they have ended.
    fn interrupt_all(&self) {
        if let Ok(fs) = self.below() {
            fs.interrupt_all();
        }
    }
}
