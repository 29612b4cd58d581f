//! The monitor as a process: who may connect, its files, its death.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use lanefsd_frontend::Backend;
use lanefsd_frontend::client::ROOT;
use rustix::process::{Pid, Signal, kill_process};

use super::{Watched, serve};
use crate::common;
use crate::survival::IMMORTAL;

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
