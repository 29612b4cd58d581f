//! Two file systems in one process: neither takes anything from the other, or from the process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod context;

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use fuse_protocol::flags::{OpenRequestFlags, ReleaseFlags, WriteFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::Entry;
use fuse_protocol::request::{Create, Lock, LockKind, Lookup, Open, Read, Release, Write};
use lanefsd::config::{FsConfig, InodeFileHandles};
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::fs::{FileSystem, Opened};
use lanefsd::limits::{FdQuota, Limits, LockedRangeQuota};
use lanefsd::process;
use lanefsd::state_file::StateFile;
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use tempfile::TempDir;

use context::context;

/// Descriptors of each share.
const FDS: usize = 40;
/// Byte ranges that may be locked in each share.
const RANGES: usize = 3;
const READ_WRITE: u32 = libc::O_RDWR.cast_unsigned();

/// Umask and working directory belong to the process, so only one test at a time may look at them.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// A file system over a directory of its own, with limits of its own.
struct Share {
    fs: PassthroughFs,
    limits: Limits,
    directory: TempDir,
}

impl Share {
    fn new() -> Share {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let locked_ranges = Arc::new(LockedRangeQuota::new(RANGES));
        let limits = Limits { locked_ranges, ..Limits::new(FdQuota::new(FDS, 0)) };
        // No inode can be evicted, so that each takes its descriptor.
        let inode_file_handles = InodeFileHandles::Never;
        let config = FsConfig { inode_file_handles, posix_lock: true, ..FsConfig::default() };
        let proc_self_fd = open(Path::new("/proc/self/fd"));
        let fs = PassthroughFs::new(
            open(directory.path()),
            proc_self_fd,
            limits.clone(),
            config,
            &StateFile::create().unwrap(),
        )
        .unwrap();
        Share { fs, limits, directory }
    }

    /// Two that are ready for requests.
    fn two() -> [Share; 2] {
        process::prepare_for_requests(&open(Path::new("/proc/self/fd"))).unwrap();
        [Share::new(), Share::new()]
    }

    fn look_up(&self, name: &CStr) -> Result<Entry, Errno> {
        self.fs.lookup(
            &context(),
            NodeId::ROOT,
            &Lookup { name: LookupName::Entry(Name::new(name).unwrap()) },
        )
    }

    fn create(&self, name: &CStr) -> Result<File<'_>, Errno> {
        let (flags, open_flags) = (READ_WRITE, OpenRequestFlags::empty());
        let create = Create { name: Name::new(name).unwrap(), flags, mode: 0o100_644, umask: 0, open_flags };
        let (entry, opened) = self.fs.create(&context(), NodeId::ROOT, &create)?;
        Ok(self.file(entry.node, &opened))
    }

    fn open(&self, name: &CStr) -> Result<File<'_>, Errno> {
        let node = self.look_up(name)?.node;
        let opened = self.fs.open(
            &context(),
            node,
            &Open { flags: READ_WRITE, open_flags: OpenRequestFlags::empty() },
        );
        opened.map(|opened| self.file(node, &opened)).inspect_err(|_| self.fs.forget(&context(), node, 1))
    }

    fn file(&self, node: NodeId, opened: &Opened) -> File<'_> {
        File { share: self, node, handle: opened.handle }
    }

    fn host_path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn fds(&self) -> usize {
        self.limits.fds.in_use()
    }
}

/// An open file that was looked up once.
struct File<'a> {
    share: &'a Share,
    node: NodeId,
    handle: HandleId,
}

impl File<'_> {
    fn write(&self, text: &[u8]) -> Result<usize, Errno> {
        let mut bytes = text.to_vec();
        let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: `bytes` outlives the reader and is not looked at before that is gone.
        let mut data = unsafe { GuestReader::new(&mut iov) };
        let size = u32::try_from(text.len()).unwrap();
        let write = Write {
            handle: self.handle,
            offset: 0,
            size,
            write_flags: WriteFlags::empty(),
            flags: READ_WRITE,
        };
        self.share.fs.write(&context(), self.node, &write, &mut data)
    }

    fn read(&self) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; 100];
        let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: `bytes` outlives the writer and is not looked at before that is gone.
        let mut data = unsafe { GuestWriter::new(&mut iov) };
        let read = Read { handle: self.handle, offset: 0, size: 100, flags: READ_WRITE };
        let count = self.share.fs.read(&context(), self.node, &read, &mut data)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    fn lock(&self, byte: u64) -> Result<(), Errno> {
        let (handle, kind) = (self.handle, LockKind::Write);
        let lock = Lock { handle, owner: LockOwner(1), start: byte, end: byte, kind, pid: 1, flock: false };
        self.share.fs.setlk(&context(), self.node, &lock)
    }

    fn close(self) {
        let (flags, lock_owner) = (ReleaseFlags::empty(), LockOwner(0));
        let release = Release { handle: self.handle, flags, lock_owner };
        self.share.fs.release(&context(), self.node, &release).unwrap();
        self.share.fs.forget(&context(), self.node, 1);
    }
}

