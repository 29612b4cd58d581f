//! The table of inodes: by the guest's node id, and by their key on the host.
//!
//! Locks: the shard of a key is locked before the shard of a node id and before a shard of the clock; the hand of the clock
//! before any of them; a shard of the clock before that of a node id. No lock but the hand is held during a system call.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::mem::take;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::{FileType, OFlags, Statx};
use rustix::io::Errno;

use super::Inode;
use super::fd_cache::FdCache;
use super::inode_fd::InodeFd;
use super::key::{InodeKey, Seen};
use super::mount::Mount;
use super::records::Records;
use super::shards::{BuildIdHasher, Shards};
use super::stored::Stored;
use super::unresolved::Unresolved;
use crate::fs::Result;
use crate::fs::passthrough::host::Host;
use crate::limits::{FdQuota, GuestFd};
use crate::state_file::{Effects, InodeEntry, InodeRecord};
use crate::sys::file_handles::{FileHandle, name_to_handle};
use fuse_protocol::ids::NodeId;

/// An inode in a table where it is found by its node id.
#[derive(Debug)]
pub(super) struct ByNode(pub(super) Arc<Inode>);

/// An inode in a table where it is found by its key.
#[derive(Debug)]
pub(super) struct ByKey(pub(super) Arc<Inode>);

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
    pub(super) root: Arc<Inode>,
    pub(super) fd_cache: Arc<FdCache>,
    /// The hand of the clock: the shard that is next. Locked by the thread that evicts inodes.
    pub(super) hand: Mutex<u64>,
    pub(super) records: Arc<Records>,
    /// Those of an earlier process that were not made of their records yet.
    pub(super) stored: Stored,
    /// Those that came with a migration and were not found yet.
    pub(super) unresolved: Unresolved,
}

impl InodeTable {
    /// A table with the root alone.
    pub fn new(root: GuestFd, key: InodeKey, fd_cache: FdCache) -> Result<InodeTable> {
        let fd_cache = Arc::new(fd_cache);
        let mount = fd_cache.mount(key.mount, &root, FileType::Directory)?;
        let key = key.on(&mount, &root);
        let record = fd_cache.records().inodes().take().ok_or(Errno::NOMEM)?;
        let entry = entry_of(NodeId::ROOT, &key, FileType::Directory, &root);
        fd_cache.records().inode(record).store(&entry, 0);
        let fd = InodeFd::new(Some(root), mount, record);
        let root = Arc::new(Inode::new(NodeId::ROOT, key, FileType::Directory, fd));
        root.mount().add_top(&root);
        Ok(InodeTable::with_root(root, fd_cache))
    }

    /// A table with this root, which has its record.
    pub(super) fn with_root(root: Arc<Inode>, fd_cache: Arc<FdCache>) -> InodeTable {
        let table = InodeTable {
            by_node: Shards::default(),
            by_key: Shards::default(),
            root,
            records: Arc::clone(fd_cache.shared_records()),
            fd_cache,
            hand: Mutex::new(0),
            stored: Stored::default(),
            unresolved: Unresolved::default(),
        };
        table.insert_root();
        table
    }

    /// The inode with this id; ESTALE if the guest has forgotten it or never knew it.
    pub fn get(&self, node: NodeId) -> Result<Arc<Inode>> {
        if self.fd_cache.over_limit() {
            self.evict_some();
        }
        if node == NodeId::ROOT {
            return Ok(Arc::clone(&self.root));
        }
        let Some(inode) = self.known(node) else { return self.resolve(node) };
        if inode.fd.is_evicted() && matches!(inode.path(), Err(Errno::MFILE | Errno::NFILE)) {
            self.process_is_full();
        }
        Ok(inode)
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
        NodeId(self.records.state().next_node().load(Ordering::Acquire))
    }

    /// The inode that was just seen if the guest knows it; counts one more lookup. `None` also where only a descriptor of
    /// what was seen can tell.
    ///
    /// An inode with a descriptor has its number for itself, so the number is enough. Without one it is
    /// identified by its handle, which `ask` gets from the host. An inode that got its id after the call may
    /// have taken the number over since.
    pub fn find(
        &self,
        effects: Effects<'_>,
        seen: &Seen,
        ask: impl FnOnce() -> Result<FileHandle>,
    ) -> Option<Arc<Inode>> {
        let shard = self.key_shard(&seen.key);
        match self.compare(effects, &shard, seen, None) {
            Known::As(inode) => return Some(inode),
            Known::Not => return None,
            Known::ByHandle => {}
        }
        // No lock is held during the system call.
        drop(shard);
        let handle = ask().ok()?;
        match self.compare(effects, &self.key_shard(&seen.key), seen, Some(&handle)) {
            Known::As(inode) => Some(inode),
            Known::Not | Known::ByHandle => None,
        }
    }

