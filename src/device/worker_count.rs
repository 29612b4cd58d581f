//! The number of threads that serve a queue, and which of them may exit.
//!
//! A worker that is about to serve spawns another one if no worker is idle, and a worker that leaves chains
//! in the ring wakes an idle one. Both rely on it that an idle worker wakes up. So a worker whose idle time
//! is over exits only if another worker is idle, itself not counted; otherwise it polls the ring once more
//! and is idle again. The check and the update of the count are one step under the lock: of the workers that
//! time out together, not too many can exit.
//!
//! A worker that is blocked by another request does not count against the limit. When it continues, the
//! limit may be exceeded. Then it parks: it pops no more chains until it is unparked, or it exits after the
//! keep-alive time.
//!
//! Storage that hangs may hold all workers. When the watchdog finds that none has come back for a while, it counts all of
//! them as stuck ([`WorkerCount::count_stuck`]), and as many others may serve. A worker that comes back after that has its
//! place again, and may be one too many as well.

use std::time::Duration;

use crate::sync::{AtomicBool, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

/// Workers that never exit: one that serves and one that waits for the next kick.
const CORE_WORKERS: usize = 2;
/// Workers of one queue that are replaced while they are blocked.
const MAX_BLOCKED_WORKERS: usize = 256;
/// Workers of one queue that are replaced while storage does not answer them.
const MAX_STUCK_WORKERS: usize = 256;
/// Requests of one queue that are served on threads of their own.
const MAX_BLOCKING_REQUESTS: usize = 256;

/// The threads of a queue.
#[derive(Debug)]
pub struct WorkerCount {
    idle: Idle,
    limit: usize,
    /// How often workers were counted as stuck.
    rescues: AtomicUsize,
    threads: Mutex<Threads>,
    exited: Condvar,
    unparked: Condvar,
}

/// The state that every sleep and every wake-up changes, in cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Idle {
    count: AtomicUsize,
    /// A worker was woken and is not awake yet.
    woken: AtomicBool,
}

#[derive(Debug, Default)]
struct Threads {
    /// All workers.
    workers: usize,
    /// Workers that are blocked by another request. They do not count against the limit.
    blocked: usize,
    /// Workers that storage does not answer. They do not count either.
    stuck: usize,
    /// Workers that are parked.
    parked: usize,
    /// Workers that were unparked and do not run yet.
    unparked: usize,
    /// Requests that are served on threads of their own.
    blocking_requests: usize,
    stopping: bool,
}

/// How the caller gets another worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing to do: one is on its way, or the limit is reached.
    Nothing,
    /// Wake one that is idle.
    WakeOne,
    /// Spawn a worker. It is counted already: if that fails, [`WorkerCount::exit`] has to be called.
    Spawn,
}

/// How a worker continues after it was parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// It serves.
    Resume,
    /// It exits; it is not counted any more.
    Exit,
}

impl Threads {
    /// Workers that serve or are idle.
    fn active(&self) -> usize {
        self.workers.saturating_sub(self.blocked).saturating_sub(self.parked).saturating_sub(self.stuck)
    }
}

impl WorkerCount {
    /// No worker yet; up to `limit` may serve at once.
    pub fn new(limit: usize) -> WorkerCount {
        WorkerCount {
            idle: Idle::default(),
            limit,
            rescues: AtomicUsize::new(0),
            threads: Mutex::default(),
            exited: Condvar::new(),
            unparked: Condvar::new(),
        }
    }

    /// How many workers may serve at once.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Workers that are idle.
    pub fn idle(&self) -> usize {
        self.idle.count.load(Ordering::SeqCst)
    }

    /// The calling worker is about to sleep until there is work.
    pub fn begin_idle(&self) {
        self.idle.count.fetch_add(1, Ordering::SeqCst);
    }

    /// It is awake. It has to poll the ring afterwards, unless it exits.
    pub fn end_idle(&self) {
        self.idle.count.fetch_sub(1, Ordering::SeqCst);
        self.idle.woken.store(false, Ordering::SeqCst);
    }

    /// Whether there are so few workers that none exits: their sleeps need no timeout.
    pub fn is_at_core_size(&self) -> bool {
        self.lock().active() <= self.core_size()
    }

    /// Whether a worker whose idle time is over may exit; if so, it is not counted any more.
    pub fn try_exit(&self) -> bool {
        let mut threads = self.lock();
        if threads.active() <= self.core_size() || self.idle() == 0 {
            return false;
        }
        self.take_off(&mut threads);
        true
    }

    /// A worker exits, or could not be spawned.
    pub fn exit(&self) {
        self.take_off(&mut self.lock());
    }

