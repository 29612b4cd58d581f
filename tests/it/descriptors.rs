//! A guest that knows more inodes than the daemon may have descriptors.

use std::fs;
use std::os::unix::fs::MetadataExt;

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::{Change, ROOT};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;

/// RLIMIT_NOFILE of the back end.
const LIMIT: usize = 300;
const FILES: usize = 2000;

#[test]
fn a_guest_may_know_more_inodes_than_there_are_descriptors() {
    let directory = common::disk_directory();
    for number in 0..FILES {
        fs::write(directory.path().join(format!("file{number}")), format!("{number}")).unwrap();
    }
    let args = ["--rlimit-nofile=300", "--inode-file-handles=mandatory", "--xattr"];
    let backend = common::starter().args(args).share(directory.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let nodes: Vec<_> =
        (0..FILES).map(|number| client.lookup(ROOT, format!("file{number}")).unwrap().nodeid).collect();
    assert!(backend.descriptors().unwrap().len() <= LIMIT);

    for (number, &node) in nodes.iter().enumerate().rev() {
        let path = backend.path(&format!("file{number}"));
        assert_eq!(client.getattr(node).unwrap().ino, fs::metadata(&path).unwrap().ino());
        if number % 7 == 0 {
            let handle = client.open(node, libc::O_RDWR).unwrap().fh;
            assert_eq!(client.read(node, handle, 0, 100).unwrap(), number.to_string().as_bytes());
            client.release(node, handle).unwrap();
            client.setattr(node, Change::none().mode(0o600)).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            client.setxattr(node, "user.number", number.to_string().as_bytes(), 0).unwrap();
            assert_eq!(client.getxattr(node, "user.number", 10).unwrap(), number.to_string().as_bytes());
            client.link(node, ROOT, format!("link{number}")).unwrap();
            client.forget(node, 1).unwrap();
        }
        // The same inode is found by its name, as the same node.
        let again = client.lookup(ROOT, format!("file{number}")).unwrap();
        assert_eq!(again.nodeid, node);
        client.forget(node, 1).unwrap();
    }
    assert!(backend.descriptors().unwrap().len() <= LIMIT);

    // An inode that is gone on the host is gone for the guest.
    fs::remove_file(backend.path("file1")).unwrap();
    for number in 2..FILES {
        client.getattr(*nodes.get(number).unwrap()).unwrap();
    }
    assert_eq!(common::errno(client.getattr(*nodes.get(1).unwrap())), libc::ESTALE);
    for &node in &nodes {
        client.forget(node, 1).unwrap();
    }
    client.lookup(ROOT, "file2").unwrap();
}

#[test]
fn without_file_handles_descriptors_run_out() {
    let directory = common::disk_directory();
    for number in 0..LIMIT {
        fs::write(directory.path().join(format!("file{number}")), "").unwrap();
    }
    let args = ["--rlimit-nofile=300", "--inode-file-handles=never"];
    let backend = common::starter().args(args).share(directory.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let mut nodes = Vec::new();
    let refused = (0..LIMIT)
        .map(|number| client.lookup(ROOT, format!("file{number}")).map(|entry| nodes.push(entry.nodeid)))
        .find(Result::is_err)
        .unwrap();
    assert_eq!(common::errno(refused), libc::EMFILE);
    // What it lets go of can be had again.
    for node in nodes {
        client.forget(node, 1).unwrap();
    }
    client.lookup(ROOT, "file250").unwrap();
}

#[test]
fn handles_that_cannot_be_had_are_refused_at_the_start() {
    // /proc has no file handles.
    let (status, text) =
        common::starter().args(["--inode-file-handles=mandatory"]).share("/proc/sys").refuse().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(text.contains("file handles") && text.contains("--inode-file-handles"), "{text}");
}

#[test]
fn closing_a_file_needs_no_free_descriptor() {
    let (backend, session) = common::serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let pid = Pid::from_raw(common::serving_process(backend.pid()).cast_signed());
    let none = Rlimit { current: Some(3), maximum: Some(3) };
    prlimit(pid, Resource::Nofile, none).unwrap();
    client.write(entry.nodeid, open.fh, 0, b"text").unwrap();
    client.flush(entry.nodeid, open.fh, 1).unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
}

/// Bytes that an inode may take which the guest knows, with no descriptor open for it.
const BYTES_PER_INODE: usize = 250;
/// A bit more than what makes the tables grow, which is when they are at their largest.
const KNOWN: usize = 30_000;

#[test]
fn an_inode_that_the_guest_knows_takes_little_memory() {
    let directory = common::disk_directory();
    for number in 0..KNOWN {
        fs::File::create(directory.path().join(format!("file{number}"))).unwrap();
    }
    let args = ["--rlimit-nofile=300", "--inode-file-handles=mandatory", "--thread-pool-size=1"];
    let backend = common::starter().args(args).share(directory.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let look_up = |files: std::ops::Range<usize>| {
        for number in files {
            session.client().lookup(ROOT, format!("file{number}")).unwrap();
        }
    };
    // What serving takes is there before the first look.
    look_up(0..200);
    let before = backend.resident_kib().unwrap();
    look_up(0..KNOWN);
    let bytes = (backend.resident_kib().unwrap() - before) * 1024 / KNOWN;
    println!("{bytes} bytes per inode");
    assert!(bytes <= BYTES_PER_INODE, "{bytes} bytes per inode");
    assert!(backend.descriptors().unwrap().len() <= LIMIT);
}
