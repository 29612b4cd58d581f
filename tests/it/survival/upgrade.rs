//! A daemon goes on with another program, and the front end notices nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{VERSION, code};
use lanefsd_frontend::{Backend, Session, SessionOptions};
use tempfile::TempDir;

use super::{IMMORTAL, SANDBOXES, kill_worker, serves, worker};
use crate::common;

/// A program that can be replaced while it runs.
struct Installed(TempDir);

impl Installed {
    fn new() -> Installed {
        let installed = Installed(common::disk_directory());
        fs::set_permissions(installed.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        installed.install();
        installed
    }

    fn program(&self) -> PathBuf {
        self.0.path().join("lanefsd")
    }

    /// Puts a new copy in the program's place.
    fn install(&self) {
        let new = self.0.path().join("new");
        common::copy_program(&new);
        fs::rename(new, self.program()).unwrap();
    }

    /// Puts a script in the program's place.
    fn install_script(&self, text: &str) {
        let new = self.0.path().join("new");
        // Another process writes it: see `copy_program`.
        common::run(
            Command::new("sh").args(["-c", "printf %s \"$1\" >$0 && chmod +x $0"]).arg(&new).arg(text),
        );
        fs::rename(new, self.program()).unwrap();
    }

    fn starter(&self) -> Starter {
        Backend::of(self.program()).args([IMMORTAL, "--log-level=info"])
    }

    /// A daemon that is ready.
    fn start(&self, args: &[&str]) -> Backend {
        let backend = self.starter().args(args).start().unwrap();
        common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
        backend
    }
}

/// `lanefsd upgrade`.
fn command(args: &[&str]) -> Output {
    Command::new(common::program()).arg("upgrade").args(args).output().unwrap()
}

/// Upgrades a daemon, which has to work.
fn upgrade(backend: &Backend) -> String {
    let output = command(&["--pid", &backend.pid().to_string()]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words}");
    String::from_utf8(output.stdout).unwrap()
}

/// Tries to, in vain, and returns why.
fn refused(backend: &Backend) -> String {
    let output = command(&["--pid", &backend.pid().to_string()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_front_end_notices_nothing_of_an_upgrade() {
    for sandbox in SANDBOXES {
        let installed = Installed::new();
        let mut backend = installed.start(&[sandbox]);
        let session = backend.connect(common::queues(3)).unwrap();
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"before").unwrap();
        let old = worker(&backend).unwrap();
        installed.install();
        let said = upgrade(&backend);
        let version = env!("CARGO_PKG_VERSION");
        let pid = backend.pid();
        assert_eq!(said, format!("process {pid} was upgraded from lanefsd {version} to {version}\n"));
        serves(&session);
        common::wait_until(|| worker(&backend).is_some_and(|new| new != old), "another worker");
        let running = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(running, installed.program(), "not a program that was deleted");
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        assert_eq!(name.trim(), "lanefsd");
        serves(&session);
        assert_eq!(client.read(entry.nodeid, open.fh, 0, 10).unwrap(), b"before");
        client.write(entry.nodeid, open.fh, 0, b"after!").unwrap();
        assert_eq!(fs::read(backend.path("file")).unwrap(), b"after!");
        // And a death after it.
        kill_worker(&backend);
        serves(&session);
        drop(session);
        backend.expect_success().unwrap();
        assert!(!backend.socket().exists());
        assert!(!backend.socket().with_extension("pid").exists());
        let words = backend.stderr();
        assert_eq!(words.matches("upgraded from lanefsd").count(), 1, "{words}");
    }
}

#[test]
fn an_idle_daemon_is_upgraded() {
    for sandbox in SANDBOXES {
        let installed = Installed::new();
        let mut backend = installed.start(&[sandbox, "--keep-listening"]);
        let socket = backend.socket().to_owned();
        for _ in 0..3 {
            installed.install();
            let output = command(&["--socket-path", socket.to_str().unwrap()]);
            assert!(output.status.success(), "{output:?}");
            let session = backend.connect(SessionOptions::default()).unwrap();
            serves(&session);
        }
        backend.signal(libc::SIGTERM).unwrap();
        backend.expect_success().unwrap();
        assert!(!socket.exists());
    }
}

/// What a guest may have open, locked or under way.
#[test]
fn all_that_a_guest_has_survives_twenty_upgrades() {
    const END: u64 = i64::MAX as u64;
    let installed = Installed::new();
    let backend = installed.start(&["--sandbox=namespace", "--posix-lock", "--flock"]);
    let session = backend.connect(common::queues(3)).unwrap();
    let client = session.client();
    let (file, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let (node, one) = (file.nodeid, open.fh);
    let two = client.open(node, libc::O_RDWR).unwrap().fh;
    let (gone, unlinked) = client.create(ROOT, "gone", libc::O_RDWR, 0o600, 0).unwrap();
    client.write(gone.nodeid, unlinked.fh, 0, b"unlinked").unwrap();
    client.unlink(ROOT, "gone").unwrap();
    client.setlk(node, one, Lock::posix(1, libc::F_WRLCK, 0, 99)).unwrap();
    client.setlk(node, one, Lock::flock(3, libc::F_WRLCK)).unwrap();
    let waiting = client.send(Lock::posix(2, libc::F_WRLCK, 0, END).waiting_request(node, two)).unwrap();
    let names: Vec<String> = (0..100).map(|number| format!("name-{number:03}")).collect();
    let directory = client.mkdir(ROOT, "many", 0o755, 0).unwrap().nodeid;
    for name in &names {
        client.mkdir(directory, name, 0o755, 0).unwrap();
    }
    let listing = client.opendir(directory).unwrap().fh;
    let (mut listed, mut offset) = (Vec::new(), 0);
    let host = fs::File::open(backend.path("file")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    for _ in 0..20 {
        let entries = client.readdir(directory, listing, offset, 200).unwrap();
        offset = entries.last().map_or(offset, |last| last.offset);
        listed.extend(entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()));
        upgrade(&backend);
        assert_eq!(client.read(gone.nodeid, unlinked.fh, 0, 20).unwrap(), b"unlinked");
        assert!(host.try_lock().is_err(), "the lock of flock(2) is held");
        let in_the_way = client.getlk(node, two, Lock::posix(9, libc::F_WRLCK, 0, 200)).unwrap();
        assert_eq!((in_the_way.start, in_the_way.end), (0, 99));
        assert!(!client.queue().is_done(waiting.token).unwrap(), "the lock is waited for");
    }
    loop {
        let entries = client.readdir(directory, listing, offset, 1000).unwrap();
        let Some(last) = entries.last() else { break };
        offset = last.offset;
        listed.extend(entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()));
    }
    listed.retain(|name| name.starts_with("name-"));
    listed.sort();
    assert_eq!(listed, names);
    client.setlk(node, one, Lock::posix(1, libc::F_UNLCK, 0, END)).unwrap();
    session.finish(waiting).unwrap();
    client.setlk(node, one, Lock::flock(3, libc::F_UNLCK)).unwrap();
    host.try_lock().unwrap();
}

/// Each of these writes its own blocks as long as upgrades go on, and reads them back.
#[test]
fn requests_in_flight_are_served_once_while_daemons_are_upgraded() {
    for sandbox in SANDBOXES {
        let installed = Installed::new();
        let backend = installed.start(&[sandbox]);
        let session = backend.connect(common::queues(4)).unwrap();
        let (file, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let log = session.client().create(ROOT, "log", libc::O_RDWR | libc::O_APPEND, 0o600, 0).unwrap();
        let done = AtomicBool::new(false);
        let appended: usize = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3u8)
                .map(|number| {
                    let (client, done) = (session.client().on(usize::from(number) + 1), &done);
                    scope.spawn(move || {
                        let mut rounds = 0;
                        while !done.load(Ordering::Relaxed) {
                            let block = [number.wrapping_mul(80).wrapping_add(rounds); 4096];
                            let offset = u64::from(number) * 4096;
                            assert_eq!(client.write(file.nodeid, open.fh, offset, &block).unwrap(), 4096);
                            assert_eq!(client.read(file.nodeid, open.fh, offset, 4096).unwrap(), block);
                            let name = format!("name-{number}-{rounds}");
                            let made = client.mkdir(ROOT, &name, 0o755, 0).unwrap();
                            client.rename(ROOT, &name, ROOT, format!("{name}-new")).unwrap();
                            client.rmdir(ROOT, format!("{name}-new")).unwrap();
                            client.forget(made.nodeid, 1).unwrap();
                            rounds = rounds.wrapping_add(1);
                        }
                    })
                })
                .collect();
            let appender = scope.spawn(|| {
                let (client, mut count) = (session.client().on(4), 0);
                while !done.load(Ordering::Relaxed) {
                    let line = format!("{count:07}\n");
                    let flags = libc::O_RDWR | libc::O_APPEND;
                    let (node, fh, offset) = (log.0.nodeid, log.1.fh, 8 * count as u64);
                    let none = WriteFlags::empty();
                    client.write_with(node, fh, offset, line.as_bytes(), none, flags).unwrap();
                    count += 1;
                }
                count
            });
            let _done = common::Done(&done);
            for _ in 0..20 {
                upgrade(&backend);
            }
            done.store(true, Ordering::Relaxed);
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            appender.join().unwrap()
        });
        let expected: String = (0..appended).map(|number| format!("{number:07}\n")).collect();
        assert_eq!(fs::read_to_string(backend.path("log")).unwrap(), expected);
        assert!(appended > 20, "{appended}");
        serves(&session);
    }
}

#[test]
fn nothing_stays_open_after_an_upgrade() {
    for sandbox in SANDBOXES {
        let installed = Installed::new();
        let backend = installed.start(&[sandbox]);
        let session = backend.connect(common::queues(2)).unwrap();
        upgrade(&backend);
        serves(&session);
        let before = backend.descriptors().unwrap().len();
        for _ in 0..20 {
            upgrade(&backend);
            serves(&session);
        }
        let after = common::settled_descriptors(&backend, before);
        assert!(after <= before, "{sandbox}: {before} descriptors, and then {after}");
    }
}

#[test]
fn a_daemon_in_a_user_namespace_is_upgraded() {
    let installed = Installed::new();
    let home = tempfile::tempdir().unwrap();
    let run = home.path().join("run");
    fs::create_dir(&run).unwrap();
    for path in [home.path(), &run] {
        std::os::unix::fs::chown(path, Some(4322), Some(4322)).unwrap();
    }
    let socket = run.join("socket");
    let ids = ["--reuid=4322", "--regid=4322", "--clear-groups"];
    let starter = Backend::of("setpriv").bare().args(ids).args([installed.program()]).args([IMMORTAL]);
    let starter = starter.args(["--sandbox=namespace", "--log-level=info", "--shared-dir"]).args([&run]);
    let mut backend = starter.args(["--socket-path"]).args([&socket]).spawn().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let session = Session::connect(&socket, SessionOptions::default()).unwrap();
    let user = fs::read_link(backend.proc("ns/user")).unwrap();
    for _ in 0..3 {
        upgrade(&backend);
        serves(&session);
        kill_worker(&backend);
        serves(&session);
        assert_eq!(fs::read_link(backend.proc("ns/user")).unwrap(), user);
        let status = fs::read_to_string(format!("/proc/{}/status", backend.pid())).unwrap();
        assert!(status.contains("CapAmb:\t0000000000000000"), "{status}");
    }
    // As the same user.
    let mut command = Command::new("setpriv");
    let command = command.args(ids).arg(installed.program()).args(["upgrade", "--socket-path"]).arg(&socket);
    common::run(command);
    serves(&session);
    drop(session);
    backend.expect_success().unwrap();
    assert!(!socket.exists());
}

#[test]
fn a_listening_socket_of_a_launcher_is_kept() {
    let installed = Installed::new();
    let mut backend = installed.starter().by_fd().args(["--sandbox=namespace"]).start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    upgrade(&backend);
    let session = backend.connect(SessionOptions::default()).unwrap();
    upgrade(&backend);
    serves(&session);
    drop(session);
    backend.expect_success().unwrap();
}

/// A front end that waits for another one's end, and one that has sent a part of a message.
#[test]
fn connections_that_wait_are_kept() {
    let installed = Installed::new();
    let backend = installed.start(&["--sandbox=none", "--keep-listening"]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    let waiting = Connection::connect(backend.socket()).unwrap();
    waiting.send_raw(code::GET_FEATURES, VERSION, 0, &[], &[]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    upgrade(&backend);
    serves(&session);
    drop(session);
    assert_eq!(waiting.receive_raw("GET_FEATURES").unwrap().1.len(), 8);
}

/// Programs with which nothing is begun.
#[test]
fn a_program_that_cannot_go_on_changes_nothing() {
    let installed = Installed::new();
    let backend = installed.start(&["--sandbox=namespace"]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    let serving = worker(&backend);
    let try_in_vain = |why: &str| {
        let said = refused(&backend);
        assert!(said.contains(why), "{said}");
        assert_eq!(worker(&backend), serving, "the same worker goes on: {said}");
        serves(&session);
    };
    installed.install_script("#!/bin/sh\nexit 0\n");
    try_in_vain("it is not lanefsd, or an older version");
    installed.install_script("#!/bin/sh\necho; echo no way >&2; exit 3\n");
    try_in_vain("was not upgraded: no way");
    installed.install_script("#!/bin/sh\nexit 3\n");
    try_in_vain("it ended with exit status 3");
    installed.install_script("#!/bin/sh\nyes\n");
    try_in_vain("was not upgraded: y");
    installed.install_script("#!/bin/sh\nexec sleep 60\n");
    try_in_vain("it gave no answer within 15 seconds");
    installed.install_script("no program");
    try_in_vain("cannot be executed: Exec format error");
    fs::remove_file(installed.program()).unwrap();
    try_in_vain("cannot be executed: No such file or directory");
    // What it was started with is not taken any more.
    installed.install_script(&format!("#!/bin/sh\nexec {} \"$@\" --nonsense\n", program()));
    try_in_vain("unexpected argument '--nonsense'");
    // And another file than that of the state.
    installed.install_script(&format!("#!/bin/sh\nexec {} \"$@\" --check-state=0\n", program()));
    try_in_vain("was not upgraded");
    installed.install();
    upgrade(&backend);
    serves(&session);
    let words = backend.stderr();
    assert_eq!(words.matches("goes on, since").count(), 9, "{words}");
}

fn program() -> String {
    common::program().into_string().unwrap()
}

/// A program that passes the check and then begins with `begin`.
fn fails_later(begin: &str) -> String {
    let program = program();
    format!("#!/bin/sh\ncase $1 in --check-state=*) exec {program} \"$@\";; esac\n{begin}\n")
}

/// The old program goes on, in the same process, with another worker.
#[test]
fn a_program_that_fails_after_its_check_is_left() {
    let program = program();
    let without = "--ambient-caps=-all --inh-caps=-all --bounding-set=-sys_time";
    for sandbox in SANDBOXES {
        for (begin, why) in [
            (format!("exec {program} \"$@\" --nonsense"), "unexpected argument '--nonsense'"),
            (format!("exec {program} \"$@\" --tag="), "--tag must have"),
            (format!("exec {program} \"$@\" --cpus=1000"), "--cpus names no CPU"),
            (format!("exec setpriv {without} {program} \"$@\" --modcaps=+sys_time"), "its worker process"),
        ] {
            let installed = Installed::new();
            let mut backend = installed.start(&[sandbox, "--posix-lock"]);
            let session = backend.connect(common::queues(2)).unwrap();
            let client = session.client();
            let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
            client.write(entry.nodeid, open.fh, 0, b"kept").unwrap();
            installed.install_script(&fails_later(&begin));
            for _ in 0..2 {
                let said = refused(&backend);
                assert!(said.contains(why), "{sandbox}: {said}: {}", backend.stderr());
                serves(&session);
                assert_eq!(client.read(entry.nodeid, open.fh, 0, 10).unwrap(), b"kept");
            }
            let name = fs::read_to_string(format!("/proc/{}/comm", backend.pid())).unwrap();
            assert_eq!(name.trim(), "lanefsd");
            kill_worker(&backend);
            serves(&session);
            installed.install();
            upgrade(&backend);
            serves(&session);
            drop(session);
            backend.expect_success().unwrap();
            assert!(!backend.socket().exists());
        }
    }
}

#[test]
fn only_a_daemon_that_can_be_upgraded_is_signalled() {
    let said = |output: Output| {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let mut backend = common::starter().args(["--no-survive"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let socket = backend.socket().to_str().unwrap().to_owned();
    assert!(said(command(&["--socket-path", &socket])).contains("was started with --no-survive"));
    serves(&session);
    assert!(said(command(&["--pid", &std::process::id().to_string()])).contains("is not a lanefsd"));
    assert!(said(command(&["--pid", "4194304"])).contains("there is no process 4194304"));
    assert!(said(command(&["--socket-path", "/nonexistent"])).contains("/nonexistent.pid cannot be read"));
    drop(session);
    backend.expect_success().unwrap();
    assert_eq!(command(&[]).status.code(), Some(2));
}

#[test]
fn a_signal_during_an_upgrade_ends_the_daemon() {
    let installed = Installed::new();
    for millis in 0..20 {
        let mut backend = installed.start(&["--sandbox=namespace"]);
        let session = backend.connect(SessionOptions::default()).unwrap();
        backend.signal(libc::SIGHUP).unwrap();
        std::thread::sleep(Duration::from_millis(3 * millis));
        backend.signal(libc::SIGTERM).unwrap();
        backend.expect_success().unwrap();
        assert!(!backend.socket().exists());
        drop(session);
    }
}
