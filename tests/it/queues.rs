//! Many queues, many workers: nothing slow holds up what is quick, and notifications are kept few.

use std::time::{Duration, Instant};

use fuse_protocol::abi::GetattrIn;
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::{Backend, Request, Segmentation, Session, SessionOptions};

use crate::common;

#[test]
fn a_slow_request_does_not_hold_up_the_next() {
    let (_backend, session) = common::serve(&["--store=null:400ms", "--cache=never"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let bytes = [1; 512];
    let write = |i: u64| {
        data::write_request(entry.nodeid, open.fh, i * 512, &bytes, WriteFlags::empty(), libc::O_RDWR)
    };
    let begin = Instant::now();
    let writes: Vec<_> = (0..4).map(|i| client.send(write(i)).unwrap()).collect();
    client.getattr(entry.nodeid).unwrap();
    client.lookup(ROOT, "file").unwrap();
    client.forget(entry.nodeid, 1).unwrap();
    assert!(begin.elapsed() < Duration::from_millis(300), "held up for {:?}", begin.elapsed());
    assert!(writes.iter().all(|write| !session.queue(1).is_done(write.token).unwrap()));
    for write in writes {
        session.finish(write).unwrap();
    }
    // Four writes at once, not one after the other.
    assert!(begin.elapsed() < Duration::from_millis(1200), "the writes took {:?}", begin.elapsed());
}

#[test]
fn every_size_of_the_worker_pool_serves() {
    for workers in ["0", "1", "2", "64"] {
        let pool = format!("--thread-pool-size={workers}");
        let options = common::queues(2);
        let (_backend, session) = common::serve_with(&[&pool], options);
        std::thread::scope(|scope| {
            for i in 0..4usize {
                let session = &session;
                scope.spawn(move || {
                    let client = session.client().on(1 + i % 2);
                    let (entry, open) = client.create(ROOT, format!("f{i}"), libc::O_RDWR, 0o600, 0).unwrap();
                    for at in 0..200 {
                        let piece = [at as u8; 100];
                        client.write(entry.nodeid, open.fh, at * 100, &piece).unwrap();
                        assert_eq!(client.read(entry.nodeid, open.fh, at * 100, 100).unwrap(), piece);
                    }
                    client.release(entry.nodeid, open.fh).unwrap();
                });
            }
        });
    }
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let options = common::queues(4);
    let (backend, session) = common::serve_with(&[], options);
    for queue in 1..=4 {
        session.client().on(queue).getattr(ROOT).unwrap();
    }
    // What is left from start-up and from spare workers settles first.
    std::thread::sleep(Duration::from_millis(300));
    let before = backend.cpu_time().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let spent = backend.cpu_time().unwrap() - before;
    assert!(spent <= Duration::from_millis(20), "{spent:?} of CPU in an idle second");
}

#[test]
fn no_notification_that_was_not_asked_for() {
    let (_backend, session) = common::serve(&[]);
    let queue = session.queue(1);
    session.client().getattr(ROOT).unwrap();
    queue.with_ring(|ring| ring.refuse_calls());
    // Nobody waits, so the eventfd is read only here.
    let _ = queue.call_event().read();
    let request = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default()).reply_data(104);
    let before = queue.with_ring(|ring| ring.used_index());
    for _ in 0..100 {
        session.send(1, &request, Segmentation::Linux).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while queue.with_ring(|ring| ring.used_index()).wrapping_sub(before) < 100 {
        assert!(Instant::now() < deadline, "the requests were not served");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(queue.call_event().read().is_err(), "EVENT_IDX was ignored");
    while queue.try_complete().unwrap().is_some() {}
}

#[test]
fn a_full_ring_of_requests_at_once() {
    let options = SessionOptions { queues: 4, ring_size: 256, ..SessionOptions::default() };
    let (_backend, session) = common::serve_with(&[], options);
    let request = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default()).reply_data(104);
    for round in 0..20u64 {
        for queue in 1..=4 {
            let chain = |i| {
                request.to_chain(session.memory(), 2 + round * 1000 + i, Segmentation::Linux, 256).unwrap()
            };
            session.queue(queue).submit_batch((0..256).map(chain)).unwrap();
        }
        for queue in 1..=4 {
            let mut back = 0;
            while let Some(completion) = session.queue(queue).complete().unwrap() {
                lanefsd_frontend::request::Reply::of(&completion).unwrap().success().unwrap();
                back += 1;
            }
            assert_eq!(back, 256);
        }
    }
}

#[test]
fn a_slow_request_does_not_hold_back_the_news_of_fast_ones() {
    for workers in ["1", "16"] {
        let pool = format!("--thread-pool-size={workers}");
        let (_backend, session) = common::serve(&["--store=null:1s", "--cache=never", &pool]);
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        // Teaches the daemon that requests are fast: a handle that does not exist needs no system call.
        for _ in 0..200 {
            assert_eq!(common::errno(client.read(entry.nodeid, 99_999, 0, 1)), libc::EBADF);
        }
        let queue = session.queue(1);
        let _ = queue.call_event().read();
        assert!(!queue.with_ring(|ring| ring.ask_for_call()), "all requests were waited for");
        let fast = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default()).reply_data(104);
        let slow = data::write_request(entry.nodeid, open.fh, 0, b"x", WriteFlags::empty(), libc::O_RDWR);
        let requests = [&fast, &slow, &fast];
        let chain = |(i, request): (u64, &&Request<'_>)| {
            request.to_chain(session.memory(), 90_000 + 2 * i, Segmentation::Linux, 64).unwrap()
        };
        let begin = Instant::now();
        queue.submit_batch((0..).zip(&requests).map(chain)).unwrap();
        while queue.call_event().read().is_err() {
            assert!(begin.elapsed() < Duration::from_millis(500), "no news for {:?}", begin.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
        queue.drain().unwrap();
    }
}

/// Busy-poll hits of queue 1 in 500 requests one after the other.
fn busy_poll_hits(backend: &mut Backend, session: Session) -> u64 {
    let client = session.client();
    for _ in 0..500 {
        // What is refused at once is fast on any machine, and no worker polls after slow requests.
        assert_eq!(common::errno(client.read(ROOT, 99_999, 0, 1)), libc::EBADF);
    }
    drop(session);
    common::wait_for_words(backend, "busy-poll hits");
    let stderr = backend.stderr();
    let line = stderr.lines().rfind(|line| line.contains("queue 1: ")).unwrap();
    let count = line.strip_suffix(" busy-poll hits").unwrap().rsplit(' ').next().unwrap();
    count.parse().unwrap()
}

#[test]
fn busy_polling_finds_a_guest_that_answers_at_once() {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        println!("with one CPU no worker polls: not tested");
        return;
    }
    // Where other programs take the CPUs, a request may look slow: then once more.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (mut backend, session) = common::serve(&["--poll-time=1000"]);
        if busy_poll_hits(&mut backend, session) > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "there was no busy-poll hit");
    }
    let (mut backend, session) = common::serve(&["--poll-time=0"]);
    assert_eq!(busy_poll_hits(&mut backend, session), 0);
}

