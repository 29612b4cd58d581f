//! RENAME and RENAME2.

use std::fs;

use lanefsd_frontend::client::ROOT;

use crate::trial::{Trial, at_each_moment, errno};

const NOREPLACE: u32 = libc::RENAME_NOREPLACE;
const EXCHANGE: u32 = libc::RENAME_EXCHANGE;

/// Files `one` and `two` in the share, which hold their names.
fn with_files(scenario: impl Fn(&Trial, u64, u64)) {
    at_each_moment(&[], |trial| {
        for name in ["one", "two"] {
            fs::write(trial.path(name), name).unwrap();
        }
        scenario(trial, trial.look("one"), trial.look("two"));
    });
}

/// What the file of this name holds; `None` if there is none.
fn content(trial: &Trial, name: &str) -> Option<String> {
    fs::read_to_string(trial.path(name)).ok()
}

#[test]
fn rename() {
    with_files(|trial, one, _| {
        trial.die("RENAME");
        trial.client().rename(ROOT, "one", ROOT, "new").unwrap();
        assert_eq!((content(trial, "one"), content(trial, "new").as_deref()), (None, Some("one")));
        assert_eq!(trial.look("new"), one);
    });
}

#[test]
fn rename_into_another_directory() {
    with_files(|trial, _, _| {
        let directory = trial.saw(trial.client().mkdir(ROOT, "directory", 0o755, 0).unwrap());
        trial.die("RENAME");
        trial.client().rename(ROOT, "one", directory, "new").unwrap();
        assert_eq!((content(trial, "one"), content(trial, "directory/new").as_deref()), (None, Some("one")));
    });
}

#[test]
fn rename_over_another_file() {
    with_files(|trial, one, two| {
        trial.die("RENAME");
        trial.client().rename(ROOT, "one", ROOT, "two").unwrap();
        assert_eq!((content(trial, "one"), content(trial, "two").as_deref()), (None, Some("one")));
        assert_eq!(trial.look("two"), one);
        assert_eq!(trial.client().getattr(two).unwrap().nlink, 0);
    });
}

#[test]
fn rename_of_a_directory() {
    at_each_moment(&[], |trial| {
        fs::create_dir(trial.path("directory")).unwrap();
        fs::write(trial.path("directory/file"), "content").unwrap();
        let node = trial.look("directory");
        trial.die("RENAME");
        trial.client().rename(ROOT, "directory", ROOT, "new").unwrap();
        assert_eq!(trial.look("new"), node);
        assert_ne!(trial.saw(trial.client().lookup(node, "file").unwrap()), node);
        assert!(trial.path("new/file").exists() && !trial.path("directory").exists());
    });
}

#[test]
fn rename_to_a_new_name_only() {
    with_files(|trial, _, _| {
        trial.die("RENAME");
        trial.client().rename2(ROOT, "one", ROOT, "new", NOREPLACE).unwrap();
        assert_eq!((content(trial, "one"), content(trial, "new").as_deref()), (None, Some("one")));
    });
}

#[test]
fn rename_to_a_new_name_that_is_there() {
    with_files(|trial, _, _| {
        trial.die("RENAME");
        assert_eq!(errno(trial.client().rename2(ROOT, "one", ROOT, "two", NOREPLACE)), libc::EEXIST);
        assert_eq!(content(trial, "two").as_deref(), Some("two"));
    });
}

#[test]
fn rename_of_no_name() {
    with_files(|trial, _, _| {
        trial.die("RENAME");
        assert_eq!(errno(trial.client().rename(ROOT, "none", ROOT, "two")), libc::ENOENT);
        assert_eq!(content(trial, "two").as_deref(), Some("two"));
    });
}

/// One inode with two names: rename(2) does nothing, and both names stay.
#[test]
fn rename_to_its_own_other_name() {
    with_files(|trial, one, _| {
        fs::hard_link(trial.path("one"), trial.path("other")).unwrap();
        trial.die("RENAME");
        trial.client().rename(ROOT, "one", ROOT, "other").unwrap();
        assert_eq!(trial.client().getattr(one).unwrap().nlink, 2);
    });
}

/// Done twice, it would be as before.
#[test]
fn exchange() {
    with_files(|trial, one, two| {
        trial.die("RENAME");
        trial.client().rename2(ROOT, "one", ROOT, "two", EXCHANGE).unwrap();
        assert_eq!(content(trial, "one").as_deref(), Some("two"));
        assert_eq!(content(trial, "two").as_deref(), Some("one"));
        assert_eq!((trial.look("one"), trial.look("two")), (two, one));
    });
}

#[test]
fn exchange_with_no_name() {
    with_files(|trial, _, _| {
        trial.die("RENAME");
        assert_eq!(errno(trial.client().rename2(ROOT, "one", ROOT, "none", EXCHANGE)), libc::ENOENT);
        assert_eq!(content(trial, "one").as_deref(), Some("one"));
    });
}
