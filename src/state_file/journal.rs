//! The journal of a queue: what becomes of the chains that were popped from its ring.
//!
//! A slot for each descriptor that a chain can begin with goes through these phases, each with one store of
//! the phase, after everything else that belongs to it:
//!
//! | phase | since | after a crash |
//! |---|---|---|
//! | free | the used entry was added | |
//! | taken | the chain was popped | the chain is served |
//! | started | the request was decoded | the request is served again, as a replay |
//! | done | the reply is complete in guest memory | the used entry is added |
//! | completing | the used entry is being added | the used entry is added, unless it was |
//!
//! The worker pops chains and adds used entries under the lock of its queue, so one at a time can be half done:
//! a chain that was taken and not counted, or a used entry that was added while the slot still says completing.
//! The first is seen by its number, the second by the used index, which the slot has from before the entry.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::effects::Effects;
use super::slot::{COMPLETING, DEATHS_SHIFT, DONE, FREE, HOLDS, PHASE, Resumed, STARTED, Slot, TAKEN};
use super::{QUEUES, SLOTS, StateFile, offsets};
use crate::sys::shared_map::{Record, Table};

/// Nothing is known of the ring.
pub(super) const UNKNOWN: u32 = 0;
/// A worker serves the queue, or has died.
pub(super) const RUNS: u32 = 1;
/// The queue was stopped; chains may have been put back.
pub(super) const STOPPED: u32 = 2;
/// The same, and the worker has died since. The front end may not have been told where the queue stood.
const LEFT: u32 = 3;

/// What a queue's journal knows of the ring.
#[repr(C)]
pub(super) struct QueueRecord {
    /// Index of the next available chain, in its lower 16 bits. It counts on, so that it names a chain.
    pub(super) next: AtomicU64,
    descriptors: AtomicU64,
    available: AtomicU64,
    used: AtomicU64,
    size: AtomicU32,
    pub(super) state: AtomicU32,
    /// The used index when the queue was stopped.
    pub(super) used_index: AtomicU32,
    /// One more than the descriptor of the ring of io_uring that the worker has made for the queue; 0 for none.
    ring: AtomicU32,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for QueueRecord {}

impl QueueRecord {
    pub(super) fn place(&self) -> Place {
        Place {
            descriptors: self.descriptors.load(Ordering::Relaxed),
            available: self.available.load(Ordering::Relaxed),
            used: self.used.load(Ordering::Relaxed),
            size: u16::try_from(self.size.load(Ordering::Relaxed)).unwrap_or(0),
        }
    }

    pub(super) fn set_place(&self, place: Place) {
        self.descriptors.store(place.descriptors, Ordering::Release);
        self.available.store(place.available, Ordering::Relaxed);
        self.used.store(place.used, Ordering::Relaxed);
        self.size.store(place.size.into(), Ordering::Relaxed);
    }
}

/// Where a ring is. A ring that is somewhere else is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// The same of the available ring.
    pub available: u64,
    /// The same of the used ring.
    pub used: u64,
    /// Descriptors.
    pub size: u16,
}

/// A request that was taken and has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// The queue that it came by.
    pub queue: usize,
    /// Its first descriptor.
    pub head: u16,
    /// The guest's number for it; 0 if it is not decoded.
    pub unique: u64,
    /// Its opcode; 0 if it is not decoded.
    pub opcode: u32,
    /// Its bytes.
    pub len: u32,
    /// Processes that have died with it.
    pub deaths: u32,
}

/// How a queue begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Index of the next available chain.
    pub next_available: u16,
    /// Chains that were popped and have no used entry, in the order of their arrival.
    pub resumed: Vec<Resumed>,
    /// A worker died while it served the queue: the guest may wait for a notification.
    pub after_crash: bool,
}

/// The journal of one queue.
#[derive(Clone)]
pub struct Journal {
    queue: usize,
    slots: Table<Slot, StateFile>,
    records: Table<QueueRecord, StateFile>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "journal of queue {}", self.queue)
    }
}

impl Journal {
    /// The journal of the queue with this number.
    ///
    /// # Panics
    /// If the file were shorter than all files are.
    #[allow(clippy::expect_used, reason = "the offsets are constants inside the file, as a test shows")]
    pub fn new(state: &Arc<StateFile>, queue: usize) -> Journal {
        let queue = queue.min(QUEUES - 1);
        let slots = offsets::SLOT_RECORDS + queue * SLOTS * size_of::<Slot>();
        let slots = Table::new(Arc::clone(state), slots, SLOTS);
        let records = Table::new(Arc::clone(state), offsets::QUEUE_RECORDS, QUEUES);
        Journal { queue, slots: slots.expect("slots"), records: records.expect("records") }
    }

