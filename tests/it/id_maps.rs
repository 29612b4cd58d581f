//! The namespace sandbox of a user without privileges, and which ids exist in it.
//!
//! The daemon runs as a user that the host does not know, with an /etc of its own: a mount
//! namespace in which passwd, group, subuid and subgid are the test's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, Caller, SessionOptions};
use tempfile::TempDir;

use crate::common;

/// The user and its group.
const USER: u32 = 4321;
/// The first of the thousand further ids that the user may map.
const SUB: u32 = 700_000;

/// What the user's daemon needs: itself, a share, and files of /etc.
struct Home(TempDir);

impl Home {
    fn new() -> Home {
        assert!(rustix::process::geteuid().is_root(), "run the tests as root: they start daemons as others");
        assert!(Path::new("/usr/bin/newuidmap").exists(), "newuidmap is missing: apt-get install uidmap");
        let home = Home(tempfile::tempdir().unwrap());
        fs::set_permissions(home.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        common::copy_program(&home.path("lanefsd"));
        fs::create_dir(home.path("share")).unwrap();
        chown(home.path("share"), Some(USER), Some(USER)).unwrap();
        for (file, text) in [
            ("passwd", format!("root:x:0:0::/root:/bin/sh\nlane:x:{USER}:{USER}::/:/bin/sh\n")),
            ("group", format!("root:x:0:\nlane:x:{USER}:\n")),
            ("subuid", format!("lane:{SUB}:1000\n")),
            ("subgid", format!("lane:{SUB}:1000\n")),
        ] {
            fs::write(home.path(file), text).unwrap();
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A daemon of the user, with these mounts over files of /etc; the process id stays the same all along.
    fn daemon(&self, prepare: &str) -> Starter {
        let script = format!(
            "cd / && for f in passwd group subuid subgid; do mount --bind $0/$f /etc/$f || exit 9; done; {prepare}
             exec setpriv --reuid={USER} --regid={USER} --clear-groups $0/lanefsd \"$@\""
        );
        let starter = Backend::of("unshare").args(["--mount", "sh", "-c", &script]).args([self.0.path()]);
        starter.args(["--sandbox=namespace", "--xattr", "--tmpfile"]).share(self.path("share")).by_fd()
    }

    fn owner(&self, name: &str) -> (u32, u32) {
        let metadata = fs::symlink_metadata(self.path("share").join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    }
}

/// The ranges for the user itself as root and its further ids from 1 on.
const ALL: [&str; 4] = [
    "--uid-map=:0:4321:1:",
    "--uid-map=:1:700000:1000:",
    "--gid-map=:0:4321:1:",
    "--gid-map=:1:700000:1000:",
];

/// Ranges without the user itself, and with another separator.
const OTHER: [&str; 2] = ["--uid-map=/0/700000/10/", "--gid-map=/0/700000/10/"];

/// A map in /proc without its padding.
fn map(pid: &str, file: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn without_maps_the_user_alone_exists() {
    let home = Home::new();
    // The programs that could do more are not there.
    let without =
        "for tool in newuidmap newgidmap; do mount --bind /dev/null /usr/bin/$tool || exit 9; done;";
    let mut backend = home.daemon(without).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    // The guest's root and the user with the same number both create; all of it is the user's.
    for (name, uid) in [("roots", 0), ("mine", USER)] {
        let client = client.user(uid, uid);
        let dir = client.mkdir(ROOT, name, 0o755, 0).unwrap();
        assert_eq!((dir.attr.uid, dir.attr.gid), (USER, USER), "{name}");
        let (file, open) = client.create(dir.nodeid, "file", libc::O_RDWR, 0o644, 0).unwrap();
        client.write(file.nodeid, open.fh, 0, b"x").unwrap();
        client.symlink(dir.nodeid, "link", "x").unwrap();
        client.mknod(dir.nodeid, "fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
        client.tmpfile(dir.nodeid, libc::O_RDWR, 0o600).unwrap();
        for name in [name, &format!("{name}/file"), &format!("{name}/link"), &format!("{name}/fifo")] {
            assert_eq!(home.owner(name), (USER, USER), "{name}");
        }
    }
    fs::write(home.path("share/hosts"), "").unwrap();
    chown(home.path("share/hosts"), Some(USER), Some(USER)).unwrap();
    let node = client.lookup(ROOT, "hosts").unwrap().nodeid;
    assert_eq!(client.getattr(node).unwrap().uid, USER);
    // The daemon has the privileges of its namespace: another's mode bits do not stop it.
    fs::set_permissions(home.path("share/mine"), fs::Permissions::from_mode(0o500)).unwrap();
    let mine = client.lookup(ROOT, "mine").unwrap().nodeid;
    client.mkdir(mine, "by-root", 0o755, 0).unwrap();
    assert_eq!(common::errno(client.user(5, 0).mkdir(ROOT, "theirs", 0o755, 0)), libc::EINVAL);
    assert_eq!(common::errno(client.user(USER, 5).mkdir(ROOT, "theirs", 0o755, 0)), libc::EINVAL);
    assert_eq!(common::errno(client.setattr(node, Change::none().uid(5))), libc::EINVAL);
    common::wait_for_words(&backend, "no user 5 (see --uid-map)");
    assert_eq!(backend.stderr().matches("--uid-map").count(), 1, "said once: {}", backend.stderr());
    let pid = common::serving_process(backend.pid()).to_string();
    assert_eq!(map(&pid, "uid_map"), [format!("{USER} {USER} 1")]);
    assert_eq!(map(&pid, "gid_map"), [format!("{USER} {USER} 1")]);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("CapPrm:\t00000000880000db") && status.contains("Seccomp:\t2"), "{status}");
    drop(session);
    backend.expect_success().unwrap();
}

/// What launchers pass that know virtiofsd's default, and ids that are neither root nor the user's.
#[test]
fn maps_need_no_root() {
    for (maps, owner) in [
        (&["--uid-map=:4321:4321:1:", "--gid-map=:4321:4321:1:"][..], (USER, USER)),
        (&["--uid-map=:4321:4321:1:", "--gid-map=:0:4321:1:"], (USER, USER)),
        (&["--uid-map=:7:4321:1:", "--gid-map=:8:4321:1:"], (USER, USER)),
        (&["--uid-map=:1000:4321:1:", "--uid-map=:1:700000:100:"], (USER, USER)),
    ] {
        let home = Home::new();
        let mut backend = home.daemon("").args(maps).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().mkdir(ROOT, "roots", 0o755, 0).unwrap();
        assert_eq!(home.owner("roots"), owner, "{maps:?}");
        assert!(fs::read_dir(home.path("share")).unwrap().count() == 1);
        drop(session);
        backend.expect_success().unwrap();
    }
    // Root's daemon can be anybody.
    let maps = ["--uid-map=:1000:1000:1:", "--gid-map=:1000:1000:1:"];
    let backend = Backend::of(common::program()).args(maps).start().unwrap();
    chown(backend.share(), Some(1000), Some(1000)).unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    for uid in [0, 1000] {
        let client = session.client().user(uid, uid);
        let made = client.mkdir(ROOT, format!("of-{uid}"), 0o755, 0).unwrap();
        assert_eq!((made.attr.uid, made.attr.gid), (1000, 1000));
        let host = fs::metadata(backend.path(&format!("of-{uid}"))).unwrap();
        assert_eq!((host.uid(), host.gid()), (1000, 1000));
    }
}

/// The daemon's own user in the guest gets no more rights than any other: not those to keep set-id
/// bits, which the daemon has in its namespace.
#[test]
fn the_daemons_user_is_an_ordinary_user_of_the_guest() {
    let home = Home::new();
    let mut backend = home.daemon("").args(ALL).args(["--translate-gid=map:9:9:1"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let team = home.path("share/team");
    fs::create_dir(&team).unwrap();
    chown(&team, Some(USER), Some(SUB + 8)).unwrap();
    fs::set_permissions(&team, fs::Permissions::from_mode(0o2777)).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "team").unwrap().nodeid;
    assert_eq!(client.getattr(node).unwrap().gid, 9);
    for (caller, mode) in [
        (Caller::default(), 0o2775),
        (Caller { uid: 5, gid: 5, ..Caller::default() }, 0o775),
        (Caller { uid: 5, gid: 5, group: Some(9), ..Caller::default() }, 0o2775),
    ] {
        client.caller(caller).create(node, "file", libc::O_RDWR, 0o2775, 0).unwrap();
        let made = fs::metadata(team.join("file")).unwrap();
        assert_eq!((made.mode() & 0o7777, made.gid()), (mode, SUB + 8), "{caller:?}");
        client.unlink(node, "file").unwrap();
    }
    drop(session);
    backend.expect_success().unwrap();
    // The same where the user has its own number, and no other group exists.
    let home = Home::new();
    let maps = ["--uid-map=:4321:4321:1:", "--gid-map=:4321:4321:1:", "--gid-map=:9:700008:1:"];
    let backend = home.daemon("").args(maps).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let team = home.path("share/team");
    fs::create_dir(&team).unwrap();
    chown(&team, Some(USER), Some(SUB + 8)).unwrap();
    fs::set_permissions(&team, fs::Permissions::from_mode(0o2777)).unwrap();
    let client = session.client().user(USER, USER);
    let node = client.lookup(ROOT, "team").unwrap().nodeid;
    client.create(node, "file", libc::O_RDWR, 0o2775, 0).unwrap();
    assert_eq!(fs::metadata(team.join("file")).unwrap().mode() & 0o7777, 0o775);
    let member = client.caller(Caller { uid: USER, gid: USER, group: Some(9), ..Caller::default() });
    member.create(node, "members", libc::O_RDWR, 0o2775, 0).unwrap();
    assert_eq!(fs::metadata(team.join("members")).unwrap().mode() & 0o7777, 0o2775);
}

#[test]
fn further_ids_are_mapped_by_newuidmap() {
    let home = Home::new();
    let mut backend = home.daemon("").args(ALL).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    fs::set_permissions(home.path("share"), fs::Permissions::from_mode(0o777)).unwrap();
    let client = session.client();
    client.mkdir(ROOT, "mine", 0o755, 0).unwrap();
    let caller = Caller { uid: 5, gid: 7, group: Some(9), ..Caller::default() };
    client.caller(caller).mkdir(ROOT, "theirs", 0o755, 0).unwrap();
    let (file, _) = client.create(ROOT, "given", libc::O_RDWR, 0o600, 0).unwrap();
    client.setattr(file.nodeid, Change::none().uid(1000).gid(1)).unwrap();
    assert_eq!(home.owner("mine"), (USER, USER));
    assert_eq!(home.owner("theirs"), (SUB + 4, SUB + 6));
    assert_eq!(home.owner("given"), (SUB + 999, SUB));
    assert_eq!(client.getattr(file.nodeid).unwrap().uid, 1000);
    assert!(client.setattr(file.nodeid, Change::none().uid(1001)).is_err(), "an id that does not exist");
    let pid = common::serving_process(backend.pid()).to_string();
    assert_eq!(map(&pid, "uid_map"), [format!("0 {USER} 1"), format!("1 {SUB} 1000")]);
    // Sandbox, capabilities and filter are those of root: no mount is to be reached from the root directory.
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap(), "");
    assert_eq!(
        fs::metadata(format!("/proc/{pid}/cwd/..")).unwrap().ino(),
        fs::metadata(format!("/proc/{pid}/cwd")).unwrap().ino()
    );
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("CapPrm:\t00000000880000db"), "{status}");
    assert!(status.contains("CapBnd:\t00000000880000db") && status.contains("Seccomp:\t2"), "{status}");
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn the_daemon_may_serve_as_another_id_of_the_user() {
    let home = Home::new();
    chown(home.path("share"), Some(SUB), Some(SUB)).unwrap();
    let mut backend = home.daemon("").args(OTHER).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().mkdir(ROOT, "mine", 0o755, 0).unwrap();
    session.client().user(9, 9).mkdir(ROOT, "theirs", 0o755, 0).unwrap();
    session.client().user(10, 9).mkdir(ROOT, "nobodys", 0o755, 0).unwrap_err();
    assert_eq!((home.owner("mine"), home.owner("theirs")), ((SUB, SUB), (SUB + 9, SUB + 9)));
    // The process that was started still ends the other one.
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
}

#[test]
fn the_serving_process_ends_with_the_one_that_was_started() {
    // With another id than the process that was started, too.
    for maps in [&ALL[..], &OTHER] {
        let home = Home::new();
        let mut backend = home.daemon("").args(maps).args(["--keep-listening"]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid()).to_string().parse().unwrap();
        backend.signal(libc::SIGKILL).unwrap();
        backend.wait(Duration::from_secs(5)).unwrap();
        common::expect_end(serving);
    }
}

#[test]
fn ids_that_are_not_the_users_are_refused() {
    let home = Home::new();
    let refused = |prepare: &str, maps: &[&str]| {
        let (status, stderr) = home.daemon(prepare).args(maps).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "one sentence is wanted, not\n{stderr}");
        stderr
    };
    let stderr = refused("", &["--uid-map=:0:4321:1:", "--uid-map=:1:800000:1:"]);
    assert!(stderr.contains("newuidmap") && stderr.contains("/etc/subuid"), "{stderr}");
    let stderr = refused("", &["--gid-map=:0:0:1:"]);
    assert!(stderr.contains("newgidmap"), "{stderr}");
    let stderr = refused(
        "export PATH=/nonexistent; exec /usr/bin/setpriv --reuid=4321 --regid=4321 --clear-groups $0/lanefsd \"$@\";",
        &ALL,
    );
    assert!(stderr.contains("install"), "{stderr}");
    let stderr = refused("", &["--uid-map=:0:4321:1:", "--uid-map=:0:700000:1:"]);
    assert!(stderr.contains("uid"), "{stderr}");
}

#[test]
fn root_maps_what_it_likes() {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root");
    let maps = ["--uid-map=:0:700000:1000:", "--gid-map=:0:700000:1000:"];
    let mut backend = common::starter().args(["--sandbox=namespace"]).args(maps).start().unwrap();
    chown(backend.share(), Some(SUB), Some(SUB)).unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().user(3, 4).mkdir(ROOT, "theirs", 0o755, 0).unwrap();
    session.client().user(1000, 4).mkdir(ROOT, "nobodys", 0o755, 0).unwrap_err();
    session.client().mkdir(ROOT, "mine", 0o755, 0).unwrap();
    let mine = fs::metadata(backend.path("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid()), (SUB, SUB));
    drop(session);
    backend.expect_success().unwrap();
    assert!(!backend.socket().exists(), "the socket is left behind");
}
