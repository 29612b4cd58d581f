//! The counters of one queue.
//!
//! They are changed under the lock of the queue, by one thread at a time, so a change is a load and a store. A process that
//! dies in between loses one request of the count, and nothing else.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fuse_protocol::opcode::Opcode;

use super::slow::Ended;
use super::{ERRNOS, Metrics, OPS, slow};
use crate::sys::clock::monotonic;
use crate::sys::shared_map::{Record, Table};

/// Buckets of a histogram: all but the last have an upper bound.
pub const BUCKETS: usize = 25;
/// Buckets for the number of writers of one file: 1, 2, up to 4, 8, … 64, and more.
pub const WRITER_BUCKETS: usize = 8;
/// The upper bound of the first bucket is this power of two, in nanoseconds, and each bound twice the one before.
const FIRST_BOUND: u32 = 10;

/// The upper bounds of the buckets but the last one, in nanoseconds; a bound is in the bucket above.
pub fn bounds() -> impl Iterator<Item = u64> {
    (0..BUCKETS - 1).map(|bucket| 1 << (FIRST_BOUND as usize + bucket))
}

/// The bucket of a time in nanoseconds.
#[inline]
fn bucket(nanos: u64) -> usize {
    let bits = u64::BITS - (nanos >> FIRST_BOUND).leading_zeros();
    (bits as usize).min(BUCKETS - 1)
}

/// The counters of one operation.
#[repr(C)]
pub struct OpCounts {
    pub(super) nanos: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) buckets: [AtomicU64; BUCKETS],
}

/// The counters of one queue.
#[repr(C)]
pub struct QueueCounts {
    pub(super) requests: AtomicU64,
    pub(super) completed: AtomicU64,
    pub(super) notifications: AtomicU64,
    pub(super) wakeups: AtomicU64,
    pub(super) polled: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) wait_nanos: AtomicU64,
    pub(super) size: AtomicU32,
    pub(super) workers: AtomicU32,
    pub(super) writers: [AtomicU64; WRITER_BUCKETS],
    pub(super) ops: [OpCounts; OPS],
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for QueueCounts {}

/// Adds without an atomic read-modify-write: one thread at a time does it.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

/// A request that has its reply.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Its opcode; 0 if the chain was no request.
    pub opcode: u32,
    /// The guest's number for it.
    pub unique: u64,
    /// The errno of the reply; 0 for none.
    pub errno: u16,
    /// Bytes of data that were read or written.
    pub bytes: u32,
    /// Nanoseconds from its pop to its reply.
    pub nanos: u64,
    /// What was noted of it.
    pub notes: super::notes::Notes,
}

/// One queue's part of the counters.
#[derive(Clone)]
pub struct QueueMetrics {
    queue: usize,
    counts: Table<QueueCounts, Metrics>,
    progress: Table<AtomicU64, Metrics>,
}

impl QueueMetrics {
    pub(super) fn new(
        counts: Table<QueueCounts, Metrics>,
        progress: Table<AtomicU64, Metrics>,
        queue: usize,
    ) -> QueueMetrics {
        QueueMetrics { queue, counts, progress }
    }

    fn metrics(&self) -> &Metrics {
        self.counts.owner()
    }

