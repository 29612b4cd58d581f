//! IOCTL: flags and attributes of files and directories, as chattr(1) and lsattr(1) use them.

use std::os::fd::AsFd;

use fuse_protocol::flags::{InitFlags, IoctlFlags};
use lanefsd::sys::file_flags;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};

use crate::common;

const GETFLAGS: u32 = 0x8008_6601;
const SETFLAGS: u32 = 0x4008_6602;
const GETFLAGS_32: u32 = 0x8004_6601;
const SETFLAGS_32: u32 = 0x4004_6602;
const FSGETXATTR: u32 = 0x801c_581f;
const FSSETXATTR: u32 = 0x401c_5820;
const NODUMP: u32 = 0x40;
const NOATIME: u32 = 0x80;
const IMMUTABLE: u32 = 0x10;
const APPEND: u32 = 0x20;
const PROJINHERIT: u32 = 0x2000_0000;
const XFLAG_NODUMP: u32 = 0x80;
const XFLAG_PROJINHERIT: u32 = 0x200;

/// A daemon that serves a directory on a disk, sandbox and filter as by default, and a session with it.
fn serve(args: &[&str], options: SessionOptions) -> (tempfile::TempDir, Backend, Session) {
    common::serve_on(common::open_directory(), Backend::of(common::program()).args(args), options)
}

fn file(client: &Client<'_>) -> (u64, u64) {
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o644, 0).unwrap();
    (entry.nodeid, open.fh)
}

/// The flags that the host has for a file in the share.
fn on_host(backend: &Backend, name: &str) -> u32 {
    file_flags::flags(std::fs::File::open(backend.path(name)).unwrap().as_fd()).unwrap()
}

fn flags(client: &Client<'_>, node: u64, fh: u64) -> u32 {
    u32::from_ne_bytes(client.ioctl(node, fh, GETFLAGS, &[], 4).unwrap().try_into().unwrap())
}

fn words(attributes: &[u8]) -> Vec<u32> {
    attributes[..20].chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn flags_of_a_file_are_read_and_changed() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    let before = flags(&client, node, fh);
    assert_eq!(before, on_host(&backend, "file"));
    // As the guest's kernel sends it from Linux 5.13 on, and as a program does on older ones and of 32 bits.
    for (set, get, size) in [(SETFLAGS, GETFLAGS, 4), (SETFLAGS, GETFLAGS, 8), (SETFLAGS_32, GETFLAGS_32, 4)]
    {
        for new in [before | NODUMP | NOATIME, before | NODUMP, before] {
            let mut data = new.to_ne_bytes().to_vec();
            data.resize(size, 0xa5);
            assert!(client.ioctl(node, fh, set, &data, 0).unwrap().is_empty());
            assert_eq!(on_host(&backend, "file"), new);
            let got = client.ioctl(node, fh, get, &[], u32::try_from(size).unwrap()).unwrap();
            assert_eq!(got, new.to_ne_bytes(), "an int is moved, whatever the size of a long");
        }
    }
}

#[test]
fn flags_of_a_directory_are_read_and_changed() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    assert!(session.init_flags().contains(InitFlags::HAS_IOCTL_DIR));
    let client = session.client();
    let node = client.mkdir(ROOT, "dir", 0o755, 0).unwrap().nodeid;
    let fh = client.opendir(node).unwrap().fh;
    let old = client.ioctl_with(node, fh, GETFLAGS, &[], 4, IoctlFlags::DIR).unwrap();
    let new = u32::from_ne_bytes(old.try_into().unwrap()) | NODUMP;
    client.ioctl_with(node, fh, SETFLAGS, &new.to_ne_bytes(), 0, IoctlFlags::DIR).unwrap();
    assert_eq!(on_host(&backend, "dir"), new);
    // A file in it inherits that.
    let (inside, open) = client.create(node, "file", libc::O_RDWR, 0o644, 0).unwrap();
    assert_eq!(flags(&client, inside.nodeid, open.fh) & NODUMP, NODUMP);
}

#[test]
fn attributes_are_read_and_changed() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    let mut attributes = client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap();
    assert_eq!(attributes.len(), 28);
    let xflags = words(&attributes)[0] | XFLAG_NODUMP;
    attributes[..4].copy_from_slice(&xflags.to_ne_bytes());
    client.ioctl(node, fh, FSSETXATTR, &attributes, 0).unwrap();
    assert_eq!(on_host(&backend, "file") & NODUMP, NODUMP);
    assert_eq!(words(&client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap())[0], xflags);
}

#[test]
fn any_handle_will_do() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, _) = file(&client);
    let before = on_host(&backend, "file");
    for mode in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_DIRECT] {
        let fh = client.open(node, mode).unwrap().fh;
        let new = before ^ NODUMP;
        client.ioctl(node, fh, SETFLAGS, &new.to_ne_bytes(), 0).unwrap();
        assert_eq!(flags(&client, node, fh), new);
        client.ioctl(node, fh, SETFLAGS, &before.to_ne_bytes(), 0).unwrap();
    }
    // But it has to be one, and the node's.
    let other = client.mkdir(ROOT, "dir", 0o755, 0).unwrap().nodeid;
    let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
    for (node, fh) in [(other, fh), (node, fh + 1000), (node, 0)] {
        assert_eq!(common::errno(client.ioctl(node, fh, GETFLAGS, &[], 4)), libc::EBADF);
    }
}

