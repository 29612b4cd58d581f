//! File locks of the guest's programs, taken on the host.
//!
//! A POSIX lock belongs to an owner in the guest. Each owner gets an open file description of the
//! inode for itself, with OFD locks on it, so that the host keeps owners apart with its own rules.
//! A flock(2) lock belongs to the guest's open file, which is our handle.
//!
//! An owner is a process or an open file description (F_OFD_SETLK), and requests do not say which. A process
//! ends its locks by FLUSH, with each descriptor of the file that it closes. For a description Linux sends
//! RELEASE alone, without an owner: so each owner remembers the handles that it locked through, and ends with
//! the RELEASE of the last of them. What a process has locked before a FLUSH was unlocked by that; from then
//! on only those handles count through which it is locking just then, or locks later. The RELEASE of the
//! handle that was flushed may come at any time after that.
//!
//! A lock that has to be waited for blocks its thread in the host's kernel. [`LockWaiters`] knows these
//! threads and gets them out with a signal.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::blocking::block_in_place;
use crate::fs::passthrough::PassthroughFs;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::inode::locked_ranges::LockedRanges;
use crate::fs::{PUT_BACK, Result};
use crate::limits::GuestFd;
use crate::sys::locks::{ByteLock, LockType, ofd_get, ofd_set, ofd_set_wait};
use crate::sys::signals::{ThreadId, wake};
use fuse_protocol::abi::FileLock;
use fuse_protocol::ids::{HandleId, LockOwner, Unique};
use fuse_protocol::request::{Lock, LockKind};

/// Owners that may hold locks on one inode; each costs a descriptor.
const MAX_OWNERS: usize = 1024;
/// Requests of all queues that may wait for locks at once: each is a thread, and the host has only so many.
const MAX_WAITERS: usize = 1024;
/// How long to wait for an interrupted thread before it is signalled again: the first signal may
/// have come just before its system call.
const SIGNAL_AGAIN: Duration = Duration::from_millis(1);
/// How often an INTERRUPT looks for its request before it is given back to the guest.
const MOST_SIGNALS: u32 = 10;

/// POSIX locks on one inode: an open file for each owner.
#[derive(Debug, Default)]
pub struct InodeLocks(Mutex<Option<Box<Owners>>>);

type Owners = HashMap<u64, Arc<Owner>>;

#[derive(Debug)]
struct Owner {
    file: GuestFd,
    pid: u32,
    ranges: Mutex<LockedRanges>,
    /// Handles that it has locked through since its last FLUSH, all of them open, and how many requests are
    /// locking through each just now. It changes only while the table of owners is locked, so that an owner
    /// is in the table as long as it has any.
    handles: Mutex<HashMap<u64, usize>>,
}

