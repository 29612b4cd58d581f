//! What a guest may hold of the host: descriptors that stay open between its requests.
//!
//! The guest decides how many inodes, handles and lock owners there are, and each takes a descriptor.
//! It must not get the last one: memory that is plugged in, queues that start and front ends that
//! connect take descriptors as well, and without any the daemon could not go on. So some are kept back: more
//! than what the process and its device have already. The device says how many these are whenever that
//! changes; if the guest has more than it may have from then on, it gets no other until it has let go of some.
//! Who wants to hold a descriptor takes a [`FdPermit`] before it opens anything, so that a request that is
//! refused has done nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::warn;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::fs::{DeviceDescriptors, Result};
use crate::sys::memory;

/// Descriptors that are kept back where there are enough. A front end may plug in 509 regions of memory
/// with one each, 64 queues take seven each, and each of at most some hundred workers has one or two
/// open for the length of a request.
const RESERVE: usize = 2048;
/// Where there are few, this part of them is kept back.
const LEAST_PART: usize = 4;
/// Beyond so many, all queues that the device offers are sure to get theirs.
const FOR_OTHERS: usize = 512;
/// Regions of guest memory that virtual machines have with little or no memory plugged in.
const LIKELY_MEMORY: usize = 64;
/// This part of all descriptors is for the guest in any case. The device may lack what it takes beyond the rest.
const GUESTS_PART: usize = 8;
/// The connection with a front end, and those that wait.
const CONNECTIONS: usize = 12;

/// Counts the descriptors that are held for the guest.
#[derive(Debug)]
pub struct FdQuota {
    held: AtomicUsize,
    most: AtomicUsize,
    /// What the process may have.
    limit: usize,
    /// What it had before there was a device or a guest.
    own: usize,
}

impl FdQuota {
    /// All that RLIMIT_NOFILE allows but the reserve, for a process that has `own` descriptors open.
    pub fn of_the_process(own: usize) -> FdQuota {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let quota = FdQuota::of(usize::try_from(limit).unwrap_or(usize::MAX), own);
        quota.keep_back(DeviceDescriptors::default());
        quota
    }

    /// A limit of `most` descriptors, with nothing kept back.
    pub fn of(most: usize, own: usize) -> FdQuota {
        FdQuota { held: AtomicUsize::new(0), most: AtomicUsize::new(most), limit: most, own }
    }

    /// How many there are altogether.
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }

    /// Whether the guest has more than it may have since the device has taken some.
    pub fn is_exceeded(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.most()
    }

    /// Leaves the device what it has, and what it may still take; whether that changes anything.
    pub fn keep_back(&self, device: DeviceDescriptors) -> bool {
        let most = most_for_guests(self.limit, self.own.saturating_add(CONNECTIONS), device);
        self.most.swap(most, Ordering::Relaxed) != most
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
            self.most()
        );
    }

    /// The right to hold one more descriptor, and memory for what belongs to it; EMFILE if there is no
    /// descriptor left for guests, ENOMEM if there is no memory.
    pub fn acquire(self: &Arc<Self>) -> Result<FdPermit> {
        memory::ask_for_some()?;
        if self.held.fetch_add(1, Ordering::Relaxed) >= self.most() {
            self.held.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::MFILE);
        }
        Ok(FdPermit(Arc::clone(self)))
    }

    /// How many are held.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// What the guest may have of `limit` descriptors, of which the process has `own` and the device others.
fn most_for_guests(limit: usize, own: usize, device: DeviceDescriptors) -> usize {
    let reserve = (limit / LEAST_PART).min(RESERVE);
    // Half of the reserve is free whatever the process and its queues have, and a quarter besides all memory.
    let free = (reserve / 2).max(device.memory.saturating_add(reserve / 4));
    let to_come = device.all_queues.saturating_sub(device.queues).saturating_add(LIKELY_MEMORY);
    let free = free.max(to_come.min(limit.saturating_sub(FOR_OTHERS)));
    let others = own.saturating_add(device.queues).saturating_add(free);
    limit.saturating_sub(reserve.max(others)).max(limit / GUESTS_PART)
}

/// The right to hold a descriptor, until it is dropped.
#[derive(Debug)]
#[must_use = "the right ends when this is dropped"]
pub struct FdPermit(Arc<FdQuota>);

impl FdPermit {
    /// The descriptor that the right was taken for.
    pub fn wrap(self, fd: OwnedFd) -> GuestFd {
        GuestFd { fd, _permit: Some(self) }
    }
}

impl Drop for FdPermit {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor that is held for the guest.
#[derive(Debug)]
pub struct GuestFd {
    // Closed before the permit is free.
    fd: OwnedFd,
    _permit: Option<FdPermit>,
}

impl GuestFd {
    /// A descriptor that is closed at the end of the request, and so is not counted.
    pub fn for_a_request(fd: OwnedFd) -> GuestFd {
        GuestFd { fd, _permit: None }
    }
}

impl AsFd for GuestFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_let_go_of_can_be_taken_again() {
        let quota = Arc::new(FdQuota::of(2, 0));
        let first = quota.acquire().unwrap();
        let held = first.wrap(std::fs::File::open("/").unwrap().into());
        let second = quota.acquire().unwrap();
        assert_eq!(quota.acquire().unwrap_err(), Errno::MFILE);
        assert_eq!(quota.held(), 2);
        drop(held);
        let third = quota.acquire().unwrap();
        drop((second, third));
        assert_eq!(quota.held(), 0);
    }

    #[test]
    fn some_descriptors_are_always_kept_back() {
        let most = FdQuota::of_the_process(20).most();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(most > 0 && u64::try_from(most).unwrap() < limit);
    }

    #[test]
    fn what_the_device_takes_is_not_for_the_guest() {
        const OWN: usize = 30;
        const ALL: usize = 64 * 7;
        for limit in [64, 72, 128, 200, 256, 300, 512, 600, 1024, 2000, 4096, 8192, 1_000_000, usize::MAX] {
            let part = (limit / 4).min(2048);
            for (queues, memory) in
                (0..=64).flat_map(|queues| [1, 8, 60, 509].map(|memory| (queues * 7, memory)))
            {
                let context = format!("{limit} with {queues} for queues and {memory} for memory");
                let most = most_for_guests(limit, OWN, DeviceDescriptors { queues, memory, all_queues: ALL });
                assert!(most >= limit / 8 && most > 0, "{context}");
                // What is free when the guest has all of its own.
                let taken = OWN + queues + memory + most;
                assert!(taken + part / 4 <= limit || most == limit / 8, "{context}");
                // All queues, and memory as usual.
                assert!(limit < 1024 || memory > 60 || OWN + ALL + memory + most < limit, "{context}");
            }
        }
        let all = DeviceDescriptors { queues: ALL, memory: 509, all_queues: ALL };
        assert_eq!(most_for_guests(1_000_000, OWN, all), 1_000_000 - 2048);
    }
}
