//! The threads that serve a queue.
//!
//! A queue begins with one worker and grows: a worker that is about to serve while nobody sleeps
//! on the queue starts another one, up to the limit. When chains wait and requests are slow, the
//! worker wakes a sleeper at once; when requests are fast, waking costs more than it gains, and
//! only the [`Watch`] wakes one if the queue stands still for a tick.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;
use vm_memory::GuestAddressSpace;

use super::chain::ChainBuffers;
use super::queue::{Done, Next, Queue, QueueError, Wakeup};
use super::watch::Watch;
use crate::logging::{info_limited, warn_limited};
use crate::service::{Scratch, Service};
use crate::sys::memory;

/// Requests that take longer than this on average, in nanoseconds, are worth a wake-up each.
pub(super) const SLOW: u32 = 30_000;
/// How long a worker beyond the residents sleeps before it leaves.
const LINGER: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// Workers that stay for ever: one that serves and one that hears the next kick.
const RESIDENT: usize = 2;
/// Requests of one queue that may wait for locks at once, each on a thread of its own.
const MAX_WAITING: usize = 256;
/// How often a stop repeats its interruption of waits for locks, which may begin at any moment.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(10);

/// A queue, and the threads that serve it until it is stopped.
pub(super) struct Crew {
    queue: Queue,
    service: Arc<Service>,
    watch: Arc<Watch>,
    limit: usize,
    threads: Mutex<Threads>,
    thread_left: Condvar,
    /// Requests taken when the watch looked last.
    seen_by_watch: AtomicU64,
}

/// Threads of a crew.
#[derive(Debug, Default)]
struct Threads {
    workers: usize,
    waiting: usize,
}

/// What a worker keeps from request to request, so that none allocates.
#[derive(Default)]
pub(super) struct Kit {
    chain: ChainBuffers,
    scratch: Scratch,
}

impl Crew {
    /// Starts serving `queue` with one worker that may grow to `limit` (at least one).
    pub fn start(
        queue: Queue,
        service: Arc<Service>,
        watch: &Arc<Watch>,
        limit: usize,
    ) -> Result<Arc<Crew>, QueueError> {
        let crew = Crew::new(queue, service, watch, limit.max(1));
        crew.add_worker().map_err(|source| QueueError::Thread { index: crew.queue.index(), source })?;
        watch.add(&crew);
        Ok(crew)
    }

    /// A crew whose only worker is the caller, by [`Crew::wait_and_serve`].
    pub fn without_workers(queue: Queue, service: Arc<Service>, watch: &Arc<Watch>) -> Arc<Crew> {
        Crew::new(queue, service, watch, 1)
    }

    fn new(queue: Queue, service: Arc<Service>, watch: &Arc<Watch>, limit: usize) -> Arc<Crew> {
        Arc::new(Crew {
            queue,
            service,
            watch: Arc::clone(watch),
            limit,
            threads: Mutex::default(),
            thread_left: Condvar::new(),
            seen_by_watch: AtomicU64::new(0),
        })
    }

    /// Waits for a kick and serves what has come.
    pub fn wait_and_serve(self: &Arc<Self>, kit: &mut Kit) {
        if self.queue.wait(None) == Wakeup::Work {
            self.serve_what_waits(kit);
        }
    }

