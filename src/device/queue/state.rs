//! The part of a queue that its lock protects: the ring, and which chains are popped.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::pacing::Hold;
use crate::device::GuestMemoryMmap;
use crate::device::chain::{self, ChainBuffers};
use crate::device::charge::Charge;
use crate::device::coalesce::Coalescing;
use crate::device::ring::{Ring, RingError};
use crate::metrics::counts::QueueMetrics;
use crate::state_file::{Journal, Resumed};

/// The counts are published when a worker finds no chain, and with every so many requests: more often their cache line
/// would go from CPU to CPU.
const PUBLISHED: u64 = 32;

/// A used entry.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::device) struct Used {
    /// First descriptor of the chain.
    pub head: u16,
    /// Valid bytes of its device-writable part.
    pub written: u32,
}

/// A chain that was popped.
#[derive(Clone, Copy, Debug)]
pub(in crate::device) struct PoppedChain {
    /// Its first descriptor.
    pub head: u16,
    /// The chains behind it.
    pub backlog: Backlog,
    /// What is known of it besides.
    pub origin: Origin,
}

/// Where a chain comes from. One byte of what each pop returns in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Origin {
    /// From the ring.
    Ring,
    /// The same, while a worker polled it.
    Polled,
    /// The same, and it was charged to rate limits: [`Queue::take_charge`](super::Queue::take_charge) says as what.
    Charged,
    /// The chain was popped before the queue started, too: [`Queue::take_resumed`](super::Queue::take_resumed) says what is
    /// known of it.
    Resumed,
}

/// The chains that wait behind one that was popped.
#[derive(Clone, Copy, Debug)]
pub(in crate::device) struct Backlog {
    /// Their number.
    pub waiting: u32,
    /// Whether requests are slow by now. The answer decides both whether a notification is coalesced and
    /// whether the watchdog has to send it, so it is given once.
    pub slow: bool,
}

/// What an attempt to pop does if the ring is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IfEmpty {
    /// The worker tries again: kicks are disabled.
    DisableKicks,
    /// The worker sleeps: the guest has to kick for the next chain.
    EnableKicks,
}

/// Which chains are popped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Those in the ring.
    Ring,
    /// First those that were popped before the queue started.
    Resumed,
    /// None yet.
    Held,
    /// None: the guest broke the ring, until the queue starts anew.
    Broken,
}

/// The part of a queue that its lock protects.
pub(super) struct State {
    pub ring: Ring,
    pub source: Source,
    /// Chains that were popped before the queue started.
    pub resumed: VecDeque<Resumed>,
    /// Those of them that are popped again, until [`Queue::take_resumed`](super::Queue::take_resumed).
    pub popped: Vec<Resumed>,
    pub call: Option<Arc<OwnedFd>>,
    pub coalescing: Coalescing,
    /// The guest wanted a notification while there was no `call`.
    pub owes_notification: bool,
    pub statistics: Statistics,
    /// What others have seen of them.
    published: Statistics,
    pub metrics: QueueMetrics,
    /// The rate limits hold the next chain.
    pub hold: Option<Hold>,
    /// Chains that are popped and were charged to the rate limits, until [`Queue::take_charge`](super::Queue::take_charge).
    pub charges: Vec<(u16, Charge)>,
    /// The next chain, as it was walked for the rate limits.
    pub peeked: ChainBuffers,
}

/// Counts since the start of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Chains popped.
    pub requests: u64,
    /// Notifications sent to the guest.
    pub notifications: u64,
    /// Chains that a worker popped while it polled the ring before its sleep ([`BusyPoll`](crate::device::busy_poll::BusyPoll)).
    pub busy_poll_hits: u64,
}
/// All accesses to the ring that serving makes.
impl State {
    /// A queue over `ring`.
    pub fn new(ring: Ring, call: Option<Arc<OwnedFd>>, metrics: QueueMetrics) -> State {
        State {
            ring,
            source: Source::Ring,
            resumed: VecDeque::new(),
            popped: Vec::new(),
            call,
            coalescing: Coalescing::default(),
            owes_notification: false,
            statistics: Statistics::default(),
            published: Statistics::default(),
            metrics,
            hold: None,
            charges: Vec::new(),
            peeked: ChainBuffers::default(),
        }
    }

