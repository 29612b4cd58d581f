//! The monitor, as far as the supervisor has to do with it.

use std::sync::Arc;

use super::Supervisor;
use super::upgrade::handover::Handover;
use crate::daemon::monitor::{self, Monitor};
use crate::daemon::share::Share;
use crate::fs::FileSystem;

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Starts the monitor anew if it has died, and does what it has noted.
    pub(super) fn look_after_monitor(&mut self) {
        if let Some(monitor) = &mut self.monitor {
            monitor.keep_alive();
            monitor::apply_log_level(&self.metrics);
            // Nothing else may happen for a long time.
            self.acceptor.set_alarm(Some(monitor.due()));
        }
    }

    /// Lets a monitor of this program take the place of the one that runs.
    pub(super) fn go_on_monitoring(&mut self, handover: &Handover) {
        let Some(parts) = &handover.monitor else { return };
        let name = Share::name_for(self.config.device.tag.as_deref(), &self.config.shared_dir);
        self.monitor = Monitor::go_on(self.config, &name, parts.clone(), (&self.state, &self.metrics));
        self.own.retain(|fd| !handover.monitored().any(|other| other == *fd));
        self.own.extend(self.monitor.iter().flat_map(Monitor::descriptors));
        if handover.failure.is_none() {
            self.metrics.count_upgrade();
        }
    }
}
