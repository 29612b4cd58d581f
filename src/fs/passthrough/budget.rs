//! What a guest may hold of the host: descriptors that stay open between its requests.
//!
//! The guest decides how many inodes, handles and lock owners there are, and each takes a descriptor.
//! It must not get the last one: memory that is plugged in, queues that start and front ends that
//! connect take descriptors as well, and without any the daemon could not go on. So some are kept back.
//! Who wants to hold a descriptor takes a [`Slot`] before it opens anything, so that a request that is
//! refused has done nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::warn;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::fs::Result;
use crate::sys::memory;

/// Descriptors that are kept back where there are enough. A front end may plug in 509 regions of memory
/// with one each, 64 queues take seven each, and each of at most some hundred workers has one or two
/// open for the length of a request.
const RESERVE: usize = 2048;
/// Where there are few, this part of them is kept back.
const LEAST_PART: usize = 4;

/// Counts the descriptors that are held for the guest.
#[derive(Debug)]
pub struct Budget {
    held: AtomicUsize,
    most: usize,
}

impl Budget {
    /// All that RLIMIT_NOFILE allows but the reserve.
    pub fn of_the_process() -> Budget {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Budget::of(limit - RESERVE.min(limit / LEAST_PART))
    }

    /// `most` descriptors.
    pub fn of(most: usize) -> Budget {
        Budget { held: AtomicUsize::new(0), most }
    }

    /// How many there are altogether.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Says at the start what nobody could guess from an EMFILE later: inodes cannot be held by file
    /// handles, for which `errno` is the reason.
    pub fn warn_without_handles(&self, errno: Errno) {
        let remedy = match errno {
            Errno::PERM => "raise --rlimit-nofile, or start the daemon with CAP_DAC_READ_SEARCH",
            _ => "raise --rlimit-nofile",
        };
        warn!(
            "inodes cannot be held by file handles here ({errno}), so the guest can know and open {} files at once, and gets EMFILE (too many open files) for more; {remedy} if it needs more",
            self.most
        );
    }

    /// The right to hold one more descriptor, and memory for what belongs to it; EMFILE if there is no
    /// descriptor left for guests, ENOMEM if there is no memory.
    pub fn take(self: &Arc<Self>) -> Result<Slot> {
        memory::ask_for_some()?;
        if self.held.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.held.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::MFILE);
        }
        Ok(Slot(Arc::clone(self)))
    }

    /// How many are held.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// The right to hold a descriptor, until it is dropped.
#[derive(Debug)]
#[must_use = "the right ends when this is dropped"]
pub struct Slot(Arc<Budget>);

impl Slot {
    /// The descriptor that the right was taken for.
    pub fn hold(self, fd: OwnedFd) -> Held {
        Held { fd, _slot: Some(self) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor that is held for the guest.
#[derive(Debug)]
pub struct Held {
    // Closed before the slot is free.
    fd: OwnedFd,
    _slot: Option<Slot>,
}

impl Held {
    /// A descriptor that is closed at the end of the request, and so is not counted.
    pub fn for_a_request(fd: OwnedFd) -> Held {
        Held { fd, _slot: None }
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_let_go_of_can_be_taken_again() {
        let budget = Arc::new(Budget::of(2));
        let first = budget.take().unwrap();
        let held = first.hold(std::fs::File::open("/").unwrap().into());
        let second = budget.take().unwrap();
        assert_eq!(budget.take().unwrap_err(), Errno::MFILE);
        assert_eq!(budget.held(), 2);
        drop(held);
        let third = budget.take().unwrap();
        drop((second, third));
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn some_descriptors_are_always_kept_back() {
        let most = Budget::of_the_process().most();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(most > 0 && u64::try_from(most).unwrap() < limit);
    }
}
