//! POSIX and flock locks on the host, and requests that wait for them.

use std::time::{Duration, Instant};

use fuse_protocol::flags::{InitFlags, ReleaseFlags};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Client, Session};

use crate::common;

const END: u64 = i64::MAX as u64;

fn wait_for_lock(client: &Client<'_>, node: u64, fh: u64, lock: Lock) -> Pending {
    let sent = client.send(lock.waiting_request(node, fh)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!client.queue().is_done(sent.token).unwrap(), "the lock was to be waited for");
    sent
}

#[test]
fn locks_are_off_by_default() {
    let (_backend, session, node, fh) = common::serve_file(&[]);
    assert!(!session.init_flags().intersects(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS));
    let lock = Lock::posix(1, libc::F_WRLCK, 0, END);
    assert_eq!(common::errno(session.client().setlk(node, fh, lock)), libc::ENOSYS);
}

#[test]
fn posix_locks_of_two_owners() {
    let (_backend, session, node, fh) = common::serve_file(&["--posix-lock"]);
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
    let (_backend, session, node, fh) = common::serve_file(&["--posix-lock"]);
    let client = session.client();
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
    let waiting: Vec<Pending> = (0..80)
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
        let (_backend, session, node, fh) = common::serve_file(&args);
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
    let (_backend, session, node, _fh) = common::serve_file(&["--posix-lock"]);
    let client = session.client();
    let sent = client
        .send(lanefsd_frontend::Request::new(fuse_protocol::opcode::Opcode::Statfs, node).reply_data(200));
    let sent = sent.unwrap();
    session.finish(sent).unwrap();
    // It may not have come yet, for all that the daemon knows; a guest that has the answer knows better.
    assert_eq!(common::errno(client.interrupt(sent)), libc::EAGAIN);
    client.getattr(node).unwrap();
}

#[test]
fn flock_locks_belong_to_the_open_file() {
    let (_backend, session, node, fh) = common::serve_file(&["--flock"]);
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
    let (backend, session, node, fh) = common::serve_file(&["--flock"]);
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
    let (mut backend, session, node, fh) = common::serve_file(&["--posix-lock"]);
    let client = session.client();
    client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
    wait_for_lock(&client, node, fh, Lock::posix(2, libc::F_WRLCK, 0, END));
    drop(session);
    backend.expect_success().unwrap();
}

/// A queue beside the first one, and the file with a lock of owner 1.
fn with_two_queues(args: &[&str]) -> (Backend, Session, u64, u64) {
    let options = common::queues(2);
    let (backend, session) = common::serve_with(args, options);
    let (entry, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    session.client().setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
    (backend, session, entry.nodeid, open.fh)
}

fn unlock(client: &Client<'_>, node: u64, fh: u64, owner: u64) {
    client.setlk(node, fh, Lock::posix(owner, libc::F_UNLCK, 0, END)).unwrap();
}

fn getattrs(client: &Client<'_>, node: u64, count: u32) {
    for _ in 0..count {
        client.getattr(node).unwrap();
    }
}

#[test]
fn stopping_a_queue_keeps_locks_of_others_waiting() {
    let (_backend, session, node, fh) = with_two_queues(&["--posix-lock"]);
    let other = session.client().on(2);
    let read_lock = |owner| Lock::posix(owner, libc::F_RDLCK, 0, END);
    let stopped = wait_for_lock(&session.client(), node, fh, read_lock(2));
    let waiting: Vec<Pending> = (0..20).map(|i| wait_for_lock(&other, node, fh, read_lock(10 + i))).collect();
    session.stop_queue(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(waiting.iter().all(|sent| !session.queue(2).is_done(sent.token).unwrap()));
    unlock(&other, node, fh, 1);
    for sent in waiting {
        session.finish(sent).unwrap();
    }
    // The one of the queue that was stopped was not answered, and gets its lock when the queue goes on.
    assert!(!session.queue(1).is_done(stopped.token).unwrap());
    session.start_queue(1).unwrap();
    session.finish(stopped).unwrap();
}

/// QEMU's stop and cont: programs in the guest must not notice.
#[test]
fn a_wait_for_a_lock_goes_on_after_a_stop() {
    let (_backend, session, node, fh) = with_two_queues(&["--posix-lock"]);
    let (client, other) = (session.client(), session.client().on(2));
    // Requests before and after the waits are done: for one of these rounds the waits are the newest ones.
    for later in [0, 5] {
        client.getattr(node).unwrap();
        let waiting: Vec<Pending> = (0..3)
            .map(|i| {
                getattrs(&client, node, later);
                wait_for_lock(&client, node, fh, Lock::posix(20 + i, libc::F_RDLCK, 0, END))
            })
            .collect();
        getattrs(&client, node, later);
        for _ in 0..3 {
            session.stop_queue(1).unwrap();
            assert!(waiting.iter().all(|sent| !session.queue(1).is_done(sent.token).unwrap()));
            session.start_queue(1).unwrap();
            client.getattr(node).unwrap();
        }
        // A disabled queue is stopped, too.
        session.connection().enable_ring(1, false).unwrap();
        session.connection().enable_ring(1, true).unwrap();
        assert!(waiting.iter().all(|sent| !session.queue(1).is_done(sent.token).unwrap()));
        client.interrupt(waiting[1]).unwrap();
        assert_eq!(common::errno(session.finish(waiting[1])), libc::EINTR);
        unlock(&other, node, fh, 1);
        session.finish(waiting[0]).unwrap();
        session.finish(waiting[2]).unwrap();
        unlock(&other, node, fh, 20);
        unlock(&other, node, fh, 22);
        other.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
        client.getattr(node).unwrap();
    }
}

/// A reboot within QEMU: the queues are stopped, and come back with rings that were made anew.
#[test]
fn a_wait_for_a_lock_ends_with_its_ring() {
    let (_backend, session, node, fh) = with_two_queues(&["--posix-lock"]);
    let client = session.client();
    let lock = Lock::posix(2, libc::F_RDLCK, 0, END);
    for later in [0, 1] {
        // The ring's very first chain, and one that others have overtaken.
        wait_for_lock(&client.on(2), node, fh, lock);
        getattrs(&client.on(2), node, later);
        let (before, stopped) = (session.queue(2), session.stop_queue(2).unwrap());
        assert_eq!(stopped, if later == 0 { 0 } else { 2 });
        before.abandon();
        before.renew().unwrap();
        session.start_queue(2).unwrap();
        // A chain that the new ring does not know would break it.
        getattrs(&client.on(2), node, 5);
        session.stop_queue(2).unwrap();
        before.renew().unwrap();
        session.start_queue(2).unwrap();
    }
}

#[test]
fn an_interrupt_that_comes_too_early_is_to_be_sent_again() {
    let (_backend, session, node, fh) = with_two_queues(&["--posix-lock"]);
    let client = session.client();
    let sent = wait_for_lock(&client, node, fh, Lock::posix(2, libc::F_WRLCK, 0, END));
    // The number of a request that nobody has sent yet.
    let later = Pending { unique: sent.unique + 1000, ..sent };
    assert_eq!(common::errno(client.interrupt(later)), libc::EAGAIN);
    client.interrupt(sent).unwrap();
    assert_eq!(common::errno(session.finish(sent)), libc::EINTR);
}
