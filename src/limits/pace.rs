//! Rate limits of a share: a virtual schedule (GCRA) for each limit, in memory that several processes may share.
//!
//! A token bucket needs a timer that fills it. A virtual schedule keeps one number instead: the *arrival time* at which
//! the next request would come if all of them came at the rate exactly. A request is admitted if that is not later than
//! now and the burst, and moves it on by what the request costs: its bytes, or one, divided by the rate. Otherwise the
//! arrival time says to the nanosecond when to try again.
//!
//! All requests charge as they pass: one whose cost is more than the burst is admitted like any other, and leaves a debt
//! that the next one waits for. So a WRITE of 1 MiB passes at 1 MiB/s, and a large request of one queue does not starve
//! behind small ones of another, which would use up each bit of the rate before it adds up. In any time `t` no more is
//! admitted than `rate * t`, the burst and one request.
//!
//! Threads and processes meet at the arrival time of each limit alone, which they move by compare-and-exchange. A request
//! is charged to two limits, bytes and operations: if the second one refuses, the first gets back what it was charged. In
//! between, others may wait longer than they had to, and never shorter. All orderings of arrival times are relaxed: nothing
//! else is published by them.
//!
//! `active` says whether there is a limit at all, and is all that a request without limits costs. A process that sets a rate
//! stores the rate, and then its bit. A process that takes the rate back clears the bit, and sets it again if another
//! process has stored a rate meanwhile.

use std::time::Duration;

use crate::sync::{AtomicU64, Ordering};

/// Bit of `active`: nothing is admitted.
const PAUSED: u64 = 1 << 63;
/// Bit of `active`: a group has limits, too.
const IN_GROUP: u64 = 1 << 62;
/// What may come at once, unless something else is said: as much as in this time, in nanoseconds.
const DEFAULT_BURST: u64 = 100_000_000;
const NANOSECONDS: u128 = 1_000_000_000;

/// What is limited, per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Limit {
    /// Bytes of READ.
    ReadBytes,
    /// Bytes of WRITE.
    WriteBytes,
    /// READ requests.
    ReadOps,
    /// WRITE requests.
    WriteOps,
    /// All other requests that are limited.
    MetaOps,
}

impl Limit {
    /// All of them.
    pub const ALL: [Limit; 5] =
        [Limit::ReadBytes, Limit::WriteBytes, Limit::ReadOps, Limit::WriteOps, Limit::MetaOps];

    /// Its name in options.
    pub fn name(self) -> &'static str {
        match self {
            Limit::ReadBytes => "read-bytes",
            Limit::WriteBytes => "write-bytes",
            Limit::ReadOps => "read-ops",
            Limit::WriteOps => "write-ops",
            Limit::MetaOps => "meta-ops",
        }
    }

    fn bit(self) -> u64 {
        1 << self as u32
    }
}

/// What a request is to the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It reads data.
    Read,
    /// It writes data.
    Write,
    /// It does something else.
    Meta,
    /// It gives something back, or begins or ends a session: no rate limits it. A pause ([`Pace::pause`]) holds it, too.
    Free,
}

/// A request is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// When to try again: CLOCK_MONOTONIC in nanoseconds. [`u64::MAX`] while nothing is admitted.
    pub until: u64,
    /// The limit that makes it wait; `None` while nothing is admitted.
    pub limit: Option<Limit>,
}

/// The rate limits of a share. All zero is valid, and means that there are none.
///
/// Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Pace {
    /// A bit for each limit that there is, [`PAUSED`] and [`IN_GROUP`].
    active: AtomicU64,
    /// In nanoseconds, and one more; 0 for [`DEFAULT_BURST`].
    burst: AtomicU64,
    read_bytes: Schedule,
    write_bytes: Schedule,
    read_ops: Schedule,
    write_ops: Schedule,
    meta_ops: Schedule,
}

/// The virtual schedule of one limit.
#[derive(Debug, Default)]
#[repr(C)]
struct Schedule {
    /// Per second; 0 for no limit.
    rate: AtomicU64,
    /// When the next request would come.
    arrival: AtomicU64,
    /// How long queues were held.
    throttled: AtomicU64,
}

