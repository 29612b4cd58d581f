//! Whose POSIX locks are whose, and when they end: processes, open file descriptions, several handles.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use fuse_protocol::flags::ReleaseFlags;
use lanefsd::sys::locks::{ByteLock, LockType, ofd_get, ofd_set};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::{Backend, Client, Session};

use crate::common;

const END: u64 = i64::MAX as u64;
/// Owners: two open file descriptions, and two processes.
const DESCRIPTION: u64 = 0x1111;
const ANOTHER: u64 = 0x2222;
const PROCESS: u64 = 0x9999;
const CHILD: u64 = 0xaaaa;

fn locked() -> (Backend, Session, u64, u64) {
    common::serve_file(&["--posix-lock", "--flock"])
}

fn write(owner: u64, start: u64, end: u64) -> Lock {
    Lock::posix(owner, libc::F_WRLCK, start, end)
}

fn read(owner: u64, start: u64, end: u64) -> Lock {
    Lock::posix(owner, libc::F_RDLCK, start, end)
}

/// Whether a program on the host could lock all of the file.
fn free_on_host(backend: &Backend) -> bool {
    let file = File::options().read(true).write(true).open(backend.path("file")).unwrap();
    let all = ByteLock { kind: LockType::Write, start: 0, end: END };
    ofd_get(file.as_fd(), all).unwrap().is_none()
}

fn close(client: &Client<'_>, node: u64, fh: u64, process: u64) {
    client.flush(node, fh, process).unwrap();
    client.release(node, fh).unwrap();
}

#[test]
fn a_lock_of_an_open_file_description_ends_with_it() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let before = backend.descriptors().unwrap().len();
    for _ in 0..3 {
        let open = client.open(node, libc::O_RDWR).unwrap().fh;
        client.setlk(node, open, write(DESCRIPTION, 0, END)).unwrap();
        assert_eq!(common::errno(client.setlk(node, fh, write(ANOTHER, 5, 5))), libc::EAGAIN);
        assert!(!free_on_host(&backend));
        // One of two descriptors of it is closed: the lock stays.
        client.flush(node, open, PROCESS).unwrap();
        assert!(!free_on_host(&backend));
        close(&client, node, open, PROCESS);
        assert!(free_on_host(&backend));
        client.setlk(node, fh, write(ANOTHER, 5, 5)).unwrap();
        client.setlk(node, fh, Lock::posix(ANOTHER, libc::F_UNLCK, 0, END)).unwrap();
    }
    close(&client, node, fh, PROCESS);
    assert!(common::settled_descriptors(&backend, before - 1) < before);
}

#[test]
fn a_description_that_waited_for_its_lock_lets_go_of_it_too() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let open = client.open(node, libc::O_RDWR).unwrap().fh;
    client.setlk(node, fh, write(PROCESS, 0, 9)).unwrap();
    let waiting = client.send(write(DESCRIPTION, 0, END).waiting_request(node, open)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    client.flush(node, fh, PROCESS).unwrap();
    session.finish(waiting).unwrap();
    assert!(!free_on_host(&backend));
    close(&client, node, open, PROCESS);
    assert!(free_on_host(&backend));
}

#[test]
fn a_handle_takes_only_the_locks_along_that_were_taken_through_it() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let [one, two] = [(), ()].map(|()| client.open(node, libc::O_RDWR).unwrap().fh);
    client.setlk(node, one, read(DESCRIPTION, 0, 9)).unwrap();
    client.setlk(node, two, read(ANOTHER, 0, 9)).unwrap();
    client.release(node, one).unwrap();
    assert_eq!(common::errno(client.setlk(node, fh, write(PROCESS, 0, 0))), libc::EAGAIN);
    client.release_with(node, two, ReleaseFlags::FLOCK_UNLOCK, ANOTHER).unwrap();
    client.setlk(node, fh, write(PROCESS, 0, 0)).unwrap();
    assert!(!free_on_host(&backend));
}

#[test]
fn a_process_loses_its_locks_with_any_descriptor_of_the_file() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let other = client.open(node, libc::O_RDONLY).unwrap().fh;
    client.setlk(node, fh, write(PROCESS, 0, 9)).unwrap();
    client.flush(node, other, PROCESS).unwrap();
    assert!(free_on_host(&backend));
    // RELEASE may come late: what was locked through another handle meanwhile stays.
    client.setlk(node, fh, write(PROCESS, 0, 9)).unwrap();
    client.release(node, other).unwrap();
    assert!(!free_on_host(&backend));
}

