//! Each command, with the request that it sends.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use crate::fake::{Fake, error, idle};

#[test]
fn each_command_prints_text_for_people() {
    let fake = Fake::idle();
    for (words, expected) in [
        (
            &["status"][..],
            "share web\n  directory   /srv/web\n  daemon      lanefsd 0.2.0, process 4194305\n",
        ),
        (
            &["ops"],
            "share web\n  OP     PHASE       AGE   SIZE  QUEUE  UNIQUE\n  write  serving  500 ms  4 KiB",
        ),
        (&["slow"], "share web\n  OP       TIME  WAITED"),
        (&["limit"], "share web\n  LIMIT            VALUE  MEANING\n  read-bytes         off"),
        (&["loglevel", "debug"], "share web: log level debug\n"),
        (&["drain"], "share web: no requests in flight, and no new ones are taken\n"),
        (&["resume"], "share web: requests are taken again\n"),
    ] {
        let text = fake.output(words);
        assert!(text.starts_with(expected), "{words:?}:\n{text}");
    }
}

#[test]
fn json_is_printed_as_it_came() {
    let fake = Fake::idle();
    for command in ["status", "ops", "slow", "limit", "resume", "drain"] {
        let expected = idle(&json!({ "command": command })) + "\n";
        assert_eq!(fake.output(&["--json", command]), expected);
    }
    let refusing = Fake::new(|_| Some(r#"{"error":"no"}"#.to_owned()));
    for command in ["status", "drain"] {
        let output = refusing.run(&[command, "--json"]);
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b"{\"error\":\"no\"}\n"[..]));
    }
}

#[test]
fn limits_are_sent_as_they_are_typed() {
    let fake = Fake::idle();
    fake.output(&["limit", "write-bytes=100M", "read-ops=off", "burst=1s"]);
    let set = "write-bytes=100M,read-ops=none,burst=1s";
    assert_eq!(fake.requests()[0], json!({ "command": "limit", "set": set }));
}

#[test]
fn drain_waits_for_requests_in_flight() {
    let left = AtomicU64::new(3);
    let fake = Fake::new(move |request| match request["command"].as_str() {
        Some("drain") => {
            let left = left.fetch_sub(1, Ordering::Relaxed);
            Some(format!(r#"{{"ok":{{"draining":true,"in_flight":{left}}}}}"#))
        }
        _ => Some(idle(request)),
    });
    assert!(fake.output(&["drain"]).contains("no requests in flight"));
    assert_eq!(fake.requests().iter().filter(|request| request["command"] == "drain").count(), 4);
}

#[test]
fn drain_gives_up_after_its_time() {
    let fake = Fake::new(|request| match request["command"].as_str() {
        Some("drain") => Some(r#"{"ok":{"draining":true,"in_flight":2}}"#.to_owned()),
        _ => Some(idle(request)),
    });
    let text = error(&fake.run(&["drain", "--timeout", "0.3"]));
    assert!(text.contains("share web: 2 requests still in flight after 0.3 s"), "{text}");
}

#[test]
fn several_shares_are_shown_one_after_the_other_though_one_is_gone() {
    let (a, b) = (Fake::idle(), Fake::idle());
    let (second, missing) = (b.socket(), b.socket().with_file_name("missing.ctl"));
    let output = a.run(&["-s", missing.to_str().unwrap(), "-s", second.to_str().unwrap(), "status"]);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(text.matches("share web\n").count(), 2, "{text}");
    assert!(error(&output).contains("missing.ctl"));
}

#[test]
fn upgrade_runs_the_daemon_beside_it_and_passes_its_status_on() {
    let fake = Fake::idle();
    let directory = tempfile::tempdir().unwrap();
    let (own, daemon) = (directory.path().join("lanefsctl"), directory.path().join("lanefsd"));
    // By other processes: a file that this one has open for writing cannot be run, nor can it while a test beside this
    // one starts a process.
    let script = r#"cp "$1" "$2" && printf '#!/bin/sh\necho "$@"\nexit 7\n' >"$3" && chmod +x "$3""#;
    let program = env!("CARGO_BIN_EXE_lanefsctl");
    let made = Command::new("sh").args(["-c", script, "sh", program]).args([&own, &daemon]).status();
    assert!(made.unwrap().success());
    let run =
        || Command::new(&own).arg("upgrade").arg("-s").arg(fake.socket()).env("PATH", "/nowhere").output();
    let output = run().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(7), &b"upgrade --pid 4194305\n"[..]));
    std::fs::remove_file(&daemon).unwrap();
    assert!(error(&run().unwrap()).contains("cannot run lanefsd"));
}

#[test]
fn upgrade_signals_no_other_program() {
    let own = std::process::id();
    let fake = Fake::new(move |_| Some(format!(r#"{{"ok":{{"pid":{own}}}}}"#)));
    let text = error(&fake.run(&["upgrade"]));
    assert!(text.contains(&format!("names process {own}, which runs ")), "{text}");
    let fake = Fake::new(|_| Some(r#"{"ok":{}}"#.to_owned()));
    assert!(error(&fake.run(&["upgrade"])).contains("lacks the process id"));
}

#[test]
fn a_wrong_command_line_has_status_2() {
    let fake = Fake::idle();
    for words in [
        &["dance"][..],
        &["limit", "speed=3"],
        &["loglevel", "loud"],
        &["top", "--json"],
        &["upgrade", "--json"],
        &["top", "--interval", "0"],
    ] {
        let output = fake.run(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        assert!(output.stderr.starts_with(b"error: "), "{words:?}: {output:?}");
    }
    assert_eq!(fake.run(&["--help"]).status.code(), Some(0));
    assert!(fake.requests().is_empty());
}
