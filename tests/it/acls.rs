//! POSIX ACLs: who gets them, and what they do to what is created.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use fuse_protocol::flags::{InitFlags, SetxattrFlags};
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::fs::{XattrFlags, setxattr};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::common;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// The id of entries that have none.
const NO_ID: u32 = u32::MAX;

/// An ACL as the kernel writes it: tag, permissions, id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// rwx for the owner, and for user 5 and group 6; rwx for the group, none for others.
fn named(uid: u32, gid: u32) -> Vec<u8> {
    acl(&[
        (USER_OBJ, 7, NO_ID),
        (USER, 7, uid),
        (GROUP_OBJ, 7, NO_ID),
        (GROUP, 7, gid),
        (MASK, 7, NO_ID),
        (OTHER, 0, NO_ID),
    ])
}

fn on_disk(args: &[&str]) -> (TempDir, Backend, Session) {
    let starter = common::starter().args(args).args(["--tmpfile"]);
    common::serve_on(common::open_directory(), starter, SessionOptions::default())
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

const BOTH: InitFlags = InitFlags::POSIX_ACL.union(InitFlags::DONT_MASK);

#[test]
fn they_are_negotiated_as_asked() {
    let without = SessionOptions { init_flags: linux_init_flags() - BOTH, ..SessionOptions::default() };
    for (args, offered) in [
        (&[][..], false),
        (&["--xattr"], false),
        (&["--posix-acl=never"], false),
        (&["--posix-acl=auto"], true),
        (&["--posix-acl"], true),
        (&["--posix-acl=always"], true),
    ] {
        let (_directory, backend, session) = on_disk(args);
        let wanted = if offered { BOTH } else { InitFlags::empty() };
        assert_eq!(session.init_flags() & BOTH, wanted, "{args:?}");
        drop((backend, session));
    }
    let (_directory, _backend, session) = {
        let directory = common::disk_directory();
        let backend = common::starter().args(["--posix-acl=auto"]).share(directory.path()).start().unwrap();
        let session = backend.connect(without.clone()).unwrap();
        (directory, backend, session)
    };
    assert_eq!(session.init_flags() & BOTH, InitFlags::empty());
    assert_eq!(common::errno(session.client().getxattr(ROOT, ACCESS, 100)), libc::ENOTSUP);
}

#[test]
fn a_guest_without_them_is_refused_where_they_are_a_must() {
    let directory = common::disk_directory();
    let backend = common::starter().args(["--posix-acl"]).share(directory.path()).start().unwrap();
    let options = SessionOptions { init_flags: linux_init_flags() - BOTH, ..SessionOptions::default() };
    let session = Session::start(Connection::connect(backend.socket()).unwrap(), options).unwrap();
    assert_eq!(common::errno(session.init()), libc::EPROTO);
    assert_eq!(common::errno(session.client().getattr(ROOT)), libc::ENOTCONN);
    common::wait_for_words(&backend, "POSIX_ACL");
    // The daemon is still there for a guest that has them.
    session.init_with(45, linux_init_flags()).unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn a_host_without_them_is_told_at_start() {
    // Nothing in /proc has ACLs.
    let refused = |args: &[&str], share: &str| {
        let (status, stderr) = common::starter().args(args).share(share).refuse().unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        stderr
    };
    let stderr = refused(&["--posix-acl", "--log-level=error"], "/proc/sys");
    assert!(stderr.contains("--posix-acl=auto"), "{stderr}");
    let stderr = refused(&["--posix-acl", "--xattrmap=:map::user.x.:", "--log-level=error"], "/tmp");
    assert!(stderr.contains("--xattrmap"), "{stderr}");
    // With auto they are simply not offered.
    let backend = common::starter().args(["--posix-acl=auto"]).share("/proc/sys").start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    assert_eq!(session.init_flags() & BOTH, InitFlags::empty());
}

#[test]
fn without_them_the_guest_neither_sees_nor_sets_any() {
    let (_directory, backend, session) = on_disk(&["--xattr"]);
    let path = backend.path("dir");
    fs::create_dir(&path).unwrap();
    for name in [ACCESS, DEFAULT] {
        setxattr(&path, name, &named(5, 6), XattrFlags::empty()).unwrap();
    }
    setxattr(&path, "user.seen", b"", XattrFlags::empty()).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "dir").unwrap().nodeid;
    assert_eq!(client.listxattr(node, 1000).unwrap(), b"user.seen\0");
    for name in [ACCESS, DEFAULT] {
        assert_eq!(common::errno(client.getxattr(node, name, 1000)), libc::ENOTSUP);
        assert_eq!(common::errno(client.setxattr(node, name, &named(7, 8), 0)), libc::ENOTSUP);
        assert_eq!(common::errno(client.removexattr(node, name)), libc::ENOTSUP);
        assert_eq!(common::host_xattr(&path, name).unwrap(), named(5, 6));
    }
}

#[test]
fn acls_come_and_go() {
    let (_directory, backend, session) = on_disk(&["--posix-acl"]);
    let path = backend.path("dir");
    let client = session.client();
    let node = client.mkdir(ROOT, "dir", 0o750, 0).unwrap().nodeid;
    assert_eq!(common::errno(client.getxattr(node, ACCESS, 1000)), libc::ENODATA);
    for name in [ACCESS, DEFAULT] {
        client.setxattr(node, name, &named(5, 6), 0).unwrap();
        assert_eq!(common::host_xattr(&path, name).unwrap(), named(5, 6));
        assert_eq!(client.getxattr(node, name, 1000).unwrap(), named(5, 6));
    }
    assert_eq!(client.getattr(node).unwrap().mode & 0o7777, 0o770, "the mode follows the mask");
    let attr = client.setattr(node, Change::none().mode(0o710)).unwrap();
    assert_eq!(attr.mode & 0o7777, 0o710);
    let mask_of = |value: &[u8]| value[4 + 4 * 8 + 2];
    assert_eq!(mask_of(&client.getxattr(node, ACCESS, 1000).unwrap()), 1, "the mask follows the mode");
    assert_eq!(common::errno(client.setxattr(node, ACCESS, &[2, 0, 0, 0, 1], 0)), libc::EINVAL);
    for name in [ACCESS, DEFAULT] {
        client.removexattr(node, name).unwrap();
        assert_eq!(common::host_xattr(&path, name), Err(Errno::NODATA));
    }
}

/// Makes one of each kind with all permissions asked for, and returns the modes they got.
fn modes_of_new(client: &Client<'_>, parent: u64, path: &Path, umask: u32) -> [u32; 4] {
    client.mkdir(parent, "dir", 0o777, umask).unwrap();
    client.mknod(parent, "node", libc::S_IFREG | 0o666, 0, umask).unwrap();
    let (entry, open) = client.create(parent, "file", libc::O_RDWR, 0o666, umask).unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    let (entry, open) = client.tmpfile_with(parent, libc::O_RDWR, 0o666, umask).unwrap();
    client.link(entry.nodeid, parent, "tmpfile").unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    let modes = ["dir", "node", "file", "tmpfile"].map(|name| mode(&path.join(name)));
    for name in ["node", "file", "tmpfile"] {
        client.unlink(parent, name).unwrap();
    }
    client.rmdir(parent, "dir").unwrap();
    modes
}

#[test]
fn the_umask_counts_where_no_default_acl_does() {
    // The same with a guest that applies umasks itself, but for the default ACL's part.
    for (args, with_acl) in [
        (&["--posix-acl"][..], [0o770, 0o660, 0o660, 0o660]),
        (&["--xattr"][..], [0o700, 0o600, 0o600, 0o600]),
    ] {
        let (_directory, backend, session) = on_disk(args);
        let path = backend.path("work");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let parent = session.client().lookup(ROOT, "work").unwrap().nodeid;
        for client in [session.client(), session.client().user(1000, 1000)] {
            assert_eq!(modes_of_new(&client, parent, &path, 0o027), [0o750, 0o640, 0o640, 0o640]);
            assert_eq!(modes_of_new(&client, parent, &path, 0o000), [0o777, 0o666, 0o666, 0o666]);
            assert_eq!(modes_of_new(&client, parent, &path, 0o777), [0, 0, 0, 0]);
        }
        setxattr(&path, DEFAULT, &named(5, 6), XattrFlags::empty()).unwrap();
        for client in [session.client(), session.client().user(1000, 1000)] {
            assert_eq!(modes_of_new(&client, parent, &path, 0o077), with_acl, "{args:?}");
        }
        rustix::fs::removexattr(&path, DEFAULT).unwrap();
        let client = session.client();
        assert_eq!(modes_of_new(&client, parent, &path, 0o027), [0o750, 0o640, 0o640, 0o640]);
    }
}

#[test]
fn default_acls_are_inherited() {
    let (_directory, backend, session) = on_disk(&["--posix-acl"]);
    let client = session.client();
    client.setxattr(ROOT, DEFAULT, &named(5, 6), 0).unwrap();
    let user = client.user(1000, 1000);
    let dir = user.mkdir(ROOT, "dir", 0o777, 0o077).unwrap().nodeid;
    assert_eq!(client.getxattr(dir, DEFAULT, 1000).unwrap(), named(5, 6));
    assert_eq!(client.getxattr(dir, ACCESS, 1000).unwrap(), named(5, 6));
    let (file, open) = user.create(ROOT, "file", libc::O_RDWR, 0o644, 0o077).unwrap();
    user.release(file.nodeid, open.fh).unwrap();
    // The mode that was asked for is a limit for owner, mask and others.
    let expected = acl(&[
        (USER_OBJ, 6, NO_ID),
        (USER, 7, 5),
        (GROUP_OBJ, 7, NO_ID),
        (GROUP, 7, 6),
        (MASK, 4, NO_ID),
        (OTHER, 0, NO_ID),
    ]);
    assert_eq!(common::host_xattr(&backend.path("file"), ACCESS).unwrap(), expected);
    assert_eq!(file.attr.mode & 0o7777, 0o640);
}

#[test]
fn ids_in_acls_are_translated() {
    let (_directory, backend, session) = on_disk(&[
        "--posix-acl",
        "--translate-uid=map:0:100000:1000",
        "--translate-gid=map:0:200000:1000",
        "--translate-uid=forbid-guest:1000:1",
        "--translate-gid=forbid-guest:1000:1",
    ]);
    let client = session.client();
    for name in [ACCESS, DEFAULT] {
        client.setxattr(ROOT, name, &named(5, 6), 0).unwrap();
        assert_eq!(common::host_xattr(backend.share(), name).unwrap(), named(100_005, 200_006));
        assert_eq!(client.getxattr(ROOT, name, 1000).unwrap(), named(5, 6));
        assert_eq!(common::errno(client.setxattr(ROOT, name, &named(1000, 6), 0)), libc::EPERM);
        assert_eq!(common::errno(client.setxattr(ROOT, name, &named(5, 1000), 0)), libc::EPERM);
        assert_eq!(common::host_xattr(backend.share(), name).unwrap(), named(100_005, 200_006));
    }
}

#[test]
fn an_acl_by_somebody_outside_the_group_takes_the_set_group_id_bit() {
    let (_directory, backend, session) = on_disk(&["--posix-acl"]);
    let path = backend.path("tool");
    fs::write(&path, "").unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "tool").unwrap().nodeid;
    // Group 0 is the daemon's own: the host alone would let the bit stand.
    for gid in [777, 0] {
        for (flags, left) in [(SetxattrFlags::empty(), 0o2000), (SetxattrFlags::ACL_KILL_SGID, 0)] {
            chown(&path, Some(1000), Some(gid)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).unwrap();
            client.user(1000, 1000).setxattr_with(node, ACCESS, &named(5, 6), 0, flags).unwrap();
            assert_eq!(mode(&path), 0o770 | left, "group {gid}, {flags:?}");
        }
    }
    // A default ACL is no change of the directory's own permissions.
    let dir = backend.path("dir");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o2755)).unwrap();
    let node = client.lookup(ROOT, "dir").unwrap().nodeid;
    client.setxattr_with(node, DEFAULT, &named(5, 6), 0, SetxattrFlags::ACL_KILL_SGID).unwrap();
    assert_eq!(mode(&dir), 0o2755);
}

