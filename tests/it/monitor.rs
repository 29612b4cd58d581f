//! What operators see: the control socket, counters for Prometheus, and the process that serves them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common;
use crate::survival::{IMMORTAL, kill_worker};

/// All ways in which what serves may be related to what was started.
const WAYS: &[&[&str]] = &[
    &["--sandbox=none"],
    &["--sandbox=chroot"],
    &["--sandbox=namespace"],
    &["--sandbox=none", "--no-survive"],
    &["--sandbox=namespace", "--no-survive"],
];

/// A daemon that is looked at.
struct Watched {
    backend: Backend,
    folder: TempDir,
}

impl Watched {
    fn start(args: &[&str]) -> Watched {
        Watched::of(Backend::of(common::program()), args)
    }

    fn of(starter: lanefsd_frontend::backend::Starter, args: &[&str]) -> Watched {
        let folder = tempfile::tempdir().unwrap();
        let option = |name: &str, file: &str| format!("--{name}={}", folder.path().join(file).display());
        let starter = starter.args(args).args([
            option("control-socket", "ctl"),
            option("metrics-socket", "metrics"),
            option("metrics-file", "lanefs.prom"),
        ]);
        let watched = Watched { backend: starter.start().unwrap(), folder };
        // Until it has its name, it may be taken for the worker.
        watched.monitor();
        watched
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn control(&self) -> UnixStream {
        connect(&self.path("ctl"))
    }

    fn ask(&self, request: &Value) -> Value {
        let mut answers = ask(self.control(), format!("{request}\n").as_bytes());
        assert_eq!(answers.len(), 1);
        answers.remove(0)
    }

    /// The answer to a command without arguments.
    fn answer(&self, command: &str) -> Value {
        self.ask(&json!({ "command": command }))["ok"].take()
    }

    /// The counters as Prometheus gets them, in either form.
    fn scrape(&self, accept: &str) -> String {
        let text = http(&self.path("metrics"), &format!("GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n"));
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        body.to_owned()
    }

    /// Samples by name and labels, without that of the share.
    fn samples(&self) -> BTreeMap<String, f64> {
        samples(&self.scrape("*/*"))
    }

    /// The monitor's process id.
    fn monitor(&self) -> u32 {
        common::wait_until(|| self.find_monitor().is_some(), "a monitor");
        self.find_monitor().unwrap()
    }

    fn find_monitor(&self) -> Option<u32> {
        let children =
            fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.backend.pid())).unwrap();
        let is_it = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "lanefsd-monitor\n")
        };
        children.split_whitespace().find(is_it)?.parse().ok()
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Sends these bytes and returns the answers that come before the end, or one.
fn ask(mut stream: UnixStream, bytes: &[u8]) -> Vec<Value> {
    stream.write_all(bytes).unwrap();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // Who is sent away before all of a request was read gets an error behind the answer.
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.map(|line| serde_json::from_str(&line).unwrap()).collect()
}

fn http(path: &Path, request: &str) -> String {
    let mut stream = connect(path);
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = name.split_once('{').unwrap();
        let labels: Vec<&str> =
            labels.trim_end_matches('}').split(',').filter(|l| !l.starts_with("share=")).collect();
        (format!("{name}{{{}}}", labels.join(",")), value.parse().unwrap())
    };
    lines.map(sample).collect()
}

fn serve(watched: &Watched) -> Session {
    watched.backend.connect(SessionOptions::default()).unwrap()
}

/// Does work that can be counted: two files, one name that is not there, and 10 WRITEs and READs of 4 KiB.
fn work(session: &Session) {
    let client = session.client();
    let (node, fh) = common::create_file(session);
    for block in 0..10 {
        assert_eq!(client.write(node, fh, block * 4096, &[7; 4096]).unwrap(), 4096);
    }
    for block in 0..10 {
        assert_eq!(client.read(node, fh, block * 4096, 4096).unwrap().len(), 4096);
    }
    assert!(client.lookup(ROOT, "missing").is_err());
}