/// Attack: ioctl(2) of commands for devices and file systems.
/// Outcome: ENOTTY; the host sees none of them.
#[test]
fn other_ioctl_commands_are_refused_with_enotty() {
    let (_share, _backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    // TCGETS, FIONREAD, FIGETBSZ, FICLONE, FITRIM, FS_IOC_ENABLE_VERITY, FS_IOC_GETVERSION, none at all.
    for command in [0x5401, 0x541b, 2, 0x4004_9409, 0xc018_5879, 0x4080_6685, 0x8008_7601, 0, u32::MAX] {
        for (data, room) in [(&[][..], 0), (&[0; 28], 0), (&[], 4096)] {
            assert_eq!(
                common::errno(client.ioctl(node, fh, command, data, room)),
                libc::ENOTTY,
                "{command:#x}"
            );
        }
    }
}

/// Attack: ioctl(2) with wrong sizes, or with free access to memory.
/// Outcome: EINVAL; nothing changes.
#[test]
fn wrong_sizes_and_free_access_to_memory_are_refused() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    let before = on_host(&backend, "file");
    for (command, data, room) in [
        (GETFLAGS, 0, 0),
        (GETFLAGS, 0, 3),
        (GETFLAGS, 0, 4096),
        (SETFLAGS, 0, 0),
        (SETFLAGS, 3, 0),
        (SETFLAGS, 5, 0),
        (SETFLAGS, 28, 0),
        (FSGETXATTR, 0, 0),
        (FSGETXATTR, 0, 27),
        (FSSETXATTR, 0, 0),
        (FSSETXATTR, 27, 0),
        (FSSETXATTR, 29, 0),
    ] {
        let result = client.ioctl(node, fh, command, &vec![0xff; data], room);
        assert_eq!(common::errno(result), libc::EINVAL, "{command:#x} {data} {room}");
    }
    for (command, data, room) in [(GETFLAGS, 0, 4), (SETFLAGS, 4, 0)] {
        let flags = IoctlFlags::UNRESTRICTED;
        let result = client.ioctl_with(node, fh, command, &vec![0; data], room, flags);
        assert_eq!(common::errno(result), libc::EINVAL);
    }
    assert_eq!(on_host(&backend, "file"), before);
}

/// Attack: flags of files that belong to other users of the guest.
/// Outcome: EPERM; nothing changes.
#[test]
fn only_the_owner_and_root_change_flags() {
    // Guests before Linux 5.13 pass on what anybody asks for; from 6.12 on they do not name the caller.
    for minor in [32, 37, 45] {
        let (_share, backend, session) = serve(&[], SessionOptions { minor, ..SessionOptions::default() });
        let client = session.client();
        let (node, fh) = file(&client);
        let theirs = client.user(1001, 1001).create(ROOT, "theirs", libc::O_RDWR, 0o666, 0).unwrap();
        let (theirs, their_fh) = (theirs.0.nodeid, theirs.1.fh);
        let before = on_host(&backend, "file");
        let new = (before | NODUMP).to_ne_bytes();
        for user in [1001, 65_534] {
            let client = client.user(user, user);
            assert_eq!(common::errno(client.ioctl(node, fh, SETFLAGS, &new, 0)), libc::EPERM);
            let mut attributes = client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap();
            attributes[0] |= 0x80;
            assert_eq!(common::errno(client.ioctl(node, fh, FSSETXATTR, &attributes, 0)), libc::EPERM);
            assert_eq!(flags(&client, node, fh), before);
        }
        assert_eq!(on_host(&backend, "file"), before);
        assert_eq!(
            common::errno(client.user(1002, 1002).ioctl(theirs, their_fh, SETFLAGS, &new, 0)),
            libc::EPERM
        );
        for client in [client.user(1001, 1001), client.user(u32::MAX, u32::MAX), client] {
            client.ioctl(theirs, their_fh, SETFLAGS, &new, 0).unwrap();
            client.ioctl(theirs, their_fh, SETFLAGS, &before.to_ne_bytes(), 0).unwrap();
        }
    }
}

/// Takes flags off a file again, also if the test fails: nobody could remove it otherwise.
struct Restored(std::fs::File, u32);

impl Restored {
    fn of(backend: &Backend, name: &str) -> Restored {
        Restored(std::fs::File::open(backend.path(name)).unwrap(), on_host(backend, name))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = file_flags::set_flags(self.0.as_fd(), self.1);
    }
}

