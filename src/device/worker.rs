//! The threads that serve a queue.
//!
//! A queue begins with one worker and grows: a worker that is about to serve while nobody sleeps
//! on the queue starts another one, up to the limit. When chains wait and requests are slow, the
//! worker wakes an idle one at once; when requests are fast, waking costs more than it gains, and
//! only the [`Watchdog`] wakes one if the queue stands still for a tick. [`WorkerCount`] keeps count.

use std::mem;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use vm_memory::GuestAddressSpace;

use super::chain::ChainBuffers;
use super::queue::{Completion, Popped, Queue, QueueError, Wakeup};
use super::watchdog::Watchdog;
use super::worker_count::{Action, Parked, WorkerCount};
use crate::blocking::{Hook, HookGuard, take_blocked};
use crate::logging::{info_limited, warn_limited};
use crate::service::{self, Service};
use crate::sys::memory;

/// How long a worker is idle or parked before it exits.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Workers of all queues that are replaced at once while they are blocked: each is a thread, and the
/// host has only so many.
const MAX_BLOCKED: usize = 1024;
/// How often a stop repeats its interruption of waits for locks, which may begin at any moment.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(2);

/// Workers that are blocked and replaced.
static BLOCKED: AtomicUsize = AtomicUsize::new(0);

/// A queue, and the threads that serve it until it is stopped.
pub(super) struct WorkerPool {
    queue: Queue,
    service: Arc<Service>,
    watchdog: Arc<Watchdog>,
    worker_count: WorkerCount,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Requests that may wait for others, each on a thread of its own, in the order of their arrival.
    apart: Mutex<Vec<Apart>>,
    /// Requests taken when the watch looked last.
    checked_requests: AtomicU64,
}

/// A request that is served apart.
#[derive(Debug)]
struct Apart {
    unique: u64,
    head: u16,
    /// It was to wait on when the queue was stopped.
    put_back: bool,
}

/// What a worker keeps from request to request, so that none allocates.
#[derive(Default)]
pub(super) struct Scratch {
    chain: ChainBuffers,
    service: service::Scratch,
}

impl WorkerPool {
    /// Starts serving `queue` with one worker that may grow to `limit` (at least one). Chains in
    /// `put_back` were taken from the ring before it was stopped, and come first.
    pub fn start(
        queue: Queue,
        service: Arc<Service>,
        watchdog: &Arc<Watchdog>,
        limit: usize,
        put_back: &[u16],
    ) -> Result<Arc<WorkerPool>, QueueError> {
        let pool = WorkerPool::new(queue, service, watchdog, limit.max(1));
        pool.try_perform(pool.worker_count.spawn_if_allowed())
            .map_err(|source| QueueError::Thread { index: pool.queue.index(), source })?;
        watchdog.add(&pool);
        put_back.iter().for_each(|head| pool.serve_again(*head));
        Ok(pool)
    }

    /// A pool whose only worker is the caller, by [`WorkerPool::wait_and_process`].
    pub fn without_workers(queue: Queue, service: Arc<Service>, watchdog: &Arc<Watchdog>) -> Arc<WorkerPool> {
        WorkerPool::new(queue, service, watchdog, 1)
    }

    fn new(queue: Queue, service: Arc<Service>, watchdog: &Arc<Watchdog>, limit: usize) -> Arc<WorkerPool> {
        Arc::new(WorkerPool {
            queue,
            service,
            watchdog: Arc::clone(watchdog),
            worker_count: WorkerCount::new(limit),
            threads: Mutex::default(),
            apart: Mutex::default(),
            checked_requests: AtomicU64::new(0),
        })
    }

    /// Waits for a kick and serves what has come.
    pub fn wait_and_process(self: &Arc<Self>, scratch: &mut Scratch) {
        if self.sleep(None) == Wakeup::Work {
            self.process_queue(scratch);
        }
    }

    /// The queue that is served.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Stops: nothing more is taken, and what is in flight is finished, but for requests that wait for
    /// locks: their chains are put back into the ring or, where later ones are done already, returned,
    /// to be served when the queue goes on. Nothing touches the ring after the return, and the caller
    /// has the last reference.
    pub fn stop(self: &Arc<Self>) -> Vec<u16> {
        self.queue.begin_stop();
        self.worker_count.stop();
        self.watchdog.remove(self);
        self.worker_count.wait_until_empty(INTERRUPT_INTERVAL, || {
            for apart in self.apart().iter().filter(|apart| !apart.put_back) {
                self.service.put_back(apart.unique);
            }
        });
        // Its descriptors have to be free before the queue is started anew: there may be no others.
        let threads = mem::take(&mut *self.threads());
        for thread in threads {
            // A worker that failed has left a message already.
            let _ = thread.join();
        }
        let statistics = self.queue.statistics();
        if statistics.requests > 0 {
            info_limited!(
                "queue {}: {} requests, {} notifications, {} busy-poll hits",
                self.queue.index(),
                statistics.requests,
                statistics.notifications,
                statistics.busy_poll_hits
            );
        }
        self.queue.put_back(mem::take(&mut *self.apart()).into_iter().map(|apart| apart.head).collect())
    }

