//! The worker at the descriptors of its supervisor, which are in the same table.

use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::fcntl_dupfd_cloexec;

/// Closes a descriptor, or puts another one in its place, by `HOW:NUMBER`: `close`, `event` (an event that never comes),
/// or `socket` (one with a peer).
pub fn meddle(text: &str) -> Result<()> {
    let (how, number) = text.split_once(':').with_context(|| format!("{text}: which descriptor?"))?;
    let number: RawFd = number.parse().with_context(|| format!("{text}: which descriptor?"))?;
    let other = match how {
        "close" => None,
        "event" => Some(eventfd(0, EventfdFlags::CLOEXEC)?),
        "socket" => {
            let (one, other) = UnixStream::pair()?;
            // It lives as long as the daemon.
            let _ = other.into_raw_fd();
            Some(one.into())
        }
        _ => bail!("{text}: close, event or socket"),
    };
    close(number);
    if let Some(other) = other {
        let copy = fcntl_dupfd_cloexec(&other, number)?;
        if copy.as_raw_fd() == number {
            let _ = copy.into_raw_fd();
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn close(number: RawFd) {
    // SAFETY: unsound on purpose: whoever has the descriptor is to notice.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
}
