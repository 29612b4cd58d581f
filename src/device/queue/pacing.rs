//! Rate limits of a queue: a chain is popped when the limits admit it, and stays in the ring until then.
//!
//! The next chain is walked and charged under the queue's lock, before the pop. If the limits do not admit it, the queue is
//! *held*: nothing is popped, and the worker that finds that sleeps exactly until it may be. One worker is enough: it
//! leaves the end of its sleep in `timer`, and others that go to sleep meanwhile wait for kicks only. A worker that was
//! kicked, or has finished a request, tries again and may find that the queue is not held any more.
//!
//! Other processes change the limits, and nothing says that they did. So no sleep is longer than [`POLL`]. A worker
//! that finds no limits any more ends the hold and tries again. A queue that is held has no backlog for the watchdog:
//! no worker could do anything about it. When its time has come and no worker has taken the chain, it has one again.
//!
//! The high-priority queue has no limits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Result;

use super::state::{IfEmpty, Origin, PoppedChain, State};
use super::{HIGH_PRIORITY, Queue};
use crate::device::GuestMemoryMmap;
use crate::device::charge::Charge;
use crate::device::ring::RingError;
use crate::limits::{PaceHandle, Wait};
use crate::sys::clock::monotonic;
use crate::sys::epoll;

/// Longest sleep of a worker whose queue is held, in nanoseconds: nothing wakes it when a limit is lifted.
const POLL: u64 = 40_000_000;

/// The limits of a queue, and until when they hold it.
#[derive(Debug, Default)]
pub(super) struct Pacing {
    pace: PaceHandle,
    group: Option<PaceHandle>,
    /// When the next chain may be popped; 0 if the queue is not held. Set under the queue's lock. It may stay behind after
    /// the limits were lifted, until a worker goes to sleep.
    held_until: AtomicU64,
    /// When the worker wakes up that sleeps until then; 0 if there is none.
    timer: AtomicU64,
}

/// Since when a queue is held, and by which limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    /// The time since is not counted as throttled yet.
    since: u64,
    wait: Wait,
}

/// The end of a sleep: its time, and how long it takes from now on.
pub(super) struct Timer {
    wake: u64,
    timeout: Duration,
}

impl Pacing {
    /// Whether there is a limit.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.pace.is_active()
    }

    /// Whether the queue is held, or was when there was a limit.
    #[inline]
    pub fn is_held(&self) -> bool {
        self.held_until.load(Ordering::SeqCst) != 0
    }

    /// Whether no chain may be popped at this moment.
    pub fn holds_now(&self) -> bool {
        self.is_held() && self.is_active() && self.held_until.load(Ordering::SeqCst) > monotonic()
    }

    /// Charges the limits of the share and of its group, or none of them.
    fn admit(&self, now: u64, charge: Charge) -> std::result::Result<(), Wait> {
        let (class, bytes) = (charge.class(), charge.bytes().into());
        self.pace.admit(now, class, bytes)?;
        let admitted = self.group.as_ref().map_or(Ok(()), |group| group.admit(now, class, bytes));
        admitted.inspect_err(|_| self.pace.refund(class, bytes))
    }

    /// Counts the time for which the queue was held, and holds it for another `wait`, or no more.
    fn hold(&self, hold: &mut Option<Hold>, now: u64, wait: Option<Wait>) {
        if let Some(Hold { since, wait: Wait { until, limit: Some(limit) } }) = *hold {
            self.pace.add_throttled(limit, now.min(until).saturating_sub(since));
        }
        *hold = wait.map(|wait| Hold { since: now, wait });
        self.held_until.store(wait.map_or(0, |wait| wait.until), Ordering::SeqCst);
    }
}

impl Queue {
    /// The same queue; its chains are popped as `pace` and its `group` admit them, unless it is the high-priority queue.
    pub fn paced_by(self, pace: &PaceHandle, group: Option<&PaceHandle>) -> Queue {
        if self.index == HIGH_PRIORITY {
            return self;
        }
        if group.is_some() {
            pace.join_group();
        }
        Queue { pacing: Pacing { pace: pace.clone(), group: group.cloned(), ..Pacing::default() }, ..self }
    }

