//! The loop of the monitor: connections, the file, and its end.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Signal, geteuid, kill_process};

use super::connection::{Answered, Connection, Peer};
use super::endpoints::{Endpoints, OwnFiles};
use super::exposition::{Form, text};
use super::{Subject, control, http};
use crate::limits::Pace;
use crate::logging::warn_limited;
use crate::metrics::{Gauges, Metrics, Sample};
use crate::state_file::StateFile;

/// Connections at once to one socket.
const MAX_CONNECTIONS: usize = 32;
/// Before the next attempt to accept a connection, after one that has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two versions of the file.
const FILE_INTERVAL: Duration = Duration::from_secs(15);
/// How often slow requests of long ago make room.
const AGE_INTERVAL: Duration = Duration::from_secs(60);
/// How long the serving process may take to count.
const PATIENCE: Duration = Duration::from_millis(200);

/// What answers are made of.
pub(super) struct Sources<'a> {
    pub subject: &'a Subject,
    pub state: &'a Arc<StateFile>,
    pub metrics: &'a Arc<Metrics>,
    pub pace: &'a Pace,
}

impl Sources<'_> {
    /// What the serving process says, or has said last.
    pub(super) fn gauges(&self) -> Gauges {
        self.metrics.ask(PATIENCE)
    }

    /// All counters, with the requests in flight, which the journal has.
    pub(super) fn sample(&self) -> Sample {
        let mut sample = self.metrics.sample();
        for request in self.state.in_flight() {
            if let Some(queue) = sample.queues.get_mut(request.queue) {
                queue.in_flight += 1;
            }
        }
        sample
    }

    /// Lets the supervisor look whether there is something for it to do. The end of a child would do the same.
    pub(super) fn wake_supervisor(&self) {
        let _ = kill_process(self.subject.daemon, Signal::CHILD);
    }

    fn text(&self, form: Form) -> String {
        self.text_of(form, self.gauges())
    }

    fn text_of(&self, form: Form, gauges: Gauges) -> String {
        text(form, self, gauges)
    }
}

/// Serves until `ending` is readable.
pub(super) fn run(
    endpoints: &Endpoints,
    own: &OwnFiles,
    sources: &Sources<'_>,
    ending: &OwnedFd,
) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    let (mut next_file, mut next_age) = (Instant::now(), Instant::now() + AGE_INTERVAL);
    loop {
        let now = Instant::now();
        if let Some(file) = own.file.as_ref().filter(|_| now >= next_file) {
            if let Err(error) = file.write(&sources.text(Form::Prometheus)) {
                warn_limited!("the metrics file cannot be written: {error}");
            }
            next_file = now + FILE_INTERVAL;
        }
        if now >= next_age {
            sources.metrics.age();
            next_age = now + AGE_INTERVAL;
        }
        let next_file = own.file.as_ref().map(|_| next_file);
        // A list that nobody can ask for need not be kept in order.
        let next_age = endpoints.control.as_ref().map(|_| next_age);
        let deadlines = connections.iter().map(Connection::deadline).chain(next_file).chain(next_age);
        let timeout = deadlines.min().map(|deadline| deadline.saturating_duration_since(now));
        if wait(endpoints, &connections, ending, timeout)? {
            if let Some(file) = &own.file {
                // The daemon has ended: what it has counted last.
                let _ = file.write(&sources.text_of(Form::Prometheus, Gauges::default()));
            }
            return Ok(());
        }
        connections.retain_mut(|connection| {
            let peer = connection.peer;
            connection.advance(|input| answer(peer, input, sources))
        });
        for (side, is_control) in [(&endpoints.control, true), (&endpoints.metrics, false)] {
            if let Some(side) = side {
                accept(side.listener(), is_control, &mut connections);
            }
        }
    }
}

/// Waits for something to do, and returns whether the monitor is to end.
fn wait(
    endpoints: &Endpoints,
    connections: &[Connection],
    ending: &OwnedFd,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let mut watched = vec![PollFd::new(ending, PollFlags::IN)];
    let listeners = endpoints.sockets().map(|socket| socket.listener().as_fd());
    watched.extend(listeners.map(|listener| PollFd::from_borrowed_fd(listener, PollFlags::IN)));
    watched.extend(connections.iter().map(|connection| PollFd::new(connection, connection.interest())));
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut watched, timeout.as_ref()) {
        Ok(_) => Ok(watched.first().is_some_and(|ending| !ending.revents().is_empty())),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn accept(listener: &UnixListener, is_control: bool, connections: &mut Vec<Connection>) {
    // Not without an end: others are to be answered.
    for _ in 0..MAX_CONNECTIONS {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                warn_limited!("the monitor cannot accept a connection: {error}");
                // It stays ready, and the host may lack descriptors for long: a connection that says nothing makes room.
                remove_oldest(connections, |_| true);
                thread::sleep(ACCEPT_PAUSE);
                return;
            }
        };
        let user = socket_peercred(&stream).map(|peer| peer.uid);
        let allowed = user.is_ok_and(|user| user.is_root() || user == geteuid());
        let peer = if is_control { Peer::Control { allowed } } else { Peer::Metrics };
        let is_same = |other: &Connection| other.peer.is_same_kind(peer);
        if connections.iter().filter(|other| is_same(other)).count() >= MAX_CONNECTIONS {
            // Who connects and says nothing keeps nobody out.
            remove_oldest(connections, is_same);
        }
        connections.extend(Connection::new(stream, peer).ok());
    }
}

/// Closes the connection that was silent for longest, of those that `may_go`.
fn remove_oldest(connections: &mut Vec<Connection>, may_go: impl Fn(&Connection) -> bool) {
    let candidates = connections.iter().enumerate().filter(|(_, connection)| may_go(connection));
    if let Some((oldest, _)) = candidates.min_by_key(|(_, connection)| connection.last_moved()) {
        connections.swap_remove(oldest);
    }
}

fn answer(peer: Peer, input: &[u8], sources: &Sources<'_>) -> Answered {
    match peer {
        Peer::Control { allowed } => control::answer(input, allowed, sources),
        Peer::Metrics => http::answer(input, |form| sources.text(form)),
    }
}