/// Umask, working directory and limits, as the kernel shows them, without figures that change by themselves.
fn process_state() -> String {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap();
    let status = read("status");
    let kept = ["Umask", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapAmb", "SigIgn"];
    let of_status = status.lines().filter(|line| kept.iter().any(|name| line.starts_with(name)));
    let cwd = std::fs::read_link("/proc/self/cwd").unwrap();
    format!("{}\n{}\n{}", of_status.collect::<Vec<_>>().join("\n"), read("limits"), cwd.display())
}

#[test]
fn the_constructor_leaves_the_process_as_it_is() {
    let _alone = alone();
    rustix::process::umask(Mode::from_raw_mode(0o027));
    rustix::process::chdir("/").unwrap();
    let before = process_state();
    assert!(before.contains("Umask:\t0027"), "{before}");
    let shares = [Share::new(), Share::new()];
    assert_eq!(process_state(), before);
    // The root of each.
    assert_eq!(shares.each_ref().map(Share::fds), [1, 1]);
    drop(shares);
    assert_eq!(process_state(), before);
}

#[test]
fn shares_that_are_used_in_turn_keep_their_files_apart() {
    let _alone = alone();
    let shares = Share::two();
    let files = shares.each_ref().map(|share| share.create(c"file").unwrap());
    for round in 0..10u8 {
        for (number, file) in (0u8..).zip(&files) {
            file.write(&[round, number]).unwrap();
        }
        for (number, file) in (0u8..).zip(&files) {
            assert_eq!(file.read().unwrap(), [round, number]);
        }
    }
    let [first, second] = &shares;
    first.create(c"only-here").unwrap().close();
    assert!(first.look_up(c"only-here").is_ok());
    assert_eq!(second.look_up(c"only-here").unwrap_err(), Errno::NOENT);
    assert!(first.host_path("only-here").exists() && !second.host_path("only-here").exists());
    // The end of one session closes nothing of the other.
    first.fs.destroy();
    assert_eq!(files[0].read().unwrap_err(), Errno::BADF);
    assert_eq!(files[1].read().unwrap(), [9, 1]);
    assert_eq!(shares.each_ref().map(Share::fds), [1, 3]);
}

/// Creates, writes, reads and forgets files until `done`; returns how many.
fn work(share: &Share, worker: usize, done: &AtomicBool) -> usize {
    let mut rounds = 0;
    while !done.load(Ordering::Relaxed) || rounds < 50 {
        let name = CString::new(format!("file-{worker}-{rounds}")).unwrap();
        let text = format!("{} {worker} {rounds}", share.directory.path().display());
        let file = share.create(&name).unwrap();
        file.write(text.as_bytes()).unwrap();
        assert_eq!(file.read().unwrap(), text.as_bytes());
        file.close();
        rounds += 1;
    }
    rounds
}

#[test]
fn shares_that_are_used_at_once_count_apart() {
    let _alone = alone();
    let shares = Share::two();
    let done = AtomicBool::new(true);
    thread::scope(|scope| {
        for share in &shares {
            for worker in 0..3 {
                let done = &done;
                scope.spawn(move || work(share, worker, done));
            }
        }
    });
    assert_eq!(shares.each_ref().map(Share::fds), [1, 1]);
    for share in &shares {
        assert_eq!(std::fs::read_dir(share.directory.path()).unwrap().count(), 3 * 50);
    }
}

#[test]
fn a_share_that_has_used_up_its_quota_leaves_the_other_alone() {
    let _alone = alone();
    let [first, second] = Share::two();
    first.create(c"file").unwrap().close();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let others = scope.spawn(|| work(&second, 0, &done));
        for _ in 0..20 {
            let mut open = Vec::new();
            let errno = loop {
                match first.open(c"file") {
                    Ok(file) => open.push(file),
                    Err(errno) => break errno,
                }
            };
            // The root's, the inode's, and one for each handle.
            assert_eq!((errno, open.len(), first.fds()), (Errno::MFILE, FDS - 2, FDS));
            assert_eq!(first.create(c"another").err(), Some(Errno::MFILE));
            assert!(!first.host_path("another").exists());
            open.into_iter().for_each(File::close);
            assert_eq!(first.fds(), 1);
        }
        done.store(true, Ordering::Relaxed);
        assert!(others.join().unwrap() >= 50);
    });
    assert_eq!(second.fds(), 1);
}

#[test]
fn locked_ranges_are_counted_by_each_share() {
    let _alone = alone();
    let shares = Share::two();
    let files = shares.each_ref().map(|share| share.create(c"file").unwrap());
    let bytes = || (0u64..).step_by(2).take(RANGES);
    bytes().for_each(|byte| files[0].lock(byte).unwrap());
    assert_eq!(files[0].lock(100), Err(Errno::NOLCK));
    bytes().for_each(|byte| files[1].lock(byte).unwrap());
    assert_eq!(shares.each_ref().map(|share| share.limits.locked_ranges.in_use()), [RANGES; 2]);
}