    #[inline]
    fn state(&self) -> &StateFile {
        self.slots.owner()
    }

    /// The queue begins, with a ring at `place`. The front end says that `base` is the next available chain, and the ring
    /// that `used_index` is the next used entry.
    ///
    /// What the journal knows counts if the ring is the one that it was written for: after a crash in any case, and
    /// after a stop if the queue goes on where it stood, or behind the last used entry.
    pub fn start(&self, place: Place, base: u16, used_index: u16) -> Start {
        let queue = self.record();
        let state = queue.state.load(Ordering::Acquire);
        let is_same = state != UNKNOWN && self.place() == place;
        let next = queue.next.load(Ordering::Acquire);
        let stood = queue.used_index.load(Ordering::Relaxed) == u32::from(used_index);
        // A new ring begins with 0.
        let goes_on = base == low(next) || used_index != 0 && (base == used_index || state == LEFT);
        let start = match state {
            RUNS if is_same => self.after_crash(next, used_index),
            STOPPED | LEFT if is_same && stood && goes_on => self.after_stop(next, base),
            _ => {
                self.clear();
                Start { next_available: base, ..Start::default() }
            }
        };
        self.begin(place, start.next_available);
        start
    }

    fn begin(&self, place: Place, next_available: u16) {
        let queue = self.record();
        if self.place() != place {
            // Nothing is in flight in a ring that is somewhere else.
            queue.state.store(UNKNOWN, Ordering::Release);
        }
        queue.set_place(place);
        // It counts on, so that no chain in flight has the number of one that comes.
        let next = queue.next.load(Ordering::Relaxed);
        let distance = next_available.wrapping_sub(low(next));
        queue.next.store(next.wrapping_add(distance.into()), Ordering::Relaxed);
        queue.state.store(RUNS, Ordering::Release);
    }

    fn after_crash(&self, next: u64, used_index: u16) -> Start {
        self.slots().filter(|(_, slot)| slot.is_added(used_index)).for_each(|(_, slot)| slot.free());
        // A chain was taken and not counted, or chains that were put back stand here still.
        let behind = self.slots_in_use().map(|(_, slot)| slot.number().wrapping_add(1)).max();
        let next_available = low(next.max(behind.unwrap_or(0)));
        Start { next_available, resumed: self.resumed(), after_crash: true }
    }

    fn after_stop(&self, next: u64, base: u16) -> Start {
        self.free_from(next);
        let resumed = self.resumed();
        let next_available = if resumed.is_empty() && self.is_stopped() { base } else { low(next) };
        Start { next_available, resumed, after_crash: false }
    }

    fn is_stopped(&self) -> bool {
        self.record().state.load(Ordering::Acquire) == STOPPED
    }

    /// The chains without a used entry, the oldest first. A mark that one was served alone counts once.
    fn resumed(&self) -> Vec<Resumed> {
        let mut in_use: Vec<_> = self.slots_in_use().collect();
        in_use.sort_by_key(|(_, slot)| slot.number());
        let resumed = in_use.iter().map(|(head, slot)| slot.resumed(*head)).collect();
        in_use.iter().for_each(|(_, slot)| slot.mark(false));
        resumed
    }

    /// The queue has stopped; the ring stands at these indices. Chains that were popped before and have no used entry
    /// wait until the queue begins again; those behind are available in the ring.
    pub fn stop(&self, next_available: u16, used_index: u16) {
        let queue = self.record();
        let next = queue.next.load(Ordering::Relaxed);
        // Chains may have gone back into the ring. Should the worker die before they are free, they are in flight.
        let fewer = low(next).wrapping_sub(next_available);
        let next = next.wrapping_sub(fewer.into());
        queue.next.store(next, Ordering::Relaxed);
        queue.used_index.store(used_index.into(), Ordering::Relaxed);
        queue.state.store(STOPPED, Ordering::Release);
        self.free_from(next);
        self.slots_in_use().for_each(|(_, slot)| slot.mark(false));
    }

    /// Forgets everything: the guest has begun anew.
    pub fn clear(&self) {
        self.slots().for_each(|(_, slot)| slot.free());
        self.record().state.store(UNKNOWN, Ordering::Release);
    }

