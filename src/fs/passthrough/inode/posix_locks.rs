//! POSIX locks of the guest's programs on one inode.
//!
//! A POSIX lock belongs to an owner in the guest. Each owner gets an open file description of the inode for itself,
//! with OFD locks on it, so that the host keeps owners apart with its own rules.
//!
//! An owner is a process or an open file description (F_OFD_SETLK), and requests do not say which. A process ends its
//! locks by FLUSH, with each descriptor of the file that it closes. For a description Linux sends RELEASE alone,
//! without an owner: so each owner remembers the handles that it locked through, and ends with the RELEASE of the last
//! of them. What a process has locked before a FLUSH was unlocked by that; from then on only those handles count
//! through which it is locking just then, or locks later. The RELEASE of the flushed handle may come at any time after
//! that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::locked_ranges::LockedRanges;
use crate::fs::Result;
use crate::limits::{GuestFd, LockedRangeQuota};
use crate::sys::locks::{ByteLock, LockType, ofd_get, ofd_set};
use fuse_protocol::ids::{HandleId, LockOwner};

/// Owners that may have locks on one inode; each takes a descriptor.
const MAX_OWNERS: usize = 1024;
/// All locks of one owner.
const EVERYTHING: ByteLock = ByteLock { kind: LockType::Unlock, start: 0, end: i64::MAX.unsigned_abs() };

/// The POSIX locks on one inode: an open file for each owner.
#[derive(Debug, Default)]
pub struct PosixLocks(Mutex<Option<Box<Owners>>>);

type Owners = HashMap<u64, Arc<OwnerFile>>;

/// An open file description of one owner, and the ranges that are locked on it.
#[derive(Debug)]
pub struct OwnerFile {
    file: GuestFd,
    pid: u32,
    ranges: Mutex<LockedRanges>,
    /// Handles that it has locked through since its last FLUSH, all of them open, and how many requests are locking
    /// through each just now. It changes only while the table of owners is locked, so that an owner is in the table as
    /// long as it has any.
    handles: Mutex<HashMap<u64, usize>>,
}

impl OwnerFile {
    /// An owner without locks, whose process in the guest is `pid`. Its ranges are counted by `quota`.
    pub fn new(file: GuestFd, pid: u32, quota: &Arc<LockedRangeQuota>) -> OwnerFile {
        OwnerFile { file, pid, ranges: Mutex::new(LockedRanges::new(quota)), handles: Mutex::default() }
    }

    /// Locks or unlocks without a wait.
    pub fn set(&self, lock: ByteLock) -> Result<()> {
        self.ranges().set(&lock, || ofd_set(self.file.as_fd(), lock))
    }

    /// Locks with `wait`, which gets the open file description and blocks.
    pub fn set_wait(&self, lock: ByteLock, wait: impl FnOnce(BorrowedFd<'_>) -> Result<()>) -> Result<()> {
        self.ranges().before_wait()?;
        let result = wait(self.file.as_fd());
        self.ranges().waited(&lock, result.is_ok());
        result
    }

    /// A lock that conflicts with this one.
    pub fn conflict(&self, lock: ByteLock) -> Result<Option<ByteLock>> {
        ofd_get(self.file.as_fd(), lock)
    }

    /// Remembers a handle through which a request begins to lock.
    fn begin(&self, handle: HandleId) -> Result<()> {
        let mut handles = self.handles();
        handles.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        let under_way = handles.entry(handle.0).or_default();
        *under_way = under_way.saturating_add(1);
        Ok(())
    }

    /// Forgets a handle; whether it was the last one.
    fn ends_with(&self, handle: HandleId) -> bool {
        let mut handles = self.handles();
        handles.remove(&handle.0).is_some() && handles.is_empty()
    }

    /// Forgets the handles that no request is locking through; whether there are no others.
    fn ends_with_flush(&self) -> bool {
        let mut handles = self.handles();
        handles.retain(|_, under_way| *under_way > 0);
        handles.is_empty()
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ranges(&self) -> MutexGuard<'_, LockedRanges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An owner for which a request is locking: it stays in the table whatever is flushed meanwhile.
#[derive(Debug)]
pub struct Locking {
    owner: Arc<OwnerFile>,
    handle: HandleId,
}

impl Locking {
    /// The owner.
    pub fn owner(&self) -> &OwnerFile {
        &self.owner
    }
}

impl Drop for Locking {
    fn drop(&mut self) {
        // The handle may have been closed, by a guest that does not wait for its requests.
        if let Some(under_way) = self.owner.handles().get_mut(&self.handle.0) {
            *under_way = under_way.saturating_sub(1);
        }
    }
}

impl PosixLocks {
    /// Drops all locks of an owner, and the owner itself unless a request is about to lock for it.
    pub fn drop_owner(&self, owner: LockOwner) -> Result<()> {
        let dropped = {
            let mut owners = self.lock();
            match owners.as_mut().map(|owners| owners.entry(owner.0)) {
                Some(Entry::Occupied(found)) if found.get().ends_with_flush() => Some(found.remove()),
                Some(Entry::Occupied(found)) => Some(Arc::clone(found.get())),
                _ => None,
            }
        };
        match dropped {
            // Its file is closed with all locks on it.
            Some(owner) if Arc::strong_count(&owner) == 1 => Ok(()),
            Some(owner) => owner.set(EVERYTHING),
            None => Ok(()),
        }
    }

    /// A handle is closed for good: drops the owners that have locked through no other.
    pub fn drop_handle(&self, handle: HandleId) {
        if let Some(owners) = self.lock().as_mut() {
            owners.retain(|_, owner| !owner.ends_with(handle));
        }
    }

    /// The open file of an owner that has locked something.
    pub fn find(&self, owner: LockOwner) -> Option<Arc<OwnerFile>> {
        self.lock().as_ref().and_then(|owners| owners.get(&owner.0).cloned())
    }

    /// Begins to lock for an owner, through a handle. `open` makes the owner if it is new.
    pub fn begin(
        &self,
        owner: LockOwner,
        handle: HandleId,
        open: impl FnOnce() -> Result<OwnerFile>,
    ) -> Result<Locking> {
        if let Some(owner) = self.lock().as_ref().and_then(|owners| owners.get(&owner.0)) {
            owner.begin(handle)?;
            return Ok(Locking { owner: Arc::clone(owner), handle });
        }
        let new = open()?;
        let mut owners = self.lock();
        let owners = owners.get_or_insert_default();
        if owners.len() >= MAX_OWNERS {
            return Err(Errno::NOLCK);
        }
        owners.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        let owner = owners.entry(owner.0).or_insert_with(|| Arc::new(new));
        owner.begin(handle)?;
        Ok(Locking { owner: Arc::clone(owner), handle })
    }

    /// The process whose `lock` conflicts with one of `owner`; 0 if it is none of this guest's.
    pub fn holder(&self, owner: LockOwner, lock: &ByteLock) -> u32 {
        let owners = self.lock();
        let mut others = owners.iter().flat_map(|owners| owners.iter()).filter(|(id, _)| **id != owner.0);
        others.find(|(_, other)| other.ranges().holds(lock)).map_or(0, |(_, other)| other.pid)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Owners>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
