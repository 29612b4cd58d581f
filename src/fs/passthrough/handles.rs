//! Open files and directories.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use rustix::io::Errno;

use super::budget::Held;
use super::inodes::Inode;
use super::io_mode::Mode;
use super::shards::{ByNumber, Shards};
use crate::blocking::block_in_place;
use crate::fs::Result;
use crate::fuse::ids::{HandleId, NodeId};

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// The inode it was opened from.
    pub inode: Arc<Inode>,
    file: Held,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    File(Mode),
    /// Where the directory's stream stands: only one reader at a time may move it.
    Directory(Mutex<u64>),
}

impl Handle {
    /// An open file, which the inode counts as an opener in `mode`.
    pub fn file(inode: Arc<Inode>, file: Held, mode: Mode) -> Handle {
        Handle { inode, file, kind: Kind::File(mode) }
    }

    /// An open directory, at its beginning.
    pub fn directory(inode: Arc<Inode>, file: Held) -> Handle {
        Handle { inode, file, kind: Kind::Directory(Mutex::new(0)) }
    }

    /// The open descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How the guest has the file open; `None` for a directory.
    pub fn mode(&self) -> Option<Mode> {
        match self.kind {
            Kind::File(mode) => Some(mode),
            Kind::Directory(_) => None,
        }
    }

    /// The offset of the directory's stream, locked; EBADF for a file.
    pub fn position(&self) -> Result<MutexGuard<'_, u64>> {
        match &self.kind {
            Kind::File(_) => Err(Errno::BADF),
            Kind::Directory(position) => Ok(match position.try_lock() {
                Ok(position) => position,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                // Another request lists the directory, which may take as long as the host likes.
                Err(TryLockError::WouldBlock) => {
                    block_in_place(|| position.lock().unwrap_or_else(PoisonError::into_inner))
                }
            }),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Kind::File(_) = self.kind
            && self.inode.io_mode.release()
        {
            self.inode.ranges.trim();
        }
    }
}

/// All handles of a session.
#[derive(Debug)]
pub struct HandleTable {
    shards: Shards<RwLock<HashMap<u64, Arc<Handle>, ByNumber>>>,
    next: AtomicU64,
}

impl Default for HandleTable {
    fn default() -> HandleTable {
        HandleTable { shards: Shards::default(), next: AtomicU64::new(1) }
    }
}

impl HandleTable {
    /// Adds a handle under a new id; ENOMEM if there is no memory for it.
    pub fn insert(&self, handle: Handle) -> Result<HandleId> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(id).write().unwrap_or_else(PoisonError::into_inner);
        shard.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        shard.insert(id, Arc::new(handle));
        Ok(HandleId(id))
    }

    /// The handle with this id, opened from `node`; EBADF for any other.
    pub fn get(&self, node: NodeId, id: HandleId) -> Result<Arc<Handle>> {
        let shard = self.shard(id.0).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&id.0).filter(|handle| handle.inode.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Removes a handle. Its descriptor is closed when the last request that uses it is done.
    pub fn remove(&self, node: NodeId, id: HandleId) -> Result<Arc<Handle>> {
        let mut shard = self.shard(id.0).write().unwrap_or_else(PoisonError::into_inner);
        if shard.get(&id.0).is_none_or(|handle| handle.inode.node != node) {
            return Err(Errno::BADF);
        }
        shard.remove(&id.0).ok_or(Errno::BADF)
    }

    /// Removes all handles.
    pub fn clear(&self) {
        for shard in self.shards.iter() {
            shard.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>, ByNumber>> {
        self.shards.of(id)
    }
}
