//! The seccomp filter: an allow list of system calls.
//!
//! A call outside the list kills the daemon (`--seccomp=kill`): the daemon's code makes none, so other code must be
//! running in it. Libraries may try calls that they can do without; these get ENOSYS (`optional_calls.rs`).

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, BpfProgramRef, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use thiserror::Error;

use super::config::Seccomp;
use super::optional_calls::{INFORMATION, answer_unknown, optional_besides};
use crate::sys::{file_flags, userfault};

/// Why the filter cannot be installed.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// There is no list for this architecture, or it is wrong.
    #[error("cannot build the seccomp filter; start the daemon with --seccomp=none")]
    Build(#[from] BackendError),
    /// The kernel refuses the filter.
    #[error("the kernel refuses the seccomp filter; start the daemon with --seccomp=none")]
    Install(#[source] seccompiler::Error),
}

/// Calls that are allowed whatever their arguments are.
const ALLOWED: &[c_long] = &[
    // Files and directories.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_statx,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_fstatfs,
    // Tells apart inodes of FUSE, whatever they are held by.
    libc::SYS_name_to_handle_at,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    RENAMEAT,
    libc::SYS_renameat2,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_copy_file_range,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_flock,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    // The caller's identity.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_umask,
    libc::SYS_capget,
    libc::SYS_capset,
    // Queues, and the connection with the front end.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // The vhost crate looks at a socket that a front end sends, before we refuse it.
    libc::SYS_getsockopt,
    // Signals and messages for the system log, on sockets that are there already.
    libc::SYS_sendto,
    libc::SYS_shutdown,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads, time and signals.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    // What a stopped process goes on with.
    libc::SYS_restart_syscall,
    libc::SYS_clock_nanosleep,
    // In user space on most machines, but not on all.
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    // For the backtrace of a panic.
    libc::SYS_getcwd,
];

/// Older forms of calls, which only x86-64 has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[c_long] = &[libc::SYS_poll, libc::SYS_unlink, libc::SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

#[cfg(target_arch = "x86_64")]
const RENAMEAT: c_long = libc::SYS_renameat;
/// The libc crate has no name for it; `__NR_renameat` of asm-generic/unistd.h.
#[cfg(not(target_arch = "x86_64"))]
const RENAMEAT: c_long = 38;

/// Allowed commands of fcntl(2). Those that set the owner of a descriptor, who gets signals, are not among them.
const FCNTL: &[i32] = &[
    libc::F_GETFD,
    libc::F_GETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];

/// `PR_SET_VMA` of linux/prctl.h, which can do nothing but name memory.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// `OPEN_TREE_CLONE` of linux/mount.h.
const OPEN_TREE_CLONE: u64 = 1;

/// Calls by which inodes are opened by file handles.
const FILE_HANDLES: &[c_long] = &[libc::SYS_open_by_handle_at];

/// The call by which rings of io_uring are used. What may be done with them was decided before, and no others can be made.
const RINGS: &[c_long] = &[libc::SYS_io_uring_enter];

/// What is used that takes further calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Inodes are opened by file handles.
    pub file_handles: bool,
    /// Data is read and written by io_uring.
    pub rings: bool,
}

impl Uses {
    fn calls(self) -> impl Iterator<Item = c_long> {
        let of = |used, calls: &'static [c_long]| if used { calls } else { &[] };
        of(self.file_handles, FILE_HANDLES).iter().chain(of(self.rings, RINGS)).copied()
    }
}

/// Installs the filter for all threads of the process, present and future. `mode` is the action on calls that it does not
/// allow.
pub fn install(mode: Seccomp, uses: Uses) -> Result<(), SeccompError> {
    install_by(apply_filter_all_threads, mode, uses)
}

/// The same for the calling thread and those that it starts later: other threads of a test are not affected.
pub fn install_on_thread(mode: Seccomp, uses: Uses) -> Result<(), SeccompError> {
    install_by(apply_filter, mode, uses)
}

