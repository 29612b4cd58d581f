//! The guest's locks on the host, which move with it.
//!
//! Source and destination may be on one host or on one cluster file system, where the destination cannot take what the
//! source still holds. So the source lets go of all locks when it has saved them. It goes on serving if the migration
//! fails: then it takes them again, before the first request ([`resume`]). A lock that somebody else took meanwhile is
//! lost: the guest gets EIO for the handles that it was taken through, as from an NFS client, since its program believes
//! that nobody else changes the file.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use log::warn;
use rustix::fs::{FlockOperation, flock};

use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::ops::locks::setlk;
use crate::fs::passthrough::state::PassthroughFs;
use crate::migration::config::OnError;
use crate::migration::{Lock, MigrationError};
use crate::sys::locks::{ByteLock, LockType};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::request::{Lock as LockRequest, LockKind};

/// The last byte of a lock on all that there will ever be, on the host.
const HOST_END: u64 = i64::MAX.unsigned_abs();

/// Whether the host has not the guest's locks just now, since they were saved.
#[derive(Debug, Default)]
pub struct SavedLocks(AtomicBool);

/// All locks of the guest. They are let go on the host, and stand in the state file for the process that goes on.
pub fn save(fs: &PassthroughFs) -> Vec<Lock> {
    let (mut locks, mut owners) = (Vec::new(), Vec::new());
    let mut inodes = HashSet::new();
    let handles = fs.handles.all();
    for (id, handle) in &handles {
        let (node, inode) = (handle.inode().node().0, handle.inode());
        if let Some(exclusive) = handle.flock() {
            locks.push(Lock { node, handle: *id, owner: None, start: 0, end: u64::MAX, exclusive });
        }
        if !inodes.insert(node) {
            continue;
        }
        for (owner, file) in inode.locks().all() {
            let (held, owner) = (file.locks(), (owner, file.process()));
            for (number, handle) in file.through().into_iter().enumerate() {
                // All through one handle; through each other one a lock that the owner has by then tells of the handle. A
                // guest may have as many of each as it likes, and not of their product.
                let through = held.iter().take(if number == 0 { usize::MAX } else { 1 });
                locks.extend(through.map(|lock| of_host(node, handle, owner, lock)));
            }
            owners.push(file);
        }
    }
    if locks.is_empty() {
        return locks;
    }
    let kept = postcard::to_stdvec(&locks).is_ok_and(|bytes| fs.inodes.state().set_saved_locks(&bytes));
    if !kept {
        warn!("the guest has too many locks to keep them if this process dies before the guest goes on here");
    }
    fs.saved_locks.0.store(true, Ordering::SeqCst);
    for (_, handle) in handles.iter().filter(|(_, handle)| handle.flock().is_some()) {
        let _ = flock(handle.fd(), FlockOperation::Unlock);
    }
    for owner in owners {
        let _ = owner.let_go();
    }
    locks
}

/// Goes on after a process that has saved the share. The guest has its locks, and the host has not.
pub fn restore(fs: &PassthroughFs) {
    let Ok(locks) = postcard::from_bytes::<Vec<Lock>>(&fs.inodes.state().saved_locks()) else { return };
    for lock in locks {
        let Ok(handle) = fs.handles.get(NodeId(lock.node), HandleId(lock.handle)) else { continue };
        let Some((owner, _)) = lock.owner else {
            handle.set_flock(Some(lock.exclusive));
            continue;
        };
        if let Some(file) = handle.inode().locks().find(LockOwner(owner)) {
            let kind = if lock.exclusive { LockType::Write } else { LockType::Read };
            file.remember(&ByteLock { kind, start: lock.start, end: lock.end.min(HOST_END) });
        }
    }
    fs.saved_locks.0.store(true, Ordering::SeqCst);
}

fn of_host(node: u64, handle: u64, owner: (u64, u32), lock: &ByteLock) -> Lock {
    let end = if lock.end >= HOST_END { u64::MAX } else { lock.end };
    Lock { node, handle, owner: Some(owner), start: lock.start, end, exclusive: lock.kind == LockType::Write }
}

/// The share is served again after it was saved: takes the guest's locks on the host once more.
pub fn resume(fs: &PassthroughFs) {
    if !fs.saved_locks.0.swap(false, Ordering::SeqCst) {
        return;
    }
    let mut inodes = HashSet::new();
    for (id, handle) in fs.handles.all() {
        let kept = match handle.flock() {
            Some(true) => flock(handle.fd(), FlockOperation::NonBlockingLockExclusive),
            Some(false) => flock(handle.fd(), FlockOperation::NonBlockingLockShared),
            None => Ok(()),
        };
        if kept.is_err() {
            lose(fs, id, &handle);
        }
        if !inodes.insert(handle.inode().node()) {
            continue;
        }
        for (_, file) in handle.inode().locks().all() {
            if file.take_again().is_err() {
                file.through().into_iter().for_each(|id| lose(fs, id, &handle));
            }
        }
    }
    fs.inodes.state().clear_saved_locks();
}

fn lose(fs: &PassthroughFs, id: u64, handle: &Handle) {
    let node = handle.inode().node();
    warn!("handle {id} of node {} has lost its lock to another process: the guest gets EIO for it", node.0);
    handle.inode().locks().drop_handle(HandleId(id));
    fs.handles.lose(node, HandleId(id));
}

/// Takes the locks of a snapshot, whose handles are open.
pub fn load(fs: &PassthroughFs, locks: &[Lock]) -> Result<(), MigrationError> {
    let open = |lock: &Lock| {
        let id = HandleId(lock.handle);
        Some((id, fs.handles.get(NodeId(lock.node), id).ok()?))
    };
    let of_owners: HashMap<_, _> =
        locks.iter().filter_map(|lock| Some(((lock.node, lock.owner?.0), open(lock)?.0))).collect();
    for lock in locks {
        let node = NodeId(lock.node);
        // The guest has an error for a handle that could not be opened. Its owner may have others.
        let other = || {
            let id = *of_owners.get(&(lock.node, lock.owner?.0))?;
            Some((id, fs.handles.get(node, id).ok()?))
        };
        let Some((id, handle)) = open(lock).or_else(other) else { continue };
        let (owner, pid) = lock.owner.unwrap_or_default();
        let request = LockRequest {
            handle: id,
            owner: LockOwner(owner),
            start: lock.start,
            end: lock.end.min(HOST_END),
            kind: if lock.exclusive { LockKind::Write } else { LockKind::Read },
            pid,
            flock: lock.owner.is_none(),
        };
        let Err(errno) = setlk(fs, &handle, &request, None) else { continue };
        if fs.config.migration.on_error == OnError::Abort {
            let kind = if request.flock { "flock" } else { "POSIX" };
            return Err(MigrationError(format!(
                "a {kind} lock that the guest holds on node {} cannot be taken here: {errno}",
                node.0
            )));
        }
        lose(fs, id.0, &handle);
    }
    Ok(())
}
