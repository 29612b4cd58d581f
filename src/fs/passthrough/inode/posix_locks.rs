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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::locked_ranges::LockedRanges;
use super::owner_records::{OwnerGuard, OwnerRecords};
use crate::fs::Result;
use crate::limits::{GuestFd, LockedRangeQuota};
use crate::state_file::{Index, OwnerEntry, OwnerHandleRecord, OwnerRecord};
use crate::sys::locks::{ByteLock, LockType, ofd_get, ofd_set};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};

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
    // Dropped first: the record gives the descriptor up before it is closed.
    record: OwnerGuard,
    file: GuestFd,
    pid: u32,
    ranges: Mutex<LockedRanges>,
    /// Handles that it has locked through since its last FLUSH, all of them open, and how many requests are locking
    /// through each just now. It changes only while the table of owners is locked, so that an owner is in the table as
    /// long as it has any.
    handles: Mutex<HashMap<u64, Through>>,
}

/// A handle that an owner has locked through.
#[derive(Debug)]
struct Through {
    /// Requests that are locking just now.
    under_way: usize,
    record: Index<OwnerHandleRecord>,
}

impl OwnerFile {
    /// An owner without locks on inode `node`, whose number in the guest is `owner` and whose process there is `pid`.
    /// Its ranges are counted by `quota`. ENOLCK if there are too many owners.
    pub fn new(
        file: GuestFd,
        (node, owner, pid): (NodeId, LockOwner, u32),
        quota: &Arc<LockedRangeQuota>,
        records: &Arc<OwnerRecords>,
    ) -> Result<OwnerFile> {
        let descriptor = file.as_fd().as_raw_fd();
        let entry = OwnerEntry { node: node.0, owner: owner.0, descriptor, process: pid };
        let record = OwnerGuard::new(records, &entry).ok_or(Errno::NOLCK)?;
        Ok(OwnerFile::with(record, file, pid, quota))
    }

    fn with(record: OwnerGuard, file: GuestFd, pid: u32, quota: &Arc<LockedRangeQuota>) -> OwnerFile {
        let ranges = Mutex::new(LockedRanges::new(quota));
        OwnerFile { record, file, pid, ranges, handles: Mutex::default() }
    }

    /// An owner of an earlier process, which has locked through these handles. `locks` are those of its file.
    pub fn restored(
        restored: RestoredOwner,
        file: GuestFd,
        locks: &[ByteLock],
        quota: &Arc<LockedRangeQuota>,
    ) -> OwnerFile {
        let RestoredOwner { record, entry, handles } = restored;
        let owner = OwnerFile::with(record, file, entry.process, quota);
        for lock in locks {
            // They are there, whatever the quota.
            quota.add(1);
            let _ = owner.ranges().set(lock, || Ok(()));
            quota.release(1);
        }
        let through = |(handle, record)| (handle, Through { under_way: 0, record });
        *owner.handles() = handles.into_iter().map(through).collect();
        owner
    }

