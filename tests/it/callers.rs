//! The programs that start such a daemon, and what they write on its command line: each line has
//! to start it and to serve a request.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use fuse_protocol::flags::InitFlags;
use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session, SessionOptions};
use tempfile::TempDir;

use crate::common;

/// What callers write, with FD and SOCKET for the listening socket and SHARE for the directory.
const LINES: &[(&str, &str)] = &[
    ("libvirt 11", "--fd=FD --shared-dir SHARE"),
    (
        "libvirt 11",
        "--fd=FD --shared-dir SHARE --cache never --sandbox namespace --xattr --thread-pool-size=16 --rlimit-nofile=16384 --log-level debug",
    ),
    ("libvirt 11", "--fd=FD --shared-dir SHARE --cache always --sandbox chroot --thread-pool-size=0"),
    ("libvirt 11, read-only", "--fd=FD --shared-dir SHARE --xattr --readonly"),
    (
        "libvirt 11, ids mapped",
        "--fd=FD --shared-dir SHARE --uid-map=:0:0:1: --uid-map=:1:100000:65535: --gid-map=:0:0:1: --gid-map=:1:100000:65535:",
    ),
    ("libvirt 9", "--fd=FD -o source=SHARE"),
    (
        "libvirt 9",
        "--fd=FD -o source=SHARE,cache=none,sandbox=namespace,xattr,flock,posix_lock --thread-pool-size=64 -d",
    ),
    ("libvirt 9", "--fd=FD -o source=SHARE,cache=always,sandbox=chroot,no_xattr,no_flock,no_posix_lock"),
    ("Kata runtime-rs", "--socket-path SOCKET --shared-dir SHARE --cache never"),
    (
        "Kata runtime-rs",
        "--socket-path SOCKET --shared-dir SHARE --cache auto --thread-pool-size=1 -o announce_submounts",
    ),
    ("Podman machine", "--sandbox none --socket-path SOCKET --shared-dir . --seccomp=none"),
    (
        "Incus",
        "--fd=FD --cache=never --shared-dir=SHARE --translate-uid=map:0:100000:65536 --translate-uid=forbid-guest:65536:4294901759 --translate-gid=map:0:100000:65536 --translate-gid=forbid-guest:65536:4294901759 --posix-acl=auto",
    ),
    (
        "Incus",
        "--fd=FD --cache=auto --shared-dir=SHARE --translate-uid=forbid-guest:1000:4294966295 --posix-acl",
    ),
    (
        "KubeVirt",
        "--socket-path=SOCKET --shared-dir=SHARE --sandbox=chroot --cache=auto --modcaps=+sys_admin --inode-file-handles=prefer --translate-uid=squash-guest:0:107:4294967295 --translate-gid=squash-guest:0:107:4294967295 --xattr",
    ),
    ("cloud-hypervisor", "--socket-path SOCKET --shared-dir SHARE --cache=never"),
    ("cloud-hypervisor", "--socket-path SOCKET --shared-dir SHARE --cache=never --thread-pool-size=4"),
    ("virtme-ng", "--syslog --no-announce-submounts --socket-path SOCKET --shared-dir SHARE --sandbox none"),
    (
        "systemd-vmspawn",
        "--shared-dir SHARE --xattr --fd=FD --no-announce-submounts --log-level=error --modcaps=-mknod",
    ),
    ("mkosi", "--fd=FD --shared-dir SHARE --xattr --no-announce-submounts --sandbox=chroot"),
    (
        "microvm.nix",
        "--socket-path=SOCKET --socket-group=root --shared-dir=SHARE --rlimit-nofile 1048 --thread-pool-size 4 --posix-acl --xattr --cache=auto --inode-file-handles=prefer",
    ),
    (
        "Firecracker's fork",
        "--socket-path SOCKET --shared-dir SHARE --readonly --no-announce-submounts --sandbox namespace --inode-file-handles=never --migration-mode find-paths --migration-on-error abort",
    ),
    (
        "Kata runtime-go",
        "--syslog --cache=auto --shared-dir=SHARE --fd=FD --announce-submounts --thread-pool-size=1",
    ),
    ("scripts of old", "--socket=SOCKET -o source=SHARE -o cache=auto -o loglevel=err -f"),
    (
        "runcvm",
        "-o modcaps=+sys_admin -o cache=always -o announce_submounts -o xattr --socket-path=SOCKET -o source=SHARE -o sandbox=chroot",
    ),
];

