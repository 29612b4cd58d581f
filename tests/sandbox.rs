//! The walls around the daemon, looked at from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::{Change, ROOT};

/// The process that serves: the one that was started, or its child.
fn serving(started: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{started}/task/{started}/children")).unwrap();
    children.split_whitespace().next().map_or(started, |child| child.parse().unwrap())
}

fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Starts a daemon in a sandbox, has it serve a little, and ends it; `look` sees the serving process.
fn in_sandbox(sandbox: &str, look: impl FnOnce(u32, &Path)) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root; nothing was tested");
        return;
    }
    let mut backend = common::starter().args([&format!("--sandbox={sandbox}"), "--xattr"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.write(entry.nodeid, open.fh, 0, b"inside").unwrap();
    client.setattr(entry.nodeid, Change::default().mode(0o640)).unwrap();
    client.symlink(ROOT, "link", "/etc/passwd").unwrap();
    // What goes by a name below /proc/self/fd works without /proc in sight.
    client.link(entry.nodeid, ROOT, "second").unwrap();
    assert!(client.listxattr(entry.nodeid, 100).is_ok());
    assert_eq!(fs::read(backend.path("second")).unwrap(), b"inside");
    look(serving(backend.pid()), &backend.path(""));
    drop(session);
    backend.expect_success().unwrap();
    assert!(!backend.socket().exists(), "the socket is left behind");
}

#[test]
fn namespaces_hold_the_share_and_nothing_else() {
    in_sandbox("namespace", |pid, share| {
        for namespace in ["mnt", "pid", "net"] {
            let own = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap(), own, "{namespace}");
        }
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity(share));
        let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "more than the share is mounted:\n{mounts}");
        assert!(!Path::new(&format!("/proc/{pid}/root/proc")).exists());
    });
}

#[test]
fn chroot_has_the_share_as_its_root() {
    in_sandbox("chroot", |pid, share| {
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity(share));
    });
}

#[test]
fn none_leaves_everything_in_sight() {
    in_sandbox("none", |pid, _| {
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity("/"));
    });
}

#[test]
fn a_signal_ends_the_serving_process_too() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut backend = common::starter().args(["--sandbox=namespace", "--keep-listening"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let serving = serving(backend.pid());
    assert_ne!(serving, backend.pid());
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert!(!Path::new(&format!("/proc/{serving}")).exists());
    assert!(!backend.socket().exists());
}
