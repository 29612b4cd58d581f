//! The confinement of the monitor: no capabilities, and few system calls.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::thread::set_no_new_privs;
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

use super::capabilities;
use super::config::Seccomp;
use super::optional_calls::{INFORMATION, without_other_abi};
use super::seccomp::{SeccompError, architecture};
use super::step;
use super::supervisor::ConfineError;

/// What it does: answer connections that it accepts, write a file, wait.
const ALLOWED: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_openat,
    libc::SYS_unlinkat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_geteuid,
    libc::SYS_sched_getaffinity,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_getcwd,
];

/// Older forms of calls, which only x86-64 has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[c_long] = &[libc::SYS_poll, libc::SYS_renameat, libc::SYS_readlink];
/// `__NR_renameat` of asm-generic/unistd.h, for which the libc crate has no name.
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[38];

/// Confines the calling process, which is a monitor, for good.
///
/// Must be called while the process has one thread.
pub fn confine(seccomp: Seccomp) -> Result<(), ConfineError> {
    set_no_new_privs(true).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    capabilities::give_up_all()?;
    let action = match seccomp {
        Seccomp::None => return Ok(()),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
    };
    let program = filter(action).map_err(SeccompError::Build)?;
    apply_filter(&program).map_err(SeccompError::Install)?;
    Ok(())
}

fn filter(action: SeccompAction) -> Result<seccompiler::BpfProgram, seccompiler::BackendError> {
    let no_code = || {
        let condition = SeccompCondition::new(
            2,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(libc::PROT_EXEC.unsigned_abs().into()),
            0,
        )?;
        SeccompRule::new(vec![condition])
    };
    // To wake its supervisor, and nobody by a signal that would end him.
    let wakes = SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::SIGCHLD.unsigned_abs().into(),
    )?;
    let mut rules = BTreeMap::from([
        (libc::SYS_mmap, vec![no_code()?]),
        (libc::SYS_mprotect, vec![no_code()?]),
        (libc::SYS_kill, vec![SeccompRule::new(vec![wakes])?]),
    ]);
    let allowed = ALLOWED.iter().chain(ALLOWED_HERE).chain(INFORMATION);
    rules.extend(allowed.map(|call| (*call, Vec::new())));
    let filter = SeccompFilter::new(rules, action, SeccompAction::Allow, architecture()?)?;
    Ok(without_other_abi(filter.try_into()?))
}
