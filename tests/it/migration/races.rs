//! What comes in the middle of a migration, or right behind it: the end of a session, of a process, another migration.

use std::collections::HashSet;
use std::fs;

use lanefsd::config::MigrationConfig;
use lanefsd::migration::format;
use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::{Lock, ROOT};
use tempfile::TempDir;

use super::sessions::{move_on, start};
use super::transfer::connect;
use crate::common;
use crate::survival::kill_worker;

const END: u64 = i64::MAX as u64;
/// So many that the search is under way for a while.
const FILES: u64 = 20_000;
const OPTIONS: [&str; 1] = ["--migration-on-error=guest-error"];

fn files() -> TempDir {
    let share = common::disk_directory();
    for number in 0..FILES {
        fs::write(share.path().join(format!("f{number}")), b"").unwrap();
    }
    share
}

/// The guest unmounts the share while its inodes are looked for.
#[test]
fn a_session_that_ends_right_after_a_load_leaves_nothing() {
    let share = files();
    let mut source = start(share.path(), &OPTIONS);
    let session = source.connect(SessionOptions::default()).unwrap();
    session.init().unwrap();
    let client = session.client();
    let mut old = HashSet::new();
    for number in 0..FILES {
        old.insert(client.lookup(ROOT, format!("f{number}")).unwrap().nodeid);
    }
    let mut backend = move_on(&session, &mut source, share.path(), &OPTIONS);
    session.client().destroy().unwrap();
    session.init_with(session.options().minor, session.options().init_flags).unwrap();
    let client = session.client();
    for number in (0..FILES).rev().take(5000) {
        let node = client.lookup(ROOT, format!("f{number}")).unwrap().nodeid;
        assert!(!old.contains(&node), "node {node} is of the session that has ended");
    }
    common::wait_for_words(&backend, "inodes that came with the guest are found");
    let known = old.iter().filter(|node| client.getattr(**node).is_ok()).count();
    assert_eq!(known, 0);
    drop(session);
    backend.expect_success().unwrap();
}

/// The process dies while inodes are looked for, and the guest moves on at once, with each inode once.
#[test]
fn a_migration_after_a_death_among_inodes_that_are_looked_for() {
    let share = files();
    let mut source = start(share.path(), &OPTIONS);
    let session = source.connect(SessionOptions::default()).unwrap();
    session.init().unwrap();
    for number in 0..FILES {
        session.client().lookup(ROOT, format!("f{number}")).unwrap();
    }
    session.stop_queues().unwrap();
    let state = session.save_device_state().unwrap();
    // The sooner, the more are left to be found.
    let first = start(share.path(), &OPTIONS);
    let connection = connect(&first);
    connection.load_device_state(&state).unwrap();
    kill_worker(&first);
    let again = connection.save_device_state().unwrap();
    let second = start(share.path(), &OPTIONS);
    let loaded = connect(&second).load_device_state(&again);
    assert!(loaded.is_ok(), "{loaded:?}: {}", second.stderr());
    drop(session);
    source.expect_success().unwrap();
}

/// The source's process dies after it has saved the share, and before the guest goes on there.
#[test]
fn a_source_that_dies_when_it_was_saved_keeps_its_locks() {
    let share = common::disk_directory();
    let backend = start(share.path(), &["--posix-lock", "--flock"]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.init().unwrap();
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 10, 19)).unwrap();
    client.setlk(node, fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
    let bases = session.stop_queues().unwrap();
    session.save_device_state().unwrap();
    kill_worker(&backend);
    session.start_queues_at(&bases).unwrap();
    let other = client.open(node, libc::O_RDWR).unwrap().fh;
    let posix = client.setlk(node, other, Lock::posix(2, libc::F_RDLCK, 15, END));
    let flock = client.setlk(node, other, Lock::flock(2, libc::F_RDLCK));
    assert_eq!((common::errno(posix), common::errno(flock)), (libc::EAGAIN, libc::EAGAIN));
}

