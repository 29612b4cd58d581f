//! The quota of memory that open directories keep between a guest's requests.
//!
//! It is a limit of what is kept, and no promise: [`crate::sys::memory`] asks the allocator before anything grows.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts bytes, and says when they are too many.
#[derive(Debug)]
pub struct MemoryQuota {
    in_use: AtomicUsize,
    max: usize,
}

impl MemoryQuota {
    /// Bytes that the directories of one guest may keep, unless something else is said.
    pub const DEFAULT: usize = 64 << 20;

    /// A quota of `max` bytes.
    pub fn new(max: usize) -> MemoryQuota {
        MemoryQuota { in_use: AtomicUsize::new(0), max }
    }

    /// Counts `new` bytes in place of `old` ones.
    pub fn replace(&self, old: usize, new: usize) {
        self.in_use.fetch_add(new, Ordering::Relaxed);
        self.in_use.fetch_sub(old, Ordering::Relaxed);
    }

    /// Whether more is kept than should be.
    pub fn is_exceeded(&self) -> bool {
        self.in_use() > self.max
    }

    /// Bytes that are kept.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }
}

impl Default for MemoryQuota {
    fn default() -> MemoryQuota {
        MemoryQuota::new(MemoryQuota::DEFAULT)
    }
}
