//! `--allow-direct-io`: O_DIRECT counts on the host as each request says, not as the file was opened.

use std::fs;

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};

use crate::common;

const PLAIN: i32 = libc::O_RDWR;
const DIRECT: i32 = libc::O_RDWR | libc::O_DIRECT;
const BLOCK: usize = 4096;

fn serve(args: &[&str]) -> (tempfile::TempDir, Backend, Session) {
    // Not on a tmpfs: O_DIRECT has to be real.
    let directory = common::disk_directory();
    let backend = common::starter()
        .args(args)
        .args(["--allow-direct-io", "--tmpfile"])
        .share(directory.path())
        .start()
        .unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    (directory, backend, session)
}

/// The flags of all descriptors that the daemon has of regular files, but for O_PATH ones.
fn host_flags(backend: &Backend) -> Vec<i32> {
    let share = backend.share().to_path_buf();
    let fd = backend.proc("fd");
    let mut found = Vec::new();
    for entry in fd.read_dir().unwrap().flatten() {
        let of_share = fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(&share));
        let info = fs::read_to_string(backend.proc("fdinfo").join(entry.file_name())).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        if of_share && flags & (libc::O_PATH | libc::O_DIRECTORY) == 0 {
            found.push(flags);
        }
    }
    found
}

/// A block with O_DIRECT, then an odd tail without, both ways, as dd(1) does it with oflag=direct.
fn block_and_tail(client: &Client<'_>, node: u64, fh: u64) {
    let none = WriteFlags::empty();
    assert_eq!(client.write_with(node, fh, 0, &[b'x'; BLOCK], none, DIRECT).unwrap(), BLOCK);
    assert_eq!(client.write_with(node, fh, BLOCK as u64, &[b'y'; 100], none, PLAIN).unwrap(), 100);
    assert_eq!(client.read_with(node, fh, 10, 100, PLAIN).unwrap(), [b'x'; 100]);
    assert_eq!(client.read_with(node, fh, 4090, 1000, PLAIN).unwrap().len(), 106);
    // With O_DIRECT set again, the host's rules are back.
    assert_eq!(client.read_with(node, fh, 0, BLOCK, DIRECT).unwrap(), [b'x'; BLOCK]);
    assert_eq!(common::errno(client.write_with(node, fh, 7, &[0; 9], none, DIRECT)), libc::EINVAL);
}

#[test]
fn any_length_works_after_o_direct_was_cleared() {
    for sandbox in ["--sandbox=none", "--sandbox=chroot", "--sandbox=namespace"] {
        for (cache, engine) in [
            ("--cache=auto", "--io-engine=auto"),
            ("--cache=never", "--io-engine=auto"),
            ("--cache=never", "--io-engine=io-uring"),
        ] {
            let (directory, _backend, session) = serve(&[sandbox, cache, engine]);
            let client = session.client();
            let (entry, open) = client.create(ROOT, "new", DIRECT, 0o600, 0).unwrap();
            block_and_tail(&client, entry.nodeid, open.fh);
            client.flush(entry.nodeid, open.fh, 1).unwrap();
            client.fsync(entry.nodeid, open.fh, false).unwrap();
            client.release(entry.nodeid, open.fh).unwrap();
            let wanted = [&[b'x'; BLOCK][..], &[b'y'; 100]].concat();
            assert!(fs::read(directory.path().join("new")).unwrap() == wanted, "{sandbox} {cache} {engine}");

            fs::write(directory.path().join("old"), "").unwrap();
            let node = client.lookup(ROOT, "old").unwrap().nodeid;
            let open = client.open(node, DIRECT).unwrap();
            block_and_tail(&client, node, open.fh);

            let (unnamed, open) = client.tmpfile(ROOT, DIRECT, 0o600).unwrap();
            block_and_tail(&client, unnamed.nodeid, open.fh);
        }
    }
}

#[test]
fn a_removed_file_is_found_again_for_a_plain_request() {
    let (_directory, _backend, session) = serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", DIRECT, 0o600, 0).unwrap();
    client.unlink(ROOT, "file").unwrap();
    block_and_tail(&client, entry.nodeid, open.fh);
}

