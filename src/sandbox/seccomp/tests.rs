//! The filter, tried by system calls in processes of their own.

use super::*;
use std::backtrace::Backtrace;
use std::os::unix::process::ExitStatusExt;
use std::panic::catch_unwind;
use std::process::ExitStatus;

/// Makes one system call under the filter, in a process of its own, and says how that ended:
/// 0 if it came back, whatever the answer, and 1 if the answer was ENOSYS.
pub(in crate::sandbox) fn attempt(mode: SeccompAction, call: c_long, arguments: [c_long; 4]) -> ExitStatus {
    // The filter of the child has its own id in it.
    let programs = |action| [without_optional().unwrap(), allow_list(action, Uses::default()).unwrap()];
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
        ("io_uring_register", libc::SYS_io_uring_register, [0; 4]),
        ("io_uring_enter", libc::SYS_io_uring_enter, [0; 4]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
        ("socket", libc::SYS_socket, [long(libc::AF_UNIX), long(libc::SOCK_STREAM), 0, 0]),
        ("connect", libc::SYS_connect, [-1, 0, 0, 0]),
        ("ioctl", libc::SYS_ioctl, [-1, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 4]),
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
        ("limits of another process", libc::SYS_prlimit64, [1, 0, 0, 0], Some([0, 0, 0, 0])),
        ("another limit", libc::SYS_prlimit64, [0, 0, 1 << 32, 0], None),
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
        ("fcntl", libc::SYS_fcntl, [0, long(libc::F_SETFL), 0, 0], Some([-1, long(libc::F_OFD_SETLK), 0, 0])),
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
        (
            "ioctl",
            libc::SYS_ioctl,
            [-1, 0xaa00 /* USERFAULTFD_IOC_NEW */, 0, 0],
            Some([-1, 0xc018_aa3f, 0, 0]),
        ),
        ("ioctl", libc::SYS_ioctl, [-1, 0xc028_aa03 /* UFFDIO_COPY */, 0, 0], Some([-1, 0x8010_aa02, 0, 0])),
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
fn files_are_mapped_to_be_written_and_never_to_be_executed() {
    let (shared, data) = (long(libc::MAP_SHARED), long(libc::PROT_READ | libc::PROT_WRITE));
    let code = long(libc::PROT_EXEC);
    assert!(killed(libc::SYS_mmap, [0, 4096, code, shared]));
    assert!(killed(libc::SYS_mmap, [0, 4096, data | code, shared]));
    let status = attempt(SeccompAction::KillProcess, libc::SYS_mmap, [0, 4096, data, shared]);
    assert_eq!(status.code(), Some(0));
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
    let uses = Uses { file_handles: true, rings: true };
    let programs = [without_optional().unwrap(), allow_list(SeccompAction::KillProcess, uses).unwrap()];
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
        libc::SYS_io_uring_enter,
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
        let allowed = allow_list(SeccompAction::KillProcess, Uses::default()).unwrap();
        for program in [without_optional().unwrap(), allowed] {
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
