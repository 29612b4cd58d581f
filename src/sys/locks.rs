//! Locks on byte ranges that belong to an open file description (`F_OFD_*` of fcntl(2)).

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::{Errno, Result};

use super::last_errno;

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockType {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None.
    Unlock,
}

/// A lock on the bytes from `start` to `end`, both included. `i64::MAX` as the end means all
/// there will ever be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteLock {
    /// The kind.
    pub kind: LockType,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
}

/// The lock that stands in the way of `lock`, if any.
pub fn ofd_get(file: BorrowedFd<'_>, lock: ByteLock) -> Result<Option<ByteLock>> {
    let mut raw = to_raw(lock)?;
    fcntl_lock(file, libc::F_OFD_GETLK, &mut raw)?;
    let kind = match i32::from(raw.l_type) {
        libc::F_RDLCK => LockType::Read,
        libc::F_WRLCK => LockType::Write,
        _ => return Ok(None),
    };
    let start = raw.l_start.max(0).unsigned_abs();
    let end = match raw.l_len {
        0 => i64::MAX.unsigned_abs(),
        len => start.saturating_add(len.unsigned_abs()).saturating_sub(1),
    };
    Ok(Some(ByteLock { kind, start, end }))
}

/// A lock of this open file description, if `line` of its entry in /proc/PID/fdinfo is about one
/// (`show_fd_locks()` of Linux): `lock: 1: OFDLCK ADVISORY WRITE -1 08:01:42 0 EOF`.
pub fn of_fdinfo(line: &str) -> Option<ByteLock> {
    let mut fields = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
    let (class, _, kind) = (fields.next()?, fields.next()?, fields.next()?);
    let (start, end) = (fields.nth(2)?, fields.next()?);
    let kind = match (class, kind) {
        ("OFDLCK", "READ") => LockType::Read,
        ("OFDLCK", "WRITE") => LockType::Write,
        _ => return None,
    };
    let end = if end == "EOF" { i64::MAX.unsigned_abs() } else { end.parse().ok()? };
    Some(ByteLock { kind, start: start.parse().ok()?, end })
}

/// Whether a flock(2) lock of this open file description is exclusive, if `line` is about one:
/// `lock: 1: FLOCK  ADVISORY  WRITE 42 08:01:42 0 EOF`.
pub fn flock_of_fdinfo(line: &str) -> Option<bool> {
    let mut fields = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
    let (class, _, kind) = (fields.next()?, fields.next()?, fields.next()?);
    (class == "FLOCK").then_some(kind == "WRITE")
}

/// Takes or drops a lock; EAGAIN if another one stands in the way.
pub fn ofd_set(file: BorrowedFd<'_>, lock: ByteLock) -> Result<()> {
    fcntl_lock(file, libc::F_OFD_SETLK, &mut to_raw(lock)?)
}

/// Takes a lock and waits for it; EINTR when a signal comes.
pub fn ofd_set_wait(file: BorrowedFd<'_>, lock: ByteLock) -> Result<()> {
    fcntl_lock(file, libc::F_OFD_SETLKW, &mut to_raw(lock)?)
}

fn to_raw(lock: ByteLock) -> Result<libc::flock> {
    let kind = match lock.kind {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlock => libc::F_UNLCK,
    };
    let signed = |value| i64::try_from(value).map_err(|_| Errno::INVAL);
    let (start, end) = (signed(lock.start)?, signed(lock.end)?);
    let len = match end {
        i64::MAX => 0,
        _ => end.checked_sub(start).and_then(|len| len.checked_add(1)).ok_or(Errno::INVAL)?,
    };
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(|_| Errno::INVAL)?,
        l_whence: 0, // SEEK_SET
        l_start: start,
        l_len: len,
        l_pid: 0,
    })
}

fn fcntl_lock(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> Result<()> {
    // SAFETY: the descriptor is open, and `lock` is a valid struct that only this call uses.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}
