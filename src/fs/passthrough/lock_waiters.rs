//! Requests that wait for a lock in the host's kernel, and how they are interrupted.
//!
//! A lock that another owner has blocks the thread of its request in a system call. [`LockWaiters`] lists these
//! threads by request, and interrupts them with a signal. A thread that waits is in the table; it leaves the table
//! before it ends, under the table's lock, so that every thread found there is alive. The signal may come just before
//! the system call, and is lost then: so it is sent again until the request has left.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::fs::{PUT_BACK, Result};
use crate::sync::blocking::block_in_place;
use crate::sys::signals::{ThreadId, wake};
use fuse_protocol::ids::Unique;

/// Requests of all queues that may wait for locks at once: each is a thread, of which the host has a limited number.
const MAX_WAITERS: usize = 1024;
/// Time between two signals for the same thread.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(1);
/// How often an INTERRUPT searches for its request before it is returned to the guest.
const MAX_SIGNALS: u32 = 10;

/// Threads that wait for locks, by the request they serve.
#[derive(Debug, Default)]
pub struct LockWaiters(Mutex<HashMap<Unique, Waiter>>);

#[derive(Debug)]
struct Waiter {
    thread: ThreadId,
    /// The errno that the wait ends with.
    end: Option<Errno>,
}

/// Removes the thread from the table when it is dropped.
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
    /// Ends the wait of request `unique`; returns when it has ended. EAGAIN, after some time, if there is none: a request
    /// that was sent before may not have begun to wait yet.
    pub fn interrupt(&self, unique: Unique) -> Result<()> {
        block_in_place(|| {
            let mut found = false;
            for _ in 0..MAX_SIGNALS {
                let there = self.end(Errno::INTR, |waiting| *waiting == unique);
                found |= there;
                if found && !there {
                    return Ok(());
                }
                thread::sleep(SIGNAL_INTERVAL);
            }
            // One that is still there gets no signals in time; it checks `end` before its next system call.
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

    /// Signals the threads whose requests `matches` selects; false if there are none.
    fn end(&self, with: Errno, matches: impl Fn(&Unique) -> bool) -> bool {
        let mut waiters = self.lock();
        let mut any = false;
        for (_, waiting) in waiters.iter_mut().filter(|(unique, _)| matches(unique)) {
            waiting.end.get_or_insert(with);
            wake(waiting.thread);
            any = true;
        }
        any
    }

    /// Runs `wait`, a system call that blocks, until it has ended or was interrupted.
    pub fn run(&self, unique: Unique, mut wait: impl FnMut() -> Result<()>) -> Result<()> {
        let _entry = self.enter(unique)?;
        block_in_place(|| {
            loop {
                if let Some(errno) = self.lock().get(&unique).map_or(Some(Errno::INTR), |waiting| waiting.end)
                {
                    return Err(errno);
                }
                match wait() {
                    Err(Errno::INTR) => {}
                    result => return result,
                }
            }
        })
    }

    /// Adds the calling thread to the table; EINVAL if the guest uses the number twice at once, as the thread that is
    /// there already must stay reachable, and ENOLCK if too many wait.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::locks::{ByteLock, LockType, ofd_set, ofd_set_wait};
    use std::os::fd::{AsFd, OwnedFd};
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
    fn the_number_of_waiters_is_limited() {
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
                    thread::sleep(SIGNAL_INTERVAL);
                }
            });
            assert!(done.load(Ordering::SeqCst));
        }
        // The table is empty.
        assert_eq!(waiters.interrupt(Unique(7)), Err(Errno::AGAIN));
        drop(first);
        assert_eq!(waiters.run(Unique(1), || ofd_set_wait(second.as_fd(), all)), Ok(()));
    }
}
