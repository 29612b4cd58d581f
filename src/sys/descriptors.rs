//! The error message for a process that has run out of descriptors.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// The reason and the remedy.
pub const TOO_FEW: &str = "the daemon may not open as many descriptors as it needs: raise --rlimit-nofile, or LimitNOFILE= of systemd";

/// Whether a system call failed because the process ran out of descriptors (EMFILE, ENFILE).
pub fn is_lack(error: &(dyn Error + 'static)) -> bool {
    let of_std = error.downcast_ref::<io::Error>().and_then(Errno::from_io_error);
    let errno = error.downcast_ref::<Errno>().copied().or(of_std);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}
