//! The engine of a queue: reads and writes data by io_uring.
//!
//! A worker begins a READ or WRITE and hands it over ([`Engine::submit`]); a thread of the engine submits it, in one
//! system call with all that came meanwhile, and adds the used entries of all that is completed at once. The request owns
//! what it has locked, so no thread waits for it; many are under way with one thread.
//!
//! Only the engine's thread submits and completes. io_uring ties a request to the thread that has submitted it: it would be
//! completed when that thread leaves its next system call, which may take long, and would interrupt it. The engine's
//! thread makes no other system call that takes long. It is also why a worker that waits for bytes of a request that was
//! submitted always gets them: the thread that ends that request never waits for a worker.
//!
//! The protocol between the two: workers push to `handed_over` and then look whether the thread sleeps, the thread says
//! that it sleeps and then looks whether there is something. A fence between the two steps on either side makes sure that
//! one of them sees the other.
//!
//! Rings are made at the start of the process, before the seccomp filter ([`Stations::new`]). A queue has one while
//! it runs, if there are enough, and leaves it empty: [`Engine::stop`] waits for all that was submitted.

use std::io;
use std::mem::{self, ManuallyDrop};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::error;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::inflight::{Scratch, Submitted};
use super::queue::{Queue, Used};
use crate::fs::transfer::Load;
use crate::logging::{Scope, warn_limited};
use crate::process::cpus;
use crate::sync::lock;
use crate::sys::memory;
use crate::sys::uring::Uring;

/// Requests of one queue that are submitted at once; others wait for them.
const ENTRIES: u32 = 256;
/// Memory of requests that is kept for the next ones.
const MAX_SPARE: usize = 64;
/// READs and WRITEs of one queue that are under way at once, before workers serve them.
const MAX_UNDER_WAY: usize = 512;
/// Rings, at least, if there are as many queues.
const LEAST_RINGS: usize = 4;
/// Before the next attempt, if the kernel does not take what is submitted.
const PAUSE: Duration = Duration::from_millis(1);

const RING: u64 = 0;
const WAKE: u64 = 1;

/// A ring with what its thread waits for, while no queue has it.
struct Station {
    ring: Mutex<Uring>,
    epoll: OwnedFd,
    wake: OwnedFd,
}

/// The rings of a device, for the queues that run first.
#[derive(Clone, Default)]
pub struct Stations(Arc<Mutex<Vec<Arc<Station>>>>);

impl Stations {
    /// Makes rings for this number of request queues, or for fewer: more rings than CPUs gain little, and each takes
    /// descriptors, memory and time at the start.
    pub fn new(queues: usize) -> io::Result<Stations> {
        let count = queues.min(cpus().max(LEAST_RINGS));
        let stations = (0..count).map(|_| Station::new().map(Arc::new)).collect::<io::Result<_>>()?;
        Ok(Stations(Arc::new(Mutex::new(stations))))
    }

    /// The descriptors of the rings that no queue has.
    pub fn rings(&self) -> Vec<RawFd> {
        lock(&self.0).iter().map(|station| lock(&station.ring).fd().as_raw_fd()).collect()
    }

    /// An engine for the queue with this number, if there is a ring for it. The high-priority queue needs none.
    pub(super) fn engine(&self, queue: usize) -> Option<Engine> {
        let station = if queue == 0 { None } else { lock(&self.0).pop() }?;
        let (shared, stations) = (Arc::new(Shared::new(&station)), self.clone());
        Some(Engine { shared, thread: Mutex::default(), stations })
    }
}

impl Station {
    fn new() -> io::Result<Station> {
        let ring = Uring::new(ENTRIES)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, ring.fd(), epoll::EventData::new_u64(RING), edge)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), edge)?;
        Ok(Station { ring: Mutex::new(ring), epoll, wake })
    }
}

/// The engine of one queue.
pub(super) struct Engine {
    shared: Arc<Shared>,
    /// Started by the first request.
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Where its ring belongs.
    stations: Stations,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        lock(&self.stations.0).push(Arc::clone(&self.shared.station));
    }
}

struct Shared {
    station: Arc<Station>,
    handed_over: Mutex<Vec<Submitted>>,
    sleeps: AtomicBool,
    stopping: AtomicBool,
    /// READs and WRITEs that a worker serves, or that are submitted.
    under_way: AtomicUsize,
    spare: Mutex<Vec<Scratch>>,
}

