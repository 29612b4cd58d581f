//! The read-only wrapper and the null store, around a real directory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod context;

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use fuse_protocol::flags::{
    InitFlags, OpenReplyFlags, OpenRequestFlags, ReleaseFlags, SetxattrFlags, WriteFlags,
};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::{DirectoryWriter, Entry};
use fuse_protocol::request::{
    Access, Create, Fallocate, Getattr, Link, Lookup, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release,
    Removexattr, Rename, Rmdir, Setattr, Setxattr, Symlink, Tmpfile, Unlink, Write,
};
use lanefsd::config::{CachePolicy, FsConfig};
use lanefsd::fs::null::NullStore;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::fs::read_only::ReadOnly;
use lanefsd::fs::{Context, FileSystem, Opened};
use lanefsd::limits::Limits;
use lanefsd::process;
use lanefsd::state_file::StateFile;
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use tempfile::TempDir;

use context::context;

const READ: u32 = libc::O_RDONLY.cast_unsigned();
const WRITE: u32 = libc::O_RDWR.cast_unsigned();
const TRUNCATE: u32 = libc::O_TRUNC.cast_unsigned();
const APPEND: u32 = libc::O_APPEND.cast_unsigned();
const EXCLUSIVE: u32 = libc::O_EXCL.cast_unsigned();

fn share() -> (TempDir, PassthroughFs) {
    let directory = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
    };
    let config = FsConfig {
        cache: CachePolicy::Never,
        writeback: true,
        xattr: true,
        announce_submounts: false,
        ..FsConfig::default()
    };
    let proc_self_fd = open("/proc/self/fd".as_ref());
    let fs = passthrough(open(directory.path()), proc_self_fd, config);
    (directory, fs)
}

fn passthrough(root: OwnedFd, proc_self_fd: OwnedFd, config: FsConfig) -> PassthroughFs {
    process::prepare_for_requests(&proc_self_fd).unwrap();
    let limits = Limits::of_the_process(&proc_self_fd).unwrap();
    PassthroughFs::new(root, proc_self_fd, limits, config, &StateFile::create().unwrap()).unwrap()
}

fn name(name: &CStr) -> Name<'_> {
    Name::new(name).unwrap()
}

fn create(new: &CStr, flags: u32) -> Create<'_> {
    Create { name: name(new), flags, mode: 0o100_644, umask: 0, open_flags: OpenRequestFlags::empty() }
}

fn look_up(fs: &impl FileSystem, entry: &CStr) -> Result<Entry, Errno> {
    fs.lookup(&context(), NodeId::ROOT, &Lookup { name: LookupName::Entry(name(entry)) })
}

fn set_size(size: u64) -> Setattr {
    Setattr { size: Some(size), ..Setattr::default() }
}

/// An OPEN with these `O_*` flags.
fn open_with(flags: u32) -> Open {
    Open { flags, open_flags: OpenRequestFlags::empty() }
}

/// Writes `size` bytes of 0xff.
fn write(fs: &impl FileSystem, node: NodeId, handle: HandleId, offset: u64, size: u32, flags: u32) -> usize {
    let mut bytes = vec![0xff_u8; size as usize];
    let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    // SAFETY: `bytes` outlives the reader and is not looked at before that is gone.
    let mut data = unsafe { GuestReader::new(&mut iov) };
    let write = Write { handle, offset, size, write_flags: WriteFlags::empty(), flags };
    fs.write(&context(), node, &write, &mut data).unwrap()
}

fn read(fs: &impl FileSystem, node: NodeId, handle: HandleId, offset: u64, size: u32) -> Vec<u8> {
    let mut bytes = vec![0xee_u8; size as usize];
    let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    // SAFETY: `bytes` outlives the writer and is not looked at before that is gone.
    let mut data = unsafe { GuestWriter::new(&mut iov) };
    let count = fs.read(&context(), node, &Read { handle, offset, size, flags: 0 }, &mut data).unwrap();
    bytes.truncate(count);
    bytes
}