    /// Called by the watch: if no chain was taken since the last call, notifies the guest of those
    /// given back, and wakes a worker if chains wait. Returns whether chains wait.
    pub fn check_progress(self: &Arc<Self>) -> bool {
        let requests = self.queue.statistics().requests;
        let stands_still = self.checked_requests.swap(requests, Ordering::Relaxed) == requests;
        let backlog = self.queue.has_backlog();
        if stands_still {
            self.queue.flush_coalesced();
            if backlog {
                self.perform(self.worker_count.wake_or_spawn());
            }
        }
        backlog
    }

    /// Wakes or spawns a worker. Failure is no more than slower service.
    fn perform(self: &Arc<Self>, action: Action) {
        if let Err(error) = self.try_perform(action) {
            warn_limited!("queue {}: cannot start another worker: {error}", self.queue.index());
        }
    }

    fn try_perform(self: &Arc<Self>, action: Action) -> std::io::Result<()> {
        match action {
            Action::Nothing => Ok(()),
            Action::WakeOne => {
                self.queue.wake_one();
                Ok(())
            }
            Action::Spawn => {
                let started = self.start_thread("q", |pool| pool.run());
                if started.is_err() {
                    self.worker_count.exit();
                }
                started
            }
        }
    }

    /// Starts a thread that [`WorkerPool::stop`] will join.
    fn start_thread(
        self: &Arc<Self>,
        kind: &str,
        run: impl FnOnce(Arc<WorkerPool>) + Send + 'static,
    ) -> std::io::Result<()> {
        memory::ask_for_a_thread()?;
        let pool = Arc::clone(self);
        let name = format!("lanefsd-{kind}{}", self.queue.index());
        let mut threads = self.threads();
        threads.retain(|thread| !thread.is_finished());
        threads.try_reserve(1).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        threads.push(thread::Builder::new().name(name).spawn(move || run(pool))?);
        Ok(())
    }

    /// A worker's life.
    fn run(self: Arc<Self>) {
        let _hook = HookGuard::install(Box::new(Worker(Arc::clone(&self))));
        let mut scratch = Scratch::default();
        loop {
            if self.process_queue(&mut scratch) == Parked::Exit {
                return;
            }
            let longest = Timespec { tv_sec: KEEP_ALIVE.as_secs().cast_signed(), tv_nsec: 0 };
            match self.sleep(if self.worker_count.is_at_core_size() { None } else { Some(longest) }) {
                Wakeup::Work => {}
                Wakeup::Idle if self.worker_count.try_exit() => return,
                Wakeup::Idle => {}
                Wakeup::Stop => break,
            }
        }
        self.worker_count.exit();
    }

    fn sleep(&self, timeout: Option<Timespec>) -> Wakeup {
        self.worker_count.begin_idle();
        let woken = self.queue.wait(timeout);
        self.worker_count.end_idle();
        woken
    }

    /// Serves chains until none waits, or until the worker is one too many.
    fn process_queue(self: &Arc<Self>, scratch: &mut Scratch) -> Parked {
        let (mut done, mut took) = (None, None);
        let mut begin = Instant::now();
        while let Some(next) = self.queue.complete_and_pop(done, took) {
            self.ensure_listener(next);
            done = self.serve(next.head, scratch);
            let end = Instant::now();
            took = Some(end - begin);
            begin = end;
            if take_blocked() && self.worker_count.is_over_limit() {
                if let Some(done) = done.take() {
                    self.queue.complete(done);
                }
                if self.park() == Parked::Exit {
                    return Parked::Exit;
                }
            }
        }
        Parked::Resume
    }

    /// Parks the worker, which is one too many. Chains that wait are left to others.
    fn park(self: &Arc<Self>) -> Parked {
        if self.queue.has_backlog() {
            self.perform(self.worker_count.wake_or_spawn());
        }
        self.worker_count.park(KEEP_ALIVE)
    }

