//! A virtqueue from its start to its stop: the ring, and the events that its workers wait for.
//!
//! All idle workers wait on one epoll instance, edge-triggered, so that the kernel wakes exactly
//! one of them for each kick, and at depth 1 the worker that is woken also serves: there is no
//! hand-off. Before a worker serves, it makes sure that another worker waits for the next kick.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, error};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::GuestAddressSpace;

use super::busy_poll::BusyPoll;
use super::coalesce::Coalescing;
use super::ring::{Layout, Ring, RingError};
use super::{GuestMemoryMmap, SharedMemory};
use crate::logging::{Scope, log_limited};

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

/// A used entry.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    /// First descriptor of the chain.
    pub head: u16,
    /// Valid bytes of its device-writable part.
    pub written: u32,
}

/// A chain that was popped.
#[derive(Clone, Copy, Debug)]
pub(super) struct PoppedChain {
    /// Its first descriptor.
    pub head: u16,
    /// The chains behind it.
    pub backlog: Backlog,
}

/// The chains that wait behind one that was popped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// Their number.
    pub waiting: u32,
    /// Whether requests are slow by now. The answer decides both whether a notification is coalesced and
    /// whether the watchdog has to send it, so it is given once.
    pub slow: bool,
}

/// What an attempt to pop does if the ring is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IfEmpty {
    /// The worker tries again: kicks are disabled.
    DisableKicks,
    /// The worker sleeps: the guest has to kick for the next chain.
    EnableKicks,
}

/// The part of a queue that its lock protects.
struct State {
    ring: Ring,
    call: Option<Arc<OwnedFd>>,
    coalescing: Coalescing,
    /// The guest wanted a notification while there was no `call`.
    owes_notification: bool,
    statistics: Statistics,
    /// The guest broke the ring: nothing is popped until the queue starts anew.
    broken: bool,
}

/// Counts since the start of a queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Chains popped.
    pub requests: u64,
    /// Notifications sent to the guest.
    pub notifications: u64,
    /// Chains that a worker popped while it polled the ring before its sleep ([`BusyPoll`]).
    pub busy_poll_hits: u64,
}

/// A value that changes with every request, in cache lines of its own.
#[repr(align(128))]
struct CachePadded<T>(T);

/// A queue from its start to its stop.
pub struct Queue {
    index: usize,
    memory: SharedMemory,
    layout: Layout,
    state: CachePadded<Mutex<State>>,
    epoll: OwnedFd,
    /// Open for `epoll`.
    _kick: OwnedFd,
    wake: OwnedFd,
    stop: OwnedFd,
    stopping: AtomicBool,
    busy_poll: CachePadded<BusyPoll>,
}

/// Index of the high-priority queue.
const HIGH_PRIORITY: usize = 0;

const KICK: u64 = 0;
const WAKE: u64 = 1;
const STOP: u64 = 2;

