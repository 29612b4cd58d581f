//! Whether the supervisor's descriptors are those that it has opened. A worker shares the table of descriptors: a fault of
//! it, or whoever has taken it over, can close them or put others in their place.
//!
//! The supervisor looks after each wait, before it uses one. The wait itself may miss something then, since poll(2) looks
//! descriptors up again by their numbers: so it is not longer than [`INTERVAL`], and the death of a worker ends it by
//! SIGCHLD, too. What belongs to the worker, the descriptor of its process and
//! the stream, is lost with it, and another worker goes on. Anything else cannot be had again: the daemon ends, with the
//! connection of the front end, rather than wait for something that never comes or talk to somebody else.
//!
//! One eventfd cannot be told from another.
//!
//! To keep copies of all descriptors in a process with another table was rejected: files stay locked and storage stays
//! busy as long as one copy is there.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use log::error;

use super::link::Link;
use super::relay::Relay;
use super::{RunError, Supervisor};
use crate::fs::FileSystem;
use crate::logging;
use crate::sandbox;
use crate::sys::inherited::{Identity, identity};

/// How long a supervisor waits at most.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);

/// Descriptors, and what they are of.
#[derive(Debug, Default)]
pub(super) struct Known(Vec<(RawFd, Option<Identity>)>);

impl Known {
    /// As they are now.
    pub(super) fn of(fds: impl IntoIterator<Item = RawFd>) -> Known {
        Known(fds.into_iter().map(|fd| (fd, identity(fd).ok())).collect())
    }

    /// The first one that is of something else by now.
    fn lost(&self) -> Option<RawFd> {
        self.0.iter().find(|(fd, then)| Identity::is_lost(*then, *fd)).map(|(fd, _)| *fd)
    }
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Ends a worker that has closed or replaced the supervisor's descriptors, and the daemon, if it cannot go on.
    pub(super) fn check(&self, worker: &Link, relay: Option<&Relay>) -> Result<(), RunError> {
        let own = self.known.lost().map(|fd| (fd, "one of its own"));
        if let Some((fd, what)) = own.or_else(|| relay.and_then(Relay::lost)) {
            worker.kill();
            worker.reap()?;
            logging::report_fatal_error(&RunError::Lost { fd, what });
            self.socket.remove_files();
            // Nothing is closed on the way: the numbers may be somebody else's.
            sandbox::exit(1);
        }
        if !worker.is_intact() && !worker.has_ended()? {
            error!("the worker process has closed or replaced the supervisor's connection with it");
            worker.kill();
            // Nothing else tells of its end.
            worker.ending()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::inherited::Shared;
    use std::os::fd::{AsRawFd as _, OwnedFd};

    #[test]
    fn a_descriptor_that_is_closed_or_replaced_is_lost() {
        let [mut one, other] = [(); 2].map(|()| OwnedFd::from(tempfile::tempfile().unwrap()));
        let known = Known::of([other.as_raw_fd(), one.as_raw_fd()]);
        assert_eq!(known.lost(), None);
        rustix::io::dup2(&other, &mut one).unwrap();
        assert_eq!(known.lost(), Some(one.as_raw_fd()));
        let shared = Shared::new(other);
        assert!(shared.is_intact());
    }
}
