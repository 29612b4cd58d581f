//! How a share begins: its checks of the host, and the state that it starts with.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::warn;
use rustix::io::Errno;

use super::caller::identity::Identity;
use super::handle_table::HandleTable;
use super::host::{self, Host};
use super::inode::{FdCache, InodeKey, InodeTable};
use super::lock_waiters::LockWaiters;
use super::ops::{labels, xattr};
use super::start_error::StartError;
use super::state::PassthroughFs;
use crate::fs::passthrough::config::{FsConfig, InodeFileHandles};
use crate::limits::{FdQuota, Limits};
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
    ) -> Result<PassthroughFs, StartError> {
        let Limits { fds, locked_ranges, memory } = limits;
        let key = InodeKey::of(&host::stat(&root)?);
        let offers_acls = xattr::offers_acls(&root, &config)?;
        let fd_cache = fd_cache(config.inode_file_handles, &root, &fds)?;
        Ok(PassthroughFs {
            identity: Identity::new(&config),
            host: Host::new(proc_self_fd, config.readonly),
            inodes: InodeTable::new(fds.acquire()?.wrap(root), key, fd_cache)?,
            handles: HandleTable::new(memory),
            lock_waiters: LockWaiters::default(),
            locked_ranges,
            offers_acls,
            offers_labels: false,
            mapped_capability: xattr::mapped_capability(&config),
            agreement: Arc::default(),
            config,
        })
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

/// The cache of inodes' descriptors, with or without a limit.
fn fd_cache(wanted: InodeFileHandles, root: &OwnedFd, quota: &Arc<FdQuota>) -> Result<FdCache, StartError> {
    match (wanted, FdCache::limited(root, quota)) {
        (InodeFileHandles::Never, _) => Ok(FdCache::unlimited(quota)),
        (_, Ok(cache)) => Ok(cache),
        (InodeFileHandles::Mandatory, Err(_)) => Err(StartError::NoFileHandles),
        (InodeFileHandles::Prefer, Err(errno)) => {
            warn_without_handles(errno, quota);
            Ok(FdCache::unlimited(quota))
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
