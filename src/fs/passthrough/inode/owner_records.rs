//! The records of lock owners in the state file.
//!
//! An owner's locks are not among them: the host's kernel keeps them with its open file, and tells.

use std::sync::Arc;

use crate::state_file::{
    Index, OwnerEntry, OwnerHandleEntry, OwnerHandleRecord, OwnerRecord, Slab, StateFile,
};

/// The records of all owners of a share, and of the handles that they have locked through.
#[derive(Debug)]
pub struct OwnerRecords {
    owners: Slab<OwnerRecord>,
    handles: Slab<OwnerHandleRecord>,
}

impl OwnerRecords {
    /// The records in `state`, some of which may be in use.
    pub fn new(state: &Arc<StateFile>) -> Arc<OwnerRecords> {
        Arc::new(OwnerRecords { owners: Slab::new(state), handles: Slab::new(state) })
    }

    /// All owners that are there.
    pub(super) fn owners(&self) -> Vec<(Index<OwnerRecord>, OwnerEntry)> {
        self.owners.used().filter_map(|index| Some((index, self.owners.get(index).load()?))).collect()
    }

    /// All handles that owners have locked through.
    pub(super) fn handles(&self) -> Vec<(Index<OwnerHandleRecord>, OwnerHandleEntry)> {
        self.handles.used().filter_map(|index| Some((index, self.handles.get(index).load()?))).collect()
    }

    /// Drops a handle whose owner is gone.
    pub(super) fn drop_handle(&self, handle: Index<OwnerHandleRecord>) {
        self.handles.get(handle).clear();
        self.handles.give_back(handle);
    }
}

/// The record of one owner, until it is dropped.
#[derive(Debug)]
pub(super) struct OwnerGuard {
    records: Arc<OwnerRecords>,
    index: Index<OwnerRecord>,
}

impl OwnerGuard {
    /// A new record; `None` if there are too many.
    pub(super) fn new(records: &Arc<OwnerRecords>, entry: &OwnerEntry) -> Option<OwnerGuard> {
        let index = records.owners.take()?;
        records.owners.get(index).store(entry);
        Some(OwnerGuard { records: Arc::clone(records), index })
    }

    /// A record that is there already.
    pub(super) fn restored(records: &Arc<OwnerRecords>, index: Index<OwnerRecord>) -> OwnerGuard {
        OwnerGuard { records: Arc::clone(records), index }
    }

    /// The owner has locked through this handle: `None` if there are too many.
    pub(super) fn add_handle(&self, handle: u64) -> Option<Index<OwnerHandleRecord>> {
        let index = self.records.handles.take()?;
        self.records.handles.get(index).store(&OwnerHandleEntry { owner: self.index, handle });
        Some(index)
    }

    /// The handle does not count any more.
    pub(super) fn drop_handle(&self, handle: Index<OwnerHandleRecord>) {
        self.records.drop_handle(handle);
    }

    /// The owner has no locks any more.
    pub(super) fn clear(&self) {
        self.records.owners.get(self.index).clear();
    }
}

impl Drop for OwnerGuard {
    fn drop(&mut self) {
        self.clear();
        self.records.owners.give_back(self.index);
    }
}
