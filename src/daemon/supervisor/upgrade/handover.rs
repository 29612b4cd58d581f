//! What a supervisor hands over to the program that takes its place, as JSON in a memory file whose number stands in the
//! environment. Descriptors are numbers: they stay open.
//!
//! Another version may read it: fields are added, with a default, and never change their meaning. Whoever breaks that
//! changes [`FORMAT`].

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::daemon::monitor::MonitorParts;
use crate::daemon::share::pace_of;
use crate::daemon::socket::Files;
use crate::device::quarantine::Death;
use crate::limits::Rates;
use crate::metrics::Metrics;
use crate::sandbox::config::Sandbox;
use crate::sandbox::{Entered, Prepared};
use crate::sys::exec::{keep, let_go};
use crate::sys::inherited::{adopt, copy};

/// The variable with the number of the file.
pub(super) const VARIABLE: &str = "LANEFSD_HANDOVER";
/// The variable that says why another program could not go on with it.
pub(super) const FAILURE: &str = "LANEFSD_HANDOVER_FAILURE";
/// The format that this program writes and reads.
const FORMAT: u32 = 1;
/// More bytes than any hand-over has.
const MAX_SIZE: u64 = 16 << 20;

/// Why a hand-over cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum HandoverError {
    #[error("the hand-over of the earlier program cannot be read")]
    Read(#[from] io::Error),
    #[error("the hand-over has format {0}, and this lanefsd reads format {FORMAT}")]
    Format(u32),
    #[error("the hand-over names a descriptor that is not open: {0}")]
    Descriptor(RawFd),
    #[error("the hand-over has a sandbox that is unknown: {0}")]
    Sandbox(String),
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct Handover {
    pub format: u32,
    /// Version of the program that hands over.
    pub version: String,
    /// Where the program is looked for.
    pub program: OsString,
    /// The arguments that the daemon was started with.
    pub arguments: Vec<OsString>,
    /// The program that hands over.
    pub old: RawFd,
    /// Nanoseconds of CLOCK_MONOTONIC when the last worker was asked to drain.
    pub since: u64,
    pub state: RawFd,
    /// The counters, since version 0.2.
    pub metrics: Option<RawFd>,
    /// Who answers those that look at the daemon.
    pub monitor: Option<MonitorParts>,
    pub reports: RawFd,
    pub listener: RawFd,
    pub socket: Option<SocketFiles>,
    pub sandbox: SandboxParts,
    pub ignores_terminal: bool,
    /// The last worker, whose status was not taken.
    pub zombie: Option<i32>,
    /// How long ago workers have died, in milliseconds.
    pub deaths: Vec<u64>,
    /// Connections that nobody serves yet.
    pub pending: Vec<RawFd>,
    pub front_end: Option<FrontEnd>,
    /// The region of a session that is kept for a front end which may come back.
    pub parked: Option<Words>,
    /// The file itself, in the process.
    #[serde(skip)]
    pub file: RawFd,
    /// Why another program could not go on with it.
    #[serde(skip)]
    pub failure: Option<String>,
}

/// Socket and pid file by device and inode number, and the descriptor by which the latter is locked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct SocketFiles {
    pub socket: (u64, u64),
    pub pid_file: (u64, u64),
    pub lock: Option<RawFd>,
}

/// The sandbox of the workers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct SandboxParts {
    pub kind: String,
    pub outside: Option<(u32, u32)>,
    /// See [`Entered`].
    pub entered: [u8; Entered::SIZE],
    /// The shared directory.
    pub path: Option<PathBuf>,
}

/// A front end that is served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct FrontEnd {
    pub connection: RawFd,
    /// A message that has begun.
    pub part: Words,
    /// Replies that the connection had no room for, and how much of the first one was sent.
    pub replies: Vec<Words>,
    pub sent: usize,
    /// What a new worker is sent.
    pub setup: Vec<Words>,
    /// Messages that no worker has taken.
    pub messages: Vec<Words>,
    /// How the last worker has ended: `upgrade`, `fault` or `kill`.
    pub death: String,
    pub kept: Kept,
    /// Post-copy has begun, and may be over.
    pub was_in_postcopy: bool,
}

/// What a front end needs to reconnect, and the region of a session that it may go on with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct Kept {
    pub negotiated: bool,
    pub region: Option<Words>,
    pub parked: Option<Words>,
    /// It goes on with its session, and has not begun to use it.
    pub came_back: bool,
}

/// A message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::daemon) struct Words {
    pub bytes: Vec<u8>,
    pub fds: Vec<RawFd>,
}

impl Handover {
    /// One that is to be filled.
    pub(super) fn new() -> Handover {
        Handover { format: FORMAT, version: super::VERSION.into(), ..Handover::default() }
    }

