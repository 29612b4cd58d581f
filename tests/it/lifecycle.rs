//! Stop, drain, reset, reboot, and a front end that disappears.

use std::fs;
use std::time::{Duration, Instant};

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Lock, ROOT, data};
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};

use crate::common;
use crate::monitor::waiting_requests;

/// How long the null store takes for a write in these tests.
const LATENCY: Duration = Duration::from_millis(100);

/// A back end whose writes take [`LATENCY`], and an open file.
fn slow(args: &[&str]) -> (Backend, Session, u64, u64) {
    let options = common::queues(2);
    let args: Vec<&str> = ["--store=null:100ms", "--cache=never"].iter().chain(args).copied().collect();
    let (backend, session) = common::serve_with(&args, options);
    let (node, fh) = common::create_file(&session);
    (backend, session, node, fh)
}

fn send_writes(session: &Session, node: u64, fh: u64, count: u64) -> Vec<Pending> {
    let bytes = vec![3; 4096];
    let client = session.client();
    let write = |i| data::write_request(node, fh, i * 4096, &bytes, WriteFlags::empty(), libc::O_RDWR);
    (0..count).map(|i| client.send(write(i)).unwrap()).collect()
}

#[test]
fn get_vring_base_waits_for_what_is_in_flight() {
    let (_backend, session, node, fh) = slow(&[]);
    let writes = send_writes(&session, node, fh, 8);
    std::thread::sleep(LATENCY / 4);
    assert!(!session.queue(1).is_done(writes[0].token).unwrap(), "the write is to be in flight");
    let base = session.stop_queue(1).unwrap();
    let used = session.queue(1).with_ring(|ring| ring.used_index());
    assert_eq!(used, base, "what was taken from the ring was not given back before the answer");
    // Nothing touches a ring that is stopped.
    std::thread::sleep(LATENCY * 2);
    assert_eq!(session.queue(1).with_ring(|ring| ring.used_index()), base);
    // Meanwhile the other queue serves.
    session.client().on(2).getattr(node).unwrap();
    session.start_queue(1).unwrap();
    for write in writes {
        session.finish(write).unwrap();
    }
    session.client().getattr(node).unwrap();
}

#[test]
fn a_stopped_queue_goes_on_where_it_was() {
    let (_backend, session) = common::serve(&[]);
    let client = session.client();
    for round in 0..20 {
        for _ in 0..round {
            client.getattr(ROOT).unwrap();
        }
        let base = session.stop_queue(1).unwrap();
        assert_eq!(base, session.queue(1).with_ring(|ring| ring.next_available()));
        session.start_queue(1).unwrap();
    }
}

#[test]
fn a_disabled_queue_rests() {
    let (_backend, session) = common::serve_with(&[], common::queues(2));
    session.connection().enable_ring(1, false).unwrap();
    let request = lanefsd_frontend::Request::new(fuse_protocol::opcode::Opcode::Statfs, ROOT).reply_data(80);
    let sent = session.client().send(request).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!session.queue(1).is_done(sent.token).unwrap());
    session.client().on(2).getattr(ROOT).unwrap();
    session.connection().enable_ring(1, true).unwrap();
    session.queue(1).kick().unwrap();
    session.finish(sent).unwrap();
}

#[test]
fn a_reboot_starts_with_a_clean_slate() {
    let (backend, session) = common::serve(&[]);
    let client = session.client();
    let mut descriptors = 0;
    for round in 0..4 {
        let (entry, open) = client.create(ROOT, format!("file-{round}"), libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"kept").unwrap();
        let limit = if round < 2 { usize::MAX } else { descriptors };
        let now = common::settled_descriptors(&backend, limit);
        assert!(now <= limit, "{descriptors} descriptors one boot earlier, now {now}");
        descriptors = now;
        session.reboot().unwrap();
        session.init().unwrap();
        assert!(common::errno(client.read(entry.nodeid, open.fh, 0, 10)) > 0, "a handle survived the reboot");
        let again = client.lookup(ROOT, format!("file-{round}")).unwrap().nodeid;
        assert_eq!(client.read_file(again).unwrap(), b"kept");
    }
}

