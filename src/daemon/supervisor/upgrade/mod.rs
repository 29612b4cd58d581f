//! The upgrade of a daemon that runs: another program takes the supervisor's place in the same process.
//!
//! SIGHUP asks for it. The program that is now at the path of the running one is checked first, in a child
//! ([`candidate`]). If it can go on, the worker drains, and the supervisor executes the program with all descriptors of
//! the guest and with the state file; the rest is handed over in a memory file ([`handover`]). The new supervisor starts a
//! worker as after a death. Until that is ready, it can go back: it executes the old program, which was kept open, with
//! the same hand-over.
//!
//! What has become of it stands in the log and in the [`Reports`].

pub(super) mod candidate;
mod checks;
pub(in crate::daemon) mod handover;

use std::error::Error;
use std::ffi::OsString;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use log::{error, info};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags, openat};

use self::candidate::Candidate;
use self::handover::{FAILURE, FrontEnd, Handover, SocketFiles, VARIABLE, name_of};
use super::deaths::{Deaths, death_of};
use super::intact::{INTERVAL, Known};
use super::reconnect::Parked;
use super::relay::Relay;
use super::{Acceptor, FrontendError, Link, RunError, Supervisor, is_death, poll_for, status};
use crate::config::Config;
use crate::daemon::monitor::Monitor;
use crate::daemon::report::{Outcome, Reports};
use crate::daemon::share::Share;
use crate::daemon::socket::{Files, Socket};
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::logging::{self, Scope, describe};
use crate::process::{self, Signals};
use crate::sandbox::{self, WorkerEnd, Workers, Zombie};
use crate::state_file::StateFile;
use crate::sys::clock::monotonic;
use crate::sys::exec::Program;
use crate::sys::hangup::{Hangup, Hangups};
use crate::sys::inherited::{adopt, copy};
use crate::sys::signals;

/// Why there is no upgrade while an earlier worker lingers.
const LINGERS: &str = "a worker waits for a file system that does not answer (frozen?); thaw it first";

/// The version of this program.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long a worker may finish what it serves. All requests wait meanwhile, so it is short: what takes longer is cut
/// off and served again.
const DRAIN_TIME: Duration = Duration::from_millis(250);
/// What the kernel adds to the path of a program that was replaced.
const DELETED: &[u8] = b" (deleted)";

/// The program that was in this process before is not needed any more.
static GOES_ON: AtomicBool = AtomicBool::new(false);

/// What the supervisor is asked for.
pub(super) enum Step {
    Nothing,
    /// The terminal was closed.
    End,
    /// There is a program that can go on.
    Execute,
    /// The share is mounted anew.
    Reopen,
}

/// How a worker has made room.
pub(super) enum Drained {
    /// Another one goes on.
    For(Death),
    /// It has ended for another reason.
    Ended(WorkerEnd),
}

/// The readiness for upgrades.
#[derive(Debug)]
pub(super) struct Upgrade {
    /// Where the program is looked for: where this one was.
    program: PathBuf,
    /// The arguments that the daemon was started with.
    arguments: Vec<OsString>,
    hangups: Hangups,
    reports: Reports,
    candidate: Option<Candidate>,
}

impl Upgrade {
    /// For the supervisor of the program that was started, and its arguments. From now on SIGHUP does not end the daemon.
    pub(super) fn begin(arguments: Vec<OsString>) -> Result<Upgrade, RunError> {
        let path = std::env::current_exe().map_err(RunError::Worker)?;
        let path = path.as_os_str().as_bytes();
        let path = path.strip_suffix(DELETED).unwrap_or(path).to_vec();
        let hangups = Hangups::catch(false).map_err(failed)?;
        let reports = Reports::create().map_err(failed)?;
        let program = OsString::from_vec(path).into();
        Ok(Upgrade { program, arguments, hangups, reports, candidate: None })
    }

