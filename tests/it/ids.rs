//! Users and groups with other numbers on the host, and callers who must not get mixed up.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use fuse_protocol::flags::InitFlags;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::{Backend, Caller, Client, Session, SessionOptions};
use tempfile::TempDir;

use crate::common;

/// A back end that shares a directory on disk where everybody may create.
fn on_disk(args: &[&str]) -> (TempDir, Backend, Session) {
    let starter = common::starter().args(args).args(["--tmpfile"]);
    common::serve_on(common::open_directory(), starter, SessionOptions::default())
}

fn owners(path: &Path) -> (u32, u32) {
    let host = fs::symlink_metadata(path).unwrap();
    (host.uid(), host.gid())
}

const SHIFTED: [&str; 2] = ["--translate-uid=map:0:100000:1000", "--translate-gid=map:0:200000:1000"];

/// Makes one of each kind, named after it; the tmpfile gets a name at the end.
fn make_one_of_each(client: &Client<'_>) -> lanefsd_frontend::Result<()> {
    client.mkdir(ROOT, "dir", 0o755, 0)?;
    client.symlink(ROOT, "link", "x")?;
    client.mknod(ROOT, "node", libc::S_IFREG | 0o644, 0, 0)?;
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o644, 0)?;
    client.release(entry.nodeid, open.fh)?;
    let (entry, open) = client.tmpfile(ROOT, libc::O_RDWR, 0o644)?;
    client.link(entry.nodeid, ROOT, "tmpfile")?;
    client.release(entry.nodeid, open.fh)
}

const KINDS: [&str; 5] = ["dir", "link", "node", "file", "tmpfile"];

#[test]
fn what_is_created_belongs_to_the_callers_host_ids() {
    let (_directory, backend, session) = on_disk(&SHIFTED);
    make_one_of_each(&session.client().user(5, 6)).unwrap();
    for kind in KINDS {
        assert_eq!(owners(&backend.path(kind)), (100_005, 200_006), "{kind}");
    }
    // The guest's root is nobody special on the host, but may create wherever it likes.
    fs::set_permissions(backend.path("dir"), fs::Permissions::from_mode(0o700)).unwrap();
    let dir = session.client().lookup(ROOT, "dir").unwrap().nodeid;
    session.client().mkdir(dir, "roots", 0o755, 0).unwrap();
    assert_eq!(owners(&backend.path("dir/roots")), (100_000, 200_000));
    // Who has no rule keeps the number.
    session.client().user(1000, 1001).mkdir(ROOT, "beyond", 0o755, 0).unwrap();
    assert_eq!(owners(&backend.path("beyond")), (1000, 1001));
}

/// Root of a user namespace in the guest, or a service with ambient capabilities: what the guest's
/// kernel has allowed is done.
#[test]
fn what_a_capable_user_of_the_guest_creates_is_created() {
    for args in [&[][..], &SHIFTED, &["--xattr", "--posix-acl"]] {
        let directory = common::disk_directory();
        let backend = Backend::of(common::program())
            .args(["--tmpfile"])
            .args(args)
            .share(directory.path())
            .start()
            .unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o555)).unwrap();
        let user = session.client().user(5, 6);
        make_one_of_each(&user).unwrap();
        user.create(ROOT, "new", libc::O_RDWR | libc::O_EXCL, 0o400, 0).unwrap();
        user.mknod(ROOT, "device", libc::S_IFCHR | 0o600, 0x103, 0).unwrap();
        user.rename2(ROOT, "file", ROOT, "moved", libc::RENAME_WHITEOUT).unwrap();
        let owner = if args == SHIFTED { (100_005, 200_006) } else { (5, 6) };
        for name in KINDS.into_iter().chain(["new", "device", "moved"]) {
            assert_eq!(owners(&backend.path(name)), owner, "{name} with {args:?}");
        }
    }
}