    /// Counts a lock that the host is to have again ([`OwnerFile::take_again`]).
    pub fn remember(&self, lock: &ByteLock) {
        let _ = self.ranges().set(lock, || Ok(()));
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

    /// All ranges that are locked.
    pub fn locks(&self) -> Vec<ByteLock> {
        self.ranges().all().collect()
    }

    /// The handles that it has locked through.
    pub fn through(&self) -> Vec<u64> {
        self.handles().keys().copied().collect()
    }

    /// Its process in the guest.
    pub fn process(&self) -> u32 {
        self.pid
    }

    /// Unlocks everything on the host, where others may lock it until [`OwnerFile::take_again`].
    pub fn let_go(&self) -> Result<()> {
        ofd_set(self.file.as_fd(), EVERYTHING)
    }

    /// Locks all of its ranges on the host once more; EAGAIN if another process has locked one.
    pub fn take_again(&self) -> Result<()> {
        self.locks().into_iter().try_for_each(|lock| ofd_set(self.file.as_fd(), lock))
    }

    /// A lock that conflicts with this one.
    pub fn conflict(&self, lock: ByteLock) -> Result<Option<ByteLock>> {
        ofd_get(self.file.as_fd(), lock)
    }

    /// Remembers a handle through which a request begins to lock.
    fn begin(&self, handle: HandleId) -> Result<()> {
        let mut handles = self.handles();
        handles.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        let through = match handles.entry(handle.0) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let record = self.record.add_handle(handle.0).ok_or(Errno::NOLCK)?;
                place.insert(Through { under_way: 0, record })
            }
        };
        through.under_way = through.under_way.saturating_add(1);
        Ok(())
    }

    /// Forgets a handle; whether it was the last one.
    fn ends_with(&self, handle: HandleId) -> bool {
        let mut handles = self.handles();
        let Some(through) = handles.remove(&handle.0) else { return false };
        self.record.drop_handle(through.record);
        handles.is_empty()
    }

    /// Forgets the handles that no request is locking through; whether there are no others.
    fn ends_with_flush(&self) -> bool {
        let mut handles = self.handles();
        handles.retain(|_, through| {
            let stays = through.under_way > 0;
            if !stays {
                self.record.drop_handle(through.record);
            }
            stays
        });
        handles.is_empty()
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Through>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ranges(&self) -> MutexGuard<'_, LockedRanges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OwnerFile {
    fn drop(&mut self) {
        for (_, through) in self.handles().drain() {
            self.record.drop_handle(through.record);
        }
    }
}

/// What records have of one owner.
#[derive(Debug)]
pub struct RestoredOwner {
    record: OwnerGuard,
    entry: OwnerEntry,
    handles: Vec<(u64, Index<OwnerHandleRecord>)>,
}

impl RestoredOwner {
    /// The owner.
    pub fn entry(&self) -> &OwnerEntry {
        &self.entry
    }

    /// All owners in the state file, each once.
    pub fn all(records: &Arc<OwnerRecords>) -> Vec<RestoredOwner> {
        let restored = |(index, entry): (Index<OwnerRecord>, OwnerEntry)| {
            let record = OwnerGuard::restored(records, index);
            (index.get(), RestoredOwner { record, entry, handles: Vec::new() })
        };
        let mut owners: HashMap<usize, RestoredOwner> = records.owners().into_iter().map(restored).collect();
        for (record, entry) in records.handles() {
            match owners.get_mut(&entry.owner.get()) {
                Some(owner) => owner.handles.push((entry.handle, record)),
                None => records.drop_handle(record),
            }
        }
        owners.into_values().collect()
    }

    /// Drops an owner that has no file any more. Its records go before its descriptor is closed.
    pub fn discard(mut self) {
        self.keep_handles(|_| false);
    }

    /// Keeps the handles that are open. Whether any are left: an owner without one was about to lock, or has unlocked all.
    pub fn keep_handles(&mut self, is_open: impl Fn(u64) -> bool) -> bool {
        let (open, closed) = std::mem::take(&mut self.handles).into_iter().partition(|(id, _)| is_open(*id));
        self.handles = open;
        let closed: Vec<(u64, Index<OwnerHandleRecord>)> = closed;
        closed.into_iter().for_each(|(_, record)| self.record.drop_handle(record));
        !self.handles.is_empty()
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
        if let Some(through) = self.owner.handles().get_mut(&self.handle.0) {
            through.under_way = through.under_way.saturating_sub(1);
        }
    }
}

impl PosixLocks {
    /// Drops all locks of an owner, and the owner itself unless a request is about to lock for it.
    pub fn drop_owner(&self, owner: LockOwner) -> Result<()> {
        let dropped = {
            let mut owners = self.lock();
            match owners.as_mut().map(|owners| owners.entry(owner.0)) {
                Some(Entry::Occupied(found)) if found.get().ends_with_flush() => {
                    found.get().record.clear();
                    Some(found.remove())
                }
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

    /// Adds an owner of an earlier process.
    pub fn restore(&self, owner: LockOwner, file: OwnerFile) {
        self.lock().get_or_insert_default().insert(owner.0, Arc::new(file));
    }

    /// All owners.
    pub fn all(&self) -> Vec<(u64, Arc<OwnerFile>)> {
        let owners = self.lock();
        let all = owners.iter().flat_map(|owners| owners.iter());
        all.map(|(owner, file)| (*owner, Arc::clone(file))).collect()
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
