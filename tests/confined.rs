//! Everything is served from behind all walls: namespaces, few capabilities, and a filter that ends
//! the daemon at the first system call that is not on its list.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::time::Duration;

use lanefsd::fuse::opcode::Opcode;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::{Backend, Caller, Client, Request, SessionOptions};

const ALL_LOCKS: u64 = i64::MAX.unsigned_abs();

/// The opcodes that are answered ENOSYS without a look at their arguments.
const NOT_SERVED: &[Opcode] = &[
    Opcode::Bmap,
    Opcode::Ioctl,
    Opcode::Poll,
    Opcode::NotifyReply,
    Opcode::SetupMapping,
    Opcode::RemoveMapping,
];

fn names(client: &Client<'_>) {
    let dir = client.mkdir(ROOT, "dir", 0o755, 0o022).unwrap().nodeid;
    client.mknod(dir, "fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
    let link = client.symlink(dir, "link", "fifo").unwrap().nodeid;
    client.readlink(link).unwrap();
    client.link(link, dir, "second").unwrap();
    client.rename(dir, "second", ROOT, "third").unwrap();
    client.rename2(ROOT, "third", dir, "fifo", libc::RENAME_EXCHANGE).unwrap();
    for name in ["fifo", "link"] {
        client.unlink(dir, name).unwrap();
    }
    client.unlink(ROOT, "third").unwrap();
    let handle = client.opendir(ROOT).unwrap().fh;
    assert!(!client.readdir(ROOT, handle, 0, 4096).unwrap().is_empty());
    assert!(!client.readdirplus(ROOT, handle, 0, 4096).unwrap().is_empty());
    client.fsyncdir(ROOT, handle).unwrap();
    client.releasedir(ROOT, handle).unwrap();
    client.rmdir(ROOT, "dir").unwrap();
    client.forget(dir, 1).unwrap();
    client.forget_batch(&[(link, 2)]).unwrap();
}

fn data(client: &Client<'_>) {
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    client.write(node, fh, 0, &[7; 100_000]).unwrap();
    assert_eq!(client.read(node, fh, 0, 100_000).unwrap().len(), 100_000);
    client.fallocate(node, fh, 0, 0, 200_000).unwrap();
    client.lseek(node, fh, 0, libc::SEEK_DATA).unwrap();
    let (unnamed, to) = client.tmpfile(ROOT, libc::O_RDWR, 0o600).unwrap();
    client.copy_file_range((node, fh, 0), (unnamed.nodeid, to.fh, 0), 5000).unwrap();
    client.copy_file_range_64((node, fh, 0), (unnamed.nodeid, to.fh, 5000), 5000).unwrap();
    client.copy_file_range_64((node, fh, 0), (node, fh, 1 << 20), 1 << 40).unwrap();
    for data_only in [true, false] {
        client.fsync(node, fh, data_only).unwrap();
    }
    client.flush(node, fh, 1).unwrap();
    client.release(node, fh).unwrap();
    let again = client.open(node, libc::O_WRONLY | libc::O_TRUNC | libc::O_DIRECT).unwrap();
    client.release(node, again.fh).unwrap();
    client.syncfs(ROOT).unwrap();
    client.statfs(ROOT).unwrap();
}

fn attributes(client: &Client<'_>) {
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.getattr(node).unwrap();
    client.statx(node, libc::STATX_BASIC_STATS).unwrap();
    client.access(node, libc::R_OK).unwrap();
    let change = Change::none().mode(0o644).uid(1001).gid(1002).size(10).times((1, 2), (3, 4));
    client.setattr(node, change.kill_suidgid()).unwrap();
    client.setxattr(node, "user.name", b"value", 0).unwrap();
    client.getxattr(node, "user.name", 100).unwrap();
    client.listxattr(node, 100).unwrap();
    client.removexattr(node, "user.name").unwrap();
    // An empty set of file capabilities, which takes a capability itself.
    client
        .setxattr(
            node,
            "security.capability",
            &[0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            0,
        )
        .unwrap();
}

/// As other users, with a group and without one, and what only root may make.
fn identities(client: &Client<'_>, backend: &Backend) {
    use std::os::unix::fs::MetadataExt;
    fs::set_permissions(backend.share(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let caller = Caller { uid: 1001, gid: 1002, group: Some(1003), ..Caller::default() };
    client.caller(caller).mkdir(ROOT, "theirs", 0o700, 0).unwrap();
    let theirs = fs::metadata(backend.path("theirs")).unwrap();
    assert_eq!((theirs.uid(), theirs.gid()), (1001, 1002));
    client.mknod(ROOT, "null", libc::S_IFCHR | 0o600, 0x103, 0).unwrap();
    assert_eq!(fs::metadata(backend.path("null")).unwrap().rdev(), 0x103);
}

fn locks(client: &Client<'_>) {
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let (one, two) =
        (client.open(node, libc::O_RDWR).unwrap().fh, client.open(node, libc::O_RDWR).unwrap().fh);
    let whole = |owner| Lock::posix(owner, libc::F_WRLCK, 0, ALL_LOCKS);
    client.setlk(node, one, whole(1)).unwrap();
    client.getlk(node, two, whole(2)).unwrap();
    client.setlkw(node, one, Lock::flock(1, libc::F_WRLCK)).unwrap();
    let waiting = client.send(whole(2).waiting_request(node, two)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    client.interrupt(waiting).unwrap();
    assert_eq!(common::errno(client.session().finish(waiting)), libc::EINTR);
}

fn refused(client: &Client<'_>) {
    for opcode in NOT_SERVED {
        let request = Request::new(*opcode, ROOT).arg(&[0u8; 64]).reply_data(64);
        common::errno(client.call_bytes(&request));
    }
}

/// What the trace calls an operation.
fn traced(opcode: Opcode) -> String {
    let name = match opcode {
        Opcode::Readdirplus => Opcode::Readdir,
        Opcode::Rename2 => Opcode::Rename,
        Opcode::CopyFileRange64 => Opcode::CopyFileRange,
        other => other,
    };
    format!("operation: {name:?}")
}

#[test]
fn every_operation_is_served_from_behind_the_walls() {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: there are no such walls otherwise");
    for sandbox in ["namespace", "chroot", "none"] {
        let directory = common::disk_directory();
        let mut backend = common::starter()
            .args([&format!("--sandbox={sandbox}"), "--seccomp=kill", "--xattr", "--posix-lock", "--flock"])
            .args(["--allow-direct-io", "--log-level=trace"])
            .share(directory.path())
            .start()
            .unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        names(&client);
        data(&client);
        attributes(&client);
        identities(&client, &backend);
        locks(&client);
        refused(&client);
        client.destroy().unwrap();
        drop(session);
        backend.expect_success().unwrap();
        let trace = backend.stderr();
        for (opcode, name) in Opcode::ALL.iter().filter(|(opcode, _)| !NOT_SERVED.contains(opcode)) {
            assert!(trace.contains(&traced(*opcode)), "{name} was not served, so the test is not whole");
        }
    }
}

/// The modes of all threads of the process that serves, in the words of /proc.
fn seccomp_modes(args: &[&str]) -> Vec<String> {
    let (backend, session) = common::serve(args);
    session.client().getattr(ROOT).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let line = |status: String| status.lines().find(|line| line.starts_with("Seccomp:")).unwrap().to_owned();
    tasks.map(|task| line(fs::read_to_string(task.unwrap().path().join("status")).unwrap())).collect()
}

#[test]
fn the_filter_is_on_every_thread() {
    for args in [&[][..], &["--seccomp=kill"], &["--seccomp=log"], &["--seccomp=trap"]] {
        let modes = seccomp_modes(args);
        assert!(modes.len() > 1 && modes.iter().all(|mode| mode == "Seccomp:\t2"), "{args:?}: {modes:?}");
    }
    let modes = seccomp_modes(&["--seccomp=none"]);
    assert!(modes.len() > 1 && modes.iter().all(|mode| mode == "Seccomp:\t0"), "{modes:?}");
}

#[test]
fn a_forbidden_call_is_told_of() {
    let mut backend = common::starter().args(["--sandbox=chroot"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", backend.pid())).unwrap();
    let serving = rustix::process::Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    // The signal that the kernel would send.
    rustix::process::kill_process(serving, rustix::process::Signal::SYS).unwrap();
    let status = backend.wait(Duration::from_secs(5)).unwrap();
    assert_eq!(status.code(), Some(128 + libc::SIGSYS));
    assert!(backend.stderr().contains("--seccomp"), "{}", backend.stderr());
}
