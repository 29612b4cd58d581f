//! Appends: to the end that counts, each as one piece, and to files that take nothing else.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_protocol::flags::{InitFlags, WriteFlags};
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::{Client, Segmentation, SessionOptions};

use crate::common;

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
        let (directory, _backend, session) = common::on_disk(args);
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
    let (directory, _backend, session) = common::on_disk(&["--posix-lock", "--flock"]);
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
    let (directory, _backend, session) = common::on_disk(&["--allow-direct-io"]);
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
    let (directory, _backend, session) = common::on_disk(&[]);
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

#[test]
fn an_append_of_many_segments_is_one_piece_for_the_host() {
    // More pages, each a segment of its own, than a system call takes.
    const PAGES: usize = 1500;
    const ROUNDS: usize = 5;
    let directory = common::disk_directory();
    let backend = common::starter().args(["--cache=never"]).share(directory.path()).start().unwrap();
    let options = SessionOptions { ring_size: 4096, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    let client = session.client().segmentation(Segmentation::Scattered);
    let flags = libc::O_RDWR | libc::O_APPEND;
    let (entry, open) = client.create(ROOT, "log", flags, 0o600, 0).unwrap();
    let path = directory.path().join("log");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A program on the host, or the daemon of another guest.
        scope.spawn(|| {
            let mut log = File::options().append(true).open(&path).unwrap();
            while !done.load(Ordering::Relaxed) {
                log.write_all(b"h").unwrap();
            }
        });
        for round in 0..ROUNDS {
            let bytes: Vec<u8> =
                (0..PAGES).flat_map(|page| [128 + (round + page) as u8 % 100; 4096]).collect();
            assert_eq!(
                client.write_with(entry.nodeid, open.fh, 0, &bytes, NONE, flags).unwrap(),
                bytes.len()
            );
        }
        done.store(true, Ordering::Relaxed);
    });
    let content = fs::read(path).unwrap();
    let mut pieces: Vec<_> = content.split(|&byte| byte == b'h').filter(|piece| !piece.is_empty()).collect();
    // Two of the guest's may stand side by side.
    pieces.retain(|piece| piece.len() % (PAGES * 4096) != 0);
    assert!(
        pieces.is_empty(),
        "pieces of {:?} bytes",
        pieces.iter().map(|piece| piece.len()).collect::<Vec<_>>()
    );
    let guest: Vec<u8> = content.into_iter().filter(|&byte| byte != b'h').collect();
    for (round, bytes) in guest.chunks(PAGES * 4096).enumerate() {
        for (page, bytes) in bytes.chunks(4096).enumerate() {
            assert!(bytes.iter().all(|&byte| byte == 128 + (round + page) as u8 % 100), "{round} {page}");
        }
    }
}

#[test]
fn a_synchronous_append_holds_up_nobody_before_the_end() {
    // Reads and writes in front of appends, all over the file's end, end as if one came after the other.
    let (directory, _backend, session) = common::on_disk(&["--cache=never"]);
    assert!(!session.init_flags().contains(InitFlags::WRITEBACK_CACHE));
    let flags = libc::O_RDWR | libc::O_APPEND | libc::O_DSYNC;
    let client = session.client();
    let (entry, open) = client.create(ROOT, "log", flags, 0o600, 0).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    std::thread::scope(|scope| {
        for writer in 0..4u8 {
            scope.spawn(move || {
                for _ in 0..50 {
                    // The offset is before, at or behind the end, as this guest happens to know it.
                    let offset = u64::from(writer) * 1000;
                    let record = [b'a' + writer; 100];
                    assert_eq!(client.write_with(node, fh, offset, &record, NONE, flags).unwrap(), 100);
                    let read = client.read(node, fh, 0, 200).unwrap();
                    assert!(read.chunks(100).all(|record| record.iter().all(|&byte| byte == record[0])));
                }
            });
        }
    });
    let content = fs::read(directory.path().join("log")).unwrap();
    assert_eq!(content.len(), 4 * 50 * 100);
    assert!(content.chunks(100).all(|record| record.iter().all(|&byte| byte == record[0])));
}