    fn free_from(&self, next: u64) {
        self.slots_in_use().filter(|(_, slot)| slot.number() >= next).for_each(|(_, slot)| slot.free());
    }

    /// A chain was popped; false if it is in flight already, which only a guest that breaks the rules can bring about. Two
    /// requests must not share a slot: one would take the notes of the other for its own. The caller has locked the
    /// queue.
    #[inline]
    #[must_use = "a chain that is in flight is not to be served"]
    pub fn take(&self, head: u16) -> bool {
        let (slot, next) = (self.slot(head), &self.record().next);
        if slot.word.load(Ordering::Relaxed) & PHASE != FREE {
            return false;
        }
        let number = next.load(Ordering::Relaxed);
        slot.number.store(number, Ordering::Relaxed);
        slot.word.store(TAKEN, Ordering::Release);
        next.store(number.wrapping_add(1), Ordering::Release);
        true
    }

    /// A chain was decoded and is served from now on.
    #[inline]
    pub fn begin_request(&self, head: u16, unique: u64, opcode: u32, len: u32) {
        let slot = self.slot(head);
        slot.unique.store(unique, Ordering::Relaxed);
        slot.opcode.store(opcode, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.counted.store(0, Ordering::Relaxed);
        slot.handle.store(0, Ordering::Relaxed);
        slot.before.store(0, Ordering::Relaxed);
        slot.progress.store(0, Ordering::Relaxed);
        let word = slot.word.load(Ordering::Relaxed);
        slot.word.store(word & !(PHASE | HOLDS) | STARTED, Ordering::Release);
    }

    /// The request of a chain has done nothing, and is given up: the chain is as it was when it was popped.
    pub fn put_back(&self, head: u16) {
        let word = &self.slot(head).word;
        // Nobody else changes the phase of a request that is not done.
        word.store(word.load(Ordering::Relaxed) & !PHASE | TAKEN, Ordering::Release);
    }

    /// From now on a chain that a worker died with is served and no other one is, or that is over: others are, too.
    pub fn mark_alone(&self, head: u16, is_alone: bool) {
        self.slot(head).mark(is_alone);
    }

    /// The reply is complete: `written` bytes.
    #[inline]
    pub fn done(&self, head: u16, written: u32) {
        let slot = self.slot(head);
        slot.written.store(written, Ordering::Relaxed);
        slot.word.store(DONE, Ordering::Release);
        self.state().end_list(slot);
    }

    /// The used entry of a chain is about to be added at this index. The caller has locked the queue.
    #[inline]
    pub fn begin_used_entry(&self, head: u16, used_index: u16) -> UsedEntry<'_> {
        let slot = self.slot(head);
        slot.word.store(COMPLETING | u32::from(used_index) << DEATHS_SHIFT, Ordering::Release);
        UsedEntry(slot)
    }

    /// A request was refused since it made processes fail.
    pub fn count_poisoned(&self) {
        self.state().poisoned().fetch_add(1, Ordering::Relaxed);
    }

    /// What the request of a chain does that must be done once.
    #[inline]
    pub fn effects(&self, head: u16, is_replay: bool) -> Effects<'_> {
        let slot = self.slot(head);
        Effects::new(self.state(), slot, tag(self.queue, head, slot.number()), is_replay)
    }

    /// Makes it that the process dies before the last chain is counted.
    #[cfg(test)]
    pub fn uncount(&self) {
        self.record().next.fetch_sub(1, Ordering::Relaxed);
    }

    #[inline]
    fn record(&self) -> &QueueRecord {
        self.records.get(self.queue)
    }

    #[inline]
    fn slot(&self, head: u16) -> &Slot {
        self.slots.get(usize::from(head))
    }

    fn slots(&self) -> impl Iterator<Item = (u16, &Slot)> {
        self.state().slots(self.queue)
    }

    fn slots_in_use(&self) -> impl Iterator<Item = (u16, &Slot)> {
        self.slots().filter(|(_, slot)| slot.phase() != FREE)
    }

    fn place(&self) -> Place {
        self.record().place()
    }
}

/// A used entry that is being added.
#[must_use = "the chain is in flight until the entry has ended"]
pub struct UsedEntry<'a>(&'a Slot);

impl UsedEntry<'_> {
    /// The entry was added. The caller has locked the queue.
    #[inline]
    pub fn end(self) {
        self.0.word.store(FREE, Ordering::Release);
    }
}

