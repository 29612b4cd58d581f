//! The host fails under a file that is written through mappings: what a system call would say reaches the guest, by the next write or
//! by fsync, and the daemon lives on.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;
use crate::common::disk::Disk;
use crate::common::mapped_file::{ALWAYS, File, PAGE, WHOLE_PAGES, disks, mapped, serve};

const LEN: usize = 64 * PAGE;

/// Where the first bytes of a file are on its disk: pairs of offset and length.
fn extents(path: &Path) -> Vec<(u64, u64)> {
    let said = Command::new("filefrag").args(["-v", "-b1"]).arg(path).output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    // ext:     logical_offset:        physical_offset: length:   expected: flags:
    let numbers = |line: &str| -> Option<(u64, u64)> {
        let fields: Vec<_> = line.split(':').collect();
        fields.first()?.trim().parse::<u64>().ok()?;
        let start = fields.get(2)?.split("..").next()?.trim().parse().ok()?;
        Some((start, fields.get(3)?.trim().parse().ok()?))
    };
    said.lines().filter_map(numbers).collect()
}

/// Attack: the disk cannot take pages of a file that is written through a mapping.
/// Outcome: fsync has the error; the daemon lives.
#[test]
fn an_error_of_writeback_reaches_fsync() {
    type Make = fn(&Disk) -> Disk;
    let makes: [(Make, u64); 2] = [
        (|store: &Disk| Disk::ext4_on(store, 64, &WHOLE_PAGES), 72),
        (|store: &Disk| Disk::xfs_on(store), 340),
    ];
    for (make, room) in makes {
        let store = Disk::tmpfs(room);
        let disk = make(&store);
        let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
        let [file, other] = ["file", "other"].map(|name| File::create(&session, name, LEN));
        for file in [file, other] {
            file.client.fsync(file.node, file.fh, false).unwrap();
        }
        // The image loses the blocks of the file, and its file system has no room for others.
        let image = fs::File::options().write(true).open(disk.image()).unwrap();
        for (start, len) in extents(&disk.path.join("file")) {
            fallocate(&image, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len).unwrap();
        }
        let rest = fs::File::create(store.path.join("rest")).unwrap();
        let mut end = 0;
        for piece in [1 << 20, PAGE] {
            while rest.write_all_at(&vec![7; piece], end).is_ok() {
                end += piece as u64;
            }
        }
        file.warm(&backend, 0, &[1; PAGE]);
        let refused = common::errno(file.client.fsync(file.node, file.fh, false));
        assert!([libc::EIO, libc::ENOSPC].contains(&refused), "{refused}");
        // It is told once; the file is written on.
        other.warm(&backend, 0, &[2; PAGE]);
        assert_eq!(other.client.read(other.node, other.fh, 0, PAGE).unwrap(), [2; PAGE]);
        drop(rest);
        fs::remove_file(store.path.join("rest")).unwrap();
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Attack: the file system becomes read-only under a file that is written through a mapping, since it has failed.
/// Outcome: the next writes and fsync are refused, each with an errno; the daemon lives.
#[test]
fn a_file_system_that_fails_refuses_writes() {
    for (disk, ways) in [
        (Disk::ext4 as fn(u64, &[&str]) -> Disk, ["abort", "shutdown"]),
        (|_: u64, _: &[&str]| Disk::xfs(), ["shutdown", "shutdown"]),
    ] {
        for way in ways {
            let disk = disk(64, &WHOLE_PAGES);
            let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
            let file = File::create(&session, "file", LEN);
            file.client.fsync(file.node, file.fh, false).unwrap();
            file.warm(&backend, 0, &[1; PAGE]);
            match way {
                // ext4 ends so after an error of its own, with `errors=remount-ro`.
                "abort" => drop(Command::new("mount").args(["-o", "remount,abort"]).arg(&disk.path).output()),
                _ => common::run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&disk.path)),
            }
            // Within a moment, that of a lease.
            let refusal = || file.client.write(file.node, file.fh, 0, &[2; PAGE]).err();
            common::wait_until(|| refusal().is_some(), "a write that is refused");
            for _ in 0..20 {
                let errno = refusal().unwrap().errno().unwrap().0;
                assert!([libc::EROFS, libc::EIO, libc::ESHUTDOWN].contains(&errno), "{way}: {errno}");
            }
            let errno = common::errno(file.client.fsync(file.node, file.fh, false));
            assert!([libc::EROFS, libc::EIO, libc::ESHUTDOWN].contains(&errno), "{way}: fsync {errno}");
            drop(session);
            backend.expect_success().unwrap();
        }
    }
}

