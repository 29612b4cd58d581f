//! Locks on one inode: POSIX locks by owner and range, flock(2) locks by handle.

use fuse_protocol::ids::{HandleId, LockOwner};
use fuse_protocol::request::{Lock, LockKind};

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Posix(LockOwner),
    Flock(HandleId),
}

/// A lock that is held.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    holder: Holder,
    pub start: u64,
    pub end: u64,
    pub kind: LockKind,
    pub pid: u32,
}

/// Locks on one inode.
#[derive(Debug, Default)]
pub struct Locks(Vec<Held>);

fn wanted(lock: &Lock) -> Held {
    let holder = if lock.flock { Holder::Flock(lock.handle) } else { Holder::Posix(lock.owner) };
    let (start, end) = if lock.flock { (0, u64::MAX) } else { (lock.start, lock.end) };
    Held { holder, start, end, kind: lock.kind, pid: lock.pid }
}

impl Held {
    fn same_family(&self, other: &Held) -> bool {
        matches!(self.holder, Holder::Posix(_)) == matches!(other.holder, Holder::Posix(_))
    }

    fn overlaps(&self, other: &Held) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn conflicts(&self, other: &Held) -> bool {
        self.holder != other.holder
            && self.same_family(other)
            && self.overlaps(other)
            && (self.kind == LockKind::Write || other.kind == LockKind::Write)
    }
}

impl Locks {
    /// How many are held.
    pub fn held(&self) -> usize {
        self.0.len()
    }

    /// A lock that stands in the way of `lock`.
    pub fn in_the_way(&self, lock: &Lock) -> Option<Held> {
        let wanted = wanted(lock);
        let conflict = |held: &&Held| wanted.kind != LockKind::Unlock && held.conflicts(&wanted);
        self.0.iter().find(conflict).copied()
    }

    /// Takes, changes or drops a lock that nothing stands in the way of.
    pub fn set(&mut self, lock: &Lock) {
        let wanted = wanted(lock);
        let mut cut = Vec::new();
        self.0.retain(|held| {
            if held.holder != wanted.holder || !held.overlaps(&wanted) {
                return true;
            }
            if held.start < wanted.start {
                cut.push(Held { end: wanted.start - 1, ..*held });
            }
            if held.end > wanted.end {
                cut.push(Held { start: wanted.end + 1, ..*held });
            }
            false
        });
        self.0.append(&mut cut);
        if wanted.kind != LockKind::Unlock {
            self.0.push(wanted);
        }
    }

    /// Drops all POSIX locks of `owner`.
    pub fn drop_owner(&mut self, owner: LockOwner) {
        self.0.retain(|held| held.holder != Holder::Posix(owner));
    }

    /// Drops the flock(2) lock of `handle`.
    pub fn drop_flock(&mut self, handle: HandleId) {
        self.0.retain(|held| held.holder != Holder::Flock(handle));
    }
}
