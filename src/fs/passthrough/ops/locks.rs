//! GETLK, SETLK and SETLKW: file locks of the guest's programs, taken on the host.
//!
//! POSIX locks are kept per owner and inode ([`PosixLocks`](crate::fs::passthrough::inode::PosixLocks)). A flock(2)
//! lock belongs to the guest's open file, which is our handle. Requests that wait are in
//! [`LockWaiters`].

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::fs::Result;
use crate::fs::passthrough::config::FsConfig;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::inode::OwnerFile;
use crate::fs::passthrough::lock_waiters::LockWaiters;
use crate::fs::passthrough::state::PassthroughFs;
use crate::sys::locks::{ByteLock, LockType, ofd_get, ofd_set_wait};
use fuse_protocol::abi::FileLock;
use fuse_protocol::ids::Unique;
use fuse_protocol::request::{Lock, LockKind};

/// GETLK.
pub fn getlk(fs: &PassthroughFs, handle: &Handle, lock: &Lock) -> Result<FileLock> {
    check_negotiated(&fs.config, lock)?;
    let free = FileLock { typ: libc::F_UNLCK.cast_unsigned(), ..Default::default() };
    if lock.flock || lock.kind == LockKind::Unlock {
        return Err(Errno::INVAL);
    }
    // A question makes no owner: a new open file sees all locks but its own.
    let found = match handle.inode().locks().find(lock.owner) {
        Some(owner) => owner.conflict(byte_lock(lock))?,
        None => ofd_get(open_for_locks(fs, handle)?.as_fd(), byte_lock(lock))?,
    };
    let Some(found) = found else { return Ok(free) };
    let typ = match found.kind {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlock => return Ok(free),
    };
    let pid = handle.inode().locks().holder(lock.owner, &found);
    Ok(FileLock { start: found.start, end: found.end, typ: typ.cast_unsigned(), pid })
}

/// SETLK, and SETLKW with the number of the request that waits.
pub fn setlk(fs: &PassthroughFs, handle: &Handle, lock: &Lock, wait: Option<Unique>) -> Result<()> {
    check_negotiated(&fs.config, lock)?;
    if lock.flock {
        return set_flock(&fs.lock_waiters, handle, lock.kind, wait);
    }
    let locks = handle.inode().locks();
    if lock.kind == LockKind::Unlock {
        // Without locks there is nothing to unlock.
        return locks.find(lock.owner).map_or(Ok(()), |owner| owner.set(byte_lock(lock)));
    }
    let open = || {
        let permit = fs.inodes.acquire_fd().map_err(|errno| match errno {
            Errno::MFILE => Errno::NOLCK,
            errno => errno,
        })?;
        let file = permit.wrap(open_for_locks(fs, handle)?);
        let whose = (handle.inode().node(), lock.owner, lock.pid);
        OwnerFile::new(file, whose, &fs.locked_ranges, &fs.owner_records)
    };
    let locking = locks.begin(lock.owner, lock.handle, open)?;
    let lock = byte_lock(lock);
    match wait {
        None => locking.owner().set(lock),
        Some(unique) => {
            locking.owner().set_wait(lock, |file| fs.lock_waiters.run(unique, || ofd_set_wait(file, lock)))
        }
    }
}

fn set_flock(waiters: &LockWaiters, handle: &Handle, kind: LockKind, wait: Option<Unique>) -> Result<()> {
    let (at_once, waiting) = match kind {
        LockKind::Read => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
        LockKind::Write => (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive),
        LockKind::Unlock => return drop_flock(handle),
    };
    match wait {
        None => flock(handle.fd(), at_once),
        Some(unique) => waiters.run(unique, || flock(handle.fd(), waiting)),
    }?;
    handle.set_flock(Some(kind == LockKind::Write));
    Ok(())
}

/// Drops the flock(2) lock of a handle.
pub fn drop_flock(handle: &Handle) -> Result<()> {
    flock(handle.fd(), FlockOperation::Unlock)?;
    handle.set_flock(None);
    Ok(())
}

/// ENOSYS for locks that were not negotiated; only a hostile guest asks for these.
fn check_negotiated(config: &FsConfig, lock: &Lock) -> Result<()> {
    let offered = if lock.flock { config.flock } else { config.posix_lock };
    if offered { Ok(()) } else { Err(Errno::NOSYS) }
}

/// An open file description for one owner: for reading and writing if possible, as the guest's kernel has checked what
/// kind of lock the owner may take.
fn open_for_locks(fs: &PassthroughFs, handle: &Handle) -> Result<OwnedFd> {
    let open = |flags| fs.inodes.open(&fs.host, handle.inode(), flags);
    let file = match open(OFlags::RDWR) {
        // A file with the append-only attribute opens for nothing else.
        Err(Errno::PERM) => open(OFlags::RDWR | OFlags::APPEND),
        result => result,
    };
    match file {
        Err(Errno::ACCESS | Errno::ROFS | Errno::TXTBSY | Errno::PERM) => open(OFlags::RDONLY),
        Err(Errno::MFILE | Errno::NFILE) => Err(Errno::NOLCK),
        result => result,
    }
}

fn byte_lock(lock: &Lock) -> ByteLock {
    let kind = match lock.kind {
        LockKind::Read => LockType::Read,
        LockKind::Write => LockType::Write,
        LockKind::Unlock => LockType::Unlock,
    };
    ByteLock { kind, start: lock.start, end: lock.end }
}
