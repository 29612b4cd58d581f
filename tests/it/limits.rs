//! Rate limits: requests wait in the ring until they are admitted, and nothing else waits for them.
//!
//! Other programs may take the CPUs, so no test says how fast a request is; each says that no more passes than may, and
//! what does not wait.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::message::feature;
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Client, Segmentation, Session, SessionOptions};

use crate::common;
use crate::survival;

/// Time of the daemon's burst, unless a test gives another one.
const BURST: Duration = Duration::from_millis(100);
/// Beside a debt of a minute.
const LIMIT: &str = "--limit=read-bytes=4096,burst=1ms";

/// Sends READs of the first bytes of a file, which has none.
fn send_reads(session: &Session, queue: usize, file: (u64, u64), size: usize, count: usize) -> Vec<Pending> {
    let client = session.client().on(queue);
    (0..count).map(|_| client.send(data::read_request(file.0, file.1, 0, size)).unwrap()).collect()
}

/// How many requests are served after this time.
fn served_after(session: &Session, sent: &[Pending], time: Duration) -> usize {
    std::thread::sleep(time);
    sent.iter().filter(|sent| session.queue(sent.queue).is_done(sent.token).unwrap()).count()
}

/// Puts the bucket of READs into debt for at least a minute, by [`LIMIT`]. No test waits for its end.
fn owe_a_minute(client: &Client<'_>, file: (u64, u64)) {
    client.read(file.0, file.1, 0, 4096 * 61).unwrap();
}

/// A daemon with a control socket.
struct Controlled {
    directory: tempfile::TempDir,
    backend: Backend,
    session: Session,
    file: (u64, u64),
}

impl Controlled {
    fn serve(args: &[&str]) -> Controlled {
        let directory = tempfile::tempdir().unwrap();
        let control = format!("--control-socket={}", directory.path().join("ctl").display());
        let args = [&[control.as_str()], args].concat();
        let (backend, session) = common::serve_with(&args, common::queues(2));
        let file = common::create_file(&session);
        Controlled { directory, backend, session, file }
    }

    fn send_reads(&self, count: usize) -> Vec<Pending> {
        send_reads(&self.session, 1, self.file, 64, count)
    }

    /// Puts READs into debt, and sends some, which are not served.
    fn hold_reads(&self, count: usize) -> Vec<Pending> {
        self.set("read-bytes=4096,burst=1ms");
        owe_a_minute(&self.session.client(), self.file);
        let sent = self.send_reads(count);
        assert_eq!(served_after(&self.session, &sent, Duration::from_millis(50)), 0);
        sent
    }

    /// Lifts the limit, and waits for what was held.
    fn finish(&self, sent: Vec<Pending>) {
        assert_eq!(served_after(&self.session, &sent, Duration::ZERO), 0, "the debt was forgiven");
        self.set("read-bytes=none");
        sent.into_iter().for_each(|sent| assert_eq!(self.session.finish(sent).unwrap(), [7; 64]));
    }

    fn set(&self, limits: &str) {
        let mut stream = UnixStream::connect(self.directory.path().join("ctl")).unwrap();
        writeln!(stream, "{}", serde_json::json!({ "command": "limit", "set": limits })).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"ok\""), "{answer}");
    }
}

#[test]
fn a_flood_gets_the_rate_and_the_burst() {
    let (_backend, session, node, fh) = common::serve_file(&["--limit=read-bytes=4000K"]);
    // A second and a half, and the burst.
    let begin = Instant::now();
    let sent = send_reads(&session, 1, (node, fh), 4096, 900);
    let mut done = 0;
    while done < sent.len() {
        done = served_after(&session, &sent, Duration::from_millis(5));
        let time = begin.elapsed() + BURST;
        let allowed = 4000.0 * 1024.0 / 4096.0 * time.as_secs_f64() + 1.0;
        assert!(done as f64 <= allowed, "{done} reads in {time:?}");
        assert!(time < Duration::from_secs(60), "{done} reads, and no more: the queue hangs");
    }
    let ideal = Duration::from_secs_f64(899.0 / 1000.0) - BURST;
    assert!(begin.elapsed() >= ideal, "{:?}", begin.elapsed());
    sent.into_iter().for_each(|sent| drop(session.finish(sent).unwrap()));
}

#[test]
fn operations_are_limited_by_their_class() {
    let limits = "--limit=read-ops=20,write-ops=20,burst=0s";
    let (_backend, session, node, fh) = common::serve_file(&[limits, "--limit=meta-ops=20"]);
    let client = session.client();
    let acts: [&dyn Fn(); 3] = [
        &|| drop(client.read(node, fh, 0, 1).unwrap()),
        &|| assert_eq!(client.write(node, fh, 0, b"x").unwrap(), 1),
        &|| assert!(client.getattr(node).is_ok()),
    ];
    for act in acts {
        let begin = Instant::now();
        (0..6).for_each(|_| act());
        assert!(begin.elapsed() >= Duration::from_millis(250), "{:?}", begin.elapsed());
    }
}

