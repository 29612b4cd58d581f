//! Errors: one sentence each, with the cause and the remedy.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// The reason why a command failed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// No daemon listens at this path.
    #[error("cannot connect to {}: is lanefsd running with --control-socket? ({})", socket.display(), reason(source))]
    NotRunning {
        /// The path.
        socket: PathBuf,
        /// What connect(2) returned.
        source: io::Error,
    },
    /// Another user's socket.
    #[error(
        "cannot connect to {}: permission denied; run lanefsctl as root or as the user of the daemon",
        socket.display()
    )]
    NotAllowed {
        /// The path.
        socket: PathBuf,
    },
    /// Another failure of connect(2).
    #[error("cannot connect to {}: {source}", socket.display())]
    Connect {
        /// The path.
        socket: PathBuf,
        /// What connect(2) returned.
        source: io::Error,
    },
    /// No answer within the time.
    #[error(
        "no answer from {} within {} s: the daemon is stopped or overloaded; its log may show the cause",
        socket.display(), timeout.as_secs_f64()
    )]
    Timeout {
        /// The path.
        socket: PathBuf,
        /// The time.
        timeout: Duration,
    },
    /// End of file in place of an answer.
    #[error(
        "the daemon closed {} without an answer: it ends, or refuses this user; its log shows the reason",
        socket.display()
    )]
    Closed {
        /// The path.
        socket: PathBuf,
    },
    /// A failure of the connection.
    #[error("cannot talk to {}: {source}", socket.display())]
    Talk {
        /// The path.
        socket: PathBuf,
        /// What read(2) or write(2) returned.
        source: io::Error,
    },
    /// Something else than an answer.
    #[error(
        "the answer from {} is not one of a control socket: is it the --control-socket of a lanefsd \
         of this version? ({reason})",
        socket.display()
    )]
    Garbage {
        /// The path.
        socket: PathBuf,
        /// The fault.
        reason: String,
    },
    /// The daemon refuses.
    #[error("{}: {message}", socket.display())]
    Refused {
        /// The path.
        socket: PathBuf,
        /// The daemon's sentence, without control characters.
        message: String,
    },
    /// No daemon at all.
    #[error(
        "no control socket (*.ctl) in {}: start lanefsd with --control-socket, or name its socket with --socket",
        directory.display()
    )]
    NoSocket {
        /// The directory searched.
        directory: PathBuf,
    },
    /// The directory of sockets cannot be read.
    #[error("cannot read {}: {source}; name a control socket with --socket", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What opendir(3) returned.
        source: io::Error,
    },
    /// A change that would hit shares that were not named.
    #[error("this would change {count} shares; name one or more with --socket: {names}")]
    Ambiguous {
        /// How many there are.
        count: usize,
        /// Their sockets.
        names: String,
    },
    /// Requests in flight after the time to wait.
    #[error(
        "share {share}: {in_flight} still in flight after {seconds} s and no new ones are taken; \
         `lanefsctl ops` shows them, `lanefsctl resume` takes requests again",
        in_flight = crate::units::noun(*in_flight, "request")
    )]
    NotDrained {
        /// The share.
        share: String,
        /// Requests in flight.
        in_flight: u64,
        /// The time to wait.
        seconds: f64,
    },
    /// A status without the id of the daemon's process.
    #[error("the status from {} lacks the process id: use lanefsd upgrade --socket-path", socket.display())]
    NoPid {
        /// The path.
        socket: PathBuf,
    },
    /// A status with the id of another program's process.
    #[error(
        "the status from {} names process {pid}, which runs {}: the daemon may be compromised, or in another \
         PID namespace; use lanefsd upgrade --socket-path",
        socket.display(), program.display()
    )]
    OtherProgram {
        /// The path.
        socket: PathBuf,
        /// The process.
        pid: u32,
        /// Its program.
        program: PathBuf,
    },
    /// The daemon's program cannot be run.
    #[error("cannot run {}: {source}; install lanefsd beside lanefsctl or in PATH", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// What execve(2) returned.
        source: io::Error,
    },
    /// A live view without a terminal.
    #[error("top needs a terminal; use top --batch for plain text")]
    NoTerminal,
    /// The terminal fails.
    #[error("cannot use the terminal: {source}")]
    Terminal {
        /// The cause.
        source: io::Error,
    },
    /// Batch mode in which no share ever answered.
    #[error("no share answered: {reason}")]
    NothingShown {
        /// The error of the first share.
        reason: String,
    },
    /// The output cannot be written.
    #[error("cannot write the output: {source}")]
    Output {
        /// What write(2) returned.
        source: io::Error,
    },
}

/// A system error without its number.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

impl Error {
    /// A failure of connect(2), with its remedy.
    pub(crate) fn connect(socket: &Path, source: io::Error) -> Error {
        let socket = socket.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Error::NotRunning { socket, source }
            }
            io::ErrorKind::PermissionDenied => Error::NotAllowed { socket },
            _ => Error::Connect { socket, source },
        }
    }

    /// True if the reader of the output has gone, as `head` does: no message is due.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Error::Output { source } if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// The result of a command.
pub(crate) type Result<T> = std::result::Result<T, Error>;
