//! CLOCK_MONOTONIC, which is the same for all processes of the host, and what a thread has spent.

/// Nanoseconds of CLOCK_MONOTONIC. Makes no system call on most machines.
// By the C library: what rustix does in its place ends the process under valgrind.
#[inline]
pub fn monotonic() -> u64 {
    nanoseconds(libc::CLOCK_MONOTONIC)
}

/// What the calling thread spends from here on.
#[derive(Debug)]
pub struct Effort {
    started: u64,
    cpu: u64,
    sleeps: i64,
}

/// In nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// CPU time.
    pub cpu: u64,
    /// Time in which it slept in the kernel. What it waited for a CPU meanwhile counts only if it slept at all.
    pub asleep: u64,
}

impl Effort {
    /// Takes some two microseconds, together with [`Effort::end`].
    pub fn begin() -> Effort {
        Effort { started: monotonic(), sleeps: sleeps(), cpu: nanoseconds(libc::CLOCK_THREAD_CPUTIME_ID) }
    }

    /// What was spent.
    pub fn end(&self) -> Spent {
        let cpu = nanoseconds(libc::CLOCK_THREAD_CPUTIME_ID).saturating_sub(self.cpu);
        let has_slept = sleeps() != self.sleeps;
        let asleep = if has_slept { monotonic().saturating_sub(self.started).saturating_sub(cpu) } else { 0 };
        Spent { cpu, asleep }
    }
}

/// How often the calling thread has given its CPU away because it had to wait.
fn sleeps() -> i64 {
    // SAFETY: all zeros are a value of this struct.
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: the call fills in the struct; it cannot fail for the calling thread.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_nvcsw
}

#[inline]
fn nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills in the struct; it cannot fail for these clocks.
    unsafe { libc::clock_gettime(clock, &mut now) };
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_sleep_are_told_apart() {
        let effort = Effort::begin();
        while effort.end().cpu < 2_000_000 {}
        std::thread::sleep(std::time::Duration::from_millis(20));
        let spent = effort.end();
        assert!(spent.cpu >= 2_000_000 && spent.asleep >= 15_000_000, "{spent:?}");
    }
}