#[test]
fn a_request_larger_than_the_burst_passes() {
    let limit = "--limit=write-bytes=1M,burst=10ms";
    let options = SessionOptions { ring_size: 512, ..SessionOptions::default() };
    let (_backend, session) = common::serve_with(&[limit], options);
    let (node, fh) = common::create_file(&session);
    let client = session.client();
    let bytes = vec![7; 1 << 20];
    let begin = Instant::now();
    for at in 0..3 {
        assert_eq!(client.write(node, fh, at << 20, &bytes).unwrap(), 1 << 20);
    }
    // The first one is not waited for, and each of the others for the one before.
    assert!(begin.elapsed() >= Duration::from_millis(1980), "{:?}", begin.elapsed());
}

#[test]
fn other_classes_and_what_gives_back_pass_in_debt() {
    let (_backend, session) = common::serve_with(&[LIMIT, "--limit=write-bytes=4096"], common::queues(2));
    let file = common::create_file(&session);
    let client = session.client();
    owe_a_minute(&client, file);
    // A READ that waits in a queue of its own holds up neither others nor the high-priority queue.
    let held = send_reads(&session, 2, file, 1, 1);
    for number in 0..20 {
        let name = format!("other{number}");
        let (entry, open) = client.create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
        client.release(entry.nodeid, open.fh).unwrap();
        let directory = client.opendir(ROOT).unwrap();
        client.releasedir(ROOT, directory.fh).unwrap();
        client.forget(entry.nodeid, 1).unwrap();
        client.lookup(ROOT, &name).unwrap();
    }
    client.write(file.0, file.1, 0, b"x").unwrap();
    client.getattr(file.0).unwrap();
    client.forget(file.0, 1).unwrap();
    // It is answered: nothing of this number was taken.
    assert_eq!(common::errno(client.interrupt(held[0])), libc::EAGAIN);
    assert_eq!(served_after(&session, &held, Duration::ZERO), 0);
}

#[test]
fn another_daemon_is_not_held_up() {
    let (_limited, held, node, fh) = common::serve_file(&[LIMIT]);
    let (_other, free, other_node, other_fh) = common::serve_file(&[]);
    owe_a_minute(&held.client(), (node, fh));
    let sent = send_reads(&held, 1, (node, fh), 4096, 100);
    for _ in 0..200 {
        free.client().read(other_node, other_fh, 0, 4096).unwrap();
    }
    assert_eq!(served_after(&held, &sent, Duration::ZERO), 0);
}

#[test]
fn a_queue_that_is_held_stops_and_goes_on() {
    for survive in ["--max-deaths=5", "--no-survive"] {
        let daemon = Controlled::serve(&[survive, "--keep-listening"]);
        let session = &daemon.session;
        session.client().write(daemon.file.0, daemon.file.1, 0, &[7; 64]).unwrap();
        let sent = daemon.hold_reads(8);
        let base = session.stop_queue(1).unwrap();
        // None of the requests was taken.
        let published = session.queue(1).with_ring(|ring| ring.published_index());
        assert_eq!(published.wrapping_sub(base), 8);
        session.start_queue(1).unwrap();
        daemon.finish(sent);
        // The end of a daemon whose queue is held does not wait either.
        let _held = daemon.hold_reads(8);
        daemon.backend.signal(libc::SIGTERM).unwrap();
        let mut backend = daemon.backend;
        backend.wait(Duration::from_secs(30)).unwrap();
    }
}

#[test]
fn a_worker_that_dies_while_its_queue_is_held_loses_nothing() {
    let daemon = Controlled::serve(&[survival::IMMORTAL]);
    let client = daemon.session.client();
    client.write(daemon.file.0, daemon.file.1, 0, &[7; 64]).unwrap();
    for _ in 0..3 {
        let sent = daemon.hold_reads(4);
        survival::kill_worker(&daemon.backend);
        // The next one serves, and has the debt of the one before.
        client.on(2).getattr(ROOT).unwrap();
        daemon.finish(sent);
    }
    // An upgrade drains a queue that is held.
    let sent = daemon.hold_reads(4);
    daemon.backend.upgrade().unwrap();
    client.on(2).getattr(ROOT).unwrap();
    daemon.finish(sent);
}

#[test]
fn a_debt_outlives_the_front_end() {
    for survive in ["--max-deaths=5", "--no-survive"] {
        let mut daemon = Controlled::serve(&[survive, "--keep-listening"]);
        let _held = daemon.hold_reads(4);
        let queues = common::queues(2);
        drop(daemon.session);
        daemon.session = daemon.backend.connect(queues).unwrap();
        let client = daemon.session.client();
        let node = client.lookup(ROOT, "file").unwrap().nodeid;
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        client.write(node, fh, 0, &[7; 64]).unwrap();
        daemon.file = (node, fh);
        let sent = daemon.send_reads(4);
        assert_eq!(served_after(&daemon.session, &sent, Duration::from_millis(50)), 0);
        daemon.finish(sent);
    }
}

