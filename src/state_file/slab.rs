//! Records of one kind, which are taken and given back one by one.
//!
//! Which records are free is known to the process alone: it finds out from the records when it begins. The first word of
//! a record says whether it is in use, and is stored last.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::StateFile;
use super::records::{HandleRecord, InodeRecord, MountRecord, OwnerRecord};
use crate::sys::shared_map::Record;

/// A kind of record: where the records are, and when one is in use.
pub trait Kind: Sized + Record {
    /// Number of the kind.
    const NUMBER: usize;
    /// Where its records begin, in bytes.
    const OFFSET: usize;
    /// How many there are.
    const COUNT: usize;

    /// Whether the record is in use.
    fn is_used(&self) -> bool;
}

/// The number of a record.
pub struct Index<K> {
    index: u32,
    kind: PhantomData<fn() -> K>,
}

impl<K> Index<K> {
    /// The record of this number.
    pub fn new(index: u32) -> Index<K> {
        Index { index, kind: PhantomData }
    }

    /// The number.
    pub fn get(self) -> usize {
        // 32 bits fit everywhere.
        usize::try_from(self.index).unwrap_or(0)
    }

    /// The number, as it stands in other records.
    pub fn raw(self) -> u32 {
        self.index
    }
}

impl<K> Clone for Index<K> {
    fn clone(&self) -> Index<K> {
        *self
    }
}

impl<K> Copy for Index<K> {}

impl<K> fmt::Debug for Index<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.index)
    }
}

/// All records of a kind.
pub struct Slab<K> {
    state: Arc<StateFile>,
    free: Mutex<Vec<u32>>,
    kind: PhantomData<fn() -> K>,
}

impl<K> fmt::Debug for Slab<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slab")
    }
}

impl<K: Kind> Slab<K> {
    /// The records in `state`, some of which may be in use.
    pub fn new(state: &Arc<StateFile>) -> Slab<K> {
        let slab = Slab { state: Arc::clone(state), free: Mutex::default(), kind: PhantomData };
        let free = state.ever_used::<K>().filter(|index| !state.get::<K>(*index).is_used());
        slab.free().extend(free.map(Index::raw));
        slab
    }

    /// The state file.
    pub fn state(&self) -> &Arc<StateFile> {
        &self.state
    }

    /// A record.
    #[inline]
    pub fn get(&self, index: Index<K>) -> &K {
        self.state.get(index)
    }

    /// A record that is not in use, for the caller alone; `None` if all are taken.
    pub fn take(&self) -> Option<Index<K>> {
        if let Some(index) = self.free().pop() {
            return Some(Index::new(index));
        }
        let limit = u32::try_from(K::COUNT).unwrap_or(u32::MAX);
        let more = |mark: u32| (mark < limit).then_some(mark.saturating_add(1));
        let mark = self.state.high_water::<K>().fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        mark.ok().map(Index::new)
    }

    /// So many records, or none of them: as [`Slab::take`].
    pub fn take_many(&self, count: usize) -> Option<Vec<Index<K>>> {
        let mut free = self.free();
        let (reused, count) = (count.min(free.len()), u32::try_from(count).ok()?);
        let new = count.saturating_sub(u32::try_from(reused).unwrap_or(u32::MAX));
        let limit = u32::try_from(K::COUNT).unwrap_or(u32::MAX);
        let more = |mark: u32| mark.checked_add(new).filter(|mark| *mark <= limit);
        let mark =
            self.state.high_water::<K>().fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        let left = free.len().saturating_sub(reused);
        let reused = free.drain(left..).rev();
        Some(reused.chain(mark..mark.saturating_add(new)).map(Index::new).collect())
    }

    /// Gives a record back, which is not in use any more.
    pub fn give_back(&self, index: Index<K>) {
        let mut free = self.free();
        // Without memory for the list, the record stays unused until the next process begins.
        if free.try_reserve(1).is_ok() {
            free.push(index.raw());
        }
    }

    /// The records in use.
    pub fn used(&self) -> impl Iterator<Item = Index<K>> + '_ {
        self.state.ever_used::<K>().filter(|index| self.get(*index).is_used())
    }

    /// Records that were ever in use have numbers below this.
    pub fn end(&self) -> usize {
        self.state.ever_used::<K>().len()
    }

    /// How many records are in use, while none is taken or given back.
    pub fn used_len(&self) -> usize {
        self.end().saturating_sub(self.free().len())
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateFile {
    /// A record.
    #[inline]
    pub(super) fn get<K: Kind>(&self, index: Index<K>) -> &K {
        self.record(K::OFFSET, K::COUNT, index.get())
    }

    /// The records up to the last one that was ever in use.
    pub(super) fn ever_used<K: Kind>(&self) -> impl ExactSizeIterator<Item = Index<K>> + use<K> {
        let limit = u32::try_from(K::COUNT).unwrap_or(u32::MAX);
        let mark = self.high_water::<K>().load(Ordering::Acquire).min(limit);
        (0..mark).map(Index::new)
    }

    #[allow(clippy::indexing_slicing, reason = "the number of a kind is a constant below their count")]
    fn high_water<K: Kind>(&self) -> &AtomicU32 {
        &self.header().high_water[K::NUMBER]
    }
}

impl StateFile {
    /// All descriptors that records name.
    pub(super) fn descriptors(self: &Arc<Self>) -> Vec<i32> {
        let inodes = self.ever_used().filter_map(|index| self.get::<InodeRecord>(index).load()?.descriptor);
        let mounts = self.ever_used().filter_map(|index| self.get::<MountRecord>(index).load()?.descriptor);
        let handles = self.ever_used().filter_map(|index| self.get::<HandleRecord>(index).load()?.descriptor);
        let owners =
            self.ever_used().filter_map(|index| Some(self.get::<OwnerRecord>(index).load()?.descriptor));
        inodes.chain(mounts).chain(handles).chain(owners).filter(|descriptor| *descriptor >= 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{HANDLES, HandleEntry};
    use super::*;

    #[test]
    fn many_records_are_taken_at_once_or_none() {
        let slab = Slab::<HandleRecord>::new(&StateFile::create_shared().unwrap());
        let entry = HandleEntry { id: 7, node: 2, descriptor: None, open_flags: 0, mode: 0, inode_mode: 0 };
        let first = slab.take_many(10).unwrap();
        first.iter().for_each(|index| slab.get(*index).store(&entry));
        for index in first.iter().take(4) {
            slab.get(*index).clear();
            slab.give_back(*index);
        }
        assert_eq!((slab.used().count(), slab.used_len(), slab.end()), (6, 6, 10));
        let more = slab.take_many(HANDLES - 6).unwrap();
        let numbers: HashSet<usize> =
            more.iter().chain(first.iter().skip(4)).map(|index| index.get()).collect();
        assert_eq!((numbers.len(), numbers.into_iter().max()), (HANDLES, Some(HANDLES - 1)));
        assert!(slab.take_many(1).is_none() && slab.take().is_none());
        slab.give_back(more[0]);
        assert!(slab.take_many(2).is_none(), "none of them");
        assert_eq!(slab.take_many(1).unwrap()[0].get(), more[0].get());
        assert!(slab.take_many(0).unwrap().is_empty());
    }
}
