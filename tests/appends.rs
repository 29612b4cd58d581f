//! Appends, and files that take nothing else.
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
use std::path::{Path, PathBuf};
use std::process::Command;

use lanefsd::fuse::flags::WriteFlags;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};

const APPENDING: i32 = libc::O_WRONLY | libc::O_APPEND;
const NONE: WriteFlags = WriteFlags::empty();

/// A file of the host with the append-only attribute, until this is dropped.
struct Log {
    path: PathBuf,
}

impl Log {
    fn new(directory: &Path) -> Log {
        let path = directory.join("log");
        fs::write(&path, "old\n").unwrap();
        chattr("+a", &path);
        Log { path }
    }

    fn content(&self) -> String {
        fs::read_to_string(&self.path).unwrap()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        chattr("-a", &self.path);
    }
}

fn chattr(change: &str, path: &Path) {
    assert!(Command::new("chattr").arg(change).arg(path).status().unwrap().success(), "chattr {change}");
}

fn serve(args: &[&str]) -> (tempfile::TempDir, Backend, Session) {
    let directory = common::disk_directory();
    let backend = common::starter().args(args).share(directory.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    (directory, backend, session)
}

/// Appends a line, as a guest with an old idea of the end.
fn append(client: &Client<'_>, node: u64, fh: u64, line: &str, flags: i32) {
    assert_eq!(client.write_with(node, fh, 1, line.as_bytes(), NONE, flags).unwrap(), line.len());
}

#[test]
fn an_append_only_file_takes_appends_and_nothing_else() {
    for args in [
        &["--cache=auto"][..],
        &["--cache=never"],
        &["--sandbox=namespace"],
        &["--sandbox=chroot", "--inode-file-handles=never"],
    ] {
        let (directory, _backend, session) = serve(args);
        let log = Log::new(directory.path());
        let client = session.client();
        let node = client.lookup(ROOT, "log").unwrap().nodeid;
        let open = client.open(node, APPENDING).unwrap();
        append(&client, node, open.fh, "new\n", APPENDING);
        // By CREATE without O_EXCL, and for reading as well.
        let flags = libc::O_RDWR | libc::O_APPEND;
        let (entry, both) = client.create(ROOT, "log", flags, 0o600, 0).unwrap();
        assert_eq!(entry.nodeid, node);
        append(&client, node, both.fh, "newer\n", flags);
        assert_eq!(client.read(node, both.fh, 0, 100).unwrap(), b"old\nnew\nnewer\n");
        assert_eq!(log.content(), "old\nnew\nnewer\n");
        client.fsync(node, both.fh, false).unwrap();
        client.flush(node, both.fh, 1).unwrap();
        client.setattr(node, Change::none().times_now()).unwrap();

        // Whoever clears O_APPEND by fcntl(2) writes nowhere, nor does a mapping.
        let elsewhere = client.write_with(node, open.fh, 0, b"OLD", NONE, libc::O_WRONLY);
        assert_eq!(common::errno(elsewhere), libc::EPERM);
        let mapped = client.write_with(node, open.fh, 0, b"OLD", WriteFlags::CACHE, 0);
        assert_eq!(common::errno(mapped), libc::EPERM);
        for flags in [libc::O_WRONLY, libc::O_RDWR, APPENDING | libc::O_TRUNC] {
            assert_eq!(common::errno(client.open(node, flags)), libc::EPERM, "{flags:#o}");
        }
        for change in [Change::none().size(0), Change::none().size(0).handle(open.fh)] {
            assert_eq!(common::errno(client.setattr(node, change)), libc::EPERM);
        }
        assert_eq!(common::errno(client.unlink(ROOT, "log")), libc::EPERM);
        assert_eq!(log.content(), "old\nnew\nnewer\n");
        // What is open stays as it was opened.
        drop(log);
        append(&client, node, open.fh, "last\n", APPENDING);
        assert!(fs::read_to_string(directory.path().join("log")).unwrap().ends_with("last\n"));
    }
}

#[test]
fn an_append_only_file_is_locked_for_writing() {
    let (directory, _backend, session) = serve(&["--posix-lock", "--flock"]);
    let _log = Log::new(directory.path());
    let client = session.client();
    let node = client.lookup(ROOT, "log").unwrap().nodeid;
    let open = client.open(node, APPENDING).unwrap();
    client.setlk(node, open.fh, Lock::posix(1, libc::F_WRLCK, 0, 99)).unwrap();
    assert_eq!(common::errno(client.setlk(node, open.fh, Lock::posix(2, libc::F_WRLCK, 0, 9))), libc::EAGAIN);
    client.setlk(node, open.fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
}

#[test]
fn an_append_only_file_takes_appends_of_any_length_past_the_hosts_cache() {
    let (directory, _backend, session) = serve(&["--allow-direct-io"]);
    let log = Log::new(directory.path());
    let client = session.client();
    let node = client.lookup(ROOT, "log").unwrap().nodeid;
    let open = client.open(node, APPENDING | libc::O_DIRECT).unwrap();
    // O_DIRECT was cleared by fcntl(2), as the length wants it.
    append(&client, node, open.fh, "new\n", APPENDING);
    assert_eq!(log.content(), "old\nnew\n");
}

#[test]
fn an_immutable_file_opens_for_reading_alone() {
    let (directory, _backend, session) = serve(&[]);
    let path = directory.path().join("file");
    fs::write(&path, "old\n").unwrap();
    chattr("+i", &path);
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let results = [APPENDING, libc::O_RDWR, libc::O_RDONLY].map(|flags| client.open(node, flags));
    chattr("-i", &path);
    let [appending, writing, reading] = results;
    assert_eq!(common::errno(appending), libc::EPERM);
    assert_eq!(common::errno(writing), libc::EPERM);
    reading.unwrap();
}
