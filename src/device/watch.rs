//! Looks after queues whose workers did not call for help.
//!
//! While requests are fast, a worker with a backlog wakes nobody. Should one of its requests then
//! take long after all, the rest would wait behind it: so as long as there is a backlog anywhere,
//! the watch checks every millisecond that queues get on. It also sends the notifications that were
//! put off until after such a request. Without a backlog it sleeps.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use super::worker::Crew;
use crate::logging::Scope;

/// How often queues with a backlog are looked at.
const TICK: Duration = Duration::from_millis(1);
/// Ticks without a backlog after which the watch sleeps.
const QUIET_TICKS: u32 = 20;

/// The thread that watches over all queues of a device.
pub(super) struct Watch {
    awake: AtomicBool,
    over: AtomicBool,
    /// Held while they are looked at.
    crews: Mutex<Vec<Arc<Crew>>>,
    thread: Mutex<Option<Thread>>,
}

impl Watch {
    /// Starts the thread, asleep.
    pub fn start() -> std::io::Result<Arc<Watch>> {
        let watch = Watch::nobody();
        let watcher = Arc::clone(&watch);
        let scope = Scope::current();
        let run = move || {
            let _scope = scope.enter();
            watcher.run();
        };
        let handle = thread::Builder::new().name("lanefsd-watch".into()).spawn(run)?;
        *watch.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle.thread().clone());
        Ok(watch)
    }

    /// A watch without a thread.
    pub fn nobody() -> Arc<Watch> {
        Arc::new(Watch {
            awake: AtomicBool::new(false),
            over: AtomicBool::new(false),
            crews: Mutex::default(),
            thread: Mutex::default(),
        })
    }

    /// Ends the thread.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.unpark();
    }

    /// Watches over `crew` until it is removed.
    pub fn add(&self, crew: &Arc<Crew>) {
        self.crews().push(Arc::clone(crew));
    }

    /// Watches over `crew` no more: after the return the watch does not touch its ring.
    pub fn remove(&self, crew: &Arc<Crew>) {
        self.crews().retain(|other| !Arc::ptr_eq(other, crew));
    }

    /// There is a backlog that nobody was called for.
    pub fn wake(&self) {
        if !self.awake.load(Ordering::Relaxed) && !self.awake.swap(true, Ordering::SeqCst) {
            self.unpark();
        }
    }

    fn unpark(&self) {
        if let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }

    fn run(&self) {
        while !self.over.load(Ordering::SeqCst) {
            if !self.awake.load(Ordering::SeqCst) {
                thread::park();
                continue;
            }
            let mut quiet = 0;
            while quiet < QUIET_TICKS && !self.over.load(Ordering::SeqCst) {
                thread::sleep(TICK);
                quiet = if self.check_all() { 0 } else { quiet + 1 };
            }
            self.awake.store(false, Ordering::SeqCst);
            // A backlog that came before the store called in vain.
            if self.check_all() {
                self.awake.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Whether any queue has a backlog.
    fn check_all(&self) -> bool {
        self.crews().iter().filter(|crew| crew.check_progress()).count() > 0
    }

    fn crews(&self) -> MutexGuard<'_, Vec<Arc<Crew>>> {
        self.crews.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
