//! What libraries look up about the machine by absolute paths when they need it first. It is found out
//! at the start instead: afterwards the root directory is empty, and before that it was the share.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::thread;

use rustix::fs::Mode;
use rustix::io::Result;

static CPUS: OnceLock<usize> = OnceLock::new();

/// Counts the CPUs that the process may use, and tells the memory allocator. Must be called before the
/// sandbox is entered and before the first thread is started.
pub fn prepare() {
    // A quota of the control group counts as well, which takes a look into /proc and /sys.
    CPUS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
    limit_arenas();
}

/// Makes the umask 0, since guests apply their callers', and `proc_self_fd` the working directory: system calls
/// that take a path and no descriptor reach an inode by the number of its descriptor there.
///
/// Every file system that passes requests on to the host needs it, and it serves all of them.
pub fn prepare_for_requests(proc_self_fd: &OwnedFd) -> Result<()> {
    rustix::process::umask(Mode::empty());
    rustix::process::fchdir(proc_self_fd)
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

/// glibc's malloc(3) opens `/sys/devices/system/cpu/online` when threads want a ninth arena: it allows
/// eight for each CPU. The same number is set here, unless the user has set one.
#[cfg(target_env = "gnu")]
fn limit_arenas() {
    let set = |name: &str, part: &str| {
        std::env::var_os(name).is_some_and(|value| value.to_string_lossy().contains(part))
    };
    if set("MALLOC_ARENA_MAX", "") || set("GLIBC_TUNABLES", "arena_max") {
        return;
    }
    let arenas = cpus().saturating_mul(8).try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: it takes two numbers, and no other thread allocates meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
}

/// Other C libraries have no arenas.
#[cfg(not(target_env = "gnu"))]
fn limit_arenas() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_at_least_one_cpu() {
        assert!(affine_cpus() >= 1 && cpus() >= 1);
    }
}
