//! A front end that disconnects and comes back, as cloud-hypervisor does: its guest notices nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use faultfs::{Call, FILE, FaultFs};
use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::data::write_request;
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{Inflight, protocol};
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, kill_process};

use super::{IMMORTAL, SANDBOXES, kill_worker, next_worker, worker};
use crate::common;

const END: u64 = i64::MAX as u64;

fn start(args: &[&str]) -> Backend {
    let options = ["--keep-listening", "--log-level=info", "--xattr", "--posix-lock", "--flock", IMMORTAL];
    let backend = Backend::of(common::program()).args(options).args(args).start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    backend
}

/// A front end that may reconnect.
fn options(queues: usize) -> SessionOptions {
    let options = common::queues(queues);
    let protocol_features = options.protocol_features | protocol::INFLIGHT_SHMFD;
    SessionOptions { protocol_features, ..options }
}

fn reconnect(backend: &Backend, session: &Session) {
    session.reconnect(Connection::connect(backend.socket()).unwrap()).unwrap();
}

fn come_back(backend: &Backend, session: &Session) {
    session.disconnect();
    reconnect(backend, session);
}

/// What a guest may have open, locked or under way.
#[test]
fn all_that_a_guest_has_is_there_after_a_reconnect() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox]);
        let session = backend.connect(options(3)).unwrap();
        let client = session.client();
        let (file, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let (node, one) = (file.nodeid, open.fh);
        let two = client.open(node, libc::O_RDWR).unwrap().fh;
        let (gone, unlinked) = client.create(ROOT, "gone", libc::O_RDWR, 0o600, 0).unwrap();
        client.write(gone.nodeid, unlinked.fh, 0, b"unlinked").unwrap();
        client.unlink(ROOT, "gone").unwrap();
        client.setlk(node, one, Lock::posix(1, libc::F_WRLCK, 0, 99)).unwrap();
        client.setlk(node, one, Lock::flock(3, libc::F_WRLCK)).unwrap();
        let waiting = client.send(Lock::posix(2, libc::F_WRLCK, 0, END).waiting_request(node, two)).unwrap();
        let directory = client.mkdir(ROOT, "many", 0o755, 0).unwrap().nodeid;
        for name in 0..100 {
            client.mkdir(directory, format!("name-{name:03}"), 0o755, 0).unwrap();
        }
        let listing = client.opendir(directory).unwrap().fh;
        let (mut listed, mut offset) = (BTreeSet::new(), 0);
        let host = File::open(backend.path("file")).unwrap();
        for round in 0..10 {
            let entries = client.readdir(directory, listing, offset, 500).unwrap();
            offset = entries.last().map_or(offset, |last| last.offset);
            for entry in entries {
                assert!(listed.insert(entry.name), "an entry comes twice");
            }
            match round % 4 {
                0 => come_back(&backend, &session),
                3 => {
                    // While another worker begins.
                    let worker = next_worker(&backend);
                    kill_process(worker, Signal::KILL).unwrap();
                    come_back(&backend, &session);
                }
                1 => {
                    // The session waits, and a worker dies meanwhile.
                    session.disconnect();
                    kill_worker(&backend);
                    reconnect(&backend, &session);
                }
                _ => {
                    kill_worker(&backend);
                    come_back(&backend, &session);
                }
            }
            assert_eq!(client.read(gone.nodeid, unlinked.fh, 0, 20).unwrap(), b"unlinked");
            assert!(host.try_lock().is_err(), "the lock of flock(2) is held");
            assert!(client.lookup(directory, "name-050").is_ok() && client.lookup(ROOT, "gone").is_err());
            let in_the_way = client.getlk(node, two, Lock::posix(9, libc::F_WRLCK, 0, 200)).unwrap();
            assert_eq!((in_the_way.start, in_the_way.end), (0, 99));
            assert!(!client.queue().is_done(waiting.token).unwrap(), "the lock is waited for");
        }
        client.setlk(node, one, Lock::posix(1, libc::F_UNLCK, 0, END)).unwrap();
        session.finish(waiting).unwrap();
        common::every_queue_answers(&session);
    }
}

