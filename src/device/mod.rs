//! The vhost-user device: descriptor chains in, used entries out.
//!
//! [`backend`] speaks vhost-user with the front end and starts and stops queues. A [`queue`] is a [`ring`]
//! and the events of its workers, a [`worker`] serves it, and the [`worker_count`] says how many do.
//! [`chain`] turns a descriptor chain into the readable and the writable part of a request; the
//! [`service`](crate::service) handles the request. [`busy_poll`], [`coalesce`] and [`watchdog`] decide when
//! a worker sleeps, when the guest is notified and when a stalled queue gets another worker.
//! [`inline_queue`] serves a queue without threads, for benchmarks.

pub mod backend;
mod busy_poll;
pub mod chain;
mod coalesce;
pub mod config_space;
pub mod inline_queue;
mod memory;
pub mod queue;
pub mod ring;
mod watchdog;
mod worker;
mod worker_count;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory as it is now; replaced as a whole when regions come and go, while requests
/// in flight keep the one they began with.
pub type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap>;
