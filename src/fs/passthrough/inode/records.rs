//! The records of inodes and mounts in the state file, and how they change together with what this process has.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::shards::Shards;
use crate::state_file::{
    Index, InodeRecord, LongHandle, MountEntry, MountRecord, Slab, StateFile, StoredHandle,
};
use crate::sys::file_handles::FileHandle;

/// The records of one share.
#[derive(Debug)]
pub struct Records {
    inodes: Slab<InodeRecord>,
    long_handles: Slab<LongHandle>,
    mounts: Slab<MountRecord>,
    /// Locked while a descriptor or a handle of an inode changes, so that its record names the same.
    changes: Shards<Mutex<()>>,
}

/// The record of one inode. Nobody else has it until it is given back.
pub(super) type Record = Index<InodeRecord>;

impl Records {
    /// The records in `state`, some of which may be in use.
    pub fn new(state: &Arc<StateFile>) -> Arc<Records> {
        Arc::new(Records {
            inodes: Slab::new(state),
            long_handles: Slab::new(state),
            mounts: Slab::new(state),
            changes: Shards::default(),
        })
    }

    /// The state file.
    pub fn state(&self) -> &Arc<StateFile> {
        self.inodes.state()
    }

    /// The records of inodes.
    pub(super) fn inodes(&self) -> &Slab<InodeRecord> {
        &self.inodes
    }

    /// The records of mounts.
    pub(super) fn mounts(&self) -> &Slab<MountRecord> {
        &self.mounts
    }

    /// The record of an inode.
    #[inline]
    pub(super) fn inode(&self, record: Record) -> &InodeRecord {
        self.inodes.get(record)
    }

    /// Keeps other threads from changing the descriptor or the handle of the inode with this node id.
    pub(super) fn lock(&self, node: u64) -> MutexGuard<'_, ()> {
        self.changes.of(node).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle of an inode, if it is known.
    pub(super) fn handle(&self, record: Record) -> Option<FileHandle> {
        let stored = self.inode(record).handle(&self.long_handles)?;
        Some(FileHandle::new(stored.kind.into(), stored.bytes()))
    }

    /// Remembers the handle of an inode; false if it cannot be stored. The caller has locked the inode.
    pub(super) fn set_handle(&self, record: Record, handle: &FileHandle) -> bool {
        let stored = StoredHandle::new(handle.kind(), handle.bytes());
        stored.is_some_and(|stored| self.inode(record).set_handle(&stored, &self.long_handles))
    }

    /// The inode of a record is gone.
    pub(super) fn give_back(&self, record: Record) {
        self.inode(record).clear();
        self.inode(record).drop_handle(&self.long_handles);
        self.inodes.give_back(record);
    }

    /// A record for a mount; `None` if there are too many.
    pub(super) fn add_mount(&self, entry: &MountEntry) -> Option<Index<MountRecord>> {
        let record = self.mounts.take()?;
        self.mounts.get(record).store(entry);
        Some(record)
    }

    /// A mount is gone.
    pub(super) fn drop_mount(&self, record: Index<MountRecord>) {
        self.mounts.get(record).clear();
        self.mounts.give_back(record);
    }
}
