//! Looking at the ring for a moment longer before sleeping, where that has been paying.
//!
//! A guest that has heard of a reply often sends the next request within microseconds. Going to sleep, being
//! kicked and waking up takes longer than that, on both sides. So a worker that finds the ring empty goes on
//! looking for a while, as long as most such looks find something; otherwise the next looks are left out, and an
//! idle queue is never looked at.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::cpus;

/// Credit that a look may run up.
const MOST: i32 = 16;
/// What a look costs that finds nothing; one that finds something earns 1.
const COST: i32 = 2;
/// Credit when it is used up: as many short sleeps later the next look is tried.
const LEAST: i32 = -256;
/// Sleeps count as short, times the longest look.
const SHORT: u32 = 3;
/// Pauses of the CPU between two looks.
const PAUSES: usize = 20;

/// Workers of all queues that look at this moment: one for every second CPU at most.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// Whether the workers of one queue look a little longer.
#[derive(Debug)]
pub(super) struct Polling {
    /// How long one look lasts at most; zero for not at all.
    time: Duration,
    most_looking: usize,
    looking: AtomicBool,
    credit: AtomicI32,
}

impl Polling {
    /// Looks that last `time` at most.
    pub fn new(time: Duration) -> Polling {
        Polling {
            time,
            most_looking: if time.is_zero() { 0 } else { cpus() / 2 },
            looking: AtomicBool::new(false),
            credit: AtomicI32::new(MOST),
        }
    }

    /// Calls `find` until it finds something or the time is over, if looks have been paying and no other worker of
    /// the queue is at it.
    pub fn look<T>(&self, find: impl FnMut() -> Option<T>) -> Option<T> {
        if self.time.is_zero() || self.credit.load(Ordering::Relaxed) <= 0 {
            return None;
        }
        if self.looking.swap(true, Ordering::Relaxed) {
            return None;
        }
        let mut found = None;
        if LOOKING.fetch_add(1, Ordering::Relaxed) < self.most_looking {
            found = self.look_now(find);
            self.learn(found.is_some());
        }
        LOOKING.fetch_sub(1, Ordering::Relaxed);
        self.looking.store(false, Ordering::Relaxed);
        found
    }

    fn look_now<T>(&self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        let begin = Instant::now();
        loop {
            for _ in 0..PAUSES {
                spin_loop();
            }
            let found = find();
            if found.is_some() || begin.elapsed() >= self.time {
                return found;
            }
        }
    }

    /// Lost updates do no harm.
    fn learn(&self, found: bool) {
        let credit = self.credit.load(Ordering::Relaxed);
        let learnt = if found { (credit + 1).min(MOST) } else { credit - COST };
        self.credit.store(if learnt <= 0 { LEAST } else { learnt }, Ordering::Relaxed);
    }

    /// A worker goes to sleep; when, if that is of interest.
    pub fn goes_to_sleep(&self) -> Option<Instant> {
        let of_interest = !self.time.is_zero() && self.credit.load(Ordering::Relaxed) <= 0;
        of_interest.then(Instant::now)
    }

    /// A worker that went to sleep then has been woken. Many short sleeps are a reason to look again.
    pub fn wakes_up(&self, asleep_since: Option<Instant>) {
        if let Some(asleep_since) = asleep_since {
            self.slept(asleep_since.elapsed());
        }
    }

    fn slept(&self, time: Duration) {
        let credit = self.credit.load(Ordering::Relaxed);
        if credit <= 0 && time < self.time * SHORT {
            self.credit.store(if credit == 0 { MOST } else { credit + 1 }, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a worker looks at all, if it would find something or not.
    fn look(polling: &Polling, finds: bool) -> bool {
        let mut looked = false;
        polling.look(|| {
            looked = true;
            finds.then_some(())
        });
        looked
    }

    fn polling() -> Polling {
        Polling { most_looking: usize::MAX, ..Polling::new(Duration::from_nanos(1)) }
    }

    #[test]
    fn no_time_means_no_look() {
        assert!(!look(&Polling::new(Duration::ZERO), true));
    }

    #[test]
    fn looks_that_find_nothing_end_soon() {
        let polling = polling();
        let looks = (0..1000).filter(|_| look(&polling, false)).count();
        assert_eq!(looks, (MOST / COST) as usize);
    }

    #[test]
    fn looks_that_mostly_find_something_go_on() {
        let polling = polling();
        assert!((0..1000).all(|number| look(&polling, number % 4 != 0)));
    }

    #[test]
    fn they_are_tried_again_after_many_short_sleeps_only() {
        let polling = Polling { time: Duration::from_micros(1), ..polling() };
        while look(&polling, false) {}
        for _ in 0..1000 {
            polling.slept(Duration::from_millis(1));
        }
        assert!(!look(&polling, true));
        for _ in 0..=LEAST.unsigned_abs() {
            polling.slept(Duration::from_micros(1));
        }
        assert!(look(&polling, true));
    }

    #[test]
    fn only_one_worker_of_a_queue_looks() {
        let polling = polling();
        let inner = polling.look(|| Some(look(&polling, true)));
        assert_eq!(inner, Some(false));
        assert!(look(&polling, true));
    }
}
