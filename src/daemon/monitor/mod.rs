//! The monitor: a process of its own that answers those who look at the daemon or control it.
//!
//! It has the memory of the counters and of the state, and no other connection with the processes that serve. It reads
//! both, and writes into the first: rate limits, the log level, and the question for gauges. So nobody who asks, however
//! often, and whatever he sends, gets near a request of the guest. It has no capabilities, may make few system calls, and
//! is started anew when it dies, but for `--no-survive`.
//!
//! ```text
//!  lanefsctl ─────▶ --control-socket ─┐
//!  Prometheus ────▶ --metrics-socket ─┼─ monitor ── counters, state ── worker
//!  node_exporter ─▶ --metrics-file ───┘
//! ```

mod answers;
mod connection;
mod control;
mod diagnosis;
mod endpoints;
mod exposition;
mod http;
mod serve;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::error;
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_parent_process_death_signal, waitpid,
};
use serde::{Deserialize, Serialize};

pub use self::endpoints::{EndpointError, Endpoints};
use self::serve::Sources;
use super::share::pace_of;
use super::socket::FileId;
use crate::config::{Config, Seccomp, Store};
use crate::fs::passthrough::mapped_writes_obstacle;
use crate::limits::PaceHandle;
use crate::logging;
use crate::metrics::Metrics;
use crate::process;
use crate::sandbox;
use crate::server::Server;
use crate::state_file::StateFile;
use crate::sys::{inherited, signals};

/// Between two attempts to start the process.
const PAUSE: Duration = Duration::from_secs(3);

/// Between two looks at the process, at most.
const LONGEST: Duration = Duration::from_secs(30);
/// How long it may take to end.
const GRACE: Duration = Duration::from_secs(1);

/// What the monitor tells of its daemon, beside the counters.
#[derive(Clone, Debug)]
struct Subject {
    /// The name of the share.
    share: Arc<str>,
    directory: PathBuf,
    /// The process that was started.
    daemon: Pid,
    /// What was worth a line at the start.
    remarks: Vec<String>,
    /// How much was logged then.
    log_level: log::LevelFilter,
    seccomp: Seccomp,
    /// CPUs of the host. The monitor may not look.
    cpus: usize,
    /// The rate limits of its group.
    group: Option<PaceHandle>,
    /// Whether files are written through mappings, and why not.
    mapped_writes: String,
}

/// The monitor, as the process sees it that has started it.
#[derive(Debug)]
pub struct Monitor {
    endpoints: Endpoints,
    subject: Subject,
    metrics: Arc<Metrics>,
    state: Arc<StateFile>,
    process: Option<Pid>,
    started: Instant,
}

/// What another program in this process needs to go on with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MonitorParts {
    /// The process that runs.
    pub process: Option<i32>,
    /// The listening sockets.
    pub sockets: Vec<SocketParts>,
    /// The file.
    pub file: Option<PathBuf>,
    /// What was worth a line at the start.
    pub remarks: Vec<String>,
}

/// A listening socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SocketParts {
    /// The option that names it.
    pub option: String,
    /// Its path.
    pub path: PathBuf,
    /// Device and inode number of the path.
    pub file: FileId,
    /// Its descriptor.
    pub descriptor: RawFd,
}

/// Whether files of the share are written through mappings, in a few words.
fn mapped_writes(config: &Config) -> String {
    // Which file systems there are is not asked: one that hangs would hold the daemon up.
    match mapped_writes_obstacle(&config.fs_config()) {
        _ if config.store != Store::Host => "no: --store=null".into(),
        Some(why) => format!("no: {why}"),
        None => "on tmpfs, ext4 and XFS, where they pay".into(),
    }
}

impl Monitor {
    /// Starts the monitor of a share, unless nobody is to look: then there is none.
    ///
    /// Must be called while the process has one thread.
    pub fn start(
        config: &Config,
        share: &Arc<str>,
        endpoints: Endpoints,
        memory: (&Arc<StateFile>, &Arc<Metrics>),
    ) -> Option<Monitor> {
        let remarks = config.remarks.iter().map(ToString::to_string).collect();
        Monitor::start_with(config, share, (endpoints, remarks), memory)
    }

    fn start_with(
        config: &Config,
        share: &Arc<str>,
        (endpoints, remarks): (Endpoints, Vec<String>),
        (state, metrics): (&Arc<StateFile>, &Arc<Metrics>),
    ) -> Option<Monitor> {
        if endpoints.is_empty() {
            return None;
        }
        let subject = Subject {
            share: Arc::clone(share),
            directory: config.shared_dir.clone(),
            daemon: getpid(),
            remarks,
            log_level: log::max_level(),
            seccomp: config.seccomp,
            cpus: process::cpus(),
            group: config.device.group.clone(),
            mapped_writes: mapped_writes(config),
        };
        let (metrics, state) = (Arc::clone(metrics), Arc::clone(state));
        let mut monitor =
            Monitor { endpoints, subject, metrics, state, process: None, started: Instant::now() };
        monitor.spawn();
        Some(monitor)
    }

