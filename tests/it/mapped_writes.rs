//! Writes through mappings: what they promise is what pwritev2(2) promises, and what the host does meanwhile harms nobody.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lanefsd_frontend::client::{Change, ROOT};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};

use crate::common;
use crate::common::disk::Disk;
use crate::common::mapped_file::{
    ALWAYS, File, JIFFIES, PAGE, WHOLE_PAGES, bytes_of_calls, disks, mapped, serve, times,
};

#[test]
fn many_writers_of_one_file_each_have_their_blocks() {
    const WRITERS: usize = 4;
    for disk in disks() {
        for block in [512, PAGE, 64 << 10, 3 * PAGE + 100] {
            let disk = disk();
            let (mut backend, session) = serve(&disk.path, &ALWAYS, WRITERS);
            let file = File::create(&session, "file", WRITERS * 8 * block);
            let before = bytes_of_calls(&backend);
            std::thread::scope(|scope| {
                for writer in 0..WRITERS {
                    let file = File { client: session.client().on(1 + writer), ..file };
                    scope.spawn(move || {
                        for round in 0..100usize {
                            for number in 0..8 {
                                let offset = (number * WRITERS + writer) * block;
                                file.write(offset, &vec![(round + 31 * writer + number) as u8; block]);
                            }
                        }
                    });
                }
            });
            let by_calls = bytes_of_calls(&backend) - before;
            assert!(by_calls < WRITERS * 800 * block, "all of it by system calls");
            let host = fs::read(disk.path.join("file")).unwrap();
            for (index, found) in host.chunks(block).enumerate() {
                let (number, writer) = (index / WRITERS, index % WRITERS);
                assert!(found.iter().all(|byte| *byte == (99 + 31 * writer + number) as u8), "block {index}");
            }
            assert_eq!(file.client.read(file.node, file.fh, 0, 1000).unwrap(), host[..1000]);
            drop(session);
            backend.expect_success().unwrap();
        }
    }
}