#[test]
fn a_child_inherits_descriptors_and_no_locks() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    client.setlk(node, fh, write(PROCESS, 0, 9)).unwrap();
    assert_eq!(common::errno(client.setlk(node, fh, read(CHILD, 0, 0))), libc::EAGAIN);
    // The child closes what it has inherited.
    client.flush(node, fh, CHILD).unwrap();
    assert!(!free_on_host(&backend));
    client.flush(node, fh, PROCESS).unwrap();
    assert!(free_on_host(&backend));
}

#[test]
fn a_lock_that_a_thread_waits_for_outlives_its_processs_close() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    client.setlk(node, fh, write(ANOTHER, 0, 9)).unwrap();
    client.setlk(node, fh, write(PROCESS, 100, 109)).unwrap();
    let waiting = client.send(write(PROCESS, 0, 9).waiting_request(node, fh)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    // Another thread closes another descriptor of the file.
    client.flush(node, fh, PROCESS).unwrap();
    client.setlk(node, fh, write(CHILD, 100, 109)).unwrap();
    client.flush(node, fh, CHILD).unwrap();
    client.flush(node, fh, ANOTHER).unwrap();
    session.finish(waiting).unwrap();
    assert_eq!(common::errno(client.setlk(node, fh, read(CHILD, 0, 0))), libc::EAGAIN);
    client.flush(node, fh, PROCESS).unwrap();
    assert!(free_on_host(&backend));
}

/// The guest's RELEASE of a handle comes after its FLUSH, and may come much later.
#[test]
fn a_lock_that_was_granted_outlives_the_release_of_another_handle() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    for release_early in [true, false] {
        let [one, two] = [(), ()].map(|()| client.open(node, libc::O_RDWR).unwrap().fh);
        client.setlk(node, fh, write(ANOTHER, 50, 60)).unwrap();
        client.setlk(node, one, write(PROCESS, 0, 10)).unwrap();
        let wait = write(PROCESS, 50, 60).waiting_request(node, two);
        let waiting = client.send(wait).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        client.flush(node, one, PROCESS).unwrap();
        if release_early {
            client.release(node, one).unwrap();
        }
        client.setlk(node, fh, Lock::posix(ANOTHER, libc::F_UNLCK, 50, 60)).unwrap();
        session.finish(waiting).unwrap();
        if !release_early {
            client.release(node, one).unwrap();
        }
        client.setlk(node, fh, write(CHILD, 0, 10)).unwrap();
        assert_eq!(common::errno(client.setlk(node, fh, write(CHILD, 50, 60))), libc::EAGAIN);
        client.flush(node, fh, CHILD).unwrap();
        client.flush(node, fh, ANOTHER).unwrap();
        assert!(!free_on_host(&backend));
        close(&client, node, two, PROCESS);
        assert!(free_on_host(&backend));
    }
}

/// The guest's kernel may give a new file the number of one whose RELEASE is still under way.
#[test]
fn what_an_owner_locked_through_another_handle_stays() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let before = backend.descriptors().unwrap().len();
    for first_is_released_first in [true, false] {
        let [one, two] = [(), ()].map(|()| client.open(node, libc::O_RDWR).unwrap().fh);
        client.setlk(node, one, write(DESCRIPTION, 0, 9)).unwrap();
        client.setlk(node, two, write(DESCRIPTION, 20, 29)).unwrap();
        let (first, last) = if first_is_released_first { (one, two) } else { (two, one) };
        client.release(node, first).unwrap();
        assert_eq!(common::errno(client.setlk(node, fh, read(CHILD, 20, 20))), libc::EAGAIN);
        client.release(node, last).unwrap();
        client.flush(node, fh, CHILD).unwrap();
        assert!(free_on_host(&backend));
    }
    assert!(common::settled_descriptors(&backend, before) <= before);
}

/// FLUSH and RELEASE of one handle, at the same time as a lock is taken through another one.
#[test]
fn locks_survive_closes_that_race_with_them() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    let before = backend.descriptors().unwrap().len();
    for round in 0..300 {
        let owner = 0x10_0000 + round;
        let [one, two] = [(), ()].map(|()| client.open(node, libc::O_RDWR).unwrap().fh);
        client.setlk(node, one, write(owner, 100, 109)).unwrap();
        client.flush(node, one, owner).unwrap();
        let locking = client.send(write(owner, 200, 209).waiting_request(node, two)).unwrap();
        client.release(node, one).unwrap();
        session.finish(locking).unwrap();
        assert_eq!(common::errno(client.setlk(node, fh, read(CHILD, 200, 200))), libc::EAGAIN, "{round}");
        // Another thread looks while the file is closed.
        let looking = client.send(write(owner, 0, 1).waiting_request(node, two)).unwrap();
        client.flush(node, two, owner).unwrap();
        session.finish(looking).unwrap();
        close(&client, node, two, owner);
        client.flush(node, fh, CHILD).unwrap();
        assert!(free_on_host(&backend), "{round}");
    }
    assert!(common::settled_descriptors(&backend, before) <= before);
}

