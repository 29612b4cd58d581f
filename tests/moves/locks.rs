//! Locks move with the guest, and a host's lock is never held twice.

use std::fs::{self, File};

use fuse_protocol::request::LockKind;
use lanefsd::fs::FileSystem;
use lanefsd::migration::config::OnError;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::guest::{Options, Share, alone, directory};

const ALL: (u64, u64) = (0, i64::MAX.unsigned_abs());

#[test]
fn locks_are_held_on_the_other_side_and_end_with_their_owners() {
    let _alone = alone();
    let folder = directory();
    let options = Options::default();
    let source = Share::new(folder.path(), &options);
    source.begin();
    let (node, handle) = source.create(1, b"file").unwrap();
    let whole = source.open(node).unwrap();
    source.lock(node, handle, 5, (10, 19)).unwrap();
    source.lock(node, handle, 5, (30, 39)).unwrap();
    source.lock(node, whole, 6, (100, ALL.1)).unwrap();
    source.flock(node, whole, LockKind::Write).unwrap();

    let snapshot = source.fs.save().unwrap();
    assert_eq!(snapshot.locks.len(), 4);
    assert_eq!(snapshot.locks.iter().filter(|lock| lock.owner.is_none()).count(), 1);
    assert!(snapshot.locks.iter().any(|lock| lock.owner == Some((6, 77)) && lock.end == u64::MAX));
    let target = Share::new(folder.path(), &options);
    // Beside the source, which has let go.
    target.load(snapshot).unwrap();
    let other = target.open(node).unwrap();
    assert_eq!(target.lock(node, other, 7, (15, 15)).unwrap_err(), Errno::AGAIN);
    assert_eq!(target.holder(node, other, 7, (39, 39)).unwrap(), 77);
    assert_eq!(target.lock(node, other, 7, (5000, 5000)).unwrap_err(), Errno::AGAIN);
    target.lock(node, other, 7, (20, 29)).unwrap();
    assert_eq!(target.flock(node, other, LockKind::Read).unwrap_err(), Errno::AGAIN);
    // The owner's own, which it can extend.
    target.lock(node, handle, 5, (0, 19)).unwrap();
    target.close(node, whole).unwrap();
    target.lock(node, other, 7, (5000, 5000)).unwrap();
    target.flock(node, other, LockKind::Write).unwrap();
    target.close(node, handle).unwrap();
    target.lock(node, other, 7, ALL).unwrap();
}

#[test]
fn the_source_has_its_locks_again_when_it_goes_on() {
    let _alone = alone();
    let folder = directory();
    let source = Share::new(folder.path(), &Options::default());
    source.begin();
    let (node, handle) = source.create(1, b"file").unwrap();
    let (lost_node, lost) = source.create(1, b"lost").unwrap();
    source.lock(node, handle, 5, (10, 19)).unwrap();
    source.flock(node, handle, LockKind::Write).unwrap();
    source.flock(lost_node, lost, LockKind::Read).unwrap();
    let host = File::open(folder.path().join("file")).unwrap();
    assert_eq!(flock(&host, FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN));
    drop(source.fs.save().unwrap());
    // The guest still stands, and a destination may take them.
    source.fs.cancel_save();
    // Somebody else takes one for good, and one for a moment.
    let thief = File::open(folder.path().join("lost")).unwrap();
    flock(&thief, FlockOperation::NonBlockingLockExclusive).unwrap();
    flock(&host, FlockOperation::NonBlockingLockShared).unwrap();
    flock(&host, FlockOperation::Unlock).unwrap();
    source.fs.resume();
    assert_eq!(flock(&host, FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN));
    let other = source.open(node).unwrap();
    assert_eq!(source.lock(node, other, 6, (12, 12)).unwrap_err(), Errno::AGAIN);
    source.write(node, handle, 0, b"still mine").unwrap();
    // What was lost is an error, until it is closed.
    assert_eq!(source.write(lost_node, lost, 0, b"x").unwrap_err(), Errno::IO);
    assert_eq!(source.read(lost_node, lost).unwrap_err(), Errno::IO);
    let _ = source.close(lost_node, lost);
    let again = source.open(lost_node).unwrap();
    source.write(lost_node, again, 0, b"x").unwrap();
}

#[test]
fn a_lock_that_another_process_took_follows_the_policy() {
    let _alone = alone();
    for on_error in [OnError::Abort, OnError::GuestError] {
        let folder = directory();
        let options = Options { on_error, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let (node, handle) = source.create(1, b"file").unwrap();
        let free = source.open(node).unwrap();
        source.flock(node, handle, LockKind::Write).unwrap();
        let snapshot = source.fs.save().unwrap();
        let thief = File::open(folder.path().join("file")).unwrap();
        flock(&thief, FlockOperation::NonBlockingLockShared).unwrap();
        let target = Share::new(folder.path(), &options);
        match (target.load(snapshot), on_error) {
            (Err(error), OnError::Abort) => {
                assert!(error.to_string().contains("lock"), "{error}");
                assert_eq!(target.fds(), target.own_fds);
            }
            (Ok(()), OnError::GuestError) => {
                assert_eq!(target.write(node, handle, 0, b"x").unwrap_err(), Errno::IO);
                target.write(node, free, 0, b"x").unwrap();
            }
            (result, _) => panic!("{result:?}"),
        }
        fs::remove_file(folder.path().join("file")).unwrap();
    }
}