/// What virtiofsd 1.14 takes besides directory and socket, one start for each line.
const VIRTIOFSDS_OPTIONS: &[&str] = &[
    "--tag=share",
    "--socket-group=root",
    "--thread-pool-size=0",
    "--xattr",
    "--posix-acl",
    "--posix-acl=never",
    "--posix-acl=auto",
    "--posix-acl=always",
    "--xattrmap=:map::user.virtiofs.:",
    "--xattrmap=:prefix:all:trusted.:user.virtiofs.::bad:all:trusted.:security.::ok:all:::",
    "--xattrmap=/prefix/all//user.virtiofs.//bad/all///",
    "--sandbox=Namespace",
    "--sandbox=chroot",
    "--sandbox=none",
    "--readonly",
    "--seccomp=none",
    "--seccomp=kill",
    "--seccomp=log",
    "--seccomp=trap",
    "--announce-submounts --no-announce-submounts",
    "--inode-file-handles=never",
    "--inode-file-handles=fallback",
    "--inode-file-handles=prefer",
    "--inode-file-handles=mandatory",
    "--cache=auto",
    "--cache=always",
    "--cache=never --allow-mmap",
    "--cache=Metadata",
    "--no-readdirplus",
    "--writeback",
    "--allow-direct-io",
    "--modcaps=+sys_admin:-chown",
    "--log-level=off",
    "--log-level=ERROR",
    "--log-level trace",
    "--rlimit-nofile=0",
    "--rlimit-nofile 4096",
    "-o xattrmap=:map::user.virtiofs.:",
    "-o cache=auto,cache=always,cache=none,cache=metadata",
    "-o loglevel=debug,loglevel=info,loglevel=warn,loglevel=err",
    "-o sandbox=namespace,sandbox=chroot",
    "-o modcaps=+sys_admin",
    "-o xattr,no_xattr,readdirplus,no_readdirplus,writeback,no_writeback",
    "-o allow_direct_io,no_allow_direct_io,announce_submounts,killpriv_v2,no_killpriv_v2",
    "-o posix_acl,no_posix_acl,security_label,no_security_label,no_posix_lock,no_flock",
    "-d",
    "-f",
    "--killpriv-v2",
    "--no-killpriv-v2",
    // The guest of this test has no labels, and is served all the same.
    "--security-label --security-label=auto",
    "--security-label=auto",
    "--uid-map=:0:0:1: --gid-map /0/0/1/",
    "--translate-uid=guest:1:2:3 --translate-gid guest:1:2:3",
    "--translate-uid=host:1:2:3",
    "--translate-uid=squash-guest:1:2:3 --translate-uid=squash-host:1:2:3",
    "--translate-uid=forbid-guest:1:3",
    "--translate-uid=map:1:2:3",
    "--preserve-noatime",
    "--migration-mode=find-paths --migration-on-error=abort",
    "--migration-mode=file-handles --migration-on-error=guest-error",
    "--migration-verify-handles --migration-confirm-paths",
];

/// An ordinary user of the host, who needs no name.
const USER: u32 = 4321;

/// A directory for one start.
struct Place(TempDir);

impl Place {
    /// The share's name has a comma in it, which libvirt doubles.
    fn new() -> Place {
        assert!(
            rustix::process::geteuid().is_root(),
            "run the tests as root, as which callers start the daemon"
        );
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.share()).unwrap();
        fs::write(place.share().join("from-host"), "hello").unwrap();
        place
    }

    fn share(&self) -> PathBuf {
        self.0.path().join("the,share")
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }

    /// The words of a line.
    fn words(&self, line: &str) -> Vec<String> {
        let share = self.share().to_str().unwrap().to_owned();
        let old = share.replace(',', ",,");
        let fill = |word: &str| {
            let word = word.replace("source=SHARE", &format!("source={old}")).replace("SHARE", &share);
            word.replace("SOCKET", self.socket().to_str().unwrap()).replace("--fd=FD", "--fd=3")
        };
        line.split_whitespace().map(fill).collect()
    }

    /// Starts the daemon as a caller does, and connects.
    fn start(&self, starter: Starter, line: &str) -> (Backend, Session) {
        let starter = starter.bare().args(self.words(line)).current_dir(self.share());
        let by_fd = line.contains("--fd=");
        let backend = if by_fd { starter.by_fd().spawn() } else { starter.spawn() }.unwrap();
        let socket = if by_fd { backend.socket().to_owned() } else { self.socket() };
        common::wait_until(|| socket.exists(), "the socket");
        let session = Session::connect(&socket, SessionOptions::default());
        (backend, session.unwrap_or_else(|error| panic!("{line}: {error}")))
    }

    /// Has requests served: what the host has written is there, and the other way round.
    fn use_it(&self, session: &Session, readonly: bool) {
        let client = session.client();
        let node = client.lookup(ROOT, "from-host").unwrap().nodeid;
        assert_eq!(client.read_file(node).unwrap(), b"hello");
        let created = client.create(ROOT, "from-guest", libc::O_RDWR, 0o600, 0);
        if readonly {
            assert_eq!(common::errno(created), libc::EROFS);
            return;
        }
        let (entry, open) = created.unwrap();
        client.write(entry.nodeid, open.fh, 0, b"hello").unwrap();
        assert_eq!(fs::read(self.share().join("from-guest")).unwrap(), b"hello");
    }
}

