//! An inode that the guest knows, and what identifies it on the host.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use rustix::fs::FileType;

use super::io_mode::IoMode;
use super::locks::InodeLocks;
use super::mounts::Mount;
use super::pins::{PathGuard, Pin};
use super::range_lock::RangeLock;
use crate::fs::Result;
use fuse_protocol::ids::NodeId;

/// What an inode is on the host. The mount belongs to it: one directory can be mounted twice.
///
/// The host uses a number again when an inode is gone, so that two inodes may have the same key, one
/// after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeKey {
    /// Device, as statx(2) has it.
    pub device: (u32, u32),
    /// Inode number on the device; where numbers may stand for several files, the number that the host's
    /// kernel has for it ([`Mount::numbers_alias`]).
    pub ino: u64,
    /// `stx_mnt_id`; on hosts before Linux 5.8 the device, which is nearly the same.
    pub mount: u32,
    /// Beside the kernel's own number: tells apart inodes that had it at different times.
    pub generation: u32,
}

impl Hash for InodeKey {
    /// In one word, as each costs time. Inodes that have all but one part in common differ.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let device = u64::from(self.device.0) << 32 | u64::from(self.device.1);
        let mount = u64::from(self.mount) << 32 | u64::from(self.generation);
        state.write_u64(self.ino ^ mount ^ device.rotate_left(48));
    }
}

/// A file or directory that the guest knows.
#[derive(Debug)]
pub struct Inode {
    /// What the guest calls it.
    pub node: NodeId,
    /// What it is on the host.
    pub key: InodeKey,
    /// Its type, which never changes: what has another one is another inode.
    pub kind: FileType,
    /// How the guest has it open.
    pub io_mode: IoMode,
    /// Ranges that are being read or written.
    pub ranges: RangeLock,
    /// Locks that the guest's programs hold.
    pub locks: InodeLocks,
    /// It had a set-group-ID bit without execution by the group when it was last looked at.
    pub lone_group_bit: AtomicBool,
    /// What keeps hold of it.
    pub pin: Pin,
    /// How often the guest has looked it up and not forgotten it. Goes up only under the lock of
    /// the inode's key, so that a count of 0 seen there is final.
    pub lookups: AtomicU64,
}

impl Inode {
    /// An inode that was not looked up yet.
    pub fn new(node: NodeId, key: InodeKey, kind: FileType, pin: Pin) -> Inode {
        Inode {
            node,
            key,
            kind,
            io_mode: IoMode::default(),
            ranges: RangeLock::default(),
            locks: InodeLocks::default(),
            lone_group_bit: AtomicBool::new(false),
            pin,
            lookups: AtomicU64::new(0),
        }
    }

    /// An O_PATH descriptor for system calls that take AT_EMPTY_PATH, or names relative to a
    /// directory. It stays open for as long as the caller holds it.
    pub fn path(&self) -> Result<PathGuard> {
        self.pin.path(self.node)
    }

    /// The mount it is on.
    pub fn mount(&self) -> &Arc<Mount> {
        self.pin.mount()
    }
}

/// What a system call said about an inode that the guest may know.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// By this key.
    pub key: InodeKey,
    /// Of this type.
    pub kind: FileType,
    /// The call was made when node ids up to this one, exclusively, had been given.
    pub before: NodeId,
}
