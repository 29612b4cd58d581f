//! A host directory as a guest's file system.
//!
//! [`inodes`] holds every inode that the guest knows, by an O_PATH descriptor or a file handle;
//! [`handles`] what it has open. No file is ever reached by a path: a name is one component, looked up in the
//! descriptor of its directory without following links, and only regular files and directories
//! are opened.

mod attributes;
mod budget;
mod close;
pub mod config;
mod credentials;
mod data;
mod directories;
mod file_flags;
mod handles;
mod host_file;
mod identity;
mod inode;
mod inodes;
pub mod io_mode;
mod labels;
mod listing;
mod lock_ranges;
pub mod locks;
mod lookup;
mod mounts;
mod names;
mod open;
mod pins;
pub mod range_lock;
mod set_id;
mod shards;
mod start;
mod xattr;

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arc_swap::ArcSwap;
use log::debug;
use rustix::io::Errno;

use self::budget::Budget;
use self::config::{FeatureMode, FsConfig};
use self::credentials::OwnIds;
use self::handles::HandleTable;
use self::inodes::{Inode, InodeTable};
use self::io_mode::IoPolicy;
use self::lock_ranges::RangeCount;
use self::locks::Waits;
pub use self::start::StartError;
use self::start::{descriptors, open_descriptors};
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

/// What guest and daemon agreed on, as far as it matters here.
#[derive(Clone, Copy, Debug)]
struct Session {
    policy: IoPolicy,
    /// Directories that are roots of other mounts are marked.
    submounts: bool,
    /// The guest says whether a change is to clear set-id bits (HANDLE_KILLPRIV_V2).
    says_who_clears: bool,
    /// The guest says whether an ACL is to clear the set-group-ID bit (SETXATTR_EXT).
    long_setxattr: bool,
    /// New files keep the set-group-ID bit that they are asked for: the guest's kernel has decided.
    keeps_group_bit: bool,
    /// The guest leaves umasks to us.
    leaves_umask: bool,
    /// The guest evaluates ACLs, and so may see and set them.
    acls: bool,
    /// What is created gets the guest's security labels.
    labels: bool,
}

/// The file system below one directory of the host.
pub struct PassthroughFs {
    config: FsConfig,
    own: OwnIds,
    /// `/proc/self/fd`: opens an inode anew by the number of its O_PATH descriptor.
    proc_self_fd: OwnedFd,
    /// Descriptors that are held for the guest.
    budget: Arc<Budget>,
    inodes: InodeTable,
    handles: HandleTable,
    waits: Waits,
    /// Byte ranges that are locked.
    lock_ranges: Arc<RangeCount>,
    /// ACLs can be had on the host, and were asked for.
    offers_acls: bool,
    /// The same with security labels.
    offers_labels: bool,
    /// See [`xattr::mapped_capability`].
    mapped_capability: Option<CString>,
    session: ArcSwap<Session>,
}

impl PassthroughFs {
    /// Serves the directory `root` (an O_PATH descriptor is enough). `proc_self_fd` is the
    /// directory `/proc/self/fd` of this process.
    ///
    /// The process must be prepared by [`prepare_for_requests`](crate::process::prepare_for_requests): its umask is 0,
    /// and its working directory is `proc_self_fd`, which gives the system calls that take no descriptor a way to
    /// name one. Nothing of the process is changed here, so it can have several of these.
    pub fn new(
        root: OwnedFd,
        proc_self_fd: OwnedFd,
        config: FsConfig,
    ) -> std::result::Result<PassthroughFs, StartError> {
        let stat = lookup::stat(&root)?;
        let offers_acls = xattr::acls_can_be_had(&root, &config)?;
        let budget = Arc::new(Budget::of_the_process(open_descriptors(&proc_self_fd)?));
        let descriptors = descriptors(config.inode_file_handles, &root, &budget)?;
        let inodes = InodeTable::new(budget.take()?.hold(root), lookup::key(&stat), descriptors)?;
        let session = Session {
            policy: IoPolicy::new(&config, InitFlags::empty()),
            submounts: false,
            says_who_clears: false,
            long_setxattr: false,
            keeps_group_bit: false,
            leaves_umask: false,
            acls: false,
            labels: false,
        };
        Ok(PassthroughFs {
            offers_acls,
            offers_labels: false,
            mapped_capability: xattr::mapped_capability(&config),
            config,
            own: OwnIds::current(),
            proc_self_fd,
            budget,
            inodes,
            handles: HandleTable::default(),
            waits: Waits::default(),
            lock_ranges: Arc::default(),
            session: ArcSwap::from_pointee(session),
        })
    }