#[test]
fn files_become_immutable_only_where_the_daemon_may_make_them_so() {
    for (args, allowed) in [(&[][..], false), (&["--modcaps=+linux_immutable"], true)] {
        let (_share, backend, session) = serve(args, SessionOptions::default());
        let client = session.client();
        client.user(1001, 1001).create(ROOT, "theirs", libc::O_RDWR, 0o666, 0).unwrap();
        let node = client.lookup(ROOT, "theirs").unwrap().nodeid;
        let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
        let before = on_host(&backend, "theirs");
        let _restored = Restored::of(&backend, "theirs");
        for flag in [IMMUTABLE, APPEND] {
            let new = (before | flag).to_ne_bytes();
            let by_owner = client.user(1001, 1001).ioctl(node, fh, SETFLAGS, &new, 0);
            assert_eq!(common::errno(by_owner), libc::EPERM, "an owner has no such right");
            let by_root = client.ioctl(node, fh, SETFLAGS, &new, 0);
            if !allowed {
                assert_eq!(common::errno(by_root), libc::EPERM);
                continue;
            }
            by_root.unwrap();
            assert_eq!(on_host(&backend, "theirs"), before | flag);
            assert_eq!(common::errno(client.unlink(ROOT, "theirs")), libc::EPERM);
            let back = client.user(1001, 1001).ioctl(node, fh, SETFLAGS, &before.to_ne_bytes(), 0);
            assert_eq!(common::errno(back), libc::EPERM);
            client.ioctl(node, fh, SETFLAGS, &before.to_ne_bytes(), 0).unwrap();
        }
        assert_eq!(on_host(&backend, "theirs"), before);
    }
}

/// Attack: flags that the host's root has set.
/// Outcome: EPERM, unless the daemon has CAP_LINUX_IMMUTABLE.
#[test]
fn what_the_host_made_immutable_stays_so() {
    let (_share, backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    let restored = Restored::of(&backend, "file");
    let before = restored.1;
    file_flags::set_flags(restored.0.as_fd(), before | IMMUTABLE).unwrap();
    let result = client.ioctl(node, fh, SETFLAGS, &before.to_ne_bytes(), 0);
    let seen = flags(&client, node, fh);
    assert_eq!(common::errno(result), libc::EPERM);
    assert_eq!(seen, before | IMMUTABLE);
}

/// Attack: leaving the project by which the host limits the share.
/// Outcome: EPERM, unless the daemon has CAP_SYS_RESOURCE.
#[test]
fn a_guest_does_not_leave_the_project_that_limits_it() {
    let (_share, _backend, session) = serve(&[], SessionOptions::default());
    let client = session.client();
    let node = client.mkdir(ROOT, "dir", 0o755, 0).unwrap().nodeid;
    let fh = client.opendir(node).unwrap().fh;
    let old = client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap();
    let changed = |at: usize, bits: u32| {
        let mut new = old.clone();
        let word = u32::from_ne_bytes(new[at..at + 4].try_into().unwrap()) ^ bits;
        new[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        new
    };
    for new in [changed(12, 4711), changed(0, XFLAG_PROJINHERIT)] {
        assert_eq!(common::errno(client.ioctl(node, fh, FSSETXATTR, &new, 0)), libc::EPERM);
    }
    let inherit = (flags(&client, node, fh) ^ PROJINHERIT).to_ne_bytes();
    assert_eq!(common::errno(client.ioctl(node, fh, SETFLAGS, &inherit, 0)), libc::EPERM);
    assert_eq!(client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap(), old);
    client.ioctl(node, fh, FSSETXATTR, &old, 0).unwrap();
}

#[test]
fn projects_are_the_guests_to_choose_where_no_quota_binds_the_daemon() {
    let held = rustix::thread::capabilities(None).unwrap().effective;
    if !held.contains(rustix::thread::CapabilitySet::SYS_RESOURCE) {
        eprintln!("not tried: this test was started without CAP_SYS_RESOURCE");
        return;
    }
    let (_share, _backend, session) = serve(&["--modcaps=+sys_resource"], SessionOptions::default());
    let client = session.client();
    let (node, fh) = file(&client);
    let mut attributes = client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap();
    attributes[12..16].copy_from_slice(&4711u32.to_ne_bytes());
    match client.ioctl(node, fh, FSSETXATTR, &attributes, 0) {
        Ok(_) => assert_eq!(words(&client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap())[3], 4711),
        // What the host's file system says that has no projects.
        Err(error) => assert_eq!(error.errno().unwrap().0, libc::EOPNOTSUPP),
    }
}

#[test]
fn a_read_only_share_shows_flags_and_keeps_them() {
    let share = common::disk_directory();
    std::fs::write(share.path().join("file"), "x").unwrap();
    let backend = Backend::of(common::program()).args(["--readonly"]).share(share.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
    let before = flags(&client, node, fh);
    let new = (before | NODUMP).to_ne_bytes();
    assert_eq!(common::errno(client.ioctl(node, fh, SETFLAGS, &new, 0)), libc::EROFS);
    let attributes = client.ioctl(node, fh, FSGETXATTR, &[], 28).unwrap();
    assert_eq!(common::errno(client.ioctl(node, fh, FSSETXATTR, &attributes, 0)), libc::EROFS);
    assert_eq!(common::errno(client.ioctl(node, fh, 0x5401, &[], 64)), libc::ENOTTY);
    assert_eq!(on_host(&backend, "file"), before);
}
