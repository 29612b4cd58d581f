//! The inodes a guest knows: found by node id, and by what they are on the host.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::budget::Held;
use super::io_mode::IoMode;
use super::locks::InodeLocks;
use super::pins::{Descriptors, Pin};
use super::range_lock::RangeLock;
use super::shards::{ByNumber, SHARDS, Shards};
use crate::fs::Result;
use crate::fuse::ids::NodeId;

/// What an inode is on the host. The mount belongs to it: one directory can be mounted twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeKey {
    /// Device, as statx(2) has it.
    pub device: (u32, u32),
    /// Inode number on the device.
    pub ino: u64,
    /// `stx_mnt_id`; 0 on hosts before Linux 5.8.
    pub mount: u64,
}

impl Hash for InodeKey {
    /// In one word, as each costs time. Inodes that have all but one part in common differ.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let device = u64::from(self.device.0) << 32 | u64::from(self.device.1);
        state.write_u64(self.ino ^ self.mount.rotate_left(32) ^ device.rotate_left(48));
    }
}

/// A file or directory that the guest knows.
#[derive(Debug)]
pub struct Inode {
    /// What the guest calls it.
    pub node: NodeId,
    /// What it is on the host.
    pub key: InodeKey,
    /// Its type, which never changes.
    pub kind: FileType,
    /// How the guest has it open.
    pub io_mode: IoMode,
    /// Ranges that are being read or written.
    pub ranges: RangeLock,
    /// Locks that the guest's programs hold.
    pub locks: InodeLocks,
    /// It had a set-group-ID bit without execution by the group when it was last looked at.
    pub lone_group_bit: AtomicBool,
    /// What keeps hold of it.
    pin: Pin,
    /// How often the guest has looked it up and not forgotten it. Goes up only under the lock of
    /// the inode's key, so that a count of 0 seen there is final.
    lookups: AtomicU64,
}

impl Inode {
    /// An O_PATH descriptor for system calls that take AT_EMPTY_PATH, or names relative to a
    /// directory. It stays open for as long as the caller holds it.
    pub fn path(&self) -> Result<Arc<Held>> {
        self.pin.path()
    }
}

/// An inode in a table where it is found by its node id.
#[derive(Debug)]
struct ByNode(Arc<Inode>);

/// An inode in a table where it is found by its key.
#[derive(Debug)]
struct ByKey(Arc<Inode>);

/// The key stands in the inode alone: a guest may know millions.
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
    by_node: Shards<RwLock<HashSet<ByNode, ByNumber>>>,
    by_key: Shards<Mutex<HashSet<ByKey>>>,
    next_node: AtomicU64,
    root: Arc<Inode>,
    descriptors: Arc<Descriptors>,
    /// The part of the table that is next to give up descriptors; held by who makes it do so.
    next_to_give_up: Mutex<u64>,
}

impl InodeTable {
    /// A table that knows the root alone.
    pub fn new(root: Held, key: InodeKey, descriptors: Descriptors) -> InodeTable {
        let descriptors = Arc::new(descriptors);
        let pin = Pin::new(root, Arc::clone(&descriptors));
        let table = InodeTable {
            by_node: Shards::default(),
            by_key: Shards::default(),
            next_node: AtomicU64::new(NodeId::ROOT.0 + 1),
            root: Arc::new(new_inode(NodeId::ROOT, key, FileType::Directory, pin)),
            descriptors,
            next_to_give_up: Mutex::new(0),
        };
        table.insert_root();
        table
    }

