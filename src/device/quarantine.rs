//! The requests that a worker process died with, served one at a time.
//!
//! A request that makes a process fail would do so again, and each process after it would fail, too. It is found like
//! this: after a death by fault, the requests that were in flight are served alone, before any queue is served
//! otherwise, and the journal marks the one whose turn it is. If a process fails again, the marked one is to blame:
//! the next process refuses it, and serves the others. A process that was killed has no such request; its requests are
//! served alone only if that happens to them twice.
//!
//! Queues start one by one, as the front end's messages come. Each is held until all queues have started that had a
//! request in flight, or until [`PATIENCE`] is over, and their requests are done. That takes [`MAX_TIME`] at most: one
//! that is served then loses its mark, and it and the others are served side by side. Those that may wait for a lock,
//! which others may hold, come last and have [`MAX_WAITS`] together.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fuse_protocol::opcode::Opcode;

use super::worker_pool::WorkerPool;
use crate::logging::{Scope, warn_limited};
use crate::state_file::{Journal, Resumed, StateFile};

/// How long the queues may take to start.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long requests are served alone, all together.
const MAX_TIME: Duration = Duration::from_secs(2);
/// How long one that may wait for a lock is served alone, ...
const MAX_WAIT: Duration = Duration::from_millis(20);
/// ... and all of these together.
const MAX_WAITS: Duration = Duration::from_millis(100);
/// Deaths of processes after which a request may be refused.
const MAX_DEATHS: u32 = 2;

/// How the process before this one ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// By a fault of its own.
    Fault,
    /// By somebody else.
    Kill,
    /// It has made room for another one, after what it had in flight as far as that was done in time.
    Upgrade,
}

impl Death {
    /// The death by this signal.
    pub fn by_signal(signal: i32) -> Death {
        use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
        match signal {
            SIGSEGV | SIGBUS | SIGABRT | SIGSYS | SIGILL | SIGFPE | SIGTRAP => Death::Fault,
            _ => Death::Kill,
        }
    }
}

/// Holds the queues while the requests are served that a process died with.
pub(super) struct Quarantine {
    blames: bool,
    held: Mutex<Held>,
    changed: Condvar,
}

struct Held {
    /// Queues that had a request in flight and have not started.
    awaited: Vec<usize>,
    pools: Vec<Arc<WorkerPool>>,
    suspects: VecDeque<Suspect>,
    /// Those that may wait for a lock.
    waiting: VecDeque<Suspect>,
    is_over: bool,
}

#[derive(Clone, Copy)]
struct Suspect {
    queue: usize,
    chain: Resumed,
}

impl Suspect {
    /// Whether it may wait for a lock.
    fn may_wait(self) -> bool {
        self.chain.opcode == Opcode::Setlkw as u32
    }
}

impl Quarantine {
    /// The quarantine that is due with `state` after this death, if any. The state is recovered.
    pub fn after(death: Option<Death>, state: &StateFile) -> io::Result<Arc<Quarantine>> {
        let unfinished = match death {
            Some(Death::Fault | Death::Kill) => state.unfinished(),
            Some(Death::Upgrade) | None => Vec::new(),
        };
        let is_due =
            death == Some(Death::Fault) || unfinished.iter().any(|(_, deaths)| *deaths >= MAX_DEATHS);
        let awaited: Vec<_> = unfinished.into_iter().filter(|_| is_due).map(|(queue, _)| queue).collect();
        let is_over = awaited.is_empty();
        let quarantine = Arc::new(Quarantine {
            blames: death == Some(Death::Fault),
            held: Mutex::new(Held {
                awaited,
                pools: Vec::new(),
                suspects: VecDeque::new(),
                waiting: VecDeque::new(),
                is_over,
            }),
            changed: Condvar::new(),
        });
        if !is_over {
            let (runner, scope) = (Arc::clone(&quarantine), Scope::current());
            let run = move || {
                let _scope = scope.enter();
                runner.run();
            };
            thread::Builder::new().name("lanefsd-replay".into()).spawn(run)?;
        }
        Ok(quarantine)
    }

