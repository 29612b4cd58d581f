//! How lanefsd starts, what it refuses to start with, and what it leaves behind: nothing.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, SessionOptions};

use crate::common;

/// Runs the daemon with nothing but these options; it has to end with one sentence and status 1.
fn refused(args: &[&str]) -> String {
    let (status, stderr) = Backend::of(common::program()).bare().args(args).refuse().unwrap();
    assert_eq!(status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{args:?}: one sentence is wanted, not\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn a_share_that_is_no_directory() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let socket = directory.path().join("socket");
    for share in [file.to_str().unwrap(), "/nonexistent/share"] {
        let stderr = refused(&["--shared-dir", share, "--socket-path", socket.to_str().unwrap()]);
        assert!(stderr.contains(share), "{stderr}");
        assert!(!socket.exists());
    }
}

#[test]
fn a_socket_path_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let share = directory.path().to_str().unwrap();
    let stderr = refused(&["--shared-dir", share, "--socket-path", path.to_str().unwrap()]);
    assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    // Whoever has it keeps it.
    assert!(path.exists());
    std::os::unix::net::UnixStream::connect(&path).unwrap();
    drop(listener);
}

#[test]
fn a_socket_path_that_is_a_file_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    refused(&["--shared-dir", directory.path().to_str().unwrap(), "--socket-path", path.to_str().unwrap()]);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_directory_that_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("no/such/socket");
    let stderr = refused(&[
        "--shared-dir",
        directory.path().to_str().unwrap(),
        "--socket-path",
        path.to_str().unwrap(),
    ]);
    assert!(stderr.contains("no/such"), "{stderr}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// Mistakes of whoever starts the daemon, and what the one sentence about each has to say.
#[test]
fn each_common_mistake_has_its_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("share")).unwrap();
    fs::write(at("file"), "").unwrap();
    fs::create_dir(at("file.pid")).unwrap();
    fs::create_dir(at("busy.pid")).unwrap();
    std::os::unix::fs::symlink("loop", at("loop")).unwrap();
    let (share, socket) = (at("share"), at("socket"));
    let long = at(&"x".repeat(100));
    let both = |more: &str| format!("--shared-dir {share} --socket-path {socket} {more}");
    for (line, words) in [
        (String::new(), "either --socket-path or --fd"),
        (format!("--shared-dir {share}"), "either --socket-path or --fd"),
        (format!("--socket-path {socket}"), "--shared-dir is missing"),
        (both("--fd 3"), "mutually exclusive"),
        (format!("--socket-path {socket} --shared-dir {}", at("none")), "it does not exist"),
        (format!("--socket-path {socket} --shared-dir {}", at("none/below")), "none does not exist"),
        (format!("--socket-path {socket} --shared-dir {}", at("file")), "share its directory"),
        (format!("--socket-path {socket} --shared-dir {}", at("file/below")), "needs a directory"),
        (format!("--socket-path {socket} --shared-dir {}", at("loop")), "symbolic links"),
        (format!("--shared-dir {share} --socket-path {}", at("none/socket")), "does not exist; create it"),
        (format!("--shared-dir {share} --socket-path {}", at("file/socket")), "is not a directory"),
        (format!("--shared-dir {share} --socket-path {long}"), "107"),
        (format!("--shared-dir {share} --socket-path {share}"), "is not a socket"),
        (format!("--shared-dir {share} --socket-path /"), "name of a socket"),
        (format!("--shared-dir {share} --socket-path {}", at("busy")), "holds no process id"),
        (format!("--shared-dir {share} --fd 99"), "--fd 99 is not open"),
        (format!("--shared-dir {share} --fd 2"), "3 or more"),
        (both("--socket-group nobody-here"), "there is no group nobody-here"),
        (both("--rlimit-nofile 5"), "at least 64, or 0"),
        (both("--rlimit-nofile 99999999999"), "the host allows"),
        (both("--cpus 1023"), "names no CPU"),
        (both("--cpus 1-"), "is not a list of CPUs"),
        (both("--modcaps mknod"), "+sys_admin or -mknod"),
        (both("--uid-map 0:1000:1"), "like :0:1000:1:"),
        (both("--sandbox=none --uid-map :0:1000:1:"), "need --sandbox=namespace"),
        (both("-o nonsense"), "--help lists"),
        (both("-o loglevel=verbose"), "--help lists"),
        (both("--xattrmap :nonsense:"), "--xattrmap"),
        (both("--translate-uid nonsense"), "--translate-uid"),
        (both("--tag="), "1 to 36 bytes"),
        (both("--migration-unlinked-limit=many"), "like 64M or 1G"),
        (both("--migration-mode=file-handles --migration-confirm-paths"), "find-paths or auto only"),
    ] {
        let stderr = refused(&line.split_whitespace().collect::<Vec<_>>());
        assert!(stderr.contains(words), "{line}: no {words} in {stderr}");
    }
    let left: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

