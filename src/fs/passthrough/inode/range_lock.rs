//! Locks on byte ranges of one file.
//!
//! Without parallel direct writes, the guest's inode lock serializes the writers of a file. With them, overlapping
//! writes reach the daemon at the same time, and host file systems do not serialize them either if they are O_DIRECT or
//! take more than one system call. These locks do: of two overlapping writes one is complete before the other begins, a
//! reader never sees a part of either, and disjoint ranges never wait for each other. Overlapping ranges are granted in
//! the order of arrival.
//!
//! The protocol: [`RangeLock::write`] and [`RangeLock::read`] append a holder to the queue. One that conflicts with an
//! earlier holder is blocked: its thread parks until [`RangeGuard`]'s drop of the last such holder clears its mark and
//! unparks it. All of it happens under one mutex, but the park.

use crate::sync::{Mutex, MutexGuard, PoisonError, Thread, block_in_place, current, park};

/// The locks of one inode. An inode whose ranges were never locked needs no memory for them.
#[derive(Debug, Default)]
pub struct RangeLock {
    holders: Mutex<Option<Box<Holders>>>,
}

/// Holders of ranges and blocked ones, in the order of arrival.
#[derive(Debug, Default)]
struct Holders {
    next_ticket: u64,
    queue: Vec<Holder>,
}

#[derive(Debug)]
struct Holder {
    ticket: u64,
    range: Range,
    /// The thread that is parked until the range is granted; `None` after that.
    parked: Option<Thread>,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    /// First byte behind the range.
    end: u64,
    exclusive: bool,
}

impl Range {
    fn conflicts(self, other: Range) -> bool {
        (self.exclusive || other.exclusive) && self.start < other.end && other.start < self.end
    }
}

/// Holds a range until it is dropped.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
    /// Other ranges of the file that were locked exclusively when this one came.
    others: usize,
}

/// A range that a request holds, whichever thread it is on, until it is given to [`RangeLock::unlock`].
#[derive(Debug)]
#[must_use = "the range stays locked"]
pub struct Ticket(u64);

impl RangeGuard<'_> {
    /// How many ranges of the file were locked exclusively when this one came, itself among them.
    pub fn writers(&self) -> usize {
        self.others.saturating_add(1)
    }

    /// Leaves the range locked.
    pub fn keep(self) -> Ticket {
        let ticket = Ticket(self.ticket);
        std::mem::forget(self);
        ticket
    }
}

impl RangeLock {
    /// Unlocks a range that was kept.
    pub fn unlock(&self, ticket: Ticket) {
        self.release(ticket.0);
    }

