//! The vhost-user device: descriptor chains in, used entries out.
//!
//! [`backend`] speaks vhost-user with the front end; a [`vring`] starts and stops its queue. A [`queue`] is a
//! [`ring`] and the [`worker`]s that serve it, counted by the [`worker_count`]; [`chain`] turns a descriptor chain into the two ends
//! of a request. What a request means is the [`service`](crate::service)'s business. [`by_hand`] serves
//! a queue without threads, for benchmarks.

pub mod backend;
pub mod by_hand;
pub mod chain;
pub mod config_space;
pub mod dirty_bitmap;
mod memory;
mod poll;
pub mod queue;
pub mod ring;
mod vring;
mod watch;
mod worker;
mod worker_count;

use vm_memory::GuestMemoryAtomic;

use self::dirty_bitmap::DirtyBitmap;

/// Regions of guest memory, each with a bitmap of what was written.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<DirtyBitmap>;

/// The guest's memory as it is now; replaced as a whole when regions come and go, while requests
/// in flight keep the one they began with.
pub type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap>;