#[test]
fn destroy_and_init_start_a_new_session() {
    let (_backend, session) = common::serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.destroy().unwrap();
    session.init().unwrap();
    assert!(common::errno(client.read(entry.nodeid, open.fh, 0, 10)) > 0, "a handle survived DESTROY");
    client.lookup(ROOT, "file").unwrap();
}

#[test]
fn an_init_without_destroy_drops_the_old_session() {
    let (_backend, session) = common::serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    // A guest whose kernel was killed says nothing before it boots again.
    session.init().unwrap();
    assert!(common::errno(client.read(entry.nodeid, open.fh, 0, 10)) > 0);
    client.lookup(ROOT, "file").unwrap();
}

#[test]
fn a_front_end_that_disappears_in_mid_write() {
    for args in [&[][..], &["--keep-listening"]] {
        let (mut backend, session, node, fh) = slow(args);
        send_writes(&session, node, fh, 32);
        drop(session);
        if args.is_empty() {
            backend.expect_success().unwrap();
        } else {
            let session = backend.connect(SessionOptions::default()).unwrap();
            session.client().lookup(ROOT, "file").unwrap();
        }
    }
}

#[test]
fn what_was_acknowledged_is_on_the_host() {
    let (mut backend, session) = common::serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let bytes: Vec<u8> = (0..65_536).map(|i| (i % 251) as u8).collect();
    let size = bytes.len() as u64;
    let write = |i: u64| {
        data::write_request(entry.nodeid, open.fh, i * size, &bytes, WriteFlags::empty(), libc::O_RDWR)
    };
    let sent: Vec<Pending> = (0..64).map(|i| client.send(write(i)).unwrap()).collect();
    let mut acknowledged = Vec::new();
    for (i, sent) in sent.into_iter().enumerate().take(20) {
        session.finish(sent).unwrap();
        acknowledged.push(i);
    }
    drop(session);
    backend.expect_success().unwrap();
    let host = fs::read(backend.path("file")).unwrap();
    for i in acknowledged {
        assert_eq!(&host[i * bytes.len()..(i + 1) * bytes.len()], bytes, "write {i}");
    }
}

#[test]
fn sigterm_finishes_what_is_in_flight() {
    let (mut backend, session, node, fh) = slow(&[]);
    let writes = send_writes(&session, node, fh, 4);
    std::thread::sleep(LATENCY / 4);
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    // What was taken is answered; chains that had not been taken stay where they are.
    let taken = session.queue(1).with_ring(|ring| ring.used_index());
    assert!(taken > 1, "not even one write was finished");
    for write in &writes {
        if session.queue(1).is_done(write.token).unwrap() {
            session.finish(*write).unwrap();
        }
    }
}

