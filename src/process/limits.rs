//! The limit of open files, and the CPUs.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use thiserror::Error;

use crate::logging::Remark;

/// With fewer descriptors there is no point in serving.
pub const LEAST_DESCRIPTORS: u64 = 64;

/// The default: descriptors for a million inodes.
const WANTED: u64 = 1_000_000;
/// A guest reaches a lower limit in ordinary use, such as a search through a source tree.
const FEW: u64 = 100_000;

/// Why a limit cannot be set.
#[derive(Debug, Error)]
pub enum LimitError {
    /// setrlimit(2) failed.
    #[error("--rlimit-nofile {wanted} cannot be set; the host allows {allowed}")]
    Descriptors {
        /// What was asked for.
        wanted: u64,
        /// The hard limit.
        allowed: u64,
        /// What the system call said.
        source: Errno,
    },
    /// The inherited limit is too low.
    #[error(
        "the daemon may open {0} files at once, which is too few; give --rlimit-nofile, or raise the limit of the launcher (LimitNOFILE= of systemd, ulimit -n)"
    )]
    TooFew(u64),
    /// sched_setaffinity(2) failed.
    #[error("--cpus names no CPU of the host")]
    Cpus(#[source] Errno),
}

/// Sets RLIMIT_NOFILE to `wanted`, or as high as the host allows. 0 keeps the inherited limit. Returns a remark if the
/// host allows less than a million.
pub(super) fn raise_descriptor_limit(wanted: Option<u64>) -> Result<Option<Remark>, LimitError> {
    let remark = match wanted {
        Some(0) => None,
        Some(wanted) => {
            let refused = |source| LimitError::Descriptors { wanted, allowed: hard_limit(), source };
            set(wanted).map_err(refused)?;
            None
        }
        None => raise(host_maximum().min(WANTED)),
    };
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < LEAST_DESCRIPTORS => Err(LimitError::TooFew(limit)),
        _ => Ok(remark),
    }
}

/// Raises the limit to `wanted`, or as far as possible.
fn raise(wanted: u64) -> Option<Remark> {
    // Raising the hard limit takes a privilege.
    if set(wanted).is_ok() || (set(hard_limit().min(wanted)).is_ok() && hard_limit() >= wanted) {
        return None;
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let text = format!(
        "the daemon may open {limit} files at once and not {wanted}, since the hard limit of descriptors is lower; raise that limit in the launcher (LimitNOFILE= of systemd, ulimit -Hn) if the guest uses many files"
    );
    Some(if limit < FEW { Remark::warning(text) } else { Remark::information(text) })
}

fn set(limit: u64) -> Result<(), Errno> {
    let hard = getrlimit(Resource::Nofile).maximum;
    let maximum = hard.map(|hard| hard.max(limit));
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum })
}

fn hard_limit() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// The limit of the kernel (fs.nr_open), which no process can exceed.
fn host_maximum() -> u64 {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
    most.and_then(|most| most.trim().parse().ok()).unwrap_or(WANTED)
}

/// Lets the process, and all threads that it starts later, run on `cpus` alone.
pub(super) fn bind_to_cpus(cpus: &[usize]) -> Result<(), LimitError> {
    let mut set = CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).map_err(LimitError::Cpus)
}
