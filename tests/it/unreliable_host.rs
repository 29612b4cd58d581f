//! The host under the daemon fails: it is full, limits files, loses the share, or ends the daemon.
//! Every request gets its own errno, the daemon lives on, and what was acknowledged is there.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;
use crate::common::disk::Disk;

const BLOCK: usize = 64 << 10;

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

/// Attack: a full disk.
/// Outcome: ENOSPC for each writer; what was taken is there.
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

/// Attack: many writers of one file on a full disk.
/// Outcome: ENOSPC for those who got no room.
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

/// Attack: a disk without inodes.
/// Outcome: ENOSPC for new files only.
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

/// Attack: a limit on the length of files.
/// Outcome: EFBIG.
#[test]
fn a_limit_on_the_length_of_files_is_efbig() {
    const LIMIT: u64 = 100_000;
    let (mut backend, session) = common::serve(&["--cache=never"]);
    let pid = Pid::from_raw(common::serving_process(backend.pid()).cast_signed());
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

/// What works in a share is done or refused with an errno, and each answer comes.
fn try_everything(client: Client<'_>, node: u64, fh: u64) -> Vec<(&'static str, Option<i32>)> {
    fn errno<T>(result: lanefsd_frontend::Result<T>) -> Option<i32> {
        result.err().map(|error| error.errno().unwrap_or_else(|| panic!("no answer: {error}")).0)
    }
    vec![
        ("getattr", errno(client.getattr(ROOT))),
        ("statfs", errno(client.statfs(ROOT))),
        ("lookup", errno(client.lookup(ROOT, "file"))),
        ("lookup of nothing", errno(client.lookup(ROOT, "nothing"))),
        ("create", errno(client.create(ROOT, "new", libc::O_RDWR, 0o600, 0))),
        ("mkdir", errno(client.mkdir(ROOT, "dir", 0o700, 0))),
        ("readdir", errno(client.opendir(ROOT).and_then(|dir| client.readdir(ROOT, dir.fh, 0, 4096)))),
        ("open", errno(client.open(node, libc::O_RDWR))),
        ("write", errno(client.write(node, fh, 0, b"written"))),
        ("read", errno(client.read(node, fh, 0, 7))),
        ("fsync", errno(client.fsync(node, fh, false))),
        ("release", errno(client.release(node, fh))),
    ]
}

/// Attack: the share removed.
/// Outcome: ENOENT for names; open files work.
#[test]
fn the_share_is_removed_under_the_daemon() {
    for sandbox in ["none", "chroot", "namespace"] {
        let directory = common::disk_directory();
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        let sandbox = format!("--sandbox={sandbox}");
        let mut backend = Backend::of(common::program()).args([&sandbox]).share(&share).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        fs::remove_dir_all(&share).unwrap();
        for (what, errno) in try_everything(client, entry.nodeid, open.fh) {
            let gone = ["lookup", "lookup of nothing", "create", "mkdir", "readdir"].contains(&what);
            // What is open or known is there as long as it is held, as on any Unix.
            assert_eq!(errno, gone.then_some(libc::ENOENT), "{what} with {sandbox}");
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Attack: the share unmounted lazily.
/// Outcome: service continues.
#[test]
fn the_share_is_unmounted_under_the_daemon() {
    let disk = Disk::ext4(24, &[]);
    for file_handles in ["never", "mandatory"] {
        let handles = format!("--inode-file-handles={file_handles}");
        let (mut backend, session) = serve(&disk.path, &[&handles], 1);
        let client = session.client();
        let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
        // Only a lazy unmount is possible: the daemon holds the file system.
        assert!(unmount(&disk.path, UnmountFlags::empty()).is_err());
        unmount(&disk.path, UnmountFlags::DETACH).unwrap();
        assert_eq!(fs::read_dir(&disk.path).unwrap().count(), 0, "the mount is still there");
        for (what, errno) in try_everything(client, entry.nodeid, open.fh) {
            let expected = (what == "lookup of nothing").then_some(libc::ENOENT);
            assert_eq!(errno, expected, "{what} with {file_handles}");
        }
        drop(session);
        backend.expect_success().unwrap();
        common::run(Command::new("mount").args(["-o", "loop"]).arg(disk.image()).arg(&disk.path));
        assert_eq!(fs::read(disk.path.join("file")).unwrap(), b"written");
        for name in ["file", "new"] {
            fs::remove_file(disk.path.join(name)).unwrap();
        }
        fs::remove_dir(disk.path.join("dir")).unwrap();
    }
}

/// Writes blocks of its own, with an fsync after every fifth, until the daemon is gone; returns how many
/// of them an acknowledged fsync covers.
fn write_and_sync(client: Client<'_>, writer: usize, acknowledged: &AtomicUsize) -> usize {
    let (entry, open) = client.create(ROOT, format!("file{writer}"), libc::O_RDWR, 0o600, 0).unwrap();
    let mut synced = 0;
    for number in 0..250 {
        let at = (number * BLOCK) as u64;
        if client.write(entry.nodeid, open.fh, at, &block(writer, number)).is_err() {
            break;
        }
        acknowledged.fetch_add(1, Ordering::SeqCst);
        if number % 5 == 4 {
            if client.fsync(entry.nodeid, open.fh, false).is_err() {
                break;
            }
            synced = number + 1;
        }
    }
    synced
}

/// Attack: SIGKILL and SIGTERM among writes.
/// Outcome: what an fsync covers is there.
#[test]
fn a_signal_in_the_middle_of_a_thousand_writes() {
    const WRITERS: usize = 4;
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let share = common::disk_directory();
        let mut backend = common::starter().args(["--cache=never"]).share(share.path()).start().unwrap();
        let timeout = Duration::from_secs(2);
        let options = SessionOptions { queues: 2, timeout, ..SessionOptions::default() };
        let session = backend.connect(options).unwrap();
        let acknowledged = AtomicUsize::new(0);
        let synced: Vec<usize> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (client, acknowledged) = (session.client().on(1 + writer % 2), &acknowledged);
                    scope.spawn(move || write_and_sync(client, writer, acknowledged))
                })
                .collect();
            let begin = Instant::now();
            while acknowledged.load(Ordering::SeqCst) < 300 {
                assert!(begin.elapsed() < Duration::from_secs(60), "the writes take too long");
                std::thread::sleep(Duration::from_millis(1));
            }
            backend.signal(signal).unwrap();
            let status = backend.wait(Duration::from_secs(10)).unwrap();
            match signal {
                libc::SIGKILL => assert_eq!(status.signal(), Some(signal)),
                _ => assert!(status.success(), "{status}: {}", backend.stderr()),
            }
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        assert!(acknowledged.load(Ordering::SeqCst) < 1000, "the signal came after the last write");
        assert!(synced.iter().sum::<usize>() > 0);
        for (writer, blocks) in synced.into_iter().enumerate() {
            let host = fs::read(share.path().join(format!("file{writer}"))).unwrap();
            for number in 0..blocks {
                let found = &host[number * BLOCK..(number + 1) * BLOCK];
                assert!(found == block(writer, number), "writer {writer}, block {number}");
            }
        }
        // Nothing of the first daemon keeps a second one from the share.
        let (_backend, session) = serve(share.path(), &[], 1);
        session.client().lookup(ROOT, "file0").unwrap();
    }
}