    /// Wakes an idle worker or, if there is none, spawns one.
    pub fn wake_or_spawn(&self) -> Action {
        if self.idle() == 0 {
            return self.spawn_if_allowed();
        }
        // One worker that was woken and is not awake yet is enough.
        if self.idle.woken.swap(true, Ordering::SeqCst) { Action::Nothing } else { Action::WakeOne }
    }

    /// Spawns a worker, or unparks one, if the limit allows.
    pub fn spawn_if_allowed(&self) -> Action {
        self.spawn_locked(&mut self.lock())
    }

    fn spawn_locked(&self, threads: &mut Threads) -> Action {
        if threads.stopping || threads.active() >= self.limit {
            return Action::Nothing;
        }
        if threads.parked > 0 {
            threads.parked -= 1;
            threads.unparked += 1;
            self.unparked.notify_one();
            return Action::Nothing;
        }
        threads.workers += 1;
        Action::Spawn
    }

    /// The calling worker is about to block. `None` if too many are blocked: then it still counts.
    pub fn begin_blocking(&self) -> Option<Action> {
        let mut threads = self.lock();
        if threads.blocked >= MAX_BLOCKED_WORKERS {
            return None;
        }
        threads.blocked += 1;
        Some(if self.idle() == 0 { self.spawn_locked(&mut threads) } else { Action::Nothing })
    }

    /// The worker continues.
    pub fn end_blocking(&self) {
        let mut threads = self.lock();
        threads.blocked = threads.blocked.saturating_sub(1);
    }

    /// How often workers were counted as stuck so far: a worker that is about to serve remembers it.
    pub fn rescues(&self) -> usize {
        self.rescues.load(Ordering::Relaxed)
    }

    /// Whether all workers serve and no more may, so that nobody waits for the next kick.
    pub fn is_saturated(&self) -> bool {
        self.idle() == 0 && {
            let threads = self.lock();
            !threads.stopping && threads.active() >= self.limit
        }
    }

    /// Whether some workers are stuck.
    pub fn has_stuck(&self) -> bool {
        self.lock().stuck > 0
    }

    /// None of the workers has come back for a while: they are stuck, and others may serve. Returns how many are stuck.
    pub fn count_stuck(&self) -> usize {
        let mut threads = self.lock();
        let active = threads.active();
        let more = active.min(MAX_STUCK_WORKERS.saturating_sub(threads.stuck));
        threads.stuck += more;
        if more > 0 {
            self.rescues.fetch_add(1, Ordering::Relaxed);
        }
        threads.stuck
    }

    /// A worker has come back that began to serve after so many `rescues`. Whether it was counted as stuck.
    #[inline]
    pub fn end_stuck(&self, rescues: usize) -> bool {
        self.rescues() != rescues && {
            let mut threads = self.lock();
            threads.stuck = threads.stuck.saturating_sub(1);
            true
        }
    }

    /// Whether the limit is exceeded, after a worker was blocked.
    pub fn is_over_limit(&self) -> bool {
        let threads = self.lock();
        threads.active() > self.limit && !threads.stopping
    }

    /// Parks the calling worker until it is unparked; it exits after `keep_alive`.
    pub fn park(&self, keep_alive: Duration) -> Parked {
        let mut threads = self.lock();
        if threads.active() <= self.limit {
            return Parked::Resume;
        }
        threads.parked += 1;
        loop {
            if threads.unparked > 0 {
                threads.unparked -= 1;
                return Parked::Resume;
            }
            if threads.stopping {
                break;
            }
            let waited = self.unparked.wait_timeout(threads, keep_alive);
            let result;
            (threads, result) = waited.unwrap_or_else(PoisonError::into_inner);
            if result.timed_out() && threads.unparked == 0 {
                break;
            }
        }
        threads.parked = threads.parked.saturating_sub(1);
        self.take_off(&mut threads);
        Parked::Exit
    }

    /// Counts a request that is served on a thread of its own; false if there are too many.
    pub fn begin_blocking_request(&self) -> bool {
        let mut threads = self.lock();
        let room = threads.blocking_requests < MAX_BLOCKING_REQUESTS;
        threads.blocking_requests += usize::from(room);
        room
    }

    /// The request is completed, or has got no thread.
    pub fn end_blocking_request(&self) {
        let mut threads = self.lock();
        threads.blocking_requests = threads.blocking_requests.saturating_sub(1);
        self.exited.notify_all();
    }