    /// The inode with this id; ESTALE if the guest has forgotten it or never knew it.
    pub fn get(&self, node: NodeId) -> Result<Arc<Inode>> {
        if self.descriptors.are_scarce() {
            self.give_up_descriptors();
        }
        if node == NodeId::ROOT {
            return Ok(Arc::clone(&self.root));
        }
        let shard = self.node_shard(node).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&node).map(|entry| Arc::clone(&entry.0)).ok_or(Errno::STALE)
    }

    /// The inode with this key if the guest knows it; it counts as looked up once more.
    pub fn find(&self, key: &InodeKey) -> Option<Arc<Inode>> {
        let shard = self.key_shard(key);
        let ByKey(inode) = shard.get(key)?;
        inode.lookups.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(inode))
    }

    /// The inode with this key, which `path` refers to; it counts as looked up once more. ENOMEM if
    /// there is no memory for a new one.
    pub fn find_or_insert(&self, key: InodeKey, kind: FileType, path: Held) -> Result<Arc<Inode>> {
        if self.descriptors.are_scarce() {
            self.give_up_descriptors();
        }
        let mut shard = self.key_shard(&key);
        if let Some(ByKey(inode)) = shard.get(&key) {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            return Ok(Arc::clone(inode));
        }
        shard.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        let node = NodeId(self.next_node.fetch_add(1, Ordering::Relaxed));
        let pin = Pin::new(path, Arc::clone(&self.descriptors));
        let inode = Arc::new(new_inode(node, key, kind, pin));
        inode.lookups.store(1, Ordering::Relaxed);
        let mut by_node = self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner);
        by_node.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        by_node.insert(ByNode(Arc::clone(&inode)));
        shard.insert(ByKey(Arc::clone(&inode)));
        Ok(inode)
    }

    /// Takes `count` off an inode's lookups; at 0 it is gone. The root stays.
    pub fn forget(&self, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        let Ok(inode) = self.get(node) else { return };
        let take = |lookups: u64| Some(lookups.saturating_sub(count));
        // It never fails: `take` always has a value.
        let before = inode.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or(0);
        if before > count {
            return;
        }
        let mut shard = self.key_shard(&inode.key);
        if inode.lookups.load(Ordering::Relaxed) == 0
            && shard.get(&inode.key).is_some_and(|known| known.0.node == node)
        {
            shard.remove(&inode.key);
            self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner).remove(&node);
        }
    }

    /// Lets inodes that were not used lately give up their descriptors, part by part of the table,
    /// until an eighth of all that are allowed is free. One thread does that at a time.
    fn give_up_descriptors(&self) {
        let Ok(mut next) = self.next_to_give_up.try_lock() else { return };
        // An inode that was used is asked in one round and gives up in the next.
        for _ in 0..2 * SHARDS {
            let part = self.by_node.of(*next);
            *next = next.wrapping_add(1);
            part.read()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .for_each(|entry| entry.0.pin.give_up());
            if self.descriptors.are_plenty() {
                return;
            }
        }
        self.descriptors.allow_more();
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        for shard in self.by_key.iter() {
            shard.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        for shard in self.by_node.iter() {
            shard.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.insert_root();
    }

    /// Whether inodes may be held by file handles.
    pub fn uses_file_handles(&self) -> bool {
        self.descriptors.are_limited()
    }

    /// Inodes beside the root.
    pub fn len(&self) -> usize {
        self.by_node.iter().map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// The root is found by its key too: a name may lead back to it.
    fn insert_root(&self) {
        self.key_shard(&self.root.key).insert(ByKey(Arc::clone(&self.root)));
    }

    fn node_shard(&self, node: NodeId) -> &RwLock<HashSet<ByNode, ByNumber>> {
        self.by_node.of(node.0)
    }

    fn key_shard(&self, key: &InodeKey) -> MutexGuard<'_, HashSet<ByKey>> {
        self.by_key.of(key.ino).lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_inode(node: NodeId, key: InodeKey, kind: FileType, pin: Pin) -> Inode {
    Inode {
        node,
        key,
        kind,
        io_mode: IoMode::default(),
        ranges: RangeLock::default(),
        locks: InodeLocks::default(),
        lone_group_bit: AtomicBool::new(false),
        pin,
        lookups: AtomicU64::new(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::budget::Budget;
    use super::*;

    fn any_fd() -> Held {
        Held::for_a_request(std::fs::File::open("/").unwrap().into())
    }

    fn key(ino: u64) -> InodeKey {
        InodeKey { device: (0, 1), ino, mount: 1 }
    }

    fn table() -> InodeTable {
        InodeTable::new(any_fd(), key(1), Descriptors::unlimited(&Arc::new(Budget::of(1000))))
    }

    #[test]
    fn an_inode_lives_as_long_as_its_lookups() {
        let table = table();
        let node = table.find_or_insert(key(5), FileType::RegularFile, any_fd()).unwrap().node;
        assert_eq!(table.find(&key(5)).unwrap().node, node);
        table.forget(node, 1);
        assert_eq!(table.get(node).unwrap().key, key(5));
        table.forget(node, 1);
        assert_eq!(table.get(node).unwrap_err(), Errno::STALE);
        let again = table.find_or_insert(key(5), FileType::RegularFile, any_fd()).unwrap().node;
        assert_ne!(again, node, "ids are not used twice");
        table.forget(again, u64::MAX);
        table.forget(again, 1);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn the_root_stays() {
        let table = table();
        table.forget(NodeId::ROOT, u64::MAX);
        assert_eq!(table.find(&key(1)).unwrap().node, NodeId::ROOT);
        table.clear();
        assert_eq!(table.find(&key(1)).unwrap().node, NodeId::ROOT);
        assert_eq!(table.get(NodeId::ROOT).unwrap().node, NodeId::ROOT);
    }

    #[test]
    fn lookups_that_race_with_forgets_are_counted() {
        let table = table();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..20_000u64 {
                        let inode = match table.find(&key(10 + i % 3)) {
                            Some(inode) => inode,
                            None => {
                                let kind = FileType::RegularFile;
                                table.find_or_insert(key(10 + i % 3), kind, any_fd()).unwrap()
                            }
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
