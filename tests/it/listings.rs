//! Listing directories of hosts whose offsets are not what one would expect.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lanefsd_frontend::client::{DirEntry, ROOT};
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::common;
use crate::common::fuse_host::{FuseHost, HostFile};

const FILES: usize = 400;
/// What Linux asks for at once.
const PAGE: usize = 4096;

fn serve(share: &Path, args: &[&str]) -> (Backend, Session) {
    let backend = common::starter().args(args).share(share).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    (backend, session)
}

fn files(count: usize) -> Vec<HostFile> {
    (0..count)
        .map(|number| HostFile { name: format!("file-{number:04}"), shown: 100 + number as u64 })
        .collect()
}

/// One piece of a listing; whatever was looked up by it is forgotten.
fn piece(client: &Client<'_>, fh: u64, offset: u64, plus: bool) -> Vec<DirEntry> {
    if !plus {
        return client.readdir(ROOT, fh, offset, PAGE).unwrap();
    }
    let entries = client.readdirplus(ROOT, fh, offset, PAGE).unwrap();
    for entry in entries.iter().filter_map(|entry| entry.entry).filter(|entry| entry.nodeid != 0) {
        client.forget(entry.nodeid, 1).unwrap();
    }
    entries
}

fn name(entry: &DirEntry) -> String {
    String::from_utf8(entry.name.clone()).unwrap()
}