    /// The queue starts, with a ring of this size.
    pub fn start(&self, size: u16) {
        let counts = self.counts();
        counts.size.store(size.into(), Ordering::Relaxed);
        counts.workers.store(0, Ordering::Relaxed);
        // Those of a process that has died are served again, and counted again.
        counts.completed.store(counts.requests.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// The queue stops.
    pub fn stop(&self) {
        self.counts().size.store(0, Ordering::Relaxed);
    }

    /// Counts a worker of the queue, until that is dropped.
    pub fn count_worker(&self) -> CountedWorker<'_> {
        self.counts().workers.fetch_add(1, Ordering::Relaxed);
        CountedWorker(&self.counts().workers)
    }

    /// A chain was popped.
    #[inline]
    pub fn popped(&self) {
        add(&self.counts().requests, 1);
    }

    /// A chain was found by polling.
    #[inline]
    pub fn polled(&self) {
        add(&self.counts().polled, 1);
    }

    /// The guest was notified.
    #[inline]
    pub fn notified(&self) {
        add(&self.counts().notifications, 1);
    }

    /// A worker was woken. Others may be at the same time.
    #[inline]
    pub fn woken(&self) {
        self.counts().wakeups.fetch_add(1, Ordering::Relaxed);
    }

    /// The request that starts with descriptor `head` is served from `start` on.
    #[inline]
    pub fn begin(&self, head: u16, start: u64) {
        self.progress.get(head.into()).store(start << 2, Ordering::Relaxed);
    }

    /// What the request that starts with descriptor `head` does.
    #[inline]
    pub fn set_phase(&self, head: u16, phase: super::Phase) {
        let progress = self.progress.get(head.into());
        let start = progress.load(Ordering::Relaxed) & !3;
        progress.store(start | phase as u64, Ordering::Relaxed);
    }

    /// A request has its reply.
    #[inline]
    pub fn completed(&self, served: &Served) {
        let counts = self.counts();
        add(&counts.completed, 1);
        let op = served.opcode as usize % OPS;
        let Some(of_op) = counts.ops.get(op) else { return };
        add(&of_op.nanos, served.nanos);
        if let Some(bucket) = of_op.buckets.get(bucket(served.nanos)) {
            add(bucket, 1);
        }
        if served.bytes > 0 {
            let is_read = served.opcode == Opcode::Read as u32;
            add(if is_read { &counts.bytes_read } else { &counts.bytes_written }, served.bytes.into());
        }
        if served.errno != 0 {
            add(&of_op.errors, 1);
            self.metrics().count_error(op, usize::from(served.errno) % ERRNOS);
        }
        if served.notes != super::notes::Notes::default() {
            self.count_notes(served);
        }
        if self.metrics().is_slow(served.nanos) {
            self.note_slow(served);
        }
    }

    fn count_notes(&self, served: &Served) {
        let (counts, notes) = (self.counts(), served.notes);
        if notes.waited > 0 {
            add(&counts.waits, 1);
            add(&counts.wait_nanos, notes.waited);
        }
        if notes.writers > 0 {
            let bucket = (u32::BITS - (notes.writers - 1).leading_zeros()) as usize;
            if let Some(bucket) = counts.writers.get(bucket.min(WRITER_BUCKETS - 1)) {
                add(bucket, 1);
            }
            self.metrics().saw_writers(notes.writers);
        }
    }

    #[cold]
    fn note_slow(&self, served: &Served) {
        let Served { opcode, unique, bytes, nanos, notes, .. } = *served;
        let queue = u32::try_from(self.queue).unwrap_or(0);
        let ended = Ended { opcode, queue, unique, bytes, nanos, waited: notes.waited, at: monotonic() };
        slow::insert(self.metrics(), &ended);
    }

    #[inline]
    fn counts(&self) -> &QueueCounts {
        self.counts.get(self.queue)
    }
}

/// A worker that is counted.
#[derive(Debug)]
#[must_use = "it is not counted any more when this is dropped"]
pub struct CountedWorker<'a>(&'a AtomicU32);

impl Drop for CountedWorker<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for QueueMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "counters of queue {}", self.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_below_its_bound() {
        let bounds: Vec<u64> = bounds().collect();
        assert_eq!((bounds.len(), bounds[0]), (BUCKETS - 1, 1024));
        for nanos in [0, 1, 1023, 1024, 1025, 2047, 2048, 1 << 20, (1 << 33) - 1, 1 << 33, u64::MAX] {
            let expected = bounds.iter().take_while(|bound| nanos >= **bound).count();
            assert_eq!(bucket(nanos), expected, "{nanos}");
        }
    }

    #[test]
    fn requests_are_counted_by_operation_and_errno() {
        let metrics = Metrics::create().unwrap();
        let queue = metrics.for_queue(1);
        queue.start(128);
        let read = Served { opcode: 15, unique: 7, bytes: 4096, nanos: 5000, ..Served::default() };
        for served in [read, read, Served { errno: 2, bytes: 0, opcode: 1, ..read }] {
            queue.popped();
            queue.completed(&served);
        }
        queue.popped();
        let sample = metrics.sample();
        assert_eq!(sample.bytes_read, 8192);
        assert_eq!(sample.queues[1].in_flight, 1);
        let ops: Vec<_> = sample.ops.iter().map(|op| (op.name, op.count, op.nanos, op.errors)).collect();
        assert_eq!(ops, [("lookup", 1, 5000, 1), ("read", 2, 10_000, 0)]);
        assert_eq!(metrics.errors(), [("lookup", 2, 1)]);
    }

    #[test]
    fn writers_of_one_file_are_seen() {
        let metrics = Metrics::create().unwrap();
        let queue = metrics.for_queue(1);
        queue.start(128);
        for writers in [1, 2, 3, 16, 200] {
            let notes = super::super::notes::Notes { waited: 0, writers };
            queue.completed(&Served { opcode: 16, notes, ..Served::default() });
        }
        assert_eq!(metrics.sample().writers, [1, 1, 1, 0, 1, 0, 0, 1]);
        assert_eq!(metrics.most_writers(), 200);
    }
}
