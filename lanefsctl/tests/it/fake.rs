//! A daemon's control socket without a daemon.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

/// The reply to a request; none closes the connection.
type Reply = dyn Fn(&Value) -> Option<String> + Send + Sync;

/// A control socket in a directory of its own.
pub struct Fake {
    directory: tempfile::TempDir,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Fake {
    /// Answers each line with a line.
    pub fn new(reply: impl Fn(&Value) -> Option<String> + Send + Sync + 'static) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("share.ctl")).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (reply, seen): (Arc<Reply>, _) = (Arc::new(reply), Arc::clone(&requests));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (reply, seen) = (Arc::clone(&reply), Arc::clone(&seen));
                thread::spawn(move || serve(&stream.unwrap(), &*reply, &seen));
            }
        });
        Fake { directory, requests }
    }

    /// Answers as a daemon does that has nothing to do.
    pub fn idle() -> Fake {
        Fake::new(|request| Some(idle(request)))
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("share.ctl")
    }

    /// The requests that came.
    pub fn requests(&self) -> Vec<Value> {
        self.requests.lock().unwrap().clone()
    }

    /// Runs lanefsctl for this socket.
    pub fn run(&self, words: &[&str]) -> Output {
        run(&self.socket(), words)
    }

    /// Runs it, and takes what it prints.
    pub fn output(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The answers of a daemon that has nothing to do. Its process id is one above those that Linux gives.
pub fn idle(request: &Value) -> String {
    let ok = match request["command"].as_str().unwrap() {
        "status" => {
            r#"{"share":"web","directory":"/srv/web","version":"0.2.0","pid":4194305,"log_level":"info","new":[]}"#
        }
        "ops" => {
            r#"{"ops":[{"op":"write","unique":7,"queue":1,"age_seconds":0.5,"phase":"serving","size":4096}]}"#
        }
        "slow" => r#"{"slow":[{"op":"fsync","seconds":1.5,"ended_seconds_ago":3.0,"wait_seconds":0.4}]}"#,
        "limit" => r#"{"limits":{"read-bytes":0,"write-bytes":104857600}}"#,
        "loglevel" => r#"{"log_level":"debug"}"#,
        "drain" => r#"{"draining":true,"in_flight":0}"#,
        "resume" => r#"{"draining":false}"#,
        command => return format!(r#"{{"error":"there is no command {command}"}}"#),
    };
    format!(r#"{{"ok":{ok}}}"#)
}

/// Runs lanefsctl for a socket.
pub fn run(socket: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lanefsctl"));
    command.arg("--socket").arg(socket).args(words).output().unwrap()
}

/// The sentence on the standard error of a run that failed.
pub fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(text.starts_with("lanefsctl: ") && text.lines().count() == 1, "{text}");
    text
}

fn serve(stream: &UnixStream, reply: &Reply, seen: &Mutex<Vec<Value>>) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        assert!(line.len() < 4096);
        let request = serde_json::from_str(&line).unwrap();
        let text = reply(&request);
        seen.lock().unwrap().push(request);
        let Some(text) = text else { return };
        let mut out = stream;
        // The other side may have left.
        if out.write_all(format!("{text}\n").as_bytes()).is_err() {
            return;
        }
    }
}
