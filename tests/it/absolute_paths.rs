//! Files in the share at the paths that libraries open by themselves on any Linux: they are not found there.

use std::fs;
use std::time::Duration;

use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::{Backend, Client, SessionOptions};

use crate::common;

/// What the standard library, glibc, musl and allocators are known to open when they need it first.
const PATHS: [&str; 16] = [
    "proc/self/cgroup",
    "proc/self/maps",
    "proc/self/exe",
    "proc/self/mountinfo",
    "proc/stat",
    "proc/meminfo",
    "proc/sys/vm/overcommit_memory",
    "sys/devices/system/cpu/online",
    "sys/devices/system/cpu/possible",
    "sys/fs/cgroup/cpu.max",
    "sys/kernel/mm/transparent_hugepage/enabled",
    "etc/localtime",
    "etc/nsswitch.conf",
    "etc/ld.so.cache",
    "usr/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "dev/log",
];

/// Makes such files as the guest's root can.
fn plant(client: &Client<'_>, mode: u32, device: u32) {
    for path in PATHS {
        let (directories, name) = path.rsplit_once('/').unwrap();
        let mut at = ROOT;
        for directory in directories.split('/') {
            at = match client.lookup(at, directory) {
                Ok(entry) => entry.nodeid,
                Err(_) => client.mkdir(at, directory, 0o755, 0).unwrap().nodeid,
            };
        }
        client.mknod(at, name, mode | 0o666, device, 0).unwrap();
    }
}

/// Has many threads work at once, which take memory each.
fn many_lock_waiters(client: &Client<'_>) {
    let (entry, open) = client.create(ROOT, "locked", libc::O_RDWR, 0o600, 0).unwrap();
    let whole = |owner| Lock::posix(owner, libc::F_WRLCK, 0, i64::MAX.unsigned_abs());
    client.setlk(entry.nodeid, open.fh, whole(1)).unwrap();
    let wait = |owner| client.send(whole(owner).waiting_request(entry.nodeid, open.fh)).unwrap();
    let waiting: Vec<_> = (2..60).map(wait).collect();
    for one in waiting {
        while !client.queue().is_done(one.token).unwrap() {
            let _ = client.interrupt(one);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(common::errno(client.session().finish(one)), libc::EINTR);
    }
}

/// A reboot of the guest, many threads, the end by a signal: the daemon takes part in all of it.
fn is_served(backend: &mut Backend, kind: &str, plant: impl FnOnce(&Client<'_>)) {
    let options = || common::queues(2);
    let session = backend.connect(options()).unwrap();
    plant(&session.client());
    session.reboot().unwrap();
    session.init().unwrap();
    many_lock_waiters(&session.client());
    session.stop_queue(2).unwrap();
    session.start_queue(2).unwrap();
    session.client().on(2).getattr(ROOT).unwrap();
    drop(session);
    // The next front end, as after a reset of the whole machine.
    let session = backend.connect(options()).unwrap();
    session.client().getattr(ROOT).unwrap_or_else(|error| panic!("{kind}: {error}"));
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
}

/// The most memory that a process has had, in KiB.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Attack: FIFOs, sockets and devices at the absolute paths that the standard library and the C library
/// open by themselves.
/// Outcome: nothing of the share is found there; queues start, requests are served, SIGTERM ends the daemon.
#[test]
fn special_files_at_paths_that_libraries_open() {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: only root makes devices");
    for sandbox in ["namespace", "chroot"] {
        for (kind, mode, device) in [
            ("a FIFO", libc::S_IFIFO, 0),
            ("a socket", libc::S_IFSOCK, 0),
            ("/dev/null", libc::S_IFCHR, 0x103),
            ("a block device", libc::S_IFBLK, 0x700),
        ] {
            let share = common::disk_directory();
            let args = [&format!("--sandbox={sandbox}"), "--keep-listening", "--posix-lock"];
            // With the files there from the start, too.
            for round in 0..2 {
                let mut backend = common::starter().args(args).share(share.path()).start().unwrap();
                is_served(&mut backend, kind, |client| {
                    if round == 0 {
                        plant(client, mode, device);
                    }
                });
            }
        }
    }
}

/// Attack: huge files at the absolute paths that libraries read as a whole.
/// Outcome: they are not read, and take no memory.
#[test]
fn huge_files_at_paths_that_libraries_read() {
    const HUGE: u64 = 1 << 30;
    const ALLOWED: u64 = 32 << 10;
    for sandbox in ["namespace", "chroot"] {
        let share = common::disk_directory();
        let mut backend = common::starter()
            .args([&format!("--sandbox={sandbox}"), "--keep-listening", "--posix-lock"])
            .share(share.path())
            .start()
            .unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        plant(&client, libc::S_IFREG, 0);
        for path in PATHS {
            let node = client.walk(ROOT, path).unwrap().nodeid;
            client.setattr(node, lanefsd_frontend::client::Change::none().size(HUGE)).unwrap();
        }
        let before = peak(common::serving_process(backend.pid()));
        session.reboot().unwrap();
        session.init().unwrap();
        many_lock_waiters(&session.client());
        let grown = peak(common::serving_process(backend.pid())) - before;
        assert!(grown < ALLOWED, "{sandbox}: memory has grown by {grown} KiB");
        drop(session);
        backend.signal(libc::SIGTERM).unwrap();
        backend.expect_success().unwrap();
    }
}
