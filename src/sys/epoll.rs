//! epoll_pwait2(2): a wait for events whose timeout is as exact as the kernel's timers.
//!
//! rustix makes it only for programs that need Linux 5.11, and otherwise epoll_pwait(2), whose timeout is a number of
//! milliseconds.

use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::{Errno, Result};

use super::last_errno;

/// The kernel has no epoll_pwait2(2), or a filter says so.
static IS_MISSING: AtomicBool = AtomicBool::new(false);

/// Waits up to `timeout` for an event; false if there is none. On Linux before 5.11 it may take a millisecond longer.
pub fn wait(instance: impl AsFd, timeout: Duration) -> Result<bool> {
    let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
    if !IS_MISSING.load(Ordering::Relaxed) {
        let timeout = libc::timespec { tv_sec: seconds, tv_nsec: timeout.subsec_nanos().into() };
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the kernel writes one event at most, and reads the time; no signal mask is given.
        let found = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                instance.as_fd().as_raw_fd(),
                &raw mut event,
                1,
                &raw const timeout,
                ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        match found {
            0.. => return Ok(found > 0),
            _ if last_errno() != Errno::NOSYS => return Err(last_errno()),
            _ => IS_MISSING.store(true, Ordering::Relaxed),
        }
    }
    let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
    let timeout = Timespec { tv_sec: seconds, tv_nsec: timeout.subsec_nanos().into() };
    epoll::wait(instance, &mut events[..], Some(&timeout)).map(|found| found > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::time::Instant;

    #[test]
    fn a_wait_ends_with_an_event_or_after_its_time() {
        let instance = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&instance, &event, epoll::EventData::new_u64(0), edge).unwrap();
        for is_missing in [false, true] {
            IS_MISSING.store(is_missing, Ordering::Relaxed);
            let begin = Instant::now();
            assert_eq!(wait(&instance, Duration::from_micros(1500)), Ok(false));
            assert!(begin.elapsed() >= Duration::from_micros(1500));
            rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(wait(&instance, Duration::from_secs(10)), Ok(true));
            assert_eq!(wait(&instance, Duration::ZERO), Ok(false));
        }
        IS_MISSING.store(false, Ordering::Relaxed);
    }
}
