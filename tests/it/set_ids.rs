//! Set-user-ID and set-group-ID bits and file capabilities: who changes a program does not get its
//! owner's rights, and who creates one gets no other user's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use fuse_protocol::flags::{InitFlags, OpenRequestFlags, WriteFlags};
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Backend, Caller, Client, Session, SessionOptions};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use tempfile::TempDir;

use crate::common;

/// `cap_net_raw+ep`, as in `struct vfs_cap_data` of revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A caller whom the guest does not name, as guests with ALLOW_IDMAP do.
const UNKNOWN: (u32, u32) = (u32::MAX, u32::MAX);
const USER: (u32, u32) = (1000, 1000);

/// A daemon with these options, the default sandbox among them if no other is named.
fn share(args: &[&str], options: SessionOptions) -> (TempDir, Backend, Session) {
    let starter = Backend::of(common::program()).args(["--tmpfile"]).args(args);
    common::serve_on(common::open_directory(), starter, options)
}

/// A session of a guest with this minor version and without these flags.
fn older(minor: u32, without: InitFlags) -> SessionOptions {
    SessionOptions { minor, init_flags: linux_init_flags() - without, ..SessionOptions::default() }
}

/// One way to change a file's data, size or owner.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Write,
    Append,
    Allocate(i32),
    Copy,
    Truncate,
    TruncateByHandle,
    OpenTruncating,
    CreateTruncating,
}

const WAYS: [How; 11] = [
    How::Write,
    How::Append,
    How::Allocate(0),
    How::Allocate(libc::FALLOC_FL_KEEP_SIZE),
    How::Allocate(libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE),
    How::Allocate(libc::FALLOC_FL_ZERO_RANGE),
    How::Copy,
    How::Truncate,
    How::TruncateByHandle,
    How::OpenTruncating,
    How::CreateTruncating,
];

/// Those of a caller: guests name who creates something in any case.
fn ways_of(uid: u32) -> impl Iterator<Item = How> {
    WAYS.into_iter().filter(move |how| uid != u32::MAX || *how != How::CreateTruncating)
}

impl How {
    /// Changes `file`; with `clear` the guest says that the caller lacks CAP_FSETID.
    fn change(self, client: &Client<'_>, node: u64, clear: bool) {
        let kill = if clear { WriteFlags::KILL_SUIDGID } else { WriteFlags::empty() };
        let open_kill = if clear { OpenRequestFlags::KILL_SUIDGID.bits() } else { 0 };
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        let change = |change: Change| if clear { change.kill_suidgid() } else { change };
        let truncating = libc::O_RDWR | libc::O_TRUNC;
        match self {
            How::Write => assert_eq!(client.write_with(node, fh, 0, b"x", kill, libc::O_RDWR).unwrap(), 1),
            How::Append => {
                assert_eq!(
                    client.write_with(node, fh, 0, b"x", kill, libc::O_RDWR | libc::O_APPEND).unwrap(),
                    1
                );
            }
            How::Allocate(mode) => client.fallocate(node, fh, mode, 0, 4096).unwrap(),
            How::Copy => {
                let source = client.lookup(ROOT, "source").unwrap().nodeid;
                let from = client.open(source, libc::O_RDONLY).unwrap().fh;
                assert_eq!(client.copy_file_range((source, from, 0), (node, fh, 0), 4096).unwrap(), 4096);
                client.release(source, from).unwrap();
            }
            How::Truncate => {
                assert_eq!(client.setattr(node, change(Change::none().size(5))).unwrap().size, 5)
            }
            How::TruncateByHandle => {
                assert_eq!(client.setattr(node, change(Change::none().size(5).handle(fh))).unwrap().size, 5);
            }
            How::OpenTruncating => {
                let second = client.open_with(node, truncating, open_kill).unwrap().fh;
                client.release(node, second).unwrap();
            }
            How::CreateTruncating => {
                let (_, open) = client.create_with(ROOT, "file", truncating, (0o644, 0), open_kill).unwrap();
                client.release(node, open.fh).unwrap();
            }
        }
        client.release(node, fh).unwrap();
    }
}

