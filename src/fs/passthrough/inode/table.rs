//! The table of inodes: by the guest's node id, and by their key on the host.
//!
//! Locks: the shard of a key is locked before the shard of a node id; the hand of the clock before a shard of the clock.
//! No lock but the hand is held during a system call.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::mem::take;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Inode;
use super::fd_cache::FdCache;
use super::inode_fd::InodeFd;
use super::key::{InodeKey, Seen};
use super::mount::Mount;
use super::shards::{BuildIdHasher, CachePadded, Shards};
use crate::fs::passthrough::host::Host;
use crate::fs::{DeviceDescriptors, Result};
use crate::limits::{FdPermit, FdQuota, GuestFd};
use crate::sys::file_handles::{FileHandle, name_to_handle};
use fuse_protocol::ids::NodeId;

/// An inode in a table where it is found by its node id.
#[derive(Debug)]
struct ByNode(Arc<Inode>);

/// An inode in a table where it is found by its key.
#[derive(Debug)]
struct ByKey(Arc<Inode>);

/// Only the inode has the key: a guest may know millions.
macro_rules! found_by {
    ($entry:ty, $field:ident, $key:ty) => {
        impl Borrow<$key> for $entry {
            fn borrow(&self) -> &$key {
                &self.0.$field
            }
        }

        impl Hash for $entry {
            fn hash<H: Hasher>(&self, state: &mut H) {
                self.0.$field.hash(state);
            }
        }

        impl PartialEq for $entry {
            fn eq(&self, other: &$entry) -> bool {
                self.0.$field == other.0.$field
            }
        }

        impl Eq for $entry {}
    };
}

found_by!(ByNode, node, NodeId);
found_by!(ByKey, key, InodeKey);

/// All inodes of a session.
#[derive(Debug)]
pub struct InodeTable {
    by_node: Shards<RwLock<HashSet<ByNode, BuildIdHasher>>>,
    /// Without those that were deleted on the host and whose number another inode has now.
    by_key: Shards<Mutex<HashSet<ByKey>>>,
    next_node: CachePadded<AtomicU64>,
    root: Arc<Inode>,
    fd_cache: Arc<FdCache>,
    /// The hand of the clock: the shard that is next. Locked by the thread that evicts inodes.
    hand: Mutex<u64>,
}

/// Inodes that one sweep of the clock evicts, at two system calls each, ...
const EVICT_MAX: usize = 8;
/// ... and reference bits that it tests.
const SWEEP: usize = 32;
/// Sweeps of a request that gets no descriptor.
const MAX_SWEEPS: usize = 32;

impl InodeTable {
    /// A table with the root alone.
    pub fn new(root: GuestFd, key: InodeKey, fd_cache: FdCache) -> Result<InodeTable> {
        let fd_cache = Arc::new(fd_cache);
        let mount = fd_cache.mount(key.mount, &root, FileType::Directory)?;
        let key = key.on(&mount, &root);
        let root = Arc::new(Inode::new(NodeId::ROOT, key, FileType::Directory, InodeFd::new(root, mount)));
        root.mount().add_top(&root);
        let next_node = CachePadded::<AtomicU64>::default();
        next_node.store(NodeId::ROOT.0 + 1, Ordering::Relaxed);
        let table = InodeTable {
            by_node: Shards::default(),
            by_key: Shards::default(),
            next_node,
            root,
            fd_cache,
            hand: Mutex::new(0),
        };
        table.insert_root();
        Ok(table)
    }

    /// The inode with this id; ESTALE if the guest has forgotten it or never knew it.
    pub fn get(&self, node: NodeId) -> Result<Arc<Inode>> {
        if self.fd_cache.over_limit() {
            self.evict_some();
        }
        if node == NodeId::ROOT {
            return Ok(Arc::clone(&self.root));
        }
        let inode = self.known(node).ok_or(Errno::STALE)?;
        if inode.fd.is_evicted() && matches!(inode.path(), Err(Errno::MFILE | Errno::NFILE)) {
            self.process_is_full();
        }
        Ok(inode)
    }

