//! The supervisor: the process that was started. It holds all that must outlive a worker process, and replaces a worker
//! that dies.
//!
//! The supervisor has the listening socket, the connection of the front end, the state file, and a table of descriptors that
//! it shares with the worker. The worker serves requests in the sandbox. Neither data nor kicks pass through the
//! supervisor, and it reads nothing that a guest has written: rings, eventfds and guest memory go to the worker.
//!
//! ```text
//!  front end ──messages──▶ supervisor ──messages──▶ worker ◀──virtqueues── guest
//!                              │   shared: descriptors, state file   │
//! ```
//!
//! A worker serves one front end. When that has disconnected, it ends, and the next one begins with an empty state. When it
//! dies, the next one begins with the state that is in the state file, and gets the set-up of the front end again
//! ([`relay`]).
//!
//! One thread, which waits by poll(2): a process that forks has no other. Who owns a descriptor of the shared table closes
//! it: the supervisor those that it has opened or received, and a worker its own. What a worker leaves open is closed
//! by the next one ([`worker`]).

mod deaths;
mod intact;
mod link;
mod message;
mod monitoring;
mod reconnect;
mod relay;
mod reopen;
mod setup;
mod successor;
pub(super) mod upgrade;
mod worker;

use std::net::Shutdown;
use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use self::deaths::{Cause, Deaths, death_of, exit_status, is_death, status};
use self::intact::Known;
use self::link::Link;
use self::reconnect::{Parked, Reconnect};
use self::relay::Relay;
use self::upgrade::{Drained, Step, Upgrade};
use super::frontend::FrontendError;
use super::frontend::acceptor::{Acceptor, Event};
use super::monitor::{Endpoints, Monitor};
use super::readiness::Readiness;
use super::run::RunError;
use super::share::Share;
use super::socket::Socket;
use crate::config::Config;
use crate::device::postcopy;
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::logging::{Remark, Scope};
use crate::metrics::Metrics;
use crate::process::Signals;
use crate::sandbox::{self, Entered, WorkerEnd, Workers, Zombie};
use crate::state_file::StateFile;
use crate::sys::{descriptors, inherited, signals};

/// How long a front end waits for a worker that cannot be started.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a worker is not there.
enum NoWorker {
    /// A signal has come.
    Signalled,
    /// The daemon ends with this status, and the reason was logged.
    GivenUp(u8),
}

/// How the service of one front end ended.
enum Ending {
    /// Its worker has ended.
    Worker(WorkerEnd),
    /// The daemon ends with this status.
    Daemon(u8),
}

impl NoWorker {
    /// How the daemon ends: with this status if it was a signal.
    fn ending(self, signalled: u8) -> Ending {
        match self {
            NoWorker::Signalled => Ending::Daemon(signalled),
            NoWorker::GivenUp(status) => Ending::Daemon(status),
        }
    }
}

/// The supervisor of one share.
struct Supervisor<'a, W> {
    config: &'a Config,
    /// The file system that is put around that of the share. Each worker has its own copy, like all memory.
    wrap: Option<W>,
    state: Arc<StateFile>,
    metrics: Arc<Metrics>,
    sandbox: Workers,
    signals: Signals,
    acceptor: Acceptor<'a>,
    /// Descriptors that the process had when the first worker was made.
    own: Vec<RawFd>,
    /// What they were when the first worker was ready.
    known: Known,
    deaths: Deaths,
    /// The worker that has died last, until the next one serves: the guest does not wait for it.
    zombie: Option<Zombie>,
    socket: &'a Socket,
    upgrade: Upgrade,
    /// A session whose front end may come back.
    parked: Option<Parked>,
    /// Who answers those that look at the daemon.
    monitor: Option<Monitor>,
}

