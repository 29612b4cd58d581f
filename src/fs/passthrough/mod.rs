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
//! | [`migrate`] | the share as a snapshot, and from one |
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
mod migrate;
mod ops;
mod restore;
mod session;
mod start;
mod start_error;
mod state;

use std::sync::Arc;

use log::debug;
use rustix::io::Errno;

use self::config::{FeatureMode, IoEngine};
use self::inode::Inode;
pub use self::inode::range_lock;
use self::ops::data::Writing;
pub use self::ops::mapped::obstacle as mapped_writes_obstacle;
use self::ops::replay::Found;
use self::ops::xattr::Xattrs;
use self::ops::{
    attributes, data, file_flags, locks, lookup, namespace_ops, open, readdir, replay, transfer,
};
pub use self::start_error::StartError;
pub use self::state::PassthroughFs;
use super::transfer::{Load, Transfer};
use super::{Agreement, Context, DeviceDescriptors, FileSystem, Opened, Result, XattrReply, errno};
use crate::metrics::Gauges;
use crate::migration::config::StreamFormat;
use crate::migration::{MigrationError, Snapshot};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::abi;
use fuse_protocol::flags::{InitFlags, SetxattrFlags};
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::ioctl;
use fuse_protocol::name::Name;
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{
    Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Ioctl, Link, Listxattr, Lock,
    Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr, Rename,
    Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};

impl PassthroughFs {
    /// Changes what entries of directories mean: a migration has to know them before, or find them again afterwards.
    fn changing<T>(&self, entries: &[(NodeId, Name<'_>)], change: impl FnOnce() -> Result<T>) -> Result<T> {
        for (parent, name) in entries {
            self.inodes.resolve_entry(*parent, name.as_c_str().to_bytes());
        }
        let changed = change();
        for (parent, name) in entries {
            self.collector.touch(*parent, name.as_c_str().to_bytes());
        }
        changed
    }

    /// Whether an engine serves many writers of the file, for which it is open with O_DIRECT.
    fn writes_directly(&self, inode: &Inode) -> bool {
        self.config.io_engine != IoEngine::Threads && inode.mount().is_fuse()
    }

    fn engine(&self, load: Load) -> transfer::Engine<'_> {
        let (opener, growing) = (self.opener(), &self.growing);
        transfer::Engine { kind: self.config.io_engine, load, opener, growing }
    }

    fn xattrs(&self) -> Xattrs<'_> {
        Xattrs::new(&self.config, &self.identity, self.session())
    }
}