fn size(fs: &impl FileSystem, node: NodeId) -> u64 {
    fs.getattr(&context(), node, &Getattr { handle: None }).unwrap().attr.size
}

fn new_file(fs: &impl FileSystem, new: &CStr) -> (NodeId, HandleId) {
    let (entry, opened) = fs.create(&context(), NodeId::ROOT, &create(new, WRITE)).unwrap();
    (entry.node, opened.handle)
}

fn close(fs: &impl FileSystem, node: NodeId, handle: HandleId) {
    let release = Release { handle, flags: ReleaseFlags::empty(), lock_owner: LockOwner(0) };
    fs.release(&context(), node, &release).unwrap();
}

#[test]
fn the_null_store_keeps_sizes_and_drops_data() {
    let (directory, fs) = share();
    let fs = NullStore::new(fs, Duration::ZERO);
    let (node, handle) = new_file(&fs, c"a");
    assert_eq!(write(&fs, node, handle, 1000, 500, WRITE), 500);
    assert_eq!(write(&fs, node, handle, 0, 500, WRITE), 500);
    assert_eq!(size(&fs, node), 1500);
    assert_eq!(look_up(&fs, c"a").unwrap().attributes.attr.size, 1500);
    assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), vec![0; 1500]);
    // The offset of an append means nothing.
    write(&fs, node, handle, 7, 100, WRITE | APPEND);
    assert_eq!(size(&fs, node), 1600);
    assert_eq!(read(&fs, node, handle, 1550, 100), vec![0; 50]);
    assert_eq!(read(&fs, node, handle, 1600, 100), Vec::<u8>::new());
    fs.setattr(&context(), node, &set_size(10)).unwrap();
    assert_eq!(read(&fs, node, handle, 0, 100), vec![0; 10]);
    write(&fs, node, handle, 5, 10, WRITE);
    assert_eq!(size(&fs, node), 15);
    // Another opener truncates.
    let second = fs.open(&context(), node, &open_with(WRITE | TRUNCATE)).unwrap();
    assert_eq!(read(&fs, node, handle, 0, 100), Vec::<u8>::new());
    fs.fallocate(&context(), node, &Fallocate { handle, mode: 0, offset: 0, length: 4096 }).unwrap();
    assert_eq!(read(&fs, node, second.handle, 0, 100).len(), 100);
    close(&fs, node, handle);
    close(&fs, node, second.handle);
    assert_eq!(size(&fs, node), 4096);
}

#[test]
fn the_null_store_writes_only_through_handles_opened_for_it() {
    let (_directory, fs) = share();
    let fs = NullStore::new(fs, Duration::ZERO);
    let (node, handle) = new_file(&fs, c"a");
    let Opened { handle: reader, .. } = fs.open(&context(), node, &open_with(READ)).unwrap();
    close(&fs, node, handle);
    for (node, handle) in [(node, reader), (node, handle), (NodeId::ROOT, reader)] {
        let write = Write { handle, offset: 0, size: 0, write_flags: WriteFlags::empty(), flags: 0 };
        // SAFETY: there are no segments.
        let mut data = unsafe { GuestReader::new(&mut []) };
        assert_eq!(fs.write(&context(), node, &write, &mut data), Err(Errno::BADF));
    }
}

#[test]
fn writes_that_grow_a_file_at_once_never_shrink_it() {
    let (_directory, fs) = share();
    let fs = NullStore::new(fs, Duration::ZERO);
    let (node, handle) = new_file(&fs, c"a");
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let fs = &fs;
            scope.spawn(move || {
                for i in 0..500 {
                    let end = (i * 4 + thread + 1) * 10;
                    write(fs, node, handle, end - 10, 10, WRITE);
                    assert!(size(fs, node) >= end);
                }
            });
        }
    });
    assert_eq!(size(&fs, node), 500 * 4 * 10);
}

