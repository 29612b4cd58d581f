//! CLOCK_MONOTONIC, which is the same for all processes of the host.

/// Nanoseconds of CLOCK_MONOTONIC. Makes no system call on most machines.
// By the C library: what rustix does in its place ends the process under valgrind.
#[inline]
pub fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the struct; it cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned())
}
