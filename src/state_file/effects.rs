//! What a request does that must not be done twice when it is served again after a crash.
//!
//! A lookup that was counted and not answered would never be forgotten. So a request notes the record whose count it
//! is about to raise, and the count carries a tag that says which request changed it last. After a crash all that were
//! noted are taken back: the ones before the last were raised for sure, and the last one if the count has its tag. (If
//! another request has changed the same count in the instant before the crash, one lookup too many stays until the
//! session ends. One too few would be an error in the guest: wherever there is a doubt, a lookup stays.) FORGET goes the
//! other way: it notes how far it has come, and what the count of that item was.
//!
//! For the rest a note is enough: the handle that OPEN has made, what a name meant before the request, and how far it has
//! come with a system call that must not be made twice.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;

use super::records::InodeRecord;
use super::slab::Index;
use super::slot::{Attempt, Slot};
use super::{LIST_LEN, LISTS, StateFile};

/// The lowest bit of the progress of FORGET: what the count of the item was is noted.
const NOTED: u32 = 1;
/// In place of a list.
const NO_LIST: u32 = 0;

/// The notes of one request.
#[derive(Clone, Copy, Debug)]
pub struct Effects<'a>(Option<Notes<'a>>);

#[derive(Clone, Copy)]
struct Notes<'a> {
    state: &'a StateFile,
    slot: &'a Slot,
    tag: u32,
    is_replay: bool,
}

impl std::fmt::Debug for Notes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "request {:#x}", self.tag)
    }
}

impl<'a> Effects<'a> {
    /// For a request that is in no queue: nothing is noted.
    pub const NONE: Effects<'static> = Effects(None);

    pub(super) fn new(state: &'a StateFile, slot: &'a Slot, tag: u32, is_replay: bool) -> Effects<'a> {
        Effects(Some(Notes { state, slot, tag, is_replay }))
    }

    /// Whether a worker died while it served the request before.
    pub fn is_replay(self) -> bool {
        self.0.is_some_and(|notes| notes.is_replay)
    }

    /// Whether another process may serve the request after this one has died.
    #[inline]
    pub fn outlives(self) -> bool {
        self.0.is_some_and(|notes| notes.state.outlives())
    }

    /// Makes the one system call of the request that must not be made twice, and notes what comes of it.
    pub fn attempt<T>(self, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let Some(notes) = self.0.filter(|notes| notes.state.outlives()) else { return call() };
        notes.slot.set_attempt(Attempt::UnderWay);
        let result = call();
        notes.slot.set_attempt(if result.is_ok() { Attempt::Succeeded } else { Attempt::Failed });
        result
    }

    /// How far the request had come with that call when its worker died.
    pub fn attempted(self) -> Attempt {
        self.0.filter(|notes| notes.is_replay).map_or(Attempt::NotMade, |notes| notes.slot.attempt())
    }

    /// The request raises the lookups of an inode from 0, as its record is stored: the tag to store.
    pub fn begin_lookups(self, record: Index<InodeRecord>) -> u32 {
        self.0.map_or(0, |notes| notes.note(record))
    }

    /// The request raises the lookups of an inode by one.
    #[inline]
    pub fn count_lookup(self, index: Index<InodeRecord>, record: &InodeRecord) {
        let tag = self.0.map_or(0, |notes| notes.note(index));
        record.change_lookups(tag, |count| count.saturating_add(1));
    }

    /// The request takes back the lookup that it has counted last, since its reply will not have it; returns the
    /// count before.
    pub fn take_back_lookup(self, record: &InodeRecord) -> u64 {
        // Another tag: it is not counted any more, also if the note is still there.
        let before = record.change_lookups(0, |count| count.saturating_sub(1));
        if let Some(notes) = self.0 {
            let counted = notes.slot.counted.load(Ordering::Relaxed);
            notes.slot.counted.store(counted.saturating_sub(1), Ordering::Release);
        }
        before
    }

    /// FORGET takes `by` off the lookups of an inode; returns the count before, or `None` if the item was dealt with
    /// before the crash.
    ///
    /// The count is noted first; when the request is served again, it leaves the item alone unless the count is the same.
    /// So a count may stay too high, until the session ends, but never becomes too low.
    pub fn forget(self, record: &InodeRecord, by: u64) -> Option<u64> {
        self.must_forget(record).then(|| record.change_lookups(0, |count| count.saturating_sub(by)))
    }

    /// Whether FORGET has to deal with this item, whose count is noted now.
    pub(super) fn must_forget(self, record: &InodeRecord) -> bool {
        let Some(notes) = self.0 else { return true };
        let (progress, now) = (notes.slot.progress.load(Ordering::Acquire), record.lookups_and_tag());
        if notes.is_replay && progress & NOTED != 0 {
            return notes.slot.before.load(Ordering::Relaxed) == now;
        }
        notes.slot.before.store(now, Ordering::Release);
        notes.slot.progress.store(progress | NOTED, Ordering::Release);
        true
    }

    /// How many items a FORGET has dealt with.
    pub fn progress(self) -> u32 {
        self.0.map_or(0, |notes| notes.slot.progress.load(Ordering::Relaxed) >> 1)
    }

    /// FORGET deals with this item from now on.
    #[inline]
    pub fn set_progress(self, progress: u32) {
        // What is noted of this item already stays.
        if let Some(notes) = self.0
            && notes.slot.progress.load(Ordering::Relaxed) >> 1 != progress
        {
            notes.slot.progress.store(progress << 1, Ordering::Release);
        }
    }

    /// The request is about to make the handle with this id. After a crash it is closed.
    #[inline]
    pub fn open_handle(self, handle: u64) {
        if let Some(notes) = self.0 {
            notes.slot.handle.store(handle, Ordering::Release);
        }
    }

    /// Notes what the request met before it changed anything: a number that is not 0.
    pub fn set_before(self, value: u64) {
        if let Some(notes) = self.0 {
            notes.slot.before.store(value, Ordering::Release);
        }
    }

    /// What the request met before the crash; `None` if it had not come so far, or is no replay.
    pub fn before(self) -> Option<u64> {
        let notes = self.0.filter(|notes| notes.is_replay)?;
        Some(notes.slot.before.load(Ordering::Acquire)).filter(|value| *value != 0)
    }

    /// Whether something that was made at `made` may have been made by a process that began with it at `begun`, and has
    /// died since. All are nanoseconds since 1970.
    pub fn was_alive(self, begun: u64, made: u64) -> bool {
        self.0.is_some_and(|notes| (begun..=notes.state.recovered_at()).contains(&made))
    }

    /// Notes a descriptor that must outlive this process as long as the request is not done.
    pub fn hold_descriptor(self, descriptor: RawFd) {
        if let Some(notes) = self.0 {
            notes.slot.hold(descriptor);
        }
    }

    /// The request needs its descriptor no more, and closes it.
    pub fn let_descriptor_go(self) {
        if let Some(notes) = self.0 {
            notes.slot.let_go();
        }
    }

    /// The descriptor that an earlier process held for the request.
    pub fn held_descriptor(self) -> Option<RawFd> {
        self.0.filter(|notes| notes.is_replay)?.slot.held()
    }
}

