//! What lanefsctl asks for: requests in flight, limits, log level, drain.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use faultfs::{Call, FILE, FaultFs};
use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Lock, ROOT, data};
use lanefsd_frontend::{Backend, Session};
use serde_json::{Value, json};

use super::{Watched, answered, ask, connect, http, serve, taken};
use crate::common;
use crate::survival::{IMMORTAL, kill_worker};

/// Does this while a SETLKW waits, which is seen, and lets it end.
fn while_a_lock_is_waited_for(watched: &Watched, work: impl FnOnce()) {
    let session = serve(watched);
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    let lock = |owner| Lock { owner, pid: 1, kind: libc::F_WRLCK, start: 0, flock: false, end: 9 };
    client.setlk(node, fh, lock(1)).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.setlkw(node, fh, lock(2)));
        let is_it = |op: &Value| {
            op["op"] == "setlkw" && op["phase"] == "waiting" && op["age_seconds"].as_f64() > Some(0.0)
        };
        let waiting = || watched.answer("ops")["ops"].as_array().unwrap().iter().any(is_it);
        common::wait_until(waiting, "a request that waits for a lock");
        work();
        client.setlk(node, fh, Lock { kind: libc::F_UNLCK, ..lock(1) }).unwrap();
        waits.join().unwrap().unwrap();
    });
}

#[test]
fn a_request_that_waits_is_seen_with_its_phase() {
    let watched = Watched::start(&["--posix-lock"]);
    while_a_lock_is_waited_for(&watched, || {});
    assert!(watched.answer("ops")["ops"].as_array().unwrap().is_empty());
}

#[test]
fn each_phase_of_a_request_is_seen() {
    common::own_mounts();
    for (engine, phase) in [("threads", "serving"), ("io-uring", "submitted")] {
        let share = common::disk_directory();
        let store = FaultFs::mount(share.path()).unwrap();
        let starter = Backend::of(common::program()).share(share.path());
        let engine = format!("--io-engine={engine}");
        let watched = Watched::of(starter, &["--sandbox=none", "--cache=never", &engine]);
        let session = watched.backend.connect(common::queues(2)).unwrap();
        let client = session.client();
        let node = client.lookup(ROOT, FILE).unwrap().nodeid;
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        let gate = store.hold(Call::Write);
        let write = data::write_request(node, fh, 0, &[1; 4096], WriteFlags::empty(), libc::O_RDWR);
        let write = client.send(write).unwrap();
        common::wait_until(|| store.under_way(Call::Write) == 1, "the write is under way");
        // For bytes that the write changes.
        let read = client.on(2).send(data::read_request(node, fh, 0, 10)).unwrap();
        let is_seen = || {
            let ops = watched.answer("ops")["ops"].take();
            let phase_of = |name: &str| {
                let op = ops.as_array().unwrap().iter().find(|op| op["op"] == name)?;
                op["phase"].as_str().map(str::to_owned)
            };
            (phase_of("write").as_deref(), phase_of("read").as_deref()) == (Some(phase), Some("waiting"))
        };
        common::wait_until(is_seen, &format!("{phase} and waiting, with {engine}"));
        drop(gate);
        session.finish(write).unwrap();
        assert_eq!(session.finish(read).unwrap(), [1; 10]);
    }
}

#[test]
fn the_log_says_what_was_in_flight_when_a_worker_died() {
    let watched = Watched::start(&["--posix-lock", IMMORTAL]);
    while_a_lock_is_waited_for(&watched, || {
        kill_worker(&watched.backend);
        common::wait_for_words(&watched.backend, "in flight then: setlkw (request ");
    });
}

