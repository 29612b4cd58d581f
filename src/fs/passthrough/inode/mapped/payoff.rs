//! Whether mapped writes of one file pay, by what its own writes cost.
//!
//! A copy into a page that is mapped and dirty costs less than pwritev2(2), which waits for the file's lock. But the first one into
//! each page, and again after each time that the page was written back, is a page fault in which the file system is told: many
//! times the cost of the copy. How often that happens depends on the program, the file system and the host's load, so it is
//! measured and not assumed.
//!
//! A write costs the CPU time that it takes. A mapped one also costs the time that its page faults sleep, for the journal or
//! for a page that is being written back. That of pwritev2(2), which sleeps for the file's lock, does not count: whether
//! others wait for it depends on how many there are, and mapping is to pay without that. (Wall time was rejected: with
//! more threads than CPUs it is mostly that of others, and at 1 MiB a file went back and forth for no reason.)
//!
//! For each length (a power of two) the cost of pwritev2(2) is known from [`SAMPLES`] writes of pages that were written before.
//! Of the mapped writes one in [`SAMPLED`] is measured, of long ones one in [`SAMPLED_LONG`], and what it has saved is added to a
//! balance, with the losses. At [`LOSS`] the file goes back to pwritev2(2) for a second, the next time for two, up to a
//! minute: so what can be lost is bounded to a twentieth of the time at first and to a thousandth in the end. Now and then
//! pwritev2(2) is measured again.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

use crate::sys::clock::{Effort, Spent};