impl Queue {
    /// A queue over `ring`, woken through `kick`.
    pub fn new(
        index: usize,
        memory: SharedMemory,
        ring: Ring,
        kick: OwnedFd,
        call: Option<OwnedFd>,
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
            state: CachePadded(Mutex::new(State {
                ring,
                call: call.map(Arc::new),
                coalescing: Coalescing::default(),
                owes_notification: false,
                statistics: Statistics::default(),
                broken: false,
            })),
            epoll,
            _kick: kick,
            wake,
            stop,
            stopping: AtomicBool::new(false),
            busy_poll: CachePadded(BusyPoll::new(Duration::ZERO)),
        })
    }

    /// The same queue; its workers poll the empty ring for up to `time` before they sleep, where that pays.
    pub fn with_busy_poll(self, time: Duration) -> Queue {
        Queue { busy_poll: CachePadded(BusyPoll::new(time)), ..self }
    }

    /// Number of the queue; 0 is the high-priority queue.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Addresses and size of the ring.
    pub fn layout(&self) -> Layout {
        self.layout
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
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let notify = {
            let mut state = self.lock();
            state.call = call.map(Arc::new);
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
                state.add_used(&memory, used).unwrap_or_else(|e| self.mark_broken(&mut state, &e));
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
        if popped.is_some() || served.is_none() {
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
            Some(popped)
        })
    }

    /// Pops the next chain, if there is one.
    #[inline]
    fn pop(&self, state: &mut State, memory: &GuestMemoryMmap, if_empty: IfEmpty) -> Option<PoppedChain> {
        if state.broken || self.stopping.load(Ordering::Relaxed) {
            return None;
        }
        state.pop(memory, if_empty).unwrap_or_else(|e| {
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
        let memory = self.memory.memory();
        let notify = {
            let mut state = self.lock();
            state.add_used(&memory, used).unwrap_or_else(|e| self.mark_broken(&mut state, &e));
            self.flush(&mut state, &memory)
        };
        self.notify(notify);
    }

    /// Undoes the pops of chains that were popped last and not served; returns the chains if later ones
    /// were popped, too.
    pub(super) fn put_back(&self, heads: Vec<u16>) -> Vec<u16> {
        let memory = self.memory.memory();
        if self.lock().ring.put_back(&memory, &heads).unwrap_or(false) { Vec::new() } else { heads }
    }

    /// Whether chains wait in the ring.
    pub(super) fn has_backlog(&self) -> bool {
        let memory = self.memory.memory();
        let state = self.lock();
        !state.broken && state.ring.avail_len(&memory).is_ok_and(|waiting| waiting > 0)
    }

    /// Sleeps until there may be work. Of all sleeping workers a kick wakes one.
    pub(super) fn wait(&self, timeout: Option<Timespec>) -> Wakeup {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let asleep_since = self.busy_poll.0.begin_sleep();
        let woken = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref());
        self.busy_poll.0.end_sleep(asleep_since);
        if self.stopping.load(Ordering::SeqCst) {
            return Wakeup::Stop;
        }
        match woken {
            Ok(0) => Wakeup::Idle,
            Ok(_) | Err(Errno::INTR) => Wakeup::Work,
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
        if !std::mem::replace(&mut state.broken, true) {
            let _scope = Scope::of_queue(self.index).enter();
            log_limited!(Level::Error, "{error}; it is not served until the guest resets the device");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All accesses to the ring that serving makes.
impl State {
    /// Adds the used entry. The guest is notified by the next [`State::flush`].
    fn add_used(&mut self, memory: &GuestMemoryMmap, used: Used) -> Result<(), RingError> {
        self.coalescing.add_used();
        self.ring.add_used(memory, used.head, used.written)
    }

    /// Returns the eventfd to signal for the used entries, if the guest wants a notification.
    fn flush(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Arc<OwnedFd>>, RingError> {
        if self.coalescing.take_used() == 0 {
            return Ok(None);
        }
        let wanted = self.ring.needs_notification(memory)?;
        Ok(if wanted { self.notification(true) } else { None })
    }

    /// The eventfd to signal for a `new` notification, or for one that was due without an eventfd. With
    /// EVENT_IDX the guest wants one for a certain entry only: if that is lost, none follows.
    fn notification(&mut self, new: bool) -> Option<Arc<OwnedFd>> {
        let wanted = new || self.owes_notification;
        self.owes_notification = wanted && self.call.is_none();
        self.statistics.notifications += u64::from(wanted && self.call.is_some());
        if wanted { self.call.clone() } else { None }
    }

    /// Pops a chain. The guest kicks for the next one exactly if none waits behind this one.
    #[inline]
    fn pop(&mut self, memory: &GuestMemoryMmap, if_empty: IfEmpty) -> Result<Option<PoppedChain>, RingError> {
        let sleeps = if_empty == IfEmpty::EnableKicks;
        // With EVENT_IDX the ring was empty a moment ago: most often this is all that is read of it before the
        // worker sleeps.
        if sleeps && self.ring.has_refused_kicks() && !self.ring.enable_notification(memory)? {
            return Ok(None);
        }
        let mut waiting = self.ring.avail_len(memory)?;
        if waiting == 0 && sleeps && self.ring.enable_notification(memory)? {
            waiting = self.ring.avail_len(memory)?;
        }
        if waiting == 0 {
            if if_empty == IfEmpty::DisableKicks {
                self.ring.refuse_kicks(memory)?;
            }
            return Ok(None);
        }
        let head = self.ring.pop(memory)?;
        waiting -= 1;
        if waiting > 0 {
            self.ring.disable_notification(memory)?;
        } else if self.ring.enable_notification(memory)? {
            waiting = self.ring.avail_len(memory)?;
        }
        self.statistics.requests += 1;
        let backlog = Backlog { waiting: u32::from(waiting), slow: self.coalescing.is_slow() };
        Ok(Some(PoppedChain { head, backlog }))
    }
}

/// Adds one to an eventfd. It only fails when the counter is full, and then a wake-up is due anyway.
fn signal(eventfd: impl AsFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}
