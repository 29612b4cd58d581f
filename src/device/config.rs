//! Options of the device.

use std::time::Duration;

use crate::limits::{PaceHandle, Rates};
use crate::migration::config::MigrationConfig;

/// Options of the virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Mount tag that the device's configuration space shows; without one there is no such space.
    pub tag: Option<String>,
    /// Request queues that are offered, 1 to 63; the guest uses as many as it likes.
    pub request_queues: usize,
    /// Maximum number of workers per queue; 0 and 1 serve one request at a time.
    pub thread_pool_size: usize,
    /// Adaptive busy-poll time; 0 disables it.
    pub poll_time: Duration,
    /// Rate limits of request queues.
    pub rates: Rates,
    /// Rate limits that other shares have together with this one.
    pub group: Option<PaceHandle>,
    /// Another process with the same table of descriptors keeps a copy of those that the front end sends.
    pub descriptors_are_copied: bool,
    /// How the state of the device is saved, and what is asked of one that is loaded.
    pub migration: MigrationConfig,
}