/// The guest's kernel knows all groups of the caller; the request tells of one at most.
#[test]
fn rights_by_a_named_group_count_for_all_that_is_created() {
    let (_directory, backend, session) = on_disk(&["--posix-acl", "--xattr"]);
    let path = backend.path("project");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let value = acl(&[
        (USER_OBJ, 7, NO_ID),
        (GROUP_OBJ, 5, NO_ID),
        (GROUP, 7, 2000),
        (MASK, 7, NO_ID),
        (OTHER, 0, NO_ID),
    ]);
    setxattr(&path, ACCESS, &value, XattrFlags::empty()).unwrap();
    let member = session.client().user(1000, 1000);
    let project = member.lookup(ROOT, "project").unwrap().nodeid;
    assert_eq!(modes_of_new(&member, project, &path, 0o027), [0o750, 0o640, 0o640, 0o640]);
    member.symlink(project, "link", "x").unwrap();
    let (entry, _) = member.create(project, "file", libc::O_RDWR | libc::O_EXCL, 0o666, 0).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1000));
    member.unlink(project, "file").unwrap();
    // A default ACL is inherited by what the member makes, and the umask is set aside.
    setxattr(&path, DEFAULT, &named(5, 6), XattrFlags::empty()).unwrap();
    assert_eq!(modes_of_new(&member, project, &path, 0o077), [0o770, 0o660, 0o660, 0o660]);
}

