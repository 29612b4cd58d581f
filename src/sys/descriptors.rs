//! What is said where the process may open no more descriptors.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// The reason and the remedy.
pub const TOO_FEW: &str = "the daemon may not open as many descriptors as it needs: raise --rlimit-nofile, or LimitNOFILE= of systemd";

/// Whether a system call failed for want of a descriptor.
pub fn is_lack(error: &(dyn Error + 'static)) -> bool {
    let of_std = error.downcast_ref::<io::Error>().and_then(Errno::from_io_error);
    let errno = error.downcast_ref::<Errno>().copied().or(of_std);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}
