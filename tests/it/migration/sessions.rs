//! A guest's session that moves between daemons on one share, as their users start them: in the sandbox, with a supervisor.

use std::fs;
use std::path::Path;

use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::{Backend, Segmentation, Session, SessionOptions};

use crate::common;
use crate::survival::kill_worker;

const END: u64 = i64::MAX as u64;

pub fn start(share: &Path, options: &[&str]) -> Backend {
    Backend::of(common::program()).args(["--log-level=info"]).args(options).share(share).start().unwrap()
}

/// Moves the session to a new daemon on this share; the old one ends.
pub fn move_on(session: &Session, from: &mut Backend, share: &Path, options: &[&str]) -> Backend {
    let to = start(share, options);
    let bases = session.stop_queues().unwrap();
    let state = session.save_device_state().unwrap_or_else(|error| panic!("{error}: {}", from.stderr()));
    let connection = Connection::connect(to.socket()).unwrap();
    let to = to;
    match session.move_to(connection, &state, &bases) {
        Ok(former) => drop(former),
        Err(error) => panic!("{error}: {}\nthe source: {}", to.stderr(), from.stderr()),
    }
    from.expect_success().unwrap();
    to
}

/// What a guest has of a share, and what has to be the same everywhere.
struct Guest {
    directory: u64,
    file: (u64, u64),
    unlinked: (u64, u64),
    listing: u64,
    unused: Vec<u64>,
}

impl Guest {
    fn new(session: &Session) -> Guest {
        let client = session.client();
        let directory = client.mkdir(ROOT, b"d\xfferectory", 0o755, 0).unwrap().nodeid;
        let (entry, open) = client.create(directory, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let file = (entry.nodeid, open.fh);
        client.setlk(file.0, file.1, Lock::posix(1, libc::F_WRLCK, 10, 19)).unwrap();
        client.setlk(file.0, file.1, Lock::flock(1, libc::F_WRLCK)).unwrap();
        let (entry, open) = client.create(directory, "unlinked", libc::O_RDWR, 0o600, 0).unwrap();
        let unlinked = (entry.nodeid, open.fh);
        client.write(unlinked.0, unlinked.1, 0, b"0000").unwrap();
        client.unlink(directory, "unlinked").unwrap();
        let unused = (0..300).map(|number| {
            let (entry, open) =
                client.create(directory, format!("f{number}"), libc::O_RDWR, 0o600, 0).unwrap();
            client.release(entry.nodeid, open.fh).unwrap();
            entry.nodeid
        });
        let unused = unused.collect();
        let listing = client.opendir(directory).unwrap().fh;
        Guest { directory, file, unlinked, listing, unused }
    }

    /// Works with all of it in the `round`th daemon.
    fn work(&self, session: &Session, round: u64) {
        let client = session.client();
        let (node, fh) = self.file;
        assert_eq!(client.write(node, fh, round, b"x").unwrap(), 1);
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), vec![b'x'; usize::try_from(round + 1).unwrap()]);
        let other = client.open(node, libc::O_RDWR).unwrap().fh;
        let lock = Lock::posix(2, libc::F_RDLCK, 15, END);
        assert_eq!(common::errno(client.setlk(node, other, lock)), libc::EAGAIN);
        assert_eq!(common::errno(client.setlk(node, other, Lock::flock(2, libc::F_RDLCK))), libc::EAGAIN);
        client.setlk(node, other, Lock::posix(2, libc::F_RDLCK, 20, END)).unwrap();
        client.release(node, other).unwrap();
        let (node, fh) = self.unlinked;
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"0000");
        assert_eq!(client.getattr(node).unwrap().nlink, 0);
        let names = client.readdir(self.directory, self.listing, 0, 1 << 16).unwrap();
        assert_eq!(names.len(), 303);
        // Names lead to the nodes that the guest has.
        for (number, node) in self.unused.iter().enumerate() {
            assert_eq!(client.lookup(self.directory, format!("f{number}")).unwrap().nodeid, *node);
            client.forget(*node, 1).unwrap();
            client.getattr(*node).unwrap();
        }
        common::every_queue_answers(session);
    }
}

const LOCKS: [&str; 2] = ["--posix-lock", "--flock"];
/// The defaults, and each other way to find inodes and to deal with those that are missing.
const WAYS: [&[&str]; 6] = [
    &["--posix-lock", "--flock"],
    &["--posix-lock", "--flock", "--migration-confirm-paths"],
    &["--posix-lock", "--flock", "--migration-mode=auto"],
    &["--posix-lock", "--flock", "--migration-mode=auto", "--migration-on-error=guest-error"],
    &["--posix-lock", "--flock", "--migration-mode=file-handles"],
    &["--posix-lock", "--flock", "--migration-on-error=guest-error", "--inode-file-handles=never"],
];

/// A daemon on this share, and a guest with files.
fn begin(share: &Path, options: &[&str]) -> (Backend, Session, Guest) {
    let backend = start(share, options);
    let session = backend.connect(common::queues(2)).unwrap();
    let guest = Guest::new(&session);
    (backend, session, guest)
}

