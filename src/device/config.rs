//! Options of the device.

use std::time::Duration;

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
}
