//! What threads meet at in the parts that are checked under every order of their steps. The crate
//! in `testing/loom` builds these parts with loom's doubles in place of the real ones.

pub mod blocking;

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use std::thread::{Thread, current, park};

pub(crate) use self::blocking::block_in_place;

/// Locks what is consistent at any time, also after a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits a millisecond, between two polls of what another thread does.
pub(crate) fn pause() {
    std::thread::sleep(std::time::Duration::from_millis(1));
}