impl Pace {
    /// Whether there is a limit, perhaps of a group, or nothing is admitted. A change is seen soon, and not at once.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) != 0
    }

    /// Limits to so much per second, or no more if it is 0. A debt that was made at another rate is forgiven.
    pub fn set_rate(&self, limit: Limit, per_second: u64) {
        let schedule = self.schedule(limit);
        // SeqCst, like what follows: the bit is cleared only where the rate that others may have stored is seen after it.
        if schedule.rate.swap(per_second, Ordering::SeqCst) != per_second {
            schedule.arrival.store(0, Ordering::Relaxed);
        }
        if per_second == 0 {
            self.active.fetch_and(!limit.bit(), Ordering::SeqCst);
            if schedule.rate.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
        self.active.fetch_or(limit.bit(), Ordering::SeqCst);
    }

    /// The limit per second; 0 for none.
    pub fn rate(&self, limit: Limit) -> u64 {
        self.schedule(limit).rate.load(Ordering::Relaxed)
    }

    /// After a pause, as much as in this time may come at once.
    pub fn set_burst(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.burst.store(nanoseconds.saturating_add(1), Ordering::Relaxed);
    }

    /// The same, in nanoseconds.
    fn burst_ns(&self) -> u64 {
        match self.burst.load(Ordering::Relaxed) {
            0 => DEFAULT_BURST,
            set => set - 1,
        }
    }

    /// How much may come at once, as a time.
    pub fn burst(&self) -> Duration {
        Duration::from_nanos(self.burst_ns())
    }

    /// Admits nothing until [`Pace::resume`].
    pub fn pause(&self) {
        self.active.fetch_or(PAUSED, Ordering::SeqCst);
    }

    /// Admits requests again.
    pub fn resume(&self) {
        self.active.fetch_and(!PAUSED, Ordering::SeqCst);
    }

    /// Whether nothing is admitted.
    pub fn is_paused(&self) -> bool {
        self.active.load(Ordering::SeqCst) & PAUSED != 0
    }

    /// Admits a request of `bytes` that comes `now`, and charges it to all limits of its class; or charges nothing, and
    /// says when to try again.
    pub fn admit(&self, now: u64, class: Class, bytes: u64) -> Result<(), Wait> {
        if self.active.load(Ordering::Relaxed) & PAUSED != 0 {
            return Err(Wait { until: u64::MAX, limit: None });
        }
        let (bytes_limit, ops_limit) = match class {
            Class::Read => (Some(Limit::ReadBytes), Limit::ReadOps),
            Class::Write => (Some(Limit::WriteBytes), Limit::WriteOps),
            Class::Meta => (None, Limit::MetaOps),
            Class::Free => return Ok(()),
        };
        let burst = self.burst_ns();
        let wait = |limit| move |until| Wait { until, limit: Some(limit) };
        // Most requests that wait do so for one of the limits, and the other one need not be charged for it.
        let ops = self.schedule(ops_limit);
        ops.check(now, burst).map_err(wait(ops_limit))?;
        let Some(bytes_limit) = bytes_limit else {
            return ops.charge(now, burst, 1).map(drop).map_err(wait(ops_limit));
        };
        let data = self.schedule(bytes_limit);
        let charged = data.charge(now, burst, bytes).map_err(wait(bytes_limit))?;
        ops.charge(now, burst, 1).map(drop).map_err(|until| {
            data.refund(charged);
            Wait { until, limit: Some(ops_limit) }
        })
    }

    /// Takes back the charge of a request that was admitted, and is not after all.
    pub fn refund(&self, class: Class, bytes: u64) {
        let refund = |limit, amount| {
            let schedule = self.schedule(limit);
            match schedule.rate.load(Ordering::Relaxed) {
                0 => {}
                rate => schedule.refund(cost(amount, rate)),
            }
        };
        match class {
            Class::Read => {
                refund(Limit::ReadBytes, bytes);
                refund(Limit::ReadOps, 1);
            }
            Class::Write => {
                refund(Limit::WriteBytes, bytes);
                refund(Limit::WriteOps, 1);
            }
            Class::Meta => refund(Limit::MetaOps, 1),
            Class::Free => {}
        }
    }

    /// The share belongs to a group, whose limits have to be asked as well.
    pub fn join_group(&self) {
        self.active.fetch_or(IN_GROUP, Ordering::SeqCst);
    }

    /// Forgives all debts.
    pub fn forgive(&self) {
        for limit in Limit::ALL {
            self.schedule(limit).arrival.store(0, Ordering::Relaxed);
        }
    }

    /// A queue was held for so many nanoseconds by a limit.
    pub fn add_throttled(&self, limit: Limit, nanoseconds: u64) {
        self.schedule(limit).throttled.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// How long queues were held by a limit; the times of several queues add up.
    pub fn throttled(&self, limit: Limit) -> Duration {
        Duration::from_nanos(self.schedule(limit).throttled.load(Ordering::Relaxed))
    }

    fn schedule(&self, limit: Limit) -> &Schedule {
        match limit {
            Limit::ReadBytes => &self.read_bytes,
            Limit::WriteBytes => &self.write_bytes,
            Limit::ReadOps => &self.read_ops,
            Limit::WriteOps => &self.write_ops,
            Limit::MetaOps => &self.meta_ops,
        }
    }
}

impl Schedule {
    /// Whether a request would be admitted; if not, when.
    fn check(&self, now: u64, burst: u64) -> Result<(), u64> {
        let until = self.arrival.load(Ordering::Relaxed).saturating_sub(burst);
        if self.rate.load(Ordering::Relaxed) == 0 || until <= now { Ok(()) } else { Err(until) }
    }

    /// Charges `amount`, and returns the nanoseconds that it takes; or says when to try again.
    fn charge(&self, now: u64, burst: u64, amount: u64) -> Result<u64, u64> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(0);
        }
        let cost = cost(amount, rate);
        let next = |arrival: u64| {
            (arrival.saturating_sub(burst) <= now).then(|| arrival.max(now).saturating_add(cost))
        };
        let charged = self.arrival.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        charged.map(|_| cost).map_err(|arrival| arrival.saturating_sub(burst))
    }

    /// Takes a charge back. A new rate may have forgiven it meanwhile.
    fn refund(&self, charged: u64) {
        let less = |arrival: u64| Some(arrival.saturating_sub(charged));
        let _ = self.arrival.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// The nanoseconds that `amount` takes, rounded up: never more passes than is allowed.
fn cost(amount: u64, rate: u64) -> u64 {
    let nanoseconds = (u128::from(amount) * NANOSECONDS).div_ceil(u128::from(rate.max(1)));
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "pace/tests.rs"]
mod tests;
