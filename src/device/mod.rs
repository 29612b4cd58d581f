//! The vhost-user device: descriptor chains in, used entries out.
//!
//! [`backend`] speaks vhost-user with the front end; a [`vring`] starts and stops its queue. A [`queue`] is a [`ring`]
//! and the events of its workers. A [`worker_pool`] owns the threads that serve it, each a [`worker`];
//! [`worker_count`] says how many there are. A descriptor chain becomes a request in flight
//! ([`inflight`]): [`chain`] finds its readable and its writable part, and the [`server`](crate::server)
//! handles it; an [`engine`] reads and writes data for it. Before a chain is popped, it is charged
//! to the rate limits ([`charge`]). [`busy_poll`], [`coalesce`] and [`watchdog`] decide when
//! a worker sleeps, when the guest is notified and when a stalled queue gets another worker.
//! [`dirty_log`] records what they write while the guest migrates.
//! [`transfer`] saves and loads the state of the device; with [`postcopy`] memory comes while the guest runs already.
//! After a crash, [`quarantine`] finds the request that caused it. [`inline_queue`] serves a queue without threads, for benchmarks.

pub mod backend;
mod busy_poll;
pub mod chain;
mod charge;
mod coalesce;
pub mod config;
pub mod config_space;
#[cfg(test)]
mod crash_tests;
pub mod dirty_log;
pub mod engine;
mod guest_memory;
mod inflight;
pub mod inline_queue;
mod memory;
pub mod postcopy;
mod probes;
pub mod quarantine;
pub mod queue;
pub mod ring;
#[cfg(test)]
mod test_guest;
mod transfer;
mod vring;
mod watchdog;
mod worker;
mod worker_count;
mod worker_pool;

use vm_memory::GuestMemoryAtomic;

pub use self::guest_memory::GuestMemoryMmap;
pub use self::worker_pool::is_thread_of_queue;

/// The guest's memory as it is now; replaced as a whole when regions come and go, while requests
/// in flight keep the one they began with.
pub type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap>;
