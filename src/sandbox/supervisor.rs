//! The confinement of a supervisor: fewer capabilities, and a seccomp filter that forbids classes of system calls.
//!
//! Whatever confines the supervisor confines its workers while they get ready, and each program that it is upgraded to. A
//! worker needs mount(2), setns(2) and capabilities until it is in its sandbox, and a program to come may need a system
//! call that this one does not. So this is a list of what no such program should ever do, and not of what this one
//! does: with that, no later version could make another call, however the daemon was started years before.
//!
//! Two others were rejected. A process that starts workers and is not confined, beside a supervisor that is: the shared
//! table would have three owners, the descriptors of a worker come by way of a third process, and that one would be as
//! powerful as the supervisor is now. And to confine the supervisor by an allow list until an upgrade: a filter is never
//! taken off.

use std::collections::BTreeMap;

use libc::c_long;
use rustix::thread::{CapabilitySet, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use super::SandboxError;
use super::capabilities::{self, CapabilityError};
use super::config::{CapabilityChanges, Sandbox, Seccomp};
use super::optional_calls::without_other_abi;
use super::seccomp::{SeccompError, architecture};
use super::step;

/// Why a supervisor cannot be confined.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each is the error of the step that it is named after")]
pub enum ConfineError {
    #[error(transparent)]
    Step(#[from] SandboxError),
    #[error(transparent)]
    Capabilities(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// What every supervisor keeps, besides what its workers serve with: to end a worker, and to let workers drop the rest.
const ALWAYS: CapabilitySet = CapabilitySet::KILL.union(CapabilitySet::SETPCAP);
/// To enter the sandbox.
const TO_MOUNT: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_CHROOT);

/// Calls that are forbidden whatever their arguments are.
const FORBIDDEN: &[c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    // The kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_syslog,
    // The machine.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_acct,
    libc::SYS_vhangup,
    // Keys of the user.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Other rules for memory.
    libc::SYS_personality,
];

/// Those that only x86-64 has.
#[cfg(target_arch = "x86_64")]
const FORBIDDEN_HERE: &[c_long] =
    &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_uselib, libc::SYS__sysctl];
#[cfg(not(target_arch = "x86_64"))]
const FORBIDDEN_HERE: &[c_long] = &[];

/// Confines the calling process, which is a supervisor that has prepared a sandbox of this kind, for good.
///
/// Must be called while the process has one thread.
pub fn confine(kind: Sandbox, seccomp: Seccomp, changes: CapabilityChanges) -> Result<(), ConfineError> {
    let for_sandbox = match kind {
        Sandbox::None => CapabilitySet::empty(),
        Sandbox::Chroot | Sandbox::Namespace => TO_MOUNT,
    };
    set_no_new_privs(true).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    capabilities::keep_for_workers(ALWAYS | for_sandbox | changes.add)?;
    let action = match seccomp {
        Seccomp::None => return Ok(()),
        // Not the end: a program to come that tries one of them is not at fault.
        Seccomp::Kill => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
    };
    let program = deny_list(action).map_err(SeccompError::Build)?;
    apply_filter(&program).map_err(SeccompError::Install)?;
    Ok(())
}

fn deny_list(action: SeccompAction) -> Result<BpfProgram, BackendError> {
    let new_users = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    let mut rules = BTreeMap::from([
        // Connections with other machines, and with the kernel.
        (libc::SYS_socket, vec![when(0, SeccompCmpOp::Ne, u64::from(libc::AF_UNIX.unsigned_abs()))?]),
        // There is a user namespace by now, or none is wanted.
        (libc::SYS_unshare, vec![when(0, SeccompCmpOp::MaskedEq(new_users), new_users)?]),
        (libc::SYS_clone, vec![when(0, SeccompCmpOp::MaskedEq(new_users), new_users)?]),
        // Input for the shell that the daemon was started from.
        (libc::SYS_ioctl, vec![when(1, SeccompCmpOp::Eq, libc::TIOCSTI)?]),
    ]);
    rules.extend(FORBIDDEN.iter().chain(FORBIDDEN_HERE).map(|call| (*call, Vec::new())));
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, architecture()?)?;
    Ok(without_other_abi(filter.try_into()?))
}

fn when(number: u8, comparison: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(number, SeccompCmpArgLen::Dword, comparison, value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The errno of a call under the filter in a process of its own; 0 if it succeeds, and `None` if it kills.
    fn attempt(call: c_long, arguments: [c_long; 3]) -> Option<i32> {
        let program = deny_list(SeccompAction::Errno(libc::EPERM.unsigned_abs())).unwrap();
        let [a, b, c] = arguments;
        // SAFETY: the child does nothing but system calls.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                if seccompiler::apply_filter(&program).is_err() {
                    libc::_exit(255);
                }
                let answer = libc::syscall(call, a, b, c);
                libc::_exit(if answer == -1 { *libc::__errno_location() } else { 0 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            status
        };
        libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
    }

    #[test]
    fn forbidden_calls_are_refused() {
        for call in FORBIDDEN.iter().chain(FORBIDDEN_HERE) {
            // No argument of them is valid, so none does anything without the filter either.
            assert_eq!(attempt(*call, [-1; 3]), Some(libc::EPERM), "call {call}");
        }
        let users = libc::CLONE_NEWUSER.into();
        for (call, arguments) in [
            (libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]),
            (libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]),
            (libc::SYS_unshare, [users, 0, 0]),
            (libc::SYS_clone, [users, 0, 0]),
            (libc::SYS_ioctl, [0, c_long::try_from(libc::TIOCSTI).unwrap(), 0]),
        ] {
            assert_eq!(attempt(call, arguments), Some(libc::EPERM), "call {call} {arguments:?}");
        }
        #[cfg(target_arch = "x86_64")]
        assert_eq!(attempt(0x4000_0000 | 521, [-1; 3]), Some(libc::ENOSYS), "ptrace of x32");
    }

    #[test]
    fn what_workers_and_upgrades_need_is_allowed() {
        for (call, arguments, errno) in [
            (libc::SYS_getpid, [0; 3], 0),
            (libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0], 0),
            (libc::SYS_unshare, [libc::CLONE_FS.into(), 0, 0], 0),
            (libc::SYS_execve, [0; 3], libc::EFAULT),
            (libc::SYS_setns, [-1, 0, 0], libc::EBADF),
            (libc::SYS_ioctl, [-1, 0, 0], libc::EBADF),
        ] {
            assert_eq!(attempt(call, arguments), Some(errno), "call {call}");
        }
    }
}
