//! How lanefsd starts, what it refuses to start with, and what it leaves behind: nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, SessionOptions};

/// Runs the daemon with nothing but these options; it has to end with one sentence and status 1.
fn refused(args: &[&str]) -> String {
    let (status, stderr) = Backend::of(common::program()).bare().args(args).refuse().unwrap();
    assert_eq!(status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: one sentence is wanted, not\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn a_share_that_is_no_directory() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let socket = directory.path().join("socket");
    for share in [file.to_str().unwrap(), "/nonexistent/share"] {
        let stderr = refused(&["--shared-dir", share, "--socket-path", socket.to_str().unwrap()]);
        assert!(stderr.contains(share), "{stderr}");
        assert!(!socket.exists());
    }
}

#[test]
fn a_socket_path_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let share = directory.path().to_str().unwrap();
    let stderr = refused(&["--shared-dir", share, "--socket-path", path.to_str().unwrap()]);
    assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    // Whoever has it keeps it.
    assert!(path.exists());
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    drop(listener);
}

#[test]
fn a_socket_path_that_is_a_file_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    refused(&["--shared-dir", directory.path().to_str().unwrap(), "--socket-path", path.to_str().unwrap()]);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_directory_that_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("no/such/socket");
    let stderr = refused(&[
        "--shared-dir",
        directory.path().to_str().unwrap(),
        "--socket-path",
        path.to_str().unwrap(),
    ]);
    assert!(stderr.contains("no/such"), "{stderr}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn contradicting_options() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let base =
        ["--shared-dir", directory.path().to_str().unwrap(), "--socket-path", socket.to_str().unwrap()];
    for more in [
        &["--writeback", "--parallel-direct-writes=always"][..],
        &["--fd=3"],
        &["--tag=0123456789012345678901234567890123456"],
    ] {
        refused(&[&base, more].concat());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn serves_over_an_inherited_socket() {
    let mut backend = common::starter().by_fd().start().unwrap();
    fs::write(backend.path("file"), "over --fd").unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    assert_eq!(session.client().read_file(node).unwrap(), b"over --fd");
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn ends_when_the_front_end_leaves_and_takes_its_socket_along() {
    let (mut backend, session) = common::serve(&[]);
    session.client().getattr(ROOT).unwrap();
    drop(session);
    backend.expect_success().unwrap();
    let left: Vec<_> = fs::read_dir(backend.socket().parent().unwrap()).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| entry.file_name() == "share"), "{left:?}");
}

#[test]
fn keeps_listening_if_told_to() {
    let backend = common::start(&["--keep-listening"]);
    let mut descriptors = 0;
    for round in 0..5 {
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let (entry, open) = client.create(ROOT, format!("file-{round}"), libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"round").unwrap();
        // Neither closed nor forgotten: the next front end starts with a clean slate nevertheless.
        let limit = if round < 2 { usize::MAX } else { descriptors };
        let now = common::settled_descriptors(&backend, limit);
        assert!(now <= limit, "{descriptors} descriptors in the round before, now {now}");
        descriptors = now;
    }
    assert_eq!(fs::read(backend.path("file-4")).unwrap(), b"round");
}

#[test]
fn ends_on_sigterm_with_and_without_a_front_end() {
    let mut idle = common::start(&[]);
    idle.signal(libc::SIGTERM).unwrap();
    idle.expect_success().unwrap();
    assert!(!idle.socket().exists());
    let (mut busy, session) = common::serve(&["--keep-listening"]);
    session.client().getattr(ROOT).unwrap();
    busy.signal(libc::SIGTERM).unwrap();
    busy.expect_success().unwrap();
}

#[test]
fn tells_that_it_waits_for_a_connection() {
    // Kata's runtime waits for these words.
    let mut backend = common::starter().args(["--log-level=info"]).start().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !backend.stderr().contains("Waiting for vhost-user socket connection") {
        assert!(std::time::Instant::now() < deadline, "stderr: {}", backend.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn prints_capabilities_whatever_else_is_asked() {
    for args in [&["--print-capabilities"][..], &["--print-capabilities", "--shared-dir", "/nonexistent"]] {
        let output = Command::new(common::program()).args(args).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["type"], "fs");
        assert!(json["features"].is_array());
    }
}
