//! Counters of a share.
//!
//! They stand in a memory file, so that they outlive a worker process, and other processes read and serve them: the one that
//! serves requests makes no system call and allocates nothing for them. Beside the counters the file has what is asked of
//! the serving process from outside: its gauges, and how much it logs.
//!
//! | part | by |
//! |---|---|
//! | requests, times and bytes | each request in flight at a place of its own ([`counts`]) |
//! | totals of each queue | the queue's threads, under its lock, now and then |
//! | errors by operation and errno | all threads |
//! | when each request in flight was begun | the thread that serves it |
//! | the slowest requests | all threads, one at a time ([`slow`]) |
//! | rate limits | [`crate::limits`], which are changed from outside |
//! | gauges | the serving process, when it is asked ([`Metrics::ask`]) |

pub mod config;
pub mod counts;
mod errnos;
pub mod notes;
mod sample;
pub mod slow;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use log::LevelFilter;
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::thread::futex;
use rustix::time::Timespec;

use self::counts::{QueueCounts, QueueMetrics, ShardCounts};
pub use self::errnos::errno_name;
pub use self::sample::{OpSample, QueueSample, Sample, op_name};
use self::slow::{Ended, SlowRecord};
use crate::sys::clock::monotonic;
use crate::sys::shared_map::{Mapping, Record, Table};

/// Operations that are told apart, by their opcodes. Others count as the one with the same remainder.
pub const OPS: usize = 64;
/// The same of errnos.
const ERRNOS: usize = 134;
/// Queues of a device.
pub const QUEUES: usize = 64;
/// Descriptors of the largest ring.
const SLOTS: usize = 32_768;

/// Requests that count without others; a power of two. The first shard is shared by all that come later.
const SHARDS: usize = 256;
/// The starts of two requests are in cache lines of their own.
const PROGRESS_STRIDE: usize = 8;

const MAGIC: u64 = u64::from_le_bytes(*b"lanestat");
/// Version of the layout. A program that finds another one begins to count anew.
const VERSION: u32 = 3;
/// A window for the most writers of a file: some 8.6 seconds.
const WINDOW_SHIFT: u32 = 33;
/// Bits of the number of writers beside the number of the window.
const WRITERS_BITS: u32 = 16;

/// Bytes for rate limits.
const LIMITS_SIZE: usize = 4096;

mod offsets {
    use super::*;

    const fn after<T>(offset: usize, count: usize) -> usize {
        (offset + count * size_of::<T>()).next_multiple_of(4096)
    }

    pub const HEADER: usize = 0;
    pub const SLOW: usize = after::<Header>(HEADER, 1);
    pub const ERRORS: usize = after::<SlowRecord>(SLOW, slow::KEPT);
    pub const COUNTS: usize = after::<AtomicU64>(ERRORS, OPS * ERRNOS);
    pub const SHARDS: usize = after::<QueueCounts>(COUNTS, QUEUES);
    pub const LIMITS: usize = after::<ShardCounts>(SHARDS, super::SHARDS);
    pub const PROGRESS: usize = after::<[u8; LIMITS_SIZE]>(LIMITS, 1);
    pub const END: usize = after::<AtomicU64>(PROGRESS, QUEUES * SLOTS * PROGRESS_STRIDE);
}

/// The first page.
#[repr(C)]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    /// How much is logged, one more than the number of a `LevelFilter`; 0 if nobody has said.
    log_level: AtomicU32,
    /// How often somebody has asked for gauges, and the last such question that was answered: futexes.
    asked: AtomicU32,
    answered: AtomicU32,
    /// The process that serves.
    worker: AtomicU32,
    /// Whether a front end is connected.
    has_front_end: AtomicU32,
    deaths: AtomicU64,
    upgrades: AtomicU64,
    started: AtomicU64,
    /// Whether a thread changes the list of slow requests.
    slow_lock: AtomicU32,
    unused: AtomicU32,
    slow_floor: AtomicU64,
    /// A bit for each shard that a request has.
    shards: [AtomicU64; SHARDS / 64],
    /// Most writers of a file in this window and in the one before, each with the number of the window above.
    writers: [AtomicU64; 2],
    gauges: [AtomicU64; Gauges::COUNT],
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for Header {}