    /// Whether inodes may be held by file handles, which takes a capability and two system calls.
    pub fn uses_file_handles(&self) -> bool {
        self.inodes.uses_file_handles()
    }

    /// Finds out whether security labels can be written, with the capabilities that the process has
    /// by now. Without this they are not offered to guests.
    pub fn try_labels(&mut self) -> std::result::Result<(), StartError> {
        let root = self.inode(NodeId::ROOT)?.path()?;
        self.offers_labels = labels::can_be_had(&*root, &self.config)?;
        Ok(())
    }

    fn session(&self) -> Session {
        **self.session.load()
    }

    fn inode(&self, node: NodeId) -> Result<Arc<Inode>> {
        self.inodes.get(node)
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

    fn init(&self, negotiated: &Negotiated) {
        let flags = negotiated.flags;
        self.session.store(Arc::new(Session {
            policy: IoPolicy::new(&self.config, flags),
            submounts: flags.contains(InitFlags::SUBMOUNTS),
            says_who_clears: flags.contains(InitFlags::HANDLE_KILLPRIV_V2),
            long_setxattr: flags.contains(InitFlags::SETXATTR_EXT),
            keeps_group_bit: identity::guest_strips_group_bit(negotiated),
            leaves_umask: flags.contains(InitFlags::DONT_MASK),
            acls: flags.contains(InitFlags::POSIX_ACL),
            labels: flags.contains(InitFlags::SECURITY_CTX),
        }));
    }

    fn keep_back(&self, device: DeviceDescriptors) {
        self.inodes.keep_back(device);
    }

    fn destroy(&self) {
        debug!("the session ends with {} inodes known", self.inodes.len());
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: NodeId, name: LookupName<'_>) -> Result<Entry> {
        let parent = self.inode(parent)?;
        match name {
            LookupName::Entry(name) => self.look_up(&parent, name.as_c_str()),
            LookupName::This => self.look_up_self(&parent),
            LookupName::Parent => self.look_up_parent(&parent),
        }
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, _ctx: &Context, node: NodeId, _handle: Option<HandleId>) -> Result<Attributes> {
        self.attributes(&*self.inode(node)?)
    }

    fn setattr(&self, ctx: &Context, node: NodeId, set: &Setattr) -> Result<Attributes> {
        self.set_attributes(ctx, node, set)
    }

    fn statx(&self, _ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply> {
        self.extended_attributes(&*self.inode(node)?, statx)
    }

    fn readlink(&self, _ctx: &Context, node: NodeId) -> Result<Vec<u8>> {
        self.read_link(&*self.inode(node)?)
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, name: Name<'_>, target: &CStr) -> Result<Entry> {
        self.make_symlink(ctx, &*self.inode(parent)?, name, target)
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
        self.make_node(ctx, &*self.inode(parent)?, name, (mode, umask), rdev)
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, name: Name<'_>, mode: u32, umask: u32) -> Result<Entry> {
        self.make_directory(ctx, &*self.inode(parent)?, name, mode, umask)
    }

    fn unlink(&self, _ctx: &Context, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.remove_name(&*self.inode(parent)?, name, false)
    }

    fn rmdir(&self, _ctx: &Context, parent: NodeId, name: Name<'_>) -> Result<()> {
        self.remove_name(&*self.inode(parent)?, name, true)
    }

    fn rename(&self, ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        self.rename_entry(ctx, &*self.inode(parent)?, &*self.inode(rename.new_parent)?, rename)
    }

    fn link(&self, _ctx: &Context, node: NodeId, new_parent: NodeId, name: Name<'_>) -> Result<Entry> {
        self.make_link(&self.inode(node)?, &*self.inode(new_parent)?, name)
    }

    fn open(&self, ctx: &Context, node: NodeId, flags: u32, open_flags: OpenRequestFlags) -> Result<Opened> {
        self.open_file(ctx, self.inode(node)?, flags, open_flags)
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        self.create_file(ctx, &*self.inode(parent)?, create)
    }

    fn tmpfile(&self, ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)> {
        if !self.config.tmpfile {
            return Err(Errno::NOSYS);
        }
        self.create_unnamed(ctx, &*self.inode(parent)?, tmpfile)
    }

    fn read(&self, _ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        self.read_data(&*self.handles.get(node, read.handle)?, read, data)
    }

    fn write(&self, ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        self.write_data(ctx, &*self.handles.get(node, write.handle)?, write, data)
    }

    fn statfs(&self, _ctx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        attributes::file_system(&*self.inode(node)?)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        flags: ReleaseFlags,
        owner: LockOwner,
    ) -> Result<()> {
        self.close_file(node, handle, flags, owner)
    }

    fn fsync(&self, _ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()> {
        data::sync(&*self.handles.get(node, handle)?, flags)
    }

    fn flush(&self, _ctx: &Context, node: NodeId, handle: HandleId, owner: LockOwner) -> Result<()> {
        self.flush_handle(&*self.handles.get(node, handle)?, owner)
    }

    fn opendir(&self, _ctx: &Context, node: NodeId, _flags: u32) -> Result<Opened> {
        self.open_directory(self.inode(node)?)
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        self.list(&*self.handles.get(node, handle)?, offset, out)
    }

    fn releasedir(&self, _ctx: &Context, node: NodeId, handle: HandleId) -> Result<()> {
        self.handles.remove(node, handle).map(drop)
    }

    fn fsyncdir(&self, _ctx: &Context, node: NodeId, handle: HandleId, flags: FsyncFlags) -> Result<()> {
        data::sync(&*self.handles.get(node, handle)?, flags)
    }

    fn access(&self, ctx: &Context, node: NodeId, mask: u32) -> Result<()> {
        self.check_access(ctx, &*self.inode(node)?, mask)
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
        self.change(ctx, &handle.inode, || data::allocate(&handle, mode, offset, length))
    }

    fn lseek(&self, _ctx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        self.seek(&*self.handles.get(node, handle)?, offset, whence)
    }

    fn copy_file_range(&self, ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64> {
        let source = self.handles.get(node, copy.handle_in)?;
        let target = self.handles.get(copy.node_out, copy.handle_out)?;
        self.change(ctx, &target.inode, || self.copy_data(&source, &target, copy))
    }

    fn syncfs(&self, _ctx: &Context, node: NodeId) -> Result<()> {
        self.sync_file_system(&*self.inode(node)?)
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
        self.set_xattr(ctx, &*self.inode(node)?, (name, value), flags, acl_kill_sgid)
    }

    fn getxattr(&self, _ctx: &Context, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        self.get_xattr(&*self.inode(node)?, name, size)
    }

    fn listxattr(&self, _ctx: &Context, node: NodeId, size: u32) -> Result<XattrReply> {
        self.list_xattr(&*self.inode(node)?, size)
    }

    fn removexattr(&self, _ctx: &Context, node: NodeId, name: &CStr) -> Result<()> {
        self.remove_xattr(&*self.inode(node)?, name)
    }

    fn getlk(&self, _ctx: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock> {
        self.test_lock(&*self.handles.get(node, lock.handle)?, lock)
    }

    fn setlk(&self, _ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        self.take_lock(&*self.handles.get(node, lock.handle)?, lock, None)
    }

    fn setlkw(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        self.take_lock(&*self.handles.get(node, lock.handle)?, lock, Some(ctx.unique))
    }

    fn ioctl(&self, ctx: &Context, node: NodeId, handle: HandleId, command: Command) -> Result<Reply> {
        self.file_flags(ctx, &*self.handles.get(node, handle)?, command)
    }

    fn interrupt(&self, unique: Unique) -> Result<()> {
        self.waits.interrupt(unique)
    }

    fn put_back(&self, unique: Unique) {
        self.waits.put_back(unique);
    }

    fn interrupt_all(&self) {
        self.waits.interrupt_all();
    }
}
