//! Requests that open files: one handle comes of each, and no second one stays open.

use std::fs;

use fuse_protocol::flags::{ReleaseFlags, WriteFlags};
use lanefsd_frontend::client::{Lock, ROOT};

use crate::names::age;
use crate::trial::{Trial, at_each_moment, errno};

const NEW: i32 = libc::O_RDWR | libc::O_CREAT;

/// A file that the request has created: it can be written and read, and is on the host.
fn use_file(trial: &Trial, node: u64, fh: u64, name: &str) {
    let client = trial.client();
    assert_eq!(client.write(node, fh, 0, b"content").unwrap(), 7);
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
    assert_eq!(fs::read(trial.path(name)).unwrap(), b"content");
    client.release(node, fh).unwrap();
}

#[test]
fn create() {
    at_each_moment(&[], |trial| {
        trial.die("CREATE");
        let (entry, open) = trial.client().create(ROOT, "file", NEW, 0o640, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!((entry.attr.mode, entry.attr.size), (libc::S_IFREG | 0o640, 0));
        use_file(trial, node, open.fh, "file");
        assert_eq!(trial.look("file"), node);
    });
}

#[test]
fn create_exclusively() {
    at_each_moment(&[], |trial| {
        trial.die("CREATE");
        let (entry, open) = trial.client().create(ROOT, "file", NEW | libc::O_EXCL, 0o640, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!((entry.attr.mode, entry.attr.size), (libc::S_IFREG | 0o640, 0));
        use_file(trial, node, open.fh, "file");
    });
}

#[test]
fn create_without_write_permission() {
    at_each_moment(&[], |trial| {
        trial.die("CREATE");
        let (entry, open) = trial.client().create(ROOT, "file", NEW | libc::O_EXCL, 0o444, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.mode, libc::S_IFREG | 0o444);
        use_file(trial, node, open.fh, "file");
    });
}

#[test]
fn create_by_a_user_without_write_permission() {
    use std::os::unix::fs::PermissionsExt;
    at_each_moment(&[], |trial| {
        fs::set_permissions(trial.share(), fs::Permissions::from_mode(0o777)).unwrap();
        let client = trial.client().user(1000, 1000);
        trial.die("CREATE");
        let (entry, open) = client.create(ROOT, "file", NEW | libc::O_EXCL, 0o444, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!((entry.attr.uid, entry.attr.mode), (1000, libc::S_IFREG | 0o444));
        use_file(trial, node, open.fh, "file");
    });
}

#[test]
fn create_exclusively_where_a_file_is() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        age();
        trial.die("CREATE");
        assert_eq!(errno(trial.client().create(ROOT, "file", NEW | libc::O_EXCL, 0o644, 0)), libc::EEXIST);
    });
}

#[test]
fn create_where_a_file_is() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        age();
        trial.die("CREATE");
        let (entry, open) = trial.client().create(ROOT, "file", NEW, 0o600, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.size, 7);
        assert_eq!(trial.client().read(node, open.fh, 0, 100).unwrap(), b"content");
        trial.client().release(node, open.fh).unwrap();
    });
}

#[test]
fn create_and_truncate() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        trial.die("CREATE");
        let (entry, open) = trial.client().create(ROOT, "file", NEW | libc::O_TRUNC, 0o600, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!(trial.client().getattr(node).unwrap().size, 0);
        use_file(trial, node, open.fh, "file");
    });
}

#[test]
fn tmpfile() {
    at_each_moment(&["--tmpfile"], |trial| {
        trial.die("TMPFILE");
        let (entry, open) = trial.client().tmpfile(ROOT, libc::O_RDWR, 0o600).unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.nlink, 0);
        let client = trial.client();
        client.write(node, open.fh, 0, b"content").unwrap();
        assert_eq!(client.read(node, open.fh, 0, 100).unwrap(), b"content");
        assert_eq!(trial.saw(client.link(node, ROOT, "file").unwrap()), node);
        use_file(trial, node, open.fh, "file");
    });
}

#[test]
fn open() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        let node = trial.look("file");
        trial.die("OPEN");
        let fh = trial.client().open(node, libc::O_RDWR).unwrap().fh;
        use_file(trial, node, fh, "file");
    });
}

#[test]
fn open_and_truncate() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content, and more of it").unwrap();
        let node = trial.look("file");
        trial.die("OPEN");
        let fh = trial.client().open(node, libc::O_RDWR | libc::O_TRUNC).unwrap().fh;
        assert_eq!(trial.client().getattr(node).unwrap().size, 0);
        use_file(trial, node, fh, "file");
    });
}

