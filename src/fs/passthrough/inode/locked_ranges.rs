//! The byte ranges that one lock owner has locked, counted as the host's kernel keeps them: neighbours of one kind
//! become one range, and a change in the middle of a range cuts it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::fs::Result;
use crate::limits::LockedRangeQuota;
use crate::sys::locks::{ByteLock, LockType};

/// A lock in the middle of a range of the other kind makes three of one.
const MAX_GROWTH: usize = 2;

/// The ranges that one owner has locked: by their first byte the last one, and the kind.
#[derive(Debug)]
pub struct LockedRanges {
    locked: BTreeMap<u64, (u64, LockType)>,
    quota: Arc<LockedRangeQuota>,
}

/// What a lock or unlock does to the ranges of its owner.
#[derive(Debug, Default)]
struct Change {
    removed: Vec<u64>,
    added: Vec<(u64, u64, LockType)>,
}

impl LockedRanges {
    /// None yet; `quota` counts them.
    pub fn new(quota: &Arc<LockedRangeQuota>) -> LockedRanges {
        LockedRanges { locked: BTreeMap::new(), quota: Arc::clone(quota) }
    }

    /// Locks or unlocks with `set`, which does not wait; ENOLCK if that would make too many ranges.
    pub fn set(&mut self, lock: &ByteLock, set: impl FnOnce() -> Result<()>) -> Result<()> {
        let change = self.change(lock);
        let growth = change.added.len().saturating_sub(change.removed.len());
        self.quota.acquire(growth)?;
        set().inspect_err(|_| self.quota.release(growth))?;
        self.quota.release(change.removed.len().saturating_sub(change.added.len()));
        self.apply(change);
        Ok(())
    }

    /// Must be called before a wait for a lock: ENOLCK if there may be too many ranges afterwards.
    /// [`LockedRanges::waited`] has to follow, whatever came of the wait.
    pub fn before_wait(&self) -> Result<()> {
        self.quota.acquire(MAX_GROWTH)
    }

    /// The wait is over, and `lock` was granted or not.
    ///
    /// Where the owner has unlocked the range meanwhile, between the grant and this, it counts as
    /// locked until it is unlocked again: too many ranges may be counted, but never too few, since
    /// an unlock is done and counted as one.
    pub fn waited(&mut self, lock: &ByteLock, granted: bool) {
        if granted {
            let change = self.change(lock);
            self.quota.add(change.added.len());
            self.quota.release(change.removed.len());
            self.apply(change);
        }
        self.quota.release(MAX_GROWTH);
    }

    /// Whether `lock`, as the host reports it, is one of these ranges.
    pub fn holds(&self, lock: &ByteLock) -> bool {
        self.locked.get(&lock.start).is_some_and(|range| *range == (lock.end, lock.kind))
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = ByteLock> {
        self.locked.iter().map(|(start, (end, kind))| ByteLock { kind: *kind, start: *start, end: *end })
    }

    fn change(&self, lock: &ByteLock) -> Change {
        let ByteLock { kind, start, end } = *lock;
        let (mut first, mut last, mut change) = (start, end, Change::default());
        // From the last range that touches it down to the first one.
        for (&from, &(to, other)) in self.locked.range(..=end.saturating_add(1)).rev() {
            if to.saturating_add(1) < start {
                break;
            }
            if other == kind {
                change.removed.push(from);
                (first, last) = (first.min(from), last.max(to));
            } else if from <= end && to >= start {
                change.removed.push(from);
                if from < start {
                    change.added.push((from, start.saturating_sub(1), other));
                }
                if to > end {
                    change.added.push((end.saturating_add(1), to, other));
                }
            }
        }
        if kind != LockType::Unlock {
            change.added.push((first, last, kind));
        }
        change
    }

    fn apply(&mut self, change: Change) {
        for from in change.removed {
            self.locked.remove(&from);
        }
        self.locked.extend(change.added.into_iter().map(|(from, to, kind)| (from, (to, kind))));
    }
}

impl Drop for LockedRanges {
    fn drop(&mut self) {
        self.quota.release(self.locked.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::io::Errno;

    const MAX: usize = 1000;

    fn done() -> Result<()> {
        Ok(())
    }

    fn lock(kind: LockType, start: u64, end: u64) -> ByteLock {
        ByteLock { kind, start, end }
    }

    /// Runs of bytes that are locked in the same way.
    fn runs(bytes: &[LockType]) -> usize {
        let mut before = LockType::Unlock;
        bytes
            .iter()
            .filter(|kind| **kind != std::mem::replace(&mut before, **kind) && **kind != LockType::Unlock)
            .count()
    }

    proptest! {
        #[test]
        fn ranges_are_the_runs_of_bytes_that_are_locked(
            steps in prop::collection::vec((0usize..3, 0usize..40, 0usize..12, any::<bool>()), 0..60)
        ) {
            let all = Arc::new(LockedRangeQuota::default());
            let mut ranges = LockedRanges::new(&all);
            let mut bytes = [LockType::Unlock; 52];
            for (kind, start, len, works) in steps {
                let kind = [LockType::Read, LockType::Write, LockType::Unlock][kind];
                let step = lock(kind, u64::try_from(start).unwrap(), u64::try_from(start + len).unwrap());
                if works {
                    ranges.set(&step, done).unwrap();
                    bytes[start..=start + len].fill(kind);
                } else {
                    prop_assert_eq!(ranges.set(&step, || Err(Errno::AGAIN)), Err(Errno::AGAIN));
                }
                prop_assert_eq!(ranges.locked.len(), runs(&bytes));
                prop_assert_eq!(all.in_use(), runs(&bytes));
                for (&from, &(to, kind)) in &ranges.locked {
                    let part = usize::try_from(from).unwrap()..=usize::try_from(to).unwrap();
                    prop_assert!(bytes[part].iter().all(|byte| *byte == kind));
                }
            }
            drop(ranges);
            prop_assert_eq!(all.in_use(), 0);
        }
    }

    #[test]
    fn a_full_quota_refuses_new_ranges_until_some_are_unlocked() {
        let all = Arc::new(LockedRangeQuota::new(MAX));
        let mut ranges = LockedRanges::new(&all);
        let whole = lock(LockType::Write, 0, u64::MAX);
        ranges.set(&whole, done).unwrap();
        // By locks, and by holes in a lock.
        let hole = |number: usize| {
            let at = u64::try_from(number).unwrap() * 2 + 1;
            lock(LockType::Unlock, at, at)
        };
        for number in 0..MAX - 1 {
            ranges.set(&hole(number), done).unwrap();
        }
        assert_eq!(ranges.set(&hole(MAX), done), Err(Errno::NOLCK));
        let mut other = LockedRanges::new(&all);
        assert_eq!(other.set(&whole, done), Err(Errno::NOLCK));
        assert_eq!(ranges.before_wait(), Err(Errno::NOLCK));
        // What makes no more ranges is done.
        ranges.set(&lock(LockType::Write, 1, 9), done).unwrap();
        other.set(&whole, done).unwrap();
        ranges.set(&lock(LockType::Unlock, 0, u64::MAX), done).unwrap();
        assert_eq!(all.in_use(), 1);
        ranges.before_wait().unwrap();
        ranges.waited(&whole, true);
        ranges.before_wait().unwrap();
        ranges.waited(&hole(1), false);
        assert_eq!(all.in_use(), 2);
        drop((ranges, other));
        assert_eq!(all.in_use(), 0);
    }
}