    /// Adds the used entry. The guest is notified by the next [`State::flush`].
    pub fn add_used(
        &mut self,
        memory: &GuestMemoryMmap,
        journal: &Journal,
        used: Used,
    ) -> Result<(), RingError> {
        self.coalescing.add_used();
        // Afterwards the guest may use its descriptors for other buffers.
        self.mark_chain(memory, used.head);
        let entry = journal.begin_used_entry(used.head, self.ring.next_used());
        self.ring.add_used(memory, used.head, used.written)?;
        entry.end();
        Ok(())
    }

    /// Records that the chain was written, if writes are recorded.
    #[inline]
    pub fn mark_chain(&self, memory: &GuestMemoryMmap, head: u16) {
        if let Some(log) = self.ring.log() {
            // The reply was written on this thread, or on one that has handed it over.
            fence(Ordering::SeqCst);
            chain::mark_writable(memory, self.ring.layout(), head, log.log());
        }
    }

    /// Returns the eventfd to signal for the used entries, if the guest wants a notification.
    pub fn flush(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Arc<OwnedFd>>, RingError> {
        if self.coalescing.take_used() == 0 {
            return Ok(None);
        }
        let wanted = self.ring.needs_notification(memory)?;
        Ok(if wanted { self.notification(true) } else { None })
    }

    /// The eventfd to signal for a `new` notification, or for one that was due without an eventfd. With
    /// EVENT_IDX the guest wants one for a certain entry only: if that is lost, none follows.
    pub fn notification(&mut self, new: bool) -> Option<Arc<OwnedFd>> {
        let wanted = new || self.owes_notification;
        self.owes_notification = wanted && self.call.is_none();
        self.statistics.notifications += u64::from(wanted && self.call.is_some());
        if wanted { self.call.clone() } else { None }
    }

    /// Lets others see the counts, if they have changed.
    pub fn publish(&mut self) {
        if self.published != self.statistics {
            self.published = self.statistics;
            let Statistics { requests, notifications, busy_poll_hits } = self.statistics;
            self.metrics.publish(requests, notifications, busy_poll_hits);
        }
    }

    /// Pops a chain. The guest kicks for the next one exactly if none waits behind this one.
    // With the second caller that rate limits are, it would not be inlined into the first one.
    #[inline(always)]
    pub fn pop(
        &mut self,
        memory: &GuestMemoryMmap,
        journal: &Journal,
        if_empty: IfEmpty,
    ) -> Result<Option<PoppedChain>, RingError> {
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
        if !journal.take(head) {
            return Err(RingError::InFlight { head });
        }
        waiting -= 1;
        if waiting > 0 {
            self.ring.disable_notification(memory)?;
        } else if self.ring.enable_notification(memory)? {
            waiting = self.ring.avail_len(memory)?;
        }
        self.statistics.requests += 1;
        if self.statistics.requests.is_multiple_of(PUBLISHED) {
            self.publish();
        }
        let backlog = Backlog { waiting: u32::from(waiting), slow: self.coalescing.is_slow() };
        Ok(Some(PoppedChain { head, backlog, origin: Origin::Ring }))
    }

    /// Pops a chain that does not come from the ring, or says that the next one does.
    #[cold]
    pub fn pop_resumed(&mut self, memory: &GuestMemoryMmap) -> ControlFlow<Option<PoppedChain>> {
        if self.source != Source::Resumed {
            return ControlFlow::Break(None);
        }
        let Some(resumed) = self.resumed.pop_front() else {
            self.source = Source::Ring;
            return ControlFlow::Continue(());
        };
        self.statistics.requests += 1;
        // All of them have waited for long.
        let backlog = Backlog { waiting: self.waiting(memory), slow: true };
        self.popped.push(resumed);
        ControlFlow::Break(Some(PoppedChain { head: resumed.head, backlog, origin: Origin::Resumed }))
    }

    /// Number of chains that may be popped.
    pub fn waiting(&self, memory: &GuestMemoryMmap) -> u32 {
        let available = self.ring.avail_len(memory).unwrap_or(0);
        u32::try_from(self.resumed.len()).unwrap_or(u32::MAX).saturating_add(available.into())
    }
}
