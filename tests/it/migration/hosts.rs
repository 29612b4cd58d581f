//! Shares on hosts that are unusual: other file systems below the share, and one without durable file handles.

use std::fs;

use lanefsd_frontend::client::ROOT;
use rustix::mount::{MountFlags, mount};

use super::sessions::{move_on, start};
use crate::common;
use crate::common::fuse_host::{FuseHost, HostFile};
use crate::survival::kill_worker;

const WAYS: [&[&str]; 5] = [
    &[],
    &["--migration-on-error=guest-error"],
    &["--migration-mode=auto"],
    &["--migration-mode=auto", "--migration-on-error=guest-error"],
    &["--inode-file-handles=never", "--migration-verify-handles"],
];

#[test]
fn inodes_on_mounts_below_the_share_move() {
    common::own_mounts();
    let share = common::disk_directory();
    let below = share.path().join("a/b");
    fs::create_dir_all(&below).unwrap();
    mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir(below.join("directory")).unwrap();
    fs::write(below.join("directory/file"), "on tmpfs").unwrap();
    let inner = below.join("directory/inner");
    fs::create_dir(&inner).unwrap();
    mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(inner.join("file"), "deeper").unwrap();
    for options in WAYS {
        let mut backend = start(share.path(), options);
        let session = backend.connect(common::queues(1)).unwrap();
        session.init().unwrap();
        let client = session.client();
        let file = client.walk(ROOT, "a/b/directory/file").unwrap().nodeid;
        let deeper = client.walk(ROOT, "a/b/directory/inner/file").unwrap().nodeid;
        let fh = client.open(file, libc::O_RDWR).unwrap().fh;
        for round in 0..3 {
            backend = move_on(&session, &mut backend, share.path(), options);
            if round == 1 {
                kill_worker(&backend);
            }
            let client = session.client();
            assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"on tmpfs");
            assert_eq!(client.read_file(deeper).unwrap(), b"deeper");
            assert_eq!(client.walk(ROOT, "a/b/directory/file").unwrap().nodeid, file);
            assert_eq!(client.walk(ROOT, "a/b/directory/inner/file").unwrap().nodeid, deeper);
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn files_of_a_fuse_host_that_share_numbers_move() {
    common::own_mounts();
    let share = common::disk_directory();
    let sub = share.path().join("sub");
    fs::create_dir(&sub).unwrap();
    // Two files show one number.
    let file = |name: &str, shown| HostFile { name: name.to_owned(), shown };
    let files = vec![file("a", 7), file("b", 7), file("c", 8)];
    let _host = FuseHost::mount(&sub, files, |index| index as u64 + 1);
    for options in WAYS {
        let mut backend = start(share.path(), options);
        let session = backend.connect(common::queues(1)).unwrap();
        session.init().unwrap();
        let names = ["a", "b", "c"];
        let nodes = names.map(|name| session.client().walk(ROOT, &format!("sub/{name}")).unwrap().nodeid);
        assert_ne!(nodes[0], nodes[1]);
        let fhs = nodes.map(|node| session.client().open(node, libc::O_RDONLY).unwrap().fh);
        for _ in 0..3 {
            backend = move_on(&session, &mut backend, share.path(), options);
            let client = session.client();
            for ((name, node), fh) in names.iter().zip(nodes).zip(fhs) {
                assert_eq!(client.read(node, fh, 0, 100).unwrap(), name.as_bytes());
                assert_eq!(client.walk(ROOT, &format!("sub/{name}")).unwrap().nodeid, node, "{name}");
            }
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}
