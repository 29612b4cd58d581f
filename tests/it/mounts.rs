//! Subvolumes, mounts below the share, and hosts whose inode numbers and file handles mean less than those of a
//! local disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fuse_protocol::abi::Attr;
use fuse_protocol::flags::{AttrFlags, InitFlags};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Client, SessionOptions};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use crate::common;
use crate::common::fuse_host::{FuseHost, HostFile};
use crate::inodes::{Disk, FEW, fill, look_at_others, serve, serve_with};

fn is_submount(attr: &Attr) -> bool {
    attr.flags & AttrFlags::SUBMOUNT.bits() != 0
}

#[test]
fn a_subvolume_is_a_file_system_of_its_own() {
    let disk = Disk::new(&["mkfs.btrfs", "-q"], 160);
    for name in ["a", "b"] {
        common::run(Command::new("btrfs").args(["subvolume", "create"]).arg(disk.path.join(name)));
        fs::write(disk.path.join(name).join("file"), name).unwrap();
    }
    let (_backend, session) = serve(&disk.path, &[FEW]);
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    for listed in client.readdirplus(ROOT, fh, 0, 4096).unwrap() {
        let entry = listed.entry.unwrap();
        assert!(listed.name.starts_with(b".") || is_submount(&entry.attr), "{listed:?}");
    }
    let mut files = Vec::new();
    for name in ["a", "b"] {
        let subvolume = client.lookup(ROOT, name).unwrap();
        assert!(is_submount(&subvolume.attr));
        let file = client.lookup(subvolume.nodeid, "file").unwrap();
        assert!(!is_submount(&file.attr));
        assert_eq!(client.read_file(file.nodeid).unwrap(), name.as_bytes());
        files.push(file);
    }
    assert_eq!(
        files[0].attr.ino, files[1].attr.ino,
        "the number is the host's, as each has its own file system"
    );
    drop(session);

    // A guest that knows no submounts has one file system, in which no two files have one number.
    let flags = linux_init_flags() - InitFlags::SUBMOUNTS;
    let (_backend, session) =
        serve_with(&disk.path, &[], SessionOptions { init_flags: flags, ..SessionOptions::default() });
    let numbers = numbers_below(&session.client(), &["a", "b"]);
    assert_ne!(numbers[0], numbers[1]);
}

/// The numbers of `file` in each of these directories, which are the same in all kinds of replies.
fn numbers_below(client: &Client<'_>, names: &[&str]) -> Vec<u64> {
    let number = |name: &&str| {
        let directory = client.lookup(ROOT, *name).unwrap();
        assert!(!is_submount(&directory.attr));
        let file = client.lookup(directory.nodeid, "file").unwrap();
        let fh = client.opendir(directory.nodeid).unwrap().fh;
        let find = |entries: Vec<lanefsd_frontend::client::DirEntry>| {
            entries.into_iter().find(|entry| entry.name == b"file").unwrap()
        };
        let listed = find(client.readdir(directory.nodeid, fh, 0, 4096).unwrap());
        let plus = find(client.readdirplus(directory.nodeid, fh, 0, 4096).unwrap());
        let all = [
            file.attr.ino,
            listed.ino,
            plus.ino,
            plus.entry.unwrap().attr.ino,
            client.getattr(file.nodeid).unwrap().ino,
            client.statx(file.nodeid, 0).unwrap().ino,
        ];
        assert_eq!(all, [file.attr.ino; 6]);
        file.attr.ino
    };
    names.iter().map(number).collect()
}

/// Two new file systems in memory below a directory: their inodes have the same numbers.
fn with_twins(share: &Path) {
    for name in ["a", "b"] {
        let path = share.join(name);
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path.join("file"), name).unwrap();
    }
}