    /// Unparks all workers; none is spawned or parked any more.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.unparked.notify_all();
    }

    /// Waits until all threads have ended; while there are blocking requests, calls `interrupt` every `interval`.
    pub fn wait_until_empty(&self, interval: Duration, interrupt: impl Fn()) {
        let mut threads = self.lock();
        while threads.workers > 0 || threads.blocking_requests > 0 {
            if threads.blocking_requests > 0 {
                drop(threads);
                interrupt();
                threads = self.lock();
                if threads.workers == 0 && threads.blocking_requests == 0 {
                    return;
                }
            }
            let waited = self.exited.wait_timeout(threads, interval);
            threads = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn core_size(&self) -> usize {
        CORE_WORKERS.min(self.limit)
    }

    fn take_off(&self, threads: &mut Threads) {
        threads.workers = threads.workers.saturating_sub(1);
        self.exited.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(limit: usize, workers: usize) -> WorkerCount {
        let worker_count = WorkerCount::new(limit);
        (0..workers).for_each(|_| assert_eq!(worker_count.spawn_if_allowed(), Action::Spawn));
        worker_count
    }

    #[test]
    fn idle_workers_exit_until_two_are_left() {
        let worker_count = with(4, 4);
        (0..4).for_each(|_| worker_count.begin_idle());
        let left = (0..4).filter(|_| {
            worker_count.end_idle();
            worker_count.try_exit() || {
                worker_count.begin_idle();
                false
            }
        });
        assert_eq!(left.count(), 2);
        assert_eq!((worker_count.lock().workers, worker_count.idle()), (2, 2));
    }

    #[test]
    fn the_last_idle_worker_stays_while_others_serve() {
        let worker_count = with(4, 4);
        worker_count.begin_idle();
        worker_count.end_idle();
        assert!(!worker_count.try_exit());
    }

    #[test]
    fn a_blocked_worker_is_replaced_and_parks_afterwards() {
        let worker_count = with(1, 1);
        assert_eq!(worker_count.spawn_if_allowed(), Action::Nothing);
        assert_eq!(worker_count.begin_blocking(), Some(Action::Spawn));
        assert!(!worker_count.is_over_limit());
        worker_count.end_blocking();
        assert!(worker_count.is_over_limit());
        assert_eq!(worker_count.park(Duration::ZERO), Parked::Exit);
        assert_eq!(worker_count.lock().workers, 1);
    }

    #[test]
    fn a_parked_worker_replaces_the_next_blocked_one() {
        let worker_count = with(1, 1);
        assert_eq!(worker_count.begin_blocking(), Some(Action::Spawn));
        worker_count.end_blocking();
        std::thread::scope(|scope| {
            let parked = scope.spawn(|| worker_count.park(Duration::from_secs(10)));
            while worker_count.lock().parked == 0 {
                std::thread::yield_now();
            }
            assert_eq!(worker_count.begin_blocking(), Some(Action::Nothing));
            assert_eq!(parked.join().unwrap(), Parked::Resume);
        });
        assert_eq!(worker_count.lock().active(), 1);
    }

    #[test]
    fn the_number_of_replaced_workers_is_limited() {
        let worker_count = with(1, 1);
        for _ in 0..MAX_BLOCKED_WORKERS {
            assert_eq!(worker_count.begin_blocking(), Some(Action::Spawn));
        }
        assert_eq!(worker_count.begin_blocking(), None);
    }

    #[test]
    fn stuck_workers_are_replaced_until_they_come_back() {
        let worker_count = with(2, 2);
        let before = worker_count.rescues();
        assert!(worker_count.is_saturated());
        assert_eq!(worker_count.count_stuck(), 2);
        assert!(!worker_count.is_saturated());
        let later = worker_count.rescues();
        assert_eq!(worker_count.spawn_if_allowed(), Action::Spawn);
        assert_eq!(worker_count.spawn_if_allowed(), Action::Spawn);
        assert_eq!(worker_count.spawn_if_allowed(), Action::Nothing);
        assert!(!worker_count.end_stuck(later), "it began afterwards");
        assert!(!worker_count.is_over_limit());
        assert!(worker_count.end_stuck(before));
        assert!(worker_count.is_over_limit());
        assert_eq!(worker_count.park(Duration::ZERO), Parked::Exit);
        assert!(!worker_count.is_over_limit());
        (0..MAX_STUCK_WORKERS).for_each(|_| {
            worker_count.count_stuck();
            worker_count.spawn_if_allowed();
        });
        assert_eq!(worker_count.count_stuck(), MAX_STUCK_WORKERS);
    }

    #[test]
    fn a_stop_unparks_workers_and_spawns_none() {
        let worker_count = with(1, 1);
        assert_eq!(worker_count.begin_blocking(), Some(Action::Spawn));
        worker_count.end_blocking();
        std::thread::scope(|scope| {
            let parked = scope.spawn(|| worker_count.park(Duration::from_secs(100)));
            while worker_count.lock().parked == 0 {
                std::thread::yield_now();
            }
            worker_count.stop();
            assert_eq!(parked.join().unwrap(), Parked::Exit);
        });
        assert_eq!(worker_count.spawn_if_allowed(), Action::Nothing);
        worker_count.exit();
        worker_count.wait_until_empty(Duration::ZERO, || panic!("there is no blocking request"));
    }
}
