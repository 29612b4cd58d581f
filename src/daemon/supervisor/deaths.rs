//! How a worker has ended, and how many have died lately.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::error;

use super::Supervisor;
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::metrics::op_name;
use crate::sandbox::{KILLED_BY_SECCOMP, WorkerEnd};
use crate::state_file::InFlight;
use crate::sys::clock::monotonic;

/// For how long a death counts.
pub(super) const PERIOD: Duration = Duration::from_secs(10);

/// Requests that are described when a worker has died with them.
const MAX_DESCRIBED: usize = 8;

/// Exit statuses of a worker that has not died.
pub(super) mod status {
    /// The front end has disconnected, or the supervisor has ended the connection.
    pub const DISCONNECTED: i32 = 0;
    /// An error, which the worker has reported.
    pub const REPORTED: i32 = 1;
    /// Not one message was valid: there was no front end.
    pub const NO_FRONT_END: i32 = 10;
    /// It has drained: another worker goes on.
    pub const DRAINED: i32 = 11;
    /// It has died: a panic outside of a request.
    pub const PANICKED: i32 = 101;
}

/// Whether a worker has died, rather than ended.
pub(super) fn is_death(end: WorkerEnd) -> bool {
    !matches!(end, WorkerEnd::Exited(status::DISCONNECTED | status::REPORTED | status::NO_FRONT_END))
}

/// How a worker has died, for the requests that it had in flight.
pub(super) fn death_of(end: WorkerEnd) -> Death {
    match end {
        WorkerEnd::Exited(status::PANICKED) => Death::Fault,
        WorkerEnd::Exited(_) => Death::Kill,
        WorkerEnd::Killed(signal) => Death::by_signal(signal),
    }
}

/// How a worker died, as the end of a sentence.
pub(super) struct Cause(pub WorkerEnd);

impl fmt::Display for Cause {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            WorkerEnd::Exited(status) => write!(out, "ended with exit status {status}"),
            WorkerEnd::Killed(signal) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(out, "was ended by {name}"),
                None => write!(out, "was ended by signal {signal}"),
            },
        }
    }
}

/// The exit status of the daemon for that of a worker, as shells have it.
pub(super) fn exit_status(end: WorkerEnd) -> u8 {
    let status = match end {
        WorkerEnd::Exited(status::NO_FRONT_END) => 0,
        WorkerEnd::Exited(status) => status,
        WorkerEnd::Killed(signal) => signal.saturating_add(128),
    };
    u8::try_from(status).unwrap_or(1)
}

/// The last deaths of workers. Too many end the daemon: what makes its workers die does not go away.
#[derive(Debug)]
pub(super) struct Deaths {
    last: VecDeque<Instant>,
    max: usize,
}

impl Deaths {
    /// `max` deaths within [`PERIOD`] are too many.
    pub(super) fn new(max: u32) -> Deaths {
        Deaths { last: VecDeque::new(), max: usize::try_from(max).unwrap_or(usize::MAX) }
    }

    /// How long ago they were, the oldest one first.
    pub(super) fn ages(&self, now: Instant) -> Vec<Duration> {
        self.last.iter().map(|then| now.saturating_duration_since(*then)).collect()
    }

    /// The same deaths, in another process.
    pub(super) fn with_ages(mut self, now: Instant, ages: impl IntoIterator<Item = Duration>) -> Deaths {
        self.last = ages.into_iter().filter_map(|age| now.checked_sub(age)).collect();
        self
    }

    /// Counts one more, and returns whether there were too many lately.
    pub(super) fn count(&mut self, now: Instant) -> bool {
        self.last.retain(|then| now.duration_since(*then) < PERIOD);
        self.last.push_back(now);
        self.last.len() >= self.max
    }
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Logs the death of a worker, and returns whether there were too many.
    pub(super) fn count_death(&mut self, end: WorkerEnd) -> bool {
        let too_many = self.deaths.count(Instant::now());
        self.metrics.count_death();
        self.log_death(end);
        if too_many {
            error!(
                "{} worker processes have died within {} seconds: giving up; --max-deaths sets how many may",
                self.config.max_deaths,
                PERIOD.as_secs()
            );
        }
        too_many
    }

    pub(super) fn log_death(&self, end: WorkerEnd) {
        error!("the worker process {}", Cause(end));
        if end == WorkerEnd::Killed(libc::SIGSYS) {
            error!("{KILLED_BY_SECCOMP}");
        }
        let in_flight = self.describe_in_flight();
        if !in_flight.is_empty() {
            error!("in flight then: {in_flight}");
        }
    }

    /// The requests that the worker has left, the oldest first: what they are and how old.
    fn describe_in_flight(&self) -> String {
        let now = monotonic();
        let with_age = |request: InFlight| {
            let (start, _) = self.metrics.progress(request.queue, request.head);
            (Duration::from_nanos(now.saturating_sub(start)), request)
        };
        let mut all: Vec<_> = self.state.in_flight().into_iter().map(with_age).collect();
        all.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
        let describe = |(age, request): &(Duration, InFlight)| match request.opcode {
            0 => format!("one that was not decoded (queue {})", request.queue),
            opcode => {
                let (name, ms) = (op_name(opcode), age.as_millis());
                format!(
                    "{name} (request {}, {} bytes, queue {}, {ms} ms)",
                    request.unique, request.len, request.queue
                )
            }
        };
        let mut texts: Vec<String> = all.iter().take(MAX_DESCRIBED).map(describe).collect();
        if all.len() > MAX_DESCRIBED {
            texts.push(format!("and {} more", all.len() - MAX_DESCRIBED));
        }
        texts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_deaths_now_and_then_end_nothing() {
        let start = Instant::now();
        let mut deaths = Deaths::new(5);
        assert!((0..100).all(|number| !deaths.count(start + PERIOD * number / 4)));
        let mut deaths = Deaths::new(5);
        let counted: Vec<bool> =
            (0..5).map(|number| deaths.count(start + Duration::from_secs(number))).collect();
        assert_eq!(counted, [false, false, false, false, true]);
    }

    #[test]
    fn a_death_is_told_from_an_end() {
        let (exited, killed) = (WorkerEnd::Exited, WorkerEnd::Killed);
        assert!([0, 1, 10].iter().all(|status| !is_death(exited(*status))));
        assert!(is_death(exited(101)) && is_death(killed(libc::SIGKILL)) && is_death(exited(2)));
        assert_eq!((death_of(exited(101)), death_of(exited(1))), (Death::Fault, Death::Kill));
        assert_eq!((death_of(killed(libc::SIGSEGV)), death_of(killed(9))), (Death::Fault, Death::Kill));
        assert_eq!(Cause(killed(libc::SIGSEGV)).to_string(), "was ended by SIGSEGV");
        assert_eq!((exit_status(killed(9)), exit_status(exited(1)), exit_status(exited(10))), (137, 1, 0));
    }
}