/// 32 of them: some were not begun, some are done, some wait for a lock.
#[test]
fn requests_in_flight_are_answered_once() {
    for round in 0..12 {
        let backend = start(&[SANDBOXES[round % 3]]);
        let session = backend.connect(options(2)).unwrap();
        let client = session.client();
        let log = client.create(ROOT, "log", libc::O_RDWR | libc::O_APPEND, 0o600, 0).unwrap();
        let (file, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        client.setlk(file.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, END)).unwrap();
        let wait = |number: u64| {
            let lock = Lock::posix(10 + number, libc::F_WRLCK, number, number);
            client.on(1 + number as usize % 2).send(lock.waiting_request(file.nodeid, open.fh)).unwrap()
        };
        let locks: Vec<_> = (0..8).map(wait).collect();
        let append = |number: u64| {
            let line = format!("{number:07}\n");
            let (node, flags) = (log.0.nodeid, libc::O_RDWR | libc::O_APPEND);
            let request =
                write_request(node, log.1.fh, 8 * number, line.as_bytes(), WriteFlags::empty(), flags);
            client.on(1 + number as usize % 2).send(request).unwrap()
        };
        let appended: Vec<_> = (0..24).map(append).collect();
        if round % 2 == 0 {
            std::thread::yield_now();
        }
        come_back(&backend, &session);
        for sent in appended {
            assert_eq!(session.finish(sent).unwrap().len(), 8, "the reply of a WRITE");
        }
        let lines = fs::read_to_string(backend.path("log")).unwrap();
        let once: BTreeSet<&str> = lines.lines().collect();
        assert_eq!((lines.lines().count(), once.len()), (24, 24), "{lines}");
        client.setlk(file.nodeid, open.fh, Lock::posix(1, libc::F_UNLCK, 0, END)).unwrap();
        locks.into_iter().for_each(|sent| drop(session.finish(sent).unwrap()));
        assert_eq!(session.queues().iter().map(|queue| queue.in_flight()).sum::<usize>(), 0);
    }
}

/// The storage takes longer than a worker has to drain: what it holds is served again.
#[test]
fn requests_for_slow_storage_are_answered_once() {
    common::own_mounts();
    let directory = common::disk_directory();
    let store = FaultFs::mount(directory.path()).unwrap();
    let options_of_daemon = ["--keep-listening", "--cache=never", "--log-level=debug", IMMORTAL];
    let backend = common::starter().args(options_of_daemon).share(directory.path()).start().unwrap();
    let session = backend.connect(options(2)).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, FILE).unwrap().nodeid;
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    store.delay(Duration::from_secs(1));
    let blocks: Vec<_> = (0..32u8).map(|number| [number + 1; 512]).collect();
    let send = |(number, block): (usize, &[u8; 512])| {
        let offset = 512 * number as u64;
        let request = write_request(node, fh, offset, block, WriteFlags::empty(), libc::O_RDWR);
        client.on(1 + number % 2).send(request).unwrap()
    };
    let sent: Vec<_> = blocks.iter().enumerate().map(send).collect();
    common::wait_until(|| store.under_way(Call::Write) > 0, "a request in the store");
    session.disconnect();
    reconnect(&backend, &session);
    store.delay(Duration::ZERO);
    for sent in sent {
        assert_eq!(session.finish(sent).unwrap().len(), 8, "the reply of a WRITE");
    }
    assert_eq!(client.read(node, fh, 0, 32 * 512).unwrap(), blocks.concat());
    common::wait_for_words(&backend, "requests were in flight");
    let words = backend.stderr();
    assert!(!words.contains(" 0 requests were in flight"), "{words}");
}