    fn known(&self, node: NodeId) -> Option<Arc<Inode>> {
        let shard = self.node_shard(node).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&node).map(|entry| Arc::clone(&entry.0))
    }

    /// The permit to keep one more descriptor open for the guest. Inodes are evicted for it if need be.
    pub fn acquire_fd(&self) -> Result<FdPermit> {
        match self.fds().acquire() {
            Err(Errno::MFILE) if self.make_room() => self.fds().acquire(),
            result => result,
        }
    }

    /// What `open` opens. Where the process has no descriptor left at all, inodes are evicted.
    pub fn with_room(&self, open: impl Fn() -> Result<OwnedFd>) -> Result<OwnedFd> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) if self.process_is_full() => open(),
            result => result,
        }
    }

    /// Opens an inode with `flags`: regular files and directories only. Devices, FIFOs and sockets belong to the
    /// guest's kernel and are never opened on the host.
    pub fn open(&self, host: &Host, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        match inode.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let path = inode.path()?;
        self.with_room(|| host.open_for_guest(&*path, flags))
    }

    /// The quota of the guest's descriptors.
    pub fn fds(&self) -> &Arc<FdQuota> {
        self.fd_cache.quota()
    }

    /// The root.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// The cache of inodes' descriptors, and the mounts that they are on.
    pub fn fd_cache(&self) -> &Arc<FdCache> {
        &self.fd_cache
    }

    /// Node ids up to this one, exclusively, have been assigned. An inode with one of them had its descriptor before this
    /// call (see [`InodeTable::find_or_insert`], which assigns them).
    pub fn ids_given(&self) -> NodeId {
        NodeId(self.next_node.load(Ordering::Acquire))
    }

    /// The inode that was just seen if the guest knows it; counts one more lookup. `None` also where only a descriptor of
    /// what was seen can tell.
    ///
    /// An inode with a descriptor has its number for itself, so the number is enough. Without one it is
    /// identified by its handle, which `ask` gets from the host. An inode that got its id after the call may
    /// have taken the number over since.
    pub fn find(&self, seen: &Seen, ask: impl FnOnce() -> Result<FileHandle>) -> Option<Arc<Inode>> {
        let shard = self.key_shard(&seen.key);
        match compare(&shard, seen, None) {
            Known::As(inode) => return Some(inode),
            Known::Not => return None,
            Known::ByHandle => {}
        }
        // No lock is held during the system call.
        drop(shard);
        let handle = ask().ok()?;
        match compare(&self.key_shard(&seen.key), seen, Some(&handle)) {
            Known::As(inode) => Some(inode),
            Known::Not | Known::ByHandle => None,
        }
    }

    /// The inode that `path` refers to; counts one more lookup. ENOMEM if there is no memory for a new one.
    ///
    /// A known inode whose number this one has now stays under its node id, where it is ESTALE.
    pub fn find_or_insert(
        &self,
        key: InodeKey,
        kind: FileType,
        path: GuestFd,
        mount: Arc<Mount>,
    ) -> Result<Arc<Inode>> {
        if self.fd_cache.over_limit() {
            self.evict_some();
        }
        // While `path` is open, any known inode with a descriptor and the same number is this one.
        let seen = Seen { key, kind, before: NodeId(u64::MAX) };
        let mut shard = self.key_shard(&key);
        let mut handle = None;
        match compare(&shard, &seen, None) {
            Known::As(inode) => return Ok(inode),
            Known::Not => {}
            Known::ByHandle => {
                drop(shard);
                handle = name_to_handle(path.as_fd()).ok();
                shard = self.key_shard(&key);
                if let Known::As(inode) = compare(&shard, &seen, handle.as_ref()) {
                    return Ok(inode);
                }
            }
        }
        shard.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        // Pairs with `ids_given`: a thread that sees this id assigned knows that the inode's number was kept since before.
        let node = NodeId(self.next_node.fetch_add(1, Ordering::Release));
        let fd = InodeFd::new(path, mount);
        if let Some(handle) = handle {
            fd.set_handle(handle);
        }
        let inode = Arc::new(Inode::new(node, key, kind, fd));
        inode.lookups.store(1, Ordering::Relaxed);
        {
            let mut by_node = self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner);
            by_node.try_reserve(1).map_err(|_| Errno::NOMEM)?;
            by_node.insert(ByNode(Arc::clone(&inode)));
        }
        let replaced = shard.replace(ByKey(Arc::clone(&inode)));
        // Descriptors are closed without the lock.
        drop(shard);
        drop(replaced);
        self.enter_clock(&inode);
        Ok(inode)
    }

    /// Counts one more lookup of an inode; ESTALE if the guest has just forgotten it.
    pub fn look_up_again(&self, inode: &Inode) -> Result<()> {
        let _shard = self.key_shard(&inode.key);
        if inode.node != NodeId::ROOT && inode.lookups.load(Ordering::Relaxed) == 0 {
            return Err(Errno::STALE);
        }
        inode.lookups.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes `count` off an inode's lookups; at 0 it is gone. The root stays.
    pub fn forget(&self, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        // It is the last one to be dropped, without a lock.
        let Some(inode) = self.known(node) else { return };
        let less = |lookups: u64| Some(lookups.saturating_sub(count));
        // It never fails: `less` always has a value.
        let before = inode.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).unwrap_or(0);
        if before > count {
            return;
        }
        let mut shard = self.key_shard(&inode.key);
        if inode.lookups.load(Ordering::Relaxed) == 0 {
            // The number may have another inode by now.
            if shard.get(&inode.key).is_some_and(|known| known.0.node == node) {
                shard.remove(&inode.key);
            }
            self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner).remove(&node);
        }
    }

    fn enter_clock(&self, inode: &Arc<Inode>) {
        if inode.mount().directory().is_some() {
            inode.fd.enter_clock(inode.node);
            self.fd_cache.clock(inode.node.0).drop_forgotten(|node| self.known(node).is_some());
        }
        inode.mount().add_top(inode);
    }

    /// Evicts a few inodes that were not used lately. One thread does that at a time.
    fn evict_some(&self) {
        if let Ok(mut hand) = self.hand.try_lock() {
            self.sweep(&mut hand);
        }
    }

    /// Evicts inodes until a descriptor is free; false if none can be evicted.
    fn make_room(&self) -> bool {
        if !self.fd_cache.evicts() {
            return false;
        }
        let mut hand = self.hand.lock().unwrap_or_else(PoisonError::into_inner);
        (0..MAX_SWEEPS).any(|_| self.sweep(&mut hand) > 0)
    }

    /// The process got no descriptor, as the device took more than its reserve: from now on inodes may have fewer. False
    /// if none can be evicted.
    fn process_is_full(&self) -> bool {
        if self.fd_cache.evicts() {
            self.fd_cache.lower_limit();
        }
        self.make_room()
    }

    /// The device has opened descriptors, or closed some: inodes are evicted until the guest is within its quota.
    pub fn reserve_for(&self, device: DeviceDescriptors) {
        let quota = self.fds();
        if quota.reserve_for(device) {
            self.fd_cache.on_quota_change();
            while quota.is_exceeded() && self.make_room() {}
        }
    }

    /// Moves the hand of the clock on; returns how many inodes were evicted. No lock but the hand is held across system
    /// calls.
    fn sweep(&self, hand: &mut u64) -> usize {
        let (mut evicted, mut refused) = (0, 0);
        for _ in 0..SWEEP {
            let shard = *hand;
            *hand = hand.wrapping_add(1);
            let Some(node) = self.fd_cache.clock(shard).next() else { continue };
            let Some(inode) = self.known(node) else { continue };
            // The second chance: evicted when the hand comes again, unless it was used meanwhile.
            if inode.fd.take_reference() {
                self.fd_cache.clock(shard).push(node);
            } else if inode.fd.evict() {
                evicted += 1;
            } else {
                refused += 1;
                self.fd_cache.clock(shard).push(node);
            }
            if evicted + refused == EVICT_MAX {
                break;
            }
        }
        if evicted == 0 && refused > 0 {
            self.fd_cache.raise_limit();
        }
        evicted
    }

    /// Forgets all but the root.
    #[allow(clippy::mutable_key_type, reason = "the key of an inode does not change")]
    pub fn clear(&self) {
        // Their descriptors are closed when no lock is held.
        for shard in self.by_node.iter() {
            let known = take(&mut *shard.write().unwrap_or_else(PoisonError::into_inner));
            drop(known);
        }
        for shard in self.by_key.iter() {
            let known = take(&mut *shard.lock().unwrap_or_else(PoisonError::into_inner));
            drop(known);
        }
        self.fd_cache.clear_clock();
        self.insert_root();
    }

    /// Whether inodes are opened again by file handles.
    pub fn uses_file_handles(&self) -> bool {
        self.fd_cache.evicts()
    }

    /// Inodes beside the root.
    pub fn len(&self) -> usize {
        self.by_node.iter().map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// The root is found by its key too: a name may lead back to it.
    fn insert_root(&self) {
        self.key_shard(&self.root.key).insert(ByKey(Arc::clone(&self.root)));
    }

    fn node_shard(&self, node: NodeId) -> &RwLock<HashSet<ByNode, BuildIdHasher>> {
        self.by_node.of(node.0)
    }

    fn key_shard(&self, key: &InodeKey) -> MutexGuard<'_, HashSet<ByKey>> {
        self.by_key.of(key.ino).lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the guest knows what was seen.
enum Known {
    /// It does; one more lookup was counted.
    As(Arc<Inode>),
    /// It does not, though it may know one that had the number before.
    Not,
    /// Only the handle can tell.
    ByHandle,
}

/// Looks for what was seen, and whose handle may be known.
#[allow(clippy::mutable_key_type, reason = "the key of an inode does not change")]
fn compare(shard: &HashSet<ByKey>, seen: &Seen, handle: Option<&FileHandle>) -> Known {
    let Some(ByKey(inode)) = shard.get(&seen.key) else { return Known::Not };
    if inode.kind != seen.kind || inode.node.0 >= seen.before.0 {
        return Known::Not;
    }
    match inode.fd.is(handle) {
        None => Known::ByHandle,
        Some(false) => Known::Not,
        Some(true) => {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            Known::As(Arc::clone(inode))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::FdQuota;

    fn any_fd() -> GuestFd {
        GuestFd::uncounted(std::fs::File::open("/").unwrap().into())
    }

    fn key(ino: u64) -> InodeKey {
        InodeKey { device: (0, 1), ino, mount: 1, generation: 0 }
    }

    fn table() -> InodeTable {
        InodeTable::new(any_fd(), key(1), FdCache::unlimited(&Arc::new(FdQuota::new(1000, 0)))).unwrap()
    }

    fn insert(table: &InodeTable, ino: u64) -> Arc<Inode> {
        let mount = Arc::clone(table.root().mount());
        table.find_or_insert(key(ino), FileType::RegularFile, any_fd(), mount).unwrap()
    }

    fn find(table: &InodeTable, ino: u64, kind: FileType) -> Option<Arc<Inode>> {
        let seen = Seen { key: key(ino), kind, before: table.ids_given() };
        table.find(&seen, || Err(Errno::OPNOTSUPP))
    }

    #[test]
    fn an_inode_lives_as_long_as_its_lookups() {
        let table = table();
        let node = insert(&table, 5).node;
        assert_eq!(find(&table, 5, FileType::RegularFile).unwrap().node, node);
        table.forget(node, 1);
        assert_eq!(table.get(node).unwrap().key, key(5));
        table.forget(node, 1);
        assert_eq!(table.get(node).unwrap_err(), Errno::STALE);
        let again = insert(&table, 5).node;
        assert_ne!(again, node, "ids are not used twice");
        table.forget(again, u64::MAX);
        table.forget(again, 1);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn the_root_stays() {
        let table = table();
        table.forget(NodeId::ROOT, u64::MAX);
        assert_eq!(find(&table, 1, FileType::Directory).unwrap().node, NodeId::ROOT);
        table.clear();
        assert_eq!(find(&table, 1, FileType::Directory).unwrap().node, NodeId::ROOT);
        assert_eq!(table.get(NodeId::ROOT).unwrap().node, NodeId::ROOT);
    }

    #[test]
    fn lookups_that_race_with_forgets_are_counted() {
        let table = table();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..20_000u64 {
                        let inode = match find(&table, 10 + i % 3, FileType::RegularFile) {
                            Some(inode) => inode,
                            None => insert(&table, 10 + i % 3),
                        };
                        // It was looked up, so it must be there until it is forgotten.
                        assert_eq!(table.get(inode.node).unwrap().node, inode.node);
                        table.forget(inode.node, 1);
                    }
                });
            }
        });
        assert_eq!(table.len(), 0);
    }
}