    /// Locks `len` bytes from `start` on exclusively; waits for all requests that read or write any of them.
    pub fn write(&self, start: u64, len: u64) -> RangeGuard<'_> {
        self.acquire(Range { start, end: start.saturating_add(len), exclusive: true })
    }

    /// As [`RangeLock::write`], for all bytes from `start` on.
    pub fn write_from(&self, start: u64) -> RangeGuard<'_> {
        self.acquire(Range { start, end: u64::MAX, exclusive: true })
    }

    /// Locks `len` bytes from `start` on for reading; waits for all requests that write any of them.
    pub fn read(&self, start: u64, len: u64) -> RangeGuard<'_> {
        self.acquire(Range { start, end: start.saturating_add(len), exclusive: false })
    }

    /// Frees the memory that an inode needs while its ranges are locked.
    pub fn trim(&self) {
        let mut holders = self.lock();
        if holders.as_ref().is_some_and(|state| state.queue.is_empty()) {
            *holders = None;
        }
    }

    fn acquire(&self, range: Range) -> RangeGuard<'_> {
        let mut holders = self.lock();
        let state = holders.get_or_insert_default();
        let ticket = state.next_ticket;
        state.next_ticket = ticket.wrapping_add(1);
        let wait = state.queue.iter().any(|holder| holder.range.conflicts(range));
        let writes = |holder: &&Holder| holder.range.exclusive && holder.parked.is_none();
        let others = state.queue.iter().filter(writes).count();
        let parked = wait.then(current);
        state.queue.push(Holder { ticket, range, parked });
        drop(holders);
        let guard = RangeGuard { lock: self, ticket, others };
        if wait {
            block_in_place(|| {
                while self.is_blocked(ticket) {
                    park();
                }
            });
        }
        guard
    }

    /// Whether the holder of `ticket` is blocked.
    fn is_blocked(&self, ticket: u64) -> bool {
        let holders = self.lock();
        let queue = holders.iter().flat_map(|state| &state.queue);
        queue.into_iter().any(|holder| holder.ticket == ticket && holder.parked.is_some())
    }

    fn release(&self, ticket: u64) {
        let mut holders = self.lock();
        let Some(state) = holders.as_mut() else { return };
        let Some(place) = state.queue.iter().position(|holder| holder.ticket == ticket) else { return };
        let released = state.queue.remove(place);
        // Only later holders that conflict with the released range can have waited for it.
        for later in place..state.queue.len() {
            let (before, rest) = state.queue.split_at_mut(later);
            let Some(holder) = rest.first_mut() else { break };
            let blocked = || before.iter().any(|earlier| earlier.range.conflicts(holder.range));
            if holder.parked.is_some()
                && holder.range.conflicts(released.range)
                && !blocked()
                && let Some(thread) = holder.parked.take()
            {
                thread.unpark();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Holders>>> {
        // The queue is consistent between any two steps that could panic.
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.ticket);
    }
}

/// Locks a range for reading in one file and one for writing in another, or in the same: the file
/// with the lower address first, and in one file both as one exclusive range, so that two callers
/// never wait for each other.
pub fn lock_copy<'a>(
    (source, source_start): (&'a RangeLock, u64),
    (target, target_start): (&'a RangeLock, u64),
    len: u64,
) -> (RangeGuard<'a>, Option<RangeGuard<'a>>) {
    if std::ptr::eq(source, target) {
        let start = source_start.min(target_start);
        let end = source_start.max(target_start).saturating_add(len);
        return (source.write(start, end - start), None);
    }
    if std::ptr::from_ref(source) < std::ptr::from_ref(target) {
        let first = source.read(source_start, len);
        (first, Some(target.write(target_start, len)))
    } else {
        let first = target.write(target_start, len);
        (first, Some(source.read(source_start, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn disjoint_ranges_and_readers_do_not_wait() {
        let lock = RangeLock::default();
        let _a = lock.write(0, 10);
        let _b = lock.write(10, 10);
        let _c = lock.read(20, 10);
        let _d = lock.read(25, 10);
        let _e = lock.write(u64::MAX - 1, 100);
    }

    #[test]
    fn overlapping_ranges_are_granted_in_order() {
        let lock = RangeLock::default();
        let (sender, order) = mpsc::channel();
        let first = lock.write(0, 100);
        std::thread::scope(|scope| {
            let start = |name, range: (u64, u64), exclusive| {
                let sender = sender.clone();
                let lock = &lock;
                scope.spawn(move || {
                    let guard =
                        if exclusive { lock.write(range.0, range.1) } else { lock.read(range.0, range.1) };
                    sender.send(name).unwrap();
                    drop(guard);
                });
                // Arrival decides the order, so let each arrive before the next.
                while lock.lock().as_ref().unwrap().queue.len() < 2 + usize::from(name == 'b') {
                    std::thread::yield_now();
                }
            };
            start('a', (50, 100), true);
            start('b', (120, 10), false);
            assert!(order.recv_timeout(Duration::from_millis(50)).is_err());
            drop(first);
            assert_eq!(order.recv().unwrap(), 'a');
            assert_eq!(order.recv().unwrap(), 'b');
        });
        assert!(lock.lock().as_ref().unwrap().queue.is_empty());
    }

    #[test]
    fn copies_in_both_directions_do_not_deadlock() {
        let (a, b) = (RangeLock::default(), RangeLock::default());
        std::thread::scope(|scope| {
            for (source, target) in [(&a, &b), (&b, &a), (&a, &a), (&b, &b)] {
                scope.spawn(move || {
                    for i in 0..5_000 {
                        let _held = lock_copy((source, i % 7), (target, i % 5), 10);
                    }
                });
            }
        });
    }

    /// Threads lock random ranges over a few cells and check that they are alone in them.
    #[test]
    fn writers_are_exclusive_and_no_wakeup_is_lost() {
        const CELLS: usize = 8;
        let lock = RangeLock::default();
        let readers: [AtomicU32; CELLS] = Default::default();
        let writers: [AtomicU32; CELLS] = Default::default();
        let turns = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (lock, readers, writers, turns) = (&lock, &readers, &writers, &turns);
                scope.spawn(move || {
                    let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                    for _ in 0..5_000 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let start = usize::try_from(random % CELLS as u64).unwrap();
                        let len = 1 + usize::try_from((random >> 8) % 3).unwrap();
                        let cells = start..(start + len).min(CELLS);
                        let exclusive = random & (1 << 20) != 0;
                        let bytes = (start as u64 * 100, cells.len() as u64 * 100);
                        let (guard, mine) = if exclusive {
                            (lock.write(bytes.0, bytes.1), writers)
                        } else {
                            (lock.read(bytes.0, bytes.1), readers)
                        };
                        for cell in cells.clone() {
                            mine[cell].fetch_add(1, Ordering::SeqCst);
                        }
                        std::thread::yield_now();
                        for cell in cells {
                            let (r, w) =
                                (readers[cell].load(Ordering::SeqCst), writers[cell].load(Ordering::SeqCst));
                            assert!(
                                if exclusive { r == 0 && w == 1 } else { w == 0 },
                                "{r} readers, {w} writers"
                            );
                            mine[cell].fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(guard);
                        turns.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(turns.into_inner(), 8 * 5_000);
        assert!(lock.lock().as_ref().unwrap().queue.is_empty());
    }

    proptest! {
        #[test]
        fn ranges_conflict_if_they_share_a_byte(
            a in 0u64..40, a_len in 0u64..20, b in 0u64..40, b_len in 0u64..20, a_ex: bool, b_ex: bool,
        ) {
            let share = (a..a + a_len).any(|byte| (b..b + b_len).contains(&byte));
            let x = Range { start: a, end: a + a_len, exclusive: a_ex };
            let y = Range { start: b, end: b + b_len, exclusive: b_ex };
            if a_len > 0 && b_len > 0 {
                prop_assert_eq!(x.conflicts(y), share && (a_ex || b_ex));
            }
            prop_assert_eq!(x.conflicts(y), y.conflicts(x));
        }
    }
}
