//! What a process and its children cost, out of /proc.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Counters of a process tree at one moment.
#[derive(Debug, Default)]
pub struct Usage {
    cpu: Duration,
    user: Duration,
    system: Duration,
    /// Context switches of each thread: voluntary and others.
    switches: BTreeMap<u32, (u64, u64)>,
}

/// What happened between two moments.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// CPU time, exactly.
    pub cpu: Duration,
    /// Of it in user mode, in ticks of the kernel.
    pub user: Duration,
    /// Of it in the kernel.
    pub system: Duration,
    /// Context switches because a thread waited.
    pub voluntary: u64,
    /// Other context switches.
    pub involuntary: u64,
}

impl Usage {
    /// The counters of `pid` and all its descendants.
    pub fn of(pid: u32) -> Usage {
        let mut usage = Usage::default();
        for pid in tree(pid) {
            usage.cpu += cpu_clock(pid);
            if let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) {
                let (user, system) = ticks(&stat);
                usage.user += user;
                usage.system += system;
            }
            for thread in threads(pid) {
                if let Ok(status) = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")) {
                    let field = |name| field(&status, name);
                    let switches = (field("voluntary_ctxt_switches:"), field("nonvoluntary_ctxt_switches:"));
                    usage.switches.insert(thread, switches);
                }
            }
        }
        usage
    }

    /// What was spent since `before`. Switches of threads that have ended meanwhile are not known.
    pub fn since(&self, before: &Usage) -> Spent {
        let (mut voluntary, mut involuntary) = (0, 0);
        for (thread, now) in &self.switches {
            let then = before.switches.get(thread).copied().unwrap_or_default();
            voluntary += now.0.saturating_sub(then.0);
            involuntary += now.1.saturating_sub(then.1);
        }
        Spent {
            cpu: self.cpu.saturating_sub(before.cpu),
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            voluntary,
            involuntary,
        }
    }
}

/// A process and its descendants.
pub fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut at = 0;
    while let Some(&pid) = found.get(at) {
        for thread in threads(pid) {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children"));
            found.extend(
                children.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
        at += 1;
    }
    found
}

fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn field(status: &str, name: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    value.trim().parse().unwrap_or(0)
}

/// CPU time of a process to the nanosecond, threads that have ended included.
fn cpu_clock(pid: u32) -> Duration {
    let Ok(pid) = i32::try_from(pid) else { return Duration::ZERO };
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write to the variables that they are given, which are alive.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) != 0 || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed {
        return Duration::ZERO;
    }
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// User and system time in a line of /proc/PID/stat.
fn ticks(stat: &str) -> (Duration, Duration) {
    // The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = after_name.split_whitespace().skip(11).map(|field| field.parse::<u64>().unwrap_or(0));
    // SAFETY: sysconf has no preconditions.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    let mut next = || Duration::from_nanos(fields.next().unwrap_or(0) * (1_000_000_000 / per_second));
    let user = next();
    (user, next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::time::ClockId;

    fn thread_time() -> Duration {
        Duration::try_from(rustix::time::clock_gettime(ClockId::ThreadCPUTime)).unwrap()
    }

    #[test]
    fn work_and_waits_are_counted() {
        let before = Usage::of(std::process::id());
        // By the thread's own clock: a busy machine may give it no CPU for a while.
        let until = thread_time() + Duration::from_millis(20);
        while thread_time() < until {
            std::hint::spin_loop();
        }
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let spent = Usage::of(std::process::id()).since(&before);
        assert!(spent.cpu >= Duration::from_millis(20), "{spent:?}");
        assert!(spent.voluntary >= 5, "{spent:?}");
    }

    #[test]
    fn a_name_with_spaces_does_not_shift_the_fields() {
        let stat = "7 (a ) b) S 1 1 1 0 -1 0 0 0 0 0 250 130 0 0 20";
        assert_eq!(ticks(stat), (Duration::from_millis(2500), Duration::from_millis(1300)));
    }
}
