//! A WRITE with O_DSYNC or O_SYNC is on the disk when it is answered, however the file was opened.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::ROOT;
use rustix::mount::{UnmountFlags, unmount};

use crate::common;

/// A file system in a file, in a mount namespace of the test's thread.
struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        common::own_mounts();
        let disk = Disk { directory: common::disk_directory() };
        fs::File::create(disk.path("image")).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(disk.path("mount")).unwrap();
        common::run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.path("image")));
        common::run(
            Command::new("mount").args(["-o", "loop"]).args([disk.path("image"), disk.path("mount")]),
        );
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Whether this text has arrived on the disk.
    fn has(&self, text: &str) -> bool {
        Command::new("grep").args(["-qaF", text]).arg(self.path("image")).status().unwrap().success()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(self.path("mount"), UnmountFlags::DETACH);
    }
}

#[test]
fn what_is_written_synchronously_is_on_the_disk() {
    let disk = Disk::new();
    let options = [
        &["--cache=never"][..],
        &["--cache=auto"],
        &["--cache=never", "--allow-direct-io"],
        &["--cache=never", "--io-engine=io-uring"],
        &["--cache=auto", "--allow-direct-io", "--io-engine=io-uring"],
    ];
    for (number, args) in options.into_iter().enumerate() {
        let backend = common::starter().args(args).share(disk.path("mount")).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let name = format!("file{number}");
        let write = |what: &str, offset: u64, open: i32, flags: i32| {
            let text = format!("{what} by daemon {number}, 0123456789");
            let (entry, open) = client.create(ROOT, &name, open, 0o600, 0).unwrap();
            let none = WriteFlags::empty();
            let written = client.write_with(entry.nodeid, open.fh, offset, text.as_bytes(), none, flags);
            assert_eq!(written.unwrap(), text.len());
            client.release(entry.nodeid, open.fh).unwrap();
            disk.has(&text)
        };
        let (plain, direct) = (libc::O_RDWR, libc::O_RDWR | libc::O_DIRECT);
        assert!(!write("a plain write", 0, plain, plain), "the host writes everything at once");
        // RWF_DSYNC and RWF_SYNC of pwritev2(2), and `mount -o sync`.
        assert!(write("a write with O_DSYNC", 4096, plain, plain | libc::O_DSYNC), "{args:?}");
        assert!(write("a write with O_SYNC", 8192, plain, plain | libc::O_SYNC), "{args:?}");
        let appending = plain | libc::O_APPEND;
        assert!(write("an append with O_DSYNC", 0, appending, appending | libc::O_DSYNC), "{args:?}");
        // Opened so.
        assert!(write("a write to a file with O_SYNC", 16384, plain | libc::O_SYNC, plain), "{args:?}");
        // With O_DIRECT cleared since.
        assert!(write("an odd write with O_DSYNC", 20480, direct, plain | libc::O_DSYNC), "{args:?}");
    }
}