#[test]
fn closing_at_every_point_of_the_handshake() {
    use lanefsd_frontend::connection::Connection;
    use lanefsd_frontend::message::{code, protocol};
    let backend = common::start(&["--keep-listening"]);
    let steps: &[fn(&mut Connection)] = &[
        |_| (),
        |c| assert!(c.features().is_ok()),
        |c| assert!(c.protocol_features().is_ok()),
        |c| c.set_protocol_features(protocol::MQ | protocol::REPLY_ACK).unwrap(),
        |c| c.set_owner().unwrap(),
        |c| c.send_bytes(&[1, 0, 0], &[]).unwrap(),
        |c| c.send_raw(code::SET_MEM_TABLE, 1, 8, &[1, 0], &[]).unwrap(),
    ];
    for until in 0..steps.len() {
        let mut connection = Connection::connect(backend.socket()).unwrap();
        for step in &steps[..=until] {
            step(&mut connection);
        }
    }
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn a_second_front_end_does_not_disturb_the_first() {
    let (backend, session) = common::serve(&["--keep-listening"]);
    // Turned away or left waiting, as the daemon likes; but not served, and harmless.
    let second = std::os::unix::net::UnixStream::connect(backend.socket()).unwrap();
    session.client().getattr(ROOT).unwrap();
    drop(second);
    session.client().getattr(ROOT).unwrap();
    // The next one may come the moment the first has left.
    drop(session);
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
}

/// What a guest's queue does while another one ends the session again and again. Any of it may fail.
fn disturb(client: Client<'_>, owner: u64, until: Instant) {
    while Instant::now() < until {
        let Ok(entry) = client.lookup(ROOT, "file") else { continue };
        let Ok(open) = client.open(entry.nodeid, libc::O_RDWR) else { continue };
        let (node, fh) = (entry.nodeid, open.fh);
        let _ = client.setlk(node, fh, Lock::posix(owner, libc::F_RDLCK, 0, 9));
        let _ = client.setlkw(node, fh, Lock::flock(owner, libc::F_WRLCK));
        let _ = client.create(ROOT, format!("new{owner}"), libc::O_RDWR, 0o600, 0);
        let _ = client.opendir(ROOT);
    }
}

#[test]
fn sessions_that_end_among_requests_leave_nothing() {
    let backend = common::start(&["--keep-listening", "--flock", "--posix-lock"]);
    fs::write(backend.path("file"), "data").unwrap();
    let connect = || backend.connect(common::queues(4)).unwrap();
    drop(connect());
    let before = common::steady_descriptors(&backend);
    for round in 0..30 {
        let session = connect();
        let end = Instant::now() + Duration::from_millis(30);
        std::thread::scope(|scope| {
            for owner in 0..6 {
                let client = session.client().on(2 + owner % 3);
                scope.spawn(move || disturb(client, owner as u64, end + Duration::from_millis(20)));
            }
            while Instant::now() < end {
                session.client().on(round % 2).destroy().unwrap();
                session.init().unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
            // No other session follows.
            session.client().destroy().unwrap();
        });
        drop(session);
        let now = common::settled_descriptors(&backend, before);
        assert!(now <= before, "{before} descriptors before, {now} after round {round}");
        fs::File::open(backend.path("file")).unwrap().try_lock().expect("no lock outlives its session");
        let session = connect();
        let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
        assert_eq!(session.client().read_file(node).unwrap(), b"data");
    }
}

#[test]
fn destroy_ends_waits_for_locks() {
    for queue in [0, 1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("ctl");
        let socket = format!("--control-socket={}", control.display());
        let (_backend, session) = common::serve_with(&["--posix-lock", &socket], common::queues(2));
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let lock = |owner| Lock::posix(owner, libc::F_WRLCK, 0, 9);
        client.setlk(entry.nodeid, open.fh, lock(1)).unwrap();
        let waiting: Vec<Pending> = (1..=2)
            .map(|queue| {
                client.on(queue).send(lock(1 + queue as u64).waiting_request(entry.nodeid, open.fh)).unwrap()
            })
            .collect();
        common::wait_until(|| waiting_requests(&control) == 2, "both wait for the lock");
        client.on(queue).destroy().unwrap();
        for sent in waiting {
            assert_eq!(common::errno(session.finish(sent)), libc::EINTR);
        }
        assert_eq!(common::errno(client.getattr(ROOT)), libc::ENOTCONN);
        session.init().unwrap();
        client.getattr(ROOT).unwrap();
    }
}

/// A guest that boots another kernel, which the daemon refuses.
#[test]
fn an_init_that_is_refused_ends_the_old_session() {
    use fuse_protocol::flags::InitFlags;
    let (backend, session) = common::serve(&["--flock"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.setlk(entry.nodeid, open.fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
    assert_eq!(common::errno(session.init_with(26, InitFlags::empty())), libc::EPROTO);
    fs::File::open(backend.path("file")).unwrap().try_lock().unwrap();
    assert_eq!(common::errno(client.getattr(ROOT)), libc::ENOTCONN);
    session.init().unwrap();
    client.getattr(ROOT).unwrap();
}