/// A program of root in the share, with these permissions and file capabilities.
fn program(backend: &Backend, client: &Client<'_>, mode: u32, group: u32) -> u64 {
    let path = backend.path("file");
    let _ = fs::remove_file(&path);
    fs::write(&path, vec![b'P'; 8192]).unwrap();
    fs::write(backend.path("source"), vec![b'S'; 8192]).unwrap();
    chown(&path, Some(0), Some(group)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    setxattr(&path, "security.capability", &CAPABILITY, XattrFlags::empty()).unwrap();
    client.lookup(ROOT, "file").unwrap().nodeid
}

fn mode(backend: &Backend, name: &str) -> u32 {
    fs::symlink_metadata(backend.path(name)).unwrap().mode() & 0o7777
}

fn has_capabilities(backend: &Backend) -> bool {
    getxattr(backend.path("file"), "security.capability", &mut [0_u8; 64][..]).is_ok()
}

/// Attack: a user of the guest writes to, truncates, copies into or punches holes in a set-user-ID program.
/// Outcome: the bits and file capabilities are gone with the change.
#[test]
fn changing_a_program_clears_its_set_id_bits_and_capabilities() {
    for args in [
        &[][..],
        &["--cache=never"],
        &["--xattr", "--posix-acl"],
        &["--sandbox=none"],
        &["--sandbox=chroot", "--thread-pool-size=0"],
    ] {
        let (_directory, backend, session) = share(args, SessionOptions::default());
        for (uid, gid) in [USER, UNKNOWN] {
            let client = session.client().user(uid, gid);
            for how in ways_of(uid) {
                let node = program(&backend, &client, 0o6777, 0);
                how.change(&client, node, true);
                assert_eq!(mode(&backend, "file"), 0o777, "{how:?} by {uid} with {args:?}");
                assert!(!has_capabilities(&backend), "{how:?} by {uid} with {args:?}");
            }
        }
    }
}

#[test]
fn a_guest_that_leaves_it_all_to_the_daemon_is_safe_too() {
    let without = InitFlags::HANDLE_KILLPRIV_V2;
    for (args, options) in [
        (&["--no-killpriv-v2", "--cache=never"][..], SessionOptions::default()),
        (&["--no-killpriv-v2"], SessionOptions::default()),
        (&["--cache=never"], older(32, without | InitFlags::ALLOW_IDMAP)),
    ] {
        let (_directory, backend, session) = share(args, options);
        for how in WAYS {
            let client = session.client().user(USER.0, USER.1);
            let node = program(&backend, &client, 0o6777, 0);
            how.change(&client, node, false);
            assert_eq!(mode(&backend, "file"), 0o777, "{how:?} with {args:?}");
            assert!(!has_capabilities(&backend), "{how:?} with {args:?}");
        }
        // Root keeps what it keeps on a local file system.
        let node = program(&backend, &session.client(), 0o6777, 0);
        How::Write.change(&session.client(), node, false);
        assert_eq!(mode(&backend, "file"), 0o6777, "{args:?}");
    }
    // A caller who is not named, in direct mode: nobody else would clear them.
    let (_directory, backend, session) =
        share(&["--no-killpriv-v2", "--cache=never"], SessionOptions::default());
    let client = session.client().user(UNKNOWN.0, UNKNOWN.1);
    let node = program(&backend, &client, 0o6777, 0);
    How::Write.change(&client, node, false);
    assert_eq!(mode(&backend, "file"), 0o777);
}

#[test]
fn who_may_keep_the_bits_keeps_them() {
    for args in [&[][..], &["--cache=never"], &["--sandbox=none"]] {
        let (_directory, backend, session) = share(args, SessionOptions::default());
        let client = session.client();
        for how in WAYS {
            // FALLOCATE and COPY_FILE_RANGE do not say whether the caller may.
            let has_flag = !matches!(how, How::Allocate(_) | How::Copy);
            let node = program(&backend, &client, 0o6777, 0);
            // The worker has just served somebody who may not.
            let other = client.user(USER.0, USER.1).create(ROOT, "other", libc::O_RDWR, 0o6777, 0).unwrap();
            How::Write.change(&client.user(USER.0, USER.1), other.0.nodeid, true);
            how.change(&client, node, false);
            assert_eq!(mode(&backend, "file"), if has_flag { 0o6777 } else { 0o777 }, "{how:?} {args:?}");
            // Capabilities go whoever it is.
            assert!(!has_capabilities(&backend), "{how:?} with {args:?}");
        }
        // Pages of the guest's cache: whoever wrote to them had the bits cleared then.
        let node = program(&backend, &client, 0o6777, 0);
        let fh = client.open(node, libc::O_RDWR).unwrap().fh;
        client.user(1000, 1000).write_with(node, fh, 0, b"x", WriteFlags::CACHE, libc::O_RDWR).unwrap();
        assert_eq!(mode(&backend, "file"), 0o6777);
        // chmod(2) sets what it says, for a group of which the daemon is no member as well.
        chown(backend.path("file"), Some(5), Some(777)).unwrap();
        How::Write.change(&client.user(5, 5), node, true);
        client.user(5, 777).setattr(node, Change::none().mode(0o6755)).unwrap();
        assert_eq!(mode(&backend, "file"), 0o6755);
    }
}

#[test]
fn a_new_owner_takes_bits_and_capabilities() {
    let (_directory, backend, session) = share(&[], SessionOptions::default());
    for change in [Change::none().uid(1000), Change::none().gid(1000), Change::none().uid(5).gid(6)] {
        let client = session.client();
        let node = program(&backend, &client, 0o6777, 0);
        client.setattr(node, change).unwrap();
        assert_eq!(mode(&backend, "file"), 0o777);
        assert!(!has_capabilities(&backend));
    }
}

#[test]
fn a_group_bit_that_nobody_executes_stays_for_members() {
    for args in [&[][..], &["--cache=never"], &["--sandbox=none"]] {
        let (_directory, backend, session) = share(args, SessionOptions::default());
        for (caller, left) in [((1000, 1001), 0o2666), (UNKNOWN, 0o2666), (USER, 0o666)] {
            let client = session.client().user(caller.0, caller.1);
            for how in ways_of(caller.0) {
                let node = program(&backend, &client, 0o6666, 1001);
                how.change(&client, node, true);
                assert_eq!(mode(&backend, "file"), left, "{how:?} by {caller:?} with {args:?}");
            }
        }
        // Group 0 is the daemon's own, and means nothing.
        let client = session.client().user(USER.0, USER.1);
        for how in WAYS {
            let node = program(&backend, &client, 0o2666, 0);
            how.change(&client, node, true);
            assert_eq!(mode(&backend, "file"), 0o666, "{how:?} with {args:?}");
        }
    }
}

/// Attack: a user of the guest writes to a set-user-ID program and runs it while the guest's kernel remembers the
/// old mode.
/// Outcome: it does not run: attributes with set-id bits have a validity of 0.
#[test]
fn attributes_with_set_id_bits_are_not_kept_by_the_guest() {
    for args in [&[][..], &["--cache=always"], &["--cache=metadata"]] {
        let (_directory, backend, session) = share(args, SessionOptions::default());
        let client = session.client();
        for mode in [0o755, 0o4755, 0o2755, 0o2644] {
            let known = mode < 0o1000;
            let check = |what: &str, valid: u64| assert_eq!(valid > 0, known, "{what} of {mode:o}, {args:?}");
            let node = program(&backend, &client, mode, 0);
            let entry = client.lookup(ROOT, "file").unwrap();
            check("LOOKUP", entry.attr_valid);
            assert!(entry.entry_valid > 0, "the name can be kept");
            check("GETATTR", client.getattr_reply(node, None).unwrap().attr_valid);
            check("STATX", client.statx_reply(node, libc::STATX_BASIC_STATS).unwrap().attr_valid);
            check("SETATTR", client.setattr_reply(node, Change::none().times_now()).unwrap().attr_valid);
            check("LINK", client.link(node, ROOT, "link").unwrap().attr_valid);
            let fh = client.opendir(ROOT).unwrap().fh;
            let listed = client.readdirplus(ROOT, fh, 0, 4096).unwrap();
            let plus = listed.iter().find(|entry| entry.name == b"file").unwrap().entry.unwrap();
            check("READDIRPLUS", plus.attr_valid);
            let (created, _) = client.create(ROOT, "new", libc::O_RDWR, mode, 0).unwrap();
            check("CREATE", created.attr_valid);
            check("MKNOD", client.mknod(ROOT, "node", libc::S_IFREG | mode, 0, 0).unwrap().attr_valid);
            check("TMPFILE", client.tmpfile(ROOT, libc::O_RDWR, mode).unwrap().0.attr_valid);
            for name in ["link", "new", "node"] {
                client.unlink(ROOT, name).unwrap();
            }
        }
        // A directory's bits are never cleared by a write.
        fs::create_dir(backend.path("dir")).unwrap();
        fs::set_permissions(backend.path("dir"), fs::Permissions::from_mode(0o2775)).unwrap();
        assert!(client.lookup(ROOT, "dir").unwrap().attr_valid > 0);
    }
}

/// Makes a file and a node with mode 2775 and returns what they got.
fn group_bits(backend: &Backend, client: &Client<'_>, parent: u64) -> [u32; 3] {
    let (entry, open) = client.create(parent, "file", libc::O_RDWR, 0o2775, 0).unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    client.mknod(parent, "node", libc::S_IFREG | 0o2775, 0, 0).unwrap();
    let (entry, open) = client.tmpfile(parent, libc::O_RDWR, 0o2775).unwrap();
    client.link(entry.nodeid, parent, "tmpfile").unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    let names = ["file", "node", "tmpfile"];
    let modes = names.map(|name| mode(backend, &format!("team/{name}")));
    for name in names {
        assert_eq!(fs::metadata(backend.path("team").join(name)).unwrap().gid(), 2000, "{name}");
        client.unlink(parent, name).unwrap();
    }
    modes
}

#[test]
fn a_new_file_in_a_group_directory_has_the_group_bit_if_its_maker_is_in_the_group() {
    let groups = InitFlags::CREATE_SUPP_GROUP;
    let member = |group| Caller { uid: 1001, gid: 1001, pid: 1, group };
    let (kept, taken) = ([0o2775; 3], [0o775; 3]);
    for (options, caller, expected) in [
        (SessionOptions::default(), member(Some(2000)), kept),
        (SessionOptions::default(), member(None), taken),
        (SessionOptions::default(), member(Some(3000)), taken),
        (SessionOptions::default(), Caller { gid: 2000, ..member(None) }, kept),
        (SessionOptions::default(), Caller::default(), kept),
        // Linux 6.1 and 6.2 send no groups, but have taken the bit already where it has to go.
        (older(38, groups), member(None), kept),
        (older(37, groups), member(None), kept),
        // Older ones leave that to the host.
        (older(36, groups), member(None), taken),
        (older(36, groups), Caller { gid: 2000, ..member(None) }, kept),
        (older(36, groups), Caller::default(), kept),
    ] {
        for args in [&[][..], &["--sandbox=none"], &["--translate-uid=map:0:100000:5000"]] {
            let (_directory, backend, session) = share(args, options.clone());
            fs::create_dir(backend.path("team")).unwrap();
            chown(backend.path("team"), None, Some(2000)).unwrap();
            fs::set_permissions(backend.path("team"), fs::Permissions::from_mode(0o2777)).unwrap();
            let client = session.client().caller(caller);
            let team = client.lookup(ROOT, "team").unwrap().nodeid;
            let what = format!("minor {}, {caller:?}, {args:?}", options.minor);
            assert_eq!(group_bits(&backend, &client, team), expected, "{what}");
            // Directories inherit the bit whoever makes them.
            client.mkdir(team, "dir", 0o755, 0).unwrap();
            let made = fs::metadata(backend.path("team/dir")).unwrap();
            assert_eq!((made.mode() & 0o7777, made.gid()), (0o2755, 2000), "{what}");
        }
    }
}

/// Attack: a guest user with another uid on the host creates a set-user-ID program.
/// Outcome: the file is created without the bits.
#[test]
fn a_new_file_has_set_id_bits_only_if_its_maker_owns_it() {
    let squash =
        ["--translate-uid=squash-guest:0:0:4294967295", "--translate-gid=squash-guest:0:0:4294967295"];
    let (_directory, backend, session) = share(&squash, SessionOptions::default());
    let user = session.client().user(1000, 1000);
    user.create(ROOT, "file", libc::O_RDWR, 0o6755, 0).unwrap();
    user.mknod(ROOT, "node", libc::S_IFREG | 0o6755, 0, 0).unwrap();
    let (entry, _) = user.tmpfile(ROOT, libc::O_RDWR, 0o6755).unwrap();
    user.link(entry.nodeid, ROOT, "tmpfile").unwrap();
    for name in ["file", "node", "tmpfile"] {
        assert_eq!(
            (mode(&backend, name), fs::metadata(backend.path(name)).unwrap().uid()),
            (0o755, 0),
            "{name}"
        );
    }
    session.client().create(ROOT, "roots", libc::O_RDWR, 0o6755, 0).unwrap();
    assert_eq!(mode(&backend, "roots"), 0o6755);
    // With a number of one's own on the host all is as it should be.
    let shift = ["--translate-uid=map:0:100000:5000", "--translate-gid=map:0:100000:5000"];
    let (_directory, backend, session) = share(&shift, SessionOptions::default());
    session.client().user(1000, 1000).create(ROOT, "file", libc::O_RDWR, 0o6755, 0).unwrap();
    assert_eq!(mode(&backend, "file"), 0o6755);
}
