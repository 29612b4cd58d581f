//! A file system below the share is frozen, as for a snapshot, with writes through mappings whose times are not set yet.
//! Whatever does not have to wait for it does not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::common;
use crate::common::disk::Disk;
use crate::common::mapped_file::{ALWAYS, File, JIFFIES, PAGE, WHOLE_PAGES, serve, times};

/// Frozen until this is dropped, or until the test's process is gone.
struct Frozen(Child);

impl Frozen {
    fn new(path: &Path) -> Frozen {
        // Before it is frozen: then it can be thawed.
        let thaw = Command::new("sh")
            .args(["-c", "cat > /dev/null; exec fsfreeze --unfreeze \"$0\""])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let frozen = Frozen(thaw);
        common::run(Command::new("fsfreeze").arg("--freeze").arg(path));
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A share in memory with a disk in it that can be frozen. What is in the share is unmounted first.
struct Share {
    inner: PathBuf,
    outer: Disk,
    _disk: Disk,
}

impl Share {
    fn new() -> Share {
        let (outer, disk) = (Disk::tmpfs(64), Disk::ext4(64, &WHOLE_PAGES));
        let inner = outer.path.join("inner");
        fs::create_dir(&inner).unwrap();
        mount_bind(&disk.path, &inner).unwrap();
        Share { inner, outer, _disk: disk }
    }

    fn files<'a>(&self, session: &'a Session) -> [File<'a>; 2] {
        let inner = session.client().lookup(ROOT, "inner").unwrap().nodeid;
        [File::create_in(session, inner, "file", PAGE), File::create(session, "file", PAGE)]
    }

    /// Freezes the disk after a write to its file, before the file's times are set.
    fn freeze(&self, backend: &Backend, file: File<'_>) -> Frozen {
        let path = self.inner.join("file");
        for byte in 0..0x80 {
            file.warm(backend, 0, &[byte; PAGE]);
            file.client.getattr(file.node).unwrap();
            // One that lets mapped ones follow.
            std::thread::sleep(Duration::from_millis(150));
            file.write(0, &[byte; PAGE]);
            file.client.getattr(file.node).unwrap();
            let before = times(&path);
            std::thread::sleep(JIFFIES);
            file.write(0, &[byte ^ 0x80; PAGE]);
            let frozen = Frozen::new(&self.inner);
            if times(&path) == before {
                common::wait_until(|| waits_for_it(backend), "a thread that waits for the frozen disk");
                return frozen;
            }
        }
        panic!("the disk is never frozen before the times are set");
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = unmount(&self.inner, UnmountFlags::DETACH);
    }
}

/// Whether the process that serves has a thread that waits inside the kernel to set times.
fn waits_for_it(backend: &Backend) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.worker().unwrap())).unwrap();
    tasks.flatten().any(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.contains("(settler) D")
    })
}

fn newer(path: &Path, before: [(i64, i64); 2]) {
    common::wait_until(|| times(path)[0] > before[0], "newer times");
}

/// Attack: a file system of the share is frozen.
/// Outcome: times on other file systems move, and SYNCFS of these is answered.
#[test]
fn times_of_other_file_systems_are_set() {
    let share = Share::new();
    let (mut backend, session) = serve(&share.outer.path, &ALWAYS, 1);
    let [inner, outer] = share.files(&session);
    outer.warm(&backend, 0, &[1; PAGE]);
    let frozen = share.freeze(&backend, inner);
    let path = share.outer.path.join("file");
    for byte in 0..5 {
        outer.warm(&backend, 0, &[byte; PAGE]);
        let before = times(&path);
        std::thread::sleep(JIFFIES);
        outer.write(0, &[byte + 10; PAGE]);
        newer(&path, before);
        outer.client.syncfs(ROOT).unwrap();
    }
    let before = times(&share.inner.join("file"));
    drop(frozen);
    newer(&share.inner.join("file"), before);
    drop(session);
    backend.expect_success().unwrap();
}

/// Attack: the process that serves is killed while a file system of the share is frozen.
/// Outcome: another one serves files of other file systems, and the times are set when it is thawed. An upgrade waits for that.
#[test]
fn another_process_goes_on() {
    let share = Share::new();
    let (mut backend, session) = serve(&share.outer.path, &ALWAYS, 1);
    let [inner, outer] = share.files(&session);
    let frozen = share.freeze(&backend, inner);
    let before = times(&share.inner.join("file"));
    let worker = backend.worker().unwrap();
    kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::KILL).unwrap();
    for byte in 0..10 {
        outer.write(0, &[byte; PAGE]);
        assert_eq!(outer.client.read(outer.node, outer.fh, 0, PAGE).unwrap(), [byte; PAGE]);
    }
    outer.warm(&backend, 0, &[7; PAGE]);
    assert!(inner.client.lookup(ROOT, "inner").is_ok());
    backend.signal(libc::SIGHUP).unwrap();
    common::wait_for_words(&backend, "thaw it first");
    outer.write(0, &[11; PAGE]);
    assert_eq!(times(&share.inner.join("file")), before, "it was thawed meanwhile");
    drop(frozen);
    newer(&share.inner.join("file"), before);
    inner.warm(&backend, 0, &[8; PAGE]);
    assert_eq!(fs::read(share.inner.join("file")).unwrap(), [8; PAGE]);
    backend.upgrade().unwrap();
    inner.write(0, &[9; PAGE]);
    assert_eq!(fs::read(share.inner.join("file")).unwrap(), [9; PAGE]);
    drop(session);
    backend.expect_success().unwrap();
}

/// Attack: the front end leaves while a file system of the share is frozen.
/// Outcome: the daemon ends, and the times are set when it is thawed.
#[test]
fn a_session_ends() {
    let share = Share::new();
    let (mut backend, session) = serve(&share.outer.path, &ALWAYS, 1);
    let [inner, _] = share.files(&session);
    let frozen = share.freeze(&backend, inner);
    let before = times(&share.inner.join("file"));
    drop(session);
    backend.expect_success().unwrap();
    assert!(backend.stderr().contains("frozen?"), "{}", backend.stderr());
    assert_eq!(times(&share.inner.join("file")), before, "it was thawed meanwhile");
    drop(frozen);
    newer(&share.inner.join("file"), before);
}

/// Attack: the same, with a daemon that goes on.
/// Outcome: another front end is served.
#[test]
fn a_session_begins_after_another_one() {
    for way in [&["--keep-listening"][..], &["--keep-listening", "--no-survive"]] {
        let share = Share::new();
        let (backend, session) = serve(&share.outer.path, &[&ALWAYS, way].concat(), 1);
        let [inner, _] = share.files(&session);
        let frozen = share.freeze(&backend, inner);
        let before = times(&share.inner.join("file"));
        drop(session);
        let session = backend.connect(common::queues(1)).unwrap();
        let other = File::create(&session, "other", PAGE);
        other.warm(&backend, 0, &[1; PAGE]);
        assert_eq!(times(&share.inner.join("file")), before, "it was thawed meanwhile");
        drop(frozen);
        newer(&share.inner.join("file"), before);
        drop(session);
    }
}

/// Attack: the daemon is told to end while a file system of the share is frozen.
/// Outcome: it ends.
#[test]
fn a_signal_ends_the_daemon() {
    let share = Share::new();
    let (mut backend, session) = serve(&share.outer.path, &ALWAYS, 1);
    let [inner, _] = share.files(&session);
    let frozen = share.freeze(&backend, inner);
    backend.signal(libc::SIGTERM).unwrap();
    assert!(backend.wait(Duration::from_secs(20)).unwrap().success());
    drop(frozen);
    drop(session);
}
