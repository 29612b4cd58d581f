//! What belongs to the whole process: signals, inherited descriptors, limits, CPUs, umask, working directory.
//!
//! All of it is done here, once: [`reset`] when nothing is open yet, [`prepare`] before the sandbox and the first
//! thread, [`prepare_for_requests`] in the sandbox. Nothing else changes the process but the sandbox itself, which
//! moves it to other namespaces, and a file system never does: so a process can serve several.
//!
//! Libraries look up some facts about the machine by absolute paths, when they need them first. [`prepare`] looks them
//! up for them: later the root directory is empty, and before that it was the share.

mod limits;

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use signal_hook::low_level::pipe;
use thiserror::Error;

pub use self::limits::{LEAST_DESCRIPTORS, LimitError};
use crate::logging::Remark;
use crate::sys::{allocator, inherited, signals};

/// CPUs that the process may use.
static CPUS: OnceLock<usize> = OnceLock::new();

/// Options of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessConfig {
    /// RLIMIT_NOFILE; `None` for what the host allows, up to a million, and 0 for the inherited limit.
    pub rlimit_nofile: Option<u64>,
    /// CPUs to run on; `None` for all.
    pub cpus: Option<Vec<usize>>,
}

/// Why the process cannot be prepared.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// Signals cannot be reset or handled.
    #[error("signals cannot be set up")]
    Signals(#[source] io::Error),
    /// The list of descriptors cannot be had, or standard input not be replaced.
    #[error("descriptors that the daemon was started with cannot be closed")]
    Inherited(#[source] io::Error),
    /// A limit cannot be set.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The directory of descriptors cannot be entered.
    #[error("the working directory cannot be changed")]
    Directory(#[source] Errno),
}

/// Undoes what the launcher may have left: blocked and ignored signals, and descriptors other than the standard ones
/// and `kept`.
///
/// Must be called before anything is opened or started.
pub fn reset(kept: Option<RawFd>) -> Result<(), ProcessError> {
    signals::reset().map_err(|errno| ProcessError::Signals(errno.into()))?;
    inherited::close_all(kept).map_err(ProcessError::Inherited)
}

/// Sets the limit of descriptors and the CPUs, counts these, and holds back the signals that end the daemon until
/// [`Signals::catch`]: one that comes during the start is not lost, and leaves nothing behind.
///
/// Returns warnings about the limit. Must be called before the sandbox is entered and the first thread is started.
pub fn prepare(config: &ProcessConfig) -> Result<Option<Remark>, ProcessError> {
    let remark = limits::raise_descriptor_limit(config.rlimit_nofile)?;
    if let Some(cpus) = &config.cpus {
        limits::bind_to_cpus(cpus)?;
    }
    prepare_libraries();
    signals::hold();
    Ok(remark)
}

/// Counts the CPUs, and gives the memory allocator their number. [`prepare`] does this, too; a process that is
/// no daemon may do it alone.
pub fn prepare_libraries() {
    // A quota of the control group counts as well, which takes files in /proc and /sys.
    CPUS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
    allocator::limit_arenas(cpus());
    // rustix looks for the vDSO when it is first asked for the time, by a system call that requests may not make.
    let _ = clock_gettime(ClockId::RealtimeCoarse);
}

/// Makes the umask 0, since guests apply their callers', and `proc_self_fd` the working directory: system calls
/// that take a path and no descriptor reach an inode by the number of its descriptor there.
///
/// Every file system that passes requests on to the host needs it, and it serves all of them.
pub fn prepare_for_requests(proc_self_fd: &OwnedFd) -> Result<(), ProcessError> {
    rustix::process::umask(Mode::empty());
    rustix::process::fchdir(proc_self_fd).map_err(ProcessError::Directory)
}

/// Lets go of the working directory, so that its file system may be unmounted. For a process that needs no path.
pub fn leave_directory() {
    // It is a courtesy: a process that stays where it is does no harm.
    let _ = rustix::process::chdir("/");
}

/// Holds back the signals that end the daemon, while a process is made that must not get them before it can handle them.
pub fn hold_signals() {
    signals::hold();
}

/// Lets them through again.
pub fn release_signals() {
    signals::release();
}

/// CPUs that the process may use, as [`prepare`] has counted them.
pub fn cpus() -> usize {
    // Without it, by a system call alone.
    CPUS.get().copied().unwrap_or_else(affine_cpus)
}

fn affine_cpus() -> usize {
    let set = rustix::thread::sched_getaffinity(None);
    set.map_or(1, |set| usize::try_from(set.count()).unwrap_or(1)).max(1)
}

/// Signals that were caught, as a descriptor to wait for.
#[derive(Debug)]
pub struct Signals {
    ours: UnixStream,
    /// The ends that belong to the handlers.
    theirs: Vec<RawFd>,
}

impl Signals {
    /// Catches the signals of [`signals::endings`] from now on, and those that [`prepare`] has held back.
    pub fn catch() -> Result<Signals, ProcessError> {
        let signals = Signals::of(signals::endings())?;
        signals::release();
        Ok(signals)
    }

    /// The same without SIGHUP, which has another meaning.
    pub fn catch_endings() -> Result<Signals, ProcessError> {
        let signals = Signals::of(signals::ENDINGS)?;
        signals::release();
        Ok(signals)
    }

    /// Catches the signal by which a process that serves is told to drain.
    pub fn catch_drain() -> Result<Signals, ProcessError> {
        Signals::of([signals::DRAIN])
    }

    fn of(signals: impl IntoIterator<Item = i32>) -> Result<Signals, ProcessError> {
        let (ours, end) = UnixStream::pair().map_err(ProcessError::Signals)?;
        let mut theirs = Vec::new();
        for signal in signals {
            let end = end.try_clone().map_err(ProcessError::Signals)?;
            theirs.push(end.as_raw_fd());
            pipe::register(signal, end).map_err(ProcessError::Signals)?;
        }
        Ok(Signals { ours, theirs })
    }

    /// All descriptors that belong to it.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.theirs.iter().copied().chain([self.ours.as_raw_fd()])
    }
}

/// Readable when a signal has come.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_at_least_one_cpu() {
        assert!(affine_cpus() >= 1 && cpus() >= 1);
    }
}
