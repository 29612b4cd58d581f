//! Guests that write their cache back (`--writeback`): where a file ends, and where it has data, is for
//! the guest to say.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use fuse_protocol::flags::{InitFlags, OpenReplyFlags, WriteFlags};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, SessionOptions};

use crate::common;

const MIB: usize = 1 << 20;
const APPENDING: i32 = libc::O_RDWR | libc::O_APPEND;

#[test]
fn a_direct_append_goes_behind_what_is_still_in_the_guests_cache() {
    for args in
        [&["--writeback"][..], &["--writeback", "--cache=always"], &["--writeback", "--allow-direct-io"]]
    {
        let (directory, _backend, session) = common::on_disk(args);
        assert!(session.init_flags().contains(InitFlags::WRITEBACK_CACHE));
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", APPENDING | libc::O_DIRECT, 0o600, 0).unwrap();
        let (node, fh) = (entry.nodeid, open.fh);
        // The guest holds 1 MiB in its cache, which ends where the append begins.
        let flags = APPENDING | libc::O_DIRECT;
        client.write_with(node, fh, MIB as u64, &[b'A'; 4096], WriteFlags::empty(), flags).unwrap();
        for offset in (0..MIB).step_by(64 << 10) {
            let page = [b'B'; 64 << 10];
            client.write_with(node, fh, offset as u64, &page, WriteFlags::CACHE, APPENDING).unwrap();
        }
        let wanted = [&[b'B'; MIB][..], &[b'A'; 4096]].concat();
        assert!(fs::read(directory.path().join("file")).unwrap() == wanted, "{args:?}");
    }
}

#[test]
fn the_benchmark_store_grows_as_the_guest_says() {
    for (args, size) in [(&["--store=null"][..], 4096), (&["--store=null", "--writeback"], MIB + 4096)] {
        let (_directory, _backend, session) = common::on_disk(args);
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", APPENDING, 0o600, 0).unwrap();
        let none = WriteFlags::empty();
        client.write_with(entry.nodeid, open.fh, MIB as u64, &[1; 4096], none, APPENDING).unwrap();
        assert_eq!(client.getattr(entry.nodeid).unwrap().size, size as u64, "{args:?}");
    }
}

#[test]
fn no_data_is_called_a_hole() {
    let (_directory, _backend, session) = common::on_disk(&["--writeback"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    for whence in [libc::SEEK_DATA, libc::SEEK_HOLE, libc::SEEK_END] {
        // From this answer the guest concludes that all is data, up to its own end of the file.
        assert_eq!(common::errno(client.lseek(entry.nodeid, open.fh, 0, whence)), libc::ENOSYS);
    }
    // A guest that has no such cache is told of the host's holes.
    let init_flags = lanefsd_frontend::session::linux_init_flags() - InitFlags::WRITEBACK_CACHE;
    let options = SessionOptions { init_flags, ..SessionOptions::default() };
    let directory = common::disk_directory();
    let backend = common::starter().args(["--writeback"]).share(directory.path()).start().unwrap();
    let session = backend.connect(options).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "holes", libc::O_RDWR, 0o600, 0).unwrap();
    client.write(entry.nodeid, open.fh, MIB as u64, b"data").unwrap();
    assert_eq!(client.lseek(entry.nodeid, open.fh, 0, libc::SEEK_DATA).unwrap(), MIB as u64);
}

#[test]
fn no_file_is_called_one_hole() {
    for (args, blocks) in [(&["--writeback"][..], 1), (&[], 0)] {
        let (_directory, _backend, session) = common::on_disk(args);
        let client = session.client();
        let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        // The guest holds data of it, which tar(1) with --sparse would leave out.
        assert_eq!(entry.attr.blocks, blocks, "{args:?}");
        assert_eq!(client.getattr(entry.nodeid).unwrap().blocks, blocks);
        assert_eq!(client.lookup(ROOT, "file").unwrap().attr.blocks, blocks);
        assert_eq!(client.statx(entry.nodeid, libc::STATX_BASIC_STATS).unwrap().blocks, blocks);
        let link = client.symlink(ROOT, "link", "x").unwrap();
        assert_eq!(link.attr.blocks, 0);
    }
}

#[test]
fn a_file_that_the_daemon_may_not_read_is_written_past_the_cache() {
    const USER: u32 = 4321;
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(common::program(), home.path().join("lanefsd")).unwrap();
    let share = home.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("secret"), "old\n").unwrap();
    fs::set_permissions(share.join("secret"), fs::Permissions::from_mode(0o200)).unwrap();
    for path in [&share, &share.join("secret")] {
        std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
    }
    let user = [format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".into()];
    let backend = Backend::of("setpriv")
        .args(user)
        .args([home.path().join("lanefsd")])
        .args(["--sandbox=none", "--writeback"])
        .share(&share)
        .by_fd()
        .start()
        .unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client().user(USER, USER);
    let node = client.lookup(ROOT, "secret").unwrap().nodeid;
    let open = client.open(node, libc::O_WRONLY).unwrap();
    // In its cache, the guest would have to read the rest of a page that it writes to.
    assert!(OpenReplyFlags::from_bits_retain(open.open_flags).contains(OpenReplyFlags::DIRECT_IO));
    client.write_with(node, open.fh, 4, b"new\n", WriteFlags::empty(), libc::O_WRONLY).unwrap();
    assert_eq!(fs::read(share.join("secret")).unwrap(), b"old\nnew\n");
    assert_eq!(common::errno(client.open(node, libc::O_RDWR)), libc::EACCES);
}

#[test]
fn an_append_only_file_is_appended_past_the_cache() {
    let (directory, _backend, session) = common::on_disk(&["--writeback"]);
    let path = directory.path().join("log");
    fs::write(&path, "old\n").unwrap();
    let chattr = |change| assert!(Command::new("chattr").arg(change).arg(&path).status().unwrap().success());
    chattr("+a");
    let client = session.client();
    let node = client.lookup(ROOT, "log").unwrap().nodeid;
    let open = client.open(node, libc::O_WRONLY | libc::O_APPEND);
    let results = open.map(|open| {
        let flags = libc::O_WRONLY | libc::O_APPEND;
        // The guest's end of the file is old.
        let append = client.write_with(node, open.fh, 2, b"new\n", WriteFlags::empty(), flags);
        // Pages that change what is there, or begin behind the end, are no appends.
        let pages = [(0, &b"OLD\nnew\n"[..]), (9, b"x"), (0, b"old\nnew\nmore\n"), (4, b"new\n")]
            .map(|(offset, page)| client.write_with(node, open.fh, offset, page, WriteFlags::CACHE, 0));
        (open.open_flags, append, pages)
    });
    let content = fs::read(&path).unwrap();
    chattr("-a");
    let (open_flags, append, [changed, behind, appended, same]) = results.unwrap();
    assert!(OpenReplyFlags::from_bits_retain(open_flags).contains(OpenReplyFlags::DIRECT_IO));
    assert_eq!(append.unwrap(), 4);
    assert_eq!((common::errno(changed), common::errno(behind)), (libc::EPERM, libc::EPERM));
    assert_eq!((appended.unwrap(), same.unwrap()), (13, 4));
    assert_eq!(content, b"old\nnew\nmore\n");
}