    /// The queue that is served.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Stops: nothing more is taken, and what is in flight is finished. Nothing touches the ring
    /// after the return, and the caller has the last reference.
    pub fn stop(self: &Arc<Self>) {
        self.queue.begin_stop();
        let mut threads = self.lock();
        while threads.workers > 0 || threads.waiting > 0 {
            if threads.waiting > 0 {
                self.service.interrupt_all();
            }
            let waited = self.thread_left.wait_timeout(threads, INTERRUPT_INTERVAL);
            threads = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(threads);
        // Threads let go of the crew right after they have left. Its descriptors have to be free
        // before the queue is started anew: there may be no others.
        while Arc::strong_count(self) > 1 {
            thread::yield_now();
        }
        let statistics = self.queue.statistics();
        let requests = statistics.requests.load(Ordering::Relaxed);
        if requests > 0 {
            let notifications = statistics.notifications.load(Ordering::Relaxed);
            let found = statistics.found_by_looking.load(Ordering::Relaxed);
            info_limited!(
                "queue {}: {requests} requests, {notifications} notifications, {found} requests found by looking",
                self.queue.index()
            );
        }
    }

    /// Called by the watch: if no chain was taken since the last call, notifies the guest of those
    /// given back, and wakes a worker if chains wait. Returns whether chains wait.
    pub fn check_progress(self: &Arc<Self>) -> bool {
        let requests = self.queue.statistics().requests.load(Ordering::Relaxed);
        let stands_still = self.seen_by_watch.swap(requests, Ordering::Relaxed) == requests;
        let backlog = self.queue.has_backlog();
        if stands_still {
            self.queue.flush_held();
            if backlog {
                self.call_another();
            }
        }
        backlog
    }

    /// Wakes a sleeping worker, or starts one if none sleeps.
    fn call_another(self: &Arc<Self>) {
        if self.queue.idle_workers() > 0 {
            self.queue.call_for_help();
        } else {
            self.grow();
        }
    }

    /// Starts a worker if the limit allows. Failure is no more than slower service.
    fn grow(self: &Arc<Self>) {
        if let Err(error) = self.add_worker() {
            warn_limited!("queue {}: cannot start another worker: {error}", self.queue.index());
        }
    }

    fn add_worker(self: &Arc<Self>) -> std::io::Result<()> {
        {
            let mut threads = self.lock();
            if threads.workers >= self.limit {
                return Ok(());
            }
            threads.workers += 1;
        }
        let crew = Arc::clone(self);
        let name = format!("lanefsd-q{}", self.queue.index());
        // Asked only where a thread is due: at the limit this comes with every request.
        let spawned = memory::ask_for_a_thread().map_err(std::io::Error::from).and_then(|()| {
            thread::Builder::new().name(name).spawn(move || {
                crew.work();
            })
        });
        if spawned.is_err() {
            self.leave(|threads| threads.workers -= 1);
        }
        spawned.map(drop)
    }

    /// A worker's life.
    fn work(self: &Arc<Self>) {
        let mut kit = Kit::default();
        loop {
            self.serve_what_waits(&mut kit);
            let resident = self.lock().workers <= RESIDENT.min(self.limit);
            match self.queue.wait(if resident { None } else { Some(LINGER) }) {
                Wakeup::Work => {}
                Wakeup::Idle if self.lock().workers <= RESIDENT => {}
                Wakeup::Idle | Wakeup::Stop => break,
            }
        }
        self.leave(|threads| threads.workers -= 1);
    }

    /// Serves chains until none waits.
    fn serve_what_waits(self: &Arc<Self>, kit: &mut Kit) {
        let mut done = None;
        let mut begin = Instant::now();
        while let Some(next) = self.queue.advance(done) {
            self.see_to_the_others(next);
            done = self.serve(next.head, kit);
            let end = Instant::now();
            self.queue.note_service_time(u32::try_from((end - begin).as_nanos()).unwrap_or(u32::MAX));
            begin = end;
        }
    }

    /// Makes sure that while this worker serves, somebody hears the next kick, and that chains
    /// which wait already do not wait for this one.
    fn see_to_the_others(self: &Arc<Self>, next: Next) {
        if self.limit > 1 && self.queue.idle_workers() == 0 {
            self.grow();
        }
        if next.waiting > 0 {
            if self.limit > 1 && self.queue.service_time() > SLOW {
                self.call_another();
            } else {
                self.watch.wake();
            }
        }
    }

    /// Serves one chain; `None` if it went to a thread of its own.
    fn serve(self: &Arc<Self>, head: u16, kit: &mut Kit) -> Option<Done> {
        let memory = self.queue.memory().memory();
        let walked = kit.chain.walk(&memory, self.queue.layout(), head);
        let (mut input, output) = match walked {
            Ok(ends) => ends,
            Err(error) => {
                warn_limited!("queue {}: a malformed chain: {error}", self.queue.index());
                return Some(Done { head, written: 0 });
            }
        };
        let Some(header) = Service::read_header(&mut input) else {
            warn_limited!("queue {}: a request without a header", self.queue.index());
            return Some(Done { head, written: 0 });
        };
        let written = if Service::may_wait_for_others(&header) {
            if self.serve_apart(head) {
                return None;
            }
            Service::refuse(&header, output, Errno::NOLCK)
        } else {
            self.service.serve(&header, input, output, &mut kit.scratch)
        };
        Some(Done { head, written })
    }

    /// Serves a chain on a thread of its own, since it may have to wait for another request.
    /// Returns false if there are too many of these already.
    fn serve_apart(self: &Arc<Self>, head: u16) -> bool {
        if memory::ask_for_a_thread().is_err() {
            return false;
        }
        {
            let mut threads = self.lock();
            if threads.waiting >= MAX_WAITING {
                return false;
            }
            threads.waiting += 1;
        }
        let crew = Arc::clone(self);
        let name = format!("lanefsd-w{}", self.queue.index());
        let spawned = thread::Builder::new().name(name).spawn(move || {
            let mut kit = Kit::default();
            let memory = crew.queue.memory().memory();
            // Walked anew, as the segments of the first walk belong to the worker. A guest that
            // has changed the chain meanwhile is served what stands there now.
            let written = match kit.chain.walk(&memory, crew.queue.layout(), head) {
                Ok((mut input, output)) => Service::read_header(&mut input)
                    .map_or(0, |header| crew.service.serve(&header, input, output, &mut kit.scratch)),
                Err(_) => 0,
            };
            crew.queue.give_back(Done { head, written });
            crew.leave(|threads| threads.waiting -= 1);
        });
        if spawned.is_err() {
            self.leave(|threads| threads.waiting -= 1);
        }
        spawned.is_ok()
    }

    fn leave(&self, update: impl FnOnce(&mut Threads)) {
        update(&mut self.lock());
        self.thread_left.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
