//! A share: one directory of the host, served to one front end at a time over one socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::socket::Socket;
use crate::config::DeviceConfig;
use crate::device::engine::Stations;
use crate::limits::PaceHandle;
use crate::metrics::Metrics;
use crate::server::Server;
use crate::state_file::StateFile;

/// Everything that belongs to one share. Nothing in it belongs to the process, which can have several.
pub struct Share {
    /// What log messages call it.
    pub name: Arc<str>,
    /// The directory of the host that the guest mounts.
    pub directory: PathBuf,
    /// Wait for the next front end after one has disconnected.
    pub keep_listening: bool,
    /// Limits of the device that front ends see: its queues and their workers.
    pub device: DeviceConfig,
    /// Answers the requests.
    pub server: Arc<Server>,
    /// Rings for its engines.
    pub stations: Stations,
    /// What the guest can name, and its requests in flight.
    pub state: Arc<StateFile>,
    /// What is counted of it.
    pub metrics: Arc<Metrics>,
    /// Counters.
    pub statistics: Statistics,
    /// Where front ends connect. Dropped last: its path goes when nothing of the share is open any more.
    pub socket: Socket,
}

/// The rate limits of a share, beside its counters: they outlive a worker, and can be changed from outside.
pub(super) fn pace_of(metrics: &Arc<Metrics>) -> PaceHandle {
    PaceHandle::new(Arc::clone(metrics), |metrics| metrics.limits())
}

/// Counters since the share is served.
#[derive(Debug, Default)]
pub struct Statistics {
    front_ends: AtomicU64,
    failures: AtomicU64,
}

impl Statistics {
    /// Front ends that have connected.
    pub fn front_ends(&self) -> u64 {
        self.front_ends.load(Ordering::Relaxed)
    }

    /// Front ends that were disconnected because of an error.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(super) fn count_front_end(&self) {
        self.front_ends.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

impl Share {
    /// The name of a share in log messages: its mount tag, or its directory if it has none.
    ///
    /// The tag is what the guest calls it. The socket's name was rejected: launchers give all their sockets the same
    /// one, in directories of their own.
    pub fn name_for(tag: Option<&str>, directory: &Path) -> Arc<str> {
        let directory = directory.to_string_lossy();
        // One line of the log stays one line.
        let escape = |c: char| match c.is_control() {
            true => c.escape_default().collect(),
            false => String::from(c),
        };
        tag.unwrap_or(&directory).chars().map(escape).collect::<String>().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_called_by_its_tag_or_its_directory() {
        let directory = Path::new("/srv/it's\nmüller");
        assert_eq!(&*Share::name_for(Some("data"), directory), "data");
        assert_eq!(&*Share::name_for(None, directory), "/srv/it's\\nmüller");
    }
}
