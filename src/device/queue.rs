//! A queue that is being served: the ring, and the means by which its workers wait and wake.
//!
//! All idle workers wait on one epoll instance, edge-triggered, so that the kernel wakes exactly
//! one of them for each kick, and at depth 1 the worker that is woken also serves: there is no
//! hand-off. Before a worker serves, it makes sure that somebody else hears the next kick.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, error};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::GuestAddressSpace;

use super::poll::Polling;
use super::ring::{Layout, Ring, RingError};
use super::{GuestMemoryMmap, SharedMemory};
use crate::logging::log_limited;

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

/// What a worker woke up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wakeup {
    /// There may be chains to take.
    Work,
    /// Nothing came for the time that was given.
    Idle,
    /// The queue is stopping.
    Stop,
}

/// A chain that was served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    /// Its first descriptor.
    pub head: u16,
    /// Valid bytes of its device-writable part.
    pub written: u32,
}

/// What [`Queue::advance`] found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    /// First descriptor of the next chain, unchecked.
    pub head: u16,
    /// How many more wait behind it.
    pub waiting: u32,
    /// Whether requests are slow by now. Who holds notifications back and who looks after those that
    /// are held have to go by one and the same answer.
    pub slow: bool,
}

/// How a worker looks at the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It looks again afterwards: the guest need not kick.
    Early,
    /// It sleeps afterwards: the guest has to kick.
    Last,
}

/// What of a queue changes under its lock.
struct State {
    ring: Ring,
    call: Option<Arc<OwnedFd>>,
    /// Chains given back since the guest was last considered for a notification.
    held: u32,
    /// The guest wanted a notification while there was no `call`.
    unannounced: bool,
    /// Moving average of the time that a request takes, in nanoseconds.
    service_time: u32,
    statistics: Statistics,
    /// Set when the guest broke the ring: nothing is taken from it until it is started anew.
    broken: bool,
}

/// Requests and chains that a queue has seen since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Chains taken.
    pub requests: u64,
    /// Notifications sent to the guest.
    pub notifications: u64,
    /// Chains taken by a worker that looked a little longer before it slept ([`Polling`]).
    pub found_by_looking: u64,
}

/// Something that changes with every request, in cache lines of its own.
#[repr(align(128))]
struct Apart<T>(T);

/// A queue from its start to its stop.
pub struct Queue {
    index: usize,
    memory: SharedMemory,
    layout: Layout,
    state: Apart<Mutex<State>>,
    epoll: OwnedFd,
    /// Kept open for `epoll`.
    _kick: OwnedFd,
    help: OwnedFd,
    stop: OwnedFd,
    stopping: AtomicBool,
    polling: Apart<Polling>,
}

/// Index of the high-priority queue.
const HIGH_PRIORITY: usize = 0;
/// How long, in nanoseconds, a notification may be put off while more chains wait.
const HOLD: u32 = 30_000;
/// Most chains that are given back meanwhile.
const MOST_HELD: u32 = 32;
/// A guest takes about so long, in nanoseconds, from a notification to its next request: it has to hear of what
/// was given back while there is still as much to do, or the queue runs empty.
const ANSWER: u32 = 20_000;
/// The least work, in nanoseconds, that is worth a notification while more chains wait.
const WORTH: u32 = 10_000;

/// Requests that take longer than this on average, in nanoseconds, are worth a wake-up each.
const SLOW: u32 = 30_000;
/// The most of a request's time, in nanoseconds, that goes into the average: one that sleeps says nothing of others.
const MOST_COUNTED: u32 = 120_000;

