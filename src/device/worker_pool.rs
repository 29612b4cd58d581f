//! The threads that serve a queue, from its start to its stop.
//!
//! A pool begins with one [`Worker`]; [`WorkerCount`] says when it grows and shrinks. A request that may wait
//! for another one of the same guest gets a thread of its own, so that it occupies no worker. The pool owns
//! all its threads, and [`WorkerPool::stop`] joins them.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use fuse_protocol::ids::Unique;
use rustix::io::Errno;

use super::engine::Engine;
use super::inflight::{InFlight, Popped};
use super::queue::{Queue, QueueError};
use super::watchdog::Watchdog;
use super::worker::Worker;
use super::worker_count::{Action, WorkerCount};
use crate::logging::{Scope, info_limited, warn_limited};
use crate::metrics::Phase;
use crate::server::Server;
use crate::state_file::Resumed;
use crate::sync::blocking::{Hook, HookGuard};
use crate::sync::lock;
use crate::sys::memory;

/// How often a stop repeats its interruption of waits for locks, which may begin at any moment.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(2);

/// How long all workers of a queue may be held by storage before others serve the chains that wait.
const PATIENCE: Duration = Duration::from_millis(500);

/// The same for the others, once storage is known to hang.
const LATER_PATIENCE: Duration = Duration::from_millis(50);

/// Deaths of processes after which a chain is not even decoded to be refused: two have served it.
const MAX_REFUSALS: u32 = 2;

/// The names of these threads begin with this, `q` or `w`, and end with the number of the queue.
const THREAD: &str = "lanefsd-";

