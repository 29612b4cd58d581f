//! A virtqueue from its start to its stop: the ring, and the events that its workers wait for.
//!
//! All idle workers wait on one epoll instance, edge-triggered, so that the kernel wakes exactly
//! one of them for each kick, and at depth 1 the worker that is woken also serves: there is no
//! hand-off. Before a worker serves, it makes sure that another worker waits for the next kick.

mod pacing;
mod state;

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, error};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::GuestAddressSpace;

use self::pacing::Pacing;
pub use self::state::Statistics;
pub(super) use self::state::{Backlog, Origin, PoppedChain, Used};
use self::state::{IfEmpty, Source, State};
use super::busy_poll::BusyPoll;
use super::dirty_log::QueueLog;
use super::ring::{Layout, Ring, RingError};
use super::{GuestMemoryMmap, SharedMemory};
use crate::logging::{Scope, log_limited};
use crate::metrics::counts::QueueMetrics;
use crate::state_file::{Journal, Resumed};

/// Why a queue cannot be started.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The ring is unusable.
    #[error("queue {index} cannot be started")]
    Ring {
        /// Number of the queue; 0 is the high-priority queue.
        index: usize,
        /// What is wrong with it.
        source: RingError,
    },
    /// The host has no descriptors or memory left, or the kick is no eventfd.
    #[error("queue {index} cannot wait for kicks")]
    Events {
        /// Number of the queue.
        index: usize,
        /// What the system call said.
        source: Errno,
    },
    /// No thread could be made.
    #[error("queue {index} gets no thread")]
    Thread {
        /// Number of the queue.
        index: usize,
        /// What the system call said.
        source: std::io::Error,
    },
}

/// Why a worker woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wakeup {
    /// There may be chains to take.
    Work,
    /// The timeout is over.
    Idle,
    /// The queue is stopping.
    Stop,
}

/// A value that changes with every request, in cache lines of its own.
#[repr(align(128))]
struct CachePadded<T>(T);

/// A queue from its start to its stop.
pub struct Queue {
    index: usize,
    memory: SharedMemory,
    layout: Layout,
    journal: Journal,
    metrics: QueueMetrics,
    state: CachePadded<Mutex<State>>,
    epoll: OwnedFd,
    /// Open for `epoll`.
    _kick: Arc<OwnedFd>,
    wake: OwnedFd,
    stop: OwnedFd,
    stopping: AtomicBool,
    busy_poll: CachePadded<BusyPoll>,
    pacing: Pacing,
}

/// Index of the high-priority queue.
const HIGH_PRIORITY: usize = 0;

const KICK: u64 = 0;
const WAKE: u64 = 1;
const STOP: u64 = 2;

