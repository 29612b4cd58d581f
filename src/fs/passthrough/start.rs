//! How a share begins: its checks of the host, and the state that it starts with.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::{info, warn};
use rustix::io::Errno;

use super::caller::identity::Identity;
use super::handle_table::HandleTable;
use super::host::{self, Host};
use super::inode::settler::MappedFiles;
use super::inode::{self, FdCache, InodeKey, InodeTable, OwnerRecords, Records};
use super::lock_waiters::LockWaiters;
use super::migrate::{self, Collector, SavedLocks};
use super::ops::{growing, labels, mapped, xattr};
use super::start_error::StartError;
use super::state::PassthroughFs;
use crate::fs::Agreement;
use crate::fs::passthrough::config::{FsConfig, InodeFileHandles};
use crate::limits::{FdQuota, Limits};
use crate::state_file::StateFile;
use crate::sys::pressure::MemoryPressure;
use fuse_protocol::ids::NodeId;

impl PassthroughFs {
    /// Serves the directory `root` (an O_PATH descriptor is enough) within `limits`. `proc_self_fd` is the directory
    /// `/proc/self/fd` of this process.
    ///
    /// Nothing of the process changes, and it may have any number of these. Before the first request its umask has to be
    /// 0 and its working directory `/proc/self/fd`: see
    /// [`prepare_for_requests`](crate::process::prepare_for_requests).
    pub fn new(
        root: OwnedFd,
        proc_self_fd: OwnedFd,
        limits: Limits,
        config: FsConfig,
        state: &Arc<StateFile>,
    ) -> Result<PassthroughFs, StartError> {
        let key = InodeKey::of(&host::stat(&root)?);
        // As all that is opened for the guest.
        rustix::io::fcntl_setfd(&root, rustix::io::FdFlags::empty())?;
        let offers_acls = xattr::offers_acls(&root, &config)?;
        let records = Records::new(state);
        let fd_cache = fd_cache(config.inode_file_handles, &root, &limits.fds, &records)?;
        let inodes = InodeTable::new(limits.fds.acquire()?.wrap(root), key, fd_cache)?;
        Ok(PassthroughFs::with(
            inodes,
            Host::new(proc_self_fd, config.readonly),
            limits,
            config,
            state,
            offers_acls,
        ))
    }

    /// Goes on serving what an earlier process has left in `state`, which no other process uses any more. `fdinfo` is the
    /// directory `/proc/self/fdinfo` of this process, which tells the locks of open files. What is left to do beside requests is
    /// [`PassthroughFs::background`].
    pub fn restore(
        proc_self_fd: OwnedFd,
        fdinfo: &OwnedFd,
        limits: Limits,
        config: FsConfig,
        state: &Arc<StateFile>,
    ) -> Result<PassthroughFs, StartError> {
        let records = Records::new(state);
        let root = inode::root_descriptor(&records)?;
        let offers_acls = xattr::offers_acls(&root, &config)?;
        let fd_cache = fd_cache(config.inode_file_handles, &root, &limits.fds, &records)?;
        let (inodes, forgotten) = InodeTable::restore(fd_cache)?;
        let host = Host::new(proc_self_fd, config.readonly);
        let fs = PassthroughFs::with(inodes, host, limits, config, state, offers_acls);
        fs.restore_files(&forgotten, fdinfo);
        migrate::restore_saved_locks(&fs);
        Ok(fs)
    }

    /// Opens anew, below `root`, what an earlier process has left in `state`: the share was mounted again since.
    /// [`PassthroughFs::restore`] is to follow.
    pub fn reopen(root: &OwnedFd, proc_self_fd: &OwnedFd, state: &Arc<StateFile>) -> Result<(), StartError> {
        let done = inode::reopen(state, root, proc_self_fd)?;
        info!(
            "{} of {} inodes that the guest knows and {} of {} files that it has open are there again",
            done.inodes.0, done.inodes.1, done.files.0, done.files.1
        );
        if done.lock_owners > 0 {
            warn!("{} owners of file locks in the guest have none any more", done.lock_owners);
        }
        Ok(())
    }

