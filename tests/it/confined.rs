//! Everything is served inside the sandbox: namespaces, few capabilities, and a filter that ends
//! the daemon at the first system call that is not on its list.

use std::fs;
use std::time::Duration;

use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Caller, Client, Request, SessionOptions};

use crate::common::{self, strace};

const ALL_LOCKS: u64 = i64::MAX.unsigned_abs();

/// The opcodes that are answered ENOSYS without a look at their arguments.
const NOT_SERVED: &[Opcode] =
    &[Opcode::Bmap, Opcode::Poll, Opcode::NotifyReply, Opcode::SetupMapping, Opcode::RemoveMapping];

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
    flags(client, node, fh);
    client.flush(node, fh, 1).unwrap();
    client.release(node, fh).unwrap();
    let again = client.open(node, libc::O_WRONLY | libc::O_TRUNC | libc::O_DIRECT).unwrap();
    client.release(node, again.fh).unwrap();
    client.syncfs(ROOT).unwrap();
    client.statfs(ROOT).unwrap();
}

/// Flags of files, both forms, which not every file system of a host has.
fn flags(client: &Client<'_>, node: u64, fh: u64) {
    for (get, set, size) in [(0x8008_6601, 0x4008_6602, 4), (0x801c_581f, 0x401c_5820, 28)] {
        match client.ioctl(node, fh, get, &[], size) {
            Ok(old) => drop(client.ioctl(node, fh, set, &old, 0).unwrap()),
            Err(error) => assert_eq!(error.errno().unwrap().0, libc::ENOTTY),
        }
    }
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
    interrupt(client, waiting);
}

