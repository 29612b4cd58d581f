//! The check of a program before an upgrade: whether it is lanefsd, takes the same arguments, and can read the state.
//!
//! It runs in a child while the share is served, with the state file as its only descriptor.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;

use rustix::io::Errno;

use crate::daemon::report::Reports;
use crate::sandbox::{Worker, WorkerEnd, run_in_child};
use crate::state_file::StateFile;
use crate::sys::exec::{Program, isolate};

/// Seconds that the program has for its answer: nothing waits for it, and an overloaded host takes its time to load it.
const PATIENCE: u32 = 15;
/// Bytes that it may write.
const MAX_OUTPUT: u64 = 64 << 10;
/// What the answer of a program that can go on begins and ends with; its version stands between them.
const ANSWER: (&str, &str) = ("lanefsd ", " reads this state");

/// The answer of this program, if it can go on with a state.
pub(super) fn answer() -> String {
    format!("{}{}{}", ANSWER.0, super::VERSION, ANSWER.1)
}

/// A program that is being checked.
#[derive(Debug)]
pub(super) struct Candidate(Worker);

impl Candidate {
    /// Starts the check of the program at `path`.
    pub(super) fn start(
        path: &Path,
        arguments: &[OsString],
        state: &StateFile,
        reports: &Reports,
    ) -> Result<Candidate, Errno> {
        reports.prepare_output()?;
        let (state, output) = (state.file().as_fd().as_raw_fd(), reports.descriptor());
        run_in_child(|| run(path, arguments, state, output)).map(Candidate)
    }

    /// Its version, if it can go on; otherwise why not. Blocks until it has ended.
    pub(super) fn outcome(&self, reports: &Reports) -> Result<String, String> {
        let end = self.0.reap().map_err(|errno| errno.to_string())?;
        let output = reports.output();
        let version = output.strip_prefix(ANSWER.0).and_then(|rest| rest.strip_suffix(ANSWER.1));
        match (end, version) {
            (WorkerEnd::Exited(0), Some(version)) => Ok(version.to_owned()),
            (WorkerEnd::Exited(0), None) => Err("it is not lanefsd, or an older version".into()),
            (WorkerEnd::Exited(_), _) if !output.is_empty() => Err(output),
            (WorkerEnd::Exited(status), _) => Err(format!("it ended with exit status {status}")),
            (WorkerEnd::Killed(libc::SIGALRM), _) => {
                Err(format!("it gave no answer within {PATIENCE} seconds"))
            }
            (WorkerEnd::Killed(signal), _) => Err(format!("it was ended by signal {signal}")),
        }
    }
}

/// Readable when the check is over.
impl AsFd for Candidate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Becomes the program. Returns an exit status if that fails.
fn run(path: &Path, arguments: &[OsString], state: i32, output: i32) -> i32 {
    let mut arguments = arguments.iter().cloned();
    let name = arguments.next();
    let check = Some(format!("--check-state={state}").into());
    let arguments = name.into_iter().chain(check).chain(arguments);
    let failed: std::io::Error = match isolate(state, output, PATIENCE, MAX_OUTPUT) {
        Ok(()) => Program::new(arguments, std::env::vars_os()).execute(path).into(),
        Err(error) => error,
    };
    let _ = writeln!(std::io::stderr(), "{} cannot be executed: {failed}", path.display());
    1
}
