//! Requests that find or make names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use lanefsd_frontend::client::ROOT;

use crate::trial::{Trial, at_each_moment, errno};

/// What the host made a moment ago is no request's work. (Times of the host are as fine as a tick of its clock.)
pub fn age() {
    std::thread::sleep(Duration::from_millis(25));
}

#[test]
fn lookup() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        let before = trial.look("file");
        trial.die("LOOKUP");
        let entry = trial.client().lookup(ROOT, "file").unwrap();
        assert_eq!((trial.saw(entry), entry.attr.size), (before, 7));
        assert_eq!(trial.look("file"), before);
    });
}

#[test]
fn lookup_of_a_file_that_nobody_knows() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        trial.die("LOOKUP");
        let entry = trial.client().lookup(ROOT, "file").unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.ino, fs::metadata(trial.path("file")).unwrap().ino());
        assert_eq!(trial.look("file"), node);
    });
}

#[test]
fn lookup_of_no_name() {
    at_each_moment(&[], |trial| {
        trial.die("LOOKUP");
        assert_eq!(errno(trial.client().lookup(ROOT, "file")), libc::ENOENT);
    });
}

#[test]
fn mkdir() {
    at_each_moment(&[], |trial| {
        trial.die("MKDIR");
        let entry = trial.client().mkdir(ROOT, "directory", 0o750, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.mode, libc::S_IFDIR | 0o750);
        assert_eq!(trial.look("directory"), node);
        assert_eq!(fs::metadata(trial.path("directory")).unwrap().permissions().mode() & 0o7777, 0o750);
        assert_eq!(errno(trial.client().mkdir(ROOT, "directory", 0o750, 0)), libc::EEXIST);
    });
}

#[test]
fn mkdir_by_a_user() {
    at_each_moment(&[], |trial| {
        fs::set_permissions(trial.share(), fs::Permissions::from_mode(0o777)).unwrap();
        trial.die("MKDIR");
        let entry = trial.client().user(1000, 1001).mkdir(ROOT, "directory", 0o700, 0).unwrap();
        trial.saw(entry);
        assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1001));
    });
}

/// Makes something, then makes it again where it is already: EEXIST, and what is there stays.
fn refused(operation: &str, make: impl Fn(&Trial), again: impl Fn(&Trial) -> i32) {
    at_each_moment(&[], |trial| {
        make(trial);
        age();
        trial.die(operation);
        assert_eq!(again(trial), libc::EEXIST);
    });
}

#[test]
fn mkdir_of_a_directory_of_the_host() {
    refused(
        "MKDIR",
        |trial| fs::create_dir(trial.path("x")).unwrap(),
        |trial| errno(trial.client().mkdir(ROOT, "x", 0o755, 0)),
    );
}

#[test]
fn mkdir_of_a_directory_of_the_guest() {
    refused(
        "MKDIR",
        |trial| {
            trial.saw(trial.client().mkdir(ROOT, "x", 0o755, 0).unwrap());
        },
        |trial| errno(trial.client().mkdir(ROOT, "x", 0o755, 0)),
    );
}

#[test]
fn mknod() {
    at_each_moment(&[], |trial| {
        trial.die("MKNOD");
        let entry = trial.client().mknod(ROOT, "fifo", libc::S_IFIFO | 0o640, 0, 0).unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.mode, libc::S_IFIFO | 0o640);
        assert_eq!(trial.look("fifo"), node);
        assert!(fs::symlink_metadata(trial.path("fifo")).unwrap().file_type().is_fifo());
    });
}

#[test]
fn mknod_of_a_file() {
    at_each_moment(&[], |trial| {
        trial.die("MKNOD");
        let entry = trial.client().mknod(ROOT, "file", libc::S_IFREG | 0o600, 0, 0).unwrap();
        trial.saw(entry);
        assert_eq!((entry.attr.mode, entry.attr.nlink), (libc::S_IFREG | 0o600, 1));
    });
}

#[test]
fn mknod_where_a_file_is() {
    refused(
        "MKNOD",
        |trial| fs::write(trial.path("x"), "").unwrap(),
        |trial| errno(trial.client().mknod(ROOT, "x", libc::S_IFREG | 0o644, 0, 0)),
    );
}

#[test]
fn symlink() {
    at_each_moment(&[], |trial| {
        trial.die("SYMLINK");
        let entry = trial.client().symlink(ROOT, "link", "somewhere/else").unwrap();
        let node = trial.saw(entry);
        assert_eq!(entry.attr.mode, libc::S_IFLNK | 0o777);
        assert_eq!(trial.client().readlink(node).unwrap(), b"somewhere/else");
        assert_eq!(fs::read_link(trial.path("link")).unwrap().to_str(), Some("somewhere/else"));
    });
}

#[test]
fn symlink_where_the_same_one_is() {
    refused(
        "SYMLINK",
        |trial| std::os::unix::fs::symlink("target", trial.path("x")).unwrap(),
        |trial| errno(trial.client().symlink(ROOT, "x", "target")),
    );
}

#[test]
fn readlink() {
    at_each_moment(&[], |trial| {
        std::os::unix::fs::symlink("target", trial.path("link")).unwrap();
        let node = trial.look("link");
        trial.die("READLINK");
        assert_eq!(trial.client().readlink(node).unwrap(), b"target");
    });
}

#[test]
fn link() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("LINK");
        let entry = trial.client().link(node, ROOT, "other").unwrap();
        assert_eq!((trial.saw(entry), entry.attr.nlink), (node, 2));
        assert_eq!(trial.look("other"), node);
        assert_eq!(fs::read(trial.path("other")).unwrap(), b"content");
        trial.client().release(node, fh).unwrap();
    });
}

#[test]
fn link_over_another_file() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("x"), "other").unwrap();
        fs::write(trial.path("file"), "").unwrap();
        let node = trial.look("file");
        age();
        trial.die("LINK");
        assert_eq!(errno(trial.client().link(node, ROOT, "x")), libc::EEXIST);
        assert_eq!(fs::read(trial.path("x")).unwrap(), b"other");
    });
}

/// The name is there before the request, and is the same inode: that it is there proves nothing.
#[test]
fn link_over_its_own_other_name() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        fs::hard_link(trial.path("file"), trial.path("x")).unwrap();
        let node = trial.look("file");
        age();
        trial.die("LINK");
        assert_eq!(errno(trial.client().link(node, ROOT, "x")), libc::EEXIST);
        assert_eq!(trial.client().getattr(node).unwrap().nlink, 2);
    });
}