#[test]
fn a_session_moves_there_and_back_several_times() {
    for options in WAYS {
        let share = common::disk_directory();
        let (mut backend, session, guest) = begin(share.path(), options);
        for round in 0..4 {
            guest.work(&session, round);
            backend = move_on(&session, &mut backend, share.path(), options);
        }
        guest.work(&session, 4);
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn a_worker_that_dies_after_a_load_loses_nothing() {
    for options in WAYS {
        let share = common::disk_directory();
        let (mut backend, session, guest) = begin(share.path(), options);
        for round in 0..3 {
            backend = move_on(&session, &mut backend, share.path(), options);
            kill_worker(&backend);
            guest.work(&session, round);
            kill_worker(&backend);
        }
        guest.work(&session, 3);
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn the_source_goes_on_with_its_locks_after_a_failed_migration() {
    let share = common::disk_directory();
    let (mut backend, session, guest) = begin(share.path(), &LOCKS);
    guest.work(&session, 0);
    for round in 1..4 {
        let bases = session.stop_queues().unwrap();
        let state = session.save_device_state().unwrap();
        // A destination where nothing of it exists.
        let elsewhere = common::disk_directory();
        let to = start(elsewhere.path(), &LOCKS);
        let connection = Connection::connect(to.socket()).unwrap();
        assert!(session.move_to(connection, &state, &bases).is_err());
        common::wait_for_words(&to, "cannot be found here");
        session.start_queues_at(&bases).unwrap();
        guest.work(&session, round);
    }
    // And still moves.
    let mut to = move_on(&session, &mut backend, share.path(), &LOCKS);
    guest.work(&session, 4);
    drop(session);
    to.expect_success().unwrap();
}

/// Two files change their names while the guest is on its way. By names that is noticed, and by handles they are found.
#[test]
fn a_file_that_the_host_renamed_or_replaced_is_no_other_one() {
    for (options, finds) in [(&[][..], false), (&["--migration-mode=file-handles"], true)] {
        let share = common::disk_directory();
        let [a, b, c] = ["a", "b", "c"].map(|name| share.path().join(name));
        fs::write(&a, "a").unwrap();
        fs::write(&b, "b").unwrap();
        let backend = start(share.path(), options);
        let session = backend.connect(SessionOptions::default()).unwrap();
        let nodes = ["a", "b"].map(|name| session.client().lookup(ROOT, name).unwrap().nodeid);
        let open = session.client().open(nodes[0], libc::O_RDWR).unwrap().fh;
        let bases = session.stop_queues().unwrap();
        let state = session.save_device_state().unwrap();
        fs::rename(&a, &c).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(&c, &b).unwrap();
        let to = start(share.path(), options);
        let moved = session.move_to(Connection::connect(to.socket()).unwrap(), &state, &bases);
        assert_eq!(moved.is_ok(), finds, "{options:?}: {}", to.stderr());
        if !finds {
            common::wait_for_words(&to, "cannot be found here");
            continue;
        }
        session.client().write(nodes[0], open, 0, b"A").unwrap();
        assert_eq!([&a, &b].map(|path| fs::read_to_string(path).unwrap()), ["b", "A"]);
        assert_eq!(["b", "a"].map(|name| session.client().lookup(ROOT, name).unwrap().nodeid), nodes);
    }
}

/// Somebody else takes a lock that the guest has, while it is on its way.
#[test]
fn a_handle_that_lost_its_lock_is_an_error_in_each_process() {
    let share = common::disk_directory();
    let options = ["--flock", "--migration-on-error=guest-error"];
    let backend = start(share.path(), &options);
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    let free = client.open(node, libc::O_RDWR).unwrap().fh;
    client.setlk(node, fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
    let bases = session.stop_queues().unwrap();
    let state = session.save_device_state().unwrap();
    let thief = fs::File::open(share.path().join("file")).unwrap();
    rustix::fs::flock(&thief, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let to = start(share.path(), &options);
    session.move_to(Connection::connect(to.socket()).unwrap(), &state, &bases).unwrap();
    let client = session.client();
    for _ in 0..3 {
        assert_eq!(common::errno(client.write(node, fh, 0, b"x")), libc::EIO);
        assert_eq!(common::errno(client.read(node, fh, 0, 1)), libc::EIO);
        client.write(node, free, 0, b"x").unwrap();
        kill_worker(&to);
    }
    // Until it is closed.
    assert_eq!(common::errno(client.release(node, fh)), libc::EIO);
    assert_eq!(common::errno(client.write(node, fh, 0, b"x")), libc::EBADF);
}

/// Requests that came after one that waits for a lock have their replies, so no index of the ring leads to it any more.
#[test]
fn a_request_that_waits_for_a_lock_waits_on_elsewhere() {
    let share = common::disk_directory();
    let options = ["--posix-lock", "--flock"];
    let mut backend = start(share.path(), &options);
    let session = backend.connect(common::queues(2)).unwrap();
    let client = session.client();
    let (node, one) = common::create_file(&session);
    let other = client.open(node, libc::O_RDWR).unwrap().fh;
    let (mine, whole) = (Lock::flock(1, libc::F_WRLCK), Lock::posix(3, libc::F_WRLCK, 0, END));
    client.setlk(node, one, mine).unwrap();
    client.setlk(node, one, whole).unwrap();
    let waits = [
        (1, Lock::flock(2, libc::F_WRLCK).waiting_request(node, other)),
        (2, Lock::posix(4, libc::F_WRLCK, 5, 9).waiting_request(node, other)),
    ];
    let waits = waits.map(|(queue, request)| session.send(queue, &request, Segmentation::default()).unwrap());
    for _ in 0..3 {
        for _ in 0..10 {
            common::every_queue_answers(&session);
        }
        backend = move_on(&session, &mut backend, share.path(), &options);
        kill_worker(&backend);
    }
    common::every_queue_answers(&session);
    let client = session.client();
    client.setlk(node, one, Lock { kind: libc::F_UNLCK, ..mine }).unwrap();
    client.setlk(node, one, Lock { kind: libc::F_UNLCK, ..whole }).unwrap();
    for wait in waits {
        session.finish(wait).unwrap();
    }
    // They are held now.
    assert_eq!(common::errno(client.setlk(node, one, mine)), libc::EAGAIN);
    assert_eq!(common::errno(client.setlk(node, one, whole)), libc::EAGAIN);
    drop(session);
    backend.expect_success().unwrap();
}
