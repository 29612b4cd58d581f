//! Adaptive busy polling: a worker polls the empty ring for a moment before it sleeps, where that pays.
//!
//! A guest often answers a reply with the next request within microseconds. To sleep, to be kicked and to
//! wake up takes longer than that, on both sides. So a worker that finds the ring empty polls it for a while,
//! as long as most polls find a request. Otherwise the next polls are left out, and an idle queue is never
//! polled. KVM's `halt_poll_ns` does the same for a virtual CPU.
//!
//! A queue has a credit: a hit earns 1, a miss costs [`MISS_COST`], and without credit no worker polls. Short
//! sleeps earn the credit back. One worker of a queue polls at a time, and half as many in all as there are
//! CPUs.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::cpus;

/// Most credit.
const MAX_CREDIT: i32 = 16;
/// Cost of a poll that finds nothing. A hit earns 1.
const MISS_COST: i32 = 2;
/// Credit after it is used up: the next poll comes after as many short sleeps.
const MIN_CREDIT: i32 = -256;
/// A sleep is short up to this multiple of the longest poll.
const SHORT_SLEEP: u32 = 3;
/// Pauses of the CPU between two attempts to pop.
const PAUSES_PER_ATTEMPT: usize = 20;

/// Workers of all queues that poll now; [`BusyPoll::max_polling`] at most.
static POLLING_WORKERS: AtomicUsize = AtomicUsize::new(0);

/// Whether the workers of one queue poll.
#[derive(Debug)]
pub(super) struct BusyPoll {
    /// Longest poll; zero turns polling off.
    time: Duration,
    max_polling: usize,
    polling: AtomicBool,
    credit: AtomicI32,
}

impl BusyPoll {
    /// Polls last `time` at most.
    pub fn new(time: Duration) -> BusyPoll {
        BusyPoll {
            time,
            max_polling: if time.is_zero() { 0 } else { cpus() / 2 },
            polling: AtomicBool::new(false),
            credit: AtomicI32::new(MAX_CREDIT),
        }
    }

    /// Calls `find` until it finds something or the time is over. Does not poll without credit, or while
    /// another worker of the queue polls.
    pub fn poll<T>(&self, find: impl FnMut() -> Option<T>) -> Option<T> {
        if self.time.is_zero() || self.credit.load(Ordering::Relaxed) <= 0 {
            return None;
        }
        if self.polling.swap(true, Ordering::Relaxed) {
            return None;
        }
        let mut found = None;
        if POLLING_WORKERS.fetch_add(1, Ordering::Relaxed) < self.max_polling {
            found = self.poll_now(find);
            self.record(found.is_some());
        }
        POLLING_WORKERS.fetch_sub(1, Ordering::Relaxed);
        self.polling.store(false, Ordering::Relaxed);
        found
    }

    fn poll_now<T>(&self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        let begin = Instant::now();
        loop {
            for _ in 0..PAUSES_PER_ATTEMPT {
                spin_loop();
            }
            let found = find();
            if found.is_some() || begin.elapsed() >= self.time {
                return found;
            }
        }
    }

    /// Accounts for one poll. A lost update does no harm.
    fn record(&self, hit: bool) {
        let credit = self.credit.load(Ordering::Relaxed);
        let next = if hit { (credit + 1).min(MAX_CREDIT) } else { credit - MISS_COST };
        self.credit.store(if next <= 0 { MIN_CREDIT } else { next }, Ordering::Relaxed);
    }

    /// A worker is about to sleep. Returns the time if [`BusyPoll::end_sleep`] has a use for it.
    pub fn begin_sleep(&self) -> Option<Instant> {
        let earns_credit = !self.time.is_zero() && self.credit.load(Ordering::Relaxed) <= 0;
        earns_credit.then(Instant::now)
    }

    /// The worker is awake again.
    pub fn end_sleep(&self, begin: Option<Instant>) {
        if let Some(begin) = begin {
            self.record_sleep(begin.elapsed());
        }
    }

    /// Accounts for one sleep: many short ones are a reason to poll again.
    fn record_sleep(&self, time: Duration) {
        let credit = self.credit.load(Ordering::Relaxed);
        if credit <= 0 && time < self.time * SHORT_SLEEP {
            self.credit.store(if credit == 0 { MAX_CREDIT } else { credit + 1 }, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a worker polls at all, with a hit or a miss.
    fn polls(busy_poll: &BusyPoll, hit: bool) -> bool {
        let mut polled = false;
        busy_poll.poll(|| {
            polled = true;
            hit.then_some(())
        });
        polled
    }

    fn busy_poll() -> BusyPoll {
        BusyPoll { max_polling: usize::MAX, ..BusyPoll::new(Duration::from_nanos(1)) }
    }

    #[test]
    fn zero_turns_polling_off() {
        assert!(!polls(&BusyPoll::new(Duration::ZERO), true));
    }

    #[test]
    fn misses_end_polling_soon() {
        let busy_poll = busy_poll();
        let count = (0..1000).filter(|_| polls(&busy_poll, false)).count();
        assert_eq!(count, (MAX_CREDIT / MISS_COST) as usize);
    }

    #[test]
    fn polling_goes_on_while_most_polls_are_hits() {
        let busy_poll = busy_poll();
        assert!((0..1000).all(|number| polls(&busy_poll, number % 4 != 0)));
    }

    #[test]
    fn only_many_short_sleeps_resume_polling() {
        let busy_poll = BusyPoll { time: Duration::from_micros(1), ..busy_poll() };
        while polls(&busy_poll, false) {}
        for _ in 0..1000 {
            busy_poll.record_sleep(Duration::from_millis(1));
        }
        assert!(!polls(&busy_poll, true));
        for _ in 0..=MIN_CREDIT.unsigned_abs() {
            busy_poll.record_sleep(Duration::from_micros(1));
        }
        assert!(polls(&busy_poll, true));
    }

    #[test]
    fn one_worker_of_a_queue_polls_at_a_time() {
        let busy_poll = busy_poll();
        let inner = busy_poll.poll(|| Some(polls(&busy_poll, true)));
        assert_eq!(inner, Some(false));
        assert!(polls(&busy_poll, true));
    }
}