#[test]
fn waits_of_the_null_store_overlap() {
    const LATENCY: Duration = Duration::from_millis(100);
    let (_directory, fs) = share();
    let fs = NullStore::new(fs, LATENCY);
    let (node, handle) = new_file(&fs, c"a");
    let barrier = Barrier::new(8);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (fs, barrier) = (&fs, &barrier);
            scope.spawn(move || {
                barrier.wait();
                write(fs, node, handle, thread * 10, 10, WRITE);
            });
        }
    });
    let took = begin.elapsed();
    assert!(took >= LATENCY && took < LATENCY * 4, "{took:?}");
}

#[test]
fn a_read_only_share_answers_as_a_read_only_mount() {
    let (directory, fs) = share();
    std::fs::write(directory.path().join("old"), "text").unwrap();
    std::os::unix::fs::symlink("old", directory.path().join("link")).unwrap();
    let fs = ReadOnly::new(fs);
    let ctx = context();
    let node = look_up(&fs, c"old").unwrap().node;
    let none = OpenRequestFlags::empty();
    for flags in [WRITE, libc::O_WRONLY.cast_unsigned(), READ | TRUNCATE] {
        assert_eq!(fs.open(&ctx, node, &open_with(flags)).unwrap_err(), Errno::ROFS);
    }
    let opened = fs.open(&ctx, node, &open_with(READ)).unwrap();
    assert!(opened.flags.contains(OpenReplyFlags::DIRECT_IO));
    assert_eq!(read(&fs, node, opened.handle, 0, 100), b"text");

    let root = NodeId::ROOT;
    for (new, errno) in [(c"old", Errno::EXIST), (c"new", Errno::ROFS)] {
        assert_eq!(
            fs.mkdir(&ctx, root, &Mkdir { name: name(new), mode: 0o755, umask: 0 }).unwrap_err(),
            errno
        );
        let mknod = Mknod { name: name(new), mode: 0o100_644, rdev: 0, umask: 0 };
        assert_eq!(fs.mknod(&ctx, root, &mknod).unwrap_err(), errno);
        assert_eq!(fs.symlink(&ctx, root, &Symlink { name: name(new), target: c"x" }).unwrap_err(), errno);
        assert_eq!(fs.link(&ctx, root, &Link { target: node, name: name(new) }).unwrap_err(), errno);
        assert_eq!(fs.create(&ctx, root, &create(new, READ | EXCLUSIVE)).unwrap_err(), errno);
        assert_eq!(fs.create(&ctx, root, &create(new, WRITE)).unwrap_err(), Errno::ROFS);
    }
    assert_eq!(fs.create(&ctx, root, &create(c"new", READ)).unwrap_err(), Errno::ROFS);
    let (entry, opened) = fs.create(&ctx, root, &create(c"old", READ)).unwrap();
    assert_eq!((entry.node, read(&fs, node, opened.handle, 0, 4).len()), (node, 4));

    let tmpfile = Tmpfile { flags: WRITE, mode: 0o100_644, umask: 0, open_flags: none };
    assert_eq!(fs.tmpfile(&ctx, root, &tmpfile).unwrap_err(), Errno::ROFS);
    assert_eq!(fs.unlink(&ctx, root, &Unlink { name: name(c"old") }), Err(Errno::ROFS));
    assert_eq!(fs.rmdir(&ctx, root, &Rmdir { name: name(c"old") }), Err(Errno::ROFS));
    let rename = Rename { name: name(c"old"), new_parent: root, new_name: name(c"new"), flags: 0 };
    assert_eq!(fs.rename(&ctx, root, &rename), Err(Errno::ROFS));
    assert_eq!(fs.setattr(&ctx, node, &set_size(0)).unwrap_err(), Errno::ROFS);
    let setxattr =
        Setxattr { name: c"user.a", value: b"b", flags: 0, setxattr_flags: SetxattrFlags::empty() };
    assert_eq!(fs.setxattr(&ctx, node, &setxattr), Err(Errno::ROFS));
    assert_eq!(fs.removexattr(&ctx, node, &Removexattr { name: c"user.a" }), Err(Errno::ROFS));
    let fallocate = Fallocate { handle: opened.handle, mode: 0, offset: 0, length: 10 };
    assert_eq!(fs.fallocate(&ctx, node, &fallocate), Err(Errno::ROFS));
    let link = look_up(&fs, c"link").unwrap().node;
    for inode in [root, node, link] {
        assert_eq!(fs.access(&ctx, inode, &Access { mask: 2 }), Err(Errno::ROFS));
    }
    assert_eq!(fs.access(&ctx, node, &Access { mask: 4 }), Ok(()));
    assert!(!fs.offered_flags().contains(InitFlags::WRITEBACK_CACHE));
    assert_eq!(std::fs::read(directory.path().join("old")).unwrap(), b"text");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}

