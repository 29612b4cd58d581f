//! Guests that write their cache back (`--writeback`): where a file ends, and where it has data, is for
//! the guest to say.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;

use lanefsd::fuse::flags::{InitFlags, WriteFlags};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Session, SessionOptions};

const MIB: usize = 1 << 20;
const APPENDING: i32 = libc::O_RDWR | libc::O_APPEND;

fn serve(args: &[&str]) -> (tempfile::TempDir, Backend, Session) {
    let directory = common::disk_directory();
    let backend = common::starter().args(args).share(directory.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    (directory, backend, session)
}

#[test]
fn a_direct_append_goes_behind_what_is_still_in_the_guests_cache() {
    for args in
        [&["--writeback"][..], &["--writeback", "--cache=always"], &["--writeback", "--allow-direct-io"]]
    {
        let (directory, _backend, session) = serve(args);
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
        let (_directory, _backend, session) = serve(args);
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", APPENDING, 0o600, 0).unwrap();
        let none = WriteFlags::empty();
        client.write_with(entry.nodeid, open.fh, MIB as u64, &[1; 4096], none, APPENDING).unwrap();
        assert_eq!(client.getattr(entry.nodeid).unwrap().size, size as u64, "{args:?}");
    }
}

#[test]
fn no_data_is_called_a_hole() {
    let (_directory, _backend, session) = serve(&["--writeback"]);
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