/// What a request in flight does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is served.
    Serving = 0,
    /// It waits for another request.
    Waiting = 1,
    /// The kernel reads or writes for it.
    Submitted = 2,
}

/// What is counted by the serving process only when it is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Inodes that the guest knows.
    pub inodes: u64,
    /// Open files whose data the guest caches, or that one writer at a time writes.
    pub plain: u64,
    /// Open files that several writers may write at once.
    pub parallel: u64,
    /// Open directories.
    pub directories: u64,
    /// Descriptors that are open for the guest.
    pub descriptors: u64,
    /// Descriptors that may be open for the guest.
    pub descriptor_limit: u64,
}

impl Gauges {
    const COUNT: usize = 6;

    fn to_array(self) -> [u64; Gauges::COUNT] {
        let Gauges { inodes, plain, parallel, directories, descriptors, descriptor_limit } = self;
        [inodes, plain, parallel, directories, descriptors, descriptor_limit]
    }

    fn from_array(numbers: [u64; Gauges::COUNT]) -> Gauges {
        let [inodes, plain, parallel, directories, descriptors, descriptor_limit] = numbers;
        Gauges { inodes, plain, parallel, directories, descriptors, descriptor_limit }
    }
}

/// The counters of one share.
#[derive(Debug)]
pub struct Metrics {
    mapping: Mapping,
}

impl AsRef<Mapping> for Metrics {
    fn as_ref(&self) -> &Mapping {
        &self.mapping
    }
}

