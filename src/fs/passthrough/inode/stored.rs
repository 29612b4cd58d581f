//! Inodes of an earlier process that were not asked for since it has died.
//!
//! The guest waits for a process that goes on, and may know a hundred thousand inodes. So that process reads their records
//! once, notes by node id where each of them is, and serves. An inode is made of its record at its first use, or by a
//! thread in the background, which makes all that are left and forgets the notes. Requests that look a name up find it by
//! its inode number: this thread sorts the records by that first.
//!
//! Each inode is made once, by a thread that has locked the shard of its key: it takes the mark of the record there. So
//! whoever locks a shard by [`InodeTable::key_shard`] finds all inodes of that key in it. A record with a mark belongs to
//! nobody else and does not change but in its count of lookups, which no request changes before the inode is made. The
//! notes themselves stay as they are: they may lead to a record that has another inode by now, and so to nothing.

#![allow(clippy::mutable_key_type, reason = "the key of an inode does not change")]

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use rustix::fs::FileType;

use super::inode_fd::InodeFd;
use super::records::{Record, Records};
use super::restore::adopt_descriptor;
use super::table::{ByKey, ByNode};
use super::{Inode, InodeKey, InodeTable, Mount};
use crate::state_file::InodeEntry;
use fuse_protocol::ids::NodeId;

/// The inodes of a table that were not made of their records yet.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// There may be some. Each request that looks for a key reads it.
    any: AtomicBool,
    set: RwLock<Option<Arc<Set>>>,
}

impl Stored {
    /// These are not made yet. Nobody else has the table.
    pub(super) fn begin(&self, set: Set) {
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(set));
        self.any.store(true, Ordering::Release);
    }

    /// Whether some may be left.
    #[inline]
    pub(super) fn is_any(&self) -> bool {
        // Pairs with `end`: whoever sees that there is none finds all in the tables.
        self.any.load(Ordering::Acquire)
    }

    fn get(&self) -> Option<Arc<Set>> {
        self.set.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn end(&self) {
        let ended = self.set.write().unwrap_or_else(PoisonError::into_inner).take();
        self.any.store(false, Ordering::Release);
        // Mounts without inodes close their descriptors, without the lock.
        drop(ended);
    }
}

/// Where the inodes are.
#[derive(Debug)]
pub(super) struct Set {
    /// A mark for each record whose inode was not made yet.
    marks: Vec<AtomicU64>,
    by_node: RecordIndex,
    /// Inode numbers are in no order: they are sorted when one is asked for, or in the background.
    by_ino: OnceLock<RecordIndex>,
    mounts: HashMap<u32, Arc<Mount>>,
}

/// Marks in one word.
const WORD: usize = 64;
/// Words whose inodes are made at once in the background, ...
const WORDS_AT_ONCE: usize = 8;
const RECORDS_AT_ONCE: u32 = 512;
/// ... and how long the thread rests before them, so that it has a third of a CPU, and before the first.
const REST: Duration = Duration::from_micros(500);
const FIRST_REST: Duration = Duration::from_millis(20);

impl Set {
    /// A set with room for `count` inodes, whose records have numbers below `end`. It keeps the mounts that they are on.
    pub(super) fn with_room(count: usize, end: usize, mounts: HashMap<u32, Arc<Mount>>) -> Set {
        let marks = std::iter::repeat_with(AtomicU64::default).take(end.div_ceil(WORD)).collect();
        Set { marks, by_node: RecordIndex::with_room(count), by_ino: OnceLock::new(), mounts }
    }

    /// Adds the inode of a record.
    pub(super) fn add(&mut self, record: Record, entry: &InodeEntry) {
        self.by_node.add(entry.node, record);
        if let Some((word, mark)) = self.mark(record) {
            word.fetch_or(mark, Ordering::Relaxed);
        }
    }

    /// All are added.
    pub(super) fn sorted(mut self) -> Set {
        self.by_node.sort();
        self
    }

    fn mark(&self, record: Record) -> Option<(&AtomicU64, u64)> {
        Some((self.marks.get(record.get() / WORD)?, 1 << (record.get() % WORD)))
    }

    /// Takes the mark of a record; whether it was there. The caller has locked the shard of its key.
    fn take(&self, record: Record) -> bool {
        self.mark(record).is_some_and(|(word, mark)| word.fetch_and(!mark, Ordering::AcqRel) & mark != 0)
    }

