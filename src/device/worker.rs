//! A worker: a thread that pops chains, serves them and sleeps in between.
//!
//! A worker that is about to serve while no other one is idle starts another one, up to the pool's limit:
//! there has to be a listener for the next kick. When chains wait and requests are slow, the worker wakes an
//! idle one at once. When requests are fast, a wake-up costs more than it gains, and only the
//! [watchdog](super::watchdog) wakes a worker, if the queue makes no progress for a tick.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::io::Errno;

use super::engine::Engine;
use super::inflight::{Completion, InFlight, Popped, Scratch, Submitted};
use super::queue::{Backlog, Wakeup};
use super::worker_count::{Action, Parked};
use super::worker_pool::WorkerPool;
use crate::logging::warn_limited;
use crate::metrics::Phase;
use crate::server::Class;
use crate::sync::blocking::{Hook, HookGuard, take_blocked};

/// How long a worker is idle or parked before it exits.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Workers of all queues that are replaced at once while they are blocked: each is a thread, and the
/// host has only so many.
const MAX_BLOCKED: usize = 1024;

/// Workers that are blocked and replaced.
static BLOCKED: AtomicUsize = AtomicUsize::new(0);

/// A worker of a pool.
pub(super) struct Worker {
    pool: Arc<WorkerPool>,
    /// The first descriptor of the chain that it serves.
    head: Arc<AtomicU16>,
}

impl Worker {
    /// A worker of `pool`, which counts it already.
    pub fn new(pool: Arc<WorkerPool>) -> Worker {
        Worker { pool, head: Arc::default() }
    }

    /// Memory for the worker's requests.
    pub fn scratch(&self) -> Scratch {
        let spare = self.pool.engine().and_then(Engine::spare);
        spare.unwrap_or_else(|| Scratch::new(self.pool.shared_queue()))
    }

    /// Serves the queue until it stops, or until the worker is not needed any more.
    pub fn run(self) {
        let _hook = HookGuard::install(Box::new(Replacement {
            pool: Arc::clone(&self.pool),
            head: Arc::clone(&self.head),
        }));
        let count = self.pool.worker_count();
        let _counted = self.pool.queue().metrics().count_worker();
        let mut scratch = self.scratch();
        loop {
            match self.process_queue(scratch) {
                Some(vacant) => scratch = vacant,
                None => return,
            }
            let keep_alive = Timespec { tv_sec: KEEP_ALIVE.as_secs().cast_signed(), tv_nsec: 0 };
            match self.sleep(if count.is_at_core_size() { None } else { Some(keep_alive) }) {
                Wakeup::Work => {}
                Wakeup::Idle if count.try_exit() => return,
                Wakeup::Idle => {}
                Wakeup::Stop => break,
            }
        }
        count.exit();
    }

    /// Waits for a kick and serves the chains that have come. Returns the scratch memory, unless the worker
    /// exits.
    pub fn process_kick(&self, scratch: Scratch) -> Option<Scratch> {
        if self.sleep(None) == Wakeup::Work { self.process_queue(scratch) } else { Some(scratch) }
    }

    fn sleep(&self, timeout: Option<Timespec>) -> Wakeup {
        let count = self.pool.worker_count();
        count.begin_idle();
        let wakeup = self.pool.queue().wait(timeout);
        count.end_idle();
        wakeup
    }

    /// Serves chains until the ring is empty. Returns the scratch memory, unless the worker exits.
    fn process_queue(&self, scratch: Scratch) -> Option<Scratch> {
        let mut found = scratch.pop();
        loop {
            let (popped, backlog) = match found {
                Ok(found) => found,
                Err(scratch) => return Some(scratch),
            };
            self.ensure_listener(backlog);
            let count = self.pool.worker_count();
            let rescues = count.rescues();
            let completion = self.serve(popped, backlog);
            let was_replaced = take_blocked() | count.end_stuck(rescues);
            found = if was_replaced && count.is_over_limit() {
                let scratch = completion.map(Completion::add_used);
                if self.park() == Parked::Exit {
                    return None;
                }
                scratch.unwrap_or_else(|| self.scratch()).pop()
            } else {
                match completion {
                    Some(completion) => completion.pop_next(),
                    None => self.scratch().pop(),
                }
            };
        }
    }