/// Offsets that lseek(2) does not take, in no order.
fn large(index: usize) -> u64 {
    1 << 63 | (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1
}

/// A guest that takes only some entries of each piece, as Linux does where its program has no room for more,
/// and comes back for the others.
#[test]
fn offsets_of_all_64_bits_are_gone_on_from() {
    common::own_mounts();
    let directory = common::disk_directory();
    let host = FuseHost::mount(directory.path(), files(FILES), large);
    for args in [["--sandbox=none"], ["--sandbox=namespace"]] {
        let (_backend, session) = serve(directory.path(), &args);
        let client = session.client();
        for (plus, taken) in [(false, usize::MAX), (true, usize::MAX), (false, 7), (true, 3)] {
            let fh = client.opendir(ROOT).unwrap().fh;
            let (mut names, mut offset) = (Vec::new(), 0);
            loop {
                let entries = piece(&client, fh, offset, plus);
                let Some(last) = entries.iter().take(taken).next_back() else { break };
                offset = last.offset;
                names.extend(entries.iter().take(taken).map(name));
            }
            assert_eq!(names, host.names(), "plus {plus}, {taken} of each piece");
            // What a program seeks to that lies far behind.
            let entries = piece(&client, fh, large(10), plus);
            assert_eq!(name(&entries[0]), "file-0011");
            let entries = piece(&client, fh, 0, plus);
            assert_eq!(name(&entries[0]), "file-0000");
            assert_eq!(common::errno(client.readdir(ROOT, fh, large(FILES + 7), PAGE)), libc::EINVAL);
            assert_eq!(common::errno(client.readdir(ROOT, fh, u64::MAX, PAGE)), libc::EINVAL);
            assert_eq!(name(&piece(&client, fh, large(0), plus)[0]), "file-0001");
            client.releasedir(ROOT, fh).unwrap();
        }
    }
}

fn remove_while_listing(client: &Client<'_>, plus: bool, taken: usize) {
    let fh = client.opendir(ROOT).unwrap().fh;
    let mut offset = 0;
    loop {
        let entries = piece(client, fh, offset, plus);
        let Some(last) = entries.iter().take(taken).next_back() else { break };
        offset = last.offset;
        for entry in entries.iter().take(taken).filter(|entry| !entry.name.starts_with(b".")) {
            client.unlink(ROOT, &entry.name).unwrap();
        }
    }
    client.releasedir(ROOT, fh).unwrap();
}

/// ramfs counts entries, so that an offset means another entry once one was removed.
#[test]
fn what_is_removed_while_it_is_listed_hides_nothing() {
    common::own_mounts();
    let directory = common::disk_directory();
    mount("ramfs", directory.path(), "ramfs", MountFlags::empty(), None).unwrap();
    for (plus, taken) in [(false, usize::MAX), (true, usize::MAX), (false, 9), (true, 4)] {
        for number in 0..1000 {
            fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
        }
        let (_backend, session) = serve(directory.path(), &[]);
        remove_while_listing(&session.client(), plus, taken);
        let left = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 0, "plus {plus}, {taken} of each piece");
    }
    unmount(directory.path(), UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_directory_that_is_read_again_shows_what_is_new() {
    let (backend, session) = common::serve(&[]);
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    let names = || piece(&client, fh, 0, false).iter().map(name).collect::<BTreeSet<_>>();
    assert_eq!(names().len(), 2);
    fs::write(backend.path("new"), "").unwrap();
    assert!(names().contains("new"));
    fs::remove_file(backend.path("new")).unwrap();
    assert!(!names().contains("new"));
}

/// One handle, as of a descriptor that several threads of a program read from.
#[test]
fn two_readers_of_one_handle_get_only_what_is_there() {
    let backend = common::start(&[]);
    for number in 0..FILES {
        fs::write(backend.path(&format!("file-{number:04}")), "").unwrap();
    }
    let session = backend.connect(common::queues(4)).unwrap();
    let fh = session.client().opendir(ROOT).unwrap().fh;
    std::thread::scope(|scope| {
        for queue in 1..=4 {
            let client = session.client().on(queue);
            scope.spawn(move || {
                for _ in 0..30 {
                    let (mut names, mut offset) = (BTreeSet::new(), 0);
                    loop {
                        let entries = client.readdir(ROOT, fh, offset, PAGE).unwrap();
                        let Some(last) = entries.last() else { break };
                        offset = last.offset;
                        names.extend(entries.iter().map(name));
                    }
                    assert_eq!(names.len(), FILES + 2);
                }
            });
        }
    });
}

#[test]
fn open_directories_keep_little_memory() {
    let backend = common::start(&["--thread-pool-size=1"]);
    for number in 0..FILES {
        fs::write(backend.path(&format!("file-{number:04}-{}", "x".repeat(200))), "").unwrap();
    }
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let list = |size: usize| {
        let fh = client.opendir(ROOT).unwrap().fh;
        assert!(!client.readdir(ROOT, fh, 0, size).unwrap().is_empty());
        fh
    };
    list(1 << 20);
    let before = backend.resident_kib().unwrap();
    let handles: Vec<u64> = (0..3000).map(|_| list(1 << 20)).collect();
    let grown = backend.resident_kib().unwrap().saturating_sub(before);
    assert!(grown < 100 << 10, "{grown} KiB for {} open directories", handles.len());
    // They are listed to the end all the same.
    let fh = list(PAGE);
    let first = client.readdir(ROOT, fh, 0, PAGE).unwrap();
    let rest = client.readdir(ROOT, fh, first.last().unwrap().offset, 1 << 20).unwrap();
    assert_eq!(first.len() + rest.len(), FILES + 2);
    for fh in handles {
        client.releasedir(ROOT, fh).unwrap();
    }
}

/// NTFS and CIFS have names of 255 characters, which may be three times as many bytes.
#[test]
fn names_beyond_255_bytes_are_listed_and_found() {
    common::own_mounts();
    let directory = common::disk_directory();
    let files: Vec<HostFile> = [255, 256, 765, 1024]
        .into_iter()
        .map(|len| HostFile { name: "x".repeat(len), shown: len as u64 })
        .collect();
    let host = FuseHost::mount(directory.path(), files, |index| index as u64 + 1);
    let (_backend, session) = serve(directory.path(), &[]);
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    let listed = client.readdirplus(ROOT, fh, 0, 1 << 16).unwrap();
    assert_eq!(listed.iter().map(name).collect::<Vec<_>>(), host.names());
    for entry in &listed {
        assert_ne!(entry.entry.unwrap().nodeid, 0);
        assert_eq!(client.lookup(ROOT, &entry.name).unwrap().attr.ino, entry.ino);
        client.unlink(ROOT, &entry.name).unwrap();
    }
    assert_eq!(common::errno(client.lookup(ROOT, "x".repeat(1025))), libc::ENAMETOOLONG);
}
