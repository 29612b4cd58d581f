//! POSIX and flock locks on the host, and requests that wait for them.
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

use std::time::{Duration, Instant};

use lanefsd::fuse::flags::{InitFlags, ReleaseFlags};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::session::Sent;
use lanefsd_frontend::{Backend, Client, Session};

const END: u64 = i64::MAX as u64;

fn locked(args: &[&str]) -> (Backend, Session, u64, u64) {
    let (backend, session) = common::serve(args);
    let (entry, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    (backend, session, entry.nodeid, open.fh)
}

fn wait_for_lock(client: &Client<'_>, node: u64, fh: u64, lock: Lock) -> Sent {
    let sent = client.send(lock.waiting_request(node, fh)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!client.queue().is_done(sent.token).unwrap(), "the lock was to be waited for");
    sent
}

#[test]
fn locks_are_off_by_default() {
    let (_backend, session, node, fh) = locked(&[]);
    assert!(!session.init_flags().intersects(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS));
    let lock = Lock::posix(1, libc::F_WRLCK, 0, END);
    assert_eq!(common::errno(session.client().setlk(node, fh, lock)), libc::ENOSYS);
}

#[test]
fn posix_locks_of_two_owners() {
    let (_backend, session, node, fh) = locked(&["--posix-lock"]);
    assert!(session.init_flags().contains(InitFlags::POSIX_LOCKS));
    let client = session.client();
    let other = client.open(node, libc::O_RDWR).unwrap().fh;
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, 99)).unwrap();
    let in_the_way = client.getlk(node, other, Lock::posix(2, libc::F_WRLCK, 50, 150)).unwrap();
    assert_eq!(in_the_way.typ, libc::F_WRLCK as u32);
    assert_eq!((in_the_way.start, in_the_way.end), (0, 99));
    assert_eq!(common::errno(client.setlk(node, other, Lock::posix(2, libc::F_RDLCK, 99, 99))), libc::EAGAIN);
    client.setlk(node, other, Lock::posix(2, libc::F_RDLCK, 100, END)).unwrap();
    // An owner's locks do not get into its own way.
    client.setlk(node, fh, Lock::posix(1, libc::F_RDLCK, 0, 49)).unwrap();
    client.setlk(node, other, Lock::posix(2, libc::F_RDLCK, 0, 49)).unwrap();
    client.setlk(node, fh, Lock::posix(1, libc::F_UNLCK, 0, END)).unwrap();
    let free = client.getlk(node, other, Lock::posix(3, libc::F_RDLCK, 0, 49)).unwrap();
    assert_eq!(free.typ, libc::F_UNLCK as u32);
    // FLUSH, as close(2) sends it, drops the owner's locks.
    client.flush(node, other, 2).unwrap();
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
}

#[test]
fn a_waiting_lock_holds_nobody_up_and_is_granted() {
    // More waiting requests than any default number of workers, and all on one queue.
    let (_backend, session, node, fh) = locked(&["--posix-lock"]);
    let client = session.client();
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
    let waiting: Vec<Sent> = (0..80)
        .map(|i| client.send(Lock::posix(100 + i, libc::F_RDLCK, 0, END).waiting_request(node, fh)).unwrap())
        .collect();
    let begin = Instant::now();
    for _ in 0..50 {
        client.getattr(node).unwrap();
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "requests were held up: {:?}", begin.elapsed());
    assert!(waiting.iter().all(|sent| !client.queue().is_done(sent.token).unwrap()));
    client.setlk(node, fh, Lock::posix(1, libc::F_UNLCK, 0, END)).unwrap();
    for sent in waiting {
        session.finish(sent).unwrap();
    }
}

#[test]
fn interrupt_ends_a_waiting_lock() {
    for args in [["--posix-lock"], ["--flock"]] {
        let (_backend, session, node, fh) = locked(&args);
        let client = session.client();
        let other = client.open(node, libc::O_RDWR).unwrap().fh;
        let lock = |owner| match args {
            ["--flock"] => Lock::flock(owner, libc::F_WRLCK),
            _ => Lock::posix(owner, libc::F_WRLCK, 0, END),
        };
        client.setlk(node, fh, lock(1)).unwrap();
        let sent = wait_for_lock(&client, node, other, lock(2));
        client.interrupt(sent).unwrap();
        assert_eq!(common::errno(session.finish(sent)), libc::EINTR, "{args:?}");
        // The lock was not taken on the way out.
        client.setlk(node, fh, Lock { kind: libc::F_UNLCK, ..lock(1) }).unwrap();
        client.setlk(node, fh, lock(1)).unwrap();
    }
}

#[test]
fn an_interrupt_for_nobody_is_ignored() {
    let (_backend, session, node, _fh) = locked(&["--posix-lock"]);
    let client = session.client();
    let sent = client
        .send(lanefsd_frontend::Request::new(lanefsd::fuse::opcode::Opcode::Statfs, node).reply_data(200));
    let sent = sent.unwrap();
    session.finish(sent).unwrap();
    client.interrupt(sent).unwrap();
    client.getattr(node).unwrap();
}

#[test]
fn flock_locks_belong_to_the_open_file() {
    let (_backend, session, node, fh) = locked(&["--flock"]);
    assert!(session.init_flags().contains(InitFlags::FLOCK_LOCKS));
    let client = session.client();
    let other = client.open(node, libc::O_RDWR).unwrap().fh;
    client.setlk(node, fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
    assert_eq!(common::errno(client.setlk(node, other, Lock::flock(2, libc::F_RDLCK))), libc::EAGAIN);
    let sent = wait_for_lock(&client, node, other, Lock::flock(2, libc::F_WRLCK));
    client.release_with(node, fh, ReleaseFlags::FLOCK_UNLOCK, 1).unwrap();
    session.finish(sent).unwrap();
    client.setlk(node, other, Lock::flock(2, libc::F_UNLCK)).unwrap();
}

#[test]
fn the_host_sees_the_locks() {
    let (backend, session, node, fh) = locked(&["--flock"]);
    let client = session.client();
    let file = std::fs::File::open(backend.path("file")).unwrap();
    client.setlk(node, fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
    assert!(file.try_lock().is_err());
    client.setlk(node, fh, Lock::flock(1, libc::F_UNLCK)).unwrap();
    file.try_lock().unwrap();
    assert_eq!(common::errno(client.setlk(node, fh, Lock::flock(1, libc::F_RDLCK))), libc::EAGAIN);
}

#[test]
fn a_front_end_that_leaves_ends_its_waiting_locks() {
    let (mut backend, session, node, fh) = locked(&["--posix-lock"]);
    let client = session.client();
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
    wait_for_lock(&client, node, fh, Lock::posix(2, libc::F_WRLCK, 0, END));
    drop(session);
    backend.expect_success().unwrap();
}
