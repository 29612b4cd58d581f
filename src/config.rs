//! The daemon's settings as plain, checked types. Nothing below this line knows a command line.

use std::path::PathBuf;
use std::time::Duration;

pub use crate::daemon::socket::Listen;
use crate::mapping::ids::{GidMap, UidMap};
use crate::mapping::xattrs::XattrMap;
use crate::remarks::Remark;
use rustix::thread::CapabilitySet;

/// With fewer descriptors there is no point in serving.
pub const LEAST_DESCRIPTORS: u64 = 64;

/// Everything a start of the daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The directory that the guest mounts.
    pub shared_dir: PathBuf,
    /// Where front ends connect.
    pub listen: Listen,
    /// Group that may connect to a socket that the daemon makes.
    pub socket_group: Option<String>,
    /// Wait for the next front end after one has left, instead of exiting.
    pub keep_listening: bool,
    /// The device.
    pub device: DeviceConfig,
    /// The file system.
    pub fs: FsConfig,
    /// Refuse whatever changes the share.
    pub readonly: bool,
    /// What stands behind the files.
    pub store: Store,
    /// How the daemon confines itself; `None` for the safest way that can be had.
    pub sandbox: Option<Sandbox>,
    /// The ids that exist in the namespace sandbox.
    pub id_maps: IdMaps,
    /// Action on a system call outside the allow list.
    pub seccomp: Seccomp,
    /// Changes to the capabilities that are kept.
    pub capabilities: CapabilityChanges,
    /// RLIMIT_NOFILE to set; `None` for as many descriptors as the host allows, 0 for those that it
    /// allows at the start.
    pub rlimit_nofile: Option<u64>,
    /// CPUs to run on; `None` for all.
    pub cpus: Option<Vec<usize>>,
    /// Most detailed messages that are printed; `None` leaves it to RUST_LOG.
    pub log_level: Option<log::LevelFilter>,
    /// Send messages to syslog instead of stderr.
    pub syslog: bool,
    /// What whoever starts the daemon should know about these settings.
    pub remarks: Vec<Remark>,
}

/// Settings of the virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Mount tag that the device's configuration space shows; without one there is no such space.
    pub tag: Option<String>,
    /// Request queues that are offered, 1 to 63; the guest uses as many as it likes.
    pub request_queues: usize,
    /// Most workers of one queue; 0 and 1 serve one request after the other.
    pub thread_pool_size: usize,
    /// How long a worker looks for the next request before it sleeps, where that has been paying.
    pub poll_time: Duration,
}

/// What stands behind the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The share itself.
    Host,
    /// For benchmarks: names and opens are real, written data is dropped after a delay.
    Null {
        /// How long a read or write takes.
        latency: Duration,
    },
}

/// How the daemon confines itself before it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// Own mount, PID and network namespaces, with the share as the root.
    Namespace,
    /// chroot(2) into the share; needs root.
    Chroot,
    /// No sandbox, only name validation.
    None,
}

/// The ids that exist in a user namespace; without any there is none but the daemon's own, as 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// Users.
    pub users: Vec<IdRange>,
    /// Groups.
    pub groups: Vec<IdRange>,
}

impl IdMaps {
    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }
}

/// Ids of a user namespace, one after the other, that stand for as many ids outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first inside.
    pub inside: u32,
    /// The first outside.
    pub outside: u32,
    /// How many, at least 1.
    pub count: u32,
}

/// Action on a system call outside the allow list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seccomp {
    /// Allow: no filter is installed.
    None,
    /// Kill the daemon.
    Kill,
    /// Allow, and record it in the kernel's log.
    Log,
    /// Raise SIGSYS, which a debugger can catch.
    Trap,
}

/// Changes to the capabilities that the daemon keeps while it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityChanges {
    /// Kept besides those that the other options need.
    pub add: CapabilitySet,
    /// Given up nevertheless.
    pub drop: CapabilitySet,
}

impl CapabilityChanges {
    /// None.
    pub const NONE: CapabilityChanges =
        CapabilityChanges { add: CapabilitySet::empty(), drop: CapabilitySet::empty() };
}

/// Settings of the passthrough file system.
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
    /// Users of guest and host.
    pub uid_map: UidMap,
    /// Groups of guest and host.
    pub gid_map: GidMap,
}

impl Default for FsConfig {
    /// What an empty command line asks for.
    fn default() -> FsConfig {
        FsConfig {
            cache: CachePolicy::Auto,
            writeback: false,
            allow_mmap: false,
            allow_direct_io: false,
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
            uid_map: UidMap::default(),
            gid_map: GidMap::default(),
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