#[test]
fn numbers_of_mounts_differ_where_the_guest_has_one_file_system() {
    common::own_mounts();
    let directory = common::disk_directory();
    with_twins(directory.path());
    let host = ["a", "b"].map(|name| fs::metadata(directory.path().join(name).join("file")).unwrap().ino());
    assert_eq!(host[0], host[1]);
    for (args, flags) in [
        (["--no-announce-submounts"], linux_init_flags()),
        (["--announce-submounts"], linux_init_flags() - InitFlags::SUBMOUNTS),
    ] {
        let options = SessionOptions { init_flags: flags, ..SessionOptions::default() };
        let (_backend, session) = serve_with(directory.path(), &args, options);
        let numbers = numbers_below(&session.client(), &["a", "b"]);
        assert_ne!(numbers[0], numbers[1]);
    }
    let (_backend, session) = serve(directory.path(), &[]);
    let client = session.client();
    for (name, number) in ["a", "b"].iter().zip(host) {
        let entry = client.lookup(ROOT, name).unwrap();
        assert!(is_submount(&entry.attr));
        assert_eq!(client.lookup(entry.nodeid, "file").unwrap().attr.ino, number);
    }
}

/// A file that is mounted over another one cannot be announced.
#[test]
fn a_file_that_is_mounted_has_a_number_for_itself() {
    common::own_mounts();
    let directory = common::disk_directory();
    with_twins(directory.path());
    for (name, place) in [("a", "first"), ("b", "second")] {
        fs::write(directory.path().join(place), "").unwrap();
        mount_bind(directory.path().join(name).join("file"), directory.path().join(place)).unwrap();
    }
    let (_backend, session) = serve(directory.path(), &[]);
    let client = session.client();
    let [first, second] = ["first", "second"].map(|name| client.lookup(ROOT, name).unwrap());
    assert_ne!(first.attr.ino, second.attr.ino);
    assert_eq!(client.getattr(first.nodeid).unwrap().ino, first.attr.ino);
    assert_eq!(client.read_file(first.nodeid).unwrap(), b"a");
    assert_eq!(client.read_file(second.nodeid).unwrap(), b"b");
}

fn can_be_unmounted(path: &Path) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while unmount(path, UnmountFlags::empty()).is_err() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Mounts of this thread that show in namespaces made from it, as those of a host with systemd do.
fn shared_mounts() {
    common::own_mounts();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
}