    /// The hand-over that this process was started with, if there is one.
    pub(super) fn inherited() -> Result<Option<Handover>, HandoverError> {
        let Some(number) = std::env::var(VARIABLE).ok().and_then(|number| number.parse().ok()) else {
            return Ok(None);
        };
        let file = File::from(copy(number).map_err(|_| HandoverError::Descriptor(number))?);
        let len = file.metadata()?.len().min(MAX_SIZE);
        let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut text, 0)?;
        let mut handover: Handover = serde_json::from_slice(&text).map_err(io::Error::from)?;
        handover.file = number;
        handover.failure = std::env::var(FAILURE).ok();
        Ok(Some(handover))
    }

    /// Whether this program can go on with it.
    pub(super) fn check(&self) -> Result<(), HandoverError> {
        if self.format != FORMAT {
            return Err(HandoverError::Format(self.format));
        }
        self.prepared()?;
        let is_closed = |fd: &RawFd| keep(*fd).is_err();
        self.descriptors().find(is_closed).map_or(Ok(()), |fd| Err(HandoverError::Descriptor(fd)))
    }

    /// The sandbox.
    pub(super) fn prepared(&self) -> Result<Prepared, HandoverError> {
        let kind = match self.sandbox.kind.as_str() {
            "namespace" => Sandbox::Namespace,
            "chroot" => Sandbox::Chroot,
            "none" => Sandbox::None,
            other => return Err(HandoverError::Sandbox(other.into())),
        };
        Ok(Prepared {
            kind,
            outside: self.sandbox.outside,
            entered: Entered::from_bytes(self.sandbox.entered),
            path: self.sandbox.path.clone(),
        })
    }

    /// The counters, if this program reads them.
    fn known_counters(&self) -> Option<RawFd> {
        let is_known = |fd: &RawFd| copy(*fd).and_then(Metrics::open).is_ok_and(|metrics| metrics.is_some());
        self.metrics.filter(is_known)
    }

    /// The counters, with the rate limits beside them. After a program that has none, or others, they begin anew, with
    /// `rates`.
    pub(super) fn counters(&self, rates: &Rates) -> Result<Arc<Metrics>, Errno> {
        if let Some(fd) = self.known_counters()
            && let Some(metrics) = adopt(fd).and_then(Metrics::open)?
        {
            return Ok(metrics);
        }
        let metrics = Metrics::create()?;
        pace_of(&metrics).apply(rates);
        Ok(metrics)
    }

    /// Socket and pid file, with a descriptor by which the latter stays locked.
    pub(super) fn socket_files(&self) -> Option<(Files, Option<OwnedFd>)> {
        let files = self.socket.as_ref()?;
        // It hides what it is given, and the program that this one may go back to needs it.
        let lock = files.lock.and_then(|lock| copy(lock).ok());
        Some((Files { socket: files.socket, pid_file: files.pid_file }, lock))
    }

    /// Writes it to a memory file that stays open in the next program, as all descriptors that it names.
    pub(super) fn publish(&self) -> io::Result<OwnedFd> {
        let file = memfd_create(c"lanefsd-handover", MemfdFlags::CLOEXEC)?;
        let text = serde_json::to_vec(self).map_err(io::Error::from)?;
        let mut file = File::from(file);
        file.write_all(&text)?;
        for fd in self.descriptors().chain([file.as_raw_fd()]) {
            keep(fd)?;
        }
        Ok(file.into())
    }

    /// The program that executes others again has nothing to hand over.
    pub(super) fn withdraw(&self) {
        // What is left open is closed by the next worker, or nobody's.
        for fd in self.descriptors() {
            let _ = let_go(fd);
        }
    }

    /// Descriptors that are not needed any more once the program goes on.
    pub(super) fn temporary(&self) -> impl Iterator<Item = RawFd> {
        let lock = self.socket.as_ref().and_then(|socket| socket.lock);
        // Those of another kind are for the program that this one may go back to.
        let counters = self.metrics.filter(|_| self.known_counters().is_none());
        [self.file, self.old].into_iter().chain(lock).chain(counters)
    }

    /// Closes these.
    pub(super) fn close(&self) {
        self.temporary().for_each(|fd| drop(adopt(fd)));
    }

    /// The sockets of the monitor.
    pub(in crate::daemon) fn monitored(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.monitor.iter().flat_map(|monitor| monitor.sockets.iter().map(|socket| socket.descriptor))
    }

    /// All descriptors that it names.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let front_end = self.front_end.iter().flat_map(|front_end| {
            let messages = front_end.replies.iter().chain(&front_end.setup).chain(&front_end.messages);
            let messages = messages.chain([&front_end.part]);
            let messages = messages.chain(&front_end.kept.region).chain(&front_end.kept.parked);
            messages.flat_map(|message| message.fds.iter().copied()).chain([front_end.connection])
        });
        let lock = self.socket.iter().filter_map(|socket| socket.lock);
        [self.old, self.state, self.reports, self.listener]
            .into_iter()
            .chain(Entered::from_bytes(self.sandbox.entered).descriptors())
            .chain(self.pending.iter().copied())
            .chain(self.metrics)
            .chain(self.monitored())
            .chain(lock)
            .chain(self.parked.iter().flat_map(|region| region.fds.iter().copied()))
            .chain(front_end)
    }
}

impl From<Prepared> for SandboxParts {
    fn from(Prepared { kind, outside, entered, path }: Prepared) -> SandboxParts {
        let kind = match kind {
            Sandbox::Namespace => "namespace",
            Sandbox::Chroot => "chroot",
            Sandbox::None => "none",
        };
        SandboxParts { kind: kind.into(), outside, entered: entered.to_bytes(), path }
    }
}

/// The name of a death in a hand-over.
pub(super) fn name_of(death: Death) -> &'static str {
    match death {
        Death::Fault => "fault",
        Death::Kill => "kill",
        Death::Upgrade => "upgrade",
    }
}

impl FrontEnd {
    /// How the last worker has ended.
    pub(super) fn death(&self) -> Death {
        match self.death.as_str() {
            "fault" => Death::Fault,
            "upgrade" => Death::Upgrade,
            _ => Death::Kill,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limit;

    #[test]
    fn counters_of_another_kind_stay_for_the_program_that_has_them() {
        let file = memfd_create(c"other", MemfdFlags::CLOEXEC).unwrap();
        let rates = Rates::parse("read-ops=7").unwrap();
        let handover = Handover { metrics: Some(file.as_raw_fd()), ..Handover::new() };
        let metrics = handover.counters(&rates).unwrap();
        assert_eq!(pace_of(&metrics).rate(Limit::ReadOps), 7);
        assert!(keep(file.as_raw_fd()).is_ok(), "it is open");
        assert!(handover.temporary().any(|fd| fd == file.as_raw_fd()));
    }
}
