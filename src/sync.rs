//! What threads meet at in the parts that are checked under every order of their steps. The crate
//! in `tests/loom` builds these parts with loom's doubles in place of the real ones.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use std::thread::{Thread, current, park};

pub(crate) use crate::blocking::block_in_place;
