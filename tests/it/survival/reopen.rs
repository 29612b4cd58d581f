//! The shared directory is unmounted and mounted again, and the guest goes on: `lanefsd reopen`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use faultfs::{FILE, FaultFs};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::{Backend, Session};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use tempfile::TempDir;

use super::{IMMORTAL, SANDBOXES, kill_worker, serves};
use crate::common;

/// `lanefsd reopen`.
fn reopen(backend: &Backend) -> Output {
    let pid = backend.pid().to_string();
    Command::new(common::program()).args(["reopen", "--pid", &pid]).output().unwrap()
}

fn expect_reopened(backend: &Backend) {
    let output = reopen(backend);
    assert!(output.status.success(), "{output:?} {}", backend.stderr());
    assert!(String::from_utf8_lossy(&output.stdout).contains("has opened its share anew"), "{output:?}");
}

/// A volume with the same names as another one, and another content.
fn fill(volume: &Path, content: &str) {
    fs::create_dir(volume.join("sub")).unwrap();
    for name in ["file", "sub/deep", "sub/odd"] {
        fs::write(volume.join(name), content).unwrap();
    }
    std::os::unix::fs::symlink("file", volume.join("link")).unwrap();
}

/// A directory at which one of two volumes is mounted.
struct Volumes {
    point: TempDir,
    _volumes: [TempDir; 2],
}

impl Volumes {
    /// The first one is mounted, and has a file that the second has not, and one that is a directory there.
    fn new() -> Volumes {
        common::own_mounts();
        let (point, volumes) = (common::disk_directory(), [(); 2].map(|()| common::disk_directory()));
        let [old, new] = &volumes;
        fill(old.path(), "old content");
        fill(new.path(), "new content");
        fs::write(old.path().join("gone"), "gone").unwrap();
        fs::remove_file(new.path().join("sub/odd")).unwrap();
        fs::create_dir(new.path().join("sub/odd")).unwrap();
        mount_bind(old.path(), point.path()).unwrap();
        Volumes { point, _volumes: volumes }
    }

    /// As an administrator does.
    fn change(&self) {
        let [_, new] = &self._volumes;
        unmount(self.point.path(), UnmountFlags::DETACH).unwrap();
        mount_bind(new.path(), self.point.path()).unwrap();
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        let _ = unmount(self.point.path(), UnmountFlags::DETACH);
    }
}

/// What a guest knows and has open.
struct Known {
    file: (u64, u64),
    deep: (u64, u64),
    folder: (u64, u64),
    link: u64,
    gone: (u64, u64),
    odd: u64,
}

impl Known {
    fn of(session: &Session) -> Known {
        let client = session.client();
        let open = |node: u64| (node, client.open(node, libc::O_RDWR).unwrap().fh);
        let node = |path: &str| client.walk(ROOT, path).unwrap().nodeid;
        let sub = node("sub");
        let known = Known {
            file: open(node("file")),
            deep: open(node("sub/deep")),
            folder: (sub, client.opendir(sub).unwrap().fh),
            link: node("link"),
            gone: open(node("gone")),
            odd: node("sub/odd"),
        };
        client.setlk(known.file.0, known.file.1, Lock::posix(1, libc::F_WRLCK, 0, 10)).unwrap();
        known
    }

    /// Everything has this content, by what was known before.
    fn expect(&self, session: &Session, content: &str) {
        let client = session.client();
        for (node, fh) in [self.file, self.deep] {
            assert_eq!(client.read(node, fh, 0, 100).unwrap(), content.as_bytes());
        }
        for name in ["file", "sub/deep"] {
            let node = client.walk(ROOT, name).unwrap().nodeid;
            assert!([self.file.0, self.deep.0].contains(&node), "{name} has another node id");
        }
        assert_eq!(client.readlink(self.link).unwrap(), b"file");
        client.readdir(self.folder.0, self.folder.1, 0, 4096).unwrap();
    }
}

#[test]
fn what_a_guest_has_open_is_on_the_new_mount() {
    for sandbox in SANDBOXES {
        let volumes = Volumes::new();
        let starter = common::starter().args([IMMORTAL, sandbox, "--cache=never", "--posix-lock"]);
        let backend = starter.share(volumes.point.path()).start().unwrap();
        let session = backend.connect(common::queues(2)).unwrap();
        let client = session.client();
        let known = Known::of(&session);
        volumes.change();
        known.expect(&session, "old content");

        expect_reopened(&backend);
        known.expect(&session, "new content");
        // What is not there stays where it was.
        assert_eq!(client.read(known.gone.0, known.gone.1, 0, 10).unwrap(), b"gone");
        assert!(client.lookup(ROOT, "gone").is_err());
        assert_ne!(client.walk(ROOT, "sub/odd").unwrap().nodeid, known.odd);
        client.write(known.file.0, known.file.1, 0, b"NEW").unwrap();
        assert_eq!(fs::read(volumes.point.path().join("file")).unwrap(), b"NEW content");
        // Its locks are gone, and it can take others.
        client.setlk(known.file.0, known.file.1, Lock::posix(1, libc::F_WRLCK, 0, 10)).unwrap();

        // Later workers go on with it.
        kill_worker(&backend);
        serves(&session);
        assert_eq!(client.read(known.file.0, known.file.1, 0, 3).unwrap(), b"NEW");
        client.create(ROOT, "made", libc::O_RDWR, 0o600, 0).unwrap();
        assert!(volumes.point.path().join("made").exists());
        expect_reopened(&backend);
        assert_eq!(client.read(known.file.0, known.file.1, 0, 3).unwrap(), b"NEW", "{sandbox}");
    }
}

