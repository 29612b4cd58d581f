//! The vhost-user device: descriptor chains in, used entries out.
//!
//! [`backend`] speaks vhost-user with the front end; a [`vring`] starts and stops its queue. A [`queue`] is a [`ring`]
//! and the events of its workers. A [`worker_pool`] owns the threads that serve it, each a [`worker`];
//! [`worker_count`] says how many there are. A descriptor chain becomes a request in flight
//! ([`inflight`]): [`chain`] finds its readable and its writable part, and the [`server`](crate::server)
//! handles it. [`busy_poll`], [`coalesce`] and [`watchdog`] decide when
//! a worker sleeps, when the guest is notified and when a stalled queue gets another worker.
//! [`inline_queue`] serves a queue without threads, for benchmarks.

pub mod backend;
mod busy_poll;
pub mod chain;
mod coalesce;
pub mod config;
pub mod config_space;
pub mod dirty_bitmap;
mod inflight;
pub mod inline_queue;
mod memory;
pub mod queue;
pub mod ring;
mod vring;
mod watchdog;
mod worker;
mod worker_count;
mod worker_pool;

use vm_memory::GuestMemoryAtomic;

use self::dirty_bitmap::DirtyBitmap;

/// Regions of guest memory, each with a bitmap of what was written.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<DirtyBitmap>;

/// The guest's memory as it is now; replaced as a whole when regions come and go, while requests
/// in flight keep the one they began with.
pub type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap>;
