//! `top` without a terminal.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fake::{Fake, error};

/// A daemon that serves 100 writes in each second of its clock.
fn busy() -> Fake {
    let clock = AtomicU64::new(1);
    Fake::new(move |request| {
        assert_eq!(request["command"], "sample");
        let now = clock.fetch_add(1, Ordering::Relaxed);
        let count = now * 100;
        Some(
            format!(
                r#"{{"ok":{{"share":"web","time_seconds":{now},"bounds":[0.001,0.002],"in_flight":3,
            "ops":{{"write":{{"count":{count},"seconds":{now}.0,"errors":0,"buckets":[0,{count},0]}}}},
            "bytes":{{"read":0,"written":{now}000000}}}}}}"#
            )
            .replace('\n', ""),
        )
    })
}

#[test]
fn batch_prints_each_interval() {
    let text = busy().output(&["top", "--batch", "--count=2", "--interval=0.1"]);
    assert_eq!(text.matches("UTC, 0.1 s\nSHARE").count(), 2, "{text}");
    let share = text.lines().nth(2).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(share.starts_with("web 100 0 B 1.00 MB 10.0 ms 1.99 ms 3 0 0"), "{share}");
    let op = text.lines().nth(5).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(op, "write 100 100 % 10.0 ms 1.50 ms 1.99 ms 0");
}

#[test]
fn a_share_that_is_gone_has_a_line() {
    let fake = busy();
    let missing = fake.socket().with_file_name("missing.ctl");
    let words = ["-s", missing.to_str().unwrap(), "top", "-b", "-n1", "-d0.1"];
    let text = fake.output(&words);
    assert!(
        text.lines().any(|line| line.starts_with("missing ") && line.contains("gone: cannot connect")),
        "{text}"
    );
}

#[test]
fn a_share_that_never_answers_is_an_error() {
    let fake = Fake::new(|_| Some(r#"{"error":"no"}"#.to_owned()));
    let text = error(&fake.run(&["top", "-b", "-n2", "-d0.1"]));
    assert!(text.contains("no share answered: "), "{text}");
}

#[test]
fn a_connection_that_is_lost_is_made_again() {
    let clock = AtomicU64::new(1);
    // Each connection serves one request.
    let fake = Fake::new(move |_| {
        let now = clock.fetch_add(1, Ordering::Relaxed);
        (!now.is_multiple_of(2)).then(|| format!(r#"{{"ok":{{"share":"web","time_seconds":{now}}}}}"#))
    });
    let text = fake.output(&["top", "-b", "-n3", "-d0.1"]);
    assert!(!text.contains("gone"), "{text}");
}

#[test]
fn a_live_view_wants_a_terminal() {
    let fake = busy();
    let output = Command::new(env!("CARGO_BIN_EXE_lanefsctl"))
        .arg("-s")
        .arg(fake.socket())
        .arg("top")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(error(&output), "lanefsctl: top needs a terminal; use top --batch for plain text\n");
}