#[test]
fn every_reply_shows_the_guests_ids() {
    let (_directory, backend, session) = on_disk(&SHIFTED);
    let path = backend.path("file");
    fs::write(&path, "x").unwrap();
    chown(&path, Some(100_007), Some(200_008)).unwrap();
    let client = session.client();
    let entry = client.lookup(ROOT, "file").unwrap();
    let node = entry.nodeid;
    assert_eq!((entry.attr.uid, entry.attr.gid), (7, 8), "LOOKUP");
    let attr = client.getattr(node).unwrap();
    assert_eq!((attr.uid, attr.gid), (7, 8), "GETATTR");
    let stat = client.statx(node, libc::STATX_BASIC_STATS).unwrap();
    assert_eq!((stat.uid, stat.gid), (7, 8), "STATX");
    let fh = client.opendir(ROOT).unwrap().fh;
    let listed = client.readdirplus(ROOT, fh, 0, 4096).unwrap();
    let plus = listed.iter().find(|entry| entry.name == b"file").unwrap().entry.unwrap();
    assert_eq!((plus.attr.uid, plus.attr.gid), (7, 8), "READDIRPLUS");
    let attr = client.setattr(node, Change::none().mode(0o600)).unwrap();
    assert_eq!((attr.uid, attr.gid), (7, 8), "SETATTR");
    let link = client.link(node, ROOT, "link").unwrap();
    assert_eq!((link.attr.uid, link.attr.gid), (7, 8), "LINK");
    // ACCESS goes by the guest's ids as well.
    client.user(7, 1).access(node, libc::R_OK).unwrap();
    assert_eq!(common::errno(client.user(100_007, 1).access(node, libc::R_OK)), libc::EACCES);
}

#[test]
fn a_new_owner_is_translated() {
    let (_directory, backend, session) = on_disk(&SHIFTED);
    fs::write(backend.path("file"), "").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let attr = client.setattr(node, Change::none().uid(9).gid(10)).unwrap();
    assert_eq!((attr.uid, attr.gid), (9, 10));
    assert_eq!(owners(&backend.path("file")), (100_009, 200_010));
    client.setattr(node, Change::none().gid(11)).unwrap();
    assert_eq!(owners(&backend.path("file")), (100_009, 200_011));
}

#[test]
fn supplementary_groups_are_translated() {
    let (_directory, backend, session) = on_disk(&SHIFTED);
    fs::create_dir(backend.path("team")).unwrap();
    chown(backend.path("team"), Some(0), Some(200_077)).unwrap();
    fs::set_permissions(backend.path("team"), fs::Permissions::from_mode(0o2770)).unwrap();
    let entry = session.client().lookup(ROOT, "team").unwrap();
    assert_eq!(entry.attr.gid, 77);
    // Whether the caller may create there is for the guest's kernel to say. The host is told of the
    // group to know whose file may keep a set-group-ID bit.
    for (group, mode) in [(77, 0o2775), (78, 0o775)] {
        let caller = Caller { uid: 5, gid: 6, pid: 1, group: Some(group) };
        let name = format!("of-{group}");
        session.client().caller(caller).create(entry.nodeid, &name, libc::O_RDWR, 0o2775, 0).unwrap();
        let path = backend.path("team").join(name);
        assert_eq!(owners(&path), (100_005, 200_077));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode, "{group}");
    }
}

#[test]
fn forbidden_ids_create_and_own_nothing() {
    let args = ["--translate-uid=forbid-guest:0:1000", "--translate-gid=forbid-guest:0:1000"];
    let (_directory, backend, session) = on_disk(&args);
    for (uid, gid, group) in [(999, 1000, None), (1000, 999, None), (1000, 1000, Some(999)), (0, 0, None)] {
        let client = session.client().caller(Caller { uid, gid, pid: 1, group });
        let refusals = [
            client.mkdir(ROOT, "dir", 0o755, 0).map(drop),
            client.symlink(ROOT, "link", "x").map(drop),
            client.mknod(ROOT, "node", libc::S_IFREG | 0o644, 0, 0).map(drop),
            client.create(ROOT, "file", libc::O_RDWR, 0o644, 0).map(drop),
            client.tmpfile(ROOT, libc::O_RDWR, 0o644).map(drop),
        ];
        for refusal in refusals {
            assert_eq!(common::errno(refusal), libc::EPERM, "{uid} {gid} {group:?}");
        }
    }
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 0);
    make_one_of_each(&session.client().user(1000, 1000)).unwrap();
    // A change that is refused leaves nothing half done, whoever asks.
    fs::set_permissions(backend.path("file"), fs::Permissions::from_mode(0o640)).unwrap();
    let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
    for change in [Change::none().uid(0), Change::none().gid(999), Change::none().uid(1000).gid(0)] {
        let refused = session.client().setattr(node, change.mode(0o777));
        assert_eq!(common::errno(refused), libc::EPERM);
    }
    assert_eq!(owners(&backend.path("file")), (1000, 1000));
    assert_eq!(fs::metadata(backend.path("file")).unwrap().mode() & 0o7777, 0o640);
    // A whiteout would be a new inode.
    let whiteout = session.client().rename2(ROOT, "file", ROOT, "moved", libc::RENAME_WHITEOUT);
    assert_eq!(common::errno(whiteout), libc::EPERM);
    session.client().rename(ROOT, "file", ROOT, "moved").unwrap();
}

