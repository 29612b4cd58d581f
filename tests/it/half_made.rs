//! What is refused after it was made is taken away again: the host may run out of descriptors at any moment.

use std::fs;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;

const WAYS: [&str; 9] =
    ["MKDIR", "SYMLINK", "FIFO", "SOCKET", "MKNOD", "CREATE", "CREATE O_EXCL", "LINK", "TMPFILE"];

/// Daemons with and without the sandbox, with inodes that can do without descriptors and that cannot.
const SETTINGS: [(&str, &str); 4] = [
    ("--sandbox=none", "--inode-file-handles=never"),
    ("--sandbox=none", "--inode-file-handles=prefer"),
    ("--sandbox=namespace", "--inode-file-handles=never"),
    ("--sandbox=namespace", "--inode-file-handles=prefer"),
];

fn serve((sandbox, handles): (&str, &str)) -> (tempfile::TempDir, Backend, Session) {
    let share = common::disk_directory();
    fs::write(share.path().join("old"), "").unwrap();
    let starter = Backend::of(common::program()).args([sandbox, handles, "--tmpfile"]);
    common::serve_on(share, starter, SessionOptions::default())
}

/// Leaves the daemon `free` descriptors, until the limit that is returned is set again.
fn leave_few(backend: &Backend, free: usize) -> Rlimit {
    let used = fs::read_dir(backend.proc("fd")).unwrap();
    let used: Vec<u64> =
        used.map(|entry| entry.unwrap().file_name().to_string_lossy().parse().unwrap()).collect();
    let mut limit = 0;
    let mut left = 0;
    while left < free || used.contains(&limit) {
        left += usize::from(!used.contains(&limit));
        limit += 1;
    }
    let limits = fs::read_to_string(backend.proc("limits")).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let hard = files.split_whitespace().nth(4).unwrap().parse().ok();
    limit_descriptors(backend, Rlimit { current: Some(limit), maximum: hard })
}

/// Returns what was set before.
fn limit_descriptors(backend: &Backend, limit: Rlimit) -> Rlimit {
    let pid = backend.proc("fd").iter().nth(2).unwrap().to_string_lossy().parse().unwrap();
    prlimit(Pid::from_raw(pid), Resource::Nofile, limit).unwrap()
}

fn make(client: &Client<'_>, old: u64, way: &str, name: &str) -> Result<(), i32> {
    let done = match way {
        "MKDIR" => client.mkdir(ROOT, name, 0o700, 0).map(drop),
        "SYMLINK" => client.symlink(ROOT, name, "target").map(drop),
        "FIFO" => client.mknod(ROOT, name, libc::S_IFIFO | 0o600, 0, 0).map(drop),
        "SOCKET" => client.mknod(ROOT, name, libc::S_IFSOCK | 0o600, 0, 0).map(drop),
        "MKNOD" => client.mknod(ROOT, name, libc::S_IFREG | 0o600, 0, 0).map(drop),
        "LINK" => client.link(old, ROOT, name).map(drop),
        "TMPFILE" => client.tmpfile(ROOT, libc::O_RDWR, 0o600).map(drop),
        "CREATE" => client.create(ROOT, name, libc::O_RDWR, 0o600, 0).map(drop),
        _ => client.create(ROOT, name, libc::O_RDWR | libc::O_EXCL, 0o600, 0).map(drop),
    };
    done.map_err(|error| error.errno().unwrap().0)
}

#[test]
fn what_was_refused_for_want_of_a_descriptor_is_not_there() {
    for settings in SETTINGS {
        let (share, backend, session) = serve(settings);
        let client = session.client();
        let old = client.lookup(ROOT, "old").unwrap().nodeid;
        for way in WAYS {
            let mut refused = 0;
            for free in 0..4 {
                let before = leave_few(&backend, free);
                let made = make(&client, old, way, "new");
                limit_descriptors(&backend, before);
                let is_there = fs::symlink_metadata(share.path().join("new")).is_ok();
                let context = format!("{way} with {free} descriptors, {settings:?}: {made:?}");
                match made {
                    Ok(()) => assert!(is_there || way == "TMPFILE", "{context}"),
                    Err(errno) => {
                        refused += 1;
                        assert_eq!(errno, libc::EMFILE, "{context}");
                        assert!(!is_there, "{context}: it was made");
                    }
                }
                match (is_there, way) {
                    (true, "MKDIR") => client.rmdir(ROOT, "new").unwrap(),
                    (true, _) => client.unlink(ROOT, "new").unwrap(),
                    (false, _) => {}
                }
            }
            // A link needs none, and otherwise there have to be some.
            assert!(refused < 4, "{way}, {settings:?}");
            assert!(refused > 0 || way == "LINK" || settings.1.contains("prefer"), "{way}, {settings:?}");
            make(&client, old, way, "again").unwrap();
            let again = client.lookup(ROOT, "again").map(|entry| entry.nodeid);
            assert!(again.is_ok() || way == "TMPFILE");
            match way {
                "MKDIR" => client.rmdir(ROOT, "again").unwrap(),
                "TMPFILE" => {}
                _ => client.unlink(ROOT, "again").unwrap(),
            }
        }
    }
}

#[test]
fn a_link_is_the_inode_that_was_linked() {
    for settings in SETTINGS {
        let (share, _backend, session) = serve(settings);
        let client = session.client();
        let old = client.lookup(ROOT, "old").unwrap();
        let link = client.link(old.nodeid, ROOT, "link").unwrap();
        assert_eq!((link.nodeid, link.attr.ino, link.attr.nlink), (old.nodeid, old.attr.ino, 2));
        // A refused one is not counted as a lookup.
        assert_eq!(common::errno(client.link(old.nodeid, ROOT, "link")), libc::EEXIST);
        client.forget(old.nodeid, 2).unwrap();
        assert_eq!(common::errno(client.getattr(old.nodeid)), libc::ESTALE);
        assert_eq!(fs::read(share.path().join("link")).unwrap(), b"");
    }
}
