//! The parts of lanefsd where threads meet, built with loom's locks instead of the real ones.
//! `tests/orders.rs` runs them under every order of their steps.

pub use lanefsd::{config, fuse};

#[path = "../../../src/fs/passthrough/io_mode.rs"]
pub mod io_mode;
#[path = "../../../src/fs/passthrough/range_lock.rs"]
pub mod range_lock;

/// The doubles of `src/sync.rs`.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    pub(crate) use loom::thread::{Thread, current, park};
    pub(crate) use std::sync::PoisonError;
}