/// A READ or WRITE that is under way.
pub(super) struct UnderWay<'a>(&'a Shared);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// Counts a READ or WRITE, with `waiting` requests behind it, and says whether it is alone. `None` if so many are
    /// under way that the worker has to serve it: a guest must not be able to fill memory with requests.
    pub fn begin(&self, waiting: u32) -> Option<(UnderWay<'_>, Load)> {
        let others = self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        let counted = UnderWay(&self.shared);
        let load = if others == 0 && waiting == 0 { Load::Alone } else { Load::Shared };
        (others < MAX_UNDER_WAY).then_some((counted, load))
    }

    /// Hands a request over that was begun. It comes back if there is no thread for it.
    pub fn submit(
        &self,
        queue: &Arc<Queue>,
        counted: UnderWay<'_>,
        request: Submitted,
    ) -> Result<(), Submitted> {
        if let Err(error) = self.ensure_thread(queue) {
            warn_limited!("cannot start the thread of an engine: {error}");
            return Err(request);
        }
        // It is counted until its end.
        mem::forget(counted);
        let shared = &self.shared;
        lock(&shared.handed_over).push(request);
        // Pairs with the fence in `Thread::sleep`.
        fence(Ordering::SeqCst);
        if shared.sleeps.load(Ordering::Relaxed) && shared.sleeps.swap(false, Ordering::Relaxed) {
            shared.wake();
        }
        Ok(())
    }

    /// Memory of a request that has ended.
    pub fn spare(&self) -> Option<Scratch> {
        lock(&self.shared.spare).pop()
    }

    /// Waits for all that was submitted. No worker submits any more.
    pub fn stop(&self) {
        if let Some(thread) = lock(&self.thread).take() {
            self.shared.stopping.store(true, Ordering::SeqCst);
            self.shared.wake();
            // It ends the process if it fails.
            let _ = thread.join();
        }
        // Each refers to the queue.
        lock(&self.shared.spare).clear();
    }

    fn ensure_thread(&self, queue: &Arc<Queue>) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            memory::ask_for_a_thread()?;
            let (shared, own) = (Arc::clone(&self.shared), Arc::clone(queue));
            let scope = Scope::of_queue(queue.index());
            let run = move || {
                let _scope = scope.enter();
                let _abort = AbortOnPanic;
                let station = Arc::clone(&shared.station);
                let ring = lock(&station.ring);
                // Should it panic, what is in flight stays where it is.
                let mut thread = ManuallyDrop::new(Thread::new(shared, own, ring));
                thread.run();
                drop(ManuallyDrop::into_inner(thread));
            };
            let name = format!("lanefsd-ring{}", queue.index());
            *thread = Some(thread::Builder::new().name(name).spawn(run)?);
        }
        Ok(())
    }
}

impl Shared {
    fn new(station: &Arc<Station>) -> Shared {
        Shared {
            station: Arc::clone(station),
            handed_over: Mutex::default(),
            sleeps: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            spare: Mutex::default(),
        }
    }

    fn wake(&self) {
        // It only fails when the counter is full, and then a wake-up is due anyway.
        let _ = rustix::io::write(&self.station.wake, &1u64.to_ne_bytes());
    }
}

/// What is in flight is the kernel's, and cannot be given up: the process ends, and the next one waits for it.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

/// The engine's thread.
struct Thread<'a> {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    ring: MutexGuard<'a, Uring>,
    /// Requests that wait for room in the ring, the last one first.
    waiting: Vec<Submitted>,
    /// Requests in flight, by their tags.
    in_flight: Vec<Option<Submitted>>,
    free: Vec<usize>,
    /// What this thread is prepared for.
    prepared: Option<u8>,
    completed: Vec<(u64, rustix::io::Result<usize>)>,
    used: Vec<Used>,
}

impl<'a> Thread<'a> {
    fn new(shared: Arc<Shared>, queue: Arc<Queue>, ring: MutexGuard<'a, Uring>) -> Thread<'a> {
        let entries = usize::try_from(ENTRIES).unwrap_or(0);
        Thread {
            shared,
            queue,
            ring,
            waiting: Vec::new(),
            in_flight: (0..entries).map(|_| None).collect(),
            free: (0..entries).rev().collect(),
            prepared: None,
            completed: Vec::new(),
            used: Vec::new(),
        }
    }

    fn run(&mut self) {
        loop {
            self.take_over();
            self.submit();
            self.complete();
            if self.waiting.is_empty() || self.free.is_empty() {
                if self.is_idle() && self.shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                self.sleep();
            }
        }
    }

    /// Whether nothing is left to do.
    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.free.len() == self.in_flight.len()
            && lock(&self.shared.handed_over).is_empty()
    }

