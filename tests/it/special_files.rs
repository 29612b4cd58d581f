//! Attributes and names of what is neither a regular file nor a directory.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, SessionOptions};

use crate::common;

const SPECIAL: [(&str, u32, u32); 4] = [
    ("socket", libc::S_IFSOCK, 0),
    ("fifo", libc::S_IFIFO, 0),
    ("character", libc::S_IFCHR, 0x103),
    ("block", libc::S_IFBLK, 0x700),
];

fn start(args: &[&str]) -> (Backend, lanefsd_frontend::Session) {
    let backend = Backend::of(common::program()).args(args).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    (backend, session)
}

#[test]
fn modes_owners_and_times_of_special_files_change() {
    for args in [&[][..], &["--inode-file-handles=never"], &["--sandbox=none"]] {
        let (backend, session) = start(args);
        let client = session.client();
        for (name, kind, rdev) in SPECIAL {
            let node = client.mknod(ROOT, name, kind | 0o600, rdev, 0).unwrap().nodeid;
            let change = Change::none().mode(0o640).times((1_000_000_000, 123), (2_000_000_000, 456));
            let attr = client.setattr(node, change).unwrap();
            assert_eq!((attr.mode, attr.rdev), (kind | 0o640, rdev), "{name}");
            client.setattr(node, Change::none().uid(1001).gid(1002)).unwrap();
            let found = backend.path(name).symlink_metadata().unwrap();
            assert_eq!(found.permissions().mode() & 0o7777, 0o640);
            assert_eq!((found.uid(), found.gid()), (1001, 1002));
            assert_eq!((found.atime(), found.atime_nsec()), (1_000_000_000, 123));
            assert_eq!((found.mtime(), found.mtime_nsec()), (2_000_000_000, 456));
            client.setattr(node, Change::none().times_now()).unwrap();
            client.rename(ROOT, name, ROOT, "other").unwrap();
            client.link(node, ROOT, name).unwrap();
            client.unlink(ROOT, "other").unwrap();
        }
    }
}

#[test]
fn times_and_owners_of_a_symlink_change_and_its_mode_does_not() {
    let (backend, session) = start(&[]);
    let client = session.client();
    std::fs::write(backend.path("target"), "x").unwrap();
    for target in ["target", "nowhere", "/etc/passwd"] {
        let node = client.symlink(ROOT, "link", target).unwrap().nodeid;
        let before = std::fs::metadata(backend.path("target")).unwrap();
        // Before 1970, too.
        let early = (-86_400_i64).cast_unsigned();
        let attr = client.setattr(node, Change::none().times((early, 5), (7, 9)).uid(1001)).unwrap();
        assert_eq!((attr.atime, attr.atimensec, attr.mtime, attr.uid), (early, 5, 7, 1001), "{target}");
        let found = backend.path("link").symlink_metadata().unwrap();
        assert_eq!((found.atime(), found.mtime(), found.uid()), (-86_400, 7, 1001));
        assert_eq!(common::errno(client.setattr(node, Change::none().mode(0o600))), libc::EOPNOTSUPP);
        let after = std::fs::metadata(backend.path("target")).unwrap();
        assert_eq!((before.mtime(), before.mode(), before.uid()), (after.mtime(), after.mode(), after.uid()));
        client.unlink(ROOT, "link").unwrap();
    }
}

#[test]
fn a_symlink_gets_a_second_name() {
    for args in [&[][..], &["--inode-file-handles=never"], &["--sandbox=chroot"], &["--sandbox=none"]] {
        let (backend, session) = start(args);
        let client = session.client();
        let dir = client.mkdir(ROOT, "dir", 0o755, 0).unwrap().nodeid;
        for target in ["dir", "nowhere", "/etc/passwd"] {
            let node = client.symlink(ROOT, "link", target).unwrap().nodeid;
            let second = client.link(node, dir, "second").unwrap();
            assert_eq!((second.nodeid, second.attr.nlink), (node, 2), "{target}");
            assert_eq!(second.attr.mode & libc::S_IFMT, libc::S_IFLNK);
            assert_eq!(client.readlink(node).unwrap(), target.as_bytes());
            assert_eq!(std::fs::read_link(backend.path("dir/second")).unwrap().to_str(), Some(target));
            client.unlink(ROOT, "link").unwrap();
            assert_eq!(client.getattr(node).unwrap().nlink, 1);
            client.unlink(dir, "second").unwrap();
        }
    }
}