impl Metrics {
    /// Counters that are all 0.
    pub fn create() -> Result<Arc<Metrics>, Errno> {
        let metrics = Metrics { mapping: Mapping::create(c"lanefsd-metrics", offsets::END)? };
        let header = metrics.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.started.store(monotonic(), Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(Arc::new(metrics))
    }

    /// Those of an earlier program; none if that has written them in another way.
    pub fn open(file: OwnedFd) -> Result<Option<Arc<Metrics>>, Errno> {
        let len = usize::try_from(fstat(&file)?.st_size).unwrap_or(0);
        if len != offsets::END {
            return Ok(None);
        }
        let metrics = Metrics { mapping: Mapping::of(file, len)? };
        let header = metrics.header();
        let is_known = header.magic.load(Ordering::Acquire) == MAGIC
            && header.version.load(Ordering::Relaxed) == VERSION;
        Ok(is_known.then(|| Arc::new(metrics)))
    }

    /// The file's descriptor.
    pub fn file(&self) -> impl AsFd {
        self.mapping.file()
    }

    /// Those of the queue with this number.
    ///
    /// # Panics
    /// If the file were shorter than all files are.
    #[allow(clippy::expect_used, reason = "the offsets are constants inside the file, as a test shows")]
    pub fn for_queue(self: &Arc<Self>, queue: usize) -> QueueMetrics {
        let queue = queue.min(QUEUES - 1);
        let counts = Table::new(Arc::clone(self), offsets::COUNTS, QUEUES).expect("counts");
        let progress =
            Table::new(Arc::clone(self), progress_of(queue), SLOTS * PROGRESS_STRIDE).expect("progress");
        QueueMetrics::new(counts, progress, queue)
    }

    /// The place for rate limits, which belong to others: zero at first.
    ///
    /// # Panics
    /// If the record is larger than its place.
    #[allow(clippy::indexing_slicing, reason = "it is inside the file")]
    pub fn limits<T: Record>(&self) -> &T {
        const { assert!(size_of::<T>() <= LIMITS_SIZE) };
        &self.mapping.records(offsets::LIMITS, 1)[0]
    }

    /// A process begins to serve: nothing of another one is in flight any more.
    pub fn begin_process(self: &Arc<Self>) {
        let header = self.header();
        header.slow_lock.store(0, Ordering::Relaxed);
        header.shards.iter().for_each(|taken| taken.store(0, Ordering::Relaxed));
        for queue in 0..QUEUES {
            // Those that run start again.
            self.for_queue(queue).start(0);
        }
    }

    #[allow(clippy::expect_used, reason = "the offsets are constants inside the file, as a test shows")]
    fn shards(self: &Arc<Self>) -> Table<ShardCounts, Metrics> {
        Table::new(Arc::clone(self), offsets::SHARDS, SHARDS).expect("shards")
    }

    /// A shard that no request has, or the first one, which all may use.
    fn take_shard(&self) -> usize {
        for (word, taken) in self.header().shards.iter().enumerate() {
            // The first one is never anybody's own.
            let shared = u64::from(word == 0);
            let mut seen = taken.load(Ordering::Relaxed);
            while seen | shared != u64::MAX {
                let bit = (seen | shared).trailing_ones();
                let before = taken.fetch_or(1 << bit, Ordering::Relaxed);
                if before & 1 << bit == 0 {
                    return word * 64 + bit as usize;
                }
                seen = before;
            }
        }
        0
    }

    fn give_shard_back(&self, shard: usize) {
        if let Some(taken) = self.header().shards.get(shard / 64).filter(|_| shard > 0) {
            taken.fetch_and(!(1 << (shard % 64)), Ordering::Relaxed);
        }
    }

    /// This process serves now, by its id outside of all sandboxes.
    pub fn set_worker(&self, process: u32) {
        self.header().worker.store(process, Ordering::Relaxed);
    }

    /// The process that serves, or has served last.
    pub fn worker(&self) -> u32 {
        self.header().worker.load(Ordering::Relaxed)
    }

    /// Whether a front end is connected.
    pub fn has_front_end(&self) -> bool {
        self.header().has_front_end.load(Ordering::Relaxed) != 0
    }

    /// A front end has connected, or left.
    pub fn set_front_end(&self, connected: bool) {
        self.header().has_front_end.store(connected.into(), Ordering::Relaxed);
    }

    /// A process has died that has served.
    pub fn count_death(&self) {
        self.header().deaths.fetch_add(1, Ordering::Relaxed);
    }

    /// Processes that have died.
    pub fn deaths(&self) -> u64 {
        self.header().deaths.load(Ordering::Relaxed)
    }

    /// Another program goes on.
    pub fn count_upgrade(&self) {
        self.header().upgrades.fetch_add(1, Ordering::Relaxed);
    }

    /// How often another program has gone on.
    pub fn upgrades(&self) -> u64 {
        self.header().upgrades.load(Ordering::Relaxed)
    }

    /// Nanoseconds since the counters were 0.
    pub fn uptime(&self) -> u64 {
        monotonic().saturating_sub(self.header().started.load(Ordering::Relaxed))
    }

    /// How much is to be logged, if somebody has said.
    pub fn log_level(&self) -> Option<LevelFilter> {
        let number = self.header().log_level.load(Ordering::Relaxed);
        LevelFilter::iter().find(|level| *level as u32 + 1 == number)
    }

    /// Lets all processes log so much; the one that serves when it is asked next.
    pub fn set_log_level(&self, level: LevelFilter) {
        self.header().log_level.store(level as u32 + 1, Ordering::Relaxed);
    }

    /// Asks the serving process for its gauges, and waits up to `patience` for them. A process that is busy or dead has left
    /// those of its last answer.
    pub fn ask(&self, patience: Duration) -> Gauges {
        let header = self.header();
        let question = header.asked.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        let _ = futex::wake(&header.asked, futex::Flags::empty(), u32::MAX);
        let end = monotonic().saturating_add(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX));
        loop {
            let answered = header.answered.load(Ordering::Acquire);
            let left = end.saturating_sub(monotonic());
            // Question numbers may wrap.
            if answered.wrapping_sub(question).cast_signed() >= 0 || left == 0 {
                break;
            }
            let left = Timespec::try_from(Duration::from_nanos(left)).ok();
            let _ = futex::wait(&header.answered, futex::Flags::empty(), answered, left.as_ref());
        }
        let [inodes, plain, parallel, directories, descriptors, limit] = &header.gauges;
        Gauges::from_array(
            [inodes, plain, parallel, directories, descriptors, limit].map(|g| g.load(Ordering::Relaxed)),
        )
    }

    /// Waits until somebody asks who has not asked before question `last`; its number.
    pub fn next_question(&self, last: u32) -> u32 {
        let asked = &self.header().asked;
        loop {
            let now = asked.load(Ordering::Acquire);
            if now != last {
                return now;
            }
            let _ = futex::wait(asked, futex::Flags::empty(), now, None);
        }
    }

