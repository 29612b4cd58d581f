//! The quota of byte ranges that a guest's programs have locked.
//!
//! The host's kernel keeps every range of every lock owner in its own memory, which no limit of a process counts.

use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::{Errno, Result};

/// Counts locked ranges, up to a limit.
#[derive(Debug)]
pub struct LockedRangeQuota {
    in_use: AtomicUsize,
    max: usize,
}

impl LockedRangeQuota {
    /// Ranges that one guest may have locked, unless something else is said. The kernel takes some 200 bytes for
    /// each.
    pub const DEFAULT: usize = 1 << 16;

    /// A quota of `max` ranges.
    pub fn new(max: usize) -> LockedRangeQuota {
        LockedRangeQuota { in_use: AtomicUsize::new(0), max }
    }

    /// Counts `ranges` more; ENOLCK, and no change, if these are too many.
    pub fn acquire(&self, ranges: usize) -> Result<()> {
        if self.in_use.fetch_add(ranges, Ordering::Relaxed).saturating_add(ranges) > self.max {
            self.release(ranges);
            return Err(Errno::NOLCK);
        }
        Ok(())
    }

    /// Counts `ranges` more that are locked already, whatever the limit.
    pub fn add(&self, ranges: usize) {
        self.in_use.fetch_add(ranges, Ordering::Relaxed);
    }

    /// Counts `ranges` fewer.
    pub fn release(&self, ranges: usize) {
        self.in_use.fetch_sub(ranges, Ordering::Relaxed);
    }

    /// Ranges that are locked.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }
}

impl Default for LockedRangeQuota {
    fn default() -> LockedRangeQuota {
        LockedRangeQuota::new(LockedRangeQuota::DEFAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_range_is_not_counted() {
        let quota = LockedRangeQuota::new(3);
        quota.acquire(2).unwrap();
        assert_eq!(quota.acquire(2), Err(Errno::NOLCK));
        assert_eq!(quota.in_use(), 2);
        quota.acquire(1).unwrap();
        quota.release(3);
        assert_eq!(quota.in_use(), 0);
    }
}