#[test]
fn getlk_names_the_process_that_is_in_the_way() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    for (owner, at) in [(PROCESS, 0), (CHILD, 100), (DESCRIPTION, 200)] {
        client.setlk(node, fh, write(owner, at, at + 49).by(owner as u32)).unwrap();
        // Neighbours become one lock.
        client.setlk(node, fh, write(owner, at + 50, at + 59).by(owner as u32)).unwrap();
    }
    for (owner, at) in [(PROCESS, 0), (CHILD, 100), (DESCRIPTION, 200)] {
        for range in [(at, at), (at + 59, at + 99), (at + 10, at + 20)] {
            let found = client.getlk(node, fh, read(ANOTHER, range.0, range.1)).unwrap();
            assert_eq!((found.typ, found.start, found.end), (libc::F_WRLCK as u32, at, at + 59));
            assert_eq!(found.pid, owner as u32);
        }
        // Its own locks are in nobody's own way.
        assert_eq!(client.getlk(node, fh, write(owner, at, at + 59)).unwrap().typ, libc::F_UNLCK as u32);
    }
    // What the host's programs hold is no process of the guest's.
    let file = File::options().read(true).write(true).open(backend.path("file")).unwrap();
    ofd_set(file.as_fd(), ByteLock { kind: LockType::Write, start: 500, end: 599 }).unwrap();
    let found = client.getlk(node, fh, write(ANOTHER, 550, END)).unwrap();
    assert_eq!((found.start, found.end, found.pid), (500, 599, 0));
}

#[test]
fn one_owner_changes_the_kind_of_its_locks() {
    let (_backend, session, node, fh) = locked();
    let client = session.client();
    client.setlk(node, fh, read(PROCESS, 0, 99)).unwrap();
    client.setlk(node, fh, read(CHILD, 50, 60)).unwrap();
    // An upgrade has to wait for other readers, and until then the old lock stays.
    assert_eq!(common::errno(client.setlk(node, fh, write(PROCESS, 0, 99))), libc::EAGAIN);
    assert_eq!(client.getlk(node, fh, write(ANOTHER, 0, 9)).unwrap().typ, libc::F_RDLCK as u32);
    client.setlk(node, fh, write(PROCESS, 0, 49)).unwrap();
    assert_eq!(client.getlk(node, fh, read(CHILD, 0, END)).unwrap().end, 49);
    client.setlk(node, fh, read(PROCESS, 0, 49)).unwrap();
    assert_eq!(client.getlk(node, fh, read(CHILD, 0, END)).unwrap().typ, libc::F_UNLCK as u32);
    client.setlk(node, fh, Lock::posix(PROCESS, libc::F_UNLCK, 10, 19)).unwrap();
    let found = client.getlk(node, fh, write(CHILD, 0, END)).unwrap();
    assert_eq!((found.start, found.end), (0, 9));
}

#[test]
fn ends_of_files_are_at_the_end_of_all_numbers() {
    let (_backend, session, node, fh) = locked();
    let client = session.client();
    for (start, end) in [(0, END), (END, END), (END - 1, END), (END - 1, END - 1), (1 << 62, END - 1)] {
        client.setlk(node, fh, write(PROCESS, start, end).by(7)).unwrap();
        let found = client.getlk(node, fh, read(CHILD, start, end)).unwrap();
        assert_eq!((found.start, found.end, found.pid), (start, end, 7));
        client.setlk(node, fh, Lock::posix(PROCESS, libc::F_UNLCK, 0, END)).unwrap();
    }
    for (start, end) in [(END + 1, END + 2), (0, u64::MAX), (9, 8)] {
        assert_eq!(common::errno(client.setlk(node, fh, write(PROCESS, start, end))), libc::EINVAL);
    }
}

/// Attack: locks of processes and open file descriptions that are never released.
/// Outcome: none is left on the host when the session ends.
#[test]
fn a_sessions_end_leaves_no_lock() {
    let (backend, session, node, fh) = locked();
    let client = session.client();
    for round in 0..2 {
        let (node, fh) = match round {
            0 => (node, fh),
            _ => {
                session.init().unwrap();
                let node = client.lookup(ROOT, "file").unwrap().nodeid;
                (node, client.open(node, libc::O_RDWR).unwrap().fh)
            }
        };
        client.setlk(node, fh, write(DESCRIPTION, 0, 9)).unwrap();
        client.setlk(node, fh, write(PROCESS, 10, END)).unwrap();
        client.setlk(node, fh, Lock::flock(PROCESS, libc::F_WRLCK)).unwrap();
        client.destroy().unwrap();
        assert!(free_on_host(&backend));
        File::open(backend.path("file")).unwrap().try_lock().unwrap();
    }
}