#[test]
fn bad_requests_are_answered_and_serving_goes_on() {
    let watched = Watched::start(&[]);
    let session = serve(&watched);
    for (bytes, words) in [
        (&b"nonsense\n"[..], "no request"),
        (b"{}\n", "no request"),
        (b"{\"command\":\"fly\"}\n", "no request"),
        (b"{\"command\":\"loglevel\",\"level\":\"loud\"}\n", "loud is no log level"),
        (&[b'x'; 5000], "longer than 4096"),
        (&[0; 4096], "longer than 4096"),
    ] {
        let answers = ask(watched.control(), bytes);
        assert!(answers[0]["error"].as_str().unwrap().contains(words), "{answers:?}");
    }
    // Several on one connection.
    let answers = ask(watched.control(), b"{\"command\":\"ops\"}\nx\n{\"command\":\"ops\"}\n");
    assert_eq!(
        answers.iter().map(|answer| answer.get("ok").is_some()).collect::<Vec<_>>(),
        [true, false, true]
    );
    // Who does not read, or says nothing, keeps nobody out.
    let mut silent: Vec<UnixStream> = (0..40).map(|_| watched.control()).collect();
    silent.extend((0..40).map(|_| {
        let mut stream = connect(&watched.path("metrics"));
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n");
        stream
    }));
    assert_eq!(watched.answer("status")["front_end"], true);
    assert!(watched.samples().len() > 20);
    let text = http(&watched.path("metrics"), "POST /metrics HTTP/1.1\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 405 "), "{text}");
    session.client().getattr(ROOT).unwrap();
    drop(silent);
}

#[test]
fn the_log_level_changes_at_run_time() {
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let watched = Watched::start(&[sandbox, "--log-level=info"]);
        let session = serve(&watched);
        let answer = watched.ask(&json!({ "command": "loglevel", "level": "trace" }));
        assert_eq!(answer["ok"]["log_level"], "trace");
        session.client().getattr(ROOT).unwrap();
        common::wait_for_words(&watched.backend, "TRACE");
        assert_eq!(watched.answer("status")["log_level"], "trace");
    }
}

/// How long these READs of 4 KiB take.
fn reads(session: &Session, node: u64, fh: u64, count: usize) -> Duration {
    let begun = std::time::Instant::now();
    for _ in 0..count {
        session.client().read(node, fh, 0, 4096).unwrap();
    }
    begun.elapsed()
}

#[test]
fn limits_change_at_run_time_and_outlive_a_worker() {
    for way in [&["--sandbox=namespace", IMMORTAL][..], &["--sandbox=none", "--no-survive"]] {
        let watched = Watched::start(way);
        let session = serve(&watched);
        let (node, fh) = common::create_file(&session);
        let limit = |set: &str| watched.ask(&json!({ "command": "limit", "set": set }));
        for wrong in ["read-ops=0", "read-ops=-1", "speed=7", "read-ops=1,read-ops=2", "", "burst=9h"] {
            assert!(limit(wrong)["error"].is_string(), "{wrong}");
        }
        // A limit that nobody meets.
        limit("meta-ops=1G");
        session.client().getattr(ROOT).unwrap();
        let limits = limit("read-ops=20,burst=0s");
        assert_eq!(limits["ok"]["limits"]["read-ops"], 20);
        common::wait_until(
            || taken(&watched.answer("sample")) == answered(&watched.answer("sample")),
            "the requests of queues with limits",
        );
        // The first one passes at once.
        assert!(reads(&session, node, fh, 11) >= Duration::from_millis(490), "{way:?}");
        if way.contains(&IMMORTAL) {
            kill_worker(&watched.backend);
            assert!(reads(&session, node, fh, 11) >= Duration::from_millis(490));
        }
        assert_eq!(watched.answer("status")["limits"]["read-ops"], 20);
        assert!(watched.samples()["lanefs_throttled_seconds_total{limit=\"read-ops\"}"] > 0.3);
        limit("read-ops=none");
        // What waits when a limit is lifted goes on soon.
        assert!(
            reads(&session, node, fh, 2000) < Duration::from_secs(30),
            "it would take 100 s with the limit"
        );
    }
}