impl Queue {
    /// A queue over `ring`, woken through `kick`. What becomes of its chains stands in `journal`.
    pub fn new(
        index: usize,
        memory: SharedMemory,
        ring: Ring,
        kick: Arc<OwnedFd>,
        call: Option<Arc<OwnedFd>>,
        journal: Journal,
        metrics: QueueMetrics,
    ) -> Result<Queue, QueueError> {
        let events = |source| QueueError::Events { index, source };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(events)?;
        let stop = eventfd(0, flags).map_err(events)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(events)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &kick, epoll::EventData::new_u64(KICK), edge).map_err(events)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), edge).map_err(events)?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN).map_err(events)?;
        Ok(Queue {
            index,
            memory,
            layout: ring.layout(),
            journal,
            state: CachePadded(Mutex::new(State::new(ring, call, metrics.clone()))),
            metrics,
            epoll,
            _kick: kick,
            wake,
            stop,
            stopping: AtomicBool::new(false),
            busy_poll: CachePadded(BusyPoll::new(Duration::ZERO)),
            pacing: Pacing::default(),
        })
    }

    /// The same queue; its workers poll the empty ring for up to `time` before they sleep, where that pays.
    pub fn with_busy_poll(self, time: Duration) -> Queue {
        Queue { busy_poll: CachePadded(BusyPoll::new(time)), ..self }
    }

    /// The same queue, not served yet, which goes on where an earlier one ended: chains whose reply is complete get
    /// their used entries, and the others are popped before those in the ring. If the queue is held, no chain is
    /// popped until [`Queue::release`].
    pub fn resuming(self, chains: Vec<Resumed>, is_held: bool) -> Queue {
        self.mark(&chains);
        for &Resumed { head, written, .. } in &chains {
            if let Some(written) = written {
                self.complete(Used { head, written });
            }
        }
        let mut state = self.lock();
        state.resumed = chains.into_iter().filter(|chain| chain.written.is_none()).collect();
        if state.source == Source::Ring {
            state.source = if is_held { Source::Held } else { Source::Resumed };
        }
        drop(state);
        self
    }

    /// Records that these chains were written, if writes are recorded: a process has died that may have written them, and
    /// they may stay in the journal.
    fn mark(&self, chains: &[Resumed]) {
        let memory = self.memory.memory();
        let state = self.lock();
        chains.iter().for_each(|chain| state.mark_chain(&memory, chain.head));
    }

    /// Records that this chain was written.
    #[cfg(test)]
    pub(super) fn mark_chain(&self, head: u16) {
        self.lock().mark_chain(&self.memory.memory(), head);
    }

    /// Records in this log what the device writes, or no more. After the return, all that was written before is recorded
    /// in the log before.
    pub(super) fn set_log(&self, log: Option<QueueLog>) {
        self.lock().ring.set_log(log);
    }

    /// Chains may be popped.
    pub(super) fn release(&self) {
        {
            let mut state = self.lock();
            if state.source == Source::Held {
                state.source = Source::Resumed;
            }
        }
        self.wake_one();
    }

    /// What the journal knows of a chain that was popped again.
    #[cold]
    pub(super) fn take_resumed(&self, head: u16) -> Option<Box<Resumed>> {
        let mut state = self.lock();
        let place = state.popped.iter().position(|chain| chain.head == head)?;
        Some(Box::new(state.popped.swap_remove(place)))
    }

    /// Takes out the chains that were popped before the queue started and that a worker died with.
    pub(super) fn take_suspects(&self) -> Vec<Resumed> {
        let mut state = self.lock();
        let all = std::mem::take(&mut state.resumed);
        let (suspects, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|chain| chain.deaths > 0);
        state.resumed = others.into();
        suspects
    }

    /// Number of chains that were popped before the queue started and are not popped again.
    #[cfg(test)]
    pub(super) fn resumed_len(&self) -> usize {
        self.lock().resumed.len()
    }

    /// Gives a chain back that was taken out.
    pub(super) fn resume(&self, chain: Resumed) {
        self.lock().resumed.push_back(chain);
    }

    /// Number of the queue; 0 is the high-priority queue.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Addresses and size of the ring.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What becomes of the chains.
    #[inline]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// What is counted of it.
    #[inline]
    pub fn metrics(&self) -> &QueueMetrics {
        &self.metrics
    }

    /// The guest's memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The counts since the start.
    pub fn statistics(&self) -> Statistics {
        self.lock().statistics
    }

    /// Replaces the eventfd that notifies the guest. A notification that was due without one is sent now.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        let notify = {
            let mut state = self.lock();
            state.call = call;
            state.notification(false)
        };
        self.notify(notify);
    }

    /// Whether a notification is due as soon as there is an eventfd.
    pub fn owes_notification(&self) -> bool {
        self.lock().owes_notification
    }

    /// Notifies the guest of entries that were added before the queue started anew.
    pub fn notify_guest(&self) {
        let notify = self.lock().notification(true);
        self.notify(notify);
    }

    /// Indices of the next chain and of the next used entry: the ring's state after the workers have ended.
    pub fn position(&self) -> (u16, u16) {
        let state = self.lock();
        (state.ring.next_available(), state.ring.next_used())
    }

    /// Adds the used entry of the chain that was `served`, if any, and pops the next chain. The time is that
    /// of serving. While more chains wait and are fast, the guest gets one notification for several entries. If
    /// one of these chains is slow after all, [`Queue::flush_coalesced`] has to be called.
    pub(super) fn complete_and_pop(&self, served: Option<(Used, Duration)>) -> Option<PoppedChain> {
        let memory = self.memory.memory();
        let (notify, popped, may_poll) = {
            let mut state = self.lock();
            if let Some((used, service_time)) = served {
                state.coalescing.record(service_time);
                let added = state.add_used(&memory, &self.journal, used);
                added.unwrap_or_else(|e| self.mark_broken(&mut state, &e));
            }
            // A guest often answers a reply with the next request at once. Without a kick this worker
            // finds it at its next attempt; a kick would wake another worker.
            let if_empty = if served.is_none() { IfEmpty::EnableKicks } else { IfEmpty::DisableKicks };
            let popped = self.pop(&mut state, &memory, if_empty);
            let may_coalesce =
                popped.is_some_and(|popped| state.coalescing.may_coalesce(popped.backlog.waiting));
            let notify = if may_coalesce { None } else { self.flush(&mut state, &memory) };
            (notify, popped, state.coalescing.is_faster_than_guest())
        };
        self.notify(notify);
        if popped.is_some() || served.is_none() || self.pacing.is_held() {
            return popped;
        }
        let found = if may_poll { self.busy_poll(&memory) } else { None };
        found.or_else(|| self.pop(&mut self.lock(), &memory, IfEmpty::EnableKicks))
    }

    /// Polls for the guest's answer to the last reply. A guest does not answer a FORGET, and after slow
    /// requests it sleeps, too.
    fn busy_poll(&self, memory: &GuestMemoryMmap) -> Option<PoppedChain> {
        if self.index == HIGH_PRIORITY {
            return None;
        }
        self.busy_poll.0.poll(|| {
            let mut state = self.lock();
            let popped = self.pop(&mut state, memory, IfEmpty::DisableKicks)?;
            state.statistics.busy_poll_hits += 1;
            let is_plain = popped.origin == Origin::Ring;
            Some(PoppedChain { origin: if is_plain { Origin::Polled } else { popped.origin }, ..popped })
        })
    }

    /// Pops the next chain, if there is one.
    #[inline]
    fn pop(&self, state: &mut State, memory: &GuestMemoryMmap, if_empty: IfEmpty) -> Option<PoppedChain> {
        let popped = self.try_pop(state, memory, if_empty);
        if popped.is_none() {
            state.publish();
        }
        popped
    }

    #[inline]
    fn try_pop(&self, state: &mut State, memory: &GuestMemoryMmap, if_empty: IfEmpty) -> Option<PoppedChain> {
        if self.stopping.load(Ordering::Relaxed) {
            return None;
        }
        if state.source != Source::Ring {
            match state.pop_resumed(memory) {
                ControlFlow::Break(popped) => return popped,
                ControlFlow::Continue(()) => {}
            }
        }
        if self.pacing.is_active() {
            return self.pop_paced(state, memory, if_empty);
        }
        state.pop(memory, &self.journal, if_empty).unwrap_or_else(|e| {
            self.mark_broken(state, &e);
            None
        })
    }

    /// Sends the notification that coalescing held back.
    pub(super) fn flush_coalesced(&self) {
        let memory = self.memory.memory();
        let notify = {
            let mut state = self.lock();
            if state.coalescing.has_used() { self.flush(&mut state, &memory) } else { None }
        };
        self.notify(notify);
    }

    /// The eventfd to signal for the used entries, if the guest wants a notification.
    fn flush(&self, state: &mut State, memory: &GuestMemoryMmap) -> Option<Arc<OwnedFd>> {
        state.flush(memory).unwrap_or_else(|e| {
            self.mark_broken(state, &e);
            None
        })
    }

    fn notify(&self, call: Option<Arc<OwnedFd>>) {
        if let Some(call) = call {
            signal(&*call);
        }
    }

    /// Adds the used entry of a chain and pops no other one.
    pub(super) fn complete(&self, used: Used) {
        self.complete_all(&[used]);
    }

    /// The same of several chains, with one notification.
    pub(super) fn complete_all(&self, all: &[Used]) {
        let memory = self.memory.memory();
        let notify = {
            let mut state = self.lock();
            for used in all {
                let added = state.add_used(&memory, &self.journal, *used);
                added.unwrap_or_else(|e| self.mark_broken(&mut state, &e));
            }
            self.flush(&mut state, &memory)
        };
        self.notify(notify);
    }

    /// Undoes the pops of chains that were popped and not served, if no other one was popped after them. If
    /// not, the journal has them.
    pub(super) fn put_back(&self, heads: &[u16]) {
        let memory = self.memory.memory();
        // A ring that cannot be read has broken.
        let _ = self.lock().ring.put_back(&memory, heads);
    }

    /// Whether chains wait for a worker.
    pub(super) fn has_backlog(&self) -> bool {
        let memory = self.memory.memory();
        let state = self.lock();
        match state.source {
            Source::Ring | Source::Resumed => {
                state.waiting(&memory) > 0 && !(state.resumed.is_empty() && self.pacing.holds_now())
            }
            Source::Held | Source::Broken => false,
        }
    }

    /// Sleeps until there may be work. Of all sleeping workers a kick wakes one.
    pub(super) fn wait(&self, timeout: Option<Timespec>) -> Wakeup {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let asleep_since = self.busy_poll.0.begin_sleep();
        let woken = match self.pacing.is_held().then(|| self.begin_hold()).flatten() {
            Some(timer) => self.wait_held(timer),
            None => epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()),
        };
        self.busy_poll.0.end_sleep(asleep_since);
        if self.stopping.load(Ordering::SeqCst) {
            return Wakeup::Stop;
        }
        match woken {
            Ok(0) => Wakeup::Idle,
            Ok(_) | Err(Errno::INTR) => {
                self.metrics.woken();
                Wakeup::Work
            }
            Err(errno) => {
                error!("waiting for kicks failed: {errno}; the queue stops");
                Wakeup::Stop
            }
        }
    }

    /// Wakes one sleeping worker.
    pub(super) fn wake_one(&self) {
        signal(&self.wake);
    }

    /// Makes all workers end after the requests that they serve: they pop no more chains.
    pub(super) fn begin_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        signal(&self.stop);
    }

    /// Logs that the guest broke the ring, and pops no more chains from it.
    fn mark_broken(&self, state: &mut State, error: &RingError) {
        if std::mem::replace(&mut state.source, Source::Broken) != Source::Broken {
            let _scope = Scope::of_queue(self.index).enter();
            log_limited!(Level::Error, "{error}; it is not served until the guest resets the device");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds one to an eventfd. It only fails when the counter is full, and then a wake-up is due anyway.
fn signal(eventfd: impl AsFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}
