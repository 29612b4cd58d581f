//! What the integration tests share: which back end is tested, and how it is started.
//!
//! `LANEFSD_TEST_BACKEND` names another program with virtiofsd's options, to compare behaviour.
#![allow(dead_code, reason = "every test file uses its own part")]

pub mod fuse_host;
pub mod strace;

use std::ffi::OsString;
use std::path::PathBuf;

use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::{Backend, Session, SessionOptions};

/// The program under test.
pub fn program() -> OsString {
    std::env::var_os("LANEFSD_TEST_BACKEND").unwrap_or_else(|| env!("CARGO_BIN_EXE_lanefsd").into())
}

/// A copy of the program under test where other users reach it.
///
/// Another process makes it: what a thread of this one starts meanwhile would hold the copy open for
/// writing for a moment, and nobody could run it (ETXTBSY).
pub fn copy_program(to: &std::path::Path) {
    let status = std::process::Command::new("cp").arg(program()).arg(to).status().expect("cp(1) runs");
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

/// A directory on a file system with holes, O_DIRECT and xattrs, rather than on a tmpfs.
pub fn disk_directory() -> tempfile::TempDir {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    tempfile::Builder::new().prefix("share-").tempdir_in(target).expect("a directory below target/")
}

/// Waits until the back end has written these words to stderr.
pub fn wait_for_words(backend: &mut Backend, words: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !backend.stderr().contains(words) {
        assert!(std::time::Instant::now() < deadline, "no {words} in stderr: {}", backend.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The errno of a request that has to be refused.
pub fn errno<T: std::fmt::Debug>(result: lanefsd_frontend::Result<T>) -> i32 {
    match result {
        Ok(value) => panic!("the request was to be refused, but gave {value:?}"),
        Err(error) => error.errno().unwrap_or_else(|| panic!("the request failed otherwise: {error}")).0,
    }
}

/// Waits until a process runs no more, though whose child it is may not have asked for its status yet.
pub fn expect_end(pid: u32) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let state = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    while !state().is_empty() && !state().contains("State:\tZ") {
        assert!(std::time::Instant::now() < deadline, "process {pid} runs on");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Descriptors of a back end once there are no more than `limit`. Threads that have served a queue may
/// take a moment to let go of it after the queue has stopped.
pub fn settled_descriptors(backend: &Backend, limit: usize) -> usize {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let now = backend.descriptors().expect("the back end runs").len();
        if now <= limit || std::time::Instant::now() > deadline {
            return now;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
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
