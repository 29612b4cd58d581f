//! The host under the daemon fails: it is full, limits files, loses the share, or ends the daemon.
//! Every request gets its own errno, the daemon lives on, and what was acknowledged is there.
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
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

const BLOCK: usize = 64 << 10;

/// A file system of its own on a loop device. It lies in a mount namespace of the test's thread and of
/// the processes that this thread starts: whatever becomes of the test, the mount ends with them.
struct Disk {
    path: PathBuf,
    _image: tempfile::TempDir,
}

impl Disk {
    /// An ext4 of so many MiB, with these further options for mkfs.ext4.
    fn ext4(mebibytes: u64, mkfs: &[&str]) -> Disk {
        assert!(rustix::process::geteuid().is_root(), "run the tests as root: only root mounts disks");
        own_mounts();
        let directory = common::disk_directory();
        let image = directory.path().join("image");
        fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).args(mkfs).arg(&image));
        let path = directory.path().join("mount");
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        fs::remove_dir(path.join("lost+found")).unwrap();
        Disk { path, _image: directory }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It fails if the test has unmounted it already.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

/// Gives the calling thread mounts that no other process sees.
#[allow(unsafe_code)]
fn own_mounts() {
    // SAFETY: nothing of this thread counts on sharing its working directory or mounts with others.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn serve(share: &Path, args: &[&str], queues: usize) -> (Backend, Session) {
    let backend = common::starter().args(args).share(share).start().unwrap();
    let options = SessionOptions { queues, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    (backend, session)
}

/// Bytes that tell which block of which writer they are.
fn block(writer: usize, number: usize) -> Vec<u8> {
    (0..BLOCK).map(|i| (i / 251 + 31 * writer + 7 * number) as u8).collect()
}

/// Writes blocks of its own until the host refuses; returns the bytes acknowledged, after an fsync, and
/// the errno of the refusal.
fn fill(client: Client<'_>, writer: usize) -> (usize, i32) {
    let (entry, open) = client.create(ROOT, format!("file{writer}"), libc::O_RDWR, 0o600, 0).unwrap();
    let mut written = 0;
    let errno = loop {
        let bytes = block(writer, written / BLOCK);
        match client.write(entry.nodeid, open.fh, written as u64, &bytes) {
            Ok(BLOCK) => written += BLOCK,
            // The host had room for a part; the next write meets the end.
            Ok(count) => {
                written += count;
                break common::errno(client.write(entry.nodeid, open.fh, written as u64, &bytes));
            }
            Err(error) => break error.errno().unwrap_or_else(|| panic!("writer {writer}: {error}")).0,
        }
    };
    client.fsync(entry.nodeid, open.fh, false).unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    (written, errno)
}

#[test]
fn a_full_disk_refuses_each_writer_and_keeps_what_it_took() {
    const WRITERS: usize = 6;
    let disk = Disk::ext4(24, &[]);
    let (mut backend, session) = serve(&disk.path, &["--cache=never"], 2);
    let results: Vec<_> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let client = session.client().on(1 + writer % 2);
                scope.spawn(move || fill(client, writer))
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert!(results.iter().map(|(written, _)| written).sum::<usize>() > 8 << 20, "{results:?}");
    for (writer, (written, errno)) in results.into_iter().enumerate() {
        assert_eq!(errno, libc::ENOSPC, "writer {writer}");
        let host = fs::read(disk.path.join(format!("file{writer}"))).unwrap();
        assert_eq!(host.len(), written, "writer {writer}");
        for (number, found) in host.chunks(BLOCK).enumerate() {
            assert!(found == &block(writer, number)[..found.len()], "writer {writer}, block {number}");
        }
    }
    // With room again, writing goes on.
    let client = session.client();
    let node = client.lookup(ROOT, "file0").unwrap().nodeid;
    client.unlink(ROOT, "file0").unwrap();
    client.forget(node, 2).unwrap();
    let (entry, open) = client.create(ROOT, "later", libc::O_RDWR, 0o600, 0).unwrap();
    assert_eq!(client.write(entry.nodeid, open.fh, 0, &block(0, 0)).unwrap(), BLOCK);
    client.fsync(entry.nodeid, open.fh, false).unwrap();
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn many_writers_of_one_file_on_a_full_disk() {
    const WRITERS: usize = 6;
    let disk = Disk::ext4(24, &[]);
    let (_backend, session) = serve(&disk.path, &["--cache=never"], 2);
    let (entry, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    // Every writer has every sixth block; it goes on after a refusal, and remembers what was taken.
    let taken: Vec<Vec<usize>> = std::thread::scope(|scope| {
        let write = |writer: usize| {
            let client = session.client().on(1 + writer % 2);
            let mut taken = Vec::new();
            for number in (writer..600).step_by(WRITERS) {
                let at = (number * BLOCK) as u64;
                match client.write(entry.nodeid, open.fh, at, &block(0, number)) {
                    Ok(BLOCK) => taken.push(number),
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.errno().unwrap().0, libc::ENOSPC, "{error}"),
                }
            }
            client.fsync(entry.nodeid, open.fh, true).unwrap();
            taken
        };
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(move || write(writer))).collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    let taken: Vec<usize> = taken.into_iter().flatten().collect();
    assert!(taken.len() > 100 && taken.len() < 600, "{} blocks of 600 found room", taken.len());
    let host = fs::File::open(disk.path.join("file")).unwrap();
    for number in taken {
        let mut found = vec![0; BLOCK];
        host.read_exact_at(&mut found, (number * BLOCK) as u64).unwrap();
        assert!(found == block(0, number), "block {number}");
    }
}

#[test]
fn a_disk_without_inodes_refuses_new_files_only() {
    let disk = Disk::ext4(24, &["-N", "64"]);
    let (_backend, session) = serve(&disk.path, &[], 1);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "first", libc::O_RDWR, 0o600, 0).unwrap();
    let refused = (0..1000).map(|i| client.mkdir(ROOT, format!("d{i}"), 0o700, 0)).find(Result::is_err);
    assert_eq!(common::errno(refused.unwrap()), libc::ENOSPC);
    assert_eq!(common::errno(client.create(ROOT, "file", libc::O_RDWR, 0o600, 0)), libc::ENOSPC);
    assert_eq!(common::errno(client.symlink(ROOT, "link", "x")), libc::ENOSPC);
    assert_eq!(common::errno(client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0, 0)), libc::ENOSPC);
    assert_eq!(client.write(entry.nodeid, open.fh, 0, b"still").unwrap(), 5);
    let node = client.lookup(ROOT, "d0").unwrap().nodeid;
    client.rmdir(ROOT, "d0").unwrap();
    client.forget(node, 2).unwrap();
    client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
}

#[test]
fn a_limit_on_the_length_of_files_is_efbig() {
    const LIMIT: u64 = 100_000;
    let (mut backend, session) = common::serve(&["--cache=never"]);
    let pid = Pid::from_raw(backend.pid() as i32);
    prlimit(pid, Resource::Fsize, Rlimit { current: Some(LIMIT), maximum: None }).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let (node, fh) = (entry.nodeid, open.fh);
    assert_eq!(common::errno(client.write(node, fh, LIMIT, b"x")), libc::EFBIG);
    // What fits is written.
    assert_eq!(client.write(node, fh, LIMIT - 10, &[7; 50]).unwrap(), 10);
    assert_eq!(common::errno(client.fallocate(node, fh, 0, 0, LIMIT + 1)), libc::EFBIG);
    assert_eq!(common::errno(client.setattr(node, Change::none().size(LIMIT + 1))), libc::EFBIG);
    assert_eq!(client.read(node, fh, LIMIT - 10, 50).unwrap(), [7; 10]);
    drop(session);
    backend.expect_success().unwrap();
}