#[test]
fn counters_are_those_of_the_front_end() {
    for way in WAYS {
        let mut watched = Watched::start(way);
        assert_eq!(watched.answer("status")["front_end"], false);
        let session = serve(&watched);
        work(&session);
        let samples = watched.samples();
        for (name, expected) in [
            ("lanefs_requests_total{op=\"create\"}", 1.0),
            ("lanefs_requests_total{op=\"write\"}", 10.0),
            ("lanefs_requests_total{op=\"read\"}", 10.0),
            ("lanefs_request_seconds_count{op=\"read\"}", 10.0),
            ("lanefs_request_seconds_bucket{op=\"read\",le=\"+Inf\"}", 10.0),
            ("lanefs_errors_total{op=\"lookup\",errno=\"ENOENT\"}", 1.0),
            ("lanefs_bytes_total{dir=\"read\"}", 40_960.0),
            ("lanefs_bytes_total{dir=\"write\"}", 40_960.0),
            ("lanefs_inflight{queue=\"1\"}", 0.0),
            ("lanefs_inodes{}", 1.0),
            ("lanefs_front_end{}", 1.0),
            ("lanefs_restarts_total{}", 0.0),
            ("lanefs_file_writers_count{}", 10.0),
        ] {
            assert_eq!(samples.get(name), Some(&expected), "{way:?} {name} {samples:#?}");
        }
        let handles = ["plain", "parallel", "directory"]
            .map(|mode| samples[&format!("lanefs_handles{{mode=\"{mode}\"}}")]);
        assert_eq!(handles.iter().sum::<f64>(), 1.0, "{way:?}");
        let open = watched.scrape("application/openmetrics-text; version=1.0.0");
        assert!(open.ends_with("# EOF\n") && open.contains("lanefs_requests_total"), "{open}");
        let status = watched.answer("status");
        assert_eq!(
            (status["front_end"].as_bool(), status["inodes"].as_u64()),
            (Some(true), Some(1)),
            "{way:?}"
        );
        assert_eq!(status["pid"], watched.backend.pid());
        assert!(
            status["queues"].as_array().unwrap().iter().any(|queue| queue["workers"].as_u64() >= Some(1))
        );
        assert_eq!(watched.answer("sample")["ops"]["write"]["count"], 10);
        assert!(!watched.answer("slow")["slow"].as_array().unwrap().is_empty());
        drop(session);
        watched.backend.expect_success().unwrap();
        // The monitor ends when it sees that its daemon has.
        common::wait_until(
            || !watched.path("ctl").exists() && !watched.path("metrics").exists(),
            "the sockets go",
        );
        let last = samples_of_file(&watched);
        assert_eq!(last["lanefs_requests_total{op=\"write\"}"], 10.0, "{way:?}");
    }
}

fn samples_of_file(watched: &Watched) -> BTreeMap<String, f64> {
    samples(&fs::read_to_string(watched.path("lanefs.prom")).unwrap())
}

#[test]
fn counters_outlive_workers_and_the_monitor() {
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let watched = Watched::start(&[sandbox, IMMORTAL]);
        let session = serve(&watched);
        work(&session);
        kill_worker(&watched.backend);
        session.client().getattr(ROOT).unwrap();
        let samples = watched.samples();
        assert_eq!(samples["lanefs_restarts_total{}"], 1.0);
        assert_eq!(samples["lanefs_requests_total{op=\"write\"}"], 10.0);
        assert_eq!((samples["lanefs_inodes{}"], samples["lanefs_inflight{queue=\"1\"}"]), (1.0, 0.0));
        let monitor = watched.monitor();
        kill_process(Pid::from_raw(monitor.cast_signed()).unwrap(), Signal::KILL).unwrap();
        common::wait_for_words(&watched.backend, "the monitor process has ended by signal 9");
        session.client().getattr(ROOT).unwrap();
        // A connection waits in the socket until there is one again.
        assert_eq!(watched.samples()["lanefs_requests_total{op=\"write\"}"], 10.0);
        assert_ne!(watched.monitor(), monitor);
    }
}