/// Guests before Linux 5.11 do not say who is outside of the group.
#[test]
fn an_acl_by_a_stranger_takes_the_bit_also_where_the_guest_does_not_say_so() {
    let directory = common::disk_directory();
    let backend = common::starter().args(["--posix-acl"]).share(directory.path()).start().unwrap();
    let flags = linux_init_flags() - InitFlags::SETXATTR_EXT - InitFlags::ALLOW_IDMAP;
    let options = SessionOptions { minor: 32, init_flags: flags, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    let path = backend.path("tool");
    fs::write(&path, "").unwrap();
    let node = session.client().lookup(ROOT, "tool").unwrap().nodeid;
    for (uid, gid, left) in [(1000, 1000, 0), (1000, 777, 0o2000), (0, 0, 0o2000)] {
        chown(&path, Some(1000), Some(777)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).unwrap();
        session.client().user(uid, gid).setxattr(node, ACCESS, &named(5, 6), 0).unwrap();
        assert_eq!(mode(&path), 0o770 | left, "by {uid}:{gid}");
    }
}

#[test]
fn group_directories_with_and_without_a_default_acl() {
    let (_directory, backend, session) = on_disk(&["--posix-acl"]);
    let path = backend.path("team");
    fs::create_dir(&path).unwrap();
    chown(&path, Some(0), Some(2000)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2775)).unwrap();
    let team = session.client().lookup(ROOT, "team").unwrap().nodeid;
    // A caller outside of the group, whom something else allows to create there.
    let stranger = session.client().user(1000, 1000);
    for (acl, dir, file) in [(false, 0o2750, 0o640), (true, 0o2770, 0o660)] {
        if acl {
            setxattr(&path, DEFAULT, &named(5, 6), XattrFlags::empty()).unwrap();
        }
        assert_eq!(modes_of_new(&stranger, team, &path, 0o027), [dir, file, file, file], "ACL: {acl}");
        stranger.mkdir(team, "kept", 0o777, 0o027).unwrap();
        stranger.create(team, "file", libc::O_RDWR, 0o666, 0o027).unwrap();
        for name in ["kept", "file"] {
            let made = fs::metadata(path.join(name)).unwrap();
            assert_eq!((made.uid(), made.gid()), (1000, 2000), "{name}");
        }
        stranger.unlink(team, "file").unwrap();
        stranger.rmdir(team, "kept").unwrap();
    }
}