/// Attack: the share is unmounted lazily while a file is written through a mapping.
/// Outcome: service continues, and what was synced is on the disk.
#[test]
fn the_share_is_unmounted() {
    let disk = Disk::ext4(64, &WHOLE_PAGES);
    let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", LEN);
    file.warm(&backend, 0, &[1; PAGE]);
    unmount(&disk.path, UnmountFlags::DETACH).unwrap();
    file.warm(&backend, PAGE, &[2; PAGE]);
    file.client.fsync(file.node, file.fh, false).unwrap();
    drop(session);
    backend.expect_success().unwrap();
    common::run(Command::new("mount").args(["-o", "loop"]).arg(disk.image()).arg(&disk.path));
    let found = fs::read(disk.path.join("file")).unwrap();
    assert!(found[..PAGE] == [1; PAGE] && found[PAGE..2 * PAGE] == [2; PAGE]);
}

/// Attack: a limit on the length of files, below what is written through a mapping.
/// Outcome: EFBIG for what lies behind it.
#[test]
fn a_limit_on_the_length_of_files_counts() {
    let disk = Disk::tmpfs(64);
    let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", LEN);
    for page in [0, 32] {
        file.warm(&backend, page * PAGE, &[1; PAGE]);
    }
    let limit = 16 * PAGE as u64;
    let pid = Pid::from_raw(backend.worker().unwrap().cast_signed()).unwrap();
    prlimit(Some(pid), Resource::Fsize, Rlimit { current: Some(limit), maximum: None }).unwrap();
    let is_refused = || {
        // Those below keep what a write checks fresh.
        file.write(0, &[2; PAGE]);
        file.client.write(file.node, file.fh, 32 * PAGE as u64, &[2; PAGE]).is_err()
    };
    common::wait_until(is_refused, "a write that is refused");
    for _ in 0..50 {
        assert!(is_refused());
        assert_eq!(file.refused(32 * PAGE, &[2; PAGE]), libc::EFBIG);
    }
    file.warm(&backend, 0, &[3; PAGE]);
    assert_eq!(file.refused(32 * PAGE, &[2; PAGE]), libc::EFBIG);
    drop(session);
    backend.expect_success().unwrap();
}

/// Attack: the host makes the file system read-only as soon as nobody has files open to write.
/// Outcome: files that are open for reading do not keep it, and new writers get EROFS.
#[test]
fn a_remount_that_is_read_only() {
    for disk in disks() {
        let disk = disk();
        let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
        let file = File::create(&session, "file", LEN);
        file.warm(&backend, 0, &[1; PAGE]);
        let reader = file.client.open(file.node, libc::O_RDONLY).unwrap();
        file.client.release(file.node, file.fh).unwrap();
        let remount = |how: &str| {
            Command::new("mount").args(["-o", how]).arg(&disk.path).output().unwrap().status.success()
        };
        // Windows that are not used go after some ten seconds.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !remount("remount,ro") {
            assert!(Instant::now() < deadline, "the file is busy still");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(common::errno(file.client.open(file.node, libc::O_RDWR)), libc::EROFS);
        assert_eq!(file.client.read(file.node, reader.fh, 0, PAGE).unwrap(), [1; PAGE]);
        assert!(remount("remount,rw"));
        let again = File { fh: file.client.open(file.node, libc::O_RDWR).unwrap().fh, ..file };
        again.warm(&backend, 0, &[2; PAGE]);
        assert!(mapped(&backend, &disk.path) > 0);
        drop(session);
        backend.expect_success().unwrap();
    }
}