/// The guest's processors do not stop when its front end disconnects.
#[test]
fn requests_are_sent_while_the_front_end_is_gone() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox]);
        let session = backend.connect(options(2)).unwrap();
        let (file, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for number in 0..2u8 {
                let (client, done) = (session.client().on(usize::from(number) + 1), &done);
                scope.spawn(move || {
                    let mut rounds = 0u8;
                    while !done.load(Ordering::Relaxed) {
                        let block = [rounds; 4096];
                        let offset = u64::from(number) * 4096;
                        assert_eq!(client.write(file.nodeid, open.fh, offset, &block).unwrap(), 4096);
                        assert_eq!(client.read(file.nodeid, open.fh, offset, 4096).unwrap(), block);
                        let name = format!("name-{number}-{rounds}");
                        let made = client.mkdir(ROOT, &name, 0o755, 0).unwrap();
                        client.rename(ROOT, &name, ROOT, format!("{name}-new")).unwrap();
                        client.rmdir(ROOT, format!("{name}-new")).unwrap();
                        client.forget(made.nodeid, 1).unwrap();
                        rounds = rounds.wrapping_add(1);
                    }
                });
            }
            let _done = common::Done(&done);
            for round in 0..20 {
                if round % 3 == 0 {
                    kill_worker(&backend);
                }
                come_back(&backend, &session);
                session.client().getattr(file.nodeid).unwrap();
            }
        });
    }
}

