//! The process that waits outside the sandbox: signals, and the end of either process.

use std::path::Path;

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::ROOT;

use crate::common;
use crate::sandbox::{as_root, outer_of, under_strace};

#[test]
fn a_signal_ends_the_serving_process_too() {
    as_root();
    let mut backend = common::starter().args(["--sandbox=namespace", "--keep-listening"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let serving = common::serving_process(backend.pid());
    assert_ne!(serving, backend.pid());
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert!(!Path::new(&format!("/proc/{serving}")).exists());
    assert!(!backend.socket().exists());
}

/// Kata's Go runtime ends a daemon by SIGKILL.
#[test]
fn a_killed_parent_takes_the_serving_process_along() {
    as_root();
    for sandbox in ["namespace", "chroot"] {
        let mut backend = common::starter().args([&format!("--sandbox={sandbox}")]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid());
        backend.signal(libc::SIGKILL).unwrap();
        backend.wait(std::time::Duration::from_secs(5)).unwrap();
        common::expect_end(serving);
    }
}

/// The process that waits outside is killed before the other one can ask for a signal at its end.
#[test]
fn a_parent_that_is_killed_at_the_start_leaves_no_daemon() {
    for sandbox in ["--sandbox=namespace", "--sandbox=chroot"] {
        let mut backend = under_strace(&["inject=prctl:delay_enter=1s:when=1"], &[sandbox]);
        let outer = outer_of(&backend);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let child = loop {
            match common::serving_process(outer) {
                child if child != outer => break child,
                _ => assert!(std::time::Instant::now() < deadline, "no second process"),
            }
        };
        let outer = rustix::process::Pid::from_raw(outer.cast_signed()).unwrap();
        rustix::process::kill_process(outer, rustix::process::Signal::KILL).unwrap();
        common::expect_end(child);
        backend.wait(std::time::Duration::from_secs(5)).unwrap();
    }
}

/// A terminal that is closed sends SIGHUP.
#[test]
fn a_closed_terminal_ends_the_daemon_in_order() {
    as_root();
    for sandbox in ["namespace", "chroot", "none"] {
        let sandbox = format!("--sandbox={sandbox}");
        let mut backend = common::starter().args([&sandbox, "--keep-listening"]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid());
        backend.signal(libc::SIGHUP).unwrap();
        backend.expect_success().unwrap();
        common::expect_end(serving);
        assert!(!backend.socket().exists(), "{sandbox}: the socket is left behind");
        // nohup(1) ignores the signal.
        let starter = lanefsd_frontend::Backend::of("nohup").args([common::program()]);
        let mut backend = starter.args([&sandbox]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        backend.signal(libc::SIGHUP).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        session.client().getattr(ROOT).unwrap();
        drop(session);
        backend.expect_success().unwrap();
    }
}
