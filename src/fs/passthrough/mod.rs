//! A host directory as a guest's file system.
//!
//! This file is the table of contents: each operation of [`FileSystem`] in one line, which names what the operation
//! needs. The rooms, from the lowest up; each names only those before it:
//!
//! | room | what it owns |
//! |---|---|
//! | [`host`] | system calls that reach an inode; open files of the host |
//! | [`inode`] | inodes, their descriptors, locks and modes |
//! | [`session`] | what INIT negotiated |
//! | [`caller`] | users, groups, capabilities, set-id bits |
//! | [`lock_waiters`] | requests that wait for a lock |
//! | [`handle_table`] | open files and directories of the guest |
//! | [`state`] | all of these together: one share |
//! | [`ops`] | the operations |
//! | [`start`] | the constructor |
//!
//! No file is ever reached by a path: a name is one component, looked up in the descriptor of its directory without
//! following links, and only regular files and directories are opened.

mod caller;
mod handle_table;
mod host;
mod inode;
mod lock_waiters;
mod ops;
mod session;
mod start;
mod start_error;
mod state;

use std::ffi::CStr;
use std::sync::Arc;

use log::debug;

pub use self::inode::range_lock;
use self::ops::xattr::Xattrs;
use self::ops::{attributes, data, file_flags, locks, lookup, namespace_ops, open, readdir};
use self::session::Session;
pub use self::start_error::StartError;
pub use self::state::PassthroughFs;
use super::{Context, DeviceDescriptors, FileSystem, Opened, Result, XattrReply};
use crate::config::Insistence;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::flags::{FsyncFlags, InitFlags, OpenRequestFlags, ReleaseFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId, Unique};
use fuse_protocol::init::Negotiated;
use fuse_protocol::ioctl::{Command, Reply};
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{CopyFileRange, Create, Lock, Read, Rename, Setattr, Statx, Tmpfile, Write};

impl PassthroughFs {
    fn xattrs(&self) -> Xattrs<'_> {
        Xattrs::new(&self.config, &self.identity, self.session())
    }
}

impl FileSystem for PassthroughFs {
    fn offered_flags(&self) -> InitFlags {
        let mut flags = InitFlags::ASYNC_READ
            | InitFlags::ATOMIC_O_TRUNC
            | InitFlags::BIG_WRITES
            | InitFlags::AUTO_INVAL_DATA
            | InitFlags::ASYNC_DIO
            | InitFlags::PARALLEL_DIROPS
            | InitFlags::HAS_IOCTL_DIR
            | InitFlags::CREATE_SUPP_GROUP
            | InitFlags::SETXATTR_EXT
            | InitFlags::ALLOW_IDMAP;
        let config = &self.config;
        flags.set(InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO, config.readdirplus);
        flags.set(InitFlags::SECURITY_CTX, self.offers_labels);
        flags.set(InitFlags::POSIX_ACL | InitFlags::DONT_MASK, self.offers_acls);
        flags.set(InitFlags::HANDLE_KILLPRIV_V2, config.killpriv_v2);
        flags.set(InitFlags::SUBMOUNTS, config.announce_submounts);
        flags.set(InitFlags::POSIX_LOCKS, config.posix_lock);
        flags.set(InitFlags::FLOCK_LOCKS, config.flock);
        // Where the guest may cache data, mappings may be as old as its cache.
        let maps_direct = config.allow_mmap || !config.cache.bypasses_page_cache();
        flags.set(InitFlags::DIRECT_IO_ALLOW_MMAP, maps_direct);
        // Where nothing is cached, nothing is written back.
        flags.set(InitFlags::WRITEBACK_CACHE, config.writeback && !config.cache.bypasses_page_cache());
        flags
    }

    fn required_flags(&self) -> InitFlags {
        let mut flags = InitFlags::empty();
        flags.set(InitFlags::POSIX_ACL, self.config.posix_acl == Insistence::Always);
        flags.set(InitFlags::SECURITY_CTX, self.config.security_label == Insistence::Always);
        flags
    }

    fn init(&self, negotiated: &Negotiated) {
        self.session.store(Arc::new(Session::new(&self.config, negotiated)));
    }

    fn keep_back(&self, device: DeviceDescriptors) {
        self.inodes.reserve_for(device);
    }

