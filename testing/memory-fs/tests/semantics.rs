//! The file system in memory behaves as a guest expects of one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]

use std::ffi::CStr;
use std::time::Duration;

use fuse_protocol::extensions::Labels;
use fuse_protocol::flags::OpenRequestFlags;
use fuse_protocol::ids::{GuestGid, GuestUid, HandleId, LockOwner, NodeId, Unique};
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::request::{
    Fallocate, Flush, Lock, LockKind, Lookup, Mkdir, Mknod, Open, Release, Rename, Rmdir, Unlink,
};
use lanefsd::fs::{Context, FileSystem};
use lanefsd::state_file::Effects;
use lanefsd_memory_fs::MemoryFs;
use rustix::io::Errno;

const ROOT: NodeId = NodeId::ROOT;

fn context(unique: u64) -> Context<'static> {
    Context {
        unique: Unique(unique),
        uid: GuestUid(0),
        gid: GuestGid(0),
        pid: 1,
        supplementary_group: None,
        labels: Labels::default(),
        effects: Effects::NONE,
    }
}

fn name(name: &CStr) -> Name<'_> {
    Name::new(name).unwrap()
}

fn file(fs: &MemoryFs, called: &CStr) -> (NodeId, HandleId) {
    let mknod = Mknod { name: name(called), mode: libc::S_IFREG | 0o644, rdev: 0, umask: 0 };
    let node = fs.mknod(&context(1), ROOT, &mknod).unwrap().node;
    let open = Open { flags: libc::O_RDWR.cast_unsigned(), open_flags: OpenRequestFlags::empty() };
    let opened = fs.open(&context(1), node, &open);
    (node, opened.unwrap().handle)
}

fn lock(handle: HandleId, owner: u64, range: (u64, u64), kind: LockKind) -> Lock {
    let owner = LockOwner(owner);
    Lock { handle, owner, start: range.0, end: range.1, kind, pid: 1, flock: false }
}

fn find(fs: &MemoryFs, called: &CStr) -> Result<NodeId, Errno> {
    fs.lookup(&context(1), ROOT, &Lookup { name: LookupName::new(called).unwrap() }).map(|entry| entry.node)
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed_and_forgotten() {
    let fs = MemoryFs::new(4096);
    let (node, handle) = file(&fs, c"file");
    let fallocate =
        |length| fs.fallocate(&context(1), node, &Fallocate { handle, mode: 0, offset: 0, length });
    fallocate(4096).unwrap();
    fs.unlink(&context(1), ROOT, &Unlink { name: name(c"file") }).unwrap();
    assert_eq!(find(&fs, c"file"), Err(Errno::NOENT));
    assert_eq!(fallocate(4097), Err(Errno::NOSPC));
    let release = Release { handle, flags: Default::default(), lock_owner: LockOwner(1) };
    fs.release(&context(1), node, &release).unwrap();
    assert_eq!((fs.nodes(), fs.used()), (2, 4096));
    fs.forget(&context(0), node, 1);
    assert_eq!((fs.nodes(), fs.used()), (1, 0));
}

#[test]
fn renames_replace_and_exchange() {
    let fs = MemoryFs::new(4096);
    let ((a, _), (b, _)) = (file(&fs, c"a"), file(&fs, c"b"));
    let rename = |flags| {
        let rename = Rename { name: name(c"a"), new_parent: ROOT, new_name: name(c"b"), flags };
        fs.rename(&context(1), ROOT, &rename)
    };
    assert_eq!(rename(libc::RENAME_NOREPLACE), Err(Errno::EXIST));
    rename(libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((find(&fs, c"a"), find(&fs, c"b")), (Ok(b), Ok(a)));
    rename(0).unwrap();
    assert_eq!((find(&fs, c"a"), find(&fs, c"b")), (Err(Errno::NOENT), Ok(b)));
}

#[test]
fn a_directory_does_not_go_into_itself() {
    let fs = MemoryFs::new(4096);
    let outer =
        fs.mkdir(&context(1), ROOT, &Mkdir { name: name(c"outer"), mode: 0o755, umask: 0 }).unwrap().node;
    let inner =
        fs.mkdir(&context(1), outer, &Mkdir { name: name(c"inner"), mode: 0o755, umask: 0 }).unwrap().node;
    let rename = Rename { name: name(c"outer"), new_parent: inner, new_name: name(c"x"), flags: 0 };
    assert_eq!(fs.rename(&context(1), ROOT, &rename), Err(Errno::INVAL));
    assert_eq!(fs.rmdir(&context(1), ROOT, &Rmdir { name: name(c"outer") }), Err(Errno::NOTEMPTY));
}

#[test]
fn locks_are_cut_and_joined_by_owner() {
    let fs = MemoryFs::new(4096);
    let (node, handle) = file(&fs, c"file");
    let set = |owner, range, kind| fs.setlk(&context(1), node, &lock(handle, owner, range, kind));
    set(1, (0, 99), LockKind::Write).unwrap();
    set(1, (40, 59), LockKind::Unlock).unwrap();
    set(2, (40, 59), LockKind::Write).unwrap();
    assert_eq!(set(2, (39, 39), LockKind::Read), Err(Errno::AGAIN));
    let wanted = lock(handle, 2, (0, 99), LockKind::Write);
    let held = fs.getlk(&context(1), node, &wanted).unwrap();
    assert_eq!((held.start, held.end), (0, 39));
    fs.flush(&context(1), node, &Flush { handle, lock_owner: LockOwner(1) }).unwrap();
    assert_eq!(fs.held_locks(), 1);
    set(2, (0, 99), LockKind::Write).unwrap();
}

#[test]
fn waits_for_locks_end() {
    let fs = MemoryFs::new(4096);
    let (node, handle) = file(&fs, c"file");
    fs.setlk(&context(1), node, &lock(handle, 1, (0, 9), LockKind::Write)).unwrap();
    let wanted = lock(handle, 2, (0, 9), LockKind::Write);
    let alone = fs.clone().without_waiting();
    assert_eq!(alone.setlkw(&context(1), node, &wanted), Err(Errno::DEADLK));
    let until = |end: &dyn Fn()| {
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| fs.setlkw(&context(7), node, &wanted));
            while !waiter.is_finished() {
                end();
                std::thread::sleep(Duration::from_millis(1));
            }
            waiter.join().unwrap()
        })
    };
    assert_eq!(until(&|| fs.interrupt(Unique(7)).unwrap_or_default()), Err(Errno::INTR));
    assert_eq!(until(&|| fs.interrupt_all()), Err(Errno::INTR));
    let unlock = lock(handle, 1, (0, 9), LockKind::Unlock);
    assert_eq!(until(&|| fs.setlk(&context(1), node, &unlock).unwrap()), Ok(()));
}