#[test]
fn an_upgrade_keeps_counters_and_sockets() {
    let folder = common::disk_directory();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("lanefsd");
    common::copy_program(&program);
    let mut watched = Watched::of(Backend::of(&program), &[IMMORTAL]);
    let session = serve(&watched);
    work(&session);
    let monitor = watched.monitor();
    let remarks = watched.answer("status")["remarks"].take();
    common::copy_program(&folder.path().join("new"));
    fs::rename(folder.path().join("new"), &program).unwrap();
    let mut upgrade = std::process::Command::new(common::program());
    common::run(upgrade.args(["upgrade", "--pid", &watched.backend.pid().to_string()]));
    session.client().getattr(ROOT).unwrap();
    common::wait_until(
        || watched.find_monitor().is_some_and(|new| new != monitor),
        "the monitor of the new program",
    );
    let samples = watched.samples();
    assert_eq!(samples["lanefs_upgrades_total{}"], 1.0);
    assert_eq!(samples["lanefs_requests_total{op=\"write\"}"], 10.0);
    let status = watched.answer("status");
    assert_eq!((status["upgrades"].as_u64(), &status["remarks"]), (Some(1), &remarks));
    drop(session);
    watched.backend.expect_success().unwrap();
    common::wait_until(|| !watched.path("ctl").exists(), "the socket goes");
}

#[test]
fn a_request_that_waits_is_seen_with_its_phase() {
    let watched = Watched::start(&["--posix-lock"]);
    let session = serve(&watched);
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    let lock = |owner| Lock { owner, pid: 1, kind: libc::F_WRLCK, start: 0, flock: false, end: 9 };
    client.setlk(node, fh, lock(1)).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.setlkw(node, fh, lock(2)));
        let waiting = || {
            let ops = watched.answer("ops");
            ops["ops"]
                .as_array()
                .unwrap()
                .iter()
                .any(|op| op["op"] == "setlkw" && op["age_seconds"].as_f64() > Some(0.0))
        };
        common::wait_until(waiting, "a request that waits for a lock");
        client.setlk(node, fh, Lock { kind: libc::F_UNLCK, ..lock(1) }).unwrap();
        waits.join().unwrap().unwrap();
    });
    assert!(watched.answer("ops")["ops"].as_array().unwrap().is_empty());
}