    /// The number of the last question.
    pub fn last_question(&self) -> u32 {
        self.header().answered.load(Ordering::Acquire)
    }

    /// Answers all questions up to this one.
    pub fn answer(&self, question: u32, gauges: Gauges) {
        let header = self.header();
        for (gauge, number) in header.gauges.iter().zip(gauges.to_array()) {
            gauge.store(number, Ordering::Relaxed);
        }
        header.answered.store(question, Ordering::Release);
        let _ = futex::wake(&header.answered, futex::Flags::empty(), u32::MAX);
    }

    /// The slowest requests of the last minutes, the slowest first.
    pub fn slowest(&self) -> Vec<Ended> {
        slow::list(self)
    }

    /// Lets slow requests of long ago make room for others. To be called now and then.
    pub fn age(&self) {
        slow::age(self);
    }

    /// Since when a request in flight is served, and what it does: of the one that starts with descriptor `head`.
    pub fn progress(&self, queue: usize, head: u16) -> (u64, Phase) {
        let slots = self.mapping.records::<AtomicU64>(progress_of(queue), SLOTS * PROGRESS_STRIDE);
        let word =
            slots.get(usize::from(head) * PROGRESS_STRIDE).map_or(0, |word| word.load(Ordering::Relaxed));
        let phase = match word & 3 {
            1 => Phase::Waiting,
            2 => Phase::Submitted,
            _ => Phase::Serving,
        };
        (word >> 2, phase)
    }

    /// Whether a request that took so long is among the slowest.
    #[inline]
    fn is_slow(&self, nanos: u64) -> bool {
        nanos > self.header().slow_floor.load(Ordering::Relaxed)
    }

    fn set_slow_floor(&self, nanos: u64) {
        self.header().slow_floor.store(nanos, Ordering::Relaxed);
    }

    fn lock_slow(&self) -> Option<SlowLock<'_>> {
        let lock = &self.header().slow_lock;
        lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok().map(|_| SlowLock(lock))
    }

    fn slow_records(&self) -> &[SlowRecord] {
        self.mapping.records(offsets::SLOW, slow::KEPT)
    }

    fn count_error(&self, op: usize, errno: usize) {
        let errors = self.mapping.records::<AtomicU64>(offsets::ERRORS, OPS * ERRNOS);
        if let Some(count) = errors.get(op * ERRNOS + errno) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A file has so many writers now.
    fn saw_writers(&self, writers: u32, now: u64) {
        let [this, before] = &self.header().writers;
        let window = now >> WINDOW_SHIFT;
        let value = window << WRITERS_BITS | u64::from(writers.min((1 << WRITERS_BITS) - 1));
        let old = this.load(Ordering::Relaxed);
        if value > old {
            if old >> WRITERS_BITS != window {
                before.store(old, Ordering::Relaxed);
            }
            this.fetch_max(value, Ordering::Relaxed);
        }
    }

    /// The most writers that one file had at once in the last 9 to 17 seconds.
    pub fn most_writers(&self) -> u64 {
        let window = monotonic() >> WINDOW_SHIFT;
        let recent = |value: u64| (value >> WRITERS_BITS).saturating_add(1) >= window;
        let values = self.header().writers.iter().map(|value| value.load(Ordering::Relaxed));
        values
            .filter(|value| recent(*value))
            .map(|value| value & ((1 << WRITERS_BITS) - 1))
            .max()
            .unwrap_or(0)
    }

    #[allow(clippy::indexing_slicing, reason = "the header is at a constant offset inside the file")]
    fn header(&self) -> &Header {
        &self.mapping.records(offsets::HEADER, 1)[0]
    }
}

/// Where the starts of a queue's requests are.
fn progress_of(queue: usize) -> usize {
    offsets::PROGRESS + queue.min(QUEUES - 1) * SLOTS * PROGRESS_STRIDE * size_of::<AtomicU64>()
}

/// Lets others change the list of slow requests when it is dropped.
struct SlowLock<'a>(&'a AtomicU32);

impl Drop for SlowLock<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