    /// Ends the monitor of the program that was in this process before, and starts one of this program.
    pub fn go_on(
        config: &Config,
        share: &Arc<str>,
        parts: MonitorParts,
        memory: (&Arc<StateFile>, &Arc<Metrics>),
    ) -> Option<Monitor> {
        if let Some(process) = parts.process.and_then(Pid::from_raw) {
            // Not the other signals, by which it would remove the sockets.
            end(process, Signal::KILL);
        }
        let remarks = parts.remarks.clone();
        let endpoints = Endpoints::go_on(parts).inspect_err(|error| {
            error!("nobody can look at the daemon any more: {}", logging::describe(error))
        });
        // What was remarkable at the start still is; this program looks at less.
        Monitor::start_with(config, share, (endpoints.ok()?, remarks), memory)
    }

    /// What another program in this process needs.
    pub fn parts(&self) -> MonitorParts {
        MonitorParts {
            process: self.process.map(|process| process.as_raw_nonzero().get()),
            remarks: self.subject.remarks.clone(),
            ..self.endpoints.parts()
        }
    }

    /// Its descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.endpoints.sockets().map(|socket| socket.listener().as_raw_fd())
    }

    /// Starts the process anew if it has died.
    pub fn keep_alive(&mut self) {
        if let Some(process) = self.process
            && let Ok(Some((_, status))) = waitpid(Some(process), WaitOptions::NOHANG)
        {
            self.process = None;
            let how = match (status.terminating_signal(), status.exit_status()) {
                (Some(signal), _) => format!("by signal {signal}"),
                (_, status) => format!("with status {}", status.unwrap_or(-1)),
            };
            error!("the monitor process has ended {how}: lanefsctl and metrics are gone for a moment");
        }
        if self.process.is_none() && self.started.elapsed() >= PAUSE {
            self.spawn();
        }
    }

    /// When [`Monitor::keep_alive`] is to be called at the latest.
    pub fn due(&self) -> Instant {
        match self.process {
            None => self.started + PAUSE,
            // Its end interrupts a wait. One that ends right before the wait begins does not.
            Some(_) => Instant::now() + LONGEST,
        }
    }

    fn spawn(&mut self) {
        self.started = Instant::now();
        let parent = getpid();
        // SAFETY: the process has one thread, as the callers promise, so the child may do everything.
        match unsafe { libc::fork() } {
            -1 => error!("the monitor process cannot be started: {}", io::Error::last_os_error()),
            0 => sandbox::exit(match self.run(parent) {
                Ok(()) => 0,
                Err(error) => {
                    error!("the monitor process cannot serve: {error}");
                    1
                }
            }),
            process => self.process = Pid::from_raw(process),
        }
    }

    fn run(&self, parent: Pid) -> io::Result<()> {
        // For people, and first of all: until then it looks like a worker.
        let _ = rustix::thread::set_name(c"lanefsd-monitor");
        set_parent_process_death_signal(Some(Signal::TERM))?;
        let ending = signals::endings_by_descriptor()?;
        if getppid() != Some(parent) {
            return Ok(());
        }
        let own = self.endpoints.own().map_err(io::Error::other)?;
        let mut kept: Vec<RawFd> =
            self.descriptors().chain(logging::descriptor()).chain(own.descriptors()).collect();
        kept.extend([
            ending.as_raw_fd(),
            self.metrics.file().as_fd().as_raw_fd(),
            self.state.file().as_fd().as_raw_fd(),
        ]);
        inherited::close_others(&kept)?;
        sandbox::confine_monitor(self.subject.seccomp).map_err(io::Error::other)?;
        let pace = pace_of(&self.metrics);
        let sources =
            Sources { subject: &self.subject, state: &self.state, metrics: &self.metrics, pace: &pace };
        let served = serve::run(&self.endpoints, &own, &sources, &ending);
        own.remove_sockets();
        served
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            // It may hang, by storage that does: the daemon ends nevertheless, and removes the sockets itself.
            let _ = kill_process(process, Signal::TERM);
            let begun = Instant::now();
            while let Ok(None) = waitpid(Some(process), WaitOptions::NOHANG) {
                if begun.elapsed() > GRACE {
                    return end(process, Signal::KILL);
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Ends a process of this one.
fn end(process: Pid, signal: Signal) {
    if kill_process(process, signal) == Ok(()) {
        while matches!(waitpid(Some(process), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

/// Lets a thread of the serving process answer the monitor: how many inodes, files and descriptors the guest has, and how
/// much is to be logged.
pub fn answer_questions(server: &Arc<Server>, metrics: &Arc<Metrics>) {
    // An earlier process, and another program, may have been told.
    apply_log_level(metrics);
    let (server, metrics) = (Arc::downgrade(server), Arc::clone(metrics));
    let answer = move || {
        // Who has asked a process that is dead by now does not wait any more.
        let mut last = metrics.last_question();
        loop {
            last = metrics.next_question(last);
            let Some(server) = server.upgrade() else { return };
            apply_log_level(&metrics);
            metrics.answer(last, server.gauges());
        }
    };
    if let Err(error) = thread::Builder::new().name("lanefsd-answers".into()).spawn(answer) {
        error!("the monitor gets no answers from this process: {error}");
    }
}

/// Logs as much as an operator has asked for.
pub fn apply_log_level(metrics: &Metrics) {
    if let Some(level) = metrics.log_level()
        && level != log::max_level()
    {
        log::set_max_level(level);
    }
}