#[test]
fn the_log_says_what_was_in_flight_when_a_worker_died() {
    let watched = Watched::start(&["--posix-lock", IMMORTAL]);
    let session = serve(&watched);
    let client = session.client();
    let (node, fh) = common::create_file(&session);
    let lock = |owner| Lock { owner, pid: 1, kind: libc::F_WRLCK, start: 0, flock: false, end: 9 };
    client.setlk(node, fh, lock(1)).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| client.setlkw(node, fh, lock(2)));
        let waiting =
            || watched.answer("ops")["ops"].as_array().unwrap().iter().any(|op| op["op"] == "setlkw");
        common::wait_until(waiting, "a request that waits for a lock");
        kill_worker(&watched.backend);
        common::wait_for_words(&watched.backend, "in flight then: setlkw (request ");
        client.setlk(node, fh, Lock { kind: libc::F_UNLCK, ..lock(1) }).unwrap();
        waits.join().unwrap().unwrap();
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
        let limits = limit("read-ops=20,burst=0s");
        assert_eq!(limits["ok"]["limits"]["read-ops"], 20);
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
fn only_root_and_the_own_user_control_it() {
    let watched = Watched::start(&[]);
    assert_eq!(fs::metadata(watched.path("ctl")).unwrap().permissions().mode() & 0o777, 0o700);
    // Somebody opens the socket for all.
    fs::set_permissions(watched.path("ctl"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(watched.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut client = std::process::Command::new("setpriv");
    client.args(["--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c"]);
    client.arg(
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(4096).decode())",
    );
    let output = client.arg(watched.path("ctl")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("only root and the user of the daemon"),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn paths_that_cannot_be_had_are_refused_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    fs::write(folder.path().join("file"), "kept").unwrap();
    let socket = at("s");
    let share = at("");
    let refused = |option: String| {
        let args = ["--shared-dir", &share, "--socket-path", &socket, &option];
        let (status, stderr) = Backend::of(common::program()).bare().args(args).refuse().unwrap();
        assert_eq!((status.code(), stderr.trim_end().lines().count()), (Some(1), 1), "{stderr}");
        stderr
    };
    for (option, words) in [
        (format!("--control-socket={}", at("file")), "choose another --control-socket"),
        (format!("--control-socket={}", at("none/ctl")), "choose another --control-socket"),
        (format!("--metrics-socket={}", at("file")), "choose another --metrics-socket"),
        (format!("--metrics-file={}", at("none/file")), "--metrics-file"),
        (format!("--control-socket={socket}"), "--control-socket and --socket-path are the same path"),
    ] {
        let stderr = refused(option.clone());
        assert!(stderr.contains(words), "{stderr}");
        assert!(option.contains(&socket) || !stderr.contains("--socket-path"), "{stderr}");
    }
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"kept");
}

#[test]
fn the_program_has_its_static_probes() {
    let program = fs::read(common::program()).unwrap();
    // A note in the file: provider and name, each with a zero.
    for probe in ["lanefsd\0request_start\0", "lanefsd\0request_end\0"] {
        assert!(program.windows(probe.len()).any(|window| window == probe.as_bytes()), "{probe:?}");
    }
}

#[test]
fn a_monitor_that_dies_is_started_anew_without_anything_else_that_happens() {
    let watched = Watched::start(&[IMMORTAL]);
    // At once, so that the next one has to wait, and nobody is served.
    kill_process(Pid::from_raw(watched.monitor().cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(watched.answer("status")["front_end"], false);
}

#[test]
fn a_daemon_whose_monitor_hangs_ends() {
    let mut watched = Watched::start(&[IMMORTAL]);
    let session = serve(&watched);
    let monitor = Pid::from_raw(watched.monitor().cast_signed()).unwrap();
    kill_process(monitor, Signal::STOP).unwrap();
    session.client().getattr(ROOT).unwrap();
    watched.backend.signal(libc::SIGTERM).unwrap();
    let ended = watched.backend.wait(Duration::from_secs(10));
    let _ = kill_process(monitor, Signal::KILL);
    ended.unwrap();
    assert!(!watched.path("ctl").exists() && !watched.path("metrics").exists());
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
fn what_stands_in_the_place_of_the_new_file_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lanefs.prom");
    let temporary = folder.path().join("lanefs.prom.tmp");
    let option = format!("--metrics-file={}", path.display());
    fs::write(folder.path().join("other"), "kept").unwrap();
    let begin = || {
        let _ = fs::remove_file(&path);
        let backend = Backend::of(common::program()).args([&option]).start().unwrap();
        common::wait_until(|| path.exists(), "the file");
        drop(backend);
    };
    rustix::fs::mkfifoat(rustix::fs::CWD, &temporary, rustix::fs::Mode::RUSR).unwrap();
    begin();
    std::os::unix::fs::symlink(folder.path().join("other"), &temporary).unwrap();
    begin();
    assert_eq!(fs::read(folder.path().join("other")).unwrap(), b"kept");
    // The monitor has no capabilities, so others' directories are none for it.
    std::os::unix::fs::chown(folder.path(), Some(65534), None).unwrap();
    let (status, stderr) = Backend::of(common::program()).args([&option]).refuse().unwrap();
    assert!(status.code() == Some(1) && stderr.contains("also without capabilities"), "{stderr}");
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