impl Owner {
    /// Locks or unlocks without a wait.
    fn set(&self, lock: ByteLock) -> Result<()> {
        self.ranges().set(&lock, || ofd_set(self.file.as_fd(), lock))
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

/// An owner for which a request is locking: it stays in the table whoever is flushed meanwhile.
struct Locking {
    owner: Arc<Owner>,
    handle: HandleId,
}

impl Drop for Locking {
    fn drop(&mut self) {
        // The handle may have been closed, by a guest that does not wait for its requests.
        if let Some(under_way) = self.owner.handles().get_mut(&self.handle.0) {
            *under_way = under_way.saturating_sub(1);
        }
    }
}

impl InodeLocks {
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

    fn find(&self, owner: LockOwner) -> Option<Arc<Owner>> {
        self.lock().as_ref().and_then(|owners| owners.get(&owner.0).cloned())
    }

    /// Begins to lock for an owner.
    fn begin(&self, lock: &Lock, open: impl FnOnce() -> Result<Owner>) -> Result<Locking> {
        let handle = lock.handle;
        if let Some(owner) = self.lock().as_ref().and_then(|owners| owners.get(&lock.owner.0)) {
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
        let owner = owners.entry(lock.owner.0).or_insert_with(|| Arc::new(new));
        owner.begin(handle)?;
        Ok(Locking { owner: Arc::clone(owner), handle })
    }

    /// The process that holds `lock`, which is in the way of `owner`; 0 if it is none of this guest's.
    fn holder(&self, owner: LockOwner, lock: &ByteLock) -> u32 {
        let owners = self.lock();
        let mut others = owners.iter().flat_map(|owners| owners.iter()).filter(|(id, _)| **id != owner.0);
        others.find(|(_, other)| other.ranges().holds(lock)).map_or(0, |(_, other)| other.pid)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Owners>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All locks of one owner.
const EVERYTHING: ByteLock = ByteLock { kind: LockType::Unlock, start: 0, end: i64::MAX.unsigned_abs() };

/// Threads that wait for locks, by the request they serve.
#[derive(Debug, Default)]
pub struct LockWaiters(Mutex<HashMap<Unique, Waiter>>);

#[derive(Debug)]
struct Waiter {
    thread: ThreadId,
    /// What the wait is to end with.
    end: Option<Errno>,
}

/// Takes the thread off the table when it is dropped.
struct WaiterGuard<'a> {
    waiters: &'a LockWaiters,
    unique: Unique,
}

impl Drop for WaiterGuard<'_> {
    fn drop(&mut self) {
        self.waiters.lock().remove(&self.unique);
    }
}

impl LockWaiters {
    /// Ends the wait of request `unique`; returns when it has ended. EAGAIN if there is none, which is
    /// told after a while: a request that was sent before may not have begun to wait yet.
    pub fn interrupt(&self, unique: Unique) -> Result<()> {
        block_in_place(|| {
            let mut found = false;
            for _ in 0..MOST_SIGNALS {
                let there = self.end(Errno::INTR, |waiting| *waiting == unique);
                found |= there;
                if found && !there {
                    return Ok(());
                }
                thread::sleep(SIGNAL_AGAIN);
            }
            // One that was found and is still there does not hear of signals. It will notice later.
            if found { Ok(()) } else { Err(Errno::AGAIN) }
        })
    }

    /// Makes the wait of request `unique` end, if there is one, so that it can begin again.
    pub fn put_back(&self, unique: Unique) {
        self.end(PUT_BACK, |waiting| *waiting == unique);
    }

    /// Makes all waits end.
    pub fn interrupt_all(&self) {
        self.end(Errno::INTR, |_| true);
    }

    /// Signals the threads that are meant; false if there are none. A thread in the table lives,
    /// as it takes itself off before it ends. A signal may come just before the system call that it
    /// is to end, so it may take another one.
    fn end(&self, with: Errno, meant: impl Fn(&Unique) -> bool) -> bool {
        let mut waiters = self.lock();
        let mut any = false;
        for (_, waiting) in waiters.iter_mut().filter(|(unique, _)| meant(unique)) {
            waiting.end.get_or_insert(with);
            wake(waiting.thread);
            any = true;
        }
        any
    }

    /// Runs `wait`, a system call that blocks, until it has ended or was interrupted.
    fn run(&self, unique: Unique, mut wait: impl FnMut() -> Result<()>) -> Result<()> {
        let _entry = self.enter(unique)?;
        loop {
            if let Some(errno) = self.lock().get(&unique).map_or(Some(Errno::INTR), |waiting| waiting.end) {
                return Err(errno);
            }
            match wait() {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Puts the calling thread into the table; EINVAL if the guest uses the number twice at once,
    /// as the thread that is there already must stay reachable, and ENOLCK if too many wait.
    fn enter(&self, unique: Unique) -> Result<WaiterGuard<'_>> {
        let thread = ThreadId::current()?;
        let mut waiters = self.lock();
        let full = waiters.len() >= MAX_WAITERS;
        match waiters.entry(unique) {
            Entry::Vacant(_) if full => Err(Errno::NOLCK),
            Entry::Occupied(_) => Err(Errno::INVAL),
            Entry::Vacant(place) => {
                place.insert(Waiter { thread, end: None });
                Ok(WaiterGuard { waiters: self, unique })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Unique, Waiter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PassthroughFs {
    /// GETLK.
    pub(in crate::fs::passthrough) fn test_lock(&self, handle: &Handle, lock: &Lock) -> Result<FileLock> {
        self.check_locks(lock)?;
        let free = FileLock { typ: libc::F_UNLCK.cast_unsigned(), ..Default::default() };
        if lock.flock || lock.kind == LockKind::Unlock {
            return Err(Errno::INVAL);
        }
        // Who only asks does not become an owner: a new open file sees all locks but its own.
        let found = match handle.inode.locks.find(lock.owner) {
            Some(owner) => ofd_get(owner.file.as_fd(), byte_lock(lock))?,
            None => ofd_get(self.open_for_locks(handle)?.as_fd(), byte_lock(lock))?,
        };
        let Some(found) = found else { return Ok(free) };
        let typ = match found.kind {
            LockType::Read => libc::F_RDLCK,
            LockType::Write => libc::F_WRLCK,
            LockType::Unlock => return Ok(free),
        };
        let pid = handle.inode.locks.holder(lock.owner, &found);
        Ok(FileLock { start: found.start, end: found.end, typ: typ.cast_unsigned(), pid })
    }

    /// SETLK, and SETLKW with the number of the request that waits.
    pub(in crate::fs::passthrough) fn take_lock(
        &self,
        handle: &Handle,
        lock: &Lock,
        wait: Option<Unique>,
    ) -> Result<()> {
        self.check_locks(lock)?;
        if lock.flock {
            return self.take_flock(handle, lock.kind, wait);
        }
        if lock.kind == LockKind::Unlock {
            // Without locks there is nothing to unlock.
            let owner = handle.inode.locks.find(lock.owner);
            return owner.map_or(Ok(()), |owner| owner.set(byte_lock(lock)));
        }
        let open = || {
            let permit = self.fd_permit().map_err(|errno| match errno {
                Errno::MFILE => Errno::NOLCK,
                errno => errno,
            })?;
            let file = permit.wrap(self.open_for_locks(handle)?);
            let ranges = Mutex::new(LockedRanges::new(&self.locked_ranges));
            Ok(Owner { file, pid: lock.pid, ranges, handles: Mutex::default() })
        };
        let locking = handle.inode.locks.begin(lock, open)?;
        match wait {
            None => locking.owner.set(byte_lock(lock)),
            Some(unique) => self.wait_for_lock(&locking.owner, byte_lock(lock), unique),
        }
    }

    fn wait_for_lock(&self, owner: &Owner, lock: ByteLock, unique: Unique) -> Result<()> {
        LockedRanges::before_wait(&self.locked_ranges)?;
        let result = self.lock_waiters.run(unique, || ofd_set_wait(owner.file.as_fd(), lock));
        owner.ranges().waited(&lock, result.is_ok());
        result
    }

    fn take_flock(&self, handle: &Handle, kind: LockKind, wait: Option<Unique>) -> Result<()> {
        let (at_once, waiting) = match kind {
            LockKind::Read => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
            LockKind::Write => (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive),
            LockKind::Unlock => return flock(handle.fd(), FlockOperation::Unlock),
        };
        match wait {
            None => flock(handle.fd(), at_once),
            Some(unique) => self.lock_waiters.run(unique, || flock(handle.fd(), waiting)),
        }
    }

    /// The guest asks only for what was negotiated; a guest that asks all the same gets ENOSYS.
    fn check_locks(&self, lock: &Lock) -> Result<()> {
        let offered = if lock.flock { self.config.flock } else { self.config.posix_lock };
        if offered { Ok(()) } else { Err(Errno::NOSYS) }
    }

    /// An open file description for one owner: for reading and writing if that can be had, as the
    /// guest's kernel has checked what kind of lock the owner may take.
    fn open_for_locks(&self, handle: &Handle) -> Result<OwnedFd> {
        // A file with the append-only attribute opens for nothing else.
        let file = match self.reopen(&handle.inode, OFlags::RDWR) {
            Err(Errno::PERM) => self.reopen(&handle.inode, OFlags::RDWR | OFlags::APPEND),
            result => result,
        };
        match file {
            Err(Errno::ACCESS | Errno::ROFS | Errno::TXTBSY | Errno::PERM) => {
                self.reopen(&handle.inode, OFlags::RDONLY)
            }
            Err(Errno::MFILE | Errno::NFILE) => Err(Errno::NOLCK),
            result => result,
        }
    }
}

/// Drops the flock(2) lock of a handle.
pub(in crate::fs::passthrough) fn drop_flock(handle: &Handle) -> Result<()> {
    flock(handle.fd(), FlockOperation::Unlock)
}

fn byte_lock(lock: &Lock) -> ByteLock {
    let kind = match lock.kind {
        LockKind::Read => LockType::Read,
        LockKind::Write => LockType::Write,
        LockKind::Unlock => LockType::Unlock,
    };
    ByteLock { kind, start: lock.start, end: lock.end }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_number_that_is_used_twice_leaves_the_first_wait_reachable() {
        let waiters = LockWaiters::default();
        let first = waiters.enter(Unique(3)).unwrap();
        assert_eq!(waiters.run(Unique(3), || Ok(())), Err(Errno::INVAL));
        assert!(waiters.lock().contains_key(&Unique(3)));
        drop(first);
        assert_eq!(waiters.run(Unique(3), || Ok(())), Ok(()));
        assert!(waiters.lock().is_empty());
    }

    #[test]
    fn so_many_may_wait_and_no_more() {
        let waiters = LockWaiters::default();
        let mut all: Vec<_> = (0..1024).map(|number| waiters.enter(Unique(number)).unwrap()).collect();
        assert_eq!(waiters.run(Unique(5000), || Ok(())), Err(Errno::NOLCK));
        all.pop();
        assert_eq!(waiters.run(Unique(5000), || Ok(())), Ok(()));
    }

    #[test]
    fn a_wait_ends_when_it_is_interrupted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open =
            || OwnedFd::from(std::fs::File::options().read(true).write(true).open(file.path()).unwrap());
        let (first, second) = (open(), open());
        let all = ByteLock { kind: LockType::Write, start: 0, end: i64::MAX.unsigned_abs() };
        ofd_set(first.as_fd(), all).unwrap();
        assert_eq!(ofd_set(second.as_fd(), all), Err(Errno::AGAIN));
        let waiters = LockWaiters::default();
        for round in 0..50 {
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let result = waiters.run(Unique(round), || ofd_set_wait(second.as_fd(), all));
                    assert_eq!(result, Err(Errno::INTR));
                    done.store(true, Ordering::SeqCst);
                });
                while waiters.lock().is_empty() {
                    thread::yield_now();
                }
                if round % 2 == 0 {
                    waiters.interrupt(Unique(round)).unwrap();
                }
                while !done.load(Ordering::SeqCst) {
                    waiters.interrupt_all();
                    thread::sleep(SIGNAL_AGAIN);
                }
            });
            assert!(done.load(Ordering::SeqCst));
        }
        // Nobody is left in the table, and others are not meant.
        assert_eq!(waiters.interrupt(Unique(7)), Err(Errno::AGAIN));
        drop(first);
        assert_eq!(waiters.run(Unique(1), || ofd_set_wait(second.as_fd(), all)), Ok(()));
    }
}
