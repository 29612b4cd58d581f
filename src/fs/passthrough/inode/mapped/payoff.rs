//! Whether mapped writes of one file pay, by the times that its own writes take.
//!
//! A copy into a page that is mapped and dirty costs less than pwritev2(2), which waits for the file's lock. But the first one into
//! each page, and again after each time that the page was written back, is a page fault in which the file system is told: many
//! times the cost of the copy. How often that happens depends on the program, the file system and the host's load, so it is
//! measured and not assumed.
//!
//! For each length (a power of two) the time of pwritev2(2) is known from [`SAMPLES`] writes of pages that were written before.
//! Of the mapped writes one in [`SAMPLED`] is timed, and what it has saved is added to a balance, with the losses. At
//! [`LOSS`] the file goes back to pwritev2(2) for a second, the next time for two, up to a minute: so what can be lost is
//! bounded to a twentieth of the time at first and to a thousandth in the end. Now and then pwritev2(2) is measured again.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

/// Writes by pwritev2(2) of each length whose times are averaged.
pub const SAMPLES: u32 = 16;
/// Of so many mapped writes one is timed.
const SAMPLED: u32 = 8;
/// Timed mapped writes of one length after which pwritev2(2) is measured again.
const MEASURE_AGAIN: u32 = 1 << 14;
/// Nanoseconds lost after which it does not pay, and most that are saved up against that.
const LOSS: i64 = 50_000_000;
/// What one time counts for at most, as a multiple of the average: a thread may lose its CPU in between.
const OUTLIER: u64 = 32;
/// The first and the longest pause, in nanoseconds.
const FIRST_PAUSE: u64 = 1_000_000_000;
const LONGEST_PAUSE: u64 = 64_000_000_000;
/// Lengths up to 4 KiB, 8 KiB, … and all above 1 MiB.
const CLASSES: usize = 10;
/// The first class, as the logarithm of its length.
const FIRST_CLASS: u32 = 12;

/// The account of one file.
#[derive(Debug, Default)]
pub struct Payoff {
    classes: [Class; CLASSES],
    balance: AtomicI64,
    /// Until then it does not pay, in nanoseconds of CLOCK_MONOTONIC.
    paused_until: AtomicU64,
    pause: AtomicU64,
}

/// Writes of one length.
#[derive(Debug, Default)]
struct Class {
    /// Nanoseconds of pwritev2(2).
    plain: AtomicU64,
    samples: AtomicU32,
    /// Mapped writes that were timed since.
    timed: AtomicU32,
}

fn class(len: usize) -> usize {
    let bits = usize::BITS - len.saturating_sub(1).leading_zeros();
    (bits.saturating_sub(FIRST_CLASS) as usize).min(CLASSES - 1)
}

impl Payoff {
    /// Whether a write of this length is to be mapped.
    pub fn is_worth_it(&self, len: usize, now: u64) -> bool {
        !self.is_paused(now)
            && self.class(len).is_some_and(|class| class.samples.load(Ordering::Relaxed) >= SAMPLES)
    }

    /// Whether it has not paid lately, or was not possible.
    pub fn is_paused(&self, now: u64) -> bool {
        now < self.paused_until.load(Ordering::Relaxed)
    }

    /// pwritev2(2) of pages that were written before took so long.
    pub fn plain(&self, len: usize, nanos: u64) {
        let Some(class) = self.class(len) else { return };
        let samples = class.samples.load(Ordering::Relaxed);
        if samples >= SAMPLES {
            return;
        }
        let before = class.plain.load(Ordering::Relaxed);
        let nanos = if before == 0 { nanos } else { nanos.min(before.saturating_mul(4)) };
        // The average of all so far, at first, and then one that moves.
        let weight = u64::from(samples.saturating_add(1));
        let average = before.saturating_mul(weight - 1).saturating_add(nanos) / weight;
        class.plain.store(average.max(1), Ordering::Relaxed);
        // Of threads that come at once one counts: there will be others.
        class.samples.store(samples + 1, Ordering::Relaxed);
    }

