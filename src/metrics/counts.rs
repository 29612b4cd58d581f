//! Counters of requests and of queues.
//!
//! Each request in flight counts at a [`Shard`] of its own, which it has from the request before it: its cache lines are
//! those of the CPU that serves it, and a change is a load and a store. A process that dies in between loses one request of
//! the count, and nothing else. Who reads adds up all shards.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fuse_protocol::opcode::Opcode;

use super::notes::Mapped;
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

/// Counters of requests, of which one request at a time has its own.
#[repr(C)]
#[repr(align(128))]
pub struct ShardCounts {
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) wait_nanos: AtomicU64,
    pub(super) writers: [AtomicU64; WRITER_BUCKETS],
    /// Writes that were copied into a window, and those of the same files that were not.
    pub(super) mapped: [AtomicU64; 2],
    pub(super) ops: [OpCounts; OPS],
}

/// What is known of one queue.
#[repr(C)]
#[repr(align(128))]
pub struct QueueCounts {
    pub(super) requests: AtomicU64,
    pub(super) notifications: AtomicU64,
    pub(super) polled: AtomicU64,
    pub(super) size: AtomicU32,
    pub(super) workers: AtomicU32,
    pub(super) wakeups: AtomicU64,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for ShardCounts {}
// SAFETY: the same.
unsafe impl Record for QueueCounts {}

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
    /// When it was popped, in nanoseconds of CLOCK_MONOTONIC.
    pub popped: u64,
    /// Nanoseconds from then to its reply.
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
    /// Requests, notifications and polls before the queue started.
    before: [u64; 3],
}

impl QueueMetrics {
    pub(super) fn new(
        counts: Table<QueueCounts, Metrics>,
        progress: Table<AtomicU64, Metrics>,
        queue: usize,
    ) -> QueueMetrics {
        QueueMetrics { queue, counts, progress, before: [0; 3] }
    }

    /// The queue starts, with a ring of this size.
    pub fn start(&mut self, size: u16) {
        let counts = self.counts.get(self.queue);
        counts.size.store(size.into(), Ordering::Relaxed);
        counts.workers.store(0, Ordering::Relaxed);
        self.before = [&counts.requests, &counts.notifications, &counts.polled]
            .map(|count| count.load(Ordering::Relaxed));
    }

    /// The queue stops.
    pub fn stop(&self) {
        self.counts().size.store(0, Ordering::Relaxed);
    }

    /// Requests, notifications and polls since the start. One thread at a time says so, now and then.
    #[inline]
    pub fn publish(&self, requests: u64, notifications: u64, polled: u64) {
        let counts = self.counts();
        let [requests_before, notifications_before, polled_before] = self.before;
        counts.requests.store(requests_before.wrapping_add(requests), Ordering::Relaxed);
        counts.notifications.store(notifications_before.wrapping_add(notifications), Ordering::Relaxed);
        counts.polled.store(polled_before.wrapping_add(polled), Ordering::Relaxed);
    }

    /// Counts a worker of the queue, until that is dropped.
    pub fn count_worker(&self) -> CountedWorker<'_> {
        self.counts().workers.fetch_add(1, Ordering::Relaxed);
        CountedWorker(&self.counts().workers)
    }

    /// A worker was woken. Others may be at the same time.
    #[inline]
    pub fn woken(&self) {
        self.counts().wakeups.fetch_add(1, Ordering::Relaxed);
    }

    /// The request that starts with descriptor `head` is served from `start` on.
    #[inline]
    pub fn begin(&self, head: u16, start: u64) {
        self.progress(head).store(start << 2, Ordering::Relaxed);
    }

    /// What the request that starts with descriptor `head` does.
    #[inline]
    pub fn set_phase(&self, head: u16, phase: super::Phase) {
        let progress = self.progress(head);
        let start = progress.load(Ordering::Relaxed) & !3;
        progress.store(start | phase as u64, Ordering::Relaxed);
    }

    /// Counters for one request after the other.
    pub fn shard(&self) -> Shard {
        Shard::new(self.counts.owner(), self.queue)
    }

    #[inline]
    fn progress(&self, head: u16) -> &AtomicU64 {
        self.progress.get(usize::from(head) * super::PROGRESS_STRIDE)
    }

    #[inline]
    fn counts(&self) -> &QueueCounts {
        self.counts.get(self.queue)
    }
}

/// Counters of which one request at a time has its own: two CPUs never change the same ones, unless there are more requests
/// than shards.
pub struct Shard {
    counts: Table<ShardCounts, Metrics>,
    index: usize,
    queue: usize,
}

impl Shard {
    fn new(metrics: &Arc<Metrics>, queue: usize) -> Shard {
        Shard { counts: metrics.shards(), index: metrics.take_shard(), queue }
    }

