//! What operators see: the control socket, counters for Prometheus, and the process that serves them.

mod control;
mod process;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common;
use crate::common::disk::Disk;
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

/// How many requests of a share wait for another one, by its control socket.
pub(crate) fn waiting_requests(control: &Path) -> usize {
    let answers = ask(connect(control), b"{\"command\":\"ops\"}\n");
    answers[0]["ok"]["ops"].as_array().unwrap().iter().filter(|op| op["phase"] == "waiting").count()
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
            ("lanefs_mapped_writes_total{how=\"copied\"}", 0.0),
            ("lanefs_mapped_writes_total{how=\"fallback\"}", 0.0),
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
        let sample = || watched.answer("sample");
        assert_eq!(sample()["ops"]["write"]["count"], 10);
        // A worker tells before it sleeps.
        common::wait_until(|| taken(&sample()) == answered(&sample()), "the requests of all queues");
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

#[test]
fn mapped_writes_are_counted() {
    let disk = Disk::tmpfs(64);
    let starter = Backend::of(common::program()).share(&disk.path);
    let watched = Watched::of(starter, &["--cache=never", "--mapped-writes=always"]);
    assert_eq!(watched.answer("status")["mapped_writes"], "on tmpfs, ext4 and XFS, where they pay");
    let session = serve(&watched);
    let (node, fh) = common::create_file(&session);
    let mut written = 0.0;
    let counts = || {
        let samples = watched.samples();
        ["copied", "fallback"].map(|how| samples[&format!("lanefs_mapped_writes_total{{how=\"{how}\"}}")])
    };
    // It is mapped after some writes, of which the first ones are measured.
    common::wait_until(
        || {
            (0..100).for_each(|_| assert_eq!(session.client().write(node, fh, 0, &[7; 4096]).unwrap(), 4096));
            written += 100.0;
            counts()[0] >= 100.0
        },
        "writes through a mapping",
    );
    let [copied, fell_back] = counts();
    assert!(fell_back >= 1.0 && copied + fell_back < written, "{copied} and {fell_back} of {written}");
    // Each of those that follow is one or the other.
    (0..50).for_each(|_| assert_eq!(session.client().write(node, fh, 0, &[8; 4096]).unwrap(), 4096));
    assert_eq!(counts().iter().sum::<f64>(), copied + fell_back + 50.0);
    assert_eq!(watched.answer("sample")["mapped_writes"]["copied"].as_f64().unwrap(), counts()[0]);
}

#[test]
fn a_share_whose_writes_are_not_mapped_says_why() {
    let disk = Disk::tmpfs(64);
    for (args, why) in [
        (&["--cache=never"][..], "no: others may write the share (--mapped-writes)"),
        (&["--cache=always", "--parallel-direct-writes=always"], "on tmpfs, ext4 and XFS, where they pay"),
        (&["--mapped-writes=never"], "no: --mapped-writes=never"),
        (&["--mapped-writes=always", "--allow-direct-io"], "no: --allow-direct-io"),
        (&["--mapped-writes=always", "--readonly"], "no: --readonly"),
        (
            &["--mapped-writes=always", "--parallel-direct-writes=never"],
            "no: no file has parallel direct writes",
        ),
    ] {
        let watched = Watched::of(Backend::of(common::program()).share(&disk.path), args);
        assert_eq!(watched.answer("status")["mapped_writes"], why, "{args:?}");
    }
}

/// Requests that all queues have taken.
fn taken(sample: &Value) -> u64 {
    sample["queues"].as_array().unwrap().iter().filter_map(|queue| queue["requests"].as_u64()).sum()
}

/// Requests that were answered.
fn answered(sample: &Value) -> u64 {
    sample["ops"].as_object().unwrap().values().filter_map(|op| op["count"].as_u64()).sum()
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
    common::wait_until(
        || taken(&watched.answer("sample")) == answered(&watched.answer("sample")),
        "the requests before the upgrade and after it",
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