#[test]
fn open_of_what_the_caller_may_not() {
    at_each_moment(&[], |trial| {
        fs::create_dir(trial.path("directory")).unwrap();
        let node = trial.look("directory");
        trial.die("OPEN");
        assert_eq!(errno(trial.client().open(node, libc::O_RDWR)), libc::EISDIR);
    });
}

/// The handles that are open at a death keep what they were opened for.
#[test]
fn open_handles_stay_as_they_were() {
    at_each_moment(&["--allow-direct-io"], |trial| {
        let (node, fh) = trial.file("file", &[7; 8192]);
        let client = trial.client();
        let reads = client.open(node, libc::O_RDONLY).unwrap();
        let appends = client.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
        let directs = client.open(node, libc::O_RDWR | libc::O_DIRECT).unwrap();
        trial.die("GETATTR");
        assert_eq!(client.getattr(node).unwrap().size, 8192);
        assert_eq!(client.read(node, reads.fh, 8190, 10).unwrap(), [7; 2]);
        assert_eq!(errno(client.write(node, reads.fh, 0, b"x")), libc::EBADF);
        let append = libc::O_WRONLY | libc::O_APPEND;
        client.write_with(node, appends.fh, 8192, b"end", WriteFlags::empty(), append).unwrap();
        assert_eq!(fs::metadata(trial.path("file")).unwrap().len(), 8195);
        assert_eq!(client.read(node, directs.fh, 0, 4096).unwrap(), [7; 4096]);
        let again = client.open(node, libc::O_RDWR | libc::O_DIRECT).unwrap();
        assert_eq!(again.open_flags, directs.open_flags);
        assert!([fh, reads.fh, appends.fh, directs.fh].iter().all(|old| *old != again.fh));
        for open in [fh, reads.fh, appends.fh, directs.fh, again.fh] {
            client.release(node, open).unwrap();
            assert_eq!(errno(client.read(node, open, 0, 1)), libc::EBADF);
        }
    });
}

#[test]
fn an_unlinked_open_file_keeps_its_data() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let client = trial.client();
        client.unlink(ROOT, "file").unwrap();
        trial.die("READ");
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
        client.write(node, fh, 7, b", more").unwrap();
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content, more");
        let attr = client.getattr(node).unwrap();
        assert_eq!((attr.nlink, attr.size), (0, 13));
        client.release(node, fh).unwrap();
    });
}

#[test]
fn release() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("RELEASE");
        trial.client().release(node, fh).unwrap();
        assert_eq!(errno(trial.client().read(node, fh, 0, 1)), libc::EBADF);
    });
}

/// The numbers of handles are the guest's to keep: one that was released is not the next one's.
#[test]
fn release_beside_another_handle() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let client = trial.client();
        let other = client.open(node, libc::O_RDWR).unwrap().fh;
        trial.die("RELEASE");
        client.release(node, other).unwrap();
        let third = client.open(node, libc::O_RDWR).unwrap().fh;
        assert!(third != other && third != fh);
        assert_eq!(client.read(node, third, 0, 100).unwrap(), b"content");
        use_file(trial, node, fh, "file");
        client.release(node, third).unwrap();
    });
}

#[test]
fn release_with_a_lock() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"");
        let client = trial.client();
        let other = client.open(node, libc::O_RDWR).unwrap().fh;
        client.setlk(node, fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
        trial.die("RELEASE");
        client.release_with(node, fh, ReleaseFlags::FLOCK_UNLOCK, 1).unwrap();
        client.setlk(node, other, Lock::flock(2, libc::F_WRLCK)).unwrap();
        client.release(node, other).unwrap();
    });
}

#[test]
fn flush() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"");
        let client = trial.client();
        let other = client.open(node, libc::O_RDWR).unwrap().fh;
        client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, 9)).unwrap();
        trial.die("FLUSH");
        client.flush(node, fh, 1).unwrap();
        client.setlk(node, other, Lock::posix(2, libc::F_WRLCK, 0, 9)).unwrap();
        client.release(node, other).unwrap();
        client.release(node, fh).unwrap();
    });
}

/// A worker that dies takes an error of the disk along. A second open file of the inode keeps it, so that the next
/// worker can tell that there was none.
#[test]
fn fsync() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("FSYNC");
        trial.client().fsync(node, fh, false).unwrap();
        trial.client().release(node, fh).unwrap();
    });
}