/// Interrupts a request, again and again: an interrupt that comes before its request waits has no effect.
fn interrupt(client: &Client<'_>, request: Pending) {
    while !client.queue().is_done(request.token).unwrap() {
        let _ = client.interrupt(request);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(common::errno(client.session().finish(request)), libc::EINTR);
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
fn every_operation_is_served_inside_the_sandbox() {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: there is no sandbox otherwise");
    for sandbox in ["namespace", "chroot", "none"] {
        let directory = common::disk_directory();
        let mut backend = common::starter()
            .args([&format!("--sandbox={sandbox}"), "--seccomp=kill", "--xattr", "--posix-lock", "--flock"])
            .args(["--allow-direct-io", "--tmpfile", "--log-level=trace"])
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
    let tasks = fs::read_dir(backend.proc("task")).unwrap();
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
    for survive in [false, true] {
        let more: &[&str] = if survive { &[] } else { &["--no-survive"] };
        let mut backend = common::starter().args(["--sandbox=chroot"]).args(more).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", backend.pid())).unwrap();
        let serving = rustix::process::Pid::from_raw(children.trim().parse().unwrap()).unwrap();
        // The signal that the kernel would send.
        rustix::process::kill_process(serving, rustix::process::Signal::SYS).unwrap();
        if survive {
            // A worker that dies may still answer.
            common::wait_for_words(&backend, "--seccomp");
            session.connection().features().unwrap();
        } else {
            let status = backend.wait(Duration::from_secs(5)).unwrap();
            assert_eq!(status.code(), Some(128 + libc::SIGSYS));
        }
        assert!(backend.stderr().contains("--seccomp"), "{}", backend.stderr());
    }
}

/// What no daemon may open, with names that are found again in a trace.
const SPECIAL: [(&str, u32); 4] = [
    ("special-fifo", libc::S_IFIFO),
    ("special-socket", libc::S_IFSOCK),
    ("special-character", libc::S_IFCHR),
    ("special-block", libc::S_IFBLK),
];

/// All that can be done to files that are neither regular nor directories.
fn specials(client: &Client<'_>) {
    for (name, kind) in SPECIAL {
        let node = client.mknod(ROOT, name, kind | 0o644, 0x103, 0).unwrap().nodeid;
        for flags in [libc::O_RDONLY, libc::O_WRONLY | libc::O_TRUNC, libc::O_RDWR | libc::O_NONBLOCK] {
            common::errno(client.open(node, flags));
        }
        common::errno(client.opendir(node));
        common::errno(client.create(ROOT, name, libc::O_RDWR, 0o600, 0));
        common::errno(client.setattr(node, Change::none().size(0)));
        client.getattr(node).unwrap();
        client.access(node, libc::R_OK).unwrap();
        client.statfs(node).unwrap();
        client.setattr(node, Change::none().mode(0o600).uid(1).gid(1).times((1, 2), (3, 4))).unwrap();
        let _ = client.setxattr(node, "trusted.name", b"value", 0);
        let _ = client.getxattr(node, "security.capability", 100);
        client.listxattr(node, 100).unwrap();
        let second = format!("{name}-2");
        client.link(node, ROOT, &second).unwrap();
        client.rename(ROOT, &second, ROOT, format!("{name}-3")).unwrap();
        client.lookup(ROOT, format!("{name}-3")).unwrap();
    }
    // Deep down an inode is held by a file handle, and opened anew.
    let handle = client.opendir(ROOT).unwrap().fh;
    client.readdirplus(ROOT, handle, 0, 65536).unwrap();
    client.releasedir(ROOT, handle).unwrap();
}

/// More threads at once than malloc(3) has arenas without looking for the number of CPUs.
fn many_lock_waiters(client: &Client<'_>, threads: u64) {
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    let whole = |owner| Lock::posix(owner, libc::F_WRLCK, 0, ALL_LOCKS);
    client.setlk(node, fh, whole(1)).unwrap();
    let waiting: Vec<_> =
        (2..threads).map(|owner| client.send(whole(owner).waiting_request(node, fh)).unwrap()).collect();
    client.getattr(node).unwrap();
    for one in waiting {
        interrupt(client, one);
    }
}

/// A whole session with all that the daemon does, in the default sandbox and under the default filter,
/// seen by strace: no absolute path is ever used, though messages go to the system log, which is started
/// anew meanwhile, and nothing is opened but regular files and directories.
#[test]
fn no_absolute_path_is_used_in_the_sandbox() {
    use std::os::unix::net::UnixDatagram;
    common::own_mounts();
    // A system log of our own.
    rustix::mount::mount("none", "/dev", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let null = rustix::fs::makedev(1, 3);
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, "/dev/null", kind, mode, null).unwrap();
    for (args, syslog) in [
        (&[][..], false),
        (&["--sandbox=namespace", "--syslog"][..], true),
        (&["--sandbox=chroot", "--rlimit-nofile=200"][..], false),
    ] {
        let log = syslog.then(|| UnixDatagram::bind("/dev/log").unwrap());
        let directory = common::disk_directory();
        let trace = directory.path().join("trace");
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        let mut backend = Backend::of("strace")
            .args(strace::options(&trace))
            .args([common::program()])
            .args([
                "--xattr",
                "--posix-lock",
                "--flock",
                "--posix-acl=auto",
                "--allow-direct-io",
                "--tmpfile",
            ])
            .args(["--log-level=debug"])
            .args(args)
            .env("RUST_BACKTRACE", "full")
            .share(&share)
            .start()
            .unwrap();
        let options = common::queues(2);
        let session = backend.connect(options).unwrap();
        let client = session.client();
        names(&client);
        data(&client);
        attributes(&client);
        identities(&client, &backend);
        locks(&client);
        refused(&client);
        specials(&client);
        let log = log.map(|log| {
            drop(log);
            fs::remove_file("/dev/log").unwrap();
            UnixDatagram::bind("/dev/log").unwrap()
        });
        many_lock_waiters(&client, 60);
        many_lock_waiters(&client.on(2), 60);
        session.reboot().unwrap();
        session.init().unwrap();
        session.client().getattr(ROOT).unwrap();
        drop(session);
        backend.expect_success().unwrap();
        drop(log);
        let calls = strace::inside(&trace);
        assert!(calls.len() > 500 && calls.iter().any(|call| call.name() == "mknodat"), "{}", calls.len());
        let absolute: Vec<_> = calls.iter().filter(|call| !call.absolute_paths().is_empty()).collect();
        assert!(absolute.is_empty(), "{args:?}: {absolute:#?}");
        let is_special = |call: &&strace::Call| call.opened().is_some_and(|path| path.contains("special"));
        let special: Vec<_> = calls.iter().filter(is_special).collect();
        assert!(special.is_empty(), "{args:?}: {special:#?}");
        assert!(calls.iter().any(|call| call.opened().is_some()), "no open is found in the trace");
    }
}