/// A session that is kept takes what the guest had open, and no more, however often the next one does not want it.
#[test]
fn a_front_end_that_never_comes_back_leaves_nothing_to_the_next() {
    let mut backend = start(&["--sandbox=namespace"]);
    let mut descriptors = 0;
    for round in 0..100 {
        let session = backend.connect(options(2)).unwrap();
        let client = session.client();
        assert!(common::errno(client.getattr(2)) > 0, "the session of another front end");
        let (file, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        client.setlk(file.nodeid, open.fh, Lock::flock(3, libc::F_WRLCK)).unwrap();
        client.write(file.nodeid, open.fh, 0, b"content").unwrap();
        if round == 0 {
            descriptors = backend.descriptors().unwrap().len();
        }
        assert!(common::settled_descriptors(&backend, descriptors) <= descriptors);
        session.disconnect();
    }
    // One that cannot come back begins anew as well.
    let session = backend.connect(SessionOptions::default()).unwrap();
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    let open = session.client().open(node, libc::O_RDWR).unwrap();
    session.client().setlk(node, open.fh, Lock::flock(3, libc::F_WRLCK)).unwrap();
    drop(session);
    let session = backend.connect(options(2)).unwrap();
    session.disconnect();
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    File::open(backend.path("file")).unwrap().try_lock().unwrap();
}

/// Whoever connects meanwhile and starts no queue changes nothing.
#[test]
fn connections_that_are_no_front_end_do_not_end_the_session() {
    let backend = start(&["--sandbox=namespace"]);
    let session = backend.connect(options(1)).unwrap();
    let (file, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    session.client().unlink(ROOT, "file").unwrap();
    session.client().write(file.nodeid, open.fh, 0, b"unlinked").unwrap();
    session.disconnect();
    for bytes in [&[0xffu8; 12][..], b"GET / HTTP/1.0\r\n\r\n"] {
        let other = Connection::connect(backend.socket()).unwrap();
        other.send_bytes(bytes, &[]).unwrap();
        assert!(other.wait_closed(Duration::from_secs(10)).unwrap());
    }
    for wrong in [false, true] {
        let mut other = Connection::connect(backend.socket()).unwrap();
        other.set_owner().unwrap();
        other.set_features(other.features().unwrap()).unwrap();
        other.set_protocol_features(protocol::INFLIGHT_SHMFD | protocol::REPLY_ACK).unwrap();
        if wrong {
            // Not one that was offered.
            assert!(other.set_features(1 << 40).is_err());
        }
        drop(other);
    }
    kill_worker(&backend);
    // The front end itself, which fails before its queues run.
    for _ in 0..2 {
        let mut other = Connection::connect(backend.socket()).unwrap();
        other.set_owner().unwrap();
        other.set_features(other.features().unwrap()).unwrap();
        other.set_protocol_features(protocol::INFLIGHT_SHMFD | protocol::REPLY_ACK).unwrap();
        let inflight = session.inflight();
        let (region, memory) = inflight.as_ref().unwrap();
        other.set_inflight_region(region, memory).unwrap();
        other.features().unwrap();
    }
    reconnect(&backend, &session);
    assert_eq!(session.client().read(file.nodeid, open.fh, 0, 20).unwrap(), b"unlinked");
}

/// A region is compared, and nothing is read of it.
#[test]
fn foreign_stale_and_edited_regions_are_no_session() {
    type Edit = fn(&mut Inflight, &mut File);
    let foreign: Edit =
        |_, file| *file = memfd_create("lanefsd-inflight", MemfdFlags::CLOEXEC).unwrap().into();
    let truncated: Edit = |region, _| region.size -= 4096;
    let elsewhere: Edit = |region, _| region.offset = 4096;
    let more: Edit = |region, _| region.queues += 1;
    let larger: Edit = |region, _| region.queue_size *= 2;
    let pipe: Edit =
        |_, file| *file = std::io::pipe().unwrap().0.as_fd().try_clone_to_owned().unwrap().into();
    for (number, edit) in [foreign, truncated, elsewhere, more, larger, pipe].into_iter().enumerate() {
        let backend = start(&["--sandbox=namespace"]);
        let session = backend.connect(options(1)).unwrap();
        let node = session.client().mkdir(ROOT, "directory", 0o755, 0).unwrap().nodeid;
        session.disconnect();
        let (mut region, file) = session.inflight().take().unwrap();
        let mut file = file.try_clone().unwrap();
        edit(&mut region, &mut file);
        *session.inflight() = Some((region, file));
        reconnect(&backend, &session);
        let refused = common::errno(session.client().getattr(node));
        assert_eq!(refused, libc::ENOTCONN, "edit {number}: there is no session");
        common::wait_for_words(&backend, "a session that is not here");
        session.init().unwrap();
        session.client().lookup(ROOT, "directory").unwrap();
    }
}

/// What the front end writes into its region changes nothing, and it cannot take the memory away.
#[test]
fn the_content_of_a_region_does_not_matter() {
    use std::os::unix::fs::FileExt as _;
    let backend = start(&["--sandbox=namespace"]);
    let session = backend.connect(options(1)).unwrap();
    let node = session.client().mkdir(ROOT, "directory", 0o755, 0).unwrap().nodeid;
    if let Some((region, file)) = &*session.inflight() {
        assert!(file.set_len(0).is_err());
        file.write_all_at(&vec![0xff; usize::try_from(region.size).unwrap()], 0).unwrap();
    }
    come_back(&backend, &session);
    session.client().getattr(node).unwrap();
}

/// Queues that were stopped are not left: the guest was reset or has ended.
#[test]
fn a_front_end_that_stops_its_queues_ends_the_session() {
    let backend = start(&["--sandbox=namespace"]);
    let session = backend.connect(options(1)).unwrap();
    let node = session.client().mkdir(ROOT, "directory", 0o755, 0).unwrap().nodeid;
    session.stop_queue(0).unwrap();
    session.stop_queue(1).unwrap();
    come_back(&backend, &session);
    assert_eq!(common::errno(session.client().getattr(node)), libc::ENOTCONN);
    common::wait_for_words(&backend, "a session that is not here");
}

#[test]
fn a_session_that_waits_survives_an_upgrade() {
    for waits in [true, false] {
        let directory = common::open_directory();
        let program = directory.path().join("lanefsd");
        common::copy_program(&program);
        let backend = Backend::of(&program).args(["--keep-listening", IMMORTAL]).start().unwrap();
        let session = backend.connect(options(1)).unwrap();
        let node = session.client().mkdir(ROOT, "directory", 0o755, 0).unwrap().nodeid;
        for _ in 0..2 {
            if waits {
                session.disconnect();
                backend.upgrade().unwrap();
                reconnect(&backend, &session);
            } else {
                backend.upgrade().unwrap();
                come_back(&backend, &session);
            }
            session.client().getattr(node).unwrap();
        }
    }
}

#[test]
fn it_is_offered_only_where_a_session_can_be_kept() {
    for (args, offered) in [
        (&["--keep-listening"][..], true),
        (&[], false),
        (&["--no-survive", "--keep-listening"], false),
        (&["--no-survive"], false),
    ] {
        let backend = Backend::of(common::program()).args(args).start().unwrap();
        let session = backend.connect(options(1)).unwrap();
        let has = session.connection().protocol_features().unwrap() & protocol::INFLIGHT_SHMFD != 0;
        assert_eq!((has, worker(&backend).is_some() || args.contains(&"--no-survive")), (offered, true));
        assert_eq!(session.inflight().is_some(), offered);
        if !offered {
            assert!(session.connection().inflight_region(2, 128).is_err());
        }
    }
}
