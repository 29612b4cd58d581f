//! What the integration tests share: which back end is tested, and how it is started.
//!
//! `LANEFSD_TEST_BACKEND` names another program with virtiofsd's options, to compare behaviour.
#![allow(dead_code, reason = "the programs beside this folder use a part of it")]

pub mod disk;
pub mod fuse_host;
pub mod mapped_file;
pub mod store;
pub mod strace;

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::io::Errno;
use tempfile::TempDir;

/// The program under test.
pub fn program() -> OsString {
    std::env::var_os("LANEFSD_TEST_BACKEND").unwrap_or_else(|| env!("CARGO_BIN_EXE_lanefsd").into())
}

/// A copy of the program under test where other users reach it.
///
/// Another process makes it: what a thread of this one starts meanwhile would hold the copy open for
/// writing for a moment, and nobody could run it (ETXTBSY).
pub fn copy_program(to: &Path) {
    let status = Command::new("cp").arg(program()).arg(to).status().expect("cp(1) runs");
    assert!(status.success(), "the program cannot be copied to {}", to.display());
}

/// Whether the tests run against another back end than lanefsd: some things only lanefsd promises.
pub fn is_foreign() -> bool {
    std::env::var_os("LANEFSD_TEST_BACKEND").is_some()
}

/// The back end with the options that every test wants.
pub fn starter() -> Starter {
    Backend::of(program()).args(["--sandbox=none"])
}

/// A running back end with these further options.
pub fn start(args: &[&str]) -> Backend {
    starter().args(args).start().expect("the back end starts")
}

/// A running back end with these further options, and a session with it.
pub fn serve(args: &[&str]) -> (Backend, Session) {
    serve_with(args, SessionOptions::default())
}

/// The same with chosen session options.
pub fn serve_with(args: &[&str], options: SessionOptions) -> (Backend, Session) {
    let backend = start(args);
    let session = backend.connect(options).expect("the front end connects");
    (backend, session)
}

/// Session options with this number of request queues.
pub fn queues(queues: usize) -> SessionOptions {
    SessionOptions { queues, ..SessionOptions::default() }
}

/// A running back end with these further options, a session, and its file `file`, open for reading and writing.
pub fn serve_file(args: &[&str]) -> (Backend, Session, u64, u64) {
    let (backend, session) = serve(args);
    let (node, fh) = create_file(&session);
    (backend, session, node, fh)
}

/// Creates `file` in the share, and returns its node and handle.
pub fn create_file(session: &Session) -> (u64, u64) {
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).expect("the file is created");
    (entry.nodeid, open.fh)
}

/// A back end that serves this directory, and a session with it.
pub fn serve_on(share: TempDir, starter: Starter, options: SessionOptions) -> (TempDir, Backend, Session) {
    let backend = starter.share(share.path()).start().expect("the back end starts");
    let session = backend.connect(options).expect("the front end connects");
    (share, backend, session)
}

/// A back end with these further options that serves a [`disk_directory`], and a session with it.
pub fn on_disk(args: &[&str]) -> (TempDir, Backend, Session) {
    serve_on(disk_directory(), starter().args(args), SessionOptions::default())
}

/// A [`disk_directory`] that all users may write to.
pub fn open_directory() -> TempDir {
    let directory = disk_directory();
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), all).expect("the mode is set");
    directory
}

/// Fails unless each request queue of the session answers.
pub fn every_queue_answers(session: &Session) {
    for queue in 1..session.queues().len() {
        session.client().on(queue).getattr(ROOT).expect("a request queue answers");
    }
}

/// The process that serves: the one that was started, or its child that is not the monitor.
pub fn serving_process(started: u32) -> u32 {
    let path = format!("/proc/{started}/task/{started}/children");
    let children = std::fs::read_to_string(path).expect("the back end runs");
    let is_monitor = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "lanefsd-monitor\n")
    };
    let serving = children.split_whitespace().find(|pid| !is_monitor(pid));
    serving.map_or(started, |child| child.parse().expect("a process id"))
}

/// Runs a command that has to succeed.
pub fn run(command: &mut Command) {
    let output = command.output().expect("the command is there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An extended attribute as the host has it.
pub fn host_xattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 1000];
    let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice())?;
    value.truncate(len);
    Ok(value)
}

/// Waits up to 10 s for a condition.
pub fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what} is waited for in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory on a file system with holes, O_DIRECT and xattrs, rather than on a tmpfs.
pub fn disk_directory() -> TempDir {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    tempfile::Builder::new().prefix("share-").tempdir_in(target).expect("a directory below target/")
}

/// Waits until the back end has written these words to stderr.
pub fn wait_for_words(backend: &Backend, words: &str) {
    wait_for(backend, |text| text.contains(words), words);
}

/// Waits until what the back end has written to stderr is as wanted.
pub fn wait_for(backend: &Backend, is_there: impl Fn(&str) -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_there(&backend.stderr()) {
        assert!(Instant::now() < deadline, "no {what} in stderr: {}", backend.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The errno of a request that has to be refused.
pub fn errno<T: std::fmt::Debug>(result: lanefsd_frontend::Result<T>) -> i32 {
    match result {
        Ok(value) => panic!("the request was to be refused, but gave {value:?}"),
        Err(error) => error.errno().unwrap_or_else(|| panic!("the request failed otherwise: {error}")).0,
    }
}

/// A test that runs below nohup(1) would have its daemons ignore SIGHUP.
#[allow(unsafe_code)]
pub fn hear_hangups() {
    // SAFETY: the default action is no function of ours.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
}

/// Waits until a process runs no more, though whose child it is may not have asked for its status yet.
pub fn expect_end(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let state = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    while !state().is_empty() && !state().contains("State:\tZ") {
        assert!(Instant::now() < deadline, "process {pid} runs on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many descriptors a daemon has open that has nothing to do: its processes have started, and front ends that left
/// are forgotten.
pub fn steady_descriptors(backend: &Backend) -> usize {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (mut count, mut times) = (0, 0);
    while times < 15 && Instant::now() < deadline {
        let now = backend.descriptors().expect("the back end runs").len();
        times = if now == count { times + 1 } else { 0 };
        count = now;
        std::thread::sleep(Duration::from_millis(20));
    }
    count
}

/// Descriptors of a back end once there are no more than `limit`. Threads that have served a queue may
/// take a moment to let go of it after the queue has stopped.
pub fn settled_descriptors(backend: &Backend, limit: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = backend.descriptors().expect("the back end runs").len();
        if now <= limit || Instant::now() > deadline {
            return now;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Gives the calling thread, and what it starts, mounts that no other process sees and that end with it.
#[allow(unsafe_code)]
pub fn own_mounts() {
    use rustix::mount::{MountPropagationFlags, mount_change};
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: only root mounts");
    // SAFETY: nothing of this thread counts on sharing its working directory or mounts with others.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .expect("the thread gets its own mounts");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .expect("mounts stay where they are made");
}

/// Tells threads beside a test to end, also when the test fails.
pub struct Done<'a>(pub &'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