    /// What a chain was charged as.
    #[cold]
    #[inline(never)]
    pub(in crate::device) fn take_charge(&self, head: u16) -> Option<Charge> {
        let mut state = self.lock();
        let place = state.charges.iter().position(|(charged, _)| *charged == head)?;
        Some(state.charges.swap_remove(place).1)
    }

    /// Pops the next chain if the limits admit it, and charges it.
    #[cold]
    #[inline(never)]
    pub(super) fn pop_paced(
        &self,
        state: &mut State,
        memory: &GuestMemoryMmap,
        if_empty: IfEmpty,
    ) -> Option<PoppedChain> {
        let popped = self.charge_next(state, memory, if_empty).and_then(|charge| {
            let Some(charge) = charge else { return Ok(None) };
            let popped = state.pop(memory, &self.journal, if_empty)?;
            Ok(popped.map(|popped| {
                state.charges.push((popped.head, charge));
                PoppedChain { origin: Origin::Charged, ..popped }
            }))
        });
        popped.unwrap_or_else(|e| {
            self.mark_broken(state, &e);
            None
        })
    }

    /// Charges the next chain; `None` if there is none, or the limits do not admit it.
    fn charge_next(
        &self,
        state: &mut State,
        memory: &GuestMemoryMmap,
        if_empty: IfEmpty,
    ) -> std::result::Result<Option<Charge>, RingError> {
        let mut waiting = state.ring.avail_len(memory)?;
        if waiting == 0 {
            // As in `State::pop`, which would take a chain that comes only now without a charge.
            match if_empty {
                IfEmpty::DisableKicks => state.ring.refuse_kicks(memory)?,
                IfEmpty::EnableKicks if state.ring.enable_notification(memory)? => {
                    waiting = state.ring.avail_len(memory)?;
                }
                IfEmpty::EnableKicks => {}
            }
        }
        if waiting == 0 {
            self.pacing.hold(&mut state.hold, monotonic(), None);
            return Ok(None);
        }
        let head = state.ring.peek(memory)?;
        let layout = state.ring.layout();
        // One that cannot be walked is refused after the pop, and so is one that can be walked only then.
        let charge = match state.peeked.peek(memory, layout, head) {
            Ok((input, output)) => Charge::of_chain(&input, &output),
            Err(_) => Charge::Nothing,
        };
        let now = monotonic();
        let admitted = self.pacing.admit(now, charge);
        self.pacing.hold(&mut state.hold, now, admitted.err());
        if admitted.is_err() {
            // A kick would wake a worker that may pop nothing.
            state.ring.disable_notification(memory)?;
            return Ok(None);
        }
        Ok(Some(charge))
    }

    /// The end of the sleep of the calling worker, whose queue is held; `None` if another worker wakes up in time.
    #[cold]
    pub(super) fn begin_hold(&self) -> Option<Timer> {
        let Pacing { held_until, timer, .. } = &self.pacing;
        let (until, now) = (held_until.load(Ordering::SeqCst), monotonic());
        if !self.pacing.is_active() {
            // The worker tries again after this, and holds the queue once more if there are limits again.
            self.pacing.hold(&mut self.lock().hold, now, None);
            return Some(Timer { wake: 0, timeout: Duration::ZERO });
        }
        let wake = until.min(now.saturating_add(POLL));
        let other = timer.load(Ordering::SeqCst);
        if until == 0 || (other != 0 && other <= wake) {
            return None;
        }
        let taken = timer.compare_exchange(other, wake, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        taken.then(|| Timer { wake, timeout: Duration::from_nanos(wake.saturating_sub(now)) })
    }

    /// Sleeps until then, or a kick. It counts as an event, after which the worker tries again.
    #[cold]
    pub(super) fn wait_held(&self, end: Timer) -> Result<usize> {
        let woken = epoll::wait(&self.epoll, end.timeout);
        // Another worker may have an earlier one by now.
        let timer = &self.pacing.timer;
        let _ = timer.compare_exchange(end.wake, 0, Ordering::SeqCst, Ordering::SeqCst);
        woken.map(|_| 1)
    }
}

#[cfg(test)]
mod tests;
