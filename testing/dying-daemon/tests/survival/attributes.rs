//! Requests on the attributes of inodes and of the file system.

use std::fs;

use lanefsd_frontend::client::{Change, ROOT};

use crate::trial::{Trial, at_each_moment, errno};

/// Changes attributes of a file of seven bytes; the check gets what the reply says, and the host.
fn change(change: Change, check: impl Fn(&fuse_protocol::abi::Attr)) {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("SETATTR");
        check(&trial.client().setattr(node, change).unwrap());
        check(&trial.client().getattr(node).unwrap());
        trial.client().release(node, fh).unwrap();
    });
}

#[test]
fn setattr_of_the_mode() {
    change(Change::none().mode(0o4711), |attr| assert_eq!(attr.mode, libc::S_IFREG | 0o4711));
}

#[test]
fn setattr_of_the_owner() {
    change(Change::none().uid(1000).gid(1001), |attr| assert_eq!((attr.uid, attr.gid), (1000, 1001)));
}

#[test]
fn setattr_of_a_smaller_size() {
    change(Change::none().size(3), |attr| assert_eq!(attr.size, 3));
}

#[test]
fn setattr_of_a_larger_size() {
    change(Change::none().size(30_000), |attr| assert_eq!(attr.size, 30_000));
}

#[test]
fn setattr_of_times() {
    change(Change::none().times((1000, 5), (2000, 6)), |attr| {
        assert_eq!((attr.atime, attr.atimensec, attr.mtime, attr.mtimensec), (1000, 5, 2000, 6));
    });
}

#[test]
fn setattr_of_all_at_once() {
    let all = Change::none().mode(0o600).uid(5).gid(6).size(4).times((1000, 5), (2000, 6));
    change(all, |attr| {
        assert_eq!((attr.mode, attr.uid, attr.gid, attr.size), (libc::S_IFREG | 0o600, 5, 6, 4));
        assert_eq!((attr.atime, attr.mtime), (1000, 2000));
    });
}

#[test]
fn setattr_to_now() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let client = trial.client();
        client.setattr(node, Change::none().times((1000, 5), (2000, 6))).unwrap();
        trial.die("SETATTR");
        let attr = client.setattr(node, Change::none().times_now()).unwrap();
        assert!(attr.mtime > 1_700_000_000 && attr.atime > 1_700_000_000);
        client.release(node, fh).unwrap();
    });
}

#[test]
fn setattr_through_a_handle() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let client = trial.client();
        client.unlink(ROOT, "file").unwrap();
        trial.die("SETATTR");
        assert_eq!(client.setattr(node, Change::none().size(3).handle(fh)).unwrap().size, 3);
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"con");
        client.release(node, fh).unwrap();
    });
}

#[test]
fn setattr_that_clears_set_id_bits() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let client = trial.client();
        client.setattr(node, Change::none().mode(0o6755)).unwrap();
        trial.die("SETATTR");
        let attr = client.setattr(node, Change::none().size(3).kill_suidgid()).unwrap();
        assert_eq!((attr.mode, attr.size), (libc::S_IFREG | 0o755, 3));
        client.release(node, fh).unwrap();
    });
}

#[test]
fn getattr() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("GETATTR");
        assert_eq!(trial.client().getattr(node).unwrap().size, 7);
        assert_eq!(trial.client().getattr_reply(node, Some(fh)).unwrap().attr.size, 7);
        trial.client().release(node, fh).unwrap();
    });
}

#[test]
fn statx() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("STATX");
        assert_eq!(trial.client().statx(node, libc::STATX_ALL).unwrap().size, 7);
        trial.client().release(node, fh).unwrap();
    });
}

#[test]
fn statfs() {
    at_each_moment(&[], |trial| {
        trial.die("STATFS");
        assert!(trial.client().statfs(ROOT).unwrap().blocks > 0);
    });
}

#[test]
fn access() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        let node = trial.look("file");
        trial.die("ACCESS");
        let client = trial.client().user(1000, 1000);
        assert_eq!(errno(client.access(node, libc::W_OK)), libc::EACCES);
        client.access(node, libc::R_OK).unwrap();
    });
}

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of `linux/fs.h`.
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;
/// `FS_NOATIME_FL`.
const NOATIME: u32 = 0x80;

fn flags(trial: &Trial, node: u64, fh: u64) -> Option<u32> {
    let bytes = trial.client().ioctl(node, fh, GET_FLAGS, &[], 4).ok()?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[test]
fn ioctl() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        if let Some(before) = flags(trial, node, fh) {
            trial.die("IOCTL");
            let new = (before | NOATIME).to_ne_bytes();
            trial.client().ioctl(node, fh, SET_FLAGS, &new, 0).unwrap();
            assert_eq!(flags(trial, node, fh), Some(before | NOATIME));
        } else {
            trial.die("GETATTR");
            trial.client().getattr(node).unwrap();
        }
        trial.client().release(node, fh).unwrap();
    });
}
