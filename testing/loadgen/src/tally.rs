//! What a thread counts, and the phases of a measurement.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

/// A part of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing counts yet.
    Warmup,
    /// Everything counts.
    Measure,
    /// Only the shared counter goes on: somebody counts system calls.
    After,
    /// No new operation begins.
    Stop,
}

/// The state that all threads of a measurement share: its phase and the operations so far.
#[derive(Debug, Default)]
pub struct Coordinator {
    phase: AtomicU8,
    /// Operations finished in all phases.
    operations: AtomicU64,
}

impl Coordinator {
    /// The current phase.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Warmup,
            1 => Phase::Measure,
            2 => Phase::After,
            _ => Phase::Stop,
        }
    }

    /// Begins a phase.
    pub fn begin(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Notes finished operations.
    pub fn finished(&self, operations: u64) {
        self.operations.fetch_add(operations, Ordering::Relaxed);
    }

    /// Operations finished so far, in all phases.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }
}

/// What one thread counted while it was measured.
#[derive(Debug)]
pub struct Tally {
    /// Nanoseconds from the first request of an operation to the last reply.
    pub latency: Histogram<u64>,
    /// Requests answered.
    pub requests: u64,
    /// Notifications from the back end.
    pub notifications: u64,
    /// Kicks sent to it.
    pub kicks: u64,
}

impl Default for Tally {
    fn default() -> Tally {
        // From 1 ns to 100 s with three digits: constant bounds, which are right.
        let latency = Histogram::new_with_bounds(1, 100_000_000_000, 3).unwrap_or_else(|_| unreachable!());
        Tally { latency, requests: 0, notifications: 0, kicks: 0 }
    }
}

impl Tally {
    /// Forgets what was counted, without giving memory back.
    pub fn reset(&mut self) {
        self.latency.reset();
        (self.requests, self.notifications, self.kicks) = (0, 0, 0);
    }

    /// Counts a finished operation.
    pub fn finished(&mut self, took: Duration) {
        self.latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds what another thread counted.
    pub fn add(&mut self, other: &Tally) {
        // Both histograms have the same bounds, so nothing can be out of range.
        let _ = self.latency.add(&other.latency);
        self.requests += other.requests;
        self.notifications += other.notifications;
        self.kicks += other.kicks;
    }
}