/// A guest with ALLOW_IDMAP says who calls only in requests that create something; in all others both
/// ids are invalid.
#[test]
fn callers_without_ids_may_do_all_but_create() {
    for args in [&SHIFTED[..], &["--translate-uid=squash-guest:0:7:4294967295", "--xattr"], &["--posix-lock"]]
    {
        let (_directory, backend, session) = on_disk(args);
        assert_ne!(u64::from(session.init_reply().flags2) << 32 & InitFlags::ALLOW_IDMAP.bits(), 0);
        let owner = session.client().user(5, 6);
        make_one_of_each(&owner).unwrap();
        fs::write(backend.path("file"), "text").unwrap();
        let before = owners(&backend.path("file"));
        let client = session.client().user(u32::MAX, u32::MAX);
        let dir = client.lookup(ROOT, "dir").unwrap().nodeid;
        let file = client.lookup(ROOT, "file").unwrap().nodeid;
        client.getattr(file).unwrap();
        client.statx(file, libc::STATX_BASIC_STATS).unwrap();
        client.statfs(file).unwrap();
        client.setattr(file, Change::none().mode(0o640).size(3)).unwrap();
        assert_eq!(client.readlink(client.lookup(ROOT, "link").unwrap().nodeid).unwrap(), b"x");
        let fh = client.open(file, libc::O_RDWR).unwrap().fh;
        assert_eq!(client.read(file, fh, 0, 10).unwrap(), b"tex");
        client.write(file, fh, 0, b"T").unwrap();
        client.fallocate(file, fh, 0, 0, 10).unwrap();
        client.lseek(file, fh, 0, libc::SEEK_DATA).unwrap();
        client.fsync(file, fh, false).unwrap();
        client.flush(file, fh, 1).unwrap();
        client.release(file, fh).unwrap();
        if args.contains(&"--xattr") {
            client.setxattr(file, "user.name", b"value", 0).unwrap();
            assert_eq!(client.getxattr(file, "user.name", 100).unwrap(), b"value");
            client.removexattr(file, "user.name").unwrap();
        }
        if args.contains(&"--posix-lock") {
            let fh = client.open(file, libc::O_RDWR).unwrap().fh;
            client.setlk(file, fh, Lock::posix(1, libc::F_WRLCK, 0, 10)).unwrap();
            client.getlk(file, fh, Lock::posix(2, libc::F_WRLCK, 0, 10)).unwrap();
            client.release(file, fh).unwrap();
        }
        client.link(file, dir, "hard").unwrap();
        client.rename(dir, "hard", ROOT, "moved").unwrap();
        client.unlink(ROOT, "moved").unwrap();
        let fh = client.opendir(ROOT).unwrap().fh;
        assert!(client.readdirplus(ROOT, fh, 0, 4096).unwrap().len() >= KINDS.len());
        client.releasedir(ROOT, fh).unwrap();
        // One id of the two is not enough either.
        let entries = fs::read_dir(backend.share()).unwrap().count();
        for (uid, gid) in [(u32::MAX, u32::MAX), (5, u32::MAX), (u32::MAX, 6)] {
            let client = session.client().user(uid, gid);
            let refusals = [
                client.mkdir(ROOT, "new", 0o755, 0).map(drop),
                client.symlink(ROOT, "new", "x").map(drop),
                client.mknod(ROOT, "new", libc::S_IFREG | 0o644, 0, 0).map(drop),
                client.create(ROOT, "new", libc::O_RDWR, 0o644, 0).map(drop),
                client.tmpfile(ROOT, libc::O_RDWR, 0o644).map(drop),
                client.rename2(ROOT, "file", ROOT, "new", libc::RENAME_WHITEOUT),
                // Nor can anything be given to nobody.
                client.setattr(file, Change::none().uid(u32::MAX)).map(drop),
                client.setattr(file, Change::none().gid(u32::MAX)).map(drop),
            ];
            for (number, refusal) in refusals.into_iter().enumerate() {
                assert_eq!(common::errno(refusal), libc::EINVAL, "{number} by {uid} {gid} with {args:?}");
            }
        }
        assert_eq!(fs::read_dir(backend.share()).unwrap().count(), entries);
        assert_eq!(owners(&backend.path("file")), before);
        client.unlink(ROOT, "file").unwrap();
        client.rmdir(ROOT, "dir").unwrap();
    }
}

