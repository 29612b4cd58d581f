//! The walls around the daemon, looked at from outside.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::{Change, ROOT};

fn as_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "run the tests as root: without it there are no such walls"
    );
}

/// The process that serves: the one that was started, or its child.
fn serving(started: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{started}/task/{started}/children")).unwrap();
    children.split_whitespace().next().map_or(started, |child| child.parse().unwrap())
}

fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Starts a daemon in a sandbox, has it serve a little, and ends it; `look` sees the serving process.
fn in_sandbox(sandbox: &str, look: impl FnOnce(u32, &Path)) {
    as_root();
    let mut backend = common::starter().args([&format!("--sandbox={sandbox}"), "--xattr"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.write(entry.nodeid, open.fh, 0, b"inside").unwrap();
    client.setattr(entry.nodeid, Change::default().mode(0o640)).unwrap();
    client.symlink(ROOT, "link", "/etc/passwd").unwrap();
    // What goes by a name below /proc/self/fd works without /proc in sight.
    client.link(entry.nodeid, ROOT, "second").unwrap();
    assert!(client.listxattr(entry.nodeid, 100).is_ok());
    assert_eq!(fs::read(backend.path("second")).unwrap(), b"inside");
    look(serving(backend.pid()), &backend.path(""));
    drop(session);
    backend.expect_success().unwrap();
    assert!(!backend.socket().exists(), "the socket is left behind");
}

/// Where one gets from a directory that the process has open by going up for as long as it goes.
fn top_of(directory: &Path) -> std::path::PathBuf {
    let mut path = directory.join(".");
    while identity(&path) != identity(path.join("..")) {
        path.push("..");
    }
    path
}

/// All directories that the process has in its hands: open ones, the working one, the root.
fn directories_of(pid: u32) -> Vec<std::path::PathBuf> {
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    let open = fs::read_dir(process.join("fd")).unwrap().map(|entry| entry.unwrap().path());
    let all = open.chain([process.join("cwd"), process.join("root")]);
    all.filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())).collect()
}

/// No directory that the process holds leads anywhere but to the share and its list of descriptors.
fn no_way_out(pid: u32, share: &Path) {
    let descriptors = format!("/proc/{pid}/cwd");
    assert_eq!(identity(&descriptors), identity(format!("/proc/{pid}/fd")));
    let directories = directories_of(pid);
    assert!(directories.len() >= 4, "root and descriptors, each twice at least: {directories:?}");
    for directory in directories {
        let top = identity(top_of(&directory));
        let allowed = [identity(share), identity(&descriptors)];
        assert!(allowed.contains(&top), "{directory:?} leads out: {:?}", fs::read_link(&directory));
    }
}

#[test]
fn namespaces_hold_the_share_and_nothing_else() {
    in_sandbox("namespace", |pid, share| {
        for namespace in ["mnt", "pid", "net"] {
            let own = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap(), own, "{namespace}");
        }
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity(share));
        let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "more than the share is mounted:\n{mounts}");
        assert!(!Path::new(&format!("/proc/{pid}/root/proc")).exists());
        no_way_out(pid, share);
    });
}

#[test]
fn chroot_has_the_share_as_its_root() {
    in_sandbox("chroot", |pid, share| {
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity(share));
        // From here one gets out of the share, as the daemon's root is not ours; but not to /proc.
        let descriptors = format!("/proc/{pid}/cwd");
        assert!(
            directories_of(pid).iter().filter(|path| identity(path) == identity(&descriptors)).count() > 1
        );
        assert_eq!(identity(format!("{descriptors}/..")), identity(&descriptors));
    });
}

#[test]
fn none_leaves_everything_in_sight() {
    in_sandbox("none", |pid, _| {
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity("/"));
    });
}

