//! Requests that remove names.

use std::fs;

use lanefsd_frontend::client::ROOT;

use crate::trial::{at_each_moment, errno};

#[test]
fn unlink() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        trial.die("UNLINK");
        trial.client().unlink(ROOT, "file").unwrap();
        assert!(!trial.path("file").exists());
        assert_eq!(errno(trial.client().unlink(ROOT, "file")), libc::ENOENT);
    });
}

#[test]
fn unlink_of_a_known_file() {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "content").unwrap();
        let node = trial.look("file");
        let fh = trial.client().open(node, libc::O_RDONLY).unwrap().fh;
        trial.die("UNLINK");
        trial.client().unlink(ROOT, "file").unwrap();
        assert_eq!(trial.client().read(node, fh, 0, 100).unwrap(), b"content");
        assert_eq!(trial.client().getattr(node).unwrap().nlink, 0);
        trial.client().release(node, fh).unwrap();
    });
}

/// That the name is not there proves nothing: it was not there before.
#[test]
fn unlink_of_no_name() {
    at_each_moment(&[], |trial| {
        trial.die("UNLINK");
        assert_eq!(errno(trial.client().unlink(ROOT, "file")), libc::ENOENT);
    });
}

#[test]
fn unlink_of_a_directory() {
    at_each_moment(&[], |trial| {
        fs::create_dir(trial.path("directory")).unwrap();
        trial.die("UNLINK");
        assert_eq!(errno(trial.client().unlink(ROOT, "directory")), libc::EISDIR);
        assert!(trial.path("directory").exists());
    });
}

#[test]
fn rmdir() {
    at_each_moment(&[], |trial| {
        fs::create_dir(trial.path("directory")).unwrap();
        trial.die("RMDIR");
        trial.client().rmdir(ROOT, "directory").unwrap();
        assert!(!trial.path("directory").exists());
        assert_eq!(errno(trial.client().rmdir(ROOT, "directory")), libc::ENOENT);
    });
}

#[test]
fn rmdir_of_no_name() {
    at_each_moment(&[], |trial| {
        trial.die("RMDIR");
        assert_eq!(errno(trial.client().rmdir(ROOT, "directory")), libc::ENOENT);
    });
}

#[test]
fn rmdir_of_a_directory_in_use() {
    at_each_moment(&[], |trial| {
        fs::create_dir(trial.path("directory")).unwrap();
        fs::write(trial.path("directory/file"), "").unwrap();
        trial.die("RMDIR");
        assert_eq!(errno(trial.client().rmdir(ROOT, "directory")), libc::ENOTEMPTY);
    });
}