    /// Makes sure that while this worker serves, somebody hears the next kick, and that chains
    /// which wait already do not wait for this one.
    fn ensure_listener(self: &Arc<Self>, next: Popped) {
        let may_grow = self.worker_count.limit() > 1;
        if may_grow && self.worker_count.idle() == 0 {
            self.perform(self.worker_count.spawn_if_allowed());
        }
        if next.waiting > 0 {
            if may_grow && next.slow {
                self.perform(self.worker_count.wake_or_spawn());
            } else {
                self.watchdog.arm();
            }
        }
    }

    /// Serves one chain; `None` if it went to a thread of its own.
    fn serve(self: &Arc<Self>, head: u16, scratch: &mut Scratch) -> Option<Completion> {
        let memory = self.queue.memory().memory();
        let walked = scratch.chain.walk(&memory, self.queue.layout(), head);
        let (mut input, output) = match walked {
            Ok(ends) => ends,
            Err(error) => {
                warn_limited!("queue {}: a malformed chain: {error}", self.queue.index());
                return Some(Completion { head, written: 0 });
            }
        };
        let Some(header) = Service::read_header(&mut input) else {
            warn_limited!("queue {}: a request without a header", self.queue.index());
            return Some(Completion { head, written: 0 });
        };
        let written = if Service::may_wait_for_others(&header) {
            if self.serve_apart(head, header.unique) {
                return None;
            }
            Service::refuse(&header, output, Errno::NOLCK)
        } else {
            self.service.serve(&header, input, output, &mut scratch.service)
        };
        Some(Completion { head, written })
    }

    /// Serves a chain on a thread of its own, since it may have to wait for another request.
    /// Returns false if there are too many of these already.
    fn serve_apart(self: &Arc<Self>, head: u16, unique: u64) -> bool {
        if !self.worker_count.begin_apart() {
            return false;
        }
        self.apart().push(Apart { unique, head, put_back: false });
        let started = self.start_thread("w", move |pool| {
            let written = pool.serve_and_wait(head);
            if let Some(written) = written {
                pool.queue.complete(Completion { head, written });
            }
            pool.end_apart(head, written.is_none());
        });
        if started.is_err() {
            self.end_apart(head, false);
        }
        started.is_ok()
    }

    /// A request that was served apart is done, or put back. (That happens to one of a queue that runs
    /// only if its number is that of another request: then the guest waits for what it has lost.)
    fn end_apart(&self, head: u16, put_back: bool) {
        let mut apart = self.apart();
        if let Some(place) = apart.iter().position(|apart| apart.head == head && !apart.put_back) {
            if put_back {
                apart.iter_mut().skip(place).take(1).for_each(|apart| apart.put_back = true);
            } else {
                apart.remove(place);
            }
        }
        drop(apart);
        self.worker_count.end_apart();
    }

    /// Serves a chain that may wait; `None` if it is to be served again.
    ///
    /// It is walked anew, as the segments of the first walk belong to the worker. A guest that has
    /// changed the chain meanwhile is served what stands there now.
    fn serve_and_wait(&self, head: u16) -> Option<u32> {
        let mut scratch = Scratch::default();
        let memory = self.queue.memory().memory();
        let Ok((mut input, output)) = scratch.chain.walk(&memory, self.queue.layout(), head) else {
            return Some(0);
        };
        let Some(header) = Service::read_header(&mut input) else { return Some(0) };
        self.service.serve_and_wait(&header, input, output, &mut scratch.service)
    }

    /// Serves a chain that was put back when the queue was stopped. Whatever the guest has made of it
    /// since, it does not block the calling thread.
    fn serve_again(self: &Arc<Self>, head: u16) {
        let mut scratch = Scratch::default();
        let memory = self.queue.memory().memory();
        let mut written = 0;
        if let Ok((mut input, output)) = scratch.chain.walk(&memory, self.queue.layout(), head)
            && let Some(header) = Service::read_header(&mut input)
        {
            if self.serve_apart(head, header.unique) {
                return;
            }
            written = Service::refuse(&header, output, Errno::NOLCK);
        }
        self.queue.complete(Completion { head, written });
    }

    fn apart(&self) -> MutexGuard<'_, Vec<Apart>> {
        self.apart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Replaces its worker while that is blocked.
struct Worker(Arc<WorkerPool>);

impl Hook for Worker {
    fn begin_blocking(&self) -> bool {
        if BLOCKED.fetch_add(1, Ordering::Relaxed) < MAX_BLOCKED
            && let Some(action) = self.0.worker_count.begin_blocking()
        {
            self.0.perform(action);
            return true;
        }
        BLOCKED.fetch_sub(1, Ordering::Relaxed);
        false
    }

    fn end_blocking(&self) {
        self.0.worker_count.end_blocking();
        BLOCKED.fetch_sub(1, Ordering::Relaxed);
    }
}
