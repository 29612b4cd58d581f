//! A worker that closes or replaces descriptors of its supervisor: the daemon goes on or ends, with a reason, and nobody
//! waits for it in vain.

use std::fs;
use std::time::{Duration, Instant};

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::trial::errno;

const PATIENCE: Duration = Duration::from_secs(10);
const HOW: [&str; 3] = ["close", "event", "socket"];

/// What became of the daemon.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// It serves as before.
    Serves,
    /// Another worker serves.
    Replaced,
    /// It has ended.
    Ended,
}

struct Daemon {
    backend: Backend,
    session: Session,
    worker: u32,
}

impl Daemon {
    fn start() -> Daemon {
        let starter = Backend::of(env!("CARGO_BIN_EXE_lanefsd-dying"));
        let backend = starter.args(["--max-deaths=100"]).start().unwrap();
        let session =
            backend.connect(SessionOptions { timeout: PATIENCE, ..SessionOptions::default() }).unwrap();
        session.client().getattr(ROOT).unwrap();
        let worker = backend.worker().unwrap();
        Daemon { backend, session, worker }
    }

    /// Descriptors of the shared table, and what they are of.
    fn table(&self) -> Vec<(i32, String)> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.backend.pid())).unwrap();
        let link = |entry: fs::DirEntry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?.to_str()?.to_owned()))
        };
        let mut table: Vec<_> = entries.filter_map(|entry| link(entry.unwrap())).collect();
        table.sort();
        table
    }

    /// The sockets at the daemon's path: the listening one, and the connection with the front end.
    fn named_sockets(&self) -> [i32; 2] {
        let all = fs::read_to_string("/proc/net/unix").unwrap();
        let path = self.backend.socket().to_str().unwrap();
        let number_of = |state: &str| {
            let is_it = |line: &&str| line.ends_with(path) && line.split_whitespace().nth(5) == Some(state);
            let inode = all.lines().find(is_it).unwrap().split_whitespace().nth(6).unwrap();
            let link = format!("socket:[{inode}]");
            self.table().into_iter().find(|(_, what)| *what == link).unwrap().0
        };
        [number_of("01"), number_of("03")]
    }

    /// The descriptor by which the supervisor waits for its worker.
    fn process_of_worker(&self) -> i32 {
        let is_it = |fd: i32| {
            let info = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", self.backend.pid())).unwrap();
            info.lines().any(|line| line == format!("Pid:\t{}", self.worker))
        };
        self.table().into_iter().find(|(fd, what)| what.contains("pidfd") && is_it(*fd)).unwrap().0
    }

    fn meddle(&self, how: &str, number: i32) {
        let answer = self.session.client().lookup(ROOT, format!("!table:{how}:{number}"));
        assert_eq!(errno(answer), libc::ENOENT);
    }

    /// Wakes the supervisor by a message, and by the death of its worker.
    fn outcome(&mut self) -> Outcome {
        let _ = self.session.connection().protocol_features();
        if self.has_ended_soon() {
            return Outcome::Ended;
        }
        let replaced = self.backend.worker() != Some(self.worker);
        if !replaced {
            kill(self.worker);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.backend.worker().is_none_or(|worker| worker == self.worker) {
            if self.backend.try_wait().unwrap().is_some() {
                return Outcome::Ended;
            }
            assert!(Instant::now() < deadline, "the supervisor does not notice the death of its worker");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.session.client().getattr(ROOT).unwrap();
        if replaced { Outcome::Replaced } else { Outcome::Serves }
    }

    /// Whether the daemon has ended; one that is about to has closed the connection.
    fn has_ended_soon(&mut self) -> bool {
        let closed = self.session.connection().protocol_features().is_err();
        closed && {
            self.backend.wait(PATIENCE).unwrap();
            true
        }
    }

    /// SIGTERM ends it.
    fn end(mut self) {
        let _ = self.backend.signal(libc::SIGTERM);
        self.backend.wait(PATIENCE).unwrap();
        assert!(!self.backend.socket().exists());
    }
}

fn kill(worker: u32) {
    let _ = kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::KILL);
}

#[test]
fn the_connection_and_the_listening_socket_are_missed() {
    for how in HOW {
        for (place, what) in [(0, "one of its own"), (1, "the connection with the front end")] {
            let mut daemon = Daemon::start();
            let number = daemon.named_sockets()[place];
            daemon.meddle(how, number);
            assert_eq!(daemon.outcome(), Outcome::Ended, "{how} {what}");
            let log = daemon.backend.stderr();
            assert!(log.contains(&format!("descriptor {number} of its supervisor ({what})")), "{log}");
            assert_eq!(daemon.backend.worker(), None);
            daemon.end();
        }
    }
}

/// What belongs to the worker is lost with it, and another one serves.
#[test]
fn a_worker_that_cannot_be_watched_is_replaced() {
    for how in HOW {
        let mut daemon = Daemon::start();
        daemon.meddle(how, daemon.process_of_worker());
        assert_eq!(daemon.outcome(), Outcome::Replaced, "{how}");
        let log = daemon.backend.stderr();
        assert!(log.contains("closed or replaced the supervisor's connection with it"), "{log}");
        daemon.end();
    }
}

/// It wakes the supervisor by its death alone.
#[test]
fn a_worker_that_replaces_the_descriptor_of_its_process_and_dies_is_noticed() {
    for how in HOW {
        let daemon = Daemon::start();
        daemon.meddle(how, daemon.process_of_worker());
        kill(daemon.worker);
        daemon.session.client().getattr(ROOT).unwrap();
        daemon.end();
    }
}

/// Whatever it is: memory, events, pipes of signals, the log, the state, or the worker's own.
#[test]
fn any_descriptor_may_be_lost() {
    let first = Daemon::start();
    let table = first.table();
    first.end();
    let mut outcomes = Vec::new();
    for (number, what) in table {
        // One event cannot be told from another.
        let is_event = what.contains("eventfd");
        for how in ["close", "event"].into_iter().take(if is_event { 1 } else { 2 }) {
            let mut daemon = Daemon::start();
            let _ = daemon.session.client().lookup(ROOT, format!("!table:{how}:{number}"));
            eprintln!("{how} {number} ({what})");
            let outcome = daemon.outcome();
            let log = daemon.backend.stderr();
            eprintln!("{outcome:?}");
            if outcome == Outcome::Ended && number != libc::STDERR_FILENO {
                // That of the worker's own ones are other words.
                let is_told = log.contains(&format!("descriptor {number} ")) || log.contains("ERROR");
                assert!(is_told, "{how} {number} ({what}): {log}");
            }
            outcomes.push(outcome);
            daemon.end();
        }
    }
    assert!(outcomes.contains(&Outcome::Ended) && outcomes.contains(&Outcome::Replaced));
}