fn count(number: usize) -> u64 {
    number as u64
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
            | InitFlags::ALLOW_IDMAP;
        let config = &self.config;
        flags.set(InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO, config.readdirplus);
        flags.set(InitFlags::SECURITY_CTX, self.offers_labels);
        flags.set(InitFlags::POSIX_ACL | InitFlags::DONT_MASK, self.offers_acls);
        // virtiofsd, to which the guest may move, takes the long form of SETXATTR for granted only with ACLs.
        let moves_to_virtiofsd = config.migration.format == StreamFormat::Virtiofsd;
        flags.set(InitFlags::SETXATTR_EXT, self.offers_acls || !moves_to_virtiofsd);
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
        drop(self.collector.take());
        self.mapped_files.end_session();
        self.handles.clear();
        self.inodes.clear();
        self.inodes.state().clear_saved_locks();
    }

    fn lookup(&self, ctx: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry> {
        lookup::lookup(&self.inodes, &self.view(ctx), &*self.inode(parent)?, lookup.name)
    }

    fn forget(&self, ctx: &Context, node: NodeId, count: u64) {
        self.inodes.forget(ctx.effects, node, count);
    }

    fn take_back_lookup(&self, ctx: &Context, node: NodeId) {
        self.inodes.take_back_lookup(ctx.effects, node);
    }

    fn getattr(&self, ctx: &Context, node: NodeId, _getattr: &Getattr) -> Result<Attributes> {
        attributes::getattr(&self.view(ctx), &*self.inode(node)?)
    }

    fn setattr(&self, ctx: &Context, node: NodeId, setattr: &Setattr) -> Result<Attributes> {
        attributes::setattr(self, ctx, &*self.inode(node)?, setattr)
    }

    fn statx(&self, ctx: &Context, node: NodeId, _statx: &Statx) -> Result<StatxReply> {
        attributes::statx(&self.view(ctx), &*self.inode(node)?)
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

    fn unlink(&self, ctx: &Context, parent: NodeId, unlink: &Unlink<'_>) -> Result<()> {
        self.changing(&[(parent, unlink.name)], || {
            namespace_ops::unlink(ctx.effects, &*self.inode(parent)?, unlink.name)
        })
    }

    fn rmdir(&self, ctx: &Context, parent: NodeId, rmdir: &Rmdir<'_>) -> Result<()> {
        self.changing(&[(parent, rmdir.name)], || {
            namespace_ops::rmdir(ctx.effects, &*self.inode(parent)?, rmdir.name)
        })
    }

    fn rename(&self, ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        let (from, to) = (self.inode(parent)?, self.inode(rename.new_parent)?);
        self.changing(&[(parent, rename.name), (rename.new_parent, rename.new_name)], || {
            namespace_ops::rename(&self.identity, &self.session(), ctx, (&from, &to), rename)
        })
    }

    fn link(&self, ctx: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry> {
        let (inode, parent) = (self.inode(link.target)?, self.inode(parent)?);
        namespace_ops::link(&self.inodes, &self.view(ctx), &inode, &parent, link.name)
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
        let (opener, growing, mapping) = (self.opener(), &self.growing, self.mapping());
        let writing = Writing { opener, growing, kill_priv, writeback, mapping };
        data::write(writing, ctx, &handle, write, data)
    }

    fn may_begin(&self) -> bool {
        match self.config.io_engine {
            IoEngine::Threads => false,
            IoEngine::IoUring => true,
            IoEngine::Auto => self.config.allow_direct_io || self.inodes.fd_cache().has_fuse(),
        }
    }

    fn begin_read(
        &self,
        _ctx: &Context,
        node: NodeId,
        read: &Read,
        load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        transfer::read(self.engine(load), self.handles.get(node, read.handle)?, read)
    }

    fn begin_write(
        &self,
        ctx: &Context,
        node: NodeId,
        write: &Write,
        load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        let session = self.session();
        let (kill_priv, writeback) = (self.kill_priv(&session), session.policy.writeback);
        let handle = self.handles.get(node, write.handle)?;
        transfer::write(self.engine(load), kill_priv, writeback, ctx, handle, write)
    }

    fn statfs(&self, _ctx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        attributes::statfs(&*self.inode(node)?)
    }

    fn release(&self, _ctx: &Context, node: NodeId, release: &Release) -> Result<()> {
        open::release(self, node, release.handle, release.flags, release.lock_owner)
    }

    fn fsync(&self, ctx: &Context, node: NodeId, fsync: &Fsync) -> Result<()> {
        data::fsync(self.opener(), ctx.effects, &*self.handles.get(node, fsync.handle)?, fsync.flags)
    }

    fn flush(&self, _ctx: &Context, node: NodeId, flush: &Flush) -> Result<()> {
        data::flush(&*self.handles.get(node, flush.handle)?, flush.lock_owner)
    }

    fn opendir(&self, ctx: &Context, node: NodeId, _opendir: &Opendir) -> Result<Opened> {
        open::opendir(self, ctx, self.inode(node)?)
    }

    fn readdir(
        &self,
        ctx: &Context,
        node: NodeId,
        readdir: &Readdir,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        readdir::readdir(
            &self.inodes,
            &self.view(ctx),
            &*self.handles.get(node, readdir.handle)?,
            readdir.offset,
            out,
        )
    }

    fn releasedir(&self, _ctx: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()> {
        self.handles.remove(node, releasedir.handle).map(drop)
    }

    fn fsyncdir(&self, ctx: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()> {
        data::fsync(self.opener(), ctx.effects, &*self.handles.get(node, fsyncdir.handle)?, fsyncdir.flags)
    }

    fn access(&self, ctx: &Context, node: NodeId, access: &Access) -> Result<()> {
        attributes::access(&self.view(ctx), ctx, &*self.inode(node)?, access.mask)
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
        let inode = self.inode(node)?;
        let is_one = self.session().submounts;
        // Another one may be frozen.
        let only = is_one.then(|| inode.key().device);
        self.mapped_files.settle_all(only);
        let synced = attributes::syncfs(&self.inodes, &self.host, &inode, !is_one);
        self.mapped_files.synced_all(only);
        synced
    }

    fn setxattr(&self, ctx: &Context, node: NodeId, setxattr: &Setxattr<'_>) -> Result<()> {
        let Setxattr { name, value, flags, setxattr_flags } = *setxattr;
        let kill_sgid = setxattr_flags.contains(SetxattrFlags::ACL_KILL_SGID);
        let (xattrs, inode) = (self.xattrs(), self.inode(node)?);
        let is_set = || xattrs.has_value(&inode, name, value);
        let set = || xattrs.setxattr(ctx, &inode, (name, value), flags, kill_sgid);
        let done = replay::link(ctx.effects, is_set, set);
        inode.revoke_mapping();
        done
    }

    fn getxattr(&self, _ctx: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply> {
        self.xattrs().getxattr(&*self.inode(node)?, getxattr.name, getxattr.size)
    }

    fn listxattr(&self, _ctx: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply> {
        self.xattrs().listxattr(&*self.inode(node)?, listxattr.size)
    }

    fn removexattr(&self, ctx: &Context, node: NodeId, removexattr: &Removexattr<'_>) -> Result<()> {
        let inode = self.inode(node)?;
        let find = || match self.xattrs().getxattr(&inode, removexattr.name, 0) {
            Err(Errno::NODATA) => Found::Nothing,
            _ => Found::Something,
        };
        replay::remove(ctx.effects, find, || self.xattrs().removexattr(&inode, removexattr.name))
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
        let handle = self.handles.get(node, ioctl.handle)?;
        let done = file_flags::ioctl(&self.identity, ctx, &handle, command);
        handle.inode().revoke_mapping();
        done
    }

    fn gauges(&self) -> Gauges {
        let [plain, parallel, directories] = self.handles.count();
        let fds = self.inodes.fds();
        Gauges {
            inodes: count(self.inodes.len()),
            plain,
            parallel,
            directories,
            descriptors: count(fds.in_use()),
            descriptor_limit: count(fds.max()),
        }
    }

    fn prepare_save(&self) {
        self.collector.start(&self.inodes, &self.config.migration);
    }

    fn cancel_save(&self) {
        drop(self.collector.take());
    }

    fn save(&self) -> std::result::Result<Snapshot, MigrationError> {
        self.mapped_files.settle_soon();
        migrate::save(self)
    }

    fn resume(&self) {
        migrate::resume(self);
    }

    fn load(&self, snapshot: Snapshot) -> std::result::Result<(), MigrationError> {
        migrate::load(self, snapshot)?;
        migrate::resolve_in_background(&self.inodes);
        Ok(())
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