const KICK: u64 = 0;
const HELP: u64 = 1;
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
        let help = eventfd(0, flags).map_err(events)?;
        let stop = eventfd(0, flags).map_err(events)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(events)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &kick, epoll::EventData::new_u64(KICK), edge).map_err(events)?;
        epoll::add(&epoll, &help, epoll::EventData::new_u64(HELP), edge).map_err(events)?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN).map_err(events)?;
        Ok(Queue {
            index,
            memory,
            layout: ring.layout(),
            state: Apart(Mutex::new(State {
                ring,
                call: call.map(Arc::new),
                held: 0,
                unannounced: false,
                service_time: 0,
                statistics: Statistics::default(),
                broken: false,
            })),
            epoll,
            _kick: kick,
            help,
            stop,
            stopping: AtomicBool::new(false),
            polling: Apart(Polling::new(Duration::ZERO)),
        })
    }

    /// The same, whose workers look at the empty ring for `time` before they sleep, where that pays.
    pub fn polled_for(self, time: Duration) -> Queue {
        Queue { polling: Apart(Polling::new(time)), ..self }
    }

    /// Number of the queue; 0 is the high-priority queue.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where the ring is.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The guest's memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// What the queue has seen.
    pub fn statistics(&self) -> Statistics {
        self.lock().statistics
    }

    /// Replaces the eventfd by which the guest is notified. What it was to hear of while there was none
    /// is announced at once.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let notify = {
            let mut state = self.lock();
            state.call = call.map(Arc::new);
            state.announce(false)
        };
        self.notify(notify);
    }

    /// Whether the guest has to hear of something as soon as there is an eventfd for that.
    pub fn owes_notification(&self) -> bool {
        self.lock().unannounced
    }

    /// The guest has to hear of something that was given back before the queue was started anew.
    pub fn announce(&self) {
        let notify = self.lock().announce(true);
        self.notify(notify);
    }

    /// Indices of the next chain and of the next used entry: where a ring stands once the workers are gone.
    pub fn position(&self) -> (u16, u16) {
        let state = self.lock();
        (state.ring.next_available(), state.ring.next_used())
    }

    /// Gives back the chain that was served, if any, and takes the next one. The last request took
    /// `took` nanoseconds. While more chains wait and are served fast, the guest is notified of several
    /// at once; should one of them turn out slow, [`Queue::flush_held`] has to be called.
    pub(super) fn advance(&self, done: Option<Done>, took: Option<u32>) -> Option<Next> {
        let memory = self.memory.memory();
        let (notify, next, service_time) = {
            let mut state = self.lock();
            if let Some(took) = took {
                state.service_time = moved_average(state.service_time, took);
            }
            let given = done.map_or(Ok(()), |done| state.give_back(&memory, done));
            given.unwrap_or_else(|e| self.broke(&mut state, &e));
            // A guest that hears of a reply often sends the next request at once. Without a kick
            // this worker finds it when it looks again; a kick would wake another one.
            let look = if done.is_none() { Look::Last } else { Look::Early };
            let next = self.take(&mut state, &memory, look);
            let time = state.service_time;
            let may_hold = next.is_some_and(|next| may_hold(state.held, next.waiting, time));
            (if may_hold { None } else { self.flush(&mut state, &memory) }, next, time)
        };
        self.notify(notify);
        if next.is_some() || done.is_none() {
            return next;
        }
        self.look_longer(&memory, service_time).or_else(|| self.take(&mut self.lock(), &memory, Look::Last))
    }

    /// Looks for what the guest sends as an answer to the last reply. It answers no FORGETs, and after slow requests
    /// it sleeps, too.
    fn look_longer(&self, memory: &GuestMemoryMmap, service_time: u32) -> Option<Next> {
        if self.index == HIGH_PRIORITY || service_time >= ANSWER {
            return None;
        }
        self.polling.0.look(|| {
            let mut state = self.lock();
            let found = self.take(&mut state, memory, Look::Early)?;
            state.statistics.found_by_looking += 1;
            Some(found)
        })
    }

    /// Takes the next chain, if there is one.
    #[inline]
    fn take(&self, state: &mut State, memory: &GuestMemoryMmap, look: Look) -> Option<Next> {
        if state.broken || self.stopping.load(Ordering::Relaxed) {
            return None;
        }
        state.take(memory, look).unwrap_or_else(|e| {
            self.broke(state, &e);
            None
        })
    }

    /// Notifies the guest of what was given back without its hearing of it.
    pub(super) fn flush_held(&self) {
        let memory = self.memory.memory();
        let notify = {
            let mut state = self.lock();
            if state.held > 0 { self.flush(&mut state, &memory) } else { None }
        };
        self.notify(notify);
    }

    /// Whom to notify of what was given back, if the guest wants that.
    fn flush(&self, state: &mut State, memory: &GuestMemoryMmap) -> Option<Arc<OwnedFd>> {
        state.flush(memory).unwrap_or_else(|e| {
            self.broke(state, &e);
            None
        })
    }

    fn notify(&self, call: Option<Arc<OwnedFd>>) {
        if let Some(call) = call {
            signal(&*call);
        }
    }

    /// Gives back a chain without taking the next one.
    pub(super) fn give_back(&self, done: Done) {
        let memory = self.memory.memory();
        let notify = {
            let mut state = self.lock();
            state.give_back(&memory, done).unwrap_or_else(|e| self.broke(&mut state, &e));
            self.flush(&mut state, &memory)
        };
        self.notify(notify);
    }

    /// Puts chains back that were taken last and not served; returns them if others were taken later.
    pub(super) fn put_back(&self, heads: Vec<u16>) -> Vec<u16> {
        let memory = self.memory.memory();
        if self.lock().ring.put_back(&memory, &heads).unwrap_or(false) { Vec::new() } else { heads }
    }

    /// Whether chains wait that nobody has taken.
    pub(super) fn has_backlog(&self) -> bool {
        let memory = self.memory.memory();
        let state = self.lock();
        !state.broken && state.ring.avail_len(&memory).is_ok_and(|waiting| waiting > 0)
    }

    /// Sleeps until there may be work. Of all sleeping workers a kick wakes one.
    pub(super) fn wait(&self, timeout: Option<Timespec>) -> Wakeup {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let asleep_since = self.polling.0.goes_to_sleep();
        let woken = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref());
        self.polling.0.wakes_up(asleep_since);
        if self.stopping.load(Ordering::SeqCst) {
            return Wakeup::Stop;
        }
        match woken {
            Ok(0) => Wakeup::Idle,
            Ok(_) | Err(Errno::INTR) => Wakeup::Work,
            Err(errno) => {
                error!("queue {}: waiting for kicks failed: {errno}; the queue stops", self.index);
                Wakeup::Stop
            }
        }
    }

    /// Wakes one sleeping worker.
    pub(super) fn call_for_help(&self) {
        signal(&self.help);
    }

    /// Tells all workers to finish what they serve and to take nothing more.
    pub(super) fn begin_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        signal(&self.stop);
    }

    /// Logs that the guest broke the ring, and stops taking chains from it.
    fn broke(&self, state: &mut State, error: &RingError) {
        if !std::mem::replace(&mut state.broken, true) {
            log_limited!(
                Level::Error,
                "queue {}: {error}; it is not served until the guest resets the device",
                self.index
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes the used entry. The guest hears of it with the next [`State::flush`].
    fn give_back(&mut self, memory: &GuestMemoryMmap, done: Done) -> Result<(), RingError> {
        self.held = self.held.saturating_add(1);
        self.ring.add_used(memory, done.head, done.written)
    }

    /// Returns whom to notify of all that was given back, if the guest wants that.
    fn flush(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Arc<OwnedFd>>, RingError> {
        if std::mem::take(&mut self.held) == 0 {
            return Ok(None);
        }
        let wanted = self.ring.needs_notification(memory)?;
        Ok(if wanted { self.announce(true) } else { None })
    }

    /// Whom to notify: of something `new`, or of what was given back while there was nobody. With
    /// EVENT_IDX the guest wants to hear of one entry alone: it would not hear of the next ones either.
    fn announce(&mut self, new: bool) -> Option<Arc<OwnedFd>> {
        let wanted = new || self.unannounced;
        self.unannounced = wanted && self.call.is_none();
        self.statistics.notifications += u64::from(wanted && self.call.is_some());
        if wanted { self.call.clone() } else { None }
    }

    /// Takes a chain. The guest kicks for the next one exactly if none waits behind this one. If
    /// there is none at all, it kicks only if this is the last look before the worker sleeps.
    #[inline]
    fn take(&mut self, memory: &GuestMemoryMmap, look: Look) -> Result<Option<Next>, RingError> {
        // The ring was empty a moment ago: most often this is all that is read of it before the worker sleeps.
        if look == Look::Last && self.ring.has_refused_kicks() && !self.ring.enable_notification(memory)? {
            return Ok(None);
        }
        let mut waiting = self.ring.avail_len(memory)?;
        if waiting == 0 && look == Look::Last && self.ring.enable_notification(memory)? {
            waiting = self.ring.avail_len(memory)?;
        }
        if waiting == 0 {
            if look == Look::Early {
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
        Ok(Some(Next { head, waiting: u32::from(waiting), slow: self.service_time > SLOW }))
    }
}

/// Whether the guest may hear later of the `held` chains that were given back, since `waiting` more follow, which take
/// `each` nanoseconds.
fn may_hold(held: u32, waiting: u32, each: u32) -> bool {
    if waiting == 0 || held >= MOST_HELD {
        return false;
    }
    let (done, left) = (held.saturating_mul(each), waiting.saturating_mul(each));
    done < if left < ANSWER { WORTH } else { HOLD }
}

/// An average with one more value, which has an eighth of the weight.
fn moved_average(average: u32, value: u32) -> u32 {
    average - average / 8 + value.min(MOST_COUNTED) / 8
}

/// Adds one to an eventfd. It only fails when the counter is full, and then somebody is woken anyway.
fn signal(eventfd: impl AsFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_that_sleeps_does_not_make_a_queue_slow() {
        let fast = (0..100).fold(0, |average, _| moved_average(average, 2_000));
        assert!(moved_average(fast, 100_000_000) < ANSWER.min(SLOW));
        assert!((0..100).fold(fast, |average, _| moved_average(average, 200_000)) > SLOW);
    }

    #[test]
    fn notifications_are_held_while_there_is_enough_to_do() {
        // Requests of one microsecond: with many behind them, the guest hears of 30 at once.
        assert!(may_hold(29, 100, 1_000));
        assert!(!may_hold(30, 100, 1_000));
        // With less to do than the guest takes to answer, it hears of ten.
        assert!(may_hold(9, 19, 1_000));
        assert!(!may_hold(10, 19, 1_000));
        assert!(!may_hold(1, 0, 1_000));
        // Slow ones are told of at once, and however fast they are, not more than 32 are held.
        assert!(!may_hold(1, 1, 10_000));
        assert!(!may_hold(1, 100, 30_000));
        assert!(!may_hold(32, 100, 0));
    }
}
