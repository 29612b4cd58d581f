//! Descriptors and CPUs.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use thiserror::Error;

/// Descriptors that are asked for when nothing else was said: a million inodes.
const WANTED: u64 = 1_000_000;

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
    /// sched_setaffinity(2) failed.
    #[error("--cpus names no CPU that the host has")]
    Cpus(#[source] Errno),
}

/// Sets RLIMIT_NOFILE to `wanted`, or as high as the host allows.
pub fn raise_descriptor_limit(wanted: Option<u64>) -> Result<(), LimitError> {
    let hard = getrlimit(Resource::Nofile).maximum;
    let allowed = hard.unwrap_or(u64::MAX);
    let limit = wanted.unwrap_or(WANTED.max(allowed.min(WANTED)));
    let maximum = if limit > allowed { Some(limit) } else { hard };
    match (setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum }), wanted) {
        (Ok(()), _) => Ok(()),
        (Err(source), Some(wanted)) => Err(LimitError::Descriptors { wanted, allowed, source }),
        // Without the privilege to pass the hard limit, that is the best.
        (Err(_), None) => setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })
            .map_err(|source| LimitError::Descriptors { wanted: allowed, allowed, source }),
    }
}

/// Lets the process, and all threads that it starts later, run on `cpus` alone.
pub fn bind_to_cpus(cpus: &[usize]) -> Result<(), LimitError> {
    let mut set = CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).map_err(LimitError::Cpus)
}
