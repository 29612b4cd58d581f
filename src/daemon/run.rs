//! The life of the process, in order: process, log, socket, sandbox, share, front ends.

use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::{Level, debug, log};
use rustix::io::Errno;
use thiserror::Error;

use super::frontend::{self, FrontendError};
use super::monitor::{self, EndpointError, Endpoints, Monitor};
use super::readiness::Readiness;
use super::remarks;
use super::share::{Share, Statistics, pace_of};
use super::socket::{ListenError, Socket};
use super::supervisor;
use super::supervisor::upgrade::handover::HandoverError;
use crate::config::{Config, DeviceConfig, FsConfig, IoEngine, Store};
use crate::device::engine::Stations;
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::fs::null::NullStore;
use crate::fs::passthrough::{PassthroughFs, StartError, mapped_writes_obstacle};
use crate::fs::read_only::ReadOnly;
use crate::limits::{GroupError, Limits, Rates, open_group};
use crate::logging::{self, Remark, Scope};
use crate::metrics::Metrics;
use crate::process::{self, ProcessError, Signals};
use crate::sandbox::{
    self, CapabilityError, ConfineError, Parent, RequiredCaps, Role, SandboxError, Sandboxed, SeccompError,
    Uses,
};
use crate::server::Server;
use crate::state_file::{StateError, StateFile};
use crate::sys::pressure::MemoryPressure;