#[test]
fn a_signal_ends_the_serving_process_too() {
    as_root();
    let mut backend = common::starter().args(["--sandbox=namespace", "--keep-listening"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let serving = serving(backend.pid());
    assert_ne!(serving, backend.pid());
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert!(!Path::new(&format!("/proc/{serving}")).exists());
    assert!(!backend.socket().exists());
}

/// A bit set out of a line of /proc/PID/status.
fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

/// The sets of all threads of a daemon in this sandbox, which have to be alike.
fn capabilities_in(sandbox: &str, more: &[&str]) -> u64 {
    let mut args = vec![format!("--sandbox={sandbox}")];
    args.extend(more.iter().map(ToString::to_string));
    let backend = common::starter().args(args).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", serving(backend.pid()))).unwrap();
    let status =
        |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.unwrap().path().join("status"));
    let all: Vec<_> = tasks.flat_map(status).collect();
    assert!(all.len() > 1, "the main thread and a worker at least");
    for status in &all {
        let kept = capabilities(status, "CapEff");
        for set in ["CapPrm", "CapBnd"] {
            assert_eq!(capabilities(status, set), kept, "{sandbox}, {set}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(capabilities(status, set), 0, "{sandbox}, {set}");
        }
        assert_eq!(kept, capabilities(&all[0], "CapEff"));
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    capabilities(&all[0], "CapEff")
}

fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().map(|number| 1 << number).sum()
}

// The numbers are those of linux/capability.h.
const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const SYS_ADMIN: u32 = 21;
const MKNOD: u32 = 27;
const SETFCAP: u32 = 31;

#[test]
fn capabilities_that_are_not_needed_are_gone() {
    as_root();
    let usual = [CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD];
    for sandbox in ["namespace", "chroot", "none"] {
        assert_eq!(capabilities_in(sandbox, &[]), bits(&usual) | bits(&[DAC_READ_SEARCH]), "{sandbox}");
    }
    let with = |sandbox: &str, more: &[&str]| {
        capabilities_in(sandbox, &[&["--inode-file-handles=never"], more].concat())
    };
    assert_eq!(with("none", &["--xattr"]), bits(&usual) | bits(&[SETFCAP]));
    assert_eq!(with("none", &["--xattr", "--readonly"]), bits(&[DAC_OVERRIDE, FOWNER]));
    let changed = bits(&usual[..6]) | bits(&[SYS_ADMIN]);
    assert_eq!(with("chroot", &["--modcaps=+sys_admin:-cap_mknod"]), changed);
}

#[test]
fn a_capability_that_is_not_there_cannot_be_kept() {
    as_root();
    let directory = tempfile::tempdir().unwrap();
    // Without it in the bounding set, nobody below has it.
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-sys_admin,-lease", "--inh-caps=-sys_admin,-lease"])
        .arg(common::program())
        .args(["--sandbox=none", "--modcaps=+lease", "--socket-path"])
        .arg(directory.path().join("socket"))
        .arg("--shared-dir")
        .arg(directory.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("--modcaps") && stderr.contains("lease"), "{stderr}");
}

/// As root of a container may be: without the right to make namespaces and mounts.
#[test]
fn root_without_sys_admin_has_the_share_as_its_root() {
    as_root();
    for (args, warned) in [(&["--sandbox=chroot"][..], false), (&[], true)] {
        let starter = lanefsd_frontend::Backend::of("setpriv");
        let starter = starter.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]);
        let mut backend = starter.args([common::program()]).args(args).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().mkdir(ROOT, "dir", 0o700, 0).unwrap();
        let pid = serving(backend.pid());
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity(backend.path("")));
        drop(session);
        backend.expect_success().unwrap();
        assert_eq!(backend.stderr().contains("--sandbox=chroot"), warned, "{}", backend.stderr());
    }
}

/// Kata's Go runtime ends a daemon by SIGKILL.
#[test]
fn a_killed_parent_takes_the_serving_process_along() {
    as_root();
    for sandbox in ["namespace", "chroot"] {
        let mut backend = common::starter().args([&format!("--sandbox={sandbox}")]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = serving(backend.pid());
        backend.signal(libc::SIGKILL).unwrap();
        backend.wait(std::time::Duration::from_secs(5)).unwrap();
        common::expect_end(serving);
    }
}
