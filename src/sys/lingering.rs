//! Processes that have ended but for threads that the kernel does not let go.
//!
//! A thread that waits for a frozen file system cannot be killed, and as long as one is there nobody can wait for the process. All its
//! other threads are gone then, and this one runs no instruction of the program any more, once the process was killed. Threads that set
//! the times of files are known by their name: what they still do is to set times to the present. Any other one may be about to
//! write.

use std::fs;

use rustix::process::Pid;

/// The name of threads that do nothing but set times of files.
pub const SETTLER: &str = "settler";

/// The status of a process, as wait(2) has it, if nothing but such threads is left of it.
pub fn end_of(process: Pid) -> Option<i32> {
    let folder = format!("/proc/{}", process.as_raw_nonzero());
    let status = ended_with(&fs::read_to_string(format!("{folder}/stat")).ok()?)?;
    let mut threads = 0;
    let first = process.as_raw_nonzero().to_string();
    for thread in fs::read_dir(format!("{folder}/task")).ok()? {
        let thread = thread.ok()?.path();
        if thread.ends_with(&first) {
            continue;
        }
        let name = fs::read_to_string(thread.join("comm")).ok()?;
        let stat = fs::read_to_string(thread.join("stat")).ok()?;
        if name.trim_end() != SETTLER || state_of(&stat) != Some("D") {
            return None;
        }
        threads += 1;
    }
    (threads > 0).then_some(status)
}

/// What follows the name of a process in its `stat` file, which may have anything in it.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace()
}

fn state_of(stat: &str) -> Option<&str> {
    fields(stat).next()
}

/// The status of a process whose first thread has ended.
fn ended_with(stat: &str) -> Option<i32> {
    // The fields are counted from 1 in proc_pid_stat(5), and these begin with the third one.
    let status = fields(stat).nth(52 - 3)?.parse().ok()?;
    (state_of(stat) == Some("Z")).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn pid(child: &std::process::Child) -> Pid {
        Pid::from_raw(child.id().cast_signed()).unwrap()
    }

    #[test]
    fn a_process_that_runs_or_is_gone_does_not_linger() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        assert_eq!(end_of(pid(&child)), None);
        child.kill().unwrap();
        // It is there until it is waited for.
        while ended_with(&fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap()).is_none() {
            std::thread::yield_now();
        }
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        assert_eq!(ended_with(&stat), Some(libc::SIGKILL));
        assert_eq!(end_of(pid(&child)), None, "no thread is left");
        child.wait().unwrap();
        assert_eq!(end_of(pid(&child)), None);
    }

    #[test]
    fn names_may_have_anything_in_them() {
        let stat = format!("7 (a) R 9) Z {} 256 x", vec!["0"; 48].join(" "));
        assert_eq!(ended_with(&stat), Some(256));
        assert_eq!(ended_with(&stat.replace('Z', "D")), None);
        assert_eq!(ended_with("7 (a) Z 1"), None);
    }
}