#[test]
fn the_limits_of_a_group_are_shown_beside_those_of_the_share() {
    let folder = tempfile::tempdir().unwrap();
    let group = format!("--limit-group={}", folder.path().join("group").display());
    let watched = Watched::start(&["--sandbox=namespace", &group, "--limit=read-ops=100", IMMORTAL]);
    let _session = serve(&watched);
    watched.ask(&json!({ "command": "limit", "set": "read-ops=7" }));
    let other = common::start(&[&group, "--limit=write-ops=200"]);
    let check = || {
        for command in ["limit", "status"] {
            let answer = watched.answer(command);
            let rates = |of: &str| (answer[of]["read-ops"].as_u64(), answer[of]["write-ops"].as_u64());
            assert_eq!(rates("limits"), (Some(7), Some(0)), "{command}");
            assert_eq!(rates("group_limits"), (Some(100), Some(200)), "{command}");
        }
    };
    check();
    let monitor = watched.monitor();
    watched.backend.upgrade().unwrap();
    common::wait_until(|| watched.find_monitor().is_some_and(|new| new != monitor), "the next monitor");
    check();
    drop(other);
    assert!(Watched::start(&[]).answer("limit")["group_limits"].is_null());
}

#[test]
fn a_share_that_drains_takes_no_request_until_it_resumes() {
    let watched = Watched::start(&[]);
    let session = serve(&watched);
    let (node, fh) = common::create_file(&session);
    assert_eq!(watched.answer("drain"), json!({ "draining": true, "in_flight": 0 }));
    std::thread::scope(|scope| {
        let held = scope.spawn(|| reads(&session, node, fh, 1));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!held.is_finished());
        assert_eq!(watched.answer("status")["draining"], true);
        assert_eq!(watched.answer("drain")["in_flight"], 0);
        assert_eq!(watched.answer("resume"), json!({ "draining": false }));
        assert!(held.join().unwrap() >= Duration::from_millis(290));
    });
}

#[test]
fn who_asks_without_an_end_keeps_nobody_waiting() {
    let watched = Watched::start(&[]);
    let stream = watched.control();
    let (mut sender, mut receiver) = (stream.try_clone().unwrap(), stream.try_clone().unwrap());
    std::thread::scope(|scope| {
        let requests = b"{\"command\":\"resume\"}\n".repeat(100);
        scope.spawn(move || while sender.write_all(&requests).is_ok() {});
        scope.spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()));
        std::thread::sleep(Duration::from_millis(200));
        for _ in 0..20 {
            assert_eq!(watched.answer("resume")["draining"], false);
        }
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
}

#[test]
fn the_log_level_outlives_an_upgrade() {
    let watched = Watched::start(&["--log-level=info", IMMORTAL]);
    let session = serve(&watched);
    watched.ask(&json!({ "command": "loglevel", "level": "trace" }));
    watched.backend.upgrade().unwrap();
    session.client().getattr(ROOT).unwrap();
    let since_then =
        |text: &str| text.rsplit_once("upgraded from").is_some_and(|(_, text)| text.contains("TRACE"));
    // Nobody asks.
    common::wait_for(&watched.backend, since_then, "TRACE after the upgrade");
}

#[test]
fn a_queue_stops_and_goes_on_while_its_share_drains() {
    let watched = Watched::start(&[IMMORTAL]);
    let session = serve(&watched);
    let (node, fh) = common::create_file(&session);
    watched.answer("drain");
    let request = lanefsd_frontend::client::data::read_request(node, fh, 0, 1);
    let held = session.client().on(1).send(request).unwrap();
    let begun = std::time::Instant::now();
    session.stop_queue(1).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30), "a stop took {:?}", begun.elapsed());
    session.start_queue(1).unwrap();
    kill_worker(&watched.backend);
    let monitor = watched.monitor();
    watched.backend.upgrade().unwrap();
    // The old one may be killed while it answers.
    common::wait_until(|| watched.find_monitor().is_some_and(|new| new != monitor), "the next monitor");
    assert_eq!(watched.answer("status")["draining"], true);
    watched.answer("resume");
    session.finish(held).unwrap();
}
