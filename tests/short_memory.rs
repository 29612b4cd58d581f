//! The host is short of memory: windows of files that are written through mappings are given back.
//!
//! It has a process of its own: what is seen of the host's memory is seen by all daemons.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "it/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use common::disk::Disk;
use common::mapped_file::{ALWAYS, File, PAGE, mapped, serve};

/// Programs that read a file again and again that does not fit in the memory that they may use. So they wait for memory, and nobody else
/// does.
struct Shortage {
    programs: Child,
    group: PathBuf,
}

impl Shortage {
    const LIMIT: &'static str = "8388608";

    /// `None` where no group can be made whose shortage the daemon hears of.
    fn begin(file: &Path) -> Option<Shortage> {
        let name = format!("lanefsd-test-{}", std::process::id());
        // With version 1, the daemon hears of the whole host.
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
        let parents = [
            (Path::new("/sys/fs/cgroup/memory").to_owned(), "memory.limit_in_bytes"),
            (Path::new("/sys/fs/cgroup").join(own), "memory.max"),
        ];
        let make = |(parent, limit): (PathBuf, &str)| {
            let group = parent.join(&name);
            fs::create_dir(&group).ok()?;
            let done = fs::write(group.join(limit), Shortage::LIMIT);
            done.inspect_err(|_| drop(fs::remove_dir(&group))).ok().map(|()| group)
        };
        let group = parents.into_iter().find_map(make)?;
        let script = "echo $$ > \"$0\"/cgroup.procs && head -c 48M /dev/zero > \"$1\" && for reader in 1 2 3; do while :; do cat \"$1\"; done > /dev/null & done; wait";
        let programs = std::os::unix::process::CommandExt::process_group(&mut Command::new("sh"), 0)
            .args(["-c", script])
            .args([&group, file])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut shortage = Shortage { programs, group };
        loop {
            if fs::read_to_string(shortage.group.join("cgroup.procs")).is_ok_and(|ids| !ids.is_empty()) {
                return Some(shortage);
            }
            // It may not be in the group.
            if shortage.programs.try_wait().is_ok_and(|ended| ended.is_some()) {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Shortage {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.programs), Signal::KILL);
        let _ = self.programs.wait();
        // Until all of them are gone.
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.group).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn windows_are_given_back_while_memory_is_short() {
    if fs::read_to_string("/proc/pressure/memory").is_err() {
        eprintln!("not checked: this kernel has no pressure stall information");
        return;
    }
    let disk = Disk::tmpfs(64);
    let beside = common::disk_directory();
    let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", PAGE);
    file.warm(&backend, 0, &[1; PAGE]);
    assert!(mapped(&backend, &disk.path) > 0);
    let Some(shortage) = Shortage::begin(&beside.path().join("large")) else {
        eprintln!("not checked: no cgroup can be made whose memory is limited");
        return;
    };
    // Windows that are used go for no other reason.
    let deadline = Instant::now() + Duration::from_secs(60);
    while mapped(&backend, &disk.path) > 0 {
        file.write(0, &[2; PAGE]);
        assert!(Instant::now() < deadline, "the windows are there still");
    }
    drop(shortage);
    file.warm(&backend, 0, &[3; PAGE]);
    assert_eq!(fs::read(disk.path.join("file")).unwrap(), [3; PAGE]);
    drop(session);
    backend.expect_success().unwrap();
}
