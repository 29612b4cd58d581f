//! What threads meet at in the parts that are checked under every order of their steps. The crate
//! in `tests/loom` builds these parts with loom's doubles in place of the real ones.

pub(crate) use std::sync::atomic::{AtomicU32, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
pub(crate) use std::thread::{Thread, current, park};