/// What clap refuses: status 2, and the words that can stand there.
#[test]
fn words_that_are_not_understood_are_answered_by_those_that_are() {
    for (option, words) in [
        ("--log-level=verbose", "off, error, warn, info, debug, trace"),
        ("--cache=some", "never, metadata, auto, always"),
        ("--sandbox=jail", "namespace, chroot, none"),
        ("--inode-file-handles=maybe", "never, prefer, mandatory"),
        ("--migration-mode=teleport", "find-paths, file-handles, auto"),
        ("--migration-on-error=ignore", "abort, guest-error"),
        ("--posix-acl=maybe", "never, auto, always"),
        ("--socket-pat=/x", "--socket-path"),
    ] {
        let (status, stderr) = Backend::of(common::program()).bare().args([option]).refuse().unwrap();
        assert_eq!(status.code(), Some(2), "{option}");
        assert!(stderr.contains(words), "{option}: {stderr}");
    }
}

/// A descriptor that is open and does not listen, at the number that launchers use.
#[test]
fn a_descriptor_that_is_not_what_it_should_be() {
    let share = tempfile::tempdir().unwrap();
    let line = format!("exec \"$0\" --shared-dir {} --fd 3", share.path().display());
    for (redirection, words) in [("3</dev/null", "is not a socket"), ("3<&-", "is not open")] {
        let script = format!("{line} {redirection}");
        let output = Command::new("sh").args(["-c", &script]).arg(common::program()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(words) && stderr.lines().count() == 1, "{stderr}");
    }
}

/// An ordinary user, with the daemon where he can start it.
struct User(tempfile::TempDir);

impl User {
    const ID: u32 = 4321;

