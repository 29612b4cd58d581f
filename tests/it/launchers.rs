//! What a launcher leaves to the daemon beside its options: signals that are blocked or ignored, descriptors that are
//! open, securebits, a working directory. All of it survives execve(2), and none of it may change what the daemon
//! promises.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::{Backend, SessionOptions};

use crate::common;

const SANDBOXES: [&str; 3] = ["--sandbox=namespace", "--sandbox=chroot", "--sandbox=none"];
const END: u64 = i64::MAX.unsigned_abs();

/// The daemon, started by this program with these arguments.
fn launched(launcher: &[&str]) -> Starter {
    Backend::of(launcher[0]).args(&launcher[1..]).args([common::program()])
}

/// Starts it, and has it serve.
fn serves(starter: Starter) -> Backend {
    let backend = starter.args(["--keep-listening"]).start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    drop(session);
    backend
}

fn ends_on_a_signal(mut backend: Backend) {
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert!(!backend.socket().exists());
}

#[test]
fn blocked_and_ignored_signals_still_work() {
    for signals in ["--block-signal=USR1", "--block-signal", "--ignore-signal=USR1", "--ignore-signal=TERM"] {
        for sandbox in SANDBOXES {
            let starter = launched(&["env", signals]).args([sandbox, "--posix-lock"]);
            let mut backend = starter.start().unwrap();
            let session = backend.connect(SessionOptions::default()).unwrap();
            let client = session.client();
            let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
            let lock = |owner| Lock::posix(owner, libc::F_WRLCK, 0, END);
            client.setlk(entry.nodeid, open.fh, lock(1)).unwrap();
            let waiting = client.send(lock(2).waiting_request(entry.nodeid, open.fh)).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            session.stop_queue(1).unwrap();
            assert!(!session.queue(1).is_done(waiting.token).unwrap(), "{signals} {sandbox}");
            backend.signal(libc::SIGTERM).unwrap();
            backend.expect_success().unwrap();
        }
    }
}

#[test]
fn an_ignored_hangup_does_not_end_a_daemon_without_survival() {
    let launcher = ["env", "--ignore-signal=HUP", "--block-signal=HUP"];
    let backend = serves(launched(&launcher).args(["--no-survive"]));
    backend.signal(libc::SIGHUP).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    backend.connect(SessionOptions::default()).unwrap().client().getattr(ROOT).unwrap();
    ends_on_a_signal(backend);
}

#[test]
fn ignored_children_change_neither_sandbox_nor_ids_nor_status() {
    const IGNORED: [&str; 2] = ["env", "--ignore-signal=CHLD"];
    for args in [&[][..], &["--sandbox=chroot"], &["--uid-map=:0:0:65536:", "--gid-map=:0:0:65536:"]] {
        ends_on_a_signal(serves(launched(&IGNORED).args(args)));
    }
    let (status, stderr) =
        launched(&IGNORED).args(["--modcaps=+sys_time", "--rlimit-nofile=5"]).refuse().unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    // An ordinary user.
    let home = tempfile::tempdir().unwrap();
    let (program, run) = (home.path().join("lanefsd"), home.path().join("run"));
    common::copy_program(&program);
    fs::create_dir(&run).unwrap();
    for path in [home.path(), &run] {
        std::os::unix::fs::chown(path, Some(4321), Some(4321)).unwrap();
    }
    let ids = ["--reuid=4321", "--regid=4321", "--clear-groups"];
    let starter = Backend::of("setpriv").bare().args(ids).args(IGNORED).args([&program]);
    let socket = run.join("socket");
    let starter = starter.args(["--shared-dir"]).args([&run]).args(["--socket-path"]).args([&socket]);
    let mut backend = starter.spawn().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let mounts = |path: &Path| fs::read_link(path).unwrap();
    assert_ne!(
        mounts(&backend.proc("ns/mnt")),
        mounts(Path::new("/proc/self/ns/mnt")),
        "{}",
        backend.stderr()
    );
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
}

/// Which file, device and inode.
type Identity = (u64, u64);

fn identity(path: impl AsRef<Path>) -> Option<Identity> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// What both processes of the daemon have open and work in.
fn places(backend: &Backend) -> Vec<Identity> {
    let mut places = Vec::new();
    for process in [backend.proc(""), format!("/proc/{}", backend.pid()).into()] {
        places.extend(identity(process.join("cwd")));
        let open = fs::read_dir(process.join("fd")).unwrap();
        places.extend(open.filter_map(|entry| identity(entry.unwrap().path())));
    }
    places
}

/// Something that the launcher has at hand: a directory with a file in it.
fn forgotten() -> tempfile::TempDir {
    let forgotten = tempfile::tempdir().unwrap();
    fs::write(forgotten.path().join("file"), "").unwrap();
    forgotten
}

