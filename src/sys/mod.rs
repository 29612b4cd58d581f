//! What no crate wraps safely: guest memory as I/O vectors, and a few system calls.

pub mod allocator;
pub mod arc_ref;
pub mod clock;
pub mod descriptors;
pub mod epoll;
pub mod exec;
pub mod fault_copy;
pub mod file_flags;
pub mod file_handles;
pub mod guest_buffers;
pub mod hangup;
pub mod held_file;
pub mod inherited;
pub mod lingering;
pub mod locks;
pub mod mapped;
pub mod memory;
pub mod pressure;
pub mod shared_map;
pub mod signals;
pub mod umask;
pub mod uring;
pub mod userfault;
pub mod window;

use std::os::fd::{IntoRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, Result};

/// The errno of the calling thread's last failed system call.
pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The byte count that a system call returned, or its errno.
fn check_size(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| last_errno())
}

/// Closes a descriptor and tells what close(2) says, which dropping it would not.
pub fn close(fd: OwnedFd) -> Result<()> {
    // SAFETY: the descriptor is ours alone and is not used afterwards.
    let result = unsafe { libc::close(fd.into_raw_fd()) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Closes all descriptors of the table of this process, also for the processes that share it.
///
/// Nobody may use or close one afterwards: the process is to end.
pub fn close_all() {
    // Nothing is left to be done where one cannot be closed.
    let _ = inherited::close_range(0, RawFd::MAX);
}