/// A program that has locked many ranges through many descriptors of a file.
#[test]
fn locks_of_an_owner_move_once() {
    const RANGES: u64 = 200;
    const HANDLES: usize = 100;
    let share = common::disk_directory();
    let mut source = start(share.path(), &["--posix-lock"]);
    let session = source.connect(SessionOptions::default()).unwrap();
    session.init().unwrap();
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    let mut handles = vec![fh];
    handles.extend((1..HANDLES).map(|_| client.open(node, libc::O_RDWR).unwrap().fh));
    for number in 0..RANGES {
        client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, number * 2, number * 2)).unwrap();
    }
    for fh in &handles {
        client.setlk(node, *fh, Lock::posix(1, libc::F_WRLCK, 0, 0)).unwrap();
    }
    let bases = session.stop_queues().unwrap();
    let state = format::read(&session.save_device_state().unwrap(), &MigrationConfig::default()).unwrap();
    assert_eq!(state.share.locks.len(), usize::try_from(RANGES).unwrap() + HANDLES - 1);
    session.start_queues_at(&bases).unwrap();
    let mut backend = move_on(&session, &mut source, share.path(), &["--posix-lock"]);
    let client = session.client();
    // Those that the guest has locked through, until the last one is closed.
    let other = client.open(node, libc::O_RDWR).unwrap().fh;
    for fh in handles {
        for number in [0, RANGES / 2, RANGES - 1] {
            let lock = Lock::posix(2, libc::F_WRLCK, number * 2, number * 2);
            assert_eq!(common::errno(client.setlk(node, other, lock)), libc::EAGAIN);
        }
        client.release(node, fh).unwrap();
    }
    client.setlk(node, other, Lock::posix(2, libc::F_WRLCK, 0, END)).unwrap();
    drop(session);
    backend.expect_success().unwrap();
}

/// A program that writes a file under another name, links it and removes the other name (git does).
#[test]
fn a_file_whose_first_name_was_removed_moves_by_another_one() {
    for options in [&[][..], &["--inode-file-handles=never"]] {
        let share = common::disk_directory();
        let mut source = start(share.path(), options);
        let session = source.connect(SessionOptions::default()).unwrap();
        session.init().unwrap();
        let client = session.client();
        let directory = client.mkdir(ROOT, "directory", 0o755, 0).unwrap().nodeid;
        let (entry, open) = client.create(directory, "first", libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"data").unwrap();
        client.link(entry.nodeid, ROOT, "second").unwrap();
        client.unlink(directory, "first").unwrap();
        let mut backend = move_on(&session, &mut source, share.path(), options);
        let client = session.client();
        assert_eq!(client.read(entry.nodeid, open.fh, 0, 9).unwrap(), b"data");
        assert_eq!(client.getattr(entry.nodeid).unwrap().nlink, 1);
        assert_eq!(client.lookup(ROOT, "second").unwrap().nodeid, entry.nodeid);
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Files and directories that exist no more, and that the guest's kernel remembers or has open.
#[test]
fn what_was_removed_fails_no_migration() {
    for options in [&[][..], &["--inode-file-handles=never"], &["--migration-mode=auto"]] {
        let share = common::disk_directory();
        fs::write(share.path().join("file"), b"data").unwrap();
        fs::create_dir(share.path().join("directory")).unwrap();
        fs::create_dir(share.path().join("open")).unwrap();
        let mut source = start(share.path(), options);
        let session = source.connect(SessionOptions::default()).unwrap();
        session.init().unwrap();
        let client = session.client();
        let known = ["file", "directory", "open"].map(|name| client.lookup(ROOT, name).unwrap().nodeid);
        let listing = client.opendir(known[2]).unwrap().fh;
        fs::remove_file(share.path().join("file")).unwrap();
        fs::remove_dir(share.path().join("directory")).unwrap();
        let mut backend = move_on(&session, &mut source, share.path(), options);
        let client = session.client();
        // By its handle it is found, as long as the source has it.
        if options != ["--migration-mode=auto"] {
            assert_eq!(common::errno(client.getattr(known[0])), libc::ESTALE);
        }
        client.getattr(known[2]).unwrap();
        client.readdir(known[2], listing, 0, 4096).unwrap();
        drop(session);
        backend.expect_success().unwrap();
    }
}