/// A shell that forgets to close things.
const FORGETFUL: &str = "cd \"$0\"; exec 4<\"$0\" 5<file 7>>file 9</; exec \"$@\" <\"$0\" ";

#[test]
fn descriptors_of_the_launcher_are_closed() {
    for sandbox in SANDBOXES {
        for (by_fd, output) in [(false, ""), (true, ""), (false, ">&4")] {
            let forgotten = forgotten();
            let script = format!("{FORGETFUL}{output}");
            let starter =
                launched(&["sh", "-c", &script, forgotten.path().to_str().unwrap()]).args([sandbox]);
            let backend = serves(if by_fd { starter.by_fd() } else { starter });
            let mut gone = vec![identity(forgotten.path().join("file")).unwrap()];
            if sandbox != "--sandbox=none" {
                // Without a sandbox it works where it was started, and its root is that of the host.
                gone.extend(identity(forgotten.path()));
            }
            let open = places(&backend);
            assert!(
                !gone.iter().any(|one| open.contains(one)),
                "{sandbox} {by_fd}{output}: {gone:?} {open:?}"
            );
            let directories = backend.descriptors().unwrap();
            assert!(!directories.iter().any(|path| Path::new(path) == forgotten.path()), "{directories:?}");
            if by_fd {
                // Whoever has made the socket removes it.
                let _ = fs::remove_file(backend.socket());
            }
            ends_on_a_signal(backend);
        }
    }
}

/// A volume that was the launcher's working directory and standard input is free at once.
#[test]
fn what_the_launcher_had_open_can_be_unmounted() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    common::own_mounts();
    for sandbox in &SANDBOXES[..2] {
        let volume = tempfile::tempdir().unwrap();
        mount("none", volume.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(volume.path().join("file"), "").unwrap();
        let starter = launched(&["sh", "-c", FORGETFUL, volume.path().to_str().unwrap()]);
        let backend = serves(starter.args([sandbox]));
        unmount(volume.path(), UnmountFlags::empty()).unwrap();
        ends_on_a_signal(backend);
    }
}

/// As before Linux 5.9, and in containers with a filter of system calls that does not know the call.
#[test]
fn descriptors_are_closed_without_close_range_as_well() {
    let forgotten = forgotten();
    let at = forgotten.path().to_str().unwrap();
    for errno in ["ENOSYS", "EPERM"] {
        let inject = format!("inject=close_range:error={errno}");
        let strace = ["strace", "-f", "-o", "/dev/null", "-e", &inject, "sh", "-c", FORGETFUL, at];
        let mut backend = launched(&strace).args(["--sandbox=namespace"]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let open = places(&backend);
        let gone = [forgotten.path().join("file"), "/".into()].map(|path| identity(path).unwrap());
        assert!(!gone.iter().any(|one| open.contains(one)), "{gone:?} {open:?}");
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn capabilities_follow_the_caller_whatever_the_securebits_are() {
    // FS_IOC_SETFLAGS, and FS_NODUMP_FL.
    const SETFLAGS: u32 = 0x4008_6602;
    const NODUMP: u32 = 0x40;
    for sandbox in SANDBOXES {
        let share = common::disk_directory();
        let starter = launched(&["setpriv", "--securebits=+no_setuid_fixup"]).share(share.path());
        let mut backend = starter.args([sandbox]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o666, 0).unwrap();
        for _ in 0..3 {
            let stranger = client.user(1001, 1001);
            let flags = stranger.ioctl(entry.nodeid, open.fh, SETFLAGS, &NODUMP.to_ne_bytes(), 0);
            assert_eq!(common::errno(flags), libc::EPERM, "{sandbox}");
            client.getattr(ROOT).unwrap();
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn a_securebit_that_cannot_be_cleared_ends_the_start() {
    let locked = ["setpriv", "--securebits=+no_setuid_fixup,+no_setuid_fixup_locked"];
    for sandbox in SANDBOXES {
        let (status, stderr) = launched(&locked).args([sandbox, "--log-level=error"]).refuse().unwrap();
        assert_eq!((status.code(), stderr.lines().count()), (Some(1), 1), "{sandbox}: {stderr}");
        assert!(stderr.contains("no_setuid_fixup"), "{sandbox}: {stderr}");
        // Who acts as nobody else has nothing to lose.
        ends_on_a_signal(serves(launched(&locked).args([sandbox, "--modcaps=-setuid"])));
    }
    // A user namespace has securebits of its own.
    let maps = ["--uid-map=:0:0:65536:", "--gid-map=:0:0:65536:"];
    ends_on_a_signal(serves(launched(&locked).args(maps)));
}