    /// A mapped write took so long, which stands for `times` of them.
    pub fn mapped(&self, len: usize, nanos: u64, times: u32, now: u64) {
        let Some(class) = self.class(len) else { return };
        let plain = class.plain.load(Ordering::Relaxed);
        let nanos = nanos.min(plain.saturating_mul(OUTLIER));
        let signed = |nanos| i64::try_from(nanos).unwrap_or(i64::MAX);
        let saved = signed(plain).saturating_sub(signed(nanos)).saturating_mul(times.into());
        let add = |balance: i64| Some(balance.saturating_add(saved).min(LOSS));
        let before = self.balance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).unwrap_or(0);
        let balance = before.saturating_add(saved);
        if balance < -LOSS {
            self.pause(now);
        } else if balance >= LOSS && self.pause.load(Ordering::Relaxed) != 0 {
            self.pause.store(0, Ordering::Relaxed);
        }
        if class.timed.fetch_add(1, Ordering::Relaxed) >= MEASURE_AGAIN {
            class.measure_again();
        }
    }

    /// Whether the next mapped write of this thread is to be timed, and for how many it stands then.
    pub fn sampled() -> Option<u32> {
        thread_local!(static TURN: std::cell::Cell<u32> = const { std::cell::Cell::new(0) });
        let turn = TURN.get().wrapping_add(1);
        TURN.set(turn);
        turn.is_multiple_of(SAMPLED).then_some(SAMPLED)
    }

    /// It does not pay for a while, longer each time.
    pub fn pause(&self, now: u64) {
        let pause = self.pause.load(Ordering::Relaxed).saturating_mul(2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.pause.store(pause, Ordering::Relaxed);
        self.paused_until.store(now.saturating_add(pause), Ordering::Relaxed);
        self.balance.store(0, Ordering::Relaxed);
        self.classes.iter().for_each(Class::measure_again);
    }

    fn class(&self, len: usize) -> Option<&Class> {
        self.classes.get(class(len))
    }
}

impl Class {
    fn measure_again(&self) {
        self.timed.store(0, Ordering::Relaxed);
        self.plain.store(0, Ordering::Relaxed);
        self.samples.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// An account that knows that pwritev2(2) of 4 KiB takes a microsecond.
    fn measured() -> Payoff {
        let payoff = Payoff::default();
        measure(&payoff);
        payoff
    }

    fn measure(payoff: &Payoff) {
        for _ in 0..SAMPLES {
            payoff.plain(4096, 1000);
        }
    }

    #[test]
    fn nothing_is_mapped_before_it_can_be_compared() {
        let payoff = Payoff::default();
        for _ in 0..SAMPLES {
            assert!(!payoff.is_worth_it(4096, 0));
            payoff.plain(4096, 1000);
        }
        assert!(payoff.is_worth_it(4096, 0) && payoff.is_worth_it(1, 0));
        assert!(!payoff.is_worth_it(4097, 0) && !payoff.is_worth_it(usize::MAX, 0), "other lengths");
    }

    #[test]
    fn losses_are_bounded_and_pauses_grow() {
        let payoff = measured();
        let (mut now, mut pauses) = (SECOND, Vec::new());
        for _ in 0..8 {
            let mut lost = 0;
            while payoff.is_worth_it(4096, now) {
                payoff.mapped(4096, 11_000, 8, now);
                lost += 10_000 * 8;
            }
            assert!((LOSS..2 * LOSS).contains(&lost), "{lost}");
            let end = (1..=100)
                .find(|seconds| now + seconds * SECOND >= payoff.paused_until.load(Ordering::Relaxed));
            pauses.push(end.unwrap());
            now += end.unwrap() * SECOND;
            assert!(!payoff.is_worth_it(4096, now), "it is measured again first");
            measure(&payoff);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64]);
        // Gains pay for losses, and shorten the next pause.
        for _ in 0..10_000 {
            payoff.mapped(4096, 100, 8, now);
        }
        assert_eq!(payoff.pause.load(Ordering::Relaxed), 0);
        payoff.mapped(4096, u64::MAX, 8, now);
        assert!(payoff.is_worth_it(4096, now), "one that took long is an outlier");
    }

    #[test]
    fn pwritev2_is_measured_again_now_and_then() {
        let payoff = measured();
        for _ in 0..=MEASURE_AGAIN {
            assert!(payoff.is_worth_it(4096, 0));
            payoff.mapped(4096, 100, 8, 0);
        }
        assert!(!payoff.is_worth_it(4096, 0));
    }
}
