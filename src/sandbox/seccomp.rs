//! System calls: those that serving takes stay, all others are gone for good.
//!
//! A call that is not on the list ends the daemon (`--seccomp=kill`): its own code makes none, so
//! somebody else's must be running. Libraries may try calls that they can do without; these are answered
//! ENOSYS (`optional_calls.rs`).

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, BpfProgramRef, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use thiserror::Error;

use super::optional_calls::{INFORMATION, answer_unknown, optional_besides};
use crate::config::Seccomp;
use crate::sys::file_flags;

/// Why there is no filter.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// There is no list for this machine, or it makes no sense.
    #[error("the list of system calls cannot be translated; start the daemon with --seccomp=none")]
    Build(#[from] BackendError),
    /// The kernel refuses it.
    #[error("the kernel takes no filter of system calls; --seccomp=none starts the daemon without one")]
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

/// What fcntl(2) may be asked for. Owners of descriptors, who get signals, are not among it.
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

/// Forbids all calls but those that serving takes, for all threads that are there or will be;
/// those for file handles as well, unless they are used.
///
/// What happens at a forbidden one is for `mode` to say.
pub fn install(mode: Seccomp, file_handles: bool) -> Result<(), SeccompError> {
    install_by(apply_filter_all_threads, mode, file_handles)
}

/// The same for the calling thread and those that it will start: the other threads of a test stay free.
pub fn install_on_thread(mode: Seccomp, file_handles: bool) -> Result<(), SeccompError> {
    install_by(apply_filter, mode, file_handles)
}

fn install_by(
    apply: fn(BpfProgramRef<'_>) -> Result<(), seccompiler::Error>,
    mode: Seccomp,
    file_handles: bool,
) -> Result<(), SeccompError> {
    let action = match mode {
        Seccomp::None => return Ok(()),
        Seccomp::Kill => SeccompAction::KillProcess,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
    };
    for program in [without_optional()?, allow_list(action, file_handles)?] {
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

/// Everything that is not on the lists meets `action`.
fn allow_list(action: SeccompAction, file_handles: bool) -> Result<BpfProgram, BackendError> {
    let mut rules = restricted()?;
    let allowed = ALLOWED.iter().chain(ALLOWED_HERE).chain(INFORMATION).copied();
    // The other filter, which is stricter, answers the optional ones.
    rules.extend(allowed.chain(optional_besides(ALLOWED)).map(|call| (call, Vec::new())));
    if file_handles {
        rules.extend(FILE_HANDLES.iter().map(|call| (*call, Vec::new())));
    }
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
    let file_flags = file_flags::COMMANDS.iter().map(|command| argument(1, SeccompCmpOp::Eq, *command));
    let own_threads = argument(0, SeccompCmpOp::Eq, std::process::id())?;
    Ok(BTreeMap::from([
        (libc::SYS_fcntl, commands),
        // Flags of files; whatever else ioctl(2) does with terminals, devices and file systems.
        (libc::SYS_ioctl, file_flags.collect::<Result<_, _>>()?),
        // No mount is copied.
        (libc::SYS_open_tree, vec![argument(2, SeccompCmpOp::MaskedEq(OPEN_TREE_CLONE), 0)?]),
        (libc::SYS_mmap, vec![no_code()?]),
        (libc::SYS_mprotect, vec![no_code()?]),
        (libc::SYS_clone, vec![thread]),
        // A umask of a thread's own; namespaces are other flags.
        (libc::SYS_unshare, vec![argument(0, SeccompCmpOp::Eq, libc::CLONE_FS.unsigned_abs())?]),
        (libc::SYS_tgkill, vec![own_threads]),
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

fn architecture() -> Result<TargetArch, BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::backtrace::Backtrace;
    use std::os::unix::process::ExitStatusExt;
    use std::panic::catch_unwind;
    use std::process::ExitStatus;

    /// Makes one system call under the filter, in a process of its own, and says how that ended:
    /// 0 if it came back, whatever the answer, and 1 if the answer was ENOSYS.
    pub(in crate::sandbox) fn attempt(
        mode: SeccompAction,
        call: c_long,
        arguments: [c_long; 4],
    ) -> ExitStatus {
        // The filter of the child has its own id in it.
        let programs = |action| [without_optional().unwrap(), allow_list(action, false).unwrap()];
        let [a, b, c, d] = arguments;
        // SAFETY: the child does nothing but system calls, and memory that the C library's fork
        // has put in order.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                for program in programs(mode) {
                    if seccompiler::apply_filter(&program).is_err() {
                        libc::_exit(2);
                    }
                }
                let answer = libc::syscall(call, a, b, c, d);
                libc::_exit(i32::from(answer == -1 && *libc::__errno_location() == libc::ENOSYS));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            ExitStatus::from_raw(status)
        }
    }

    fn killed(call: c_long, arguments: [c_long; 4]) -> bool {
        attempt(SeccompAction::KillProcess, call, arguments).signal() == Some(libc::SIGSYS)
    }

    fn long(number: i32) -> c_long {
        number.into()
    }

    #[test]
    fn what_serving_does_not_take_ends_the_process() {
        let at_cwd = long(libc::AT_FDCWD);
        for (name, call, arguments) in [
            ("execve", libc::SYS_execve, [0; 4]),
            ("execveat", libc::SYS_execveat, [at_cwd, 0, 0, 0]),
            ("ptrace", libc::SYS_ptrace, [0; 4]),
            ("mount", libc::SYS_mount, [0; 4]),
            ("umount", libc::SYS_umount2, [0; 4]),
            ("chroot", libc::SYS_chroot, [0; 4]),
            ("pivot_root", libc::SYS_pivot_root, [0; 4]),
            ("setns", libc::SYS_setns, [-1, 0, 0, 0]),
            ("unshare", libc::SYS_unshare, [long(libc::CLONE_NEWUSER), 0, 0, 0]),
            ("bpf", libc::SYS_bpf, [-1, 0, 0, 0]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [0; 4]),
            ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
            ("socket", libc::SYS_socket, [long(libc::AF_UNIX), long(libc::SOCK_STREAM), 0, 0]),
            ("connect", libc::SYS_connect, [-1, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [-1, 0, 0, 0]),
            ("kill", libc::SYS_kill, [0, 0, 0, 0]),
            ("memfd_create", libc::SYS_memfd_create, [0; 4]),
            ("process_vm_readv", libc::SYS_process_vm_readv, [0; 4]),
            ("init_module", libc::SYS_init_module, [0; 4]),
            ("seccomp", libc::SYS_seccomp, [-1, 0, 0, 0]),
            ("keyctl", libc::SYS_keyctl, [-1, 0, 0, 0]),
            ("a number that is no call", 100_000, [0; 4]),
        ] {
            assert!(killed(call, arguments), "{name}");
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn other_ways_into_the_kernel_are_shut() {
        const X32: c_long = 0x4000_0000;
        assert!(killed(X32 | libc::SYS_getpid, [0; 4]), "x32");
        assert!(killed(libc::SYS_fork, [0; 4]), "fork");
        assert!(killed(libc::SYS_vfork, [0; 4]), "vfork");
        assert!(killed(libc::SYS_open, [0; 4]), "open");
    }

    #[test]
    fn arguments_are_looked_at() {
        let anonymous = long(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let (read, exec) = (long(libc::PROT_READ), long(libc::PROT_READ | libc::PROT_EXEC));
        let thread = long(libc::CLONE_VM | libc::CLONE_THREAD);
        // Flags that the kernel refuses, so that no thread is made of those that the filter lets pass.
        let no_thread = thread & !long(libc::CLONE_SIGHAND);
        let me = |signal| [long(i32::try_from(std::process::id()).unwrap()), 1, signal, 0];
        for (name, call, bad, good) in [
            ("mmap", libc::SYS_mmap, [0, 4096, exec, anonymous], Some([0, 4096, read, anonymous])),
            ("mprotect", libc::SYS_mprotect, [0, 0, exec, 0], Some([0, 0, read, 0])),
            ("a process", libc::SYS_clone, [long(libc::SIGCHLD), 0, 0, 0], Some([no_thread, 0, 0, 0])),
            ("a user namespace", libc::SYS_clone, [thread | long(libc::CLONE_NEWUSER), 0, 0, 0], None),
            ("a mount namespace", libc::SYS_clone, [thread | long(libc::CLONE_NEWNS), 0, 0, 0], None),
            (
                "unshare",
                libc::SYS_unshare,
                [long(libc::CLONE_FS | libc::CLONE_NEWNS), 0, 0, 0],
                Some([long(libc::CLONE_FS), 0, 0, 0]),
            ),
            (
                "a copy of a mount",
                libc::SYS_open_tree,
                [-1, 0, long(libc::AT_EMPTY_PATH) | 1, 0],
                Some([-1, 0, long(libc::AT_EMPTY_PATH), 0]),
            ),
            ("tgkill of others", libc::SYS_tgkill, me(0), None),
            ("fcntl", libc::SYS_fcntl, [0, 8 /* F_SETOWN */, 0, 0], Some([0, long(libc::F_GETFD), 0, 0])),
            (
                "fcntl",
                libc::SYS_fcntl,
                [0, long(libc::F_SETFL), 0, 0],
                Some([-1, long(libc::F_OFD_SETLK), 0, 0]),
            ),
            (
                "fcntl",
                libc::SYS_fcntl,
                [0, long(libc::F_SETFL), long(libc::O_NONBLOCK | libc::O_ASYNC), 0],
                Some([-1, long(libc::F_SETFL), long(libc::O_NONBLOCK), 0]),
            ),
            ("ioctl", libc::SYS_ioctl, [-1, 0x5412 /* TIOCSTI */, 0, 0], Some([-1, 0x8008_6601, 0, 0])),
            ("ioctl", libc::SYS_ioctl, [-1, 0x5401 /* TCGETS */, 0, 0], Some([-1, 0x4008_6602, 0, 0])),
            ("ioctl", libc::SYS_ioctl, [-1, 0x4004_9409 /* FICLONE */, 0, 0], Some([-1, 0x801c_581f, 0, 0])),
            ("ioctl", libc::SYS_ioctl, [-1, 0xc018_5879 /* FITRIM */, 0, 0], Some([-1, 0x401c_5820, 0, 0])),
            ("prctl", libc::SYS_prctl, [long(libc::PR_SET_DUMPABLE), 1, 0, 0], None),
            ("prctl", libc::SYS_prctl, [long(libc::PR_CAPBSET_DROP), 0, 0, 0], None),
            ("socketpair", libc::SYS_socketpair, [long(libc::AF_INET), 1, 0, 0], Some([1, 1, 0, 0])),
        ] {
            assert!(killed(call, bad), "{name}: {bad:?}");
            if let Some(good) = good {
                let status = attempt(SeccompAction::KillProcess, call, good);
                assert_eq!(status.code(), Some(0), "{name}: {good:?} ends with {status}");
            }
        }
    }

    #[test]
    fn each_mode_does_what_it_says() {
        let forbidden = |mode| attempt(mode, libc::SYS_socket, [-1, 0, 0, 0]);
        assert_eq!(forbidden(SeccompAction::Log).code(), Some(0));
        assert_eq!(forbidden(SeccompAction::Trap).signal(), Some(libc::SIGSYS));
        assert_eq!(forbidden(SeccompAction::KillProcess).signal(), Some(libc::SIGSYS));
    }

    /// What the kernel does when a filter is installed (`seccomp_is_const_allow()`): it follows the
    /// filter for a system call with all that it knows, and remembers if that ends in "allow" before
    /// an argument is looked at. Such a call costs one bit from then on, and no filter.
    fn is_decided_by_number(program: &BpfProgram, call: c_long) -> bool {
        // Offsets in `struct seccomp_data`, and codes of classic BPF.
        const NUMBER: u32 = 0;
        const ARCHITECTURE: u32 = 4;
        const LOAD: u16 = 0x20;
        const JUMP: u16 = 0x05;
        const EQUAL: u16 = 0x15;
        const GREATER_OR_EQUAL: u16 = 0x35;
        const RETURN: u16 = 0x06;
        #[cfg(target_arch = "x86_64")]
        let architecture = 0xc000_003e;
        #[cfg(not(target_arch = "x86_64"))]
        let architecture = 0xc000_00b7;
        let number = u32::try_from(call).unwrap();
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match (step.code, step.k) {
                (LOAD, NUMBER) => accumulator = number,
                (LOAD, ARCHITECTURE) => accumulator = architecture,
                (LOAD, _) => return false,
                (JUMP, over) => at += usize::try_from(over).unwrap(),
                (EQUAL, k) => at += usize::from(if accumulator == k { step.jt } else { step.jf }),
                (GREATER_OR_EQUAL, k) => at += usize::from(if accumulator >= k { step.jt } else { step.jf }),
                (RETURN, k) => return k == libc::SECCOMP_RET_ALLOW,
                (code, _) => panic!("what is {code:#x}?"),
            }
        }
    }

    #[test]
    fn calls_of_the_way_of_a_request_are_decided_by_their_number() {
        let programs = [without_optional().unwrap(), allow_list(SeccompAction::KillProcess, true).unwrap()];
        let decided = |call| programs.iter().all(|program| is_decided_by_number(program, call));
        for call in [
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_statx,
            libc::SYS_openat,
            libc::SYS_close,
            libc::SYS_unlinkat,
            libc::SYS_getdents64,
            libc::SYS_setresuid,
            libc::SYS_setresgid,
            libc::SYS_epoll_pwait,
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_futex,
            libc::SYS_open_by_handle_at,
        ] {
            assert!(decided(call), "call {call}");
        }
        // So that this can fail: a call with a rule for its arguments, and one that is forbidden.
        assert!(!decided(libc::SYS_fcntl) && !decided(libc::SYS_execve));
    }

    /// All of it in one thread of the tests: a filter that is not right ends them all.
    #[test]
    fn a_worker_gets_along_with_it() {
        let work = || {
            for program in
                [without_optional().unwrap(), allow_list(SeccompAction::KillProcess, false).unwrap()]
            {
                seccompiler::apply_filter(&program).unwrap();
            }
            let inherited = || std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let status = std::thread::Builder::new().name("below".into()).spawn(inherited).unwrap();
            let status = status.join().unwrap();
            assert!(status.contains("Seccomp:\t2") && status.contains("Name:\tbelow"), "{status}");
            // A fault in the daemon is caught, and its trace is printed.
            assert!(catch_unwind(|| panic!("on purpose")).is_err());
            assert!(Backtrace::force_capture().to_string().contains("a_worker_gets_along_with_it"));
            // Memory by the megabyte, which is mapped and moved.
            let mut memory = vec![1u8; 1 << 20];
            memory.resize(1 << 26, 2);
            memory.truncate(1 << 16);
            memory.shrink_to_fit();
            assert_eq!(memory.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 1 << 16);
        };
        std::thread::spawn(work).join().unwrap();
    }
}