#[test]
fn nothing_is_mapped_by_default_where_overlapping_writes_of_daemons_are_whole() {
    type Case<'a> = (fn() -> Disk, &'a [&'a str], bool);
    let cases: [Case<'_>; 7] = [
        (|| Disk::tmpfs(64), &["--cache=never"], false),
        (|| Disk::tmpfs(64), &["--cache=always", "--parallel-direct-writes=always"], true),
        (|| Disk::ext4(64, &["-b", "1024"]), &["--cache=never", "--mapped-writes=always"], false),
        (|| Disk::ext4(64, &WHOLE_PAGES), &["--cache=never"], false),
        (|| Disk::ext4(64, &WHOLE_PAGES), &["--cache=always", "--parallel-direct-writes=always"], true),
        (|| Disk::tmpfs(64), &["--cache=never", "--mapped-writes=never"], false),
        (|| Disk::tmpfs(64), &["--cache=never", "--mapped-writes=always", "--allow-direct-io"], false),
    ];
    for (disk, args, is_mapped) in cases {
        let disk = disk();
        let (backend, session) = serve(&disk.path, args, 1);
        let file = File::create(&session, "file", PAGE);
        for _ in 0..100 {
            file.write(0, &[1; PAGE]);
        }
        assert_eq!(mapped(&backend, &disk.path) > 0, is_mapped, "{args:?}");
    }
}

#[test]
fn a_handle_that_is_not_writable_writes_nothing() {
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", PAGE);
    file.warm(&backend, 0, &[1; PAGE]);
    let reader = file.client.open(file.node, libc::O_RDONLY).unwrap();
    let refused = File { fh: reader.fh, ..file };
    assert_eq!(refused.refused(0, &[2; PAGE]), libc::EBADF);
    assert_eq!(fs::read(disk.path.join("file")).unwrap(), [1; PAGE]);
}

#[test]
fn a_signal_that_no_page_has_caused_changes_nothing() {
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", PAGE);
    file.warm(&backend, 0, &[1; PAGE]);
    let old = backend.worker().unwrap();
    kill_process(Pid::from_raw(old as i32).unwrap(), Signal::BUS).unwrap();
    for round in 0..100 {
        fs::File::options().write(true).open(disk.path.join("file")).unwrap().set_len(0).unwrap();
        file.write(0, &[round; PAGE]);
        assert_eq!(fs::read(disk.path.join("file")).unwrap(), [round; PAGE]);
    }
    assert_eq!(backend.worker(), Some(old), "the same process");
}

#[test]
fn every_write_moves_the_times_for_the_host_and_for_the_guest() {
    for disk in disks() {
        let disk = disk();
        let (backend, session) = serve(&disk.path, &ALWAYS, 1);
        let (file, path) = (File::create(&session, "file", PAGE), disk.path.join("file"));
        file.warm(&backend, 0, &[1; PAGE]);
        for round in 0..20 {
            std::thread::sleep(JIFFIES);
            let before = times(&path);
            file.write(0, &[round; PAGE]);
            common::wait_until(
                || times(&path) > before && times(&path)[1] > before[1],
                "newer times on the host",
            );
        }
        for round in 0..20 {
            let before = file.client.getattr(file.node).unwrap();
            std::thread::sleep(JIFFIES);
            file.write(0, &[round; PAGE]);
            let after = match round % 4 {
                0 => file.client.getattr(file.node).unwrap(),
                1 => file.client.lookup(ROOT, "file").unwrap().attr,
                2 => file.client.setattr(file.node, Change::none().mode(0o644)).unwrap(),
                _ => {
                    let stat = file.client.statx(file.node, 0x7ff).unwrap();
                    let mut attr = before;
                    (attr.mtime, attr.mtimensec) = (stat.mtime.tv_sec.cast_unsigned(), stat.mtime.tv_nsec);
                    attr
                }
            };
            assert!((after.mtime, after.mtimensec) > (before.mtime, before.mtimensec), "round {round}");
        }
    }
}

#[test]
fn a_lookup_beside_others_has_the_times_of_the_last_write() {
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 2);
    let file = File::create(&session, "file", PAGE);
    file.warm(&backend, 0, &[1; PAGE]);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            // The clock that files get their times from.
            let coarse = || clock_gettime(ClockId::RealtimeCoarse);
            for round in 0..300 {
                let last = coarse();
                let now = (0..).map(|_| coarse()).find(|now| *now != last).unwrap();
                file.write(0, &[round as u8; PAGE]);
                let attr = file.client.lookup(ROOT, "file").unwrap().attr;
                let before = (now.tv_sec.cast_unsigned(), now.tv_nsec as u32);
                assert!((attr.mtime, attr.mtimensec) >= before, "round {round}");
            }
        });
        while !writer.is_finished() {
            session.client().on(2).lookup(ROOT, "file").unwrap();
        }
    });
}

#[test]
fn times_that_the_guest_sets_stay() {
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let (file, path) = (File::create(&session, "file", PAGE), disk.path.join("file"));
    for end in ["", "flush", "fsync"] {
        file.warm(&backend, 0, &[1; PAGE]);
        let set = file.client.setattr(file.node, Change::none().times((7, 0), (77, 7))).unwrap();
        assert_eq!((set.mtime, set.mtimensec), (77, 7));
        match end {
            "flush" => file.client.flush(file.node, file.fh, 0).unwrap(),
            "fsync" => file.client.fsync(file.node, file.fh, false).unwrap(),
            // Longer than the thread waits.
            _ => std::thread::sleep(Duration::from_millis(400)),
        }
        assert_eq!(times(&path)[0], (77, 7), "after {end}");
    }
    // What ends the use of the file sets them at once.
    for end in ["flush", "fsync", "release"] {
        let before = times(&path);
        std::thread::sleep(JIFFIES);
        file.write(0, &[2; PAGE]);
        match end {
            "flush" => file.client.flush(file.node, file.fh, 0).unwrap(),
            "fsync" => file.client.fsync(file.node, file.fh, false).unwrap(),
            _ => file.client.release(file.node, file.fh).unwrap(),
        }
        assert!(times(&path) > before, "after {end}");
    }
}