    /// What to wait for before the next [`Upgrade::advance`].
    pub(super) fn watched(&self) -> impl Iterator<Item = PollFd<'_>> {
        let check = self.candidate.iter().map(|candidate| PollFd::new(candidate, PollFlags::IN));
        [PollFd::new(&self.hangups, PollFlags::IN)].into_iter().chain(check)
    }

    /// Looks after signals and the check of a program.
    pub(super) fn advance(&mut self, state: &StateFile) -> Result<Step, RunError> {
        match self.hangups.take() {
            Some(Hangup::Terminal) => return Ok(Step::End),
            // They would keep the table of descriptors that the new program leaves.
            Some(Hangup::Sent) if sandbox::workers_linger() => {
                self.refuse(LINGERS);
            }
            Some(Hangup::Sent) if self.candidate.is_none() => {
                match Candidate::start(&self.program, &self.arguments, state, &self.reports) {
                    Ok(candidate) => self.candidate = Some(candidate),
                    Err(errno) => self.refuse(&format!("it cannot be checked: {errno}")),
                }
            }
            Some(Hangup::Reopen) => return Ok(Step::Reopen),
            Some(Hangup::Sent) | None => {}
        }
        let Some(candidate) = self.candidate.take() else { return Ok(Step::Nothing) };
        if poll_for(&mut [PollFd::new(&candidate, PollFlags::IN)], Some(Duration::ZERO))? == 0 {
            self.candidate = Some(candidate);
            return Ok(Step::Nothing);
        }
        match candidate.outcome(&self.reports) {
            Ok(version) => {
                info!("upgrading to lanefsd {version}");
                return Ok(Step::Execute);
            }
            Err(why) => self.refuse(&why),
        }
        Ok(Step::Nothing)
    }

    /// The upgrade does not happen.
    pub(super) fn refuse(&self, why: &str) {
        error!("lanefsd {VERSION} goes on, since {} cannot: {why}", self.program.display());
        self.report(&Outcome { error: Some(why.into()), from: VERSION.into(), to: VERSION.into() });
    }

    pub(super) fn report(&self, outcome: &Outcome) {
        // Who waits for it gives up after some time.
        let _ = self.reports.add(outcome);
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.hangups.descriptors().into_iter().chain([self.reports.descriptor()])
    }

    /// The descriptor of the check that runs.
    pub(super) fn check(&self) -> Option<RawFd> {
        self.candidate.as_ref().map(|candidate| candidate.as_fd().as_raw_fd())
    }
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Upgrades while no front end is served. Returns if that fails.
    pub(super) fn upgrade_idle(&mut self, worker: Link) -> Result<(), RunError> {
        let since = Instant::now();
        worker.kill();
        worker.reap()?;
        drop(worker);
        let why = self.execute(None, since);
        self.upgrade.refuse(&why);
        Ok(())
    }

    /// Upgrades while a front end is served. Returns how its worker has ended if there is no other program then.
    pub(super) fn upgrade_serving(
        &mut self,
        relay: &mut Relay,
        mut worker: Link,
    ) -> Result<Drained, RunError> {
        let since = Instant::now();
        let drained = drain(&worker)?;
        match drained {
            Drained::For(death) => {
                relay.begin_again(&mut worker);
                if let Some(dead) = self.zombie.replace(worker.into_zombie()) {
                    dead.reap();
                }
                let why = self.execute(Some((&*relay, death)), since);
                self.upgrade.refuse(&why);
            }
            Drained::Ended(_) => {
                worker.reap()?;
                self.upgrade.refuse("the worker process has ended meanwhile");
            }
        }
        Ok(drained)
    }

    /// Executes the program that was checked. Returns why it could not.
    fn execute(&mut self, served: Option<(&Relay, Death)>, since: Instant) -> String {
        process::hold_signals();
        let signalled = poll_for(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(Duration::ZERO));
        let why = match signalled {
            // The one that has just ended, too.
            Ok(0) if sandbox::workers_linger() => LINGERS.into(),
            Ok(0) => self.hand_over(served, since),
            _ => "the daemon was told to end".into(),
        };
        process::release_signals();
        why
    }

    fn hand_over(&self, served: Option<(&Relay, Death)>, since: Instant) -> String {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let old = match openat(CWD, "/proc/self/exe", flags, Mode::empty()) {
            Ok(old) => old,
            Err(errno) => return format!("the running program cannot be kept open: {errno}"),
        };
        let Some(prepared) = self.sandbox.prepared() else { return "there was no worker process".into() };
        let (files, lock) = self.socket.files().unzip();
        let lock = lock.flatten();
        let now = Instant::now();
        let millis = |age: Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let handover = Handover {
            program: self.upgrade.program.clone().into(),
            arguments: self.upgrade.arguments.clone(),
            old: old.as_raw_fd(),
            since: monotonic().saturating_sub(u64::try_from(since.elapsed().as_nanos()).unwrap_or(0)),
            state: self.state.file().as_fd().as_raw_fd(),
            metrics: Some(self.metrics.file().as_fd().as_raw_fd()),
            monitor: self.monitor.as_ref().map(Monitor::parts),
            reports: self.upgrade.reports.descriptor(),
            listener: self.socket.listener().as_raw_fd(),
            socket: files.map(|Files { socket, pid_file }| SocketFiles {
                socket,
                pid_file,
                lock: lock.as_ref().map(|fd| fd.as_raw_fd()),
            }),
            sandbox: prepared.into(),
            ignores_terminal: self.upgrade.hangups.ignores_terminal(),
            zombie: self.zombie.as_ref().map(Zombie::id),
            deaths: self.deaths.ages(now).into_iter().map(millis).collect(),
            pending: self.acceptor.descriptors().collect(),
            parked: self.parked.as_ref().map(Parked::to_words),
            front_end: served.map(|(relay, death)| relay.parts(name_of(death))),
            ..Handover::new()
        };
        self.check_flags();
        let file = match handover.publish() {
            Ok(file) => file,
            Err(error) => return format!("nothing can be handed over: {error}"),
        };
        // Without it, a daemon in a user namespace would have no capabilities. Others do not need it.
        let _ = sandbox::make_capabilities_ambient();
        let program = program(&handover, &[(VARIABLE, &file.as_raw_fd().to_string())]);
        let errno = program.execute(&self.upgrade.program);
        let _ = sandbox::clear_ambient_capabilities();
        handover.withdraw();
        format!("it cannot be executed: {errno}")
    }

    /// What the state file names stays open in the next program.
    fn check_flags(&self) {
        #[cfg(debug_assertions)]
        for fd in self.state.all_descriptors() {
            debug_assert!(!crate::sys::exec::is_closed_by_exec(fd), "descriptor {fd} would be closed");
        }
    }
}

