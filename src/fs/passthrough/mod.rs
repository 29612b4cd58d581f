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
pub mod config;
mod handle_table;
mod host;
mod inode;
mod lock_waiters;
mod ops;
mod session;
mod start;
mod start_error;
mod state;

use std::sync::Arc;

use log::debug;

use self::config::FeatureMode;
pub use self::inode::range_lock;
use self::ops::xattr::Xattrs;
use self::ops::{attributes, data, file_flags, locks, lookup, namespace_ops, open, readdir};
pub use self::start_error::StartError;
pub use self::state::PassthroughFs;
use super::{Agreement, Context, DeviceDescriptors, FileSystem, Opened, Result, XattrReply, errno};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::flags::{InitFlags, SetxattrFlags};
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::ioctl;
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{
    Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Ioctl, Link, Listxattr, Lock,
    Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr, Rename,
    Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};

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
        flags.set(InitFlags::POSIX_ACL, self.config.posix_acl == FeatureMode::Always);
        flags.set(InitFlags::SECURITY_CTX, self.config.security_label == FeatureMode::Always);
        flags
    }

    fn agreement(&self) -> Result<&Arc<Agreement>> {
        Ok(&self.agreement)
    }

    fn keep_back(&self, device: DeviceDescriptors) {
        self.inodes.reserve_for(device);
    }

    fn destroy(&self) {
        debug!("the session ends with {} inodes known", self.inodes.len());
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry> {
        lookup::lookup(&self.inodes, &self.view(), &*self.inode(parent)?, lookup.name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, _ctx: &Context, node: NodeId, _getattr: &Getattr) -> Result<Attributes> {
        attributes::getattr(&self.view(), &*self.inode(node)?)
    }

    fn setattr(&self, ctx: &Context, node: NodeId, setattr: &Setattr) -> Result<Attributes> {
        attributes::setattr(self, ctx, &*self.inode(node)?, setattr)
    }

    fn statx(&self, _ctx: &Context, node: NodeId, _statx: &Statx) -> Result<StatxReply> {
        attributes::statx(&self.view(), &*self.inode(node)?)
    }

    fn readlink(&self, _ctx: &Context, node: NodeId) -> Result<Vec<u8>> {
        namespace_ops::readlink(&*self.inode(node)?)
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, symlink: &Symlink<'_>) -> Result<Entry> {
        namespace_ops::symlink(self, ctx, &*self.inode(parent)?, symlink.name, symlink.target)
    }

    fn mknod(&self, ctx: &Context, parent: NodeId, mknod: &Mknod<'_>) -> Result<Entry> {
        namespace_ops::mknod(
            self,
            ctx,
            &*self.inode(parent)?,
            mknod.name,
            (mknod.mode, mknod.umask),
            mknod.rdev,
        )
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, mkdir: &Mkdir<'_>) -> Result<Entry> {
        namespace_ops::mkdir(self, ctx, &*self.inode(parent)?, mkdir.name, mkdir.mode, mkdir.umask)
    }

    fn unlink(&self, _ctx: &Context, parent: NodeId, unlink: &Unlink<'_>) -> Result<()> {
        namespace_ops::unlink(&*self.inode(parent)?, unlink.name)
    }

    fn rmdir(&self, _ctx: &Context, parent: NodeId, rmdir: &Rmdir<'_>) -> Result<()> {
        namespace_ops::rmdir(&*self.inode(parent)?, rmdir.name)
    }

    fn rename(&self, ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        let (from, to) = (self.inode(parent)?, self.inode(rename.new_parent)?);
        namespace_ops::rename(&self.identity, &self.session(), ctx, (&from, &to), rename)
    }

    fn link(&self, _ctx: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry> {
        let (inode, parent) = (self.inode(link.target)?, self.inode(parent)?);
        namespace_ops::link(&self.inodes, &self.view(), &inode, &parent, link.name)
    }

    fn open(&self, ctx: &Context, node: NodeId, open: &Open) -> Result<Opened> {
        open::open(self, ctx, self.inode(node)?, open.flags, open.open_flags)
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

    fn release(&self, _ctx: &Context, node: NodeId, release: &Release) -> Result<()> {
        open::release(self, node, release.handle, release.flags, release.lock_owner)
    }

    fn fsync(&self, _ctx: &Context, node: NodeId, fsync: &Fsync) -> Result<()> {
        data::fsync(&*self.handles.get(node, fsync.handle)?, fsync.flags)
    }

    fn flush(&self, _ctx: &Context, node: NodeId, flush: &Flush) -> Result<()> {
        data::flush(&*self.handles.get(node, flush.handle)?, flush.lock_owner)
    }

    fn opendir(&self, _ctx: &Context, node: NodeId, _opendir: &Opendir) -> Result<Opened> {
        open::opendir(self, self.inode(node)?)
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: NodeId,
        readdir: &Readdir,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        readdir::readdir(
            &self.inodes,
            &self.view(),
            &*self.handles.get(node, readdir.handle)?,
            readdir.offset,
            out,
        )
    }

    fn releasedir(&self, _ctx: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()> {
        self.handles.remove(node, releasedir.handle).map(drop)
    }

    fn fsyncdir(&self, _ctx: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()> {
        data::fsync(&*self.handles.get(node, fsyncdir.handle)?, fsyncdir.flags)
    }

    fn access(&self, ctx: &Context, node: NodeId, access: &Access) -> Result<()> {
        attributes::access(&self.view(), ctx, &*self.inode(node)?, access.mask)
    }

    fn fallocate(&self, ctx: &Context, node: NodeId, fallocate: &Fallocate) -> Result<()> {
        let Fallocate { handle, offset, length, mode } = *fallocate;
        let handle = self.handles.get(node, handle)?;
        let fallocate = || data::fallocate(&handle, mode, offset, length);
        self.kill_priv(&self.session()).change(ctx, handle.inode(), fallocate)
    }

    fn lseek(&self, _ctx: &Context, node: NodeId, lseek: &Lseek) -> Result<u64> {
        let writeback = self.session().policy.writeback;
        data::lseek(&*self.handles.get(node, lseek.handle)?, lseek.offset, lseek.whence, writeback)
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

    fn setxattr(&self, ctx: &Context, node: NodeId, setxattr: &Setxattr<'_>) -> Result<()> {
        let Setxattr { name, value, flags, setxattr_flags } = *setxattr;
        let kill_sgid = setxattr_flags.contains(SetxattrFlags::ACL_KILL_SGID);
        self.xattrs().setxattr(ctx, &*self.inode(node)?, (name, value), flags, kill_sgid)
    }

    fn getxattr(&self, _ctx: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply> {
        self.xattrs().getxattr(&*self.inode(node)?, getxattr.name, getxattr.size)
    }

    fn listxattr(&self, _ctx: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply> {
        self.xattrs().listxattr(&*self.inode(node)?, listxattr.size)
    }

    fn removexattr(&self, _ctx: &Context, node: NodeId, removexattr: &Removexattr<'_>) -> Result<()> {
        self.xattrs().removexattr(&*self.inode(node)?, removexattr.name)
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

    fn ioctl(&self, ctx: &Context, node: NodeId, ioctl: &Ioctl<'_>) -> Result<ioctl::Reply> {
        let command = ioctl.command().map_err(|error| errno(error.errno()))?;
        file_flags::ioctl(&self.identity, ctx, &*self.handles.get(node, ioctl.handle)?, command)
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