#[test]
fn every_line_starts_and_serves() {
    for (caller, line) in LINES {
        eprintln!("{caller}: {line}");
        let place = Place::new();
        let (mut backend, session) = place.start(Backend::of(common::program()), line);
        place.use_it(&session, line.contains("--readonly"));
        drop(session);
        backend.expect_success().unwrap();
        assert!(!place.socket().exists(), "{caller}: the socket is left behind");
    }
}

#[test]
fn every_option_of_virtiofsd_starts() {
    for options in VIRTIOFSDS_OPTIONS {
        eprintln!("{options}");
        let place = Place::new();
        let line = format!("--socket-path SOCKET --shared-dir SHARE {options}");
        let (mut backend, session) = place.start(Backend::of(common::program()), &line);
        session.client().getattr(ROOT).unwrap();
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Build tools start it as root of a user namespace, runners as a user without a sandbox.
#[test]
fn users_start_it() {
    let squash = "--sandbox=none --translate-uid=squash-host:0:USER:4294967295 --translate-gid=squash-host:0:USER:4294967295";
    let vmspawn =
        "--shared-dir SHARE --xattr --fd=FD --no-announce-submounts --log-level=error --modcaps=-mknod";
    for (caller, wrapper, line) in [
        (
            "mkosi",
            "unshare -Ur",
            "--fd=FD --shared-dir SHARE --xattr --no-announce-submounts --sandbox=chroot",
        ),
        ("systemd-vmspawn", "unshare -Ur", vmspawn),
        ("a user", "", "--socket-path SOCKET --shared-dir SHARE"),
        ("a user", "", "--socket-path SOCKET --shared-dir SHARE --rlimit-nofile=0 --sandbox=namespace"),
        (
            "libvirt's session mode",
            "",
            "--fd=FD --shared-dir SHARE --uid-map=:0:USER:1: --gid-map=:0:USER:1:",
        ),
        ("a runner", "", &format!("--socket-path SOCKET --shared-dir SHARE --readonly {squash}")),
        ("KubeVirt", "", "--socket-path=SOCKET --shared-dir=SHARE --sandbox=none --cache=auto --xattr"),
        (
            "KubeVirt",
            "",
            "--socket-path=SOCKET --shared-dir=SHARE --sandbox=none --cache=auto --migration-on-error=guest-error --migration-mode=find-paths",
        ),
        (
            "KubeVirt, a volume",
            "",
            "--socket-path=SOCKET --shared-dir=SHARE --sandbox=none --cache=auto --migration-on-error=guest-error --migration-mode=find-paths --migration-verify-handles",
        ),
    ] {
        eprintln!("{caller}: {wrapper} {line}");
        let place = Place::new();
        let program = place.0.path().join("lanefsd");
        common::copy_program(&program);
        for path in [place.0.path(), &place.share()] {
            std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
        }
        let words = format!("--reuid={USER} --regid={USER} --clear-groups {wrapper}");
        let starter = Backend::of("setpriv").args(words.split_whitespace()).args([&program]);
        let (mut backend, session) = place.start(starter, &line.replace("USER", &USER.to_string()));
        let node = session.client().lookup(ROOT, "from-host").unwrap().nodeid;
        assert_eq!(session.client().read_file(node).unwrap(), b"hello", "{caller}");
        drop(session);
        backend.expect_success().unwrap();
        assert!(!place.socket().exists(), "{caller}: the socket is left behind");
    }
}

/// What libvirt starts in place of the daemon to get at options that it has no element for.
#[test]
fn a_wrapper_script_adds_options() {
    let place = Place::new();
    let wrapper = place.0.path().join("wrapper");
    let program = std::path::PathBuf::from(common::program());
    let script = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/dist/lanefsd-with-locks")).unwrap();
    let script = script.replace("/usr/bin/lanefsd", program.to_str().unwrap());
    assert!(script.contains(program.to_str().unwrap()));
    fs::write(&wrapper, script).unwrap();
    let by_shell = |args: &[&str]| Backend::of("sh").args([&wrapper]).args(args);
    let output = std::process::Command::new("sh").arg(&wrapper).arg("--print-capabilities").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("separate-options"));
    let (_backend, session) = place.start(by_shell(&[]), "--fd=FD --shared-dir SHARE");
    assert!(session.init_flags().contains(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS));
}

#[test]
fn podman_wants_errors_alone() {
    let place = Place::new();
    let line = "--sandbox none --socket-path SOCKET --shared-dir . --seccomp=none";
    let (mut backend, session) = place.start(Backend::of(common::program()).env("RUST_LOG", "ERROR"), line);
    place.use_it(&session, false);
    drop(session);
    backend.expect_success().unwrap();
    assert_eq!(backend.stderr(), "");
}

/// Kata gives its messages to the system log, which is one of the test's here: in a mount
/// namespace of its own the daemon finds it where the host would have it.
#[test]
fn kata_wants_the_system_log() {
    let place = Place::new();
    let path = place.0.path().join("log");
    let log = UnixDatagram::bind(&path).unwrap();
    log.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let script = "if [ -e /dev/log ]; then mount --bind $0 /dev/log; \
                  else mount -t tmpfs none /run && ln -s $0 /run/syslog; fi && exec \"$@\"";
    let starter = Backend::of("unshare").args(["--mount", "sh", "-c", script]).args([Path::new(&path)]);
    let starter = starter.args([common::program()]);
    let line = "--syslog --cache=auto --shared-dir=SHARE --fd=FD --thread-pool-size=1 --announce-submounts";
    let (mut backend, session) = place.start(starter, line);
    place.use_it(&session, false);
    // The second one comes from a worker, inside the sandbox.
    for words in ["Waiting for vhost-user socket connection", "session begins"] {
        let mut message = [0; 1000];
        loop {
            let length = log.recv(&mut message).unwrap_or_else(|error| panic!("{words}: {error}"));
            if String::from_utf8_lossy(&message[..length]).contains(words) {
                break;
            }
        }
    }
    drop(session);
    backend.expect_success().unwrap();
    assert_eq!(backend.stderr(), "");
}

/// A host on which nobody listens for messages to the system log, or no longer.
#[test]
fn without_a_system_log_messages_go_to_standard_error() {
    let line = "--syslog --cache=auto --shared-dir=SHARE --fd=FD --thread-pool-size=1 --announce-submounts";
    let place = Place::new();
    let script = "mount -t tmpfs none /run && { [ ! -e /dev/log ] || mount --bind /dev/null /dev/log; } && exec \"$@\"";
    let starter =
        Backend::of("unshare").args(["--mount", "sh", "-c", script, "sh"]).args([common::program()]);
    let (mut backend, session) = place.start(starter, line);
    place.use_it(&session, false);
    common::wait_for_words(&backend, "session begins");
    assert!(backend.stderr().contains("cannot connect to syslog"), "{}", backend.stderr());
    drop(session);
    backend.expect_success().unwrap();

    let place = Place::new();
    let path = place.0.path().join("log");
    let log = UnixDatagram::bind(&path).unwrap();
    let script = "if [ -e /dev/log ]; then mount --bind $0 /dev/log; \
                  else mount -t tmpfs none /run && ln -s $0 /run/syslog; fi && exec \"$@\"";
    let starter = Backend::of("unshare").args(["--mount", "sh", "-c", script]).args([Path::new(&path)]);
    let (mut backend, session) = place.start(starter.args([common::program()]), line);
    assert_eq!(backend.stderr(), "");
    // The log daemon ends, and the next one has another socket.
    drop(log);
    // A child that another test has just forked may keep the socket open until its exec.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !backend.stderr().contains("session begins") {
        assert!(Instant::now() < deadline, "{}", backend.stderr());
        session.init().unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    drop(session);
    backend.expect_success().unwrap();
}
