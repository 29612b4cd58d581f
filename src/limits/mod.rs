//! Quotas and rate limits: what one guest may take of the host's resources.
//!
//! Whoever makes a share hands it its quotas. A share counts by them and by nothing else, so that one whose guest has
//! used up its own takes nothing from another share of the same process.

mod fd_quota;
mod group;
mod locked_range_quota;
mod memory_quota;
mod pace;
mod rates;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Result;

pub use self::fd_quota::{DeviceDescriptors, FdPermit, FdQuota, GuestFd};
pub use self::group::{GroupError, open_group};
pub use self::locked_range_quota::LockedRangeQuota;
pub use self::memory_quota::MemoryQuota;
pub use self::pace::{Class, Limit, Pace, Wait};
pub use self::rates::{RateError, Rates};
use crate::sys::arc_ref::ArcRef;
use crate::sys::shared_map::Record;

/// The rate limits of a share, wherever they are: in memory of their own, or a part of something that others share.
pub type PaceHandle = ArcRef<Pace>;

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for Pace {}

/// The quotas of one share.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Descriptors that stay open between requests.
    pub fds: Arc<FdQuota>,
    /// Byte ranges that are locked.
    pub locked_ranges: Arc<LockedRangeQuota>,
    /// Memory of open directories.
    pub memory: Arc<MemoryQuota>,
}

impl Limits {
    /// These descriptors, and the usual numbers of all else.
    pub fn new(fds: FdQuota) -> Limits {
        Limits { fds: Arc::new(fds), locked_ranges: Arc::default(), memory: Arc::default() }
    }

    /// For the only share of a process that goes on with the descriptors of an earlier one, which had `own` of its own.
    pub fn of_a_later_process(own: usize) -> Limits {
        Limits::new(FdQuota::of_a_later_process(own))
    }

    /// For the only share of a process: see [`FdQuota::of_the_process`].
    pub fn of_the_process(proc_self_fd: &OwnedFd) -> Result<Limits> {
        Ok(Limits::new(FdQuota::of_the_process(proc_self_fd)?))
    }
}
