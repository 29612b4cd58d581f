//! What moves to another daemon when a VM is migrated or saved: all that the guest can name in a share.
//!
//! The file system makes a [`Snapshot`] of itself, and another one takes it over ([`crate::fs::FileSystem::save`] and
//! `load`); how it lies in a stream is for the formats beside this. Nothing here knows descriptors or the host's state
//! file: the snapshot is the state in the form in which another host can read it.

mod bytes;
pub mod config;
pub mod format;

use serde::{Deserialize, Serialize};

/// All that the guest knows of one share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What INIT negotiated; `None` if the guest has no session, and then nothing else is here either.
    pub session: Option<Session>,
    /// The root is among them, unless there is no session.
    pub inodes: Vec<Inode>,
    /// Open files and directories.
    pub handles: Vec<Handle>,
    /// POSIX and flock locks that the guest holds.
    pub locks: Vec<Lock>,
    /// The next node id that is free; 0 if all above the highest one are.
    pub next_node: u64,
    /// The next handle id that is free; 0 if all above the highest one are.
    pub next_handle: u64,
    /// Paths of mounts, by the mount numbers in [`Location::Handle`]; for messages, and to find them elsewhere.
    pub mounts: Vec<(u64, Vec<u8>)>,
}

/// All that a device gives to another one: the share, and requests that have no reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The share.
    pub share: Snapshot,
    /// Queues whose rings do not say all.
    pub queues: Vec<Waiting>,
}

/// Requests of one queue that wait, for a file lock in most cases, and that no index of the ring leads to: later ones have
/// their replies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Number of the queue; 0 is the high-priority queue.
    pub queue: u8,
    /// Guest-physical addresses of descriptor table, available ring and used ring.
    pub ring: [u64; 3],
    /// Descriptors.
    pub size: u16,
    /// Index of the next available chain.
    pub next_available: u16,
    /// The used index.
    pub used_index: u16,
    /// The first descriptor of each chain, the oldest one first.
    pub heads: Vec<u16>,
}

/// What INIT negotiated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The FUSE minor version; `None` in streams that do not say it.
    pub minor: Option<u32>,
    /// FUSE INIT flags that both sides have; `None` where only those below are known.
    pub flags: Option<u64>,
    /// FUSE_WRITEBACK_CACHE.
    pub writeback: bool,
    /// FUSE_SUBMOUNTS.
    pub submounts: bool,
    /// FUSE_POSIX_ACL.
    pub posix_acl: bool,
    /// FUSE_CREATE_SUPP_GROUP.
    pub create_supp_group: bool,
}

/// An inode that the guest has looked up, or that others are found through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    /// The guest's number.
    pub node: u64,
    /// How often the guest has looked it up and not forgotten it; 0 for one that is here only as somebody's parent.
    pub lookups: u64,
    /// Where it is.
    pub location: Location,
    /// What it has to be, where that is known.
    pub identity: Option<Identity>,
    /// Its file handle beside a path, to verify with.
    pub handle: Option<FileHandle>,
}

/// Where an inode is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Location {
    /// The root of the share.
    Root,
    /// A name in a directory that is in the snapshot too.
    Child {
        /// The directory's node id.
        parent: u64,
        /// One component, any bytes but `/` and NUL.
        #[serde(with = "bytes")]
        name: Vec<u8>,
    },
    /// A path below the root, without a leading `/`.
    Path(#[serde(with = "bytes")] Vec<u8>),
    /// By open_by_handle_at(2).
    Handle(FileHandle),
    /// It cannot be found; the guest gets ESTALE or EIO for it. The text says why: [`NO_NAME`] for what exists no more but
    /// on the source.
    Lost(String),
    /// A regular file that has no name any more, with its content: for one that only the guest keeps open.
    Unlinked(Box<Unlinked>),
}

/// In [`Location::Lost`]: it was removed, and only the guest's memory of it is left.
pub const NO_NAME: &str = "it has no name any more";

/// A file handle as name_to_handle_at(2) gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHandle {
    /// The source's number for the mount: [`Snapshot::mounts`].
    pub mount: u64,
    /// `handle_type`.
    pub kind: i32,
    /// `f_handle`.
    #[serde(with = "bytes")]
    pub bytes: Vec<u8>,
}

/// A file without a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unlinked {
    /// Permissions and set-id bits.
    pub mode: u32,
    /// Its owner on the host.
    pub uid: u32,
    /// Its group on the host.
    pub gid: u32,
    /// Its length in bytes, also where it ends with a hole.
    pub size: u64,
    /// Offset and bytes of what is not a hole.
    #[serde(with = "bytes::numbered")]
    pub extents: Vec<(u64, Vec<u8>)>,
}

/// What tells an inode from another one that took its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The upper four bits of a mode.
    pub kind: u8,
    /// Its number on the source. On another file system it means nothing.
    pub ino: u64,
    /// When it was made, in nanoseconds since 1970, where the file system tells.
    pub born: Option<i64>,
}

/// An open file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// The guest's number.
    pub id: u64,
    /// Its inode.
    pub node: u64,
    /// `O_*` flags that it was opened with on the source's host.
    pub flags: i32,
    /// A directory; streams of virtiofsd do not say it.
    pub directory: Option<bool>,
    /// How the guest has the file open, and how its inode is open for all: numbers of lanefsd's own. `None` where only the
    /// options can tell.
    pub modes: Option<(u8, u8)>,
}

/// A lock that the guest holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// The inode.
    pub node: u64,
    /// The handle that has a flock(2) lock, or one that a POSIX lock was taken through.
    pub handle: u64,
    /// Owner and process in the guest of a POSIX lock; `None` for flock(2).
    pub owner: Option<(u64, u32)>,
    /// First byte.
    pub start: u64,
    /// Last byte, or `u64::MAX` for the end of the file, whatever that is.
    pub end: u64,
    /// A write lock, or LOCK_EX.
    pub exclusive: bool,
}

/// Why a share cannot be saved or loaded, in a sentence that names the first thing that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MigrationError(pub String);

impl MigrationError {
    /// For a file system that keeps nothing, or cannot give it away.
    pub fn unsupported() -> MigrationError {
        MigrationError("this share can be neither migrated nor saved".to_owned())
    }
}