#[test]
fn a_file_system_that_the_guest_has_forgotten_can_be_unmounted() {
    shared_mounts();
    for args in [&["--sandbox=none"][..], &["--sandbox=namespace"], &["--inode-file-handles=never"]] {
        let limit = if args[0].contains("never") { "--rlimit-nofile=1000" } else { FEW };
        let directory = common::disk_directory();
        fill(directory.path());
        let sub = directory.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let all_args = [args, &[limit, "--keep-listening"]].concat();
        let mount_it = || {
            mount("tmpfs", &sub, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(sub.join("file"), "").unwrap();
        };
        mount_it();
        let backend = common::starter().args(&all_args).share(directory.path()).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let know = || {
            let directory = client.lookup(ROOT, "sub").unwrap();
            assert!(is_submount(&directory.attr));
            let file = client.lookup(directory.nodeid, "file").unwrap().nodeid;
            look_at_others(&client, many);
            (directory.nodeid, file)
        };
        let (node, file) = know();
        // Forgotten, but one file is open.
        let fh = client.open(file, libc::O_RDWR).unwrap().fh;
        client.forget(file, 1).unwrap();
        client.forget(node, 1).unwrap();
        assert!(unmount(&sub, UnmountFlags::empty()).is_err(), "{all_args:?}");
        client.release(file, fh).unwrap();
        assert!(can_be_unmounted(&sub), "{all_args:?}: busy after the last FORGET");
        mount_it();
        // Now with nothing forgotten: the session's end does it.
        let (_, file) = know();
        client.open(file, libc::O_RDWR).unwrap();
        drop(session);
        assert!(can_be_unmounted(&sub), "{all_args:?}: busy after the session");
    }
}

#[test]
fn what_is_mounted_while_the_daemon_runs_is_seen_and_let_go() {
    shared_mounts();
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let directory = common::disk_directory();
        fill(directory.path());
        let sub = directory.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let (_backend, session) = serve(directory.path(), &[sandbox, FEW]);
        let client = session.client();
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let before = client.lookup(ROOT, "sub").unwrap();
        for _ in 0..3 {
            mount("tmpfs", &sub, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(sub.join("file"), "").unwrap();
            let found = client.lookup(ROOT, "sub").unwrap();
            assert!(is_submount(&found.attr) && found.nodeid != before.nodeid, "{sandbox}");
            let file = client.lookup(found.nodeid, "file").unwrap();
            look_at_others(&client, many);
            client.forget(file.nodeid, 1).unwrap();
            client.forget(found.nodeid, 1).unwrap();
            assert!(can_be_unmounted(&sub), "{sandbox}: busy");
            let again = client.lookup(ROOT, "sub").unwrap();
            assert_eq!(again.nodeid, before.nodeid);
        }
    }
}

/// A FUSE server's numbers may stand for several files, and its handles end when the kernel forgets.
#[test]
fn files_of_a_fuse_host_are_told_apart_and_keep_their_descriptors() {
    common::own_mounts();
    let directory = common::disk_directory();
    let files =
        (0..100).map(|number| HostFile { name: format!("file{number}"), shown: 1000 + number % 7 }).collect();
    let host = FuseHost::mount(directory.path(), files, |index| index as u64 + 1);
    let (status, text) =
        common::starter().args(["--inode-file-handles=mandatory"]).share(directory.path()).refuse().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(text.contains("FUSE") && text.contains("--inode-file-handles"), "{text}");
    for args in [["--sandbox=none", "--rlimit-nofile=200"], ["--sandbox=namespace", "--rlimit-nofile=200"]] {
        let (_backend, session) = serve(directory.path(), &args);
        let client = session.client();
        let nodes: Vec<u64> =
            host.names().iter().map(|name| client.lookup(ROOT, name).unwrap().nodeid).collect();
        for (name, &node) in host.names().iter().zip(&nodes) {
            assert_eq!(client.lookup(ROOT, name).unwrap().nodeid, node);
            assert_eq!(client.read_file(node).unwrap(), name.as_bytes());
        }
        assert_eq!(client.lookup(ROOT, ".").unwrap().nodeid, ROOT);
    }
}

/// The same below a share whose own inodes may be held by handle.
#[test]
fn a_fuse_file_system_below_the_share_keeps_its_descriptors() {
    common::own_mounts();
    let directory = common::disk_directory();
    fill(directory.path());
    let sub = directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    let files =
        (0..60).map(|number| HostFile { name: format!("file{number}"), shown: 1000 + number }).collect();
    let host = FuseHost::mount(&sub, files, |index| index as u64 + 1);
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let (backend, session) =
            serve(directory.path(), &[sandbox, "--rlimit-nofile=200", "--inode-file-handles=mandatory"]);
        let client = session.client();
        let node = client.lookup(ROOT, "sub").unwrap().nodeid;
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let nodes: Vec<u64> =
            host.names().iter().map(|name| client.lookup(node, name).unwrap().nodeid).collect();
        look_at_others(&client, many);
        // What the host's kernel does when memory is short.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        for (name, &file) in host.names().iter().zip(&nodes) {
            assert_eq!(client.read_file(file).unwrap(), name.as_bytes());
            client.forget(file, 1).unwrap();
        }
        assert!(backend.descriptors().unwrap().len() <= 200);
        // It is said once, however often the guest comes back.
        for _ in 0..3 {
            client.forget(node, u64::MAX).unwrap();
            client.lookup(ROOT, "sub").unwrap();
        }
        common::wait_for_words(&backend, "takes a descriptor");
        assert_eq!(backend.stderr().matches("takes a descriptor").count(), 1, "{}", backend.stderr());
    }
}

/// The guest asks once, as it has one file system.
#[test]
fn syncfs_reaches_mounts_that_are_not_announced() {
    let disk = Disk::ext4();
    let directory = common::disk_directory();
    let sub = directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    mount_bind(&disk.path, &sub).unwrap();
    let (_backend, session) = serve(directory.path(), &["--no-announce-submounts"]);
    let client = session.client();
    let node = client.lookup(ROOT, "sub").unwrap().nodeid;
    let text = b"a line that is to be found on the disk".repeat(1000);
    fs::write(sub.join("file"), &text).unwrap();
    client.lookup(node, "file").unwrap();
    let image = disk.path.parent().unwrap().join("image");
    let is_on_disk = || fs::read(&image).unwrap().windows(500).any(|bytes| *bytes == text[..500]);
    assert!(!is_on_disk());
    client.syncfs(ROOT).unwrap();
    assert!(is_on_disk());
    unmount(&sub, UnmountFlags::DETACH).unwrap();
}
