//! Descriptors that were open before the process, or its program, began: its launcher's, or those of an earlier process that
//! shares its table.

use std::ffi::c_uint;
use std::io::{self, Error};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use rustix::io::{Errno, fcntl_dupfd_cloexec, fcntl_getfd};
use rustix::pipe::{PipeFlags, pipe_with};

/// The first one after standard input, output and error.
const FIRST: RawFd = 3;

/// Closes all descriptors but the standard ones and `kept`, and replaces standard input by an empty one.
///
/// One that a launcher forgot to close would be a way out of the sandbox, and keep a file system busy that the host
/// wants to unmount. Standard input is replaced by the reading end of a pipe without a writer: unlike /dev/null it
/// belongs to no mount. Output descriptors stay, unless one is a directory, which takes no output and leads to others.
///
/// Must be called before the process opens anything of its own.
pub fn close_all(kept: Option<RawFd>) -> io::Result<()> {
    close_all_but(kept.into_iter().collect())?;
    let (empty, _) = pipe_with(PipeFlags::CLOEXEC)?;
    replace(libc::STDIN_FILENO, empty.as_raw_fd())?;
    for output in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        if is_directory(output) {
            replace(output, empty.as_raw_fd())?;
        }
    }
    Ok(())
}

/// Closes all descriptors but the standard ones and `kept`. The caller knows that no other code has any.
pub fn close_all_but(mut kept: Vec<RawFd>) -> io::Result<()> {
    kept.sort_unstable();
    let mut next = FIRST;
    for fd in kept.into_iter().filter(|fd| *fd >= FIRST) {
        close_range(next, fd.saturating_sub(1))?;
        next = fd.saturating_add(1).max(next);
    }
    close_range(next, RawFd::MAX)
}

/// Closes the descriptors from `first` to `last`.
pub(super) fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    let (Ok(from), Ok(to)) = (c_uint::try_from(first), c_uint::try_from(last)) else { return Ok(()) };
    if from > to {
        return Ok(());
    }
    // SAFETY: no code uses the descriptors that are closed: this process has opened nothing yet, or ends, or its caller knows.
    let result = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
    if result == 0 {
        return Ok(());
    }
    // The call is there from Linux 5.9 on, and not in every container.
    close_one_by_one(first, last)
}

/// A copy of a descriptor with this number. EBADF if it is not open.
pub fn copy(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: borrowed for one system call only; a descriptor that is not open answers EBADF.
    fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 0)
}

/// The descriptor with this number, which nothing else of this process uses. EBADF if it is not open.
pub fn adopt(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: borrowed for one system call only; a descriptor that is not open answers EBADF.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) })?;
    // SAFETY: it is open, and the caller says that it is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a descriptor is of: device and inode. Two of one file are equal; so are all of some kinds, such as eventfds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64, u64);

impl Identity {
    /// Whether the descriptor with this number is of something else by now, or of nothing. Storage that cannot tell, since
    /// it has died, is no other storage.
    pub fn is_lost(then: Option<Identity>, fd: RawFd) -> bool {
        match identity(fd) {
            Ok(now) => then.is_some_and(|then| now != then),
            Err(errno) => errno == Errno::BADF,
        }
    }
}

/// What the descriptor with this number is of. EBADF if it is not open. A server of network storage, which may not answer,
/// is not asked.
pub fn identity(fd: RawFd) -> Result<Identity, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: borrowed for one question only; a descriptor that is not open answers EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let stat = statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
    let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
    Ok(Identity(device, stat.stx_ino))
}

/// A descriptor whose number another process may have closed or replaced, since it shares the table. It is closed only
/// if it is what it was: the number could be that of a file by now that somebody else has open.
#[derive(Debug)]
pub struct Shared<T: AsRawFd>(ManuallyDrop<T>, Option<Identity>);

impl<T: AsRawFd> Shared<T> {
    /// A descriptor that was just opened.
    pub fn new(inner: T) -> Shared<T> {
        let identity = identity(inner.as_raw_fd()).ok();
        Shared(ManuallyDrop::new(inner), identity)
    }

    /// Whether it is what it was.
    pub fn is_intact(&self) -> bool {
        self.1.is_some() && !Identity::is_lost(self.1, self.0.as_raw_fd())
    }
}

impl<T: AsRawFd> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: AsRawFd> Drop for Shared<T> {
    fn drop(&mut self) {
        if self.is_intact() {
            // SAFETY: it is dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Closes all descriptors from 3 on but these.
///
/// Must be called by a process that has just been forked and that drops nothing of what its parent had.
pub fn close_others(kept: &[RawFd]) -> io::Result<()> {
    let open = list()?;
    for fd in open.into_iter().filter(|fd| *fd > 2 && !kept.contains(fd)) {
        // SAFETY: nothing of this process uses it any more, as the caller promises. That of the list answers EBADF.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// The descriptors that are open now.
pub fn all_open() -> io::Result<Vec<RawFd>> {
    let mut open = list()?;
    // SAFETY: borrowed for one question only; that of the list, which is closed again, answers EBADF.
    open.retain(|fd| fcntl_getfd(unsafe { BorrowedFd::borrow_raw(*fd) }).is_ok());
    Ok(open)
}

/// The descriptors that are open, and that of the list itself, which is closed by the end of the call.
fn list() -> io::Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

fn close_one_by_one(first: RawFd, last: RawFd) -> io::Result<()> {
    // Collected first: the list must not change while it is read.
    let open = list()?;
    for fd in open.into_iter().filter(|fd| (first..=last).contains(fd)) {
        // SAFETY: as above. That of the list, which is closed already, answers EBADF.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

fn is_directory(fd: RawFd) -> bool {
    // SAFETY: borrowed for one question only; a descriptor that is not open answers EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::fs::fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
}

/// Makes a standard descriptor another name of `with`.
fn replace(standard: RawFd, with: RawFd) -> io::Result<()> {
    // SAFETY: the standard library uses standard descriptors by their numbers and never takes them for something
    // else than a stream that may fail.
    if unsafe { libc::dup2(with, standard) } < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}
