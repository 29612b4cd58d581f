//! Descriptors that the process has inherited from its launcher.

use std::ffi::c_uint;
use std::io::{self, Error};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use rustix::fs::FileType;
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
    match kept {
        Some(kept) => {
            close_range(FIRST, kept.saturating_sub(1))?;
            close_range(kept.saturating_add(1), RawFd::MAX)?;
        }
        None => close_range(FIRST, RawFd::MAX)?,
    }
    let (empty, _) = pipe_with(PipeFlags::CLOEXEC)?;
    replace(libc::STDIN_FILENO, empty.as_raw_fd())?;
    for output in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        if is_directory(output) {
            replace(output, empty.as_raw_fd())?;
        }
    }
    Ok(())
}

/// Closes the descriptors from `first` to `last`.
fn close_range(first: RawFd, last: RawFd) -> io::Result<()> {
    let (Ok(from), Ok(to)) = (c_uint::try_from(first), c_uint::try_from(last)) else { return Ok(()) };
    if from > to {
        return Ok(());
    }
    // SAFETY: this process has opened nothing yet, so no code uses the descriptors that are closed.
    let result = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
    if result == 0 {
        return Ok(());
    }
    // The call is there from Linux 5.9 on, and not in every container.
    close_one_by_one(first, last)
}

fn close_one_by_one(first: RawFd, last: RawFd) -> io::Result<()> {
    // Collected first: the list must not change while it is read. Its own descriptor is closed by then.
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
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
