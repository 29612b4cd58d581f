//! The share is mounted anew, and the daemon goes on with it: `lanefsd reopen`.
//!
//! A worker in its sandbox does not see later mounts in the place of the share itself, and what the guest has open stays on
//! the old one. The supervisor is outside. On request it lets the worker drain, as for an upgrade. The next worker opens the
//! directory by its path, before it confines itself, makes another sandbox of it, and opens again what the state file names
//! ([`crate::fs::passthrough::PassthroughFs::reopen`]). The supervisor itself asks the storage nothing, which may hang.
//!
//! If the directory cannot be opened, the next worker joins the sandbox that is there.

use std::sync::Arc;

use log::{error, info};

use super::upgrade::{Drained, Step, VERSION, drain};
use super::{Cause, Entered, FileSystem, Known, Link, Relay, RunError, Supervisor, WorkerEnd};
use crate::daemon::report::Outcome;

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Ends a worker that serves no front end; the next one opens the share anew.
    pub(super) fn reopen_idle(&mut self, worker: Link) -> Result<(), RunError> {
        worker.kill();
        worker.reap()?;
        drop(worker);
        self.sandbox.renew();
        Ok(())
    }

    /// Does what is asked for while a front end is served, and for what a worker has to make room.
    pub(super) fn make_room(
        &mut self,
        step: Step,
        relay: &mut Relay,
        worker: Link,
    ) -> Result<Drained, RunError> {
        match step {
            Step::Reopen => self.reopen_serving(relay, worker),
            _ => self.upgrade_serving(relay, worker),
        }
    }

    /// Lets a worker finish; the next one opens the share anew.
    fn reopen_serving(&mut self, relay: &mut Relay, mut worker: Link) -> Result<Drained, RunError> {
        let drained = drain(&worker)?;
        match drained {
            Drained::For(_) => {
                relay.begin_again(&mut worker);
                if let Some(dead) = self.zombie.replace(worker.into_zombie()) {
                    dead.reap();
                }
                self.sandbox.renew();
            }
            Drained::Ended(_) => {
                worker.reap()?;
                self.report_reopened(Some("the worker process has ended meanwhile".into()));
            }
        }
        Ok(drained)
    }

    /// A worker is not ready and has ended. If it was to open the share anew, the next one is not: whether that is so.
    pub(super) fn give_up_reopening(&mut self, end: WorkerEnd) -> bool {
        let renews = self.sandbox.renews();
        if renews {
            self.sandbox.keep();
            self.report_reopened(Some(format!("the worker process {}", Cause(end))));
        }
        renews
    }

    /// A worker is ready in this sandbox.
    pub(super) fn enter(&mut self, entered: Entered) {
        let renews = self.sandbox.renews();
        self.sandbox.set_entered(entered);
        if renews {
            self.known = Known::of(self.own.iter().copied().chain(self.sandbox.descriptors()));
            self.report_reopened(None);
        }
    }

    fn report_reopened(&self, error: Option<String>) {
        match &error {
            None => info!("the share was opened anew"),
            Some(why) => error!("the share cannot be opened anew: {why}"),
        }
        self.upgrade.report(&Outcome { error, from: VERSION.into(), to: VERSION.into() });
    }
}