/// Whether this thread serves a queue. A panic ends the request or the thread then, and the chain gets its used entry.
pub fn is_thread_of_queue(thread: &Thread) -> bool {
    let name = thread.name().and_then(|name| name.strip_prefix(THREAD));
    let number = name.and_then(|name| name.strip_prefix(['q', 'w']));
    number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What a queue gives the watchdog to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watched {
    Nothing,
    /// All workers serve, and nobody waits for the next kick.
    AllBusy,
    /// Chains wait.
    Backlog,
}

/// A queue, and the threads that serve it until it is stopped.
pub(super) struct WorkerPool {
    queue: Arc<Queue>,
    server: Arc<Server>,
    watchdog: Arc<Watchdog>,
    worker_count: WorkerCount,
    /// Reads and writes data, if threads do not.
    engine: Option<Engine>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    /// In the order of their arrival.
    blocking: Mutex<Vec<BlockingRequest>>,
    /// Requests popped before the watchdog's last check.
    checked_requests: AtomicU64,
    /// Since when the watchdog has found all workers at work, and no chain popped.
    held_since: Mutex<Option<Instant>>,
}

/// A request on a thread of its own.
struct BlockingRequest {
    unique: Unique,
    /// `None` after it was joined. The thread returns a request that was put back.
    thread: Option<JoinHandle<Option<Popped>>>,
    put_back: Option<Popped>,
}

impl WorkerPool {
    /// Starts serving `queue` with one worker that may grow to `limit` (at least one).
    pub fn start(
        queue: Queue,
        server: Arc<Server>,
        watchdog: &Arc<Watchdog>,
        limit: usize,
        engine: Option<Engine>,
    ) -> Result<Arc<WorkerPool>, QueueError> {
        let limit = limit.max(1);
        // One worker serves one request at a time.
        let pool = WorkerPool::new(queue, server, watchdog, limit, engine.filter(|_| limit > 1));
        pool.try_perform(pool.worker_count.spawn_if_allowed())
            .map_err(|source| QueueError::Thread { index: pool.queue.index(), source })?;
        watchdog.add(&pool);
        Ok(pool)
    }

    /// A pool without threads. Its only worker is the caller's.
    pub fn without_threads(queue: Queue, server: Arc<Server>) -> Arc<WorkerPool> {
        WorkerPool::new(queue, server, &Watchdog::disabled(), 1, None)
    }

    fn new(
        queue: Queue,
        server: Arc<Server>,
        watchdog: &Arc<Watchdog>,
        limit: usize,
        engine: Option<Engine>,
    ) -> Arc<WorkerPool> {
        Arc::new(WorkerPool {
            queue: Arc::new(queue),
            server,
            watchdog: Arc::clone(watchdog),
            worker_count: WorkerCount::new(limit),
            engine,
            workers: Mutex::default(),
            blocking: Mutex::default(),
            checked_requests: AtomicU64::new(0),
            held_since: Mutex::default(),
        })
    }

    /// The queue that is served.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The same, for its requests.
    pub fn shared_queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// The server that handles the requests.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The engine, if there is one.
    pub fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }

    /// The number of workers and their states.
    pub fn worker_count(&self) -> &WorkerCount {
        &self.worker_count
    }

    /// Pops no more chains; [`WorkerPool::stop`] is to follow.
    pub fn begin_stop(&self) {
        self.queue.begin_stop();
        self.worker_count.stop();
    }

    /// Stops: no more chains are popped, and requests in flight are finished, except those that wait for
    /// locks. Their chains go back into the ring or, where later ones were completed already, stay in the journal,
    /// so that they are served when the queue starts again. After the return no thread accesses the ring,
    /// and the caller has the last reference.
    pub fn stop(self: &Arc<Self>) {
        self.begin_stop();
        self.watchdog.remove(self);
        self.worker_count.wait_until_empty(INTERRUPT_INTERVAL, || {
            for request in self.blocking().iter().filter(|request| request.is_running()) {
                self.server.put_back(request.unique);
            }
        });
        // Its descriptors have to be free before the queue starts anew: there may be no others.
        let workers = mem::take(&mut *self.workers());
        for worker in workers {
            // A worker that failed has left a message already.
            let _ = worker.join();
        }
        if let Some(engine) = &self.engine {
            engine.stop();
        }
        let blocking = mem::take(&mut *self.blocking());
        let put_back = blocking.into_iter().filter_map(BlockingRequest::join);
        let put_back: Vec<u16> = put_back.map(Popped::into_head).collect();
        self.log_statistics();
        self.queue.put_back(&put_back);
    }

    fn log_statistics(&self) {
        let statistics = self.queue.statistics();
        if statistics.requests > 0 {
            let _scope = Scope::of_queue(self.queue.index()).enter();
            info_limited!(
                "{} requests, {} notifications, {} busy-poll hits",
                statistics.requests,
                statistics.notifications,
                statistics.busy_poll_hits
            );
        }
    }

    /// The watchdog's check: if no chain was popped since the last call, sends the notification that
    /// coalescing held back, and wakes a worker if chains wait. Replaces workers that storage holds. Returns what there is
    /// to watch.
    pub fn check_progress(self: &Arc<Self>) -> Watched {
        let requests = self.queue.statistics().requests;
        let stalls = self.checked_requests.swap(requests, Ordering::Relaxed) == requests;
        let backlog = self.queue.has_backlog();
        if stalls {
            self.queue.flush_coalesced();
            if backlog {
                self.wake_or_spawn();
            }
        }
        let held = self.worker_count.limit() > 1 && self.worker_count.is_saturated();
        self.rescue(held && stalls && backlog);
        match (backlog, held) {
            (true, _) => Watched::Backlog,
            (false, true) => Watched::AllBusy,
            (false, false) => Watched::Nothing,
        }
    }

    /// Replaces workers that storage has held for long while chains wait: all of them, if `held`.
    fn rescue(self: &Arc<Self>, held: bool) {
        let mut since = lock(&self.held_since);
        if !held {
            *since = None;
            return;
        }
        let patience = if self.worker_count.has_stuck() { LATER_PATIENCE } else { PATIENCE };
        if since.get_or_insert_with(Instant::now).elapsed() < patience {
            return;
        }
        *since = None;
        let stuck = self.worker_count.count_stuck();
        let _scope = Scope::of_queue(self.queue.index()).enter();
        warn_limited!("the storage does not answer {stuck} requests: other workers serve the rest");
        self.wake_or_spawn();
    }

    /// Makes the watchdog check the queue until the ring is empty.
    pub fn arm_watchdog(&self) {
        self.watchdog.arm();
    }

    /// Wakes an idle worker or, if there is none, spawns one.
    pub fn wake_or_spawn(self: &Arc<Self>) {
        self.perform(self.worker_count.wake_or_spawn());
    }

    /// Wakes or spawns a worker. Failure is not fatal; the queue is only slower.
    pub fn perform(self: &Arc<Self>, action: Action) {
        if let Err(error) = self.try_perform(action) {
            let _scope = Scope::of_queue(self.queue.index()).enter();
            warn_limited!("cannot start another worker: {error}");
        }
    }

    fn try_perform(self: &Arc<Self>, action: Action) -> io::Result<()> {
        match action {
            Action::Nothing => Ok(()),
            Action::WakeOne => {
                self.queue.wake_one();
                Ok(())
            }
            Action::Spawn => {
                let spawned = self.spawn_worker();
                if spawned.is_err() {
                    self.worker_count.exit();
                }
                spawned
            }
        }
    }

    fn spawn_worker(self: &Arc<Self>) -> io::Result<()> {
        let thread = self.thread("q")?;
        let worker = Worker::new(Arc::clone(self));
        let mut workers = self.workers();
        workers.retain(|worker| !worker.is_finished());
        workers.try_reserve(1).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let scope = Scope::of_queue(self.queue.index());
        let run = move || {
            let _scope = scope.enter();
            worker.run();
        };
        workers.push(thread.spawn(run)?);
        Ok(())
    }

    /// A thread that can be spawned; an error if there is no memory for it.
    fn thread(&self, kind: &str) -> io::Result<thread::Builder> {
        memory::ask_for_a_thread()?;
        Ok(thread::Builder::new().name(format!("{THREAD}{kind}{}", self.queue.index())))
    }

    /// Serves a request on a thread of its own, since it may wait for another one. The request comes back
    /// if there are too many of these, or no thread.
    pub fn spawn_blocking(self: &Arc<Self>, mut request: InFlight) -> Result<(), InFlight> {
        let Ok(thread) = self.thread("w") else { return Err(request) };
        if !self.worker_count.begin_blocking_request() {
            return Err(request);
        }
        request.detach();
        let unique = request.unique();
        // The request stays here until the thread runs: if that cannot be spawned, it is refused.
        let place = Arc::new(Mutex::new(Some(request)));
        let Err(_) = self.try_spawn_blocking(thread, unique, &place) else { return Ok(()) };
        self.worker_count.end_blocking_request();
        lock(&place).take().map_or(Ok(()), Err)
    }

    fn try_spawn_blocking(
        self: &Arc<Self>,
        thread: thread::Builder,
        unique: Unique,
        place: &Arc<Mutex<Option<InFlight>>>,
    ) -> io::Result<()> {
        let (pool, place) = (Arc::clone(self), Arc::clone(place));
        let mut blocking = self.blocking();
        blocking.retain_mut(|request| !request.is_done());
        blocking.try_reserve(1).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let scope = Scope::of_queue(self.queue.index());
        let thread = thread.spawn(move || {
            let _scope = scope.enter();
            let request = lock(&place).take();
            let put_back = request.and_then(|request| pool.serve_blocking(request));
            pool.worker_count.end_blocking_request();
            put_back
        })?;
        blocking.push(BlockingRequest { unique, thread: Some(thread), put_back: None });
        Ok(())
    }

    /// Serves a request that may wait, and returns it if it was put back. (That happens to a request of a
    /// queue that runs only if the guest gave its number to another request, too: then the guest waits.)
    fn serve_blocking(&self, request: InFlight) -> Option<Popped> {
        let waits = Waits { queue: Arc::clone(&self.queue), head: request.head() };
        let _hook = HookGuard::install(Box::new(waits));
        match request.serve_blocking(&self.server) {
            Ok(completion) => {
                completion.add_used();
                None
            }
            Err(popped) => Some(popped),
        }
    }

    /// Serves a chain that a process died with on a thread of its own. `guard` is dropped when it is completed. Without
    /// a thread, the queue's workers serve it.
    pub fn serve_alone(self: &Arc<Self>, chain: Resumed, guard: Sender<()>) {
        let request = match Popped::resumed(&self.queue, chain, guard).decode() {
            Ok(request) => request,
            // The drop adds the used entry.
            Err((error, _completion)) => {
                warn_limited!("{error}");
                return;
            }
        };
        if let Err(request) = self.spawn_blocking(request) {
            request.into_popped().into_head();
            self.queue.journal().mark_alone(chain.head, false);
            self.queue.resume(chain);
        }
    }

    /// Refuses a chain that makes processes fail. One that does so while it is decoded or refused, too, gets an
    /// empty used entry.
    pub fn refuse_poison(&self, chain: Resumed) {
        self.queue.journal().count_poisoned();
        let popped = Popped::resumed(&self.queue, chain, channel().0);
        let completion = if !chain.is_started() || chain.deaths > MAX_REFUSALS {
            popped.give_back_empty()
        } else {
            match popped.decode() {
                Ok(request) => request.refuse(Errno::IO),
                Err((_, completion)) => completion,
            }
        };
        completion.add_used();
    }

    fn workers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        lock(&self.workers)
    }

    fn blocking(&self) -> MutexGuard<'_, Vec<BlockingRequest>> {
        lock(&self.blocking)
    }
}

/// Shows that the request of a thread of its own waits. Nobody takes over: the workers serve other requests.
struct Waits {
    queue: Arc<Queue>,
    head: u16,
}

impl Hook for Waits {
    fn begin_blocking(&self) -> bool {
        self.queue.metrics().set_phase(self.head, Phase::Waiting);
        false
    }

    fn end_blocking(&self, _begun: bool) {
        self.queue.metrics().set_phase(self.head, Phase::Serving);
    }
}

impl BlockingRequest {
    fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Whether it was completed. Joins its thread if that has ended.
    fn is_done(&mut self) -> bool {
        if let Some(thread) = self.thread.take_if(|thread| thread.is_finished()) {
            self.put_back = thread.join().ok().flatten();
        }
        self.thread.is_none() && self.put_back.is_none()
    }

    /// Waits for the end of its thread; the chain, if it was put back.
    fn join(self) -> Option<Popped> {
        // The request of a thread that failed is completed.
        self.put_back.or_else(|| self.thread?.join().ok().flatten())
    }
}
