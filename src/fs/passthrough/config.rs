//! Options of the passthrough file system.

use std::time::Duration;

use crate::mapping::ids::{GidMap, UidMap};
use crate::mapping::xattrs::XattrMap;
use crate::migration::config::MigrationConfig;

/// Options of the passthrough file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsConfig {
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// Let the guest collect writes (WRITEBACK_CACHE).
    pub writeback: bool,
    /// With a cache policy that never caches data, allow shared mappings of files.
    pub allow_mmap: bool,
    /// Pass O_DIRECT of the guest's applications on to the host.
    pub allow_direct_io: bool,
    /// Who reads and writes data.
    pub io_engine: IoEngine,
    /// Serve TMPFILE (open(2) with O_TMPFILE).
    pub tmpfile: bool,
    /// Offer READDIRPLUS.
    pub readdirplus: bool,
    /// Serve extended attributes.
    pub xattr: bool,
    /// Whether inodes that are seldom used may be held by file handles instead of descriptors.
    pub inode_file_handles: InodeFileHandles,
    /// Let the guest evaluate POSIX ACLs.
    pub posix_acl: FeatureMode,
    /// Let the guest label what it creates.
    pub security_label: FeatureMode,
    /// Clear set-id bits where the guest asks for it, instead of by requests of its own.
    pub killpriv_v2: bool,
    /// Nothing of the share is to change, access times included.
    pub readonly: bool,
    /// Pass O_NOATIME of the guest's applications on to the host.
    pub preserve_noatime: bool,
    /// What extended attributes are called on the host; `None` for the guest's names.
    pub xattr_map: Option<XattrMap>,
    /// Take POSIX locks on the host.
    pub posix_lock: bool,
    /// Take flock(2) locks on the host.
    pub flock: bool,
    /// Tell the guest where another file system is mounted inside the share.
    pub announce_submounts: bool,
    /// Which files are opened for parallel direct writes.
    pub parallel_direct_writes: ParallelDirectWrites,
    /// Whether writes that extend such a file are parallel as well, in guests that can do that.
    pub parallel_extending: bool,
    /// Whether files are written through mappings.
    pub mapped_writes: MappedWrites,
    /// Users of guest and host.
    pub uid_map: UidMap,
    /// Groups of guest and host.
    pub gid_map: GidMap,
    /// How the share is saved, and what is asked of one that is loaded.
    pub migration: MigrationConfig,
}

impl Default for FsConfig {
    /// What an empty command line asks for.
    fn default() -> FsConfig {
        FsConfig {
            cache: CachePolicy::Auto,
            writeback: false,
            allow_mmap: false,
            allow_direct_io: false,
            io_engine: IoEngine::Auto,
            tmpfile: false,
            readdirplus: true,
            xattr: false,
            inode_file_handles: InodeFileHandles::Prefer,
            posix_acl: FeatureMode::Never,
            security_label: FeatureMode::Never,
            killpriv_v2: true,
            readonly: false,
            preserve_noatime: false,
            xattr_map: None,
            posix_lock: false,
            flock: false,
            announce_submounts: true,
            parallel_direct_writes: ParallelDirectWrites::Auto,
            parallel_extending: true,
            mapped_writes: MappedWrites::Auto,
            uid_map: UidMap::default(),
            gid_map: GidMap::default(),
            migration: MigrationConfig::default(),
        }
    }
}

/// Whether to use a feature that both the guest and the host must support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureMode {
    /// Do not use it.
    Never,
    /// Use it if both support it.
    Auto,
    /// Refuse to serve without it.
    Always,
}

/// What the guest may cache (`--cache`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nothing: timeouts are 0 and files are opened in direct mode.
    Never,
    /// Names and attributes, but no file data.
    Metadata,
    /// All, for a second; data is dropped when a file is opened and was changed meanwhile.
    Auto,
    /// All, for as long as the guest likes.
    Always,
}

impl CachePolicy {
    /// How long the guest may believe names and attributes.
    pub fn timeout(self) -> Duration {
        match self {
            CachePolicy::Never => Duration::ZERO,
            CachePolicy::Auto => Duration::from_secs(1),
            CachePolicy::Metadata | CachePolicy::Always => Duration::from_secs(86_400),
        }
    }

    /// Whether files are opened in direct mode, past the guest's page cache.
    pub fn bypasses_page_cache(self) -> bool {
        matches!(self, CachePolicy::Never | CachePolicy::Metadata)
    }
}

/// Whether inodes may be held by file handles (`--inode-file-handles`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InodeFileHandles {
    /// By descriptors only.
    Never,
    /// Where the host can do it.
    Prefer,
    /// Do not start where the host cannot.
    Mandatory,
}

/// Which files are opened for parallel direct writes (`--parallel-direct-writes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParallelDirectWrites {
    /// Files in direct mode: all that the cache policy opens so, or whose first opener asked for O_DIRECT.
    Auto,
    /// Every regular file.
    Always,
    /// None; the guest behaves as before the feature.
    Never,
}

/// Which files in parallel mode are written through mappings, where that pays (`--mapped-writes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedWrites {
    /// If nobody else changes the share, as [`MappedWrites::Always`]; otherwise none.
    Auto,
    /// Those of tmpfs, ext4 and XFS.
    Always,
    /// None.
    Never,
}

/// Who reads and writes data (`--io-engine`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring where many requests to a disk or a FUSE server are under way at once, and otherwise threads.
    Auto,
    /// Threads.
    Threads,
    /// io_uring, wherever it can.
    IoUring,
}