/// Lets a worker finish what it serves. It is not reaped: that may take longer than all of this.
pub(super) fn drain(worker: &Link) -> Result<Drained, RunError> {
    worker.drain();
    poll_for(&mut [worker.end()], Some(DRAIN_TIME))?;
    let in_time = worker.has_ended()?;
    if !in_time {
        worker.kill();
    }
    Ok(match worker.ending()? {
        WorkerEnd::Exited(status::DRAINED) => Drained::For(Death::Upgrade),
        WorkerEnd::Killed(libc::SIGKILL) if !in_time => Drained::For(Death::Upgrade),
        end if is_death(end) => Drained::For(death_of(end)),
        end => Drained::Ended(end),
    })
}

/// The arguments of the daemon and the environment of this process, with these variables.
fn program(handover: &Handover, variables: &[(&str, &str)]) -> Program {
    let is_ours = |name: &OsString| [VARIABLE, FAILURE].iter().any(|ours| name == ours);
    let kept = std::env::vars_os().filter(|(name, _)| !is_ours(name));
    let added = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Program::new(handover.arguments.iter().cloned(), kept.chain(added))
}

/// The hand-over of the program that was in this process before, if there was one.
pub(in crate::daemon) fn inherited() -> Result<Option<Handover>, RunError> {
    let handover = Handover::inherited()?;
    if let Some(handover) = &handover {
        // Nothing is lost that could be regained.
        let _ = sandbox::clear_ambient_capabilities();
        handover.check()?;
    }
    Ok(handover)
}