/// Runs the daemon until a signal ends it, or its front end has disconnected, and returns the status to exit with.
pub(super) fn run<W>(
    config: &Config,
    mut socket: Socket,
    (state, metrics): (Arc<StateFile>, Arc<Metrics>),
    (readiness, endpoints): (Readiness, Endpoints),
    wrap: W,
) -> Result<u8, RunError>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    let name = Share::name_for(config.device.tag.as_deref(), &config.shared_dir);
    let _scope = Scope::of_share(&name).enter();
    let upgrade = Upgrade::begin(config.arguments.clone())?;
    let workers = Workers::prepare(config.sandbox, &config.shared_dir, &config.id_maps)?;
    socket.hide()?;
    // What is inherited by workers, and by the program of an upgrade.
    sandbox::confine_supervisor(workers.kind(), config.seccomp, config.capabilities)?;
    let monitor = Monitor::start(config, &name, endpoints, (&state, &metrics));
    let signals = Signals::catch_endings()?;
    signals::wake_by_children().map_err(|errno| RunError::Worker(errno.into()))?;
    let acceptor = Acceptor::new(socket.listener()).map_err(|errno| FrontendError::SetUp(errno.into()))?;
    let acceptor = acceptor.with_longest(intact::INTERVAL);
    let mut own = inherited::all_open().map_err(RunError::Worker)?;
    own.retain(|fd| !workers.descriptors().any(|other| other == *fd));
    let deaths = Deaths::new(config.max_deaths);
    let (wrap, zombie, socket) = (Some(wrap), None, &socket);
    let (known, sandbox) = (Known::default(), workers);
    Supervisor {
        config,
        wrap,
        state,
        metrics,
        sandbox,
        signals,
        acceptor,
        own,
        known,
        deaths,
        zombie,
        socket,
        upgrade,
        parked: None,
        monitor,
    }
    .run(readiness)
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    fn run(mut self, readiness: Readiness) -> Result<u8, RunError> {
        let worker = match self.first_worker()? {
            Ok(worker) => worker,
            Err(status) => return Ok(status),
        };
        self.config.remarks.iter().for_each(Remark::log);
        self.own.retain(|fd| Some(*fd) != readiness.descriptor());
        readiness.announce();
        self.serve_all(None, worker)
    }

    /// Serves one front end after the other, the first of which may be there already.
    fn serve_all(mut self, first: Option<Relay>, worker: Link) -> Result<u8, RunError> {
        let ended = self.serve_until_end(first, worker);
        if !sandbox::workers_linger() {
            return ended;
        }
        warn!("threads that set times of files wait for a file system that does not answer (frozen?)");
        drop(self.monitor.take());
        self.socket.remove_files();
        let status = ended.unwrap_or_else(|why| {
            error!("{why}");
            1
        });
        sandbox::exit_before_workers(status.into())
    }

    fn serve_until_end(&mut self, mut first: Option<Relay>, mut worker: Link) -> Result<u8, RunError> {
        self.known = Known::of(self.own.iter().copied().chain(self.sandbox.descriptors()));
        // It may have died before anybody heard of it.
        self.look_after_monitor();
        loop {
            let (relay, ready) = match first.take() {
                Some(relay) => (relay, worker),
                None => match self.next_front_end(worker)? {
                    Ok((stream, ready)) => {
                        let reconnect = Reconnect::new(self.config.keep_listening, self.parked.take());
                        (Relay::new(stream, reconnect), ready)
                    }
                    Err(status) => return Ok(status),
                },
            };
            self.metrics.set_front_end(true);
            let end = self.serve(relay, ready)?;
            self.metrics.set_front_end(false);
            let end = match end {
                Ending::Worker(end) => end,
                Ending::Daemon(status) => return Ok(status),
            };
            let no_front_end = end == WorkerEnd::Exited(status::NO_FRONT_END);
            if !no_front_end && !self.config.keep_listening {
                return Ok(exit_status(end));
            }
            let death = self.parked.as_mut().map(Parked::take_death);
            worker = match self.next_worker(death, None)? {
                Ok(worker) => worker,
                Err(NoWorker::Signalled) => return Ok(0),
                Err(NoWorker::GivenUp(status)) => return Ok(status),
            };
        }
    }

    /// Starts the first worker, whose failure is that of the daemon: the status to exit with.
    fn first_worker(&mut self) -> Result<Result<Link, u8>, RunError> {
        let worker = self.make_worker(None, None).map_err(|errno| RunError::Worker(errno.into()))?;
        Ok(match self.wait_until_ready(&worker)? {
            Some(end) => {
                if is_death(end) {
                    self.log_death(end);
                }
                Err(exit_status(end))
            }
            None => Ok(worker),
        })
    }

    /// Waits for a front end: the status to exit with if none is to come. The worker is replaced if it dies meanwhile.
    fn next_front_end(&mut self, mut worker: Link) -> Result<Result<(UnixStream, Link), u8>, RunError> {
        info!("Waiting for vhost-user socket connection...");
        loop {
            if let Some(stream) = self.acceptor.next() {
                info!("front end connected");
                return Ok(Ok((stream, worker)));
            }
            let watched: Vec<_> = self.upgrade.watched().chain([worker.end()]).collect();
            let event = self.acceptor.wait(self.signals.as_fd(), &watched, false);
            drop(watched);
            self.check(&worker, None)?;
            let event = event?;
            self.look_after_monitor();
            let step = self.upgrade.advance(&self.state)?;
            if event == Event::Signal || matches!(step, Step::End) {
                info!("received a signal, exiting");
                worker.kill();
                worker.reap()?;
                return Ok(Err(0));
            }
            if matches!(step, Step::Execute) {
                self.upgrade_idle(worker)?;
            } else if matches!(step, Step::Reopen) {
                self.reopen_idle(worker)?;
            } else if worker.has_ended()? {
                let end = worker.reap()?;
                drop(worker);
                if is_death(end) && self.count_death(end) {
                    return Ok(Err(1));
                }
            } else {
                continue;
            }
            let death = self.parked.as_mut().map(Parked::take_death);
            worker = match self.next_worker(death, None)? {
                Ok(worker) => worker,
                Err(NoWorker::Signalled) => return Ok(Err(0)),
                Err(NoWorker::GivenUp(status)) => return Ok(Err(status)),
            };
        }
    }

    /// Serves a front end, by one worker and those that have to take its place.
    fn serve(&mut self, mut relay: Relay, mut worker: Link) -> Result<Ending, RunError> {
        loop {
            relay.advance(&mut worker);
            if relay.has_left() {
                return self.park(relay, worker);
            }
            if relay.reconnect().wants_anew() {
                worker = match self.begin_anew(&mut relay, worker)? {
                    Ok(worker) => worker,
                    Err(none) => return Ok(none.ending(0)),
                };
                continue;
            }
            if relay.is_settled()
                && let Some(zombie) = self.zombie.take()
            {
                zombie.reap();
            }
            let event = self.wait(&relay, &worker)?;
            let step =
                if relay.may_be_upgraded() { self.upgrade.advance(&self.state)? } else { Step::Nothing };
            if event == Event::Signal || matches!(step, Step::End) {
                return self.end(&worker, relay.lacks_memory()).map(Ending::Daemon);
            }
            if matches!(step, Step::Execute | Step::Reopen) {
                worker = match self.make_room(step, &mut relay, worker)? {
                    Drained::Ended(end) => {
                        self.parked = relay.reconnect().take_parked(None);
                        return Ok(Ending::Worker(end));
                    }
                    Drained::For(death) => match self.next_worker(Some(death), Some(&relay))? {
                        Ok(worker) => worker,
                        Err(none) => return Ok(none.ending(0)),
                    },
                };
                continue;
            }
            if event == Event::Pending || !worker.has_ended()? {
                continue;
            }
            let (end, ended) = (worker.ending()?, Instant::now());
            if let Some(ending) = self.last_of(&relay, end) {
                worker.reap()?;
                self.parked = relay.reconnect().take_parked(None);
                return Ok(ending);
            }
            // A session that no front end has gone on with yet was not served.
            let death = if relay.is_undecided() { Death::Upgrade } else { death_of(end) };
            relay.begin_again(&mut worker);
            let dead = self.zombie.replace(worker.into_zombie());
            worker = match self.next_worker(Some(death), Some(&relay))? {
                Ok(worker) => worker,
                Err(none) => return Ok(none.ending(exit_status(end))),
            };
            if let Some(dead) = dead {
                dead.reap();
            }
            info!("another worker process goes on after {} ms", ended.elapsed().as_millis());
        }
    }

    /// Waits until there is something to do for a front end that is served.
    fn wait(&mut self, relay: &Relay, worker: &Link) -> Result<Event, RunError> {
        let mut watched = vec![worker.end()];
        if !relay.has_ended() {
            watched.push(relay.watched(worker));
            watched.extend(relay.hangup());
        }
        if relay.may_be_upgraded() {
            watched.extend(self.upgrade.watched());
        }
        let event = self.acceptor.wait(self.signals.as_fd(), &watched, true);
        self.check(worker, Some(relay))?;
        self.look_after_monitor();
        Ok(event?)
    }

    /// What follows from the end of a worker that is not replaced; `None` for one that is.
    fn last_of(&mut self, relay: &Relay, end: WorkerEnd) -> Option<Ending> {
        if relay.lacks_descriptors() {
            self.report(&FrontendError::FrontEnd(descriptors::TOO_FEW.into()));
            return Some(Ending::Worker(WorkerEnd::Exited(status::REPORTED)));
        }
        if relay.is_cut() {
            self.report(&FrontendError::FrontEnd(postcopy::LOST.into()));
            return Some(Ending::Worker(WorkerEnd::Exited(status::REPORTED)));
        }
        if end == WorkerEnd::Exited(status::DISCONNECTED) && !relay.has_ended() {
            error!("the worker process has ended while the front end was there");
            return Some(Ending::Worker(WorkerEnd::Exited(status::REPORTED)));
        }
        if !is_death(end) {
            return Some(Ending::Worker(end));
        }
        if self.count_death(end) {
            return Some(Ending::Daemon(1));
        }
        relay.has_ended().then_some(Ending::Worker(WorkerEnd::Exited(status::DISCONNECTED)))
    }

    /// Lets a worker finish since a signal has come, unless it may wait for memory of the guest: the status to exit with.
    fn end(&self, worker: &Link, lacks_memory: bool) -> Result<u8, RunError> {
        info!("received a signal, exiting");
        if lacks_memory {
            warn!("{}", postcopy::LOST);
            worker.kill();
            return worker.reap().map(|_| 0);
        }
        worker.shut_down(Shutdown::Both);
        let end = worker.reap()?;
        if is_death(end) {
            self.log_death(end);
        }
        Ok(exit_status(end))
    }

    fn report(&self, error: &FrontendError) {
        match self.config.keep_listening {
            true => error!("{error}"),
            false => crate::logging::report_fatal_error(error),
        }
    }

    /// Waits, and returns whether a signal has come meanwhile.
    fn pause(&self, pause: Duration) -> Result<bool, RunError> {
        let mut watched = [PollFd::new(&self.signals, PollFlags::IN)];
        Ok(poll_for(&mut watched, Some(pause))? > 0)
    }
}

/// How many of these are ready, at the latest after `timeout` or a signal.
fn poll_for(watched: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<usize, RunError> {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(watched, timeout.as_ref()) {
        Err(Errno::INTR) => Ok(0),
        result => result.map_err(|errno| RunError::Worker(errno.into())),
    }
}