/// Attack: the host truncates a file while it is written through a mapping.
/// Outcome: the daemon lives, and what lies before the cut is right.
#[test]
fn a_file_that_is_truncated_on_the_host_again_and_again() {
    const KEPT: usize = 16 * PAGE;
    for disk in disks() {
        let disk = disk();
        let (mut backend, session) = serve(&disk.path, &ALWAYS, 3);
        let file = File::create(&session, "file", 2 * KEPT);
        file.warm(&backend, KEPT - PAGE, &[1; 4 * PAGE]);
        let (host, done) =
            (fs::File::options().write(true).open(disk.path.join("file")).unwrap(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3usize)
                .map(|writer| {
                    let file = File { client: session.client().on(1 + writer), ..file };
                    let done = &done;
                    scope.spawn(move || {
                        for round in 0..1500usize {
                            // One before the cut, and others at and behind it.
                            let offset = [0, KEPT - PAGE, KEPT + 5 * PAGE][writer];
                            file.write(offset, &vec![(round + writer) as u8; 2 * PAGE + 10]);
                        }
                        if writer == 0 {
                            done.store(true, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            for cut in (0..).map(|i| KEPT + (i * 777) % (7 * PAGE)) {
                host.set_len(cut as u64).unwrap();
                host.set_len(2 * KEPT as u64).unwrap();
                if done.load(Ordering::Relaxed) || writers.iter().all(|writer| writer.is_finished()) {
                    break;
                }
            }
        });
        let found = fs::read(disk.path.join("file")).unwrap();
        assert!(found[..2 * PAGE + 10].iter().all(|byte| *byte == (1499 % 256) as u8));
        // A truncation that is over is never overlooked.
        for cut in [KEPT + 5 * PAGE + 100, KEPT, 10] {
            file.warm(&backend, KEPT + 5 * PAGE, &[3; 2 * PAGE]);
            host.set_len(cut as u64).unwrap();
            file.write(KEPT + 5 * PAGE, &[4; 2 * PAGE]);
            let found = fs::read(disk.path.join("file")).unwrap();
            assert!(found[KEPT + 5 * PAGE..][..2 * PAGE] == [4; 2 * PAGE], "cut at {cut}");
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Attack: holes in a file that is written through a mapping, on a full disk.
/// Outcome: ENOSPC for the writer; what was there stays.
#[test]
fn holes_on_a_full_disk_are_refused() {
    const BLOCKS: usize = 256;
    for disk in [|| Disk::tmpfs(16), || Disk::ext4(24, &WHOLE_PAGES)] as [fn() -> Disk; 2] {
        let disk = disk();
        let (mut backend, session) = serve(&disk.path, &ALWAYS, 1);
        let file = File::create(&session, "file", BLOCKS * PAGE);
        for block in 0..BLOCKS {
            file.warm(&backend, block * PAGE, &[1; PAGE]);
        }
        let host = fs::File::options().write(true).open(disk.path.join("file")).unwrap();
        let hole = (BLOCKS / 2 * PAGE) as u64;
        fallocate(&host, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, hole, hole).unwrap();
        host.sync_all().unwrap();
        let rest = fs::File::create(disk.path.join("rest")).unwrap();
        let mut end = 0;
        for piece in [1 << 20, PAGE] {
            while rest.write_all_at(&vec![7; piece], end).and_then(|()| rest.sync_all()).is_ok() {
                end += piece as u64;
            }
        }
        let in_hole: Vec<_> = (BLOCKS / 2..BLOCKS)
            .map(|block| {
                file.client
                    .write(file.node, file.fh, (block * PAGE) as u64, &[2; PAGE])
                    .map_err(|e| e.errno().unwrap().0)
            })
            .collect();
        assert!(in_hole.contains(&Err(libc::ENOSPC)), "{in_hole:?}");
        assert!(in_hole.iter().all(|result| [Ok(PAGE), Err(libc::ENOSPC)].contains(result)), "{in_hole:?}");
        for block in 0..BLOCKS / 2 {
            file.write(block * PAGE, &[3; PAGE]);
        }
        fs::remove_file(disk.path.join("rest")).unwrap();
        drop(rest);
        for (block, result) in (BLOCKS / 2..).zip(&in_hole) {
            if result.is_err() {
                common::wait_until(
                    || file.client.write(file.node, file.fh, (block * PAGE) as u64, &[2; PAGE]).is_ok(),
                    "room on the disk",
                );
            }
        }
        file.client.fsync(file.node, file.fh, false).unwrap();
        let found = fs::read(disk.path.join("file")).unwrap();
        for (block, bytes) in found.chunks(PAGE).enumerate() {
            assert!(bytes == [if block < BLOCKS / 2 { 3 } else { 2 }; PAGE], "block {block}");
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

#[test]
fn a_file_that_becomes_immutable_or_synchronous_is_treated_so() {
    let disk = Disk::ext4(64, &WHOLE_PAGES);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let (file, path) = (File::create(&session, "file", PAGE), disk.path.join("file"));
    let chattr = |flag| common::run(Command::new("chattr").arg(flag).arg(&path));
    file.warm(&backend, 0, &[1; PAGE]);
    chattr("+i");
    assert_eq!(file.refused(0, &[2; PAGE]), libc::EPERM);
    chattr("-i");
    file.warm(&backend, 0, &[3; PAGE]);
    // Within a moment all writes are made by system calls, which are synchronous.
    let remount = |option: &str| common::run(Command::new("mount").args(["-o", option]).arg(&disk.path));
    let by_calls = || {
        let before = bytes_of_calls(&backend);
        for _ in 0..10 {
            file.write(0, &[4; PAGE]);
        }
        bytes_of_calls(&backend) - before >= 10 * PAGE
    };
    for (begin, end) in [
        (&(|| chattr("+S")) as &dyn Fn(), &(|| chattr("-S")) as &dyn Fn()),
        (&|| remount("remount,sync"), &|| remount("remount,async")),
    ] {
        begin();
        common::wait_until(by_calls, "synchronous writes");
        assert!(by_calls() && by_calls());
        end();
        file.warm(&backend, 0, &[5; PAGE]);
    }
    assert_eq!(fs::read(&path).unwrap(), [5; PAGE]);
}

#[test]
fn synchronous_requests_are_not_mapped() {
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", PAGE);
    file.warm(&backend, 0, &[1; PAGE]);
    let before = bytes_of_calls(&backend);
    let request = |flags| {
        use fuse_protocol::flags::WriteFlags;
        let bytes = [2; PAGE];
        let request = lanefsd_frontend::client::data::write_request(
            file.node,
            file.fh,
            0,
            &bytes,
            WriteFlags::empty(),
            flags,
        );
        session.finish(file.client.send(request).unwrap()).unwrap();
    };
    for flags in [libc::O_DSYNC, libc::O_SYNC, libc::O_APPEND] {
        (0..10).for_each(|_| request(libc::O_RDWR | flags));
    }
    assert!(bytes_of_calls(&backend) - before >= 30 * PAGE);
}

#[test]
fn set_id_bits_are_cleared_by_the_next_write() {
    for disk in disks() {
        let disk = disk();
        let (backend, session) = serve(&disk.path, &ALWAYS, 1);
        let (file, path) = (File::create(&session, "file", PAGE), disk.path.join("file"));
        for mode in [0o4755, 0o2775, 0o6755] {
            file.warm(&backend, 0, &[1; PAGE]);
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let bytes = [2; PAGE];
            let kill = fuse_protocol::flags::WriteFlags::KILL_SUIDGID;
            let request = lanefsd_frontend::client::data::write_request(
                file.node,
                file.fh,
                0,
                &bytes,
                kill,
                libc::O_RDWR,
            );
            session.finish(file.client.send(request).unwrap()).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode & 0o777);
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        // A capability that comes from outside is gone with a write that comes a little later.
        file.warm(&backend, 0, &[3; PAGE]);
        let capability = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if rustix::fs::lsetxattr(&path, "security.capability", &capability, rustix::fs::XattrFlags::empty())
            .is_ok()
        {
            let is_cleared = || {
                file.write(0, &[4; PAGE]);
                common::host_xattr(&path, "security.capability").is_err()
            };
            common::wait_until(is_cleared, "a file without capabilities");
        }
    }
}

#[test]
fn what_was_synced_is_in_a_copy_of_the_disk() {
    // The original of an XFS is mounted as well.
    for (disk, kind, options) in [
        ((|| Disk::ext4(64, &WHOLE_PAGES)) as fn() -> Disk, "ext4", "loop"),
        (Disk::xfs, "xfs", "loop,nouuid"),
    ] {
        let disk = disk();
        let (backend, session) = serve(&disk.path, &ALWAYS, 1);
        let file = File::create(&session, "file", 64 * PAGE);
        for round in 1..4 {
            for number in 0..16 {
                file.warm(&backend, number * 4 * PAGE, &[round * 16 + number as u8; 4 * PAGE]);
            }
            file.client.fsync(file.node, file.fh, round % 2 == 0).unwrap();
            let copy = disk.beside().join("copy");
            common::run(Command::new("cp").arg(disk.image()).arg(&copy));
            let place = disk.beside().join("copied");
            fs::create_dir(&place).unwrap();
            common::run(Command::new("mount").args(["-t", kind, "-o", options]).arg(&copy).arg(&place));
            let found = fs::read(place.join("file")).unwrap();
            unmount(&place, UnmountFlags::empty()).unwrap();
            fs::remove_dir(&place).unwrap();
            for (number, bytes) in found.chunks(4 * PAGE).enumerate() {
                assert!(bytes == [round * 16 + number as u8; 4 * PAGE], "round {round}, piece {number}");
            }
        }
    }
}

#[test]
fn the_times_move_though_the_process_dies_that_has_written() {
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let disk = Disk::tmpfs(64);
        let (backend, session) = serve(&disk.path, &[ALWAYS[0], ALWAYS[1], sandbox, "--max-deaths=1000"], 1);
        let (file, path) = (File::create(&session, "file", PAGE), disk.path.join("file"));
        let mut numbers = BTreeSet::new();
        for round in 0..10 {
            file.warm(&backend, 0, &[round; PAGE]);
            let before = file.client.getattr(file.node).unwrap();
            std::thread::sleep(JIFFIES);
            file.write(0, &[round + 100; PAGE]);
            let worker = backend.worker().unwrap();
            numbers.insert(worker);
            kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::KILL).unwrap();
            common::wait_until(|| backend.worker().is_some_and(|new| new != worker), "another worker");
            // The guest's next request is answered by that one.
            let after = file.client.getattr(file.node).unwrap();
            assert!((after.mtime, after.mtimensec) > (before.mtime, before.mtimensec), "round {round}");
            assert_eq!(times(&path)[0], (after.mtime.cast_signed(), after.mtimensec.into()));
            assert_eq!(fs::read(&path).unwrap(), [round + 100; PAGE]);
        }
        assert_eq!(numbers.len(), 10);
    }
}

#[test]
fn windows_are_bounded_and_gone_with_their_use() {
    const WINDOW: usize = 32 << 20;
    let disk = Disk::tmpfs(64);
    let (backend, session) = serve(&disk.path, &ALWAYS, 1);
    let files: Vec<_> = (0..10).map(|i| File::create(&session, &format!("file{i}"), PAGE)).collect();
    for file in &files {
        file.client.setattr(file.node, Change::none().size(80 * WINDOW as u64)).unwrap();
        for number in (0..20).map(|_| 0).chain(0..80) {
            file.write(number * WINDOW, &[1; 100]);
        }
    }
    let all = mapped(&backend, &disk.path);
    assert!((6 * 64 * 32..=512 * 32).contains(&all), "{all} MiB");
    assert_eq!(mapped(&backend, &disk.path.join("file0")), 64 * 32);
    // Two openers: the last one's end counts.
    let second = session.client().open(files[0].node, libc::O_RDWR).unwrap().fh;
    session.client().release(files[0].node, files[0].fh).unwrap();
    assert_eq!(mapped(&backend, &disk.path.join("file0")), 64 * 32);
    session.client().release(files[0].node, second).unwrap();
    common::wait_until(|| mapped(&backend, &disk.path.join("file0")) == 0, "a file without mappings");
    session.client().destroy().unwrap();
    common::wait_until(|| mapped(&backend, &disk.path) == 0, "a session without mappings");
}

#[test]
fn a_file_that_was_released_keeps_nothing_busy() {
    let disk = Disk::ext4(64, &WHOLE_PAGES);
    let (_backend, session) = serve(&disk.path, &ALWAYS, 1);
    let file = File::create(&session, "file", PAGE);
    file.warm(&_backend, 0, &[1; PAGE]);
    let read_only = || {
        Command::new("mount").args(["-o", "remount,ro"]).arg(&disk.path).output().unwrap().status.success()
    };
    assert!(!read_only(), "a file is open for writing");
    file.client.release(file.node, file.fh).unwrap();
    common::wait_until(read_only, "a file system that becomes read-only");
}