/// Goes back to the program that was in this process before, since this one cannot go on. Returns if there was none, or
/// if it is too late.
pub fn go_back(why: &(dyn Error + 'static)) {
    go_back_since(&describe(why));
}

/// Goes back after an error, before anything that was taken over is closed.
fn or_back<T>(result: Result<T, RunError>) -> Result<T, RunError> {
    result.inspect_err(|error| go_back(error))
}

fn go_back_since(why: &str) {
    if GOES_ON.load(Ordering::Relaxed) {
        return;
    }
    let Ok(Some(handover)) = Handover::inherited() else { return };
    let Ok(old) = copy(handover.old) else { return };
    if handover.failure.is_some() {
        return;
    }
    let why = why.lines().next().unwrap_or_default();
    let _ = sandbox::make_capabilities_ambient();
    let variables = [(VARIABLE, &*handover.file.to_string()), (FAILURE, why)];
    let errno = program(&handover, &variables).execute_file(old.as_fd());
    error!("cannot go back to lanefsd {}: {errno}", handover.version);
}

/// Runs the daemon in place of the program that was in this process before.
pub(in crate::daemon) fn go_on<W>(config: &Config, handover: Handover, wrap: W) -> Result<u8, RunError>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    let name = Share::name_for(config.device.tag.as_deref(), &config.shared_dir);
    let _scope = Scope::of_share(&name).enter();
    name_process(Path::new(&handover.program));
    // All that may fail comes first: what is taken over would be closed.
    StateFile::open(copy(handover.state).map_err(failed)?)?;
    let sandbox = Workers::go_on(handover.prepared()?, &config.shared_dir, &config.id_maps)?;
    let hangups = Hangups::catch(handover.ignores_terminal).map_err(failed)?;
    let signals = Signals::catch_endings()?;
    signals::wake_by_children().map_err(|errno| RunError::Worker(errno.into()))?;
    let take = |fd| adopt(fd).map_err(failed);
    let state = or_back(take(handover.state).and_then(|state| Ok(StateFile::open(state)?)))?;
    let metrics = or_back(handover.counters(&config.device.rates).map_err(RunError::Metrics))?;
    let socket = Socket::go_on(&config.listen, or_back(take(handover.listener))?, handover.socket_files());
    let pending = handover.pending.iter().filter_map(|fd| adopt(*fd).ok().map(UnixStream::from));
    let acceptor =
        Acceptor::new(socket.listener()).map_err(|errno| FrontendError::SetUp(errno.into()).into());
    let acceptor = or_back(acceptor)?.with_longest(INTERVAL).with_pending(pending.collect());
    let front_end = match &handover.front_end {
        Some(parts) => Some((relay_of(or_back(take(parts.connection))?, parts, config), parts.death())),
        None => None,
    };
    let upgrade = Upgrade {
        program: handover.program.clone().into(),
        arguments: handover.arguments.clone(),
        hangups,
        reports: or_back(take(handover.reports))?.into(),
        candidate: None,
    };
    let own = signals.descriptors().chain(upgrade.descriptors()).chain(acceptor.own_descriptors());
    let memory = [state.file().as_fd().as_raw_fd(), metrics.file().as_fd().as_raw_fd()];
    let own = own.chain(memory).chain(logging::descriptor()).chain(handover.monitored()).collect();
    let ages = handover.deaths.iter().map(|age| Duration::from_millis(*age));
    let deaths = Deaths::new(config.max_deaths).with_ages(Instant::now(), ages);
    let parked = handover.parked.as_ref().map(Parked::from_words);
    let zombie = handover.zombie.and_then(Zombie::of_id);
    let (wrap, socket) = (Some(wrap), &socket);
    Supervisor {
        config,
        wrap,
        state,
        metrics,
        sandbox,
        signals,
        acceptor,
        own,
        known: Known::default(),
        deaths,
        zombie,
        socket,
        upgrade,
        parked,
        monitor: None,
    }
    .go_on(&handover, front_end)
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    fn go_on(mut self, handover: &Handover, front_end: Option<(Relay, Death)>) -> Result<u8, RunError> {
        let (relay, death) = front_end.unzip();
        let death = death.or_else(|| self.parked.as_mut().map(Parked::take_death));
        self.check_own(handover, relay.as_ref());
        let others = self.own.len();
        self.own.extend(handover.temporary());
        let can_go_back = handover.failure.is_none();
        let worker = match self.worker_or_back(can_go_back, death, relay.as_ref())? {
            Ok(worker) => worker,
            Err(status) => return Ok(status),
        };
        GOES_ON.store(true, Ordering::Relaxed);
        self.own.truncate(others);
        handover.withdraw();
        handover.close();
        self.go_on_monitoring(handover);
        let outcome = Outcome {
            error: handover.failure.clone(),
            from: if handover.failure.is_none() { handover.version.clone() } else { VERSION.into() },
            to: VERSION.into(),
        };
        match &outcome.error {
            None => {
                let pause = Duration::from_nanos(monotonic().saturating_sub(handover.since));
                info!("upgraded from lanefsd {} to {VERSION} in {} ms", outcome.from, pause.as_millis());
            }
            Some(why) => {
                error!("lanefsd {VERSION} goes on, since {} cannot: {why}", self.upgrade.program.display());
            }
        }
        self.upgrade.report(&outcome);
        self.serve_all(relay, worker)
    }

    /// The first worker of this program. If it fails, the program goes back, or tries again if it is that which others
    /// have gone back to.
    fn worker_or_back(
        &mut self,
        can_go_back: bool,
        death: Option<Death>,
        relay: Option<&Relay>,
    ) -> Result<Result<Link, u8>, RunError> {
        if can_go_back {
            let why = match self.make_worker(death, relay) {
                Ok(worker) => match self.wait_until_ready(&worker)? {
                    None => return Ok(Ok(worker)),
                    Some(end) => format!("its worker process {}", super::Cause(end)),
                },
                Err(errno) => format!("it cannot start a worker process: {errno}"),
            };
            go_back_since(&why);
        }
        Ok(match self.next_worker(death, relay)? {
            Ok(worker) => Ok(worker),
            Err(super::NoWorker::Signalled) => Err(0),
            Err(super::NoWorker::GivenUp(status)) => Err(status),
        })
    }
}

fn relay_of(connection: std::os::fd::OwnedFd, parts: &FrontEnd, config: &Config) -> Relay {
    Relay::go_on(connection.into(), parts, config.keep_listening)
}

/// Names the process as the program was called, which one that is executed by its descriptor is not.
fn name_process(program: &Path) {
    let name = program.file_name().unwrap_or_default().as_bytes();
    let name = std::ffi::CString::new(name.get(..name.len().min(15)).unwrap_or_default()).unwrap_or_default();
    // It is for people.
    let _ = rustix::thread::set_name(&name);
}

fn failed(errno: rustix::io::Errno) -> RunError {
    RunError::Worker(errno.into())
}

/// Whether this program can go on with the state in a file, as one sentence: the answer to `--check-state`.
pub fn check_state(file: RawFd) -> Result<String, RunError> {
    StateFile::open(copy(file).map_err(failed)?)?;
    Ok(candidate::answer())
}