    /// The inode that `path` refers to; counts one more lookup. ENOMEM if there is no memory for a new one.
    ///
    /// A known inode whose number this one has now stays under its node id, where it is ESTALE.
    pub fn find_or_insert(
        &self,
        effects: Effects<'_>,
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
        match self.compare(effects, &shard, &seen, None) {
            Known::As(inode) => return Ok(inode),
            Known::Not => {}
            Known::ByHandle => {
                drop(shard);
                handle = name_to_handle(path.as_fd()).ok();
                shard = self.key_shard(&key);
                if let Known::As(inode) = self.compare(effects, &shard, &seen, handle.as_ref()) {
                    return Ok(inode);
                }
            }
        }
        shard.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        // Pairs with `ids_given`: a thread that sees this id assigned knows that the inode's number was kept since before.
        let record = self.records.inodes().take().ok_or(Errno::NFILE)?;
        let node = NodeId(self.records.state().next_node().fetch_add(1, Ordering::Release));
        let entry = entry_of(node, &key, kind, &path);
        let inode = Arc::new(Inode::new(node, key, kind, InodeFd::new(Some(path), mount, record)));
        {
            let mut by_node = self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner);
            by_node.try_reserve(1).map_err(|_| Errno::NOMEM)?;
            // Nothing can fail from here on.
            self.records.inode(record).store(&entry, effects.begin_lookups(record));
            by_node.insert(ByNode(Arc::clone(&inode)));
        }
        if let Some(handle) = handle {
            let _lock = self.records.lock(node.0);
            // Without room for it, the inode is not evicted.
            let _ = self.records.set_handle(record, &handle);
        }
        let replaced = shard.replace(ByKey(Arc::clone(&inode)));
        // Descriptors are closed without the lock.
        drop(shard);
        drop(replaced);
        self.enter_clock(&inode);
        Ok(inode)
    }

    /// Counts one more lookup of an inode; ESTALE if the guest has just forgotten it.
    pub fn look_up_again(&self, effects: Effects<'_>, inode: &Inode) -> Result<()> {
        let _shard = self.key_shard(&inode.key);
        let record = self.record_of(inode);
        if inode.node != NodeId::ROOT && record.lookups() == 0 {
            return Err(Errno::STALE);
        }
        effects.count_lookup(inode.fd.record(), record);
        Ok(())
    }

    /// Takes `count` off an inode's lookups; at 0 it is gone. The root stays.
    pub fn forget(&self, effects: Effects<'_>, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        // It is the last one to be dropped, without a lock.
        let Some(inode) = self.known(node) else {
            return self.forget_unresolved(effects, node, count);
        };
        let record = self.record_of(&inode);
        if effects.forget(record, count).is_some_and(|before| before <= count) {
            self.drop_forgotten(&inode);
        }
    }

    /// Takes back the lookup that a request has counted last, and does not answer with.
    pub fn take_back_lookup(&self, effects: Effects<'_>, node: NodeId) {
        let known = if node == NodeId::ROOT { Some(Arc::clone(&self.root)) } else { self.known(node) };
        let Some(inode) = known else { return };
        if effects.take_back_lookup(self.record_of(&inode)) <= 1 && node != NodeId::ROOT {
            self.drop_forgotten(&inode);
        }
    }

    /// Drops an inode unless it was looked up meanwhile.
    fn drop_forgotten(&self, inode: &Inode) {
        let node = inode.node;
        let mut shard = self.key_shard(&inode.key);
        if self.record_of(inode).lookups() == 0 {
            // Its record goes with the last handle: a process that goes on opens no file again.
            // The number may have another inode by now.
            if shard.get(&inode.key).is_some_and(|known| known.0.node == node) {
                shard.remove(&inode.key);
            }
            self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner).remove(&node);
        }
    }

    pub(super) fn enter_clock(&self, inode: &Arc<Inode>) {
        if inode.mount().directory().is_some() {
            inode.fd.enter_clock(inode.node);
            self.fd_cache.clock(inode.node.0).drop_forgotten(|node| self.made(node).is_some());
        }
        inode.mount().add_top(inode);
    }

    /// Forgets all but the root.
    #[allow(clippy::mutable_key_type, reason = "the key of an inode does not change")]
    pub fn clear(&self) {
        self.end_unresolved(None);
        self.make_rest();
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

    /// Inodes beside the root that were made.
    pub fn len(&self) -> usize {
        self.by_node.iter().map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    #[inline]
    pub(super) fn record_of(&self, inode: &Inode) -> &InodeRecord {
        self.records.inode(inode.fd.record())
    }

    /// Looks for what was seen, and whose handle may be known; counts one more lookup if it is found.
    #[allow(clippy::mutable_key_type, reason = "the key of an inode does not change")]
    fn compare(
        &self,
        effects: Effects<'_>,
        shard: &HashSet<ByKey>,
        seen: &Seen,
        handle: Option<&FileHandle>,
    ) -> Known {
        let Some(ByKey(inode)) = shard.get(&seen.key) else { return Known::Not };
        if inode.kind != seen.kind || inode.node.0 >= seen.before.0 {
            return Known::Not;
        }
        match inode.fd.is(handle) {
            None => Known::ByHandle,
            Some(false) => Known::Not,
            Some(true) => {
                effects.count_lookup(inode.fd.record(), self.record_of(inode));
                Known::As(Arc::clone(inode))
            }
        }
    }

    /// Whether the guest may know an inode with this number.
    pub fn knows(&self, stat: &Statx) -> bool {
        let key = InodeKey::of(stat);
        self.key_shard(&key).contains(&key)
    }

    /// All shards of both ways to find an inode, in pairs.
    pub(super) fn all_shards(
        &self,
    ) -> impl Iterator<Item = (&RwLock<HashSet<ByNode, BuildIdHasher>>, &Mutex<HashSet<ByKey>>)> {
        self.by_node.iter().zip(self.by_key.iter())
    }

    /// The root is found by its key too: a name may lead back to it.
    fn insert_root(&self) {
        self.key_shard(&self.root.key).insert(ByKey(Arc::clone(&self.root)));
    }

    pub(super) fn node_shard(&self, node: NodeId) -> &RwLock<HashSet<ByNode, BuildIdHasher>> {
        self.by_node.of(node.0)
    }

    /// The shard of a key, locked, without those that are still to be made: see [`InodeTable::key_shard`].
    pub(super) fn unmade_key_shard(&self, key: &InodeKey) -> MutexGuard<'_, HashSet<ByKey>> {
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

/// An inode that was looked up once, as its record has it.
pub(super) fn entry_of(node: NodeId, key: &InodeKey, kind: FileType, path: &GuestFd) -> InodeEntry {
    InodeEntry {
        node: node.0,
        lookups: 1,
        ino: key.ino,
        device: key.packed_device(),
        mount: key.mount,
        generation: key.generation,
        kind: packed_kind(kind),
        descriptor: Some(path.as_fd().as_raw_fd()),
    }
}

/// A type as the upper bits of a mode.
fn packed_kind(kind: FileType) -> u8 {
    u8::try_from(kind.as_raw_mode() >> 12).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::FdQuota;
    use crate::state_file::StateFile;

    fn any_fd() -> GuestFd {
        GuestFd::uncounted(std::fs::File::open("/").unwrap().into())
    }

    fn key(ino: u64) -> InodeKey {
        InodeKey { device: (0, 1), ino, mount: 1, generation: 0 }
    }

    fn table() -> InodeTable {
        InodeTable::new(
            any_fd(),
            key(1),
            FdCache::unlimited(
                &Arc::new(FdQuota::new(1000, 0)),
                &Records::new(&StateFile::create().unwrap()),
            ),
        )
        .unwrap()
    }

    fn insert(table: &InodeTable, ino: u64) -> Arc<Inode> {
        let mount = Arc::clone(table.root().mount());
        table.find_or_insert(Effects::NONE, key(ino), FileType::RegularFile, any_fd(), mount).unwrap()
    }

    fn find(table: &InodeTable, ino: u64, kind: FileType) -> Option<Arc<Inode>> {
        let seen = Seen { key: key(ino), kind, before: table.ids_given() };
        table.find(Effects::NONE, &seen, || Err(Errno::OPNOTSUPP))
    }

    #[test]
    fn an_inode_lives_as_long_as_its_lookups() {
        let table = table();
        let node = insert(&table, 5).node;
        assert_eq!(find(&table, 5, FileType::RegularFile).unwrap().node, node);
        table.forget(Effects::NONE, node, 1);
        assert_eq!(table.get(node).unwrap().key, key(5));
        table.forget(Effects::NONE, node, 1);
        assert_eq!(table.get(node).unwrap_err(), Errno::STALE);
        let again = insert(&table, 5).node;
        assert_ne!(again, node, "ids are not used twice");
        table.forget(Effects::NONE, again, u64::MAX);
        table.forget(Effects::NONE, again, 1);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn the_root_stays() {
        let table = table();
        table.forget(Effects::NONE, NodeId::ROOT, u64::MAX);
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
                        table.forget(Effects::NONE, inode.node, 1);
                    }
                });
            }
        });
        assert_eq!(table.len(), 0);
    }
}