    fn new() -> User {
        let home = User(tempfile::tempdir().unwrap());
        fs::set_permissions(home.0.path(), Permissions::from_mode(0o755)).unwrap();
        common::copy_program(&home.path("lanefsd"));
        for directory in ["share", "run"] {
            fs::create_dir(home.path(directory)).unwrap();
            std::os::unix::fs::chown(home.path(directory), Some(User::ID), Some(User::ID)).unwrap();
        }
        home
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// His daemon for this share and with this socket.
    fn daemon(&self, share: &str, socket: &str) -> lanefsd_frontend::backend::Starter {
        let ids = [format!("--reuid={}", User::ID), format!("--regid={}", User::ID), "--clear-groups".into()];
        let starter = Backend::of("setpriv").bare().args(ids).args([self.path("lanefsd")]);
        starter
            .args(["--shared-dir"])
            .args([self.path(share)])
            .args(["--socket-path"])
            .args([self.path(socket)])
    }
}

#[test]
fn what_a_user_may_not_do_has_its_sentence() {
    let user = User::new();
    fs::create_dir_all(user.path("shut/inner")).unwrap();
    fs::set_permissions(user.path("shut"), Permissions::from_mode(0o700)).unwrap();
    let shut = format!("may not enter {}", user.path("shut").display());
    for (share, socket, more, words) in [
        ("shut/inner", "run/socket", "--sandbox=none", shut.as_str()),
        ("shut/inner", "run/socket", "--sandbox=namespace", shut.as_str()),
        ("share", "socket", "--sandbox=none", "may not create the socket"),
        ("share", "shut/socket", "--sandbox=none", "may not create the socket"),
        ("share", "run/socket", "--socket-group=0", "--socket-group 0 needs root, or a user who is a member"),
        ("share", "run/socket", "--sandbox=chroot", "needs root"),
    ] {
        let starter = user.daemon(share, socket).args([more, "--log-level=error"]);
        let (status, stderr) = starter.refuse().unwrap();
        assert_eq!((status.code(), stderr.trim_end().lines().count()), (Some(1), 1), "{more}: {stderr}");
        assert!(stderr.contains(words), "{share} {socket} {more}: {stderr}");
        assert_eq!(fs::read_dir(user.path("run")).unwrap().count(), 0);
    }
}

/// Starts a daemon that serves, and returns what it has said by then.
fn words_at_start(starter: lanefsd_frontend::backend::Starter) -> String {
    let mut backend = starter.spawn().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    backend.stderr()
}

#[test]
fn a_user_is_told_what_will_not_work() {
    let user = User::new();
    // Without CAP_DAC_READ_SEARCH there are no file handles: three quarters of the limit are left.
    let words = words_at_start(user.daemon("share", "run/socket").args(["--rlimit-nofile=1024"]));
    assert!(words.contains("WARN") && words.contains("know and open 768 files"), "{words}");
    assert!(!words.contains("may not"), "{words}");
    let words = words_at_start(common::starter().args(["--rlimit-nofile=1024"]));
    assert!(!words.contains("file handles"), "{words}");
    for (mode, line) in [(0o755, "may not write to"), (0o711, "may not list")] {
        fs::set_permissions(user.path("share"), Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(user.path("share"), Some(0), Some(0)).unwrap();
        let words = words_at_start(user.daemon("share", "run/socket").args(["--sandbox=none"]));
        assert!(words.contains(line), "{mode:o}: {words}");
    }
}

#[test]
fn a_socket_inside_the_share_is_pointed_out() {
    let directory = tempfile::tempdir().unwrap();
    let (share, socket) = (directory.path().to_str().unwrap(), directory.path().join("socket"));
    let args = ["--shared-dir", share, "--socket-path", socket.to_str().unwrap()];
    let words = words_at_start(Backend::of(common::program()).bare().args(args));
    assert!(words.contains("is inside the share"), "{words}");
    assert!(!words_at_start(common::starter()).contains("is inside the share"));
}

#[test]
fn log_lines_have_a_time() {
    let words = words_at_start(common::starter());
    for line in words.lines() {
        let (time, rest) = line.split_once(' ').unwrap();
        let pattern: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(pattern, "0000-00-00T00:00:00.000Z", "{line}");
        assert!(rest.starts_with("lanefsd "), "{line}");
    }
}

/// Runs the daemon below this limit of descriptors; what it may have open, and what it has said.
fn descriptors_below(ulimit: &str, args: &[&str]) -> (String, String) {
    let script = format!("ulimit {ulimit}; exec \"$@\"");
    let starter = Backend::of("sh").args(["-c", &script, "sh"]).args([common::program()]).args(args);
    let backend = starter.start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let limits = fs::read_to_string(backend.proc("limits")).unwrap();
    let limit = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    (limit.split_whitespace().nth(3).unwrap().to_owned(), backend.stderr())
}

#[test]
fn the_limit_of_descriptors_is_left_alone_if_0_is_asked_for() {
    let (limit, _) = descriptors_below("-Sn 1000", &["--rlimit-nofile=0"]);
    assert_eq!(limit, "1000");
    let (status, stderr) = Backend::of("sh")
        .args(["-c", "ulimit -n 40; exec \"$@\"", "sh"])
        .args([common::program()])
        .args(["--rlimit-nofile=0"])
        .refuse()
        .unwrap();
    assert_eq!((status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.contains("may open 40 files"), "{stderr}");
}

#[test]
fn a_limit_that_cannot_be_raised_is_worth_a_line() {
    // Also for a root that may raise it: there it is raised.
    let (limit, words) = descriptors_below("-n 5000", &["--sandbox=none"]);
    let told = words.contains("may open 5000 files at once and not ");
    assert!(told || limit.parse::<u64>().unwrap() > 5000, "{limit}: {words}");
    let user = User::new();
    let ids = format!("setpriv --reuid={0} --regid={0} --clear-groups", User::ID);
    let script = format!("ulimit -n 5000; exec {ids} \"$@\"");
    let starter = Backend::of("sh").bare().args(["-c", &script, "sh"]).args([user.path("lanefsd")]);
    let starter = starter.args(["--shared-dir"]).args([user.path("share")]).args(["--socket-path"]);
    let words = words_at_start(starter.args([user.path("run/socket")]));
    assert!(words.contains("may open 5000 files at once and not "), "{words}");
}

#[test]
fn migration_options_of_virtiofsd_are_accepted() {
    for line in [
        "--migration-mode find-paths --migration-on-error abort",
        "--migration-mode=file-handles --migration-on-error=guest-error",
        "--migration-verify-handles --migration-confirm-paths",
    ] {
        assert!(!words_at_start(common::starter().args(line.split_whitespace())).contains("migra"));
    }
}

/// QEMU whose memory is not shared tells of none, and then of rings that are nowhere.
#[test]
fn a_vm_without_shared_memory_is_told_what_it_lacks() {
    use lanefsd_frontend::message::{VERSION, code};
    let mut backend = common::start(&["--log-level=error"]);
    let connection = lanefsd_frontend::connection::Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    connection.set_owner().unwrap();
    // Index and flags, then the addresses of descriptors, used ring, available ring and log.
    let mut body = vec![0; 8];
    for address in [0x7f00_0000_0000_u64, 0x7f00_0000_2000, 0x7f00_0000_1000, 0] {
        body.extend_from_slice(&address.to_ne_bytes());
    }
    connection.send_raw(code::SET_VRING_ADDR, VERSION, body.len() as u32, &body, &[]).unwrap();
    assert_eq!(backend.wait(Duration::from_secs(10)).unwrap().code(), Some(1));
    let stderr = backend.stderr();
    assert!(stderr.contains("share=on") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn contradicting_options() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let base =
        ["--shared-dir", directory.path().to_str().unwrap(), "--socket-path", socket.to_str().unwrap()];
    for more in [
        &["--writeback", "--parallel-direct-writes=always"][..],
        &["--fd=3"],
        &["--tag=0123456789012345678901234567890123456"],
    ] {
        refused(&[&base, more].concat());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn serves_over_an_inherited_socket() {
    let mut backend = common::starter().by_fd().start().unwrap();
    fs::write(backend.path("file"), "over --fd").unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    assert_eq!(session.client().read_file(node).unwrap(), b"over --fd");
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn ends_when_the_front_end_leaves_and_takes_its_socket_along() {
    let (mut backend, session) = common::serve(&[]);
    session.client().getattr(ROOT).unwrap();
    drop(session);
    backend.expect_success().unwrap();
    let left: Vec<_> = fs::read_dir(backend.socket().parent().unwrap()).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| entry.file_name() == "share"), "{left:?}");
}

#[test]
fn keeps_listening_if_told_to() {
    let backend = common::start(&["--keep-listening"]);
    let mut descriptors = 0;
    for round in 0..5 {
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let (entry, open) = client.create(ROOT, format!("file-{round}"), libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"round").unwrap();
        // Neither closed nor forgotten: the next front end starts with a clean slate nevertheless.
        let limit = if round < 2 { usize::MAX } else { descriptors };
        let now = common::settled_descriptors(&backend, limit);
        assert!(now <= limit, "{descriptors} descriptors in the round before, now {now}");
        descriptors = now;
    }
    assert_eq!(fs::read(backend.path("file-4")).unwrap(), b"round");
}

#[test]
fn ends_on_sigterm_with_and_without_a_front_end() {
    let mut idle = common::start(&[]);
    idle.signal(libc::SIGTERM).unwrap();
    idle.expect_success().unwrap();
    assert!(!idle.socket().exists());
    let (mut busy, session) = common::serve(&["--keep-listening"]);
    session.client().getattr(ROOT).unwrap();
    busy.signal(libc::SIGTERM).unwrap();
    busy.expect_success().unwrap();
}

#[test]
fn tells_that_it_waits_for_a_connection() {
    // Kata's runtime waits for these words.
    let backend = common::starter().args(["--log-level=info"]).start().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !backend.stderr().contains("Waiting for vhost-user socket connection") {
        assert!(std::time::Instant::now() < deadline, "stderr: {}", backend.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn prints_capabilities_whatever_else_is_asked() {
    for args in [&["--print-capabilities"][..], &["--print-capabilities", "--shared-dir", "/nonexistent"]] {
        let output = Command::new(common::program()).args(args).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success());
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["type"], "fs");
        let features = json["features"].as_array().unwrap();
        for feature in [
            "migrate-precopy",
            "separate-options",
            "posix-acl-negotiation-mode",
            "security-label-negotiation-mode",
        ] {
            assert!(features.iter().any(|one| one == feature), "{json}");
        }
        // What libvirt knows before it asks is the same.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/60-lanefsd.json");
        let installed: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        assert_eq!((&installed["type"], &installed["features"]), (&json["type"], &json["features"]));
    }
}

/// As systemd waits for a unit with Type=notify.
#[test]
fn a_service_manager_is_told_that_the_daemon_is_ready() {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let abstract_name = format!("lanefsd-test-{}", std::process::id());
    let named = UnixDatagram::bind(&path).unwrap();
    let nameless = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
    for (manager, name) in
        [(&named, path.to_str().unwrap().to_owned()), (&nameless, format!("@{abstract_name}"))]
    {
        manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        for more in [&[][..], &["--no-survive"], &["--sandbox=none"], &["--sandbox=chroot", "--no-survive"]] {
            let starter = Backend::of("env").args([&format!("NOTIFY_SOCKET={name}")]);
            let mut backend = starter.args([common::program()]).args(more).spawn().unwrap();
            let mut text = [0; 100];
            let length = manager.recv(&mut text).unwrap();
            assert_eq!(&text[..length], b"READY=1");
            // Ready is ready: it does not have to be waited for any more.
            let session = backend.connect(SessionOptions::default()).unwrap();
            session.client().getattr(ROOT).unwrap();
            drop(session);
            backend.expect_success().unwrap();
            manager.set_nonblocking(true).unwrap();
            assert!(manager.recv(&mut text).is_err(), "it is told once");
            manager.set_nonblocking(false).unwrap();
        }
    }
    // One that is not there any more ends nothing.
    let starter =
        Backend::of("env").args([format!("NOTIFY_SOCKET={}/no-socket", directory.path().display())]);
    let mut backend = starter.args([common::program()]).start().unwrap();
    common::wait_for_words(&backend, "cannot be told that lanefsd is ready");
    drop(backend.connect(SessionOptions::default()).unwrap());
    backend.expect_success().unwrap();
}