/// Nothing is left of mounts that were left, also by workers that die afterwards.
#[test]
fn reopening_can_be_repeated() {
    let volumes = Volumes::new();
    let backend = common::starter()
        .args([IMMORTAL, "--sandbox=namespace", "--posix-lock"])
        .share(volumes.point.path())
        .start()
        .unwrap();
    let session = backend.connect(common::queues(1)).unwrap();
    let known = Known::of(&session);
    let mut first = None;
    for round in 1..=5 {
        volumes.change();
        expect_reopened(&backend);
        known.expect(&session, "new content");
        kill_worker(&backend);
        serves(&session);
        let now = common::steady_descriptors(&backend);
        let before = *first.get_or_insert(now);
        assert!(now <= before, "{now} descriptors after {round} rounds, {before} after the first");
    }
}

/// Attack: the server of the share dies.
/// Outcome: ENOTCONN until it is mounted again and the daemon told; then the guest's files work.
#[test]
fn a_fuse_server_that_comes_back_is_gone_on_with() {
    common::own_mounts();
    for sandbox in SANDBOXES {
        let point = common::disk_directory();
        let store = FaultFs::mount(point.path()).unwrap();
        let starter = common::starter().args([IMMORTAL, sandbox, "--cache=never"]);
        let backend = starter.share(point.path()).start().unwrap();
        let session = backend.connect(common::queues(1)).unwrap();
        let client = session.client();
        let node = client.lookup(ROOT, FILE).unwrap().nodeid;
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        drop(store);
        assert_eq!(common::errno(client.write(node, fh, 0, b"lost")), libc::ENOTCONN);

        let store = FaultFs::mount(point.path()).unwrap();
        assert_eq!(common::errno(client.write(node, fh, 0, b"lost")), libc::ENOTCONN);
        expect_reopened(&backend);
        client.write(node, fh, 0, b"kept").unwrap();
        assert_eq!(client.read(node, fh, 0, 4).unwrap(), b"kept");
        assert_eq!(client.lookup(ROOT, FILE).unwrap().nodeid, node);
        kill_worker(&backend);
        assert_eq!(client.read(node, fh, 0, 4).unwrap(), b"kept");
        drop((session, backend, store));
    }
}

#[test]
fn a_share_that_is_not_there_changes_nothing() {
    for sandbox in SANDBOXES {
        let volumes = Volumes::new();
        let starter = common::starter().args([IMMORTAL, sandbox]);
        let point = volumes.point.path().join("sub");
        let backend = starter.share(&point).start().unwrap();
        let session = backend.connect(common::queues(1)).unwrap();
        let node = session.client().lookup(ROOT, "deep").unwrap().nodeid;
        unmount(volumes.point.path(), UnmountFlags::DETACH).unwrap();
        let output = reopen(&backend);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.contains("goes on as it was"), "{words}");
        common::wait_for_words(&backend, "does not exist");
        serves(&session);
        assert_eq!(session.client().read_file(node).unwrap(), b"old content", "{sandbox}");
        let [old, _] = &volumes._volumes;
        mount_bind(old.path(), volumes.point.path()).unwrap();
    }
}

#[test]
fn a_daemon_without_a_front_end_opens_its_share_anew() {
    for sandbox in SANDBOXES {
        let volumes = Volumes::new();
        let starter = common::starter().args([IMMORTAL, sandbox, "--log-level=info"]);
        let backend = starter.share(volumes.point.path()).start().unwrap();
        common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
        volumes.change();
        expect_reopened(&backend);
        let session = backend.connect(common::queues(1)).unwrap();
        let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
        assert_eq!(session.client().read_file(node).unwrap(), b"new content", "{sandbox}");
    }
}

/// The supervisor has another working directory than it was started in, and so has the program of an upgrade.
#[test]
fn relative_paths_lead_where_they_led_at_the_start() {
    for sandbox in SANDBOXES {
        let volumes = Volumes::new();
        let home = volumes.point.path().parent().unwrap();
        let config = tempfile::Builder::new().suffix(".conf").tempfile_in(home).unwrap();
        fs::write(config.path(), "cache = \"never\"\nlog-level = \"info\"\n").unwrap();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let starter = common::starter().args([IMMORTAL, sandbox, "--config", &name(config.path())]);
        let starter = starter.share(name(volumes.point.path())).current_dir(home);
        let backend = starter.start().unwrap();
        common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
        let session = backend.connect(common::queues(1)).unwrap();
        let known = session.client().lookup(ROOT, "file").unwrap().nodeid;
        for round in 0..2 {
            let pid = backend.pid().to_string();
            let upgraded = Command::new(common::program()).args(["upgrade", "--pid", &pid]).output().unwrap();
            assert!(upgraded.status.success(), "{sandbox}, {round}: {upgraded:?}");
            volumes.change();
            expect_reopened(&backend);
            assert_eq!(session.client().read_file(known).unwrap(), b"new content");
        }
    }
}