/// Why the daemon did not start, or failed.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "each is the error of the step that it is named after")]
pub enum RunError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Monitor(#[from] EndpointError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("the share cannot be served")]
    Share(#[from] StartError),
    #[error(transparent)]
    Capabilities(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("the supervisor cannot be confined")]
    Confine(#[from] ConfineError),
    #[error("the worker process cannot be started or watched")]
    Worker(#[source] io::Error),
    #[error(
        "the worker process has closed or replaced descriptor {fd} of its supervisor ({what}), so the share cannot be served any more; unless this is an attack, please report it"
    )]
    Lost { fd: RawFd, what: &'static str },
    #[error("no memory file for the counters of the share")]
    Metrics(#[source] Errno),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    Frontend(#[from] FrontendError),
}

/// Runs the daemon until a signal ends it or its front end has disconnected, and returns the status to exit with.
///
/// `wrap` may put a file system around that of the share, for daemons that are built on this one.
///
/// Must be called once, while the process has one thread and has opened nothing of its own.
pub fn run(
    mut config: Config,
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<u8, RunError> {
    let handover = supervisor::upgrade::inherited()?;
    if handover.is_none() {
        process::reset(config.listen.inherited())?;
    }
    logging::start(config.log_level, config.syslog);
    config.remarks.extend(process::prepare(&config.process)?);
    if let Some(path) = &config.limit_group {
        let group = open_group(path)?;
        // The limits of a daemon that is upgraded may have been changed since its start.
        if handover.is_none() {
            group.apply(&config.device.rates);
        }
        config.device = DeviceConfig { group: Some(group), rates: Rates::default(), ..config.device };
    }
    if let Some(handover) = handover {
        return supervisor::upgrade::go_on(&config, handover, wrap);
    }
    config.remarks.extend(remarks::about(&config));
    let readiness = Readiness::announce_later();
    // Before the front end sees a socket: who has started the daemon may look at it from then on.
    let endpoints = Endpoints::open(&config.monitor, config.socket_group.as_deref())?;
    let mut socket = Socket::open(&config.listen, config.socket_group.as_deref())?;
    let metrics = Metrics::create().map_err(RunError::Metrics)?;
    pace_of(&metrics).apply(&config.device.rates);
    if config.survive {
        match StateFile::create_shared() {
            Ok(state) => return supervisor::run(&config, socket, (state, metrics), (readiness, endpoints), wrap),
            Err(error) => config.remarks.push(Remark::warning(format!(
                "{error}: a daemon that dies takes the mount of the guest with it; --no-survive silences this warning"
            ))),
        }
    }
    let state = StateFile::create()?;
    let name = Share::name_for(config.device.tag.as_deref(), &config.shared_dir);
    let pressure = memory_pressure(&config);
    let monitor = Monitor::start(&config, &name, endpoints, (&state, &metrics));
    match sandbox::enter(config.sandbox, &config.shared_dir, &config.id_maps)? {
        Role::Supervisor(parent) => supervise(parent),
        Role::Server(sandboxed) => {
            // It ends when the process ends that has started it, which this one may not be.
            std::mem::forget(monitor);
            if sandboxed.forked {
                socket.keep_path();
            }
            serve(config, socket, sandboxed, (readiness, state, metrics, pressure), wrap)?;
            Ok(0)
        }
    }
}

/// The supervisor's part: waits for the server, outside the sandbox, and removes the socket at the end.
fn supervise(parent: Parent) -> Result<u8, RunError> {
    process::leave_directory();
    let signals = Signals::catch()?;
    let status = parent.wait(signals.as_fd())?;
    Ok(u8::try_from(status).unwrap_or(1))
}

/// Serves the share inside the sandbox. Privileges are dropped on the way, each as soon as it is not needed any more.
fn serve(
    config: Config,
    socket: Socket,
    sandboxed: Sandboxed,
    (readiness, state, metrics, pressure): (
        Readiness,
        Arc<StateFile>,
        Arc<Metrics>,
        Option<Arc<MemoryPressure>>,
    ),
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<(), RunError> {
    let name = Share::name_for(config.device.tag.as_deref(), &config.shared_dir);
    let _scope = Scope::of_share(&name).enter();
    let signals = Signals::catch()?;
    let (server, stations) = begin(
        &config,
        sandboxed,
        State { file: &state, metrics: &metrics, death: None, renews: false, pressure: pressure.as_ref() },
        wrap,
    )?;
    config.remarks.iter().for_each(Remark::log);
    metrics.begin_process();
    if config.monitor.is_wanted() {
        monitor::answer_questions(&server, &metrics);
    }
    readiness.announce();
    let share = Share {
        name,
        directory: config.shared_dir,
        socket,
        keep_listening: config.keep_listening,
        device: config.device,
        server,
        stations,
        state,
        metrics,
        statistics: Statistics::default(),
    };
    let served = frontend::serve(&share, &signals);
    let counted = &share.statistics;
    debug!("{} front ends connected, {} failed", counted.front_ends(), counted.failures());
    Ok(served?)
}

/// The state that a process begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct State<'a> {
    /// Where it is kept.
    pub file: &'a Arc<StateFile>,
    /// What is counted of the share.
    pub metrics: &'a Arc<Metrics>,
    /// How an earlier process died that has left it; `None` if it is empty.
    pub death: Option<Death>,
    /// The share is mounted anew since: what the guest knows is opened again.
    pub renews: bool,
    /// Where to see whether the host is short of memory.
    pub pressure: Option<&'a Arc<MemoryPressure>>,
}

/// Begins to serve the share inside the sandbox, up to the seccomp filter: what follows is the guest's.
pub(super) fn begin(
    config: &Config,
    sandboxed: Sandboxed,
    state: State<'_>,
    wrap: impl FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
) -> Result<(Arc<Server>, Stations), RunError> {
    process::prepare_for_requests(&sandboxed.proc_self_fd)?;
    // Before the descriptors are counted that are not the guest's, and before the filter.
    let stations = engines(config);
    state.file.set_rings(stations.iter().flat_map(Stations::rings));
    let mut fs = file_system(config, sandboxed, state, stations.is_some())?;
    let file_handles = fs.uses_file_handles();
    if let Err(error) = confine(config, &mut fs) {
        return Err(leave(state, fs, error));
    }
    let background = fs.background();
    let server = Arc::new(Server::new(wrap(stack(fs, config.store, config.readonly))));
    let uses = Uses { file_handles, rings: stations.is_some() };
    match sandbox::install_seccomp(config.seccomp, uses) {
        Ok(()) => {
            background.begin();
            Ok((server, stations.unwrap_or_default()))
        }
        Err(error) => Err(leave(state, server, error.into())),
    }
}

/// Rings for the engines of all queues; `None` if threads read and write data.
fn engines(config: &Config) -> Option<Stations> {
    let kind = config.fs.io_engine;
    if kind == IoEngine::Threads || config.device.thread_pool_size < 2 {
        return None;
    }
    let stations = Stations::new(config.device.request_queues);
    let level = if kind == IoEngine::Auto { Level::Info } else { Level::Warn };
    stations.inspect_err(|error| log!(level, "threads read and write data: no io_uring here ({error})")).ok()
}

/// Gives up what serving does not need, except system calls.
fn confine(config: &Config, fs: &mut PassthroughFs) -> Result<(), RunError> {
    // Before the first thread is started: capabilities belong to threads.
    let file_handles = fs.uses_file_handles();
    let required = RequiredCaps { readonly: config.readonly, xattr: config.fs.xattr, file_handles };
    sandbox::give_up_capabilities(required, config.capabilities)?;
    Ok(fs.try_labels()?)
}

/// Leaves what was made of a state as it is after an error, for the next process: to drop it would close what the guest has
/// open.
fn leave<T>(state: State<'_>, made: T, error: RunError) -> RunError {
    if state.death.is_some() {
        std::mem::forget(made);
    }
    error
}

/// The file system of the host's directory: a fresh one, or that of the process that has died.
fn file_system(
    config: &Config,
    sandboxed: Sandboxed,
    state: State<'_>,
    has_engines: bool,
) -> Result<PassthroughFs, RunError> {
    let Sandboxed { root, proc_self_fd, proc_self_fdinfo, .. } = sandboxed;
    let io_engine = if has_engines { config.fs.io_engine } else { IoEngine::Threads };
    let fs_config = FsConfig { io_engine, ..config.fs_config() };
    let own = state.file.own_descriptors();
    let fs = match (state.death, own.load(Ordering::Relaxed)) {
        (Some(_), own) if own > 0 => {
            let limits = Limits::of_a_later_process(usize::try_from(own).unwrap_or(usize::MAX));
            if state.renews {
                PassthroughFs::reopen(&root, &proc_self_fd, state.file)?;
            }
            PassthroughFs::restore(proc_self_fd, &proc_self_fdinfo, limits, fs_config, state.file)
        }
        _ => {
            let limits = Limits::of_the_process(&proc_self_fd).map_err(StartError::System)?;
            own.store(u32::try_from(limits.fds.own()).unwrap_or(u32::MAX), Ordering::Relaxed);
            PassthroughFs::new(root, proc_self_fd, limits, fs_config, state.file)
        }
    };
    let fs = fs?;
    if let Some(pressure) = state.pressure {
        fs.watch_memory(pressure);
    }
    Ok(fs)
}

/// Where to see whether the host is short of memory, if any would be given back then. Before the sandbox, which has no such files.
pub(super) fn memory_pressure(config: &Config) -> Option<Arc<MemoryPressure>> {
    // Descriptors may be scarce.
    mapped_writes_obstacle(&config.fs_config()).is_none().then(MemoryPressure::open)?.map(Arc::new)
}

/// The file system of a share: what its options put around the host's directory.
fn stack(fs: PassthroughFs, store: Store, readonly: bool) -> Arc<dyn FileSystem> {
    match (store, readonly) {
        (Store::Host, false) => Arc::new(fs),
        (Store::Host, true) => Arc::new(ReadOnly::new(fs)),
        (Store::Null { latency }, false) => Arc::new(NullStore::new(fs, latency)),
        (Store::Null { latency }, true) => Arc::new(ReadOnly::new(NullStore::new(fs, latency))),
    }
}
