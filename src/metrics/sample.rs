//! All counters at one moment.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_protocol::opcode::Opcode;

use super::counts::{BUCKETS, QueueCounts, ShardCounts, WRITER_BUCKETS};
use super::{ERRNOS, Metrics, OPS, QUEUES, SHARDS, offsets};
use crate::sys::clock::monotonic;

/// One operation, of all queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpSample {
    /// Its name: that of the opcode, in lower case.
    pub name: &'static str,
    /// Requests.
    pub count: u64,
    /// Nanoseconds of all of them.
    pub nanos: u64,
    /// Those that were answered with an error.
    pub errors: u64,
    /// Requests by their time, not cumulative.
    pub buckets: [u64; BUCKETS],
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSample {
    /// Its number.
    pub index: usize,
    /// Descriptors; 0 if it does not run.
    pub size: u32,
    /// Threads.
    pub workers: u32,
    /// Requests that were taken and have no reply. The journal has them: whoever has that fills it in.
    pub in_flight: u64,
    /// Requests that were taken.
    pub requests: u64,
    /// Notifications of the guest.
    pub notifications: u64,
    /// Wake-ups of workers.
    pub wakeups: u64,
    /// Requests that were found by polling.
    pub polled: u64,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub at: u64,
    /// Operations that have occurred, in the order of their opcodes.
    pub ops: Vec<OpSample>,
    /// Queues, from the high-priority queue on: those that have served.
    pub queues: Vec<QueueSample>,
    /// Bytes that READ has read.
    pub bytes_read: u64,
    /// Bytes that WRITE has written.
    pub bytes_written: u64,
    /// Requests that waited for others.
    pub waits: u64,
    /// Nanoseconds of all these waits.
    pub wait_nanos: u64,
    /// Writers of files in parallel mode, by how many wrote that file then.
    pub writers: [u64; WRITER_BUCKETS],
    /// Writes that were copied into a window of their file, and those of the same files that were not.
    pub mapped: [u64; 2],
}

/// The name of an operation: that of its opcode in lower case, or `unknown`.
pub fn op_name(opcode: u32) -> &'static str {
    static NAMES: OnceLock<[&'static str; OPS]> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let mut names = ["unknown"; OPS];
        for (opcode, name) in Opcode::ALL {
            let name = name.trim_start_matches("FUSE_").to_lowercase();
            if let Some(place) = names.get_mut(*opcode as usize) {
                *place = name.leak();
            }
        }
        names
    });
    names.get(opcode as usize).unwrap_or(&"unknown")
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Metrics {
    /// All counters now.
    pub fn sample(&self) -> Sample {
        let queues = self.mapping.records::<QueueCounts>(offsets::COUNTS, QUEUES);
        let has_served =
            |queue: &QueueCounts| load(&queue.requests) > 0 || queue.size.load(Ordering::Relaxed) > 0;
        let last = queues.iter().rposition(has_served).map_or(0, |last| last + 1);
        let queues = queues.iter().take(last).enumerate().map(|(index, queue)| queue_sample(index, queue));
        let mut sample = Sample { at: monotonic(), queues: queues.collect(), ..Sample::default() };
        let mut ops = vec![OpSample::default(); OPS];
        for shard in self.mapping.records::<ShardCounts>(offsets::SHARDS, SHARDS) {
            sample.bytes_read += load(&shard.bytes_read);
            sample.bytes_written += load(&shard.bytes_written);
            sample.waits += load(&shard.waits);
            sample.wait_nanos += load(&shard.wait_nanos);
            let writers = sample.writers.iter_mut().zip(&shard.writers);
            writers.for_each(|(sum, count)| *sum += load(count));
            sample.mapped.iter_mut().zip(&shard.mapped).for_each(|(sum, count)| *sum += load(count));
            for (sum, op) in ops.iter_mut().zip(&shard.ops) {
                sum.nanos += load(&op.nanos);
                sum.errors += load(&op.errors);
                sum.buckets.iter_mut().zip(&op.buckets).for_each(|(sum, count)| *sum += load(count));
            }
        }
        for (opcode, op) in (0..).zip(&mut ops) {
            op.name = op_name(opcode);
            op.count = op.buckets.iter().sum();
        }
        ops.retain(|op| op.count > 0);
        sample.ops = ops;
        sample
    }

    /// Replies with an error: operation, errno and how many.
    pub fn errors(&self) -> Vec<(&'static str, i32, u64)> {
        let counts = self.mapping.records::<AtomicU64>(offsets::ERRORS, OPS * ERRNOS);
        let of_op = |(opcode, errors): (u32, &[AtomicU64])| {
            let counted = (0..).zip(errors).filter(|(_, count)| load(count) > 0);
            let named = counted.map(|(errno, count)| (op_name(opcode), errno, load(count)));
            named.collect::<Vec<_>>()
        };
        (0..).zip(counts.chunks(ERRNOS)).flat_map(of_op).collect()
    }
}

fn queue_sample(index: usize, queue: &QueueCounts) -> QueueSample {
    QueueSample {
        index,
        size: queue.size.load(Ordering::Relaxed),
        workers: queue.workers.load(Ordering::Relaxed),
        in_flight: 0,
        requests: load(&queue.requests),
        notifications: load(&queue.notifications),
        wakeups: load(&queue.wakeups),
        polled: load(&queue.polled),
    }
}