/// A file system that lets everything happen, also what no wrapper knows of yet.
#[derive(Debug)]
struct Willing;

impl FileSystem for Willing {
    fn access(&self, _: &Context, _: NodeId, _: &Access) -> Result<(), Errno> {
        Ok(())
    }
}

#[test]
fn the_read_only_wrapper_passes_on_nothing_that_it_does_not_list() {
    // What has no method of its own in a wrapper is served by the file system below it.
    assert!(NullStore::new(Willing, Duration::ZERO).below().is_ok());
    assert_eq!(ReadOnly::new(Willing).below().map(drop), Err(Errno::NOSYS));
    assert_eq!(ReadOnly::new(Willing).access(&context(), NodeId::ROOT, &Access { mask: 4 }), Ok(()));
}

#[test]
fn a_read_only_share_keeps_its_access_times() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let old = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 1000, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 2000, tv_nsec: 0 },
    };
    let names = ["file", "dir"].map(|name| directory.path().join(name));
    std::fs::write(&names[0], "text").unwrap();
    std::fs::create_dir(&names[1]).unwrap();
    for readonly in [true, false] {
        for name in &names {
            rustix::fs::utimensat(CWD, name, &old, rustix::fs::AtFlags::empty()).unwrap();
        }
        let open = |path: &std::path::Path| -> OwnedFd {
            openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let config = FsConfig { readonly, ..FsConfig::default() };
        let fs = passthrough(open(directory.path()), open("/proc/self/fd".as_ref()), config);
        let fs = ReadOnly::new(fs);
        let node = look_up(&fs, c"file").unwrap().node;
        let opened = fs.open(&context(), node, &open_with(READ)).unwrap();
        assert_eq!(read(&fs, node, opened.handle, 0, 4), b"text");
        let dir = look_up(&fs, c"dir").unwrap().node;
        let listing = fs.opendir(&context(), dir, &Opendir { flags: 0 }).unwrap().handle;
        let mut buffer = Vec::new();
        let readdir = Readdir { handle: listing, offset: 0, size: 4096, plus: false };
        let mut writer = DirectoryWriter::new(&mut buffer, 4096, false);
        fs.readdir(&context(), dir, &readdir, &mut writer).unwrap();
        for name in &names {
            let read_at = std::os::unix::fs::MetadataExt::atime(&std::fs::metadata(name).unwrap());
            assert_eq!(read_at == 1000, readonly, "{name:?} was read at {read_at}");
        }
    }
}

/// What the wrapper does not name it refuses, or leaves out where nothing is answered: that has to be a decision.
#[test]
fn the_read_only_wrapper_names_every_method() {
    let methods = |source: &'static str| {
        source.lines().filter_map(|line| line.trim_start().strip_prefix("fn ")?.split(['(', '<']).next())
    };
    let (_, file_system) = include_str!("../src/fs/mod.rs").split_once("pub trait FileSystem").unwrap();
    let named: Vec<&str> = methods(include_str!("../src/fs/read_only.rs")).collect();
    let missing: Vec<&str> =
        methods(file_system).filter(|name| *name != "below" && !named.contains(name)).collect();
    assert!(methods(file_system).count() > 40 && missing.is_empty(), "{missing:?}");
}
