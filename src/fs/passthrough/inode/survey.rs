//! What a migration asks the table: all inodes, and by what others can find them.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use rustix::fs::Statx;

use super::search::{identity, is_same};
use super::table::ByKey;
use super::{Inode, InodeKey, InodeTable};
use crate::fs::Result;
use crate::fs::passthrough::host::{kind, stat};
use crate::state_file::StateFile;
use crate::sys::file_handles::{FileHandle, name_to_handle};
use fuse_protocol::ids::NodeId;

impl InodeTable {
    /// All inodes that the guest knows and that were found, with the root.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.make_rest();
        let mut all = Vec::with_capacity(self.len().saturating_add(1));
        all.push(Arc::clone(&self.root));
        for (shard, _) in self.all_shards() {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.iter().map(|entry| Arc::clone(&entry.0)));
        }
        all
    }

    /// The ids of all inodes that [`InodeTable::all`] returns, in ascending order, each with its lookups: read from the records,
    /// which lie one behind the other. While requests run, some may be missing.
    pub fn nodes(&self) -> Vec<(u64, u64)> {
        let all = self.records.inodes();
        let mut nodes = Vec::with_capacity(all.end());
        for record in all.used() {
            let record = self.records.inode(record);
            let Some(entry) = record.load() else { continue };
            let is_found = entry.descriptor.is_some() || record.has_handle();
            if is_found && (entry.lookups > 0 || entry.node == NodeId::ROOT.0) {
                nodes.push((entry.node, entry.lookups));
            }
        }
        // It takes little time where most are in order.
        nodes.sort();
        nodes
    }

    /// How often the guest has looked an inode up and not forgotten it.
    pub fn lookups_of(&self, inode: &Inode) -> u64 {
        self.record_of(inode).lookups()
    }

    /// The file handle of an inode; it stays the same.
    pub fn handle_of(&self, inode: &Inode) -> Result<FileHandle> {
        match self.records.handle(inode.fd.record()) {
            Some(handle) => Ok(handle),
            None => name_to_handle(inode.path()?.as_fd()),
        }
    }

    /// The inode that has the number of what was seen; it is a guess where the inode has no descriptor.
    pub fn known_as(&self, seen: &Statx) -> Option<Arc<Inode>> {
        let key = InodeKey::of(seen);
        if let Some(ByKey(inode)) = self.key_shard(&key).get(&key) {
            return (inode.kind == kind(seen)).then(|| Arc::clone(inode));
        }
        if !self.fd_cache.known_mount(key.mount).is_some_and(|mount| mount.numbers_alias()) {
            return None;
        }
        // The key has the number of the host's kernel. Such a mount has no file handles, so each inode is open.
        let is_it = |inode: &Arc<Inode>| {
            let now = inode.path().and_then(|path| stat(&*path));
            inode.kind == kind(seen) && now.is_ok_and(|now| is_same(&identity(seen), &identity(&now)))
        };
        self.all().into_iter().find(|inode| inode.key.mount == key.mount && is_it(inode))
    }

    /// The state file.
    pub fn state(&self) -> &Arc<StateFile> {
        self.records.state()
    }
}