    /// Parks the worker, which is one too many. Other workers serve the chains that wait.
    fn park(&self) -> Parked {
        let pool = &self.pool;
        if pool.queue().has_backlog() {
            pool.wake_or_spawn();
        }
        pool.worker_count().park(KEEP_ALIVE)
    }

    /// Makes sure that while this worker serves, another one waits for the next kick, and that chains
    /// in the ring do not wait for this request.
    fn ensure_listener(&self, backlog: Backlog) {
        let (pool, count) = (&self.pool, self.pool.worker_count());
        let may_grow = count.limit() > 1;
        if may_grow && count.idle() == 0 {
            match count.spawn_if_allowed() {
                // Storage may hang, and then nobody is left who would find out.
                Action::Nothing => pool.arm_watchdog(),
                action => pool.perform(action),
            }
        }
        if backlog.waiting > 0 {
            if may_grow && backlog.slow {
                pool.wake_or_spawn();
            } else {
                pool.arm_watchdog();
            }
        }
    }

    /// Serves one chain; `None` if its request went to a thread of its own or to the engine.
    fn serve(&self, popped: Popped, backlog: Backlog) -> Option<Completion> {
        self.head.store(popped.head(), Ordering::Relaxed);
        let request = match popped.decode() {
            Ok(request) => request,
            Err((error, completion)) => {
                warn_limited!("{error}");
                return Some(completion);
            }
        };
        match request.class() {
            Class::Inline => Some(request.serve(self.pool.server())),
            Class::Transfer => self.transfer(request, backlog),
            Class::Blocking => self.spawn_blocking(request),
        }
    }

    /// Serves a READ or WRITE; `None` if it went to the engine.
    fn transfer(&self, request: InFlight, backlog: Backlog) -> Option<Completion> {
        let pool = &self.pool;
        let engine = pool.engine().filter(|_| pool.server().may_begin());
        let begun = engine.and_then(|engine| Some((engine, engine.begin(backlog.waiting)?)));
        let Some((engine, (counted, load))) = begun else { return Some(request.serve(pool.server())) };
        match request.serve_or_submit(pool.server(), load) {
            Ok(completion) => Some(completion),
            Err(submitted) => {
                let back = engine.submit(pool.shared_queue(), counted, submitted);
                back.err().map(Submitted::finish_here)
            }
        }
    }

    /// Serves a request on a thread of its own, or refuses it if there are too many of these.
    fn spawn_blocking(&self, request: InFlight) -> Option<Completion> {
        self.pool.spawn_blocking(request).err().map(|request| request.refuse(Errno::NOLCK))
    }
}

/// Replaces its worker while that is blocked.
struct Replacement {
    pool: Arc<WorkerPool>,
    /// The chain that its worker serves.
    head: Arc<AtomicU16>,
}

impl Replacement {
    fn set_phase(&self, phase: Phase) {
        self.pool.queue().metrics().set_phase(self.head.load(Ordering::Relaxed), phase);
    }
}

impl Hook for Replacement {
    fn begin_blocking(&self) -> bool {
        self.set_phase(Phase::Waiting);
        if BLOCKED.fetch_add(1, Ordering::Relaxed) < MAX_BLOCKED
            && let Some(action) = self.pool.worker_count().begin_blocking()
        {
            self.pool.perform(action);
            return true;
        }
        BLOCKED.fetch_sub(1, Ordering::Relaxed);
        false
    }

    fn end_blocking(&self, begun: bool) {
        self.set_phase(Phase::Serving);
        if begun {
            self.pool.worker_count().end_blocking();
            BLOCKED.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