    /// The record of the inode with this id, if there is a note of it.
    fn find(&self, records: &Records, node: NodeId) -> Option<(Record, InodeEntry)> {
        let entry = |record: Record| Some((record, records.inode(record).load()?));
        self.by_node.get(node.0).filter_map(entry).find(|(_, entry)| entry.node == node.0)
    }

    /// Records by inode numbers: of all inodes that are not made while it is asked for.
    fn by_ino(&self, records: &Records) -> &RecordIndex {
        self.by_ino.get_or_init(|| {
            let mut index = RecordIndex::with_room(self.by_node.pairs.len());
            for (first, word) in (0..).step_by(WORD).zip(&self.marks) {
                for record in marked(first, word.load(Ordering::Acquire)) {
                    let entry = records.inode(record).load();
                    entry.into_iter().for_each(|entry| index.add(entry.ino, record));
                }
            }
            index.sort();
            index
        })
    }
}

/// The records from `first` on that have these marks.
fn marked(first: u32, mut marks: u64) -> impl Iterator<Item = Record> {
    std::iter::from_fn(move || {
        let next = (marks != 0).then(|| Record::new(first + marks.trailing_zeros()));
        marks &= marks.wrapping_sub(1);
        next
    })
}

impl InodeTable {
    /// The inode with this id, if the guest knows it; one that was not found since a migration is not among them.
    #[inline]
    pub(super) fn known(&self, node: NodeId) -> Option<Arc<Inode>> {
        self.made(node).or_else(|| self.make_stored(node))
    }

    /// The same, if it was made.
    #[inline]
    pub(super) fn made(&self, node: NodeId) -> Option<Arc<Inode>> {
        let shard = self.node_shard(node).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&node).map(|entry| Arc::clone(&entry.0))
    }

    #[cold]
    fn make_stored(&self, node: NodeId) -> Option<Arc<Inode>> {
        if let Some(set) = self.stored.get()
            && let Some((record, entry)) = set.find(&self.records, node)
        {
            self.make(&set, record, &entry);
        }
        // Another thread may have made it.
        self.made(node)
    }

    /// Whether the guest knows an inode with this id, which need not be made.
    pub(super) fn knows_node(&self, node: NodeId) -> bool {
        let is_stored = || self.stored.get().is_some_and(|set| set.find(&self.records, node).is_some());
        node == NodeId::ROOT || self.made(node).is_some() || is_stored() || self.made(node).is_some()
    }

    /// The shard of a key, locked. Inodes with this key that were stored are in it.
    pub(super) fn key_shard(&self, key: &InodeKey) -> MutexGuard<'_, HashSet<ByKey>> {
        let mut shard = self.unmade_key_shard(key);
        if self.stored.is_any() {
            self.make_with_key(key, &mut shard);
        }
        shard
    }

    #[cold]
    fn make_with_key(&self, key: &InodeKey, shard: &mut HashSet<ByKey>) {
        if let Some(set) = self.stored.get() {
            self.make_all_with_key(&set, key, shard);
        }
    }

    fn make_all_with_key(&self, set: &Set, key: &InodeKey, shard: &mut HashSet<ByKey>) {
        for record in set.by_ino(&self.records).get(key.ino) {
            if let Some(entry) =
                self.records.inode(record).load().filter(|entry| InodeKey::of_entry(entry) == *key)
            {
                self.make_locked(set, record, &entry, shard);
            }
        }
    }

    /// Makes the inode of a record, which was found to have this entry, unless another thread has.
    fn make(&self, set: &Set, record: Record, entry: &InodeEntry) {
        self.make_locked(set, record, entry, &mut self.unmade_key_shard(&InodeKey::of_entry(entry)));
    }

    /// The same in the shard of its key. Without the mark the entry may be that of another inode, and the shard another
    /// one.
    fn make_locked(&self, set: &Set, record: Record, entry: &InodeEntry, shard: &mut HashSet<ByKey>) {
        if let Some(mount) = set.mounts.get(&entry.mount)
            && set.take(record)
        {
            self.insert_restored(self.inode_of(record, entry, Arc::clone(mount)), shard);
        }
    }

    /// The inode of a record, whose descriptor was counted.
    fn inode_of(&self, record: Record, entry: &InodeEntry, mount: Arc<Mount>) -> Arc<Inode> {
        let counted = |number| self.fd_cache.quota().counted().wrap(adopt_descriptor(number));
        let kind = FileType::from_raw_mode(u32::from(entry.kind) << 12);
        let fd = InodeFd::new(entry.descriptor.map(counted), mount, record);
        Arc::new(Inode::new(NodeId(entry.node), InodeKey::of_entry(entry), kind, fd))
    }

    /// Adds an inode that an earlier process had in its tables, too.
    pub(super) fn insert_restored(&self, inode: Arc<Inode>, shard: &mut HashSet<ByKey>) {
        let node = inode.node;
        let by_node = ByNode(Arc::clone(&inode));
        self.node_shard(node).write().unwrap_or_else(PoisonError::into_inner).insert(by_node);
        if inode.fd.has_path() {
            inode.fd.enter_clock(node);
        }
        // Of inodes that had a number one after the other, the last one has it.
        if let Some(before) = shard.replace(ByKey(inode))
            && before.0.node.0 > node.0
        {
            shard.replace(before);
        }
    }

    /// Whether some inodes may be left to make.
    pub fn has_stored(&self) -> bool {
        self.stored.is_any()
    }

    /// Makes all inodes that are left.
    pub fn make_rest(&self) {
        self.make_rest_with(|| ());
    }

    /// The same beside requests, which come first: they wait since a process has died.
    pub fn make_rest_in_background(&self) {
        // Requests may wait for it.
        if let Some(set) = self.stored.get() {
            let _ = set.by_ino(&self.records);
        }
        thread::sleep(FIRST_REST);
        self.make_rest_with(|| thread::sleep(REST));
    }

    fn make_rest_with(&self, pause: impl Fn()) {
        let Some(set) = self.stored.get() else { return };
        for (number, words) in (0..).zip(set.marks.chunks(WORDS_AT_ONCE)) {
            pause();
            if !self.stored.is_any() {
                return;
            }
            for (first, word) in (number * RECORDS_AT_ONCE..).step_by(WORD).zip(words) {
                for record in marked(first, word.load(Ordering::Acquire)) {
                    let entry = self.records.inode(record).load();
                    entry.into_iter().for_each(|entry| self.make(&set, record, &entry));
                }
            }
        }
        // A thread that has taken a mark holds the shard until the inode is there.
        self.all_shards().for_each(|(_, shard)| drop(shard.lock().unwrap_or_else(PoisonError::into_inner)));
        self.stored.end();
    }
}

