//! The slowest requests of the last minutes.
//!
//! A request is compared with the fastest of those that are kept, which takes one load. Those that are slower replace it, or
//! one that is too old.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Metrics;
use crate::sys::clock::monotonic;
use crate::sys::shared_map::Record;

/// How many are kept.
pub const KEPT: usize = 32;
/// How long.
const LIFETIME: u64 = 300_000_000_000;

/// A request that has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Its opcode.
    pub opcode: u32,
    /// The queue it came by.
    pub queue: u32,
    /// The guest's number for it.
    pub unique: u64,
    /// Bytes of data.
    pub bytes: u32,
    /// How long it took, in nanoseconds.
    pub nanos: u64,
    /// How long it waited for other requests, in nanoseconds.
    pub waited: u64,
    /// When it ended, in nanoseconds of CLOCK_MONOTONIC.
    pub at: u64,
}

/// One that is kept.
#[repr(C)]
#[derive(Debug, Default)]
pub struct SlowRecord {
    nanos: AtomicU64,
    waited: AtomicU64,
    at: AtomicU64,
    unique: AtomicU64,
    opcode: AtomicU32,
    queue: AtomicU32,
    bytes: AtomicU32,
    unused: AtomicU32,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for SlowRecord {}

impl SlowRecord {
    /// Requests that are older, or slots that were never used, count nothing.
    fn weight(&self, now: u64) -> u64 {
        let is_old = now.saturating_sub(self.at.load(Ordering::Relaxed)) > LIFETIME;
        if is_old { 0 } else { self.nanos.load(Ordering::Relaxed) }
    }

    fn store(&self, ended: &Ended) {
        self.nanos.store(ended.nanos, Ordering::Relaxed);
        self.waited.store(ended.waited, Ordering::Relaxed);
        self.at.store(ended.at, Ordering::Relaxed);
        self.unique.store(ended.unique, Ordering::Relaxed);
        self.opcode.store(ended.opcode, Ordering::Relaxed);
        self.queue.store(ended.queue, Ordering::Relaxed);
        self.bytes.store(ended.bytes, Ordering::Relaxed);
    }

    fn load(&self) -> Ended {
        Ended {
            opcode: self.opcode.load(Ordering::Relaxed),
            queue: self.queue.load(Ordering::Relaxed),
            unique: self.unique.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            nanos: self.nanos.load(Ordering::Relaxed),
            waited: self.waited.load(Ordering::Relaxed),
            at: self.at.load(Ordering::Relaxed),
        }
    }
}

/// Keeps a request, if it is among the slowest. Of two that end at once, one may be left out.
pub(super) fn insert(metrics: &Metrics, ended: &Ended) {
    let Some(_lock) = metrics.lock_slow() else { return };
    let records = metrics.slow_records();
    let weight = |record: &&SlowRecord| record.weight(ended.at);
    if let Some(least) = records.iter().min_by_key(weight)
        && least.weight(ended.at) < ended.nanos
    {
        least.store(ended);
    }
    metrics.set_slow_floor(records.iter().map(|record| record.weight(ended.at)).min().unwrap_or(0));
}

/// Those that are not too old, the slowest first.
pub(super) fn list(metrics: &Metrics) -> Vec<Ended> {
    let now = monotonic();
    let recent = metrics.slow_records().iter().filter(|record| record.weight(now) > 0);
    let mut all: Vec<Ended> = recent.map(SlowRecord::load).collect();
    all.sort_unstable_by_key(|ended| std::cmp::Reverse(ended.nanos));
    all
}

/// What is too old makes room.
pub(super) fn age(metrics: &Metrics) {
    let now = monotonic();
    let least = metrics.slow_records().iter().map(|record| record.weight(now)).min();
    metrics.set_slow_floor(least.unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_are_kept_and_old_ones_go() {
        let metrics = Metrics::create().unwrap();
        let now = monotonic();
        for nanos in (1..=200).rev().chain(1..=200) {
            insert(&metrics, &Ended { nanos, at: now, unique: nanos, ..Ended::default() });
        }
        let kept: Vec<u64> = list(&metrics).iter().map(|ended| ended.nanos).collect();
        assert_eq!(kept.len(), KEPT);
        assert_eq!((kept[0], kept[1]), (200, 200));
        assert!(metrics.is_slow(200) && !metrics.is_slow(150));
        for record in metrics.slow_records() {
            record.at.store(now.saturating_sub(LIFETIME + 1_000_000_000), Ordering::Relaxed);
        }
        age(&metrics);
        assert!(list(&metrics).is_empty());
        assert!(metrics.is_slow(1));
    }
}
