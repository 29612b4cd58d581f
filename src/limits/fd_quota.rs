//! The quota of descriptors that stay open between a guest's requests.
//!
//! The guest decides how many inodes, handles and lock owners there are, and each takes a descriptor. It must not
//! get the last one: guest memory, queues and front ends need descriptors as well, and without any the daemon cannot
//! go on. So a reserve stays free, larger than what process and device have already. The device reports its
//! descriptors whenever their number changes. A guest that exceeds its new quota gets no other descriptor until it
//! has closed some.
//!
//! A request acquires an [`FdPermit`] before it opens anything, so that one that is refused has changed nothing. The
//! permit wraps the descriptor as a [`GuestFd`], which gives the permit back when it is closed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::io::{Errno, Result};
use rustix::process::{Resource, getrlimit};

use crate::sys::memory;

/// Descriptors of the reserve where there are enough. A front end may plug in 509 regions of memory with one
/// each, 64 queues take seven each, and each of some hundred workers has one or two open during a request.
const RESERVE: usize = 2048;
/// Where there are few, this part of them is the reserve.
const RESERVE_PART: usize = 4;
/// Beyond so many, the reserve has room for all queues that the device offers.
const QUEUES_FIRST: usize = 512;
/// Regions of guest memory of a virtual machine with little or no memory plugged in.
const USUAL_REGIONS: usize = 64;
/// This part of all descriptors is the guest's in any case. The device may lack what it needs beyond the rest.
const GUEST_PART: usize = 8;
/// The connection with a front end, and those that wait.
const CONNECTIONS: usize = 12;

/// Descriptors of the device, for queues and guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceDescriptors {
    /// Most that its queues have had at once since the front end connected: they may need that many again.
    pub queues: usize,
    /// What all queues have when they run.
    pub all_queues: usize,
    /// One for each region of guest memory.
    pub memory: usize,
}

/// Counts the descriptors that are open for the guest, up to a limit.
#[derive(Debug)]
pub struct FdQuota {
    in_use: AtomicUsize,
    max: AtomicUsize,
    /// What guest, device and process may have together.
    limit: usize,
    /// What the process had before there was a device or a guest.
    own: usize,
}

impl FdQuota {
    /// All that RLIMIT_NOFILE allows but the reserve: for the only share of a process. `proc_self_fd` is the
    /// directory `/proc/self/fd`, which tells how many descriptors the process has open.
    pub fn of_the_process(proc_self_fd: &OwnedFd) -> Result<FdQuota> {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let quota =
            FdQuota::new(usize::try_from(limit).unwrap_or(usize::MAX), open_descriptors(proc_self_fd)?);
        quota.reserve_for(DeviceDescriptors::default());
        Ok(quota)
    }

    /// The same for a process that goes on with the descriptors of an earlier one, which had `own` of its own.
    pub fn of_a_later_process(own: usize) -> FdQuota {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let quota = FdQuota::new(usize::try_from(limit).unwrap_or(usize::MAX), own);
        quota.reserve_for(DeviceDescriptors::default());
        quota
    }

    /// Descriptors that the process had before there was a device or a guest.
    pub fn own(&self) -> usize {
        self.own
    }

    /// A quota of `limit` descriptors, without a reserve until the device asks for one; the process takes
    /// `own` of them.
    pub fn new(limit: usize, own: usize) -> FdQuota {
        FdQuota { in_use: AtomicUsize::new(0), max: AtomicUsize::new(limit), limit, own }
    }

    /// The largest number of descriptors that the guest may have.
    pub fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Whether the guest has more than that, since the device needs some.
    pub fn is_exceeded(&self) -> bool {
        self.in_use.load(Ordering::Relaxed) > self.max()
    }

    /// Reserves what the device has, and what it may still need. Returns whether that changes the quota.
    pub fn reserve_for(&self, device: DeviceDescriptors) -> bool {
        let max = max_for_guest(self.limit, self.own.saturating_add(CONNECTIONS), device);
        self.max.swap(max, Ordering::Relaxed) != max
    }

    /// The permit to keep one more descriptor open, and memory for what belongs to it: EMFILE if the quota is used
    /// up, ENOMEM if there is no memory.
    pub fn acquire(self: &Arc<Self>) -> Result<FdPermit> {
        memory::ask_for_some()?;
        if self.in_use.fetch_add(1, Ordering::Relaxed) >= self.max() {
            self.in_use.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::MFILE);
        }
        Ok(FdPermit(Arc::clone(self)))
    }

    /// The permit for a descriptor that is open already, whatever the quota.
    pub fn take(self: &Arc<Self>) -> FdPermit {
        self.in_use.fetch_add(1, Ordering::Relaxed);
        FdPermit(Arc::clone(self))
    }

    /// Counts descriptors that are open already, and whose permits are had one by one later ([`FdQuota::counted`]).
    pub fn count(&self, descriptors: usize) {
        self.in_use.fetch_add(descriptors, Ordering::Relaxed);
    }

    /// The permit for one of them.
    pub fn counted(self: &Arc<Self>) -> FdPermit {
        FdPermit(Arc::clone(self))
    }

    /// How many descriptors are open.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }
}