/// The lower 16 bits, which are an index of the ring.
pub(super) fn low(number: u64) -> u16 {
    let [a, b, ..] = number.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Says which request changed a count of lookups: queue, first descriptor, and the last bit of the chain's number. Two
/// bits are left for [`Effects`].
fn tag(queue: usize, head: u16, number: u64) -> u32 {
    let queue = u32::try_from(queue % QUEUES).unwrap_or(0);
    queue << 18 | (u32::from(head) & 0x7fff) << 3 | u32::from(low(number) & 1) << 2
}

impl StateFile {
    /// Descriptors that requests in flight hold.
    pub(super) fn held_descriptors(&self) -> impl Iterator<Item = RawFd> {
        (0..QUEUES)
            .filter(|queue| self.queue(*queue).state.load(Ordering::Acquire) != UNKNOWN)
            .flat_map(|queue| self.slots(queue))
            .filter_map(|(_, slot)| slot.held())
    }

    /// Descriptors of the rings of io_uring that the last process had. Nobody else has them.
    pub fn rings(&self) -> Vec<RawFd> {
        let of_queue = |queue| self.queue(queue).ring.load(Ordering::Acquire).checked_sub(1);
        (0..QUEUES).filter_map(of_queue).filter_map(|ring| RawFd::try_from(ring).ok()).collect()
    }

    /// Notes those that this process has, before anything is submitted. Those of the last one are gone.
    pub fn set_rings(&self, rings: impl IntoIterator<Item = RawFd>) {
        let mut rings = rings.into_iter();
        for queue in 0..QUEUES {
            let ring = rings.next().and_then(|ring| u32::try_from(ring).ok());
            self.queue(queue).ring.store(ring.map_or(0, |ring| ring.saturating_add(1)), Ordering::Release);
        }
    }

    /// The slots that the ring of a queue has.
    pub(super) fn slots(&self, queue: usize) -> impl Iterator<Item = (u16, &Slot)> {
        let size = self.queue(queue).size.load(Ordering::Relaxed);
        let size = u16::try_from(size).unwrap_or(0).min(u16::try_from(SLOTS).unwrap_or(u16::MAX));
        (0..size).map(move |head| (head, self.slot(queue, head)))
    }

    /// The requests of all queues that were taken and have no reply.
    pub fn in_flight(&self) -> Vec<InFlight> {
        let of_queue = |queue: usize| {
            let slots = self.slots(queue).filter(|(_, slot)| slot.is_unfinished());
            slots.map(move |(head, slot)| {
                let Resumed { unique, opcode, len, deaths, .. } = slot.resumed(head);
                InFlight { queue, head, unique, opcode, len, deaths }
            })
        };
        let runs = |queue: &usize| self.queue(*queue).state.load(Ordering::Acquire) == RUNS;
        (0..QUEUES).filter(runs).flat_map(of_queue).collect()
    }

    /// Queues that a worker served when it died, each with the most deaths that a chain without a reply has seen. Queues
    /// without such a chain are left out.
    pub fn unfinished(&self) -> Vec<(usize, u32)> {
        let of_queue = |queue: usize| {
            let slots = self.slots(queue).filter(|(_, slot)| slot.is_unfinished());
            slots.map(|(head, slot)| slot.resumed(head).deaths).max().map(|deaths| (queue, deaths))
        };
        let runs = |queue: &usize| self.queue(*queue).state.load(Ordering::Acquire) == RUNS;
        (0..QUEUES).filter(runs).filter_map(of_queue).collect()
    }

    /// Counts the death of a worker for all that it had in flight, if it `was_a_failure`, and returns the requests that
    /// it served, with the tag of each.
    pub(super) fn count_deaths(&self, was_a_failure: bool) -> Vec<(&Slot, u32)> {
        let mut started = Vec::new();
        for queue in 0..QUEUES {
            let state = &self.queue(queue).state;
            let runs = match state.load(Ordering::Acquire) {
                UNKNOWN => continue,
                RUNS => true,
                _ => {
                    state.store(LEFT, Ordering::Release);
                    false
                }
            };
            for (head, slot) in self.slots(queue) {
                if runs && was_a_failure {
                    slot.count_death();
                }
                if slot.is_started() {
                    started.push((slot, tag(queue, head, slot.number())));
                } else {
                    // No request of this process has it.
                    slot.list.store(0, Ordering::Release);
                }
            }
        }
        started
    }
}
