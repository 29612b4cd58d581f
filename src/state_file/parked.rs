//! Chains that were put back when their queues stopped, for another daemon: the guest waits for their replies.
//!
//! A request that waits for a lock is put back into the ring where that is possible. Where later chains have their used
//! entries, the index of the ring cannot go back: the chain is known to the journal alone, which serves it when the queue
//! goes on ([`Journal::start`](super::Journal::start)).

use std::sync::atomic::Ordering;

use super::journal::{Place, RUNS, STOPPED, UNKNOWN, low};
use super::slot::{FREE, TAKEN};
use super::{QUEUES, StateFile};

/// A queue that was stopped with chains that have no reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Its number.
    pub queue: usize,
    /// Its ring.
    pub place: Place,
    /// Index of the next available chain.
    pub next_available: u16,
    /// The used index.
    pub used_index: u16,
    /// The first descriptor of each chain, the oldest one first.
    pub heads: Vec<u16>,
}

impl StateFile {
    /// All chains that were put back. No queue runs.
    pub fn parked(&self) -> Vec<Parked> {
        (0..QUEUES).filter_map(|queue| self.parked_of(queue)).collect()
    }

    fn parked_of(&self, index: usize) -> Option<Parked> {
        let queue = self.queue(index);
        if matches!(queue.state.load(Ordering::Acquire), UNKNOWN | RUNS) {
            return None;
        }
        let next = queue.next.load(Ordering::Relaxed);
        // Those from the next one on are available in the ring.
        let mut slots: Vec<_> = self
            .slots(index)
            .filter(|(_, slot)| slot.is_unfinished() && slot.number() < next)
            .map(|(head, slot)| (slot.number(), head))
            .collect();
        slots.sort_unstable();
        (!slots.is_empty()).then(|| Parked {
            queue: index,
            place: queue.place(),
            next_available: low(next),
            used_index: low(queue.used_index.load(Ordering::Relaxed).into()),
            heads: slots.into_iter().map(|(_, head)| head).collect(),
        })
    }

    /// Takes over what another daemon has put back. The queue was never started, and the heads are distinct descriptors of
    /// the ring.
    pub fn park(&self, parked: &Parked) {
        let queue = self.queue(parked.queue % QUEUES);
        // The chains were popped before the next one.
        let next = (1 << 16) + u64::from(parked.next_available);
        queue.set_place(parked.place);
        for (age, head) in (1..).zip(parked.heads.iter().rev()) {
            let slot = self.slot(parked.queue % QUEUES, *head);
            slot.number.store(next.saturating_sub(age), Ordering::Relaxed);
            debug_assert_eq!(slot.phase(), FREE);
            slot.word.store(TAKEN, Ordering::Release);
        }
        queue.next.store(next, Ordering::Relaxed);
        queue.used_index.store(parked.used_index.into(), Ordering::Relaxed);
        queue.state.store(STOPPED, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_file::Journal;

    const PLACE: Place = Place { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };

    #[test]
    fn chains_that_were_put_back_go_on_elsewhere() {
        let state = StateFile::create().unwrap();
        let journal = Journal::new(&state, 2);
        journal.start(PLACE, 65_534, 65_533);
        for head in [5, 1, 7, 0] {
            assert!(journal.take(head));
            journal.begin_request(head, 9, 33, 40);
        }
        assert!(state.parked().is_empty(), "the queue runs");
        // 1 has its reply, 0 goes back into the ring.
        journal.done(1, 16);
        journal.begin_used_entry(1, 65_533).end();
        journal.stop(1, 65_534);
        let parked = state.parked();
        let expected =
            Parked { queue: 2, place: PLACE, next_available: 1, used_index: 65_534, heads: vec![5, 7] };
        assert_eq!(parked, [expected]);

        let other = StateFile::create().unwrap();
        other.park(&parked[0]);
        assert_eq!(other.parked(), parked);
        let start = Journal::new(&other, 2).start(PLACE, 1, 65_534);
        let heads: Vec<u16> = start.resumed.iter().map(|chain| chain.head).collect();
        assert_eq!((start.next_available, heads, start.after_crash), (1, vec![5, 7], false));
        assert!(start.resumed.iter().all(|chain| !chain.is_started() && chain.deaths == 0));
        // They are in flight, and others come.
        let journal = Journal::new(&other, 2);
        assert!(!journal.take(5) && journal.take(0));
    }

    #[test]
    fn another_ring_has_none_of_them() {
        let state = StateFile::create().unwrap();
        let parked = Parked { queue: 1, place: PLACE, next_available: 9, used_index: 8, heads: vec![3] };
        for (place, base, used) in [(Place { used: 0x9000, ..PLACE }, 9, 8), (PLACE, 9, 7), (PLACE, 0, 0)] {
            state.park(&parked);
            let start = Journal::new(&state, 1).start(place, base, used);
            assert_eq!((start.next_available, start.resumed), (base, vec![]));
            Journal::new(&state, 1).clear();
        }
    }
}