#[test]
fn a_whiteout_belongs_to_the_caller() {
    let (_directory, backend, session) = on_disk(&SHIFTED);
    fs::write(backend.path("file"), "").unwrap();
    session.client().user(0, 0).rename2(ROOT, "file", ROOT, "moved", libc::RENAME_WHITEOUT).unwrap();
    assert_eq!(owners(&backend.path("file")), (100_000, 200_000));
    assert_eq!(fs::metadata(backend.path("file")).unwrap().mode() & libc::S_IFMT, libc::S_IFCHR);
}

#[test]
fn all_users_may_be_one_on_the_host() {
    let (_directory, backend, session) = on_disk(&[
        "--translate-uid=squash-guest:0:1001:4294967295",
        "--translate-gid",
        "squash-guest:0:100:4294967295",
        "--translate-uid",
        "host:1001:1000:1",
        "--translate-gid=squash-host:0:1000:4294967295",
    ]);
    for (uid, gid) in [(0, 0), (1000, 1000), (4_294_967_294, 4_294_967_294)] {
        let name = format!("of-{uid}");
        let entry = session.client().user(uid, gid).mkdir(ROOT, &name, 0o700, 0).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1000));
        assert_eq!(owners(&backend.path(&name)), (1001, 100));
    }
    // The number that means "unchanged" is nobody.
    let nobody = session.client().user(u32::MAX, 0).mkdir(ROOT, "nobody", 0o700, 0);
    assert_eq!(common::errno(nobody), libc::EINVAL);
}

#[test]
fn a_daemon_without_privileges_makes_everybody_its_user() {
    const USER: u32 = 4321;
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, share) = (home.path().join("lanefsd"), home.path().join("share"));
    common::copy_program(&program);
    fs::create_dir(&share).unwrap();
    chown(&share, Some(USER), Some(USER)).unwrap();
    let ids = format!("--reuid={USER} --regid={USER} --clear-groups");
    let rules = format!(
        "--sandbox=none --posix-acl --translate-uid=squash-guest:0:{USER}:4294967295 \
         --translate-gid=squash-guest:0:{USER}:4294967295 --translate-uid=host:{USER}:1000:1 \
         --translate-gid=host:{USER}:1001:1"
    );
    let starter = Backend::of("setpriv").args(ids.split_whitespace()).args([program]);
    let backend = starter.args(rules.split_whitespace()).share(&share).by_fd().start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    for (uid, gid, group) in [(0, 0, None), (1000, 1000, None), (5, 6, Some(7)), (70_000, 70_000, Some(0))] {
        let client = session.client().caller(Caller { uid, gid, pid: 1, group });
        let name = format!("of-{uid}");
        let entry = client.mkdir(ROOT, &name, 0o777, 0o027).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid, entry.attr.mode & 0o7777), (1000, 1001, 0o750));
        assert_eq!(owners(&share.join(&name)), (USER, USER));
        let (file, open) = client.create(entry.nodeid, "file", libc::O_RDWR, 0o666, 0o022).unwrap();
        client.write(file.nodeid, open.fh, 0, b"x").unwrap();
        // Whoever it is given to is the same user.
        client.setattr(file.nodeid, Change::none().uid(123).gid(456)).unwrap();
        assert_eq!(owners(&share.join(name).join("file")), (USER, USER));
    }
}

/// A daemon of this user without a sandbox, which can become nobody else.
fn unprivileged(user: u32, args: &[&str]) -> (TempDir, Backend) {
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, share) = (home.path().join("lanefsd"), home.path().join("share"));
    common::copy_program(&program);
    fs::create_dir(&share).unwrap();
    chown(&share, Some(user), Some(user)).unwrap();
    let ids = format!("--reuid={user} --regid={user} --clear-groups");
    let starter = Backend::of("setpriv").args(ids.split_whitespace()).args([program]);
    (home, starter.args(["--sandbox=none", "--tmpfile"]).args(args).share(share).by_fd().start().unwrap())
}

