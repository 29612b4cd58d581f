//! System calls that C libraries and allocators try by themselves, and can do without.
//!
//! Libraries change every year, and the filter must not end a healthy daemon because of it. A call that
//! a library tries before an older one is answered ENOSYS, as by an older kernel; so is every call that
//! did not exist when this was written. Neither is ever carried out, so an attacker gains nothing but
//! not being noticed at such a try. A test of all calls at the start was rejected: it would not see those that
//! come only under load, or at an error.

use libc::c_long;
use seccompiler::{BpfProgram, sock_filter};

/// Calls that tell of the process itself or of the machine, and change nothing.
pub(super) const INFORMATION: &[c_long] = &[
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getppid,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Calls that are tried before an older one, or whose failure is not minded.
const OPTIONAL: &[c_long] = &[
    libc::SYS_clone3,
    libc::SYS_membarrier,
    libc::SYS_get_mempolicy,
    libc::SYS_close_range,
    libc::SYS_openat2,
    libc::SYS_faccessat2,
    libc::SYS_futex_waitv,
    FUTEX_WAKE,
    FUTEX_WAIT,
    FUTEX_REQUEUE,
    FCHMODAT2,
    CACHESTAT,
    MAP_SHADOW_STACK,
    STATMOUNT,
    LISTMOUNT,
    libc::SYS_mseal,
    SETXATTRAT,
    GETXATTRAT,
    LISTXATTRAT,
    REMOVEXATTRAT,
    FILE_GETATTR,
];

// Numbers that the libc crate does not have everywhere; those of asm-generic/unistd.h and of x86-64.
const CACHESTAT: c_long = 451;
const FCHMODAT2: c_long = 452;
const MAP_SHADOW_STACK: c_long = 453;
const FUTEX_WAKE: c_long = 454;
const FUTEX_WAIT: c_long = 455;
const FUTEX_REQUEUE: c_long = 456;
const STATMOUNT: c_long = 457;
const LISTMOUNT: c_long = 458;
const SETXATTRAT: c_long = 463;
const GETXATTRAT: c_long = 464;
const LISTXATTRAT: c_long = 465;
const REMOVEXATTRAT: c_long = 466;
const FILE_GETATTR: c_long = 468;

/// The first number that Linux 6.18 gives to no call. All architectures count alike from 424 on.
const FIRST_UNKNOWN: u32 = 470;
/// Numbers from here on are no calls to come: other ABIs are there, such as x32.
const END_OF_UNKNOWN: u32 = 1024;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// The optional calls but those that the daemon makes itself.
pub(super) fn optional_besides(allowed: &[c_long]) -> impl Iterator<Item = c_long> {
    OPTIONAL.iter().copied().filter(|call| !allowed.contains(call))
}

/// The filter `program` with ENOSYS before all else for calls that are not known yet.
pub(super) fn answer_unknown(program: BpfProgram) -> BpfProgram {
    // Codes of classic BPF, and offsets in `struct seccomp_data`.
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const JUMP_IF_AT_LEAST: u16 = 0x35;
    const RETURN: u16 = 0x06;
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let step = |code, (jt, jf), k| sock_filter { code, jt, jf, k };
    let mut whole: BpfProgram = vec![
        step(LOAD, (0, 0), ARCHITECTURE),
        step(JUMP_IF_EQUAL, (0, 4), AUDIT_ARCH),
        step(LOAD, (0, 0), NUMBER),
        step(JUMP_IF_AT_LEAST, (0, 2), FIRST_UNKNOWN),
        step(JUMP_IF_AT_LEAST, (1, 0), END_OF_UNKNOWN),
        step(RETURN, (0, 0), enosys),
    ];
    whole.extend(program);
    whole
}

/// The filter `program` with ENOSYS before all else for other ABIs that share the architecture: x32, whose calls have
/// other numbers.
pub(super) fn without_other_abi(program: BpfProgram) -> BpfProgram {
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let step = |code, (jt, jf), k| sock_filter { code, jt, jf, k };
    // The codes and offsets of above: load the number; at least that of x32; return.
    let mut whole: BpfProgram =
        vec![step(0x20, (0, 0), 0), step(0x35, (0, 1), 0x4000_0000), step(0x06, (0, 0), enosys)];
    whole.extend(program);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::seccomp::tests::attempt;
    use seccompiler::SeccompAction;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn calls_that_libraries_can_do_without_are_not_there() {
        let attempt = |call| attempt(SeccompAction::KillProcess, call, [0; 4]);
        // The last ones are of kernels to come. Without clone3(2) the C library takes clone(2).
        for call in OPTIONAL.iter().copied().chain([470, 500, 1023]) {
            let status = attempt(call);
            assert_eq!(status.code(), Some(1), "call {call}: {status}");
        }
        for call in INFORMATION.iter().copied() {
            let status = attempt(call);
            assert_eq!(status.code(), Some(0), "call {call}: {status}");
        }
        // What changes something is not among them, new as it may be.
        for (name, call) in
            [("mount_setattr", 442), ("open_tree_attr", 467), ("file_setattr", 469), ("none", 1024)]
        {
            assert_eq!(attempt(call).signal(), Some(libc::SIGSYS), "{name}");
        }
    }
}