    fn with(
        inodes: InodeTable,
        host: Host,
        limits: Limits,
        config: FsConfig,
        state: &Arc<StateFile>,
        offers_acls: bool,
    ) -> PassthroughFs {
        PassthroughFs {
            identity: Identity::new(&config),
            host,
            inodes: Arc::new(inodes),
            handles: HandleTable::new(limits.memory, state),
            lock_waiters: LockWaiters::default(),
            locked_ranges: limits.locked_ranges,
            owner_records: OwnerRecords::new(state),
            offers_acls,
            offers_labels: false,
            writes_mapped: mapped::obstacle(&config).is_none(),
            mapped_capability: xattr::mapped_capability(&config),
            agreement: Arc::new(Agreement::of(state)),
            config,
            collector: Collector::default(),
            growing: growing::Growing::default(),
            mapped_files: Arc::default(),
            saved_locks: SavedLocks::default(),
        }
    }

    /// Gives memory back when the host is short of it.
    pub fn watch_memory(&self, pressure: &Arc<MemoryPressure>) {
        self.mapped_files.watch(pressure);
    }

    /// What a share that goes on has to do beside requests.
    pub fn background(&self) -> Background {
        Background { inodes: Arc::clone(&self.inodes), mapped_files: Arc::clone(&self.mapped_files) }
    }

    /// Whether inodes may be evicted and opened again by file handle, which takes a capability and two system calls.
    pub fn uses_file_handles(&self) -> bool {
        self.inodes.uses_file_handles()
    }

    /// Checks whether security labels can be written, with the capabilities that the process has by now. Without this
    /// call they are not offered to guests.
    pub fn try_labels(&mut self) -> Result<(), StartError> {
        let root = self.inode(NodeId::ROOT)?.path()?;
        self.offers_labels = labels::offers_labels(&*root, &self.config)?;
        Ok(())
    }
}

/// Work that [`PassthroughFs::restore`] has left for threads: inodes that are not made or not found yet, and times of files that the
/// earlier process has written.
#[derive(Debug)]
pub struct Background {
    inodes: Arc<InodeTable>,
    mapped_files: Arc<MappedFiles>,
}

impl Background {
    /// Begins it. The threads have the capabilities and the filter of the caller.
    pub fn begin(self) {
        self.mapped_files.settle_after_death();
        migrate::resolve_in_background(&self.inodes);
    }
}

/// The cache of inodes' descriptors, with or without a limit.
fn fd_cache(
    wanted: InodeFileHandles,
    root: &OwnedFd,
    quota: &Arc<FdQuota>,
    records: &Arc<Records>,
) -> Result<FdCache, StartError> {
    match (wanted, FdCache::limited(root, quota, records)) {
        (InodeFileHandles::Never, _) => Ok(FdCache::unlimited(quota, records)),
        (_, Ok(cache)) => Ok(cache),
        (InodeFileHandles::Mandatory, Err(_)) => Err(StartError::NoFileHandles),
        (InodeFileHandles::Prefer, Err(errno)) => {
            warn_without_handles(errno, quota);
            Ok(FdCache::unlimited(quota, records))
        }
    }
}

/// Logs at the start what is hard to guess from an EMFILE later: inodes have to keep their descriptors, for which
/// `errno` is the reason.
fn warn_without_handles(errno: Errno, quota: &FdQuota) {
    let remedy = match errno {
        Errno::PERM => "raise --rlimit-nofile, or start the daemon with CAP_DAC_READ_SEARCH",
        _ => "raise --rlimit-nofile",
    };
    warn!(
        "inodes cannot be held by file handles here ({errno}), so the guest can know and open {} files at once, and gets EMFILE (too many open files) for more; {remedy} if it needs more",
        quota.max()
    );
}
