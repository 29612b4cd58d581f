//! The process that waits outside the sandbox: signals, and the end of either process.

use std::path::Path;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::common;
use crate::sandbox::{as_root, outer_of, under_strace};

#[test]
fn a_signal_ends_the_serving_process_too() {
    as_root();
    let mut backend = common::starter().args(["--sandbox=namespace", "--keep-listening"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let serving = common::serving_process(backend.pid());
    assert_ne!(serving, backend.pid());
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert!(!Path::new(&format!("/proc/{serving}")).exists());
    assert!(!backend.socket().exists());
}

/// Kata's Go runtime ends a daemon by SIGKILL.
#[test]
fn a_killed_parent_takes_the_serving_process_along() {
    as_root();
    for sandbox in ["namespace", "chroot", "none"] {
        let mut backend = common::starter().args([&format!("--sandbox={sandbox}")]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid());
        backend.signal(libc::SIGKILL).unwrap();
        backend.wait(std::time::Duration::from_secs(5)).unwrap();
        common::expect_end(serving);
    }
}

/// The process that waits outside is killed before the other one can ask for a signal at its end, or for its end.
#[test]
fn a_parent_that_is_killed_at_the_start_leaves_no_daemon() {
    let (signal, end) = ("inject=prctl:delay_enter=1s:when=1", "inject=poll,ppoll:delay_enter=1s:when=1");
    for (delay, args) in [
        (signal, &["--sandbox=namespace", "--no-survive"][..]),
        (end, &["--sandbox=namespace"]),
        (end, &["--sandbox=chroot"]),
        (end, &["--sandbox=none"]),
    ] {
        let mut backend = under_strace(&[delay], args);
        let outer = outer_of(&backend);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let child = loop {
            match common::serving_process(outer) {
                child if child != outer => break child,
                _ => assert!(std::time::Instant::now() < deadline, "no second process"),
            }
        };
        kill_process(Pid::from_raw(outer.cast_signed()).unwrap(), Signal::KILL).unwrap();
        common::expect_end(child);
        backend.wait(std::time::Duration::from_secs(5)).unwrap();
    }
}

/// A daemon that was started in a terminal.
struct InTerminal {
    directory: tempfile::TempDir,
    terminal: std::process::Child,
    session: Session,
    started: u32,
}

impl InTerminal {
    fn start(launcher: &str, args: &str) -> InTerminal {
        let directory = tempfile::tempdir().unwrap();
        let (share, socket) = (directory.path().display(), directory.path().join("socket"));
        let program = common::program();
        let command = format!(
            "exec {launcher} {} {args} --keep-listening --shared-dir={share} --socket-path={} >/dev/null 2>&1",
            program.to_str().unwrap(),
            socket.display()
        );
        let terminal = std::process::Command::new("script")
            .args(["-qc", &command, "/dev/null"])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        common::wait_until(|| socket.exists(), "the socket");
        let session = Session::connect(&socket, SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let started = std::fs::read_to_string(directory.path().join("socket.pid")).unwrap();
        let started = started.trim().parse().unwrap();
        InTerminal { directory, terminal, session, started }
    }

    fn serving(&self) -> u32 {
        common::serving_process(self.started)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.started.cast_signed()).unwrap(), signal).unwrap();
    }

    /// Closes the terminal.
    fn close(&mut self) {
        self.terminal.kill().unwrap();
        self.terminal.wait().unwrap();
    }

    /// Waits until the process has lost its terminal, after the kernel has sent SIGHUP.
    fn wait_for_hangup(&self) {
        let stat = format!("/proc/{}/stat", self.started);
        // The name is in parentheses; state, parent, group and session come before the terminal.
        let terminal = |stat: &str| stat.rsplit_once(") ")?.1.split(' ').nth(4).map(str::to_owned);
        let is_gone =
            || terminal(&std::fs::read_to_string(&stat).unwrap()).is_some_and(|number| number == "0");
        common::wait_until(is_gone, "the end of the terminal");
    }
}

/// A terminal that is closed sends SIGHUP.
#[test]
fn a_closed_terminal_ends_the_daemon_in_order() {
    as_root();
    common::hear_hangups();
    for sandbox in ["namespace", "chroot", "none"] {
        for options in ["", "--no-survive"] {
            let mut daemon = InTerminal::start("", &format!("--sandbox={sandbox} {options}"));
            let serving = daemon.serving();
            daemon.close();
            common::expect_end(daemon.started);
            common::expect_end(serving);
            let socket = daemon.directory.path().join("socket");
            assert!(!socket.exists(), "{sandbox} {options}: the socket is left behind");
        }
    }
}

/// nohup(1) ignores the signal. A process may still ask for an upgrade by it.
#[test]
fn a_closed_terminal_leaves_a_daemon_below_nohup_alone() {
    as_root();
    common::hear_hangups();
    for (options, upgrades) in [("--sandbox=none", 0), ("--sandbox=namespace", 2), ("--no-survive", 0)] {
        let mut daemon = InTerminal::start("nohup", options);
        for _ in 0..upgrades {
            let before = daemon.serving();
            daemon.signal(Signal::HUP);
            common::wait_until(|| ![before, daemon.started].contains(&daemon.serving()), "an upgrade");
            daemon.session.client().getattr(ROOT).unwrap();
        }
        let serving = daemon.serving();
        daemon.close();
        daemon.wait_for_hangup();
        std::thread::sleep(std::time::Duration::from_millis(200));
        daemon.session.client().getattr(ROOT).unwrap();
        assert_eq!(daemon.serving(), serving, "{options}: another process serves");
        daemon.signal(Signal::TERM);
        common::expect_end(daemon.started);
    }
}

/// Without survival, one that a process sends means the same.
#[test]
fn a_hangup_ends_a_daemon_without_survival() {
    as_root();
    common::hear_hangups();
    for sandbox in ["namespace", "chroot", "none"] {
        let sandbox = format!("--sandbox={sandbox}");
        let options = ["--no-survive", &sandbox, "--keep-listening"];
        let mut backend = common::starter().args(options).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid());
        backend.signal(libc::SIGHUP).unwrap();
        backend.expect_success().unwrap();
        common::expect_end(serving);
        assert!(!backend.socket().exists(), "{sandbox}: the socket is left behind");
        // nohup(1) ignores the signal.
        let starter = lanefsd_frontend::Backend::of("nohup").args([common::program()]);
        let mut backend = starter.args([&sandbox, "--no-survive"]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        backend.signal(libc::SIGHUP).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        session.client().getattr(ROOT).unwrap();
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// The process outside the sandbox has what it and later workers need, also after a worker has died and after an upgrade.
#[test]
fn the_supervisor_is_confined() {
    as_root();
    let users = ["--uid-map=:0:0:65536:", "--gid-map=:0:0:65536:"];
    // CAP_SYS_ADMIN and CAP_SYS_CHROOT are for the sandbox; CAP_SYS_PTRACE, CAP_NET_ADMIN, CAP_SYS_MODULE and others for nobody.
    let to_mount = 1 << 21 | 1 << 18;
    let to_serve = 0b1_1111 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 27 | 1 << 31;
    for (args, may) in [
        (&["--sandbox=namespace"][..], to_serve | to_mount),
        (&["--sandbox=chroot"], to_serve | to_mount),
        (&["--sandbox=none"], to_serve),
        (&["--sandbox=none", "--modcaps=+linux_immutable"], to_serve | 1 << 9),
        (&users[..], to_serve | to_mount),
    ] {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let program = directory.path().join("lanefsd");
        common::copy_program(&program);
        let backend = lanefsd_frontend::Backend::of(&program).args(args).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let check = |when: &str| {
            session.client().getattr(ROOT).unwrap();
            let status = std::fs::read_to_string(format!("/proc/{}/status", backend.pid())).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                u64::from_str_radix(line.trim(), 16).unwrap()
            };
            assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), (2, 1), "{args:?} {when}");
            assert_eq!(field("Seccomp_filters:"), 1, "{args:?} {when}");
            for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
                assert_eq!(field(set) & !may, 0, "{args:?} {when}: {set} {:x}", field(set));
            }
            assert_eq!(field("CapEff:") & to_serve, to_serve, "{args:?} {when}");
        };
        check("at first");
        backend.replace_worker(libc::SIGKILL).unwrap();
        check("after a death");
        for _ in 0..2 {
            backend.upgrade().unwrap();
            check("after an upgrade");
        }
    }
}
