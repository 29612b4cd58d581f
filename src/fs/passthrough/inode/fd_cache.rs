//! The cache of inodes' O_PATH descriptors.
//!
//! An inode begins with a descriptor, which is the cheapest to use. When inodes have more than half of the guest's
//! quota, those that were not used lately are evicted: their descriptors are closed, and the next use opens them again
//! by file handle, as the same inode or not at all ([`super::inode_fd::InodeFd`]).
//!
//! The algorithm is CLOCK (second chance): inodes stand in a queue, each with a reference bit that every use sets. The
//! inode at the front is evicted if its bit is clear; if it is set, the bit is cleared and the inode goes to the end.
//! Shards of the queue take turns, so that workers seldom meet.
//!
//! Two thresholds decide. Above `limit`, each request evicts a few inodes until the count has fallen by an eighth: the
//! low watermark. Where inodes cannot be evicted, the limit rises; where the process runs out of descriptors, it falls.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use log::{debug, info};
use rustix::fs::FileType;
use rustix::io::Errno;

use super::mount::{self, Mount};
use super::records::Records;
use super::shards::{CachePadded, SHARDS, Shards};
use crate::fs::Result;
use crate::limits::FdQuota;
use fuse_protocol::ids::NodeId;

/// A shard of the clock drops forgotten inodes when it has grown to this or to twice what it last had.
const SMALLEST_CLOCK: usize = 64;

/// The descriptors of all inodes together, and the mounts that these are on.
#[derive(Debug)]
pub struct FdCache {
    /// Set while inodes are to be evicted. Each request reads it; it has a cache line apart from what each new inode
    /// changes.
    over_limit: CachePadded<AtomicBool>,
    /// How many inodes may have one, before some are evicted.
    limit: AtomicUsize,
    /// Whether inodes can be evicted: file handles work.
    evicts: bool,
    /// Inodes that have a descriptor and can be evicted.
    open: CachePadded<AtomicUsize>,
    /// These inodes, in the order in which their reference bits are tested.
    clock: Shards<Mutex<Clock>>,
    mounts: CachePadded<RwLock<HashMap<u32, Weak<Mount>>>>,
    reported_mount: AtomicBool,
    /// The message about a FUSE file system was logged.
    reported_fuse: AtomicBool,
    /// The guest has met a mount whose files are a FUSE server's.
    has_fuse: AtomicBool,
    /// What inodes share with all other descriptors of the guest.
    quota: Arc<FdQuota>,
    records: Arc<Records>,
}

/// A shard of the clock.
#[derive(Debug, Default)]
pub(super) struct Clock {
    nodes: VecDeque<NodeId>,
    /// Forgotten inodes are dropped at this length.
    clear_at: usize,
}

impl Clock {
    /// The inode that is tested next.
    pub(super) fn next(&mut self) -> Option<NodeId> {
        self.nodes.pop_front()
    }

    /// Puts an inode at the end. Without memory for that it keeps its descriptor.
    pub(super) fn push(&mut self, node: NodeId) {
        if self.nodes.try_reserve(1).is_ok() {
            self.nodes.push_back(node);
        }
    }

    /// Drops what is not `known`, if there may be much of that.
    pub(super) fn drop_forgotten(&mut self, known: impl Fn(NodeId) -> bool) {
        if self.nodes.len() >= self.clear_at.max(SMALLEST_CLOCK) {
            self.nodes.retain(|node| known(*node));
            self.clear_at = self.nodes.len().saturating_mul(2);
        }
    }
}

impl FdCache {
    /// No limit but the quota's: each inode keeps its descriptor.
    pub fn unlimited(quota: &Arc<FdQuota>, records: &Arc<Records>) -> FdCache {
        FdCache::with_limit(quota, records, usize::MAX)
    }

    /// Half of the quota, if inodes can be opened by handle at the share's `root`.
    ///
    /// EPERM without CAP_DAC_READ_SEARCH, EOPNOTSUPP where the file system has no durable handles.
    pub fn limited(root: impl AsFd, quota: &Arc<FdQuota>, records: &Arc<Records>) -> Result<FdCache> {
        mount::try_handles(root)?;
        Ok(FdCache::with_limit(quota, records, half_of(quota)))
    }

    pub(super) fn with_limit(quota: &Arc<FdQuota>, records: &Arc<Records>, limit: usize) -> FdCache {
        FdCache {
            over_limit: CachePadded::default(),
            limit: AtomicUsize::new(limit),
            evicts: limit != usize::MAX,
            open: CachePadded::default(),
            clock: Shards::default(),
            mounts: CachePadded::default(),
            reported_mount: AtomicBool::new(false),
            reported_fuse: AtomicBool::new(false),
            has_fuse: AtomicBool::new(false),
            quota: Arc::clone(quota),
            records: Arc::clone(records),
        }
    }

    /// The records of inodes and mounts.
    pub(super) fn records(&self) -> &Records {
        &self.records
    }

    /// The same, to keep.
    pub(super) fn shared_records(&self) -> &Arc<Records> {
        &self.records
    }

    /// Whether inodes can be evicted.
    pub(super) fn evicts(&self) -> bool {
        self.evicts
    }

    /// Whether inodes are to be evicted now.
    pub(super) fn over_limit(&self) -> bool {
        self.over_limit.load(Ordering::Relaxed)
    }