/// Sets queue 1 up as QEMU does when it goes on without irqfds: the guest's call comes last.
fn start_without_call(session: &Session, base: u16) {
    use lanefsd_frontend::message::{VringAddress, VringState, code};
    let (connection, queue) = (session.connection(), session.queue(1));
    let state = |value| VringState { index: 1, value };
    queue.with_ring(|ring| {
        let (descriptors, available, used) = ring.user_addresses();
        let address = VringAddress { index: 1, flags: 0, descriptors, used, available, log: 0 };
        connection.send(code::SET_VRING_NUM, &state(ring.size() as u32), &[]).unwrap();
        connection.send(code::SET_VRING_BASE, &state(base.into()), &[]).unwrap();
        connection.send(code::SET_VRING_ADDR, &address, &[]).unwrap();
    });
    connection.set_vring_kick(1, Some(queue.kick_event())).unwrap();
    connection.enable_ring(1, true).unwrap();
}

fn wait_for_used(session: &Session, index: u16) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while session.queue(1).with_ring(|ring| ring.used_index()) != index {
        assert!(Instant::now() < deadline, "the requests were not served");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn replies_before_the_call_descriptor_are_announced() {
    use lanefsd_frontend::message::feature;
    for features in [feature::EVENT_IDX, 0] {
        let features = features | feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::INDIRECT_DESC;
        let (_backend, session) =
            common::serve_with(&[], SessionOptions { features, ..SessionOptions::default() });
        let queue = session.queue(1);
        let request = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default()).reply_data(104);
        for stopped_again in [false, true] {
            let base = session.stop_queue(1).unwrap();
            let _ = queue.call_event().read();
            queue.with_ring(|ring| ring.ask_for_call());
            let waiting: Vec<_> =
                (0..3).map(|_| session.send(1, &request, Segmentation::Linux).unwrap()).collect();
            start_without_call(&session, base);
            wait_for_used(&session, base.wrapping_add(3));
            assert!(queue.call_event().read().is_err());
            if stopped_again {
                session.stop_queue(1).unwrap();
                session.start_queue(1).unwrap();
            } else {
                session.connection().set_vring_call(1, Some(queue.call_event())).unwrap();
            }
            // Nobody looks at the ring: the notification alone says that there is something.
            queue.call_event().read().expect("the guest hears of what was given back before");
            for sent in waiting {
                session.finish(sent).unwrap();
            }
            // A call that comes later has nothing to announce.
            session.connection().set_vring_call(1, Some(queue.call_event())).unwrap();
            assert!(queue.call_event().read().is_err());
            session.client().getattr(ROOT).unwrap();
        }
    }
}

