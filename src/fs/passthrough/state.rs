//! The state of one share, and nothing of the process.

use std::ffi::CString;
use std::sync::Arc;

use super::caller::identity::Identity;
use super::caller::set_id::KillPriv;
use super::handle_table::HandleTable;
use super::host::Host;
use super::host::file::Opener;
use super::inode::settler::MappedFiles;
use super::inode::{Inode, InodeTable, OwnerRecords};
use super::lock_waiters::LockWaiters;
use super::migrate::{Collector, SavedLocks};
use super::ops::growing::Growing;
use super::ops::mapped::Mapping;
use super::session::Session;
use crate::fs::passthrough::config::{CachePolicy, FsConfig};
use crate::fs::{Agreement, Result};
use crate::limits::LockedRangeQuota;
use fuse_protocol::ids::NodeId;

/// The file system below one directory of the host.
pub struct PassthroughFs {
    pub(super) config: FsConfig,
    pub(super) identity: Identity,
    pub(super) host: Host,
    pub(super) inodes: Arc<InodeTable>,
    pub(super) handles: HandleTable,
    pub(super) growing: Growing,
    pub(super) mapped_files: Arc<MappedFiles>,
    /// The options do not forbid it: see [`obstacle`](super::ops::mapped::obstacle).
    pub(super) writes_mapped: bool,
    pub(super) lock_waiters: LockWaiters,
    pub(super) locked_ranges: Arc<LockedRangeQuota>,
    pub(super) owner_records: Arc<OwnerRecords>,
    /// The host has ACLs, and they were asked for.
    pub(super) offers_acls: bool,
    /// The same with security labels.
    pub(super) offers_labels: bool,
    /// See [`KillPriv::mapped_capability`].
    pub(super) mapped_capability: Option<CString>,
    pub(super) agreement: Arc<Agreement>,
    /// Where inodes are, while a migration is prepared.
    pub(super) collector: Collector,
    pub(super) saved_locks: SavedLocks,
}

impl PassthroughFs {
    /// What INIT negotiated.
    pub(super) fn session(&self) -> Session {
        Session::new(&self.config, &self.agreement)
    }

    /// The inode with this id; ESTALE for one that the guest does not know.
    pub(super) fn inode(&self, node: NodeId) -> Result<Arc<Inode>> {
        self.inodes.get(node)
    }

    /// What a change does to set-id bits.
    pub(super) fn kill_priv(&self, session: &Session) -> KillPriv<'_> {
        KillPriv {
            identity: &self.identity,
            guest_says: session.says_who_clears,
            mapped_capability: self.mapped_capability.as_deref(),
            shows_capabilities: self.config.xattr,
        }
    }

    /// How files are written through mappings; `None` if none is.
    pub(super) fn mapping(&self) -> Option<Mapping<'_>> {
        let config = &self.config;
        self.writes_mapped.then(|| Mapping {
            policy: config.mapped_writes,
            is_alone: config.cache == CachePolicy::Always,
            files: &self.mapped_files,
            opener: self.opener(),
        })
    }

    /// Opens files once more.
    pub(super) fn opener(&self) -> Opener<'_> {
        Opener::new(&self.host, self.inodes.fds())
    }
}