    /// The quota has changed: inodes may have half of it.
    pub(super) fn on_quota_change(&self) {
        if self.evicts {
            let limit = half_of(&self.quota);
            self.limit.store(limit, Ordering::Relaxed);
            self.over_limit.store(self.open() > limit, Ordering::Relaxed);
        }
    }

    /// What the guest's descriptors are counted by.
    pub(super) fn quota(&self) -> &Arc<FdQuota> {
        &self.quota
    }

    /// The shard of the clock that `number` belongs to.
    pub(super) fn clock(&self, number: u64) -> MutexGuard<'_, Clock> {
        self.clock.of(number).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops all inodes from the clock.
    pub(super) fn clear_clock(&self) {
        for shard in 0..SHARDS {
            *self.clock(shard as u64) = Clock::default();
        }
    }

    /// The inodes that have descriptors cannot be evicted: further attempts would be of no use.
    pub(super) fn raise_limit(&self) {
        let open = self.open();
        debug!("inodes need {open} descriptors");
        self.limit.fetch_max(open.saturating_add(open / 4), Ordering::Relaxed);
        self.check_low_watermark(open);
    }

    /// The process has no descriptors left, though the limit is not reached: inodes keep three quarters of theirs.
    pub(super) fn lower_limit(&self) {
        let open = self.open();
        self.limit.fetch_min((open - open / 4).max(1), Ordering::Relaxed);
        self.over_limit.store(true, Ordering::Relaxed);
    }

    /// Inodes that have a descriptor and can be evicted.
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// One more inode has a descriptor.
    pub(super) fn count_opened(&self) {
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed) {
            self.over_limit.store(true, Ordering::Relaxed);
        }
    }

    /// One inode has closed its descriptor.
    pub(super) fn count_closed(&self) {
        let before = self.open.fetch_sub(1, Ordering::Relaxed);
        if self.over_limit() {
            self.check_low_watermark(before.saturating_sub(1));
        }
    }

    /// Ends the evictions below the low watermark, far enough under the limit that they do not begin again at once.
    fn check_low_watermark(&self, open: usize) {
        let limit = self.limit.load(Ordering::Relaxed);
        if open <= limit - limit / 8 {
            self.over_limit.store(false, Ordering::Relaxed);
        }
    }

    /// Logs once that inodes keep their descriptors on some mount.
    pub(super) fn report_mount(&self, errno: Errno) {
        if !self.reported_mount.swap(true, Ordering::Relaxed) {
            info!(
                "a file system below the share has no durable file handles ({errno}): each of its inodes that the guest knows takes a descriptor (see --rlimit-nofile)"
            );
        }
    }

    /// The guest has met a mount whose files are a FUSE server's.
    pub(super) fn note_fuse(&self) {
        self.has_fuse.store(true, Ordering::Relaxed);
    }

    /// Whether it has met one. A thread that has an inode on it sees that.
    pub fn has_fuse(&self) -> bool {
        self.has_fuse.load(Ordering::Relaxed)
    }

    /// Logs once what is different about a FUSE file system at the share or below.
    pub(super) fn report_fuse(&self) {
        if !self.reported_fuse.swap(true, Ordering::Relaxed) {
            info!(
                "the share has a FUSE file system: each inode that the guest knows there takes a descriptor, the daemon itself clears set-id bits, locks reach as far as the server's do, and after an unmount `lanefsd reopen` is needed (docs/shared-storage.md)"
            );
        }
    }

    /// A mount that the guest knows inodes on.
    pub fn known_mount(&self, id: u32) -> Option<Arc<Mount>> {
        self.mounts.read().unwrap_or_else(PoisonError::into_inner).get(&id).and_then(Weak::upgrade)
    }

    /// All of these.
    pub fn known_mounts(&self) -> Vec<Arc<Mount>> {
        let mounts = self.mounts.read().unwrap_or_else(PoisonError::into_inner);
        mounts.values().filter_map(Weak::upgrade).collect()
    }

    /// The mount `id`, which `inode` is on.
    pub fn mount(self: &Arc<Self>, id: u32, inode: impl AsFd, kind: FileType) -> Result<Arc<Mount>> {
        if let Some(mount) = self.known_mount(id) {
            return Ok(mount);
        }
        // Made before the lock is taken, and dropped after it: both make system calls.
        self.add_mount(Mount::new(id, inode, kind, self))
    }

    /// The same for a mount that the caller has made.
    pub(super) fn add_mount(&self, new: Mount) -> Result<Arc<Mount>> {
        let (id, new) = (new.id(), Arc::new(new));
        let mut mounts = self.mounts.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = mounts.get(&id).and_then(Weak::upgrade) {
            return Ok(mount);
        }
        mounts.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        mounts.insert(id, Arc::downgrade(&new));
        Ok(new)
    }

    /// A mount has no inodes any more. Meanwhile the id may belong to a new one.
    pub(super) fn forget_mount(&self, id: u32) {
        let mut mounts = self.mounts.write().unwrap_or_else(PoisonError::into_inner);
        if mounts.get(&id).is_some_and(|mount| mount.strong_count() == 0) {
            mounts.remove(&id);
        }
    }
}

fn half_of(quota: &FdQuota) -> usize {
    (quota.max() / 2).max(1)
}
