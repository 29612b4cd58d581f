//! One connection: what has come, and what is to be sent.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

/// Bytes of a request, at most.
pub(super) const MAX_REQUEST: usize = 4096;
/// For how long a peer may take to send a request, or to read what it is sent.
const PATIENCE: Duration = Duration::from_secs(10);
/// For how long a connection may be idle.
const IDLE: Duration = Duration::from_secs(300);

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// `lanefsctl`, and whether it may.
    Control { allowed: bool },
    /// Prometheus.
    Metrics,
}

impl Peer {
    /// Whether both have come by the same socket.
    pub(super) fn is_same_kind(self, other: Peer) -> bool {
        (self == Peer::Metrics) == (other == Peer::Metrics)
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    pub peer: Peer,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// Since when nothing has moved.
    since: Instant,
    /// Nothing more is read: it ends when all is sent.
    is_last: bool,
    /// A request may have come already, which is answered after those of others.
    has_more: bool,
}

impl Connection {
    /// A connection that was just accepted.
    pub(super) fn new(stream: UnixStream, peer: Peer) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        let (input, output) = (Vec::new(), Vec::new());
        let since = Instant::now();
        Ok(Connection { stream, peer, input, output, sent: 0, since, is_last: false, has_more: false })
    }

    /// What it waits for.
    pub(super) fn interest(&self) -> PollFlags {
        if self.sent < self.output.len() || self.has_more { PollFlags::OUT } else { PollFlags::IN }
    }

    /// When something was read or written last.
    pub(super) fn last_moved(&self) -> Instant {
        self.since
    }

    /// When it is given up.
    pub(super) fn deadline(&self) -> Instant {
        let is_idle = self.input.is_empty() && self.output.is_empty() && self.peer != Peer::Metrics;
        self.since + if is_idle { IDLE } else { PATIENCE }
    }

    /// Reads and writes what is possible. `answer` is given what has come so far. Returns whether the connection goes
    /// on.
    pub(super) fn advance(&mut self, answer: impl Fn(&[u8]) -> Answered) -> bool {
        match self.try_advance(answer) {
            Ok(goes_on) => goes_on && Instant::now() < self.deadline(),
            Err(error) => error.kind() == ErrorKind::WouldBlock && Instant::now() < self.deadline(),
        }
    }

    fn try_advance(&mut self, answer: impl Fn(&[u8]) -> Answered) -> io::Result<bool> {
        let mut answered = false;
        self.has_more = false;
        loop {
            while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
                let count = self.stream.write(rest)?;
                self.sent += count;
                self.since = Instant::now();
            }
            self.output.clear();
            self.sent = 0;
            if self.is_last {
                return Ok(false);
            }
            if answered {
                // Who asks without an end keeps nobody waiting.
                self.has_more = true;
                return Ok(true);
            }
            if let Some((used, Answer { bytes, is_last })) = answer(&self.input) {
                answered = true;
                self.input.drain(..used.min(self.input.len()));
                (self.output, self.is_last) = (bytes, is_last);
                continue;
            }
            let mut buffer = [0; MAX_REQUEST];
            let room = MAX_REQUEST.saturating_sub(self.input.len());
            let count = self.stream.read(buffer.get_mut(..room).unwrap_or_default())?;
            if count == 0 {
                return Ok(false);
            }
            self.since = Instant::now();
            self.input.extend(buffer.iter().take(count));
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// How much of what has come was a request, and the answer; `None` if more is to come.
pub(super) type Answered = Option<(usize, Answer)>;

/// The answer to a request.
#[derive(Debug)]
pub(super) struct Answer {
    pub bytes: Vec<u8>,
    /// The connection ends with it.
    pub is_last: bool,
}
