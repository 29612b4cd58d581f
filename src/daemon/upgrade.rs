//! `lanefsd upgrade` and `lanefsd reopen`: asks a daemon that runs to go on with the program that is installed now, or with
//! its directory as it is mounted now, and waits for the outcome.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use super::report::{Outcome, Reports};
use crate::config::Daemon;
use crate::sys::hangup::ask_to_reopen;

/// How long to wait: a check takes 5 seconds at most, and a worker that cannot be started is tried for 10.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(2);

/// Why a daemon was not upgraded. Each message is one sentence.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum UpgradeError {
    #[error("{0} cannot be read: is the daemon running?")]
    PidFile(String, #[source] std::io::Error),
    #[error("{0} holds no process id")]
    NoPid(String),
    #[error("there is no process {0}")]
    NoProcess(i32),
    #[error(
        "this user may not signal process {0}; upgrade as root, or as the user who has started the daemon"
    )]
    NotAllowed(i32),
    #[error(
        "process {0} is not a lanefsd that can be upgraded: it is another program or an older version, was started with --no-survive, or belongs to another user"
    )]
    NotUpgradable(i32),
    #[error("process {0} was not upgraded: {1}")]
    Refused(i32, String),
    #[error("process {0} has not opened its share anew, and goes on as it was: {1}; its log says more")]
    NotReopened(i32, String),
    #[error("process {0} ended meanwhile")]
    Ended(i32),
    #[error("process {0} gave no answer within {seconds} seconds", seconds = PATIENCE.as_secs())]
    NoAnswer(i32),
    #[error("the report of process {0} cannot be read")]
    Report(i32, #[source] std::io::Error),
}

/// Upgrades a daemon, and returns a sentence that says so.
pub fn upgrade(daemon: &Daemon) -> Result<String, UpgradeError> {
    let (pid, outcome) = ask(daemon, |process| kill_process(process, Signal::HUP))?;
    let Outcome { error, from, to } = outcome;
    match error {
        Some(why) => Err(UpgradeError::Refused(pid, why)),
        None => Ok(format!("process {pid} was upgraded from lanefsd {from} to {to}")),
    }
}

/// Lets a daemon open its share anew, and returns a sentence that says so.
pub fn reopen(daemon: &Daemon) -> Result<String, UpgradeError> {
    let (pid, outcome) = ask(daemon, ask_to_reopen)?;
    match outcome.error {
        Some(why) => Err(UpgradeError::NotReopened(pid, why)),
        None => Ok(format!("process {pid} has opened its share anew")),
    }
}

/// Signals a daemon, and waits for what it reports.
fn ask(
    daemon: &Daemon,
    signal: impl FnOnce(Pid) -> Result<(), Errno>,
) -> Result<(i32, Outcome), UpgradeError> {
    let pid = match daemon {
        Daemon::Pid(pid) => *pid,
        Daemon::Socket(path) => pid_of(path.clone())?,
    };
    let process = Pid::from_raw(pid).filter(|_| pid > 0).ok_or(UpgradeError::NoProcess(pid))?;
    match rustix::process::test_kill_process(process) {
        Ok(()) => {}
        Err(Errno::PERM) => return Err(UpgradeError::NotAllowed(pid)),
        Err(_) => return Err(UpgradeError::NoProcess(pid)),
    }
    // A signal would end a process that is something else.
    let reports = Reports::of_process(pid.unsigned_abs()).ok_or(UpgradeError::NotUpgradable(pid))?;
    let failed = |error| UpgradeError::Report(pid, error);
    let before = reports.count().map_err(failed)?;
    signal(process).map_err(|_| UpgradeError::NotAllowed(pid))?;
    let deadline = Instant::now() + PATIENCE;
    while reports.count().map_err(failed)? == before {
        if rustix::process::test_kill_process(process).is_err() {
            return Err(UpgradeError::Ended(pid));
        }
        if Instant::now() > deadline {
            return Err(UpgradeError::NoAnswer(pid));
        }
        sleep(INTERVAL);
    }
    Ok((pid, reports.last().map_err(failed)?))
}

/// The process of the daemon with this socket.
fn pid_of(socket: PathBuf) -> Result<i32, UpgradeError> {
    let mut path = socket.into_os_string();
    path.push(".pid");
    let shown = path.to_string_lossy().into_owned();
    let text = std::fs::read_to_string(&path).map_err(|error| UpgradeError::PidFile(shown.clone(), error))?;
    text.trim().parse().map_err(|_| UpgradeError::NoPid(shown))
}