fn install_by(
    apply: fn(BpfProgramRef<'_>) -> Result<(), seccompiler::Error>,
    mode: Seccomp,
    uses: Uses,
) -> Result<(), SeccompError> {
    let action = match mode {
        Seccomp::None => return Ok(()),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
    };
    for program in [without_optional()?, allow_list(action, uses)?] {
        apply(&program).map_err(SeccompError::Install)?;
    }
    Ok(())
}

/// Answers ENOSYS to calls that are optional.
///
/// Among them clone3(2), whose flags a filter cannot see, as it can those of clone(2): the C library
/// then makes threads by that one.
fn without_optional() -> Result<BpfProgram, BackendError> {
    let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = optional_besides(ALLOWED).map(|call| (call, Vec::new())).collect();
    SeccompFilter::new(rules, SeccompAction::Allow, enosys, architecture()?)?.try_into()
}

/// Takes `action` on every call outside the lists.
fn allow_list(action: SeccompAction, uses: Uses) -> Result<BpfProgram, BackendError> {
    let mut rules = restricted()?;
    let allowed = ALLOWED.iter().chain(ALLOWED_HERE).chain(INFORMATION).copied();
    // The other filter, which is stricter, answers the optional ones.
    rules.extend(allowed.chain(optional_besides(ALLOWED)).map(|call| (call, Vec::new())));
    rules.extend(uses.calls().map(|call| (call, Vec::new())));
    let filter = SeccompFilter::new(rules, action, SeccompAction::Allow, architecture()?)?;
    Ok(answer_unknown(filter.try_into()?))
}

/// Calls that are allowed with some arguments only.
fn restricted() -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let commands = FCNTL.iter().map(|command| argument(1, SeccompCmpOp::Eq, command.unsigned_abs()));
    let mut commands = commands.collect::<Result<Vec<_>, _>>()?;
    commands.push(never_wait()?);
    // No code is ever made.
    let no_code = || argument(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC.unsigned_abs().into()), 0);
    // A thread of this process, in the namespaces that it has.
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM).cast_unsigned();
    let thread = argument(0, SeccompCmpOp::MaskedEq(u64::from(namespaces.cast_unsigned() | thread)), thread)?;
    let controls = file_flags::COMMANDS.iter().chain(&userfault::COMMANDS);
    let controls = controls.map(|command| argument(1, SeccompCmpOp::Eq, *command));
    let own_threads = argument(0, SeccompCmpOp::Eq, std::process::id())?;
    let none = |number, width| SeccompCondition::new(number, width, SeccompCmpOp::Eq, 0);
    let own_limits =
        SeccompRule::new(vec![none(0, SeccompCmpArgLen::Dword)?, none(2, SeccompCmpArgLen::Qword)?])?;
    Ok(BTreeMap::from([
        (libc::SYS_fcntl, commands),
        // Flags of files and, with a descriptor that is there already, post-copy; whatever else ioctl(2) does with
        // terminals, devices and file systems.
        (libc::SYS_ioctl, controls.collect::<Result<_, _>>()?),
        // No mount is copied.
        (libc::SYS_open_tree, vec![argument(2, SeccompCmpOp::MaskedEq(OPEN_TREE_CLONE), 0)?]),
        (libc::SYS_mmap, vec![no_code()?]),
        (libc::SYS_mprotect, vec![no_code()?]),
        (libc::SYS_clone, vec![thread]),
        // A umask of a thread's own; namespaces are other flags.
        (libc::SYS_unshare, vec![argument(0, SeccompCmpOp::Eq, libc::CLONE_FS.unsigned_abs())?]),
        (libc::SYS_tgkill, vec![own_threads]),
        // Limits of this process are read, and none is changed.
        (libc::SYS_prlimit64, vec![own_limits]),
        (
            libc::SYS_prctl,
            vec![
                argument(0, SeccompCmpOp::Eq, libc::PR_SET_NAME.unsigned_abs())?,
                // Allocators give their memory a name.
                argument(0, SeccompCmpOp::Eq, PR_SET_VMA)?,
            ],
        ),
        (libc::SYS_socketpair, vec![argument(0, SeccompCmpOp::Eq, libc::AF_UNIX.unsigned_abs())?]),
    ]))
}

/// The rule for fcntl(2) with F_SETFL: the descriptors by which front ends are notified never make
/// a worker wait. Of all flags that it can change, only O_NONBLOCK may be set.
fn never_wait() -> Result<SeccompRule, BackendError> {
    let flags = libc::O_NONBLOCK | libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;
    let flags = SeccompCmpOp::MaskedEq(flags.unsigned_abs().into());
    let condition = |number, comparison, value: i32| {
        let value = value.unsigned_abs().into();
        SeccompCondition::new(number, SeccompCmpArgLen::Dword, comparison, value)
    };
    SeccompRule::new(vec![
        condition(1, SeccompCmpOp::Eq, libc::F_SETFL)?,
        condition(2, flags, libc::O_NONBLOCK)?,
    ])
}

/// The rule that the lower half of an argument compares so; these arguments are no longer.
fn argument(number: u8, comparison: SeccompCmpOp, value: u32) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, comparison, value.into())?;
    SeccompRule::new(vec![condition])
}

pub(super) fn architecture() -> Result<TargetArch, BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}

#[cfg(test)]
pub(super) mod tests;
