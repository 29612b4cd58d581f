//! Requests on extended attributes.

use std::fs;

use lanefsd_frontend::client::ROOT;

use crate::trial::{Trial, at_each_moment, errno};

/// A file in the share, looked up.
fn with_file(scenario: impl Fn(&Trial, u64)) {
    at_each_moment(&[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        scenario(trial, trial.look("file"));
    });
}

fn value(trial: &Trial, node: u64) -> Vec<u8> {
    trial.client().getxattr(node, "user.name", 100).unwrap()
}

#[test]
fn setxattr() {
    with_file(|trial, node| {
        trial.die("SETXATTR");
        trial.client().setxattr(node, "user.name", b"value", 0).unwrap();
        assert_eq!(value(trial, node), b"value");
    });
}

#[test]
fn setxattr_of_a_new_one() {
    with_file(|trial, node| {
        trial.die("SETXATTR");
        trial.client().setxattr(node, "user.name", b"value", libc::XATTR_CREATE).unwrap();
        assert_eq!(value(trial, node), b"value");
    });
}

/// That the value is there proves nothing: it was there before.
#[test]
fn setxattr_of_a_new_one_that_is_there() {
    with_file(|trial, node| {
        trial.client().setxattr(node, "user.name", b"value", 0).unwrap();
        trial.die("SETXATTR");
        let result = trial.client().setxattr(node, "user.name", b"value", libc::XATTR_CREATE);
        assert_eq!(errno(result), libc::EEXIST);
    });
}

#[test]
fn setxattr_of_an_old_one() {
    with_file(|trial, node| {
        trial.client().setxattr(node, "user.name", b"old", 0).unwrap();
        trial.die("SETXATTR");
        trial.client().setxattr(node, "user.name", b"value", libc::XATTR_REPLACE).unwrap();
        assert_eq!(value(trial, node), b"value");
    });
}

#[test]
fn setxattr_of_an_old_one_that_is_not_there() {
    with_file(|trial, node| {
        trial.die("SETXATTR");
        let result = trial.client().setxattr(node, "user.name", b"value", libc::XATTR_REPLACE);
        assert_eq!(errno(result), libc::ENODATA);
        assert_eq!(errno(trial.client().getxattr(node, "user.name", 100)), libc::ENODATA);
    });
}

#[test]
fn removexattr() {
    with_file(|trial, node| {
        trial.client().setxattr(node, "user.name", b"value", 0).unwrap();
        trial.die("REMOVEXATTR");
        trial.client().removexattr(node, "user.name").unwrap();
        assert_eq!(errno(trial.client().getxattr(node, "user.name", 100)), libc::ENODATA);
    });
}

#[test]
fn removexattr_of_none() {
    with_file(|trial, node| {
        trial.die("REMOVEXATTR");
        assert_eq!(errno(trial.client().removexattr(node, "user.name")), libc::ENODATA);
    });
}

#[test]
fn getxattr() {
    with_file(|trial, node| {
        trial.client().setxattr(node, "user.name", b"value", 0).unwrap();
        trial.die("GETXATTR");
        assert_eq!(value(trial, node), b"value");
        assert_eq!(trial.client().getxattr_size(node, "user.name").unwrap(), 5);
    });
}

#[test]
fn listxattr() {
    with_file(|trial, node| {
        trial.client().setxattr(node, "user.name", b"value", 0).unwrap();
        trial.die("LISTXATTR");
        assert_eq!(trial.client().listxattr(node, 100).unwrap(), b"user.name\0");
    });
}

#[test]
fn listxattr_of_the_root() {
    at_each_moment(&[], |trial| {
        trial.die("LISTXATTR");
        assert_eq!(trial.client().listxattr(ROOT, 100).unwrap(), b"");
    });
}