#[test]
fn a_held_queue_uses_no_cpu() {
    let (backend, session, node, fh) = common::serve_file(&[LIMIT]);
    owe_a_minute(&session.client(), (node, fh));
    let _held = send_reads(&session, 1, (node, fh), 1, 100);
    // Kicks find the queue held, and guests kick as often as they like.
    std::thread::sleep(Duration::from_millis(300));
    let before = backend.cpu_time().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let spent = backend.cpu_time().unwrap() - before;
    assert!(spent <= Duration::from_millis(30), "{spent:?} of CPU in a second");
}

#[test]
fn writes_of_several_queues_share_the_rate() {
    let limit = "--limit=write-ops=100,burst=0s";
    let (_backend, session) = common::serve_with(&[limit], common::queues(2));
    let (node, fh) = common::create_file(&session);
    let begin = Instant::now();
    let send = |queue: usize| {
        let write = data::write_request(node, fh, 0, b"x", WriteFlags::empty(), libc::O_RDWR);
        session.send(queue, &write, Segmentation::Linux).unwrap()
    };
    let sent: Vec<Pending> = (0..40).map(|number| send(1 + number % 2)).collect();
    sent.into_iter().for_each(|sent| drop(session.finish(sent).unwrap()));
    assert!(begin.elapsed() >= Duration::from_millis(390), "{:?}", begin.elapsed());
}

/// Sends a request, and then others while the queue is held, by guests that kick as often as they are asked to.
#[test]
fn every_way_to_serve_is_paced() {
    let without_event_idx = SessionOptions {
        features: SessionOptions::default().features & !feature::EVENT_IDX,
        ..SessionOptions::default()
    };
    for (option, options) in [
        ("--thread-pool-size=1", SessionOptions::default()),
        ("--io-engine=io-uring", SessionOptions::default()),
        ("--poll-time=1000", SessionOptions::default()),
        ("--poll-time=0", without_event_idx),
    ] {
        let (_backend, session) = common::serve_with(&["--limit=read-ops=100,burst=0s", option], options);
        let file = common::create_file(&session);
        let begin = Instant::now();
        for round in 1..=5 {
            for sent in send_reads(&session, 1, file, 1, 4) {
                session.finish(sent).unwrap();
            }
            let ideal = Duration::from_millis(10 * (4 * round - 1));
            assert!(begin.elapsed() >= ideal, "{option}: {:?} in place of {ideal:?}", begin.elapsed());
        }
    }
}

#[test]
fn the_daemons_of_a_group_have_one_budget() {
    let directory = tempfile::tempdir().unwrap();
    let group = format!("--limit-group={}", directory.path().join("vm").display());
    let (_one, first, node, fh) = common::serve_file(&[&group, "--limit=read-ops=100,burst=0s"]);
    let (two, second, other_node, other_fh) = common::serve_file(&[&group, survival::IMMORTAL]);
    let serve_20 = |when: &str, meanwhile: &dyn Fn()| {
        let begin = Instant::now();
        let sent = send_reads(&first, 1, (node, fh), 1, 10);
        let others = send_reads(&second, 1, (other_node, other_fh), 1, 10);
        meanwhile();
        sent.into_iter().for_each(|sent| drop(first.finish(sent).unwrap()));
        others.into_iter().for_each(|sent| drop(second.finish(sent).unwrap()));
        assert!(begin.elapsed() >= Duration::from_millis(190), "{when}: {:?}", begin.elapsed());
    };
    serve_20("at first", &|| ());
    // Another worker, and another program, go on in the group.
    serve_20("with a death", &|| survival::kill_worker(&two));
    serve_20("after a death", &|| ());
    serve_20("with an upgrade", &|| two.upgrade().unwrap());
    serve_20("after an upgrade", &|| ());
    let (status, stderr) = common::starter().args(["--limit-group=/proc/version"]).refuse().unwrap();
    assert!(status.code() == Some(1) && stderr.contains("--limit-group"), "{stderr}");
}

#[test]
fn invalid_limits_are_refused_at_start() {
    for (limit, words) in [
        ("read-bytes=0", "read-bytes=0 would stop the guest"),
        ("read-bytes=99999999999999999999", "is too much"),
        ("read-bytes=1M,read-bytes=2M", "read-bytes is given twice"),
        ("bytes=1M", "\"bytes\" is not a limit"),
        ("burst=10", "burst=10 is not a time"),
    ] {
        let option = format!("--limit={limit}");
        let (status, stderr) = common::starter().args([&option]).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{limit}: {stderr}");
        let said: Vec<&str> = stderr.lines().collect();
        assert!(said.len() == 1 && said[0].contains(words), "{limit}: {stderr}");
    }
}
