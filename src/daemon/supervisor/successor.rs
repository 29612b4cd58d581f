//! How a worker is started, and another one in its place.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::error;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::deaths::{death_of, status};
use super::intact::INTERVAL;
use super::link::Link;
use super::reconnect::Parked;
use super::relay::Relay;
use super::worker::{self, Task};
use super::{NoWorker, PATIENCE, RunError, Supervisor, poll_for};
use crate::daemon::run::State;
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::process;
use crate::sandbox::{self, WorkerEnd};

/// Between the first two attempts; each pause is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Starts a worker in place of another one, which has ended.
    ///
    /// The host may lack a process, memory or descriptors for a while. A front end waits for [`PATIENCE`]; without one,
    /// the daemon does not give up.
    pub(super) fn next_worker(
        &mut self,
        mut death: Option<Death>,
        relay: Option<&Relay>,
    ) -> Result<Result<Link, NoWorker>, RunError> {
        let (begun, mut pause) = (Instant::now(), PAUSE);
        loop {
            match self.make_worker(death, relay) {
                Ok(worker) => match self.wait_until_ready(&worker)? {
                    None => return Ok(Ok(worker)),
                    Some(end) if self.give_up_reopening(end) => continue,
                    // It has said why.
                    Some(WorkerEnd::Exited(status::REPORTED)) => {}
                    Some(end) if self.count_death(end) => return Ok(Err(NoWorker::GivenUp(1))),
                    Some(end) => {
                        death = death.map(|_| death_of(end));
                        continue;
                    }
                },
                Err(errno) => error!("cannot start a worker process: {errno}"),
            }
            if relay.is_some() && begun.elapsed() > PATIENCE {
                error!("no worker process could be started for {} seconds: giving up", PATIENCE.as_secs());
                return Ok(Err(NoWorker::GivenUp(1)));
            }
            if begun.elapsed() > PATIENCE && self.parked.take().is_some() {
                error!("the session that was kept cannot be had again, and has ended");
                death = None;
            }
            if self.pause(pause)? {
                return Ok(Err(NoWorker::Signalled));
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Makes a worker process, which begins to get ready.
    pub(super) fn make_worker(&mut self, death: Option<Death>, relay: Option<&Relay>) -> Result<Link, Errno> {
        let pair = UnixStream::pair();
        let (ours, theirs) = pair.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let mut kept = self.own.clone();
        kept.extend(self.sandbox.descriptors().chain(self.acceptor.descriptors()));
        kept.extend(relay.into_iter().flat_map(Relay::descriptors).chain(self.upgrade.check()));
        kept.extend([ours.as_raw_fd(), theirs.as_raw_fd()]);
        kept.extend(self.parked.iter().flat_map(Parked::descriptors));
        let leaves = self.parked.is_some() || relay.is_some_and(Relay::is_undecided);
        // One that comes to the worker before it ignores them would be taken for the supervisor's: the handlers are the same.
        process::hold_signals();
        let made = self.sandbox.start();
        if matches!(made, Ok(None)) {
            let Some(wrap) = self.wrap.take() else { sandbox::exit(status::PANICKED) };
            let state =
                State { file: &self.state, metrics: &self.metrics, death, renews: false, pressure: None };
            let first = self.sandbox.prepared().is_none();
            let task = Task {
                config: self.config,
                sandbox: &mut self.sandbox,
                state,
                first,
                leaves,
                is_orphaned: relay.is_some_and(Relay::is_advised),
                stream: theirs,
                kept,
            };
            worker::run(task, wrap);
        }
        process::release_signals();
        let process = made?.ok_or(Errno::CHILD)?;
        // It is the worker's now, which may have closed it.
        std::mem::forget(theirs);
        Ok(Link::new(process, ours))
    }

    /// Waits until a worker is ready: `None`. If it ends before, how.
    pub(super) fn wait_until_ready(&mut self, worker: &Link) -> Result<Option<WorkerEnd>, RunError> {
        loop {
            let mut watched = [worker.end(), PollFd::new(worker.stream(), PollFlags::IN)];
            // Storage that hangs may keep it from opening the share.
            let patience = self.sandbox.renews().then_some(PATIENCE);
            // Nothing tells that it lingers.
            if poll_for(&mut watched, Some(patience.unwrap_or(INTERVAL)))? == 0 && patience.is_some() {
                worker.kill();
            }
            self.check(worker, None)?;
            if let Some(entered) = worker.ready() {
                self.enter(entered);
                self.metrics.set_worker(worker.id());
                return Ok(None);
            }
            if worker.has_ended()? {
                return worker.reap().map(Some);
            }
        }
    }
}
