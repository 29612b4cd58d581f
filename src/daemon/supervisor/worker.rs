//! The worker process: serves one front end in the sandbox, and exits.
//!
//! It is a fork of the supervisor with the same table of descriptors. So it drops nothing that is the supervisor's, ends
//! by _exit(2), and closes, before it opens anything, what earlier workers have left behind.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::{panic, thread};

use log::{LevelFilter, debug, error, info};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::deaths::status;
use crate::config::Config;
use crate::daemon::frontend::{self, Ending, FrontendError};
use crate::daemon::monitor;
use crate::daemon::run::{RunError, State, begin, memory_pressure};
use crate::daemon::share::pace_of;
use crate::device::backend::Backend;
use crate::device::engine::Stations;
use crate::device::is_thread_of_queue;
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::logging::{self, describe};
use crate::process::{self, Signals};
use crate::sandbox::{self, SandboxError, Workers};
use crate::server::Server;
use crate::state_file::{Transferred, close_strays};
use crate::sys::userfault::Userfault;
use crate::sys::{hangup, signals, uring};

/// What a worker begins with.
pub(super) struct Task<'a> {
    pub config: &'a Config,
    pub sandbox: &'a mut Workers,
    pub state: State<'a>,
    /// Whether it is the first worker, whose start is that of the daemon.
    pub first: bool,
    /// Whether the session in the state is left as it is when the connection ends.
    pub leaves: bool,
    /// Whether the front end has got the userfaultfd of a worker that has died.
    pub is_orphaned: bool,
    /// Its end of the connection with the supervisor.
    pub stream: UnixStream,
    /// Descriptors of the supervisor, and those of `stream`.
    pub kept: Vec<RawFd>,
}

/// Runs the calling process, which is new, as a worker.
pub(super) fn run(task: Task<'_>, wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>) -> ! {
    die_of_panics();
    sandbox::exit(work(task, wrap))
}

/// Ends the process by a panic, except for those that the threads of a queue deal with: what is dropped while the stack
/// unwinds would end the session, with which the next process is to go on.
fn die_of_panics() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        if !is_thread_of_queue(&thread::current()) {
            sandbox::exit(status::PANICKED)
        }
    }));
}

fn work(mut task: Task<'_>, wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>) -> i32 {
    let config = task.config;
    if task.state.death.is_some() && task.state.file.transferred() == Transferred::Loading {
        // What was loaded half means nothing. The front end is told that the load has failed.
        info!(
            "the worker process died while it loaded the state of another daemon, of which nothing is left"
        );
        task.state.death = None;
    }
    let (state, is_first, leaves, is_orphaned) = (task.state, task.first, task.leaves, task.is_orphaned);
    let level = log::max_level();
    let started = start(task, wrap);
    log::set_max_level(level);
    let Started { stream, server, stations, parent, drain, faults } = match started {
        Ok(started) => started,
        Err(error) => {
            // Only the first worker's failure is that of the daemon.
            match is_first {
                true => logging::report_fatal_error(&error),
                false => error!("cannot serve a front end: {}", describe(&error)),
            }
            return status::REPORTED;
        }
    };
    state.metrics.begin_process();
    if config.monitor.is_wanted() {
        monitor::answer_questions(&server, state.metrics);
    }
    let (file, metrics) = (Arc::clone(state.file), Arc::clone(state.metrics));
    let backend = Backend::new(&config.device, server, file, metrics, state.death, stations);
    let pace = pace_of(state.metrics);
    let backend = backend.map(|backend| backend.offering_postcopy(faults, is_orphaned).paced_by(pace));
    match frontend::serve_one(stream, backend, &parent, &drain, leaves) {
        Ok(Ending::Drained) => status::DRAINED,
        Ok(Ending::Disconnected) => status::DISCONNECTED,
        Ok(Ending::NoFrontEnd) => status::NO_FRONT_END,
        Err(error) if config.keep_listening => {
            match &error {
                FrontendError::SetUp(_) => error!("cannot serve a front end: {}", describe(&error)),
                _ => error!("{error}"),
            }
            status::REPORTED
        }
        Err(error) => {
            logging::report_fatal_error(&error);
            status::REPORTED
        }
    }
}

/// A worker that is ready.
struct Started {
    stream: UnixStream,
    server: Arc<Server>,
    stations: Stations,
    /// Readable when the supervisor has died.
    parent: OwnedFd,
    drain: Signals,
    /// For post-copy, if the host allows it.
    faults: Option<Userfault>,
}

/// Gets ready to serve, and says so.
fn start(
    task: Task<'_>,
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<Started, RunError> {
    let Task { config, sandbox, state, first, mut stream, mut kept, .. } = task;
    let parent = sandbox.parent_end().map_err(|errno| RunError::Worker(errno.into()))?;
    kept.extend([parent.as_raw_fd(), receive_number(&mut stream, &parent)?]);
    // These signals are the supervisor's, and so are the pipes of the handlers: a worker ends when its stream does.
    hangup::ignore();
    signals::ignore_endings();
    process::release_signals();
    // Before anything of the state is used: what was submitted to them changes files and guest memory until then.
    uring::wait_for_strays(state.file.rings()).map_err(RunError::Worker)?;
    if let Some(death) = state.death {
        let recovered = match death {
            Death::Upgrade => state.file.recover_after_upgrade(),
            Death::Fault | Death::Kill => state.file.recover(),
        };
        debug!(
            "{} requests were in flight, {} effects were taken back",
            recovered.in_flight, recovered.taken_back
        );
    } else {
        state.file.reset().map_err(|errno| RunError::Worker(errno.into()))?;
    }
    close_strays(state.file, &kept).map_err(RunError::Worker)?;
    if !first && !sandbox.renews() {
        // What is remarkable about the share was said by the first worker.
        log::set_max_level(log::max_level().min(LevelFilter::Error));
    }
    let renews = sandbox.renews();
    // It is for the memory of this process, and named by a path that the sandbox does not have.
    let faults = Userfault::open();
    let faults = faults
        .inspect_err(|errno| debug!("post-copy is not offered, since there is no userfaultfd: {errno}"));
    let pressure = memory_pressure(config);
    let (sandboxed, entered) = sandbox.enter()?;
    // Before the seccomp filter is there.
    let drain = Signals::catch_drain()?;
    let (server, stations) =
        begin(config, sandboxed, State { renews, pressure: pressure.as_ref(), ..state }, wrap)?;
    stream.write_all(&entered.to_bytes()).map_err(RunError::Worker)?;
    Ok(Started { stream, server, stations, parent, drain, faults: faults.ok() })
}

/// The descriptor by which the supervisor waits for this process. It was made together with the process.
fn receive_number(stream: &mut UnixStream, parent: &OwnedFd) -> Result<RawFd, RunError> {
    // A supervisor that dies right now says nothing more, and its end of the stream stays open in the shared table.
    let mut either = [PollFd::new(&*stream, PollFlags::IN), PollFd::new(parent, PollFlags::IN)];
    while matches!(poll(&mut either, None), Err(Errno::INTR)) {}
    if !either[1].revents().is_empty() {
        return Err(SandboxError::ParentDied.into());
    }
    let mut number = [0; size_of::<RawFd>()];
    stream.read_exact(&mut number).map_err(RunError::Worker)?;
    Ok(RawFd::from_ne_bytes(number))
}
