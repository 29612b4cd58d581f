//! Locks: what is held stays held, who waits goes on to wait.

use std::fs::File;
use std::time::{Duration, Instant};

use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::session::Pending;

use crate::trial::{Moment, Trial, at_moments, errno};

const END: u64 = i64::MAX as u64;

/// Both kinds of lock on a file.
const KINDS: [fn(u64, i32) -> Lock; 2] =
    [|owner, kind| Lock::posix(owner, kind, 0, END), |owner, kind| Lock::flock(owner, kind)];

/// A file with two handles, which are released at the end.
fn with_handles(moments: &[Moment], scenario: impl Fn(&Trial, u64, u64, u64)) {
    at_moments(moments, &[], |trial| {
        let (node, one) = trial.file("file", b"");
        let two = trial.client().open(node, libc::O_RDWR).unwrap().fh;
        scenario(trial, node, one, two);
        trial.client().release(node, one).unwrap();
        trial.client().release(node, two).unwrap();
    });
}

const ALL: [Moment; 5] =
    [Moment::Never, Moment::Before, Moment::After, Moment::Unpublished, Moment::Unnotified];

#[test]
fn held_locks_stay_held() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            trial.die("GETATTR");
            client.getattr(node).unwrap();
            assert_eq!(errno(client.setlk(node, two, lock(2, libc::F_RDLCK))), libc::EAGAIN);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, two, lock(2, libc::F_WRLCK)).unwrap();
            assert_eq!(errno(client.setlk(node, one, lock(1, libc::F_RDLCK))), libc::EAGAIN);
        });
    }
}

/// The owner's ranges are known as before: they can be asked for, split and joined.
#[test]
fn held_ranges_stay_as_they_were() {
    with_handles(&ALL, |trial, node, one, two| {
        let client = trial.client();
        client.setlk(node, one, Lock::posix(1, libc::F_WRLCK, 0, 99)).unwrap();
        client.setlk(node, one, Lock::posix(1, libc::F_UNLCK, 40, 59)).unwrap();
        client.setlk(node, two, Lock::posix(2, libc::F_RDLCK, 200, 299)).unwrap();
        trial.die("GETATTR");
        client.getattr(node).unwrap();
        client.setlk(node, two, Lock::posix(2, libc::F_WRLCK, 40, 59)).unwrap();
        let found = client.getlk(node, two, Lock::posix(2, libc::F_WRLCK, 50, 99)).unwrap();
        assert_eq!((found.start, found.end, found.typ), (60, 99, libc::F_WRLCK as u32));
        let found = client.getlk(node, one, Lock::posix(1, libc::F_WRLCK, 100, 250)).unwrap();
        assert_eq!((found.start, found.end, found.typ), (200, 299, libc::F_RDLCK as u32));
        // An owner's own locks are not in its way, whichever handle it uses.
        client.setlk(node, two, Lock::posix(1, libc::F_WRLCK, 0, 39)).unwrap();
        client.flush(node, one, 1).unwrap();
        client.setlk(node, two, Lock::posix(2, libc::F_WRLCK, 0, END)).unwrap();
    });
}

#[test]
fn the_host_sees_a_held_lock() {
    with_handles(&ALL, |trial, node, one, _| {
        let client = trial.client();
        let host = File::open(trial.path("file")).unwrap();
        client.setlk(node, one, Lock::flock(1, libc::F_WRLCK)).unwrap();
        trial.die("GETATTR");
        client.getattr(node).unwrap();
        assert!(host.try_lock().is_err());
        client.setlk(node, one, Lock::flock(1, libc::F_UNLCK)).unwrap();
        host.try_lock().unwrap();
    });
}

#[test]
fn getlk() {
    with_handles(&ALL, |trial, node, one, two| {
        let client = trial.client();
        client.setlk(node, one, Lock::posix(1, libc::F_WRLCK, 10, 19)).unwrap();
        trial.die("GETLK");
        let found = client.getlk(node, two, Lock::posix(2, libc::F_RDLCK, 0, 99)).unwrap();
        assert_eq!((found.start, found.end, found.typ), (10, 19, libc::F_WRLCK as u32));
        let free = client.getlk(node, two, Lock::posix(2, libc::F_RDLCK, 0, 9)).unwrap();
        assert_eq!(free.typ, libc::F_UNLCK as u32);
    });
}

