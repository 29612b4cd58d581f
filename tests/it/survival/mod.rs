//! A share outlives the process that serves it: workers are killed, and the front end goes on.

mod lookups;
mod reconnect;
mod reopen;
mod restart;
mod state;
mod upgrade;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session};
use rustix::process::{Pid, Signal, kill_process};

use crate::common;

/// As many deaths as a test likes.
pub const IMMORTAL: &str = "--max-deaths=100000";
/// Each sandbox, with which the way to a second worker differs.
pub const SANDBOXES: [&str; 3] = ["--sandbox=none", "--sandbox=chroot", "--sandbox=namespace"];

/// The process that serves now; `None` while there is none.
pub fn worker(backend: &Backend) -> Option<u32> {
    backend.worker()
}

/// Waits for a process that serves.
pub fn next_worker(backend: &Backend) -> Pid {
    let mut found = None;
    common::wait_until(
        || {
            found = worker(backend);
            found.is_some()
        },
        "a worker",
    );
    pid(found.unwrap())
}

pub fn pid(process: u32) -> Pid {
    Pid::from_raw(process.cast_signed()).unwrap()
}

/// Kills the process that serves, and returns when another one is there.
pub fn kill_worker(backend: &Backend) {
    kill_worker_by(backend, Signal::KILL);
}

/// The same by another signal.
pub fn kill_worker_by(backend: &Backend, signal: Signal) {
    let old = next_worker(backend);
    // It may have ended by itself meanwhile.
    let _ = kill_process(old, signal);
    common::wait_until(|| worker(backend).is_some_and(|new| pid(new) != old), "another worker");
}

/// Whether requests are answered, in the session that the guest has begun.
pub fn serves(session: &Session) {
    session.client().getattr(ROOT).unwrap();
    common::every_queue_answers(session);
}