    /// Takes what workers have handed over.
    fn take_over(&mut self) {
        let mut new = mem::take(&mut *lock(&self.shared.handed_over));
        if !new.is_empty() {
            new.reverse();
            new.append(&mut self.waiting);
            self.waiting = new;
        }
    }

    /// Submits as many requests as find room.
    fn submit(&mut self) {
        while !self.waiting.is_empty()
            && let Some(tag) = self.free.pop()
        {
            let Some(request) = self.waiting.pop() else { break };
            if let Err(request) = self.push(request, tag) {
                self.free.push(tag);
                self.end(request);
            }
        }
        self.hand_to_kernel();
    }

    /// Puts a request into the ring. It comes back if it is over: it could not even be submitted.
    fn push(&mut self, mut request: Submitted, tag: usize) -> Result<(), Submitted> {
        let Some(parts) = request.parts() else { return Err(request) };
        let preparation = parts.preparation();
        if self.prepared != Some(preparation) {
            // What is in the ring was meant for a thread that is prepared otherwise.
            self.hand_to_kernel();
            if let Err(errno) = parts.prepare() {
                parts.fail(errno);
                return Err(request);
            }
            self.prepared = Some(preparation);
        }
        let (call, data) = parts.call();
        // SAFETY: the request, which has the segments and holds the memory behind them, stays in `in_flight` until
        // it is completed, and this thread does not give that up, also if it fails. There are as many places in
        // there as entries in the ring.
        let pushed = unsafe { self.ring.push(call.file, call.offset, call.flags, data, tag as u64) };
        match pushed {
            Ok(true) => {}
            Ok(false) => parts.fail(Errno::AGAIN),
            Err(errno) => parts.fail(errno),
        }
        if pushed != Ok(true) {
            return Err(request);
        }
        if let Some(place) = self.in_flight.get_mut(tag) {
            *place = Some(request);
        }
        Ok(())
    }

    /// Makes the kernel take all that is in the ring.
    fn hand_to_kernel(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(true) => return,
                Ok(false) | Err(Errno::INTR) => {}
                Err(errno) => {
                    // Memory is short; what is in flight frees some.
                    warn_limited!("the kernel takes no more requests for now: {errno}");
                    self.complete();
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Ends what is completed.
    fn complete(&mut self) {
        let mut completed = mem::take(&mut self.completed);
        self.ring.reap(|done| completed.push((done.tag, done.result)));
        for (tag, result) in completed.drain(..) {
            let Ok(tag) = usize::try_from(tag) else { continue };
            let Some(mut request) = self.in_flight.get_mut(tag).and_then(Option::take) else {
                error!("the kernel has completed request {tag}, which is not in flight");
                continue;
            };
            self.free.push(tag);
            if request.parts().is_none_or(|parts| parts.advance(result)) {
                self.end(request);
            } else {
                self.waiting.push(request);
            }
        }
        self.completed = completed;
        if !self.used.is_empty() {
            self.queue.complete_all(&self.used);
            self.used.clear();
        }
    }

    /// Ends a request; its used entry is added with those of others.
    fn end(&mut self, request: Submitted) {
        let (used, scratch) = request.complete().into_used();
        self.used.push(used);
        let mut spare = lock(&self.shared.spare);
        if spare.len() < MAX_SPARE {
            spare.push(scratch);
        }
        drop(spare);
        drop(UnderWay(&self.shared));
    }

    /// Sleeps until something is handed over or completed.
    fn sleep(&self) {
        let Shared { station, sleeps, handed_over, .. } = &*self.shared;
        sleeps.store(true, Ordering::Relaxed);
        // Pairs with the fence in `Engine::submit`.
        fence(Ordering::SeqCst);
        if lock(handed_over).is_empty() {
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
            match epoll::wait(station.epoll.as_fd(), &mut events[..], None) {
                // What is completed interrupts the thread, too.
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    warn_limited!("the thread of an engine cannot wait: {errno}");
                    thread::sleep(PAUSE);
                }
            }
        }
        sleeps.store(false, Ordering::Relaxed);
    }
}
