//! Open files and directories.

pub mod listing;

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use rustix::io::Errno;

use self::listing::Listing;
use crate::fs::Result;
use crate::fs::passthrough::host::file::HostFile;
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::inode::io_mode::Mode;
use crate::fs::passthrough::inode::shards::{BuildIdHasher, Shards};
use crate::limits::MemoryQuota;
use crate::sync::blocking::block_in_place;
use fuse_protocol::ids::{HandleId, NodeId};

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    inode: Arc<Inode>,
    file: HostFile,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    File(Mode),
    /// One request at a time moves it.
    Directory(Mutex<Listing>),
}

impl Handle {
    /// An open file, which the inode counts as an opener. `mode` is that of this opener.
    pub fn new_file(inode: Arc<Inode>, file: HostFile, mode: Mode) -> Handle {
        Handle { inode, file, kind: Kind::File(mode) }
    }

    /// An open directory, at its beginning.
    pub fn new_directory(inode: Arc<Inode>, file: HostFile, listing: Listing) -> Handle {
        Handle { inode, file, kind: Kind::Directory(Mutex::new(listing)) }
    }

    /// The inode it was opened from.
    pub fn inode(&self) -> &Inode {
        &self.inode
    }

    /// The open file of the host.
    pub fn file(&self) -> &HostFile {
        &self.file
    }

    /// The open descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd()
    }

    /// How the guest has the file open; `None` for a directory.
    pub fn mode(&self) -> Option<Mode> {
        match self.kind {
            Kind::File(mode) => Some(mode),
            Kind::Directory(_) => None,
        }
    }

    /// The state of the directory's listing, locked; EBADF for a file.
    pub fn listing(&self) -> Result<MutexGuard<'_, Listing>> {
        match &self.kind {
            Kind::File(_) => Err(Errno::BADF),
            Kind::Directory(listing) => Ok(match listing.try_lock() {
                Ok(listing) => listing,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                // Another request lists the directory, which takes as long as the host needs.
                Err(TryLockError::WouldBlock) => {
                    block_in_place(|| listing.lock().unwrap_or_else(PoisonError::into_inner))
                }
            }),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Kind::File(_) = self.kind {
            self.inode.release();
        }
    }
}

/// All handles of a session.
#[derive(Debug)]
pub struct HandleTable {
    shards: Shards<RwLock<HashMap<u64, Arc<Handle>, BuildIdHasher>>>,
    next: AtomicU64,
    /// Memory that listings of all handles keep.
    memory: Arc<MemoryQuota>,
}

impl HandleTable {
    /// A table without handles, whose directories share `memory`.
    pub fn new(memory: Arc<MemoryQuota>) -> HandleTable {
        HandleTable { shards: Shards::default(), next: AtomicU64::new(1), memory }
    }

    /// A listing that was not begun.
    pub fn new_listing(&self) -> Listing {
        Listing::new(Arc::clone(&self.memory))
    }

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
        shard.get(&id.0).filter(|handle| handle.inode.node() == node).cloned().ok_or(Errno::BADF)
    }

    /// Removes a handle. Its descriptor is closed when the last request that uses it is done.
    pub fn remove(&self, node: NodeId, id: HandleId) -> Result<Arc<Handle>> {
        let mut shard = self.shard(id.0).write().unwrap_or_else(PoisonError::into_inner);
        if shard.get(&id.0).is_none_or(|handle| handle.inode.node() != node) {
            return Err(Errno::BADF);
        }
        shard.remove(&id.0).ok_or(Errno::BADF)
    }

    /// Removes all handles.
    pub fn clear(&self) {
        for shard in self.shards.iter() {
            // Their descriptors are closed when no lock is held.
            let handles = std::mem::take(&mut *shard.write().unwrap_or_else(PoisonError::into_inner));
            drop(handles);
        }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>, BuildIdHasher>> {
        self.shards.of(id)
    }
}