    fn destroy(&self) {
        debug!("the session ends with {} inodes known", self.inodes.len());
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: NodeId, name: LookupName<'_>) -> Result<Entry> {
        lookup::lookup(&self.inodes, &self.view(), &*self.inode(parent)?, name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, _ctx: &Context, node: NodeId, _handle: Option<HandleId>) -> Result<Attributes> {
        attributes::getattr(&self.view(), &*self.inode(node)?)
    }

    fn setattr(&self, ctx: &Context, node: NodeId, set: &Setattr) -> Result<Attributes> {
        attributes::setattr(self, ctx, &*self.inode(node)?, set)
    }

    fn statx(&self, _ctx: &Context, node: NodeId, _statx: &Statx) -> Result<StatxReply> {
        attributes::statx(&self.view(), &*self.inode(node)?)
    }

    fn readlink(&self, _ctx: &Context, node: NodeId) -> Result<Vec<u8>> {
        namespace_ops::readlink(&*self.inode(node)?)
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, name: Name<'_>, target: &CStr) -> Result<Entry> {
        namespace_ops::symlink(self, ctx, &*self.inode(parent)?, name, target)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> Result<Entry> {
        namespace_ops::mknod(self, ctx, &*self.inode(parent)?, name, (mode, umask), rdev)
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, name: Name<'_>, mode: u32, umask: u32) -> Result<Entry> {
        namespace_ops::mkdir(self, ctx, &*self.inode(parent)?, name, mode, umask)
    }

    fn unlink(&self, _ctx: &Context, parent: NodeId, name: Name<'_>) -> Result<()> {
        namespace_ops::unlink(&*self.inode(parent)?, name)
    }

    fn rmdir(&self, _ctx: &Context, parent: NodeId, name: Name<'_>) -> Result<()> {
        namespace_ops::rmdir(&*self.inode(parent)?, name)
    }

    fn rename(&self, ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        let (from, to) = (self.inode(parent)?, self.inode(rename.new_parent)?);
        namespace_ops::rename(&self.identity, &self.session(), ctx, (&from, &to), rename)
    }

    fn link(&self, _ctx: &Context, node: NodeId, new_parent: NodeId, name: Name<'_>) -> Result<Entry> {
        let (inode, parent) = (self.inode(node)?, self.inode(new_parent)?);
        namespace_ops::link(&self.inodes, &self.view(), &inode, &parent, name)
    }

    fn open(&self, ctx: &Context, node: NodeId, flags: u32, open_flags: OpenRequestFlags) -> Result<Opened> {
        open::open(self, ctx, self.inode(node)?, flags, open_flags)
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        open::create(self, ctx, &*self.inode(parent)?, create)
    }

    fn tmpfile(&self, ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)> {
        open::tmpfile(self, ctx, parent, tmpfile)
    }

    fn read(&self, _ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        data::read(self.opener(), &*self.handles.get(node, read.handle)?, read, data)
    }

    fn write(&self, ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        let session = self.session();
        let (kill_priv, writeback) = (self.kill_priv(&session), session.policy.writeback);
        let handle = self.handles.get(node, write.handle)?;
        data::write(self.opener(), kill_priv, writeback, ctx, &handle, write, data)
    }

    fn statfs(&self, _ctx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        attributes::statfs(&*self.inode(node)?)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        flags: ReleaseFlags,
        owner: LockOwner,
    ) -> Result<()> {
        open::release(self, node, handle, flags, owner)
    }

    fn fsync(&self, _ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()> {
        data::fsync(&*self.handles.get(node, handle)?, flags)
    }

    fn flush(&self, _ctx: &Context, node: NodeId, handle: HandleId, owner: LockOwner) -> Result<()> {
        data::flush(&*self.handles.get(node, handle)?, owner)
    }

    fn opendir(&self, _ctx: &Context, node: NodeId, _flags: u32) -> Result<Opened> {
        open::opendir(self, self.inode(node)?)
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        readdir::readdir(&self.inodes, &self.view(), &*self.handles.get(node, handle)?, offset, out)
    }

    fn releasedir(&self, _ctx: &Context, node: NodeId, handle: HandleId) -> Result<()> {
        self.handles.remove(node, handle).map(drop)
    }

    fn fsyncdir(&self, _ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()> {
        data::fsync(&*self.handles.get(node, handle)?, flags)
    }

    fn access(&self, ctx: &Context, node: NodeId, mask: u32) -> Result<()> {
        attributes::access(&self.view(), ctx, &*self.inode(node)?, mask)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        let handle = self.handles.get(node, handle)?;
        let fallocate = || data::fallocate(&handle, mode, offset, length);
        self.kill_priv(&self.session()).change(ctx, handle.inode(), fallocate)
    }

    fn lseek(&self, _ctx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        let writeback = self.session().policy.writeback;
        data::lseek(&*self.handles.get(node, handle)?, offset, whence, writeback)
    }

    fn copy_file_range(&self, ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64> {
        let source = self.handles.get(node, copy.handle_in)?;
        let target = self.handles.get(copy.node_out, copy.handle_out)?;
        let copy = || data::copy_file_range(self.opener(), &source, &target, copy);
        self.kill_priv(&self.session()).change(ctx, target.inode(), copy)
    }

    fn syncfs(&self, _ctx: &Context, node: NodeId) -> Result<()> {
        attributes::syncfs(&self.inodes, &self.host, &*self.inode(node)?, !self.session().submounts)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        acl_kill_sgid: bool,
    ) -> Result<()> {
        self.xattrs().setxattr(ctx, &*self.inode(node)?, (name, value), flags, acl_kill_sgid)
    }

    fn getxattr(&self, _ctx: &Context, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        self.xattrs().getxattr(&*self.inode(node)?, name, size)
    }

    fn listxattr(&self, _ctx: &Context, node: NodeId, size: u32) -> Result<XattrReply> {
        self.xattrs().listxattr(&*self.inode(node)?, size)
    }

    fn removexattr(&self, _ctx: &Context, node: NodeId, name: &CStr) -> Result<()> {
        self.xattrs().removexattr(&*self.inode(node)?, name)
    }

    fn getlk(&self, _ctx: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock> {
        locks::getlk(self, &*self.handles.get(node, lock.handle)?, lock)
    }

    fn setlk(&self, _ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        locks::setlk(self, &*self.handles.get(node, lock.handle)?, lock, None)
    }

    fn setlkw(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        locks::setlk(self, &*self.handles.get(node, lock.handle)?, lock, Some(ctx.unique))
    }

    fn ioctl(&self, ctx: &Context, node: NodeId, handle: HandleId, command: Command) -> Result<Reply> {
        file_flags::ioctl(&self.identity, ctx, &*self.handles.get(node, handle)?, command)
    }

    fn interrupt(&self, unique: Unique) -> Result<()> {
        self.lock_waiters.interrupt(unique)
    }

    fn put_back(&self, unique: Unique) {
        self.lock_waiters.put_back(unique);
    }

    fn interrupt_all(&self) {
        self.lock_waiters.interrupt_all();
    }
}