/// What was not made has descriptors and a record, too.
impl Drop for InodeTable {
    fn drop(&mut self) {
        self.make_rest();
    }
}

/// Records by numbers, several of which may be equal. It is sorted once, which takes little time where most numbers are in order,
/// as node ids are, and inode numbers of files that were made one after the other; a hash table would take a cache miss for each.
#[derive(Debug, Default)]
struct RecordIndex {
    /// The number, as far as it fits, above the number of the record.
    pairs: Vec<u64>,
}

/// Bits for the number of a record (`src/state_file/`).
const RECORD_BITS: u32 = 24;

/// What fits of a number: numbers that differ may have it in common.
fn part_of(number: u64) -> u64 {
    (number ^ number >> (u64::BITS - RECORD_BITS)) << RECORD_BITS
}

impl RecordIndex {
    fn with_room(count: usize) -> RecordIndex {
        RecordIndex { pairs: Vec::with_capacity(count) }
    }

    /// Adds a record, which is found once all are sorted.
    fn add(&mut self, number: u64, record: Record) {
        self.pairs.push(part_of(number) | u64::from(record.raw()));
    }

    fn sort(&mut self) {
        self.pairs.sort_unstable();
    }

    /// Records that may have this number.
    fn get(&self, number: u64) -> impl Iterator<Item = Record> + '_ {
        let part = part_of(number);
        let from = self.pairs.partition_point(|pair| *pair < part);
        let mask = (1 << RECORD_BITS) - 1;
        let same = self.pairs.iter().skip(from).take_while(move |pair| **pair & !mask == part);
        same.map(move |pair| Record::new(u32::try_from(pair & mask).unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests;