    /// Whether queues that start are held, and handed over by [`Quarantine::add`].
    pub fn holds(&self) -> bool {
        !self.held().is_over
    }

    /// A queue has started, and is held.
    pub fn add(&self, pool: &Arc<WorkerPool>) {
        let mut held = self.held();
        if held.is_over {
            pool.queue().release();
            return;
        }
        let queue = pool.queue().index();
        held.awaited.retain(|awaited| *awaited != queue);
        for chain in pool.queue().take_suspects() {
            let suspect = Suspect { queue, chain };
            let place = if suspect.may_wait() { &mut held.waiting } else { &mut held.suspects };
            place.push_back(suspect);
        }
        held.pools.push(Arc::clone(pool));
        self.changed.notify_all();
    }

    /// The queue of a pool is about to stop. After the return nothing is begun for it; what is served alone is in
    /// flight, as anything else.
    pub fn remove(&self, pool: &Arc<WorkerPool>) {
        let mut held = self.held();
        let queue = pool.queue().index();
        held.pools.retain(|other| !Arc::ptr_eq(other, pool));
        held.suspects.retain(|suspect| suspect.queue != queue);
        held.waiting.retain(|suspect| suspect.queue != queue);
    }

    /// All queues have stopped.
    pub fn end(&self) {
        self.held().is_over = true;
        self.changed.notify_all();
    }

    fn run(&self) {
        let deadline = Instant::now() + PATIENCE;
        let (mut time, mut waits) = (MAX_TIME, MAX_WAITS);
        let mut held = self.held();
        while !held.is_over {
            let patience = deadline.saturating_duration_since(Instant::now());
            let all_started = held.awaited.is_empty() || patience.is_zero();
            let next = held.suspects.pop_front();
            let next = next.or_else(|| if all_started { held.waiting.pop_front() } else { None });
            if let Some(suspect) = next {
                let left = if suspect.may_wait() { &mut waits } else { &mut time };
                let served = self.begin(&held, suspect, !left.is_zero());
                drop(held);
                if let Some((served, journal)) = served {
                    let (begun, most) =
                        (Instant::now(), if suspect.may_wait() { MAX_WAIT } else { MAX_TIME });
                    wait(&served, &journal, suspect.chain.head, most.min(*left));
                    *left = left.saturating_sub(begun.elapsed());
                }
                held = self.held();
            } else if all_started {
                held.is_over = true;
                held.pools.drain(..).for_each(|pool| pool.queue().release());
            } else {
                let waited = self.changed.wait_timeout(held, patience);
                held = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        held.pools.clear();
    }

    /// Begins to serve a chain, `alone` or beside others, or refuses it. The receiver says when it is completed.
    fn begin(&self, held: &Held, suspect: Suspect, alone: bool) -> Option<(Receiver<()>, Journal)> {
        let Suspect { queue, chain } = suspect;
        let pool = held.pools.iter().find(|pool| pool.queue().index() == queue)?;
        let journal = pool.queue().journal().clone();
        journal.mark_alone(chain.head, alone);
        let _scope = Scope::of_queue(queue).enter();
        if self.blames && chain.is_poison && chain.deaths >= MAX_DEATHS {
            refuse(pool, chain);
            return None;
        }
        let (guard, served) = channel();
        pool.serve_alone(chain, guard);
        alone.then_some((served, journal))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until a request is completed; one that takes long is not alone any more.
fn wait(served: &Receiver<()>, journal: &Journal, head: u16, time: Duration) {
    if served.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
        journal.mark_alone(head, false);
    }
}

/// Refuses a request that makes processes fail.
fn refuse(pool: &Arc<WorkerPool>, chain: Resumed) {
    let Resumed { unique, opcode, len, deaths, .. } = chain;
    let names = Opcode::ALL.iter().find(|(known, _)| *known as u32 == opcode);
    let name = names.map_or("a request that was not decoded", |(_, name)| name);
    warn_limited!(
        "refused {name} (number {unique}, opcode {opcode}, {len} bytes) with EIO: {deaths} processes failed \
         while they served it, the last one while it served nothing else"
    );
    pool.refuse_poison(chain);
}

#[cfg(test)]
mod tests;