/// How many descriptors this process has open. `proc_self_fd` may be an O_PATH descriptor, which cannot be read itself.
fn open_descriptors(proc_self_fd: &OwnedFd) -> Result<usize> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let list = Dir::new(openat(proc_self_fd, ".", flags, Mode::empty())?)?;
    let entries = list.collect::<Result<Vec<_>>>()?;
    // Two entries are the directory and its parent, and one is of the list itself.
    Ok(entries.len().saturating_sub(3))
}

/// The guest's part of `limit` descriptors, of which the process has `own` and the device others.
fn max_for_guest(limit: usize, own: usize, device: DeviceDescriptors) -> usize {
    let reserve = (limit / RESERVE_PART).min(RESERVE);
    // Half of the reserve is free whatever process and queues have, and a quarter besides all memory.
    let free = (reserve / 2).max(device.memory.saturating_add(reserve / 4));
    let to_come = device.all_queues.saturating_sub(device.queues).saturating_add(USUAL_REGIONS);
    let free = free.max(to_come.min(limit.saturating_sub(QUEUES_FIRST)));
    let others = own.saturating_add(device.queues).saturating_add(free);
    limit.saturating_sub(reserve.max(others)).max(limit / GUEST_PART)
}

/// The permit to keep a descriptor open, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping a permit gives it back"]
pub struct FdPermit(Arc<FdQuota>);

impl FdPermit {
    /// The descriptor that the permit was acquired for.
    pub fn wrap(self, fd: OwnedFd) -> GuestFd {
        GuestFd { fd, _permit: Some(self) }
    }
}

impl Drop for FdPermit {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor that is open for the guest.
#[derive(Debug)]
pub struct GuestFd {
    // Fields are dropped in this order: the descriptor is closed before another one may be opened for it.
    fd: OwnedFd,
    _permit: Option<FdPermit>,
}

impl GuestFd {
    /// A descriptor that is closed at the end of the request, and so is not counted.
    pub fn uncounted(fd: OwnedFd) -> GuestFd {
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
    fn a_permit_that_is_dropped_can_be_acquired_again() {
        let quota = Arc::new(FdQuota::new(2, 0));
        let first = quota.acquire().unwrap();
        let held = first.wrap(std::fs::File::open("/").unwrap().into());
        let second = quota.acquire().unwrap();
        assert_eq!(quota.acquire().unwrap_err(), Errno::MFILE);
        assert_eq!(quota.in_use(), 2);
        drop(held);
        let third = quota.acquire().unwrap();
        drop((second, third));
        assert_eq!(quota.in_use(), 0);
    }

    #[test]
    fn descriptors_are_counted_however_the_list_is_held() {
        let path_only = OFlags::PATH | OFlags::DIRECTORY;
        for flags in [OFlags::RDONLY, path_only] {
            let proc_self_fd = openat(rustix::fs::CWD, "/proc/self/fd", flags, Mode::empty()).unwrap();
            assert!(open_descriptors(&proc_self_fd).unwrap() >= 4, "{flags:?}");
        }
    }

    #[test]
    fn the_process_keeps_a_reserve() {
        let proc_self_fd = std::fs::File::open("/proc/self/fd").unwrap().into();
        let max = FdQuota::of_the_process(&proc_self_fd).unwrap().max();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(max > 0 && u64::try_from(max).unwrap() < limit);
    }

    #[test]
    fn descriptors_of_the_device_are_not_the_guests() {
        const OWN: usize = 30;
        const ALL: usize = 64 * 7;
        for limit in [64, 72, 128, 200, 256, 300, 512, 600, 1024, 2000, 4096, 8192, 1_000_000, usize::MAX] {
            let part = (limit / 4).min(2048);
            for (queues, memory) in
                (0..=64).flat_map(|queues| [1, 8, 60, 509].map(|memory| (queues * 7, memory)))
            {
                let context = format!("{limit} with {queues} for queues and {memory} for memory");
                let max = max_for_guest(limit, OWN, DeviceDescriptors { queues, memory, all_queues: ALL });
                assert!(max >= limit / 8 && max > 0, "{context}");
                // What is free when the guest has all of its own.
                let taken = OWN + queues + memory + max;
                assert!(taken + part / 4 <= limit || max == limit / 8, "{context}");
                // All queues, and memory as usual.
                assert!(limit < 1024 || memory > 60 || OWN + ALL + memory + max < limit, "{context}");
            }
        }
        let all = DeviceDescriptors { queues: ALL, memory: 509, all_queues: ALL };
        assert_eq!(max_for_guest(1_000_000, OWN, all), 1_000_000 - 2048);
    }
}