#[test]
fn setlk() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            trial.die("SETLK");
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            assert_eq!(errno(client.setlk(node, two, lock(2, libc::F_WRLCK))), libc::EAGAIN);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, two, lock(2, libc::F_WRLCK)).unwrap();
        });
    }
}

#[test]
fn setlk_of_a_held_lock() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            trial.die("SETLK");
            assert_eq!(errno(client.setlk(node, two, lock(2, libc::F_WRLCK))), libc::EAGAIN);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, two, lock(2, libc::F_WRLCK)).unwrap();
        });
    }
}

#[test]
fn setlk_that_unlocks() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            trial.die("SETLK");
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, two, lock(2, libc::F_WRLCK)).unwrap();
        });
    }
}

#[test]
fn setlkw_of_a_free_lock() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            trial.die("SETLKW");
            client.setlkw(node, one, lock(1, libc::F_WRLCK)).unwrap();
            assert_eq!(errno(client.setlk(node, two, lock(2, libc::F_WRLCK))), libc::EAGAIN);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, two, lock(2, libc::F_WRLCK)).unwrap();
        });
    }
}

/// Sends a SETLKW that has to wait.
fn wait(trial: &Trial, node: u64, fh: u64, lock: Lock) -> Pending {
    let sent = trial.client().send(lock.waiting_request(node, fh)).unwrap();
    expect_waiting(trial, sent);
    sent
}

fn expect_waiting(trial: &Trial, sent: Pending) {
    std::thread::sleep(Duration::from_millis(50));
    assert!(!trial.client().queue().is_done(sent.token).unwrap(), "the lock was to be waited for");
}

#[test]
fn a_waiting_setlkw_goes_on_to_wait() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            let sent = wait(trial, node, two, lock(2, libc::F_WRLCK));
            trial.die("GETATTR");
            client.getattr(ROOT).unwrap();
            expect_waiting(trial, sent);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            trial.session.finish(sent).unwrap();
            assert_eq!(errno(client.setlk(node, one, lock(1, libc::F_WRLCK))), libc::EAGAIN);
        });
    }
}

/// Sends INTERRUPT until the request has ended, as a guest does that gets EAGAIN.
fn interrupt(trial: &Trial, sent: Pending) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !trial.client().queue().is_done(sent.token).unwrap() {
        assert!(Instant::now() < deadline, "the request cannot be interrupted");
        if let Err(error) = trial.client().interrupt(sent) {
            assert_eq!(error.errno().map(|errno| errno.0), Some(libc::EAGAIN), "{error}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(errno(trial.session.finish(sent)), libc::EINTR);
}

#[test]
fn a_waiting_setlkw_can_be_interrupted_after_a_death() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            let sent = wait(trial, node, two, lock(2, libc::F_WRLCK));
            trial.die("GETATTR");
            client.getattr(ROOT).unwrap();
            expect_waiting(trial, sent);
            interrupt(trial, sent);
            // Nothing was taken on the way out.
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
        });
    }
}

#[test]
fn interrupt_of_a_waiting_setlkw() {
    for lock in KINDS {
        with_handles(&ALL, |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            let sent = wait(trial, node, two, lock(2, libc::F_WRLCK));
            trial.die("INTERRUPT");
            interrupt(trial, sent);
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
        });
    }
}

/// Before its wait, or as it is granted.
#[test]
fn setlkw_that_waits() {
    for lock in KINDS {
        with_handles(&[Moment::Never, Moment::Before, Moment::After], |trial, node, one, two| {
            let client = trial.client();
            client.setlk(node, one, lock(1, libc::F_WRLCK)).unwrap();
            trial.die("SETLKW");
            let sent = wait(trial, node, two, lock(2, libc::F_WRLCK));
            client.setlk(node, one, lock(1, libc::F_UNLCK)).unwrap();
            trial.session.finish(sent).unwrap();
            assert_eq!(errno(client.setlk(node, one, lock(1, libc::F_WRLCK))), libc::EAGAIN);
        });
    }
}