#[test]
fn workers_exit_after_a_burst_and_some_stay() {
    let (backend, session) = common::serve(&["--store=null:100ms", "--cache=never"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let before = backend.threads().unwrap();
    let burst = |count: u64| {
        let begin = Instant::now();
        let write = |i| {
            data::write_request(entry.nodeid, open.fh, i * 512, &[1; 512], WriteFlags::empty(), libc::O_RDWR)
        };
        let sent: Vec<_> = (0..count).map(|i| client.send(write(i)).unwrap()).collect();
        sent.into_iter().for_each(|sent| drop(session.finish(sent).unwrap()));
        begin.elapsed()
    };
    burst(64);
    let grown = backend.threads().unwrap();
    assert!(grown >= before + 8, "{before} threads before, {grown} after the burst");
    // They are idle for ten seconds first.
    let deadline = Instant::now() + Duration::from_secs(30);
    while backend.threads().unwrap() > before + 1 {
        assert!(Instant::now() < deadline, "{} threads stay", backend.threads().unwrap());
        std::thread::sleep(Duration::from_millis(100));
    }
    // Those that stay hear the guest, and others come again.
    client.getattr(entry.nodeid).unwrap();
    assert!(burst(8) < Duration::from_millis(700), "one after the other");
}

#[test]
fn messages_name_the_share_and_the_queue() {
    let (backend, session) = common::serve(&["--tag=data"]);
    assert_eq!(common::errno(session.client().read(ROOT, 99_999, 0, 1)), libc::EBADF);
    drop(session);
    // Of the threads that accept, talk and serve.
    for words in ["share data: front end connected", "share data: front end disconnected"] {
        common::wait_for_words(&backend, words);
    }
    common::wait_for_words(&backend, "INFO: share data, queue 1: ");
    // Without a tag the share is called by its directory.
    let (backend, session) = common::serve(&[]);
    let name = backend.share().display().to_string();
    drop(session);
    common::wait_for_words(&backend, &format!("INFO: share {name}: front end connected"));
}