#[test]
fn odd_ranges_are_copied_between_direct_files() {
    let (directory, _backend, session) = serve(&[]);
    let client = session.client();
    let (from, from_open) = client.create(ROOT, "from", DIRECT, 0o600, 0).unwrap();
    let (to, to_open) = client.create(ROOT, "to", DIRECT, 0o600, 0).unwrap();
    let block: Vec<u8> = (0..BLOCK).map(|i| i as u8).collect();
    client.write_with(from.nodeid, from_open.fh, 0, &block, WriteFlags::empty(), DIRECT).unwrap();
    let copied = client.copy_file_range((from.nodeid, from_open.fh, 3), (to.nodeid, to_open.fh, 5), 101);
    assert_eq!(copied.unwrap(), 101);
    assert_eq!(fs::read(directory.path().join("to")).unwrap()[5..], block[3..104]);
    client.setattr(to.nodeid, Change::none().size(77).handle(to_open.fh)).unwrap();
    assert_eq!(fs::metadata(directory.path().join("to")).unwrap().len(), 77);
}

#[test]
fn pages_of_the_guests_cache_are_written_by_a_direct_handle() {
    let (directory, _backend, session) = serve(&["--writeback"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", DIRECT, 0o600, 0).unwrap();
    for flags in [DIRECT, 0] {
        let written = client.write_with(entry.nodeid, open.fh, 0, &[b'z'; 100], WriteFlags::CACHE, flags);
        assert_eq!(written.unwrap(), 100);
    }
    assert_eq!(fs::read(directory.path().join("file")).unwrap(), [b'z'; 100]);
}

#[test]
fn the_second_descriptor_is_as_the_first_but_for_o_direct() {
    let (_directory, backend, session) = serve(&[]);
    let client = session.client();
    let flags = DIRECT | libc::O_DSYNC;
    let (entry, open) = client.create(ROOT, "file", flags, 0o600, 0).unwrap();
    let sorted = || {
        let mut flags = host_flags(&backend);
        flags.sort_by_key(|flags| flags & libc::O_DIRECT);
        flags
            .iter()
            .map(|flags| flags & (libc::O_ACCMODE | libc::O_DIRECT | libc::O_DSYNC))
            .collect::<Vec<_>>()
    };
    client.write_with(entry.nodeid, open.fh, 0, &[1; BLOCK], WriteFlags::empty(), flags).unwrap();
    assert_eq!(sorted(), [flags], "there is one until it takes two");
    for _ in 0..3 {
        client.write_with(entry.nodeid, open.fh, 0, b"odd", WriteFlags::empty(), PLAIN).unwrap();
    }
    assert_eq!(sorted(), [flags & !libc::O_DIRECT, flags]);
    client.release(entry.nodeid, open.fh).unwrap();
    assert_eq!(sorted(), [0; 0]);
}

#[test]
fn o_direct_that_is_set_later_is_not_passed_on() {
    let (directory, _backend, session) = serve(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", PLAIN, 0o600, 0).unwrap();
    client.write_with(entry.nodeid, open.fh, 0, b"odd", WriteFlags::empty(), DIRECT).unwrap();
    assert_eq!(client.read_with(entry.nodeid, open.fh, 1, 10, DIRECT).unwrap(), b"dd");
    assert_eq!(fs::read(directory.path().join("file")).unwrap(), b"odd");
}

#[test]
fn without_a_descriptor_left_a_direct_file_takes_any_length() {
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let (_directory, _backend, session) =
            serve(&[sandbox, "--rlimit-nofile=64", "--inode-file-handles=never"]);
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", DIRECT, 0o600, 0).unwrap();
        client.write_with(entry.nodeid, open.fh, 0, &[1; BLOCK], WriteFlags::empty(), DIRECT).unwrap();
        // The guest takes all that it may have.
        let full = (0..100).map(|_| client.open(entry.nodeid, libc::O_RDONLY)).find_map(Result::err);
        assert_eq!(full.unwrap().errno().unwrap().0, libc::EMFILE);
        client.write_with(entry.nodeid, open.fh, 1, b"odd", WriteFlags::empty(), PLAIN).unwrap();
        assert_eq!(client.read_with(entry.nodeid, open.fh, 1, 3, PLAIN).unwrap(), b"odd");
        // It is not the host's any more for this handle, but works.
        client.write_with(entry.nodeid, open.fh, 0, &[2; BLOCK], WriteFlags::empty(), DIRECT).unwrap();
        assert_eq!(client.read_with(entry.nodeid, open.fh, 0, BLOCK, DIRECT).unwrap(), [2; BLOCK]);
    }
}