    /// Adds to a counter of this shard.
    #[inline]
    fn add(&self, counter: &AtomicU64, count: u64) {
        if self.index == 0 {
            // Several requests share it.
            counter.fetch_add(count, Ordering::Relaxed);
        } else {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
        }
    }

    /// A request has its reply.
    #[inline]
    pub fn completed(&self, served: &Served) {
        let counts = self.counts.get(self.index);
        let op = served.opcode as usize % OPS;
        let Some(of_op) = counts.ops.get(op) else { return };
        self.add(&of_op.nanos, served.nanos);
        if let Some(bucket) = of_op.buckets.get(bucket(served.nanos)) {
            self.add(bucket, 1);
        }
        if served.bytes > 0 {
            let is_read = served.opcode == Opcode::Read as u32;
            self.add(if is_read { &counts.bytes_read } else { &counts.bytes_written }, served.bytes.into());
        }
        if served.errno != 0 {
            self.add(&of_op.errors, 1);
            self.metrics().count_error(op, usize::from(served.errno) % ERRNOS);
        }
        if served.notes != super::notes::Notes::default() {
            self.count_notes(counts, served);
        }
        if self.metrics().is_slow(served.nanos) {
            self.note_slow(served);
        }
    }

    fn count_notes(&self, counts: &ShardCounts, served: &Served) {
        let notes = served.notes;
        if notes.waited > 0 {
            self.add(&counts.waits, 1);
            self.add(&counts.wait_nanos, notes.waited);
        }
        if notes.writers > 0 {
            let bucket = (u32::BITS - (notes.writers - 1).leading_zeros()) as usize;
            if let Some(bucket) = counts.writers.get(bucket.min(WRITER_BUCKETS - 1)) {
                self.add(bucket, 1);
            }
            self.metrics().saw_writers(notes.writers, served.popped.wrapping_add(served.nanos));
        }
        let [copied, fell_back] = &counts.mapped;
        match notes.mapped {
            Mapped::No => {}
            Mapped::Copied => self.add(copied, 1),
            Mapped::FellBack => self.add(fell_back, 1),
        }
    }

    #[cold]
    fn note_slow(&self, served: &Served) {
        let Served { opcode, unique, bytes, nanos, notes, .. } = *served;
        let queue = u32::try_from(self.queue).unwrap_or(0);
        let ended = Ended { opcode, queue, unique, bytes, nanos, waited: notes.waited, at: monotonic() };
        slow::insert(self.metrics(), &ended);
    }

    fn metrics(&self) -> &Metrics {
        self.counts.owner()
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.metrics().give_shard_back(self.index);
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
        let mut queue = metrics.for_queue(1);
        queue.start(128);
        let read = Served { opcode: 15, unique: 7, bytes: 4096, nanos: 5000, ..Served::default() };
        // Also where there are more requests than shards.
        let shards: Vec<Shard> = (0..2 * super::super::SHARDS).map(|_| queue.shard()).collect();
        for shard in &shards {
            shard.completed(&read);
            shard.completed(&Served { errno: 2, bytes: 0, opcode: 1, ..read });
        }
        let count = shards.len() as u64;
        let sample = metrics.sample();
        assert_eq!(sample.bytes_read, 4096 * count);
        let ops: Vec<_> = sample.ops.iter().map(|op| (op.name, op.count, op.nanos, op.errors)).collect();
        assert_eq!(ops, [("lookup", count, 5000 * count, count), ("read", count, 5000 * count, 0)]);
        assert_eq!(metrics.errors(), [("lookup", 2, count)]);
        drop(shards);
        assert_eq!(queue.shard().index, 1, "shards are used again");
    }

    #[test]
    fn what_a_queue_has_counted_before_counts_on() {
        let metrics = Metrics::create().unwrap();
        for _ in 0..2 {
            let mut queue = metrics.for_queue(3);
            queue.start(64);
            queue.publish(10, 5, 1);
            queue.publish(20, 7, 1);
        }
        let sample = metrics.sample();
        let queue = sample.queues[3];
        assert_eq!((queue.requests, queue.notifications, queue.polled, queue.size), (40, 14, 2, 64));
    }

    #[test]
    fn writers_of_one_file_are_seen() {
        let metrics = Metrics::create().unwrap();
        let shard = metrics.for_queue(1).shard();
        for writers in [1, 2, 3, 16, 200] {
            let notes = super::super::notes::Notes { writers, ..Default::default() };
            shard.completed(&Served { opcode: 16, notes, popped: monotonic(), ..Served::default() });
        }
        assert_eq!(metrics.sample().writers, [1, 1, 1, 0, 1, 0, 0, 1]);
        assert_eq!(metrics.most_writers(), 200);
    }
}
