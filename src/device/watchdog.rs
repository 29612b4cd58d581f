//! Wakes a worker when a queue with pending requests makes no progress.
//!
//! While requests are fast, a worker that leaves chains in the ring wakes no other one. If one of its requests
//! is slow after all, the rest would wait behind it. So while any queue has a backlog, the watchdog checks
//! every millisecond that the queues make progress. It also sends the notifications that coalescing held
//! back before such a request. Without a backlog it sleeps.
//!
//! Storage may hang, and hold all workers of a queue. Then nobody waits for the next kick. So while all are at work the
//! watchdog looks after the queue, too, less often, and lets other workers serve what waits for long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use super::worker_pool::{Watched, WorkerPool};
use crate::logging::Scope;

/// Time between two checks.
const TICK: Duration = Duration::from_millis(1);
/// The same while there is no backlog, but all workers of some queue are at work.
const SLOW_TICK: Duration = Duration::from_millis(20);
/// Ticks without a backlog after which the watchdog sleeps.
const QUIET_TICKS: u32 = 20;

/// The thread that checks all queues of a device.
pub(super) struct Watchdog {
    armed: AtomicBool,
    shut_down: AtomicBool,
    /// Locked during a check.
    pools: Mutex<Vec<Arc<WorkerPool>>>,
    thread: Mutex<Option<Thread>>,
}

impl Watchdog {
    /// Starts the thread, asleep.
    pub fn start() -> std::io::Result<Arc<Watchdog>> {
        let watchdog = Watchdog::disabled();
        let runner = Arc::clone(&watchdog);
        let scope = Scope::current();
        let run = move || {
            let _scope = scope.enter();
            runner.run();
        };
        let handle = thread::Builder::new().name("lanefsd-watch".into()).spawn(run)?;
        *watchdog.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle.thread().clone());
        Ok(watchdog)
    }

    /// A watchdog without a thread: it never checks.
    pub fn disabled() -> Arc<Watchdog> {
        Arc::new(Watchdog {
            armed: AtomicBool::new(false),
            shut_down: AtomicBool::new(false),
            pools: Mutex::default(),
            thread: Mutex::default(),
        })
    }

    /// Ends the thread.
    pub fn shutdown(&self) {
        self.shut_down.store(true, Ordering::SeqCst);
        self.unpark();
    }

    /// Checks the queue of `pool` until it is removed.
    pub fn add(&self, pool: &Arc<WorkerPool>) {
        self.pools().push(Arc::clone(pool));
    }

    /// Does not check the queue of `pool` any more: after the return the watchdog does not access its ring.
    pub fn remove(&self, pool: &Arc<WorkerPool>) {
        self.pools().retain(|other| !Arc::ptr_eq(other, pool));
    }

    /// Starts the checks: a worker left a backlog and woke no other one.
    pub fn arm(&self) {
        if !self.armed.load(Ordering::Relaxed) && !self.armed.swap(true, Ordering::SeqCst) {
            self.unpark();
        }
    }

    fn unpark(&self) {
        if let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }

    fn run(&self) {
        while !self.shut_down.load(Ordering::SeqCst) {
            if !self.armed.load(Ordering::SeqCst) {
                thread::park();
                continue;
            }
            let (mut tick, mut quiet) = (TICK, 0);
            while quiet < QUIET_TICKS && !self.shut_down.load(Ordering::SeqCst) {
                thread::sleep(tick);
                (tick, quiet) = match self.check_all() {
                    Watched::Backlog => (TICK, 0),
                    Watched::AllBusy => (SLOW_TICK, 0),
                    Watched::Nothing => (TICK, quiet + 1),
                };
            }
            self.armed.store(false, Ordering::SeqCst);
            // A backlog that came before the store has not armed the watchdog.
            if self.check_all() != Watched::Nothing {
                self.armed.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Checks all queues; the most that there is to watch.
    fn check_all(&self) -> Watched {
        self.pools().iter().map(WorkerPool::check_progress).max().unwrap_or(Watched::Nothing)
    }

    fn pools(&self) -> MutexGuard<'_, Vec<Arc<WorkerPool>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
