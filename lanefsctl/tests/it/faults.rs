//! Daemons that do not answer as they should.

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Fake, error, run};

#[test]
fn a_refusal_is_passed_on_without_control_characters() {
    let fake = Fake::new(|_| Some("{\"error\":\"limits are \\u001b[31mred\"}".to_owned()));
    let text = error(&fake.run(&["limit"]));
    assert!(text.ends_with("share.ctl: limits are \u{fffd}[31mred\n"), "{text}");
}

#[test]
fn nobody_there() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.ctl");
    assert!(error(&run(&missing, &["status"])).contains("is lanefsd running with --control-socket?"));
    let left = directory.path().join("left.ctl");
    drop(UnixListener::bind(&left).unwrap());
    assert!(error(&run(&left, &["status"])).contains("is lanefsd running with --control-socket?"));
    let long = directory.path().join("x".repeat(200));
    assert!(error(&run(&long, &["status"])).contains("cannot connect to"));
}

#[test]
fn a_connection_that_is_closed() {
    let fake = Fake::new(|_| None);
    assert!(error(&fake.run(&["status"])).contains("without an answer"));
}

#[test]
fn a_daemon_that_never_answers_ends_in_5_seconds() {
    let directory = tempfile::tempdir().unwrap();
    let (silent, slow) = (directory.path().join("silent.ctl"), directory.path().join("slow.ctl"));
    let _listener = UnixListener::bind(&silent).unwrap();
    // One byte now and then is no answer either.
    let listener = UnixListener::bind(&slow).unwrap();
    thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        while stream.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(200));
        }
    });
    let start = Instant::now();
    let output = run(&silent, &["-s", slow.to_str().unwrap(), "ops"]);
    let (text, time) = (String::from_utf8(output.stderr).unwrap(), start.elapsed());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text.matches("within 5 s: the daemon is stopped or overloaded").count(), 2, "{text}");
    assert!((Duration::from_secs(10)..Duration::from_secs(14)).contains(&time), "{time:?}");
}

#[test]
fn garbage_is_not_an_answer() {
    for text in
        ["SSH-2.0-OpenSSH_9.2", "{\"ok\":", "{}", "\u{1b}]0;x\u{7}", "[1,2]", "{\"ok\":{\"queues\":7}}"]
    {
        let fake = Fake::new(|_| Some(text.to_owned()));
        let text = error(&fake.run(&["status"]));
        assert!(text.contains("is not one of a control socket"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
    let fake = Fake::new(|_| Some("x".repeat(17 << 20)));
    let text = error(&fake.run(&["status"]));
    assert!(text.contains("longer than 16 MiB"), "{text}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let fake = Fake::idle();
    let script = format!(
        "{} -s {} status 2>&1 >/dev/full | grep -q 'cannot write the output' && \
         {} -s {} top -b -d 0.1 | head -1",
        env!("CARGO_BIN_EXE_lanefsctl"),
        fake.socket().display(),
        env!("CARGO_BIN_EXE_lanefsctl"),
        fake.socket().display()
    );
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