#[test]
fn a_daemon_that_can_be_nobody_else_creates_as_its_user() {
    const USER: u32 = 4321;
    for args in [&[][..], &["--xattr", "--posix-acl=auto"], &["--no-killpriv-v2"]] {
        let (_home, backend) = unprivileged(USER, args);
        let session = backend.connect(SessionOptions::default()).unwrap();
        for (uid, gid, group) in [(0, 0, None), (USER, USER, Some(7)), (1000, 1000, Some(0)), (5, 0, None)] {
            let client = session.client().caller(Caller { uid, gid, pid: 1, group });
            make_one_of_each(&client).unwrap();
            client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o644, 0, 0).unwrap();
            client.rename2(ROOT, "fifo", ROOT, "moved", libc::RENAME_WHITEOUT).unwrap();
            for kind in KINDS.into_iter().chain(["fifo", "moved"]) {
                assert_eq!(owners(&backend.path(kind)), (USER, USER), "{kind} by {uid}");
            }
            // Who is not that user in the guest makes no program that runs as that user.
            let (entry, open) = client.create(ROOT, "tool", libc::O_RDWR, 0o6755, 0).unwrap();
            client.write(entry.nodeid, open.fh, 0, b"x").unwrap();
            client.release(entry.nodeid, open.fh).unwrap();
            let bits = fs::metadata(backend.path("tool")).unwrap().mode() & 0o6000;
            assert!(bits == 0 || uid == 0 || uid == USER, "{bits:o} by {uid}");
            for kind in ["link", "node", "file", "tmpfile", "fifo", "moved", "tool"] {
                client.unlink(ROOT, kind).unwrap();
            }
            client.rmdir(ROOT, "dir").unwrap();
        }
    }
    // Where the guest takes the daemon's user for its root, others may not make what looks like root's.
    let rule = format!("--translate-uid=squash-host:{USER}:0:1");
    let (_home, backend) = unprivileged(USER, &[&rule]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().mkdir(ROOT, "roots", 0o755, 0).unwrap();
    assert_eq!(common::errno(session.client().user(5, 5).mkdir(ROOT, "others", 0o755, 0)), libc::EPERM);
}

/// A daemon that is not root, but has root's privileges, keeps them when it serves the guest's root.
#[test]
fn a_privileged_daemon_of_a_user_keeps_its_capabilities() {
    const USER: u32 = 4321;
    let directory = common::disk_directory();
    chown(directory.path(), Some(USER), Some(USER)).unwrap();
    let held = "+setuid,+setgid,+dac_override,+fowner,+chown,+fsetid,+mknod";
    let ids = format!("--reuid={USER} --regid={USER} --clear-groups --inh-caps={held} --ambient-caps={held}");
    let starter = Backend::of("setpriv").args(ids.split_whitespace()).args([common::program()]);
    let starter = starter.args(["--sandbox=none", "--thread-pool-size=1"]);
    let backend = starter.share(directory.path()).by_fd().start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    for round in 0..3 {
        session.client().mkdir(ROOT, format!("roots-{round}"), 0o755, 0).unwrap();
        session.client().user(5, 6).mkdir(ROOT, format!("users-{round}"), 0o755, 0).unwrap();
        assert_eq!(owners(&backend.path(&format!("roots-{round}"))), (USER, USER));
        assert_eq!(owners(&backend.path(&format!("users-{round}"))), (5, 6));
    }
}

#[test]
fn overlapping_rules_are_refused_at_start() {
    let share = tempfile::tempdir().unwrap();
    let base = ["--sandbox=none", "--fd=3", "--shared-dir", share.path().to_str().unwrap()];
    for (rules, words) in [
        (["--translate-uid=map:0:0:10", "--translate-uid=guest:9:0:1"], ["--translate-uid", "guest:9:0:1"]),
        (["--translate-gid=host:0:0:10", "--translate-gid=squash-host:9:0:1"], ["gid", "squash-host:9:0:1"]),
        (["--translate-gid=map:1:0:4294967295", "--readonly"], ["--translate-gid", "last id"]),
        (["--translate-uid=1000:1000:1", "--readonly"], ["--translate-uid", "forbid-guest:GUEST:COUNT"]),
    ] {
        let (status, stderr) = Backend::of(common::program()).bare().args(base).args(rules).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{word} is missing in: {stderr}");
        }
    }
}