/// Writes by pwritev2(2) of each length whose costs are averaged.
pub const SAMPLES: u32 = 16;
/// Of so many mapped writes one is measured: that takes some two microseconds, and a copy of 4 KiB less than one.
const SAMPLED: u32 = 64;
/// The same for those of [`LONG`] bytes and more.
const SAMPLED_LONG: u32 = 8;
const LONG: usize = 128 << 10;
/// Mapped writes of one length after which pwritev2(2) is measured again.
const MEASURE_AGAIN: u32 = 1 << 17;
/// Nanoseconds lost after which it does not pay, and most that are saved up against that.
const LOSS: i64 = 50_000_000;
/// What one measurement counts for at most: a single one says little.
const AT_ONCE: i64 = LOSS / 8;
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
    /// Mapped writes since, by those that were measured.
    mapped: AtomicU32,
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

    /// Begins to measure pwritev2(2) of pages that were written before, if that is not known yet.
    pub fn measure_plain(&self, len: usize, now: u64) -> Option<Effort> {
        let is_known = |class: &Class| class.samples.load(Ordering::Relaxed) >= SAMPLES;
        (!self.is_paused(now) && !self.class(len).is_some_and(is_known)).then(Effort::begin)
    }

    /// pwritev2(2) of pages that were written before has cost this.
    pub fn plain(&self, len: usize, spent: Spent) {
        let Some(class) = self.class(len) else { return };
        let samples = class.samples.load(Ordering::Relaxed);
        if samples >= SAMPLES {
            return;
        }
        let before = class.plain.load(Ordering::Relaxed);
        let cost = if before == 0 { spent.cpu } else { spent.cpu.min(before.saturating_mul(4)) };
        // The average of all so far.
        let weight = u64::from(samples.saturating_add(1));
        let average = before.saturating_mul(weight - 1).saturating_add(cost) / weight;
        class.plain.store(average.max(1), Ordering::Relaxed);
        // Of threads that come at once one counts: there will be others.
        class.samples.store(samples + 1, Ordering::Relaxed);
    }

    /// Begins to measure the next mapped write of this thread, if it is its turn.
    pub fn measure_mapped(len: usize) -> Option<Effort> {
        // At random (xorshift): a program that writes two files in turns would let one of them never be measured.
        thread_local!(static TURN: std::cell::Cell<u32> = const { std::cell::Cell::new(1) });
        let mut turn = TURN.get();
        turn ^= turn << 13;
        turn ^= turn >> 17;
        turn ^= turn << 5;
        TURN.set(turn);
        // Both are powers of two.
        (turn & (stands_for(len) - 1) == 0).then(Effort::begin)
    }

    /// A mapped write that was measured has cost this; it has begun at `started`.
    pub fn mapped(&self, len: usize, spent: Spent, started: u64) {
        let Some(class) = self.class(len) else { return };
        let signed = |nanos| i64::try_from(nanos).unwrap_or(i64::MAX);
        let plain = signed(class.plain.load(Ordering::Relaxed));
        let times = stands_for(len);
        let cost = signed(spent.cpu).saturating_add(signed(spent.asleep));
        let saved = plain.saturating_sub(cost).saturating_mul(times.into()).clamp(-AT_ONCE, AT_ONCE);
        self.save(saved, started.saturating_add(spent.cpu).saturating_add(spent.asleep));
        if class.mapped.fetch_add(times, Ordering::Relaxed) >= MEASURE_AGAIN {
            class.measure_again();
        }
    }

    /// A mapped write that has begun at `started` was not possible after so many nanoseconds.
    pub fn failed(&self, nanos: u64, started: u64) {
        self.save(-i64::try_from(nanos).unwrap_or(AT_ONCE).min(AT_ONCE), started.saturating_add(nanos));
    }

    fn save(&self, saved: i64, now: u64) {
        let add = |balance: i64| Some(balance.saturating_add(saved).min(LOSS));
        let before = self.balance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).unwrap_or(0);
        let balance = before.saturating_add(saved);
        if balance < -LOSS {
            self.pause(now);
        } else if balance >= LOSS && self.pause.load(Ordering::Relaxed) != 0 {
            self.pause.store(0, Ordering::Relaxed);
        }
    }

    /// It does not pay for a while, longer each time.
    pub fn pause(&self, now: u64) {
        // Another thread was faster.
        if self.is_paused(now) {
            return;
        }
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

/// For how many mapped writes one that is measured stands.
fn stands_for(len: usize) -> u32 {
    if len < LONG { SAMPLED } else { SAMPLED_LONG }
}

impl Class {
    fn measure_again(&self) {
        self.mapped.store(0, Ordering::Relaxed);
        self.plain.store(0, Ordering::Relaxed);
        self.samples.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn cpu(cpu: u64) -> Spent {
        Spent { cpu, asleep: 0 }
    }

    /// An account that knows that pwritev2(2) of 4 KiB takes a microsecond.
    fn measured() -> Payoff {
        let payoff = Payoff::default();
        measure(&payoff);
        payoff
    }

    fn measure(payoff: &Payoff) {
        for _ in 0..SAMPLES {
            payoff.plain(4096, cpu(1000));
        }
    }

    #[test]
    fn nothing_is_mapped_before_it_can_be_compared() {
        let payoff = Payoff::default();
        for _ in 0..SAMPLES {
            assert!(!payoff.is_worth_it(4096, 0) && payoff.measure_plain(4096, 0).is_some());
            payoff.plain(4096, cpu(1000));
        }
        assert!(payoff.measure_plain(4096, 0).is_none(), "it is known");
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
                payoff.mapped(4096, cpu(11_000), now);
                lost += 10_000 * i64::from(SAMPLED);
            }
            assert!((LOSS..2 * LOSS).contains(&lost), "{lost}");
            assert!(payoff.measure_plain(4096, now).is_none(), "not while it is paused");
            let end = payoff.paused_until.load(Ordering::Relaxed);
            assert!(!payoff.is_worth_it(4096, end - 1));
            // It begins when the write that was too much has ended.
            pauses.push((end - now - 11_000) / SECOND);
            assert!((end - now - 11_000).is_multiple_of(SECOND));
            now = end;
            assert!(!payoff.is_worth_it(4096, now), "it is measured again first");
            measure(&payoff);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64]);
        // Gains pay for losses, and shorten the next pause.
        for _ in 0..2_000 {
            payoff.mapped(4096, cpu(100), now);
        }
        assert_eq!(payoff.pause.load(Ordering::Relaxed), 0);
        for _ in 0..17 {
            assert!(payoff.is_worth_it(4096, now), "few that cost much");
            payoff.mapped(4096, Spent { cpu: 1, asleep: u64::MAX }, now);
        }
        assert!(!payoff.is_worth_it(4096, now), "all cost much");
    }

    #[test]
    fn what_mapped_writes_sleep_counts_and_what_others_sleep_does_not() {
        let payoff = Payoff::default();
        for _ in 0..SAMPLES {
            payoff.plain(1 << 20, Spent { cpu: 200_000, asleep: SECOND });
        }
        for _ in 0..1000 {
            payoff.mapped(1 << 20, Spent { cpu: 150_000, asleep: 0 }, 0);
        }
        assert!(payoff.is_worth_it(1 << 20, 0), "less CPU time");
        for _ in 0..1000 {
            payoff.mapped(1 << 20, Spent { cpu: 150_000, asleep: 100_000 }, 0);
        }
        assert!(!payoff.is_worth_it(1 << 20, 0), "they sleep longer than that saves");
        let payoff = measured();
        for _ in 0..7 {
            payoff.failed(u64::MAX, 0);
        }
        assert!(payoff.is_worth_it(4096, 0));
        payoff.failed(u64::MAX, 0);
        payoff.failed(u64::MAX, 0);
        assert!(payoff.is_paused(1), "none is possible");
    }

    #[test]
    fn pwritev2_is_measured_again_now_and_then() {
        let payoff = measured();
        for _ in 0..=MEASURE_AGAIN / SAMPLED {
            assert!(payoff.is_worth_it(4096, 0));
            payoff.mapped(4096, cpu(100), 0);
        }
        assert!(!payoff.is_worth_it(4096, 0));
    }
}
