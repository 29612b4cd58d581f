//! The parts of lanefsd where threads meet, built with loom's locks instead of the real ones.
//! `tests/orders.rs` runs them under every order of their steps.

pub use lanefsd::fs;

#[path = "../../../src/fs/passthrough/inode/io_mode.rs"]
pub mod io_mode;
#[path = "../../../src/limits/pace.rs"]
pub mod pace;
#[path = "../../../src/fs/passthrough/inode/range_lock.rs"]
pub mod range_lock;
#[path = "../../../src/server/session_lock.rs"]
pub mod session_lock;
#[path = "../../../src/device/worker_count.rs"]
pub mod worker_count;

/// The doubles of `src/sync.rs`.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use loom::thread::{Thread, current, park, yield_now as pause};
    pub(crate) use std::sync::PoisonError;

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No thread stands in for another one: the models that need that say so themselves.
    pub(crate) fn block_in_place<T>(wait: impl FnOnce() -> T) -> T {
        wait()
    }
}