impl Notes<'_> {
    /// Notes a record whose count is about to be raised; returns the tag of that.
    fn note(self, record: Index<InodeRecord>) -> u32 {
        let counted = self.slot.counted.load(Ordering::Relaxed);
        let before = self.state.inode(record);
        if before.tag() & !3 == self.tag {
            // An older request with the same tag has counted, and this one has not yet.
            before.change_lookups(0, |count| count);
        }
        if counted == 0 {
            self.slot.first.store(record.raw(), Ordering::Relaxed);
        } else if let Some(place) = self.place(counted) {
            place.store(record.raw(), Ordering::Relaxed);
        } else {
            // Without room for the note, this lookup would stay counted.
            return 0;
        }
        self.slot.counted.store(counted.saturating_add(1), Ordering::Release);
        self.tag | counted & 3
    }

    /// The place of a note that is not the first, in a list that the request gets when it needs one.
    fn place(&self, counted: u32) -> Option<&AtomicU32> {
        let mut list = self.slot.list.load(Ordering::Relaxed);
        if list == NO_LIST {
            list = self.state.take_list()?;
            self.slot.list.store(list, Ordering::Release);
        }
        self.state.list_of(list)?.get(usize::try_from(counted).ok()?.checked_sub(1)?)
    }
}

impl StateFile {
    /// The request of a slot is done: takes its list back.
    #[inline]
    pub(super) fn end_list(&self, slot: &Slot) {
        if slot.list.load(Ordering::Relaxed) != NO_LIST {
            self.give_list_back(slot.list.swap(NO_LIST, Ordering::AcqRel));
        }
    }

    /// The notes of a slot, and whether each was counted for sure; the last one was if the count has its tag.
    pub(super) fn notes(&self, slot: &Slot, tag: u32) -> Vec<(Index<InodeRecord>, Option<u32>)> {
        let counted = slot.counted.load(Ordering::Acquire);
        let first = slot.first.load(Ordering::Relaxed);
        let list = self.list_of(slot.list.load(Ordering::Relaxed)).unwrap_or_default();
        let further = list.iter().map(|note| note.load(Ordering::Relaxed));
        let limit = usize::try_from(counted).unwrap_or(0).min(LIST_LEN);
        let notes = std::iter::once(first).chain(further).take(limit).enumerate();
        let last_tag = tag | counted.wrapping_sub(1) & 3;
        notes
            .map(|(at, note)| (Index::new(note), (at.saturating_add(1) == limit).then_some(last_tag)))
            .collect()
    }

    fn list_of(&self, list: u32) -> Option<&[AtomicU32]> {
        let number = usize::try_from(list).ok()?.checked_sub(1)?;
        (number < LISTS).then(|| self.list(number))
    }
}
