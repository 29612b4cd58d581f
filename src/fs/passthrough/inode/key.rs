//! What identifies an inode on the host.

use std::hash::{Hash, Hasher};
use std::os::fd::AsFd;

use rustix::fs::{FileType, Statx, StatxFlags};

use super::mount::Mount;
use crate::fs::passthrough::host::kind;
use crate::state_file::InodeEntry;
use crate::sys::file_handles::name_to_handle;
use fuse_protocol::ids::NodeId;

/// What an inode is on the host. The mount belongs to it: one directory can be mounted twice.
///
/// The host reuses the number of an inode that is gone, so that two inodes may have the same key, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeKey {
    /// Device, as statx(2) has it.
    pub device: (u32, u32),
    /// Inode number on the device; where several files may share a number, that of the host's kernel
    /// ([`Mount::numbers_alias`]).
    pub ino: u64,
    /// `stx_mnt_id`; on hosts before Linux 5.8 the device, which is nearly the same.
    pub mount: u32,
    /// Beside the kernel's own number: tells apart inodes that had it at different times.
    pub generation: u32,
}

impl InodeKey {
    /// By the number that statx(2) returned.
    pub fn of(stat: &Statx) -> InodeKey {
        let (major, minor) = (stat.stx_dev_major, stat.stx_dev_minor);
        // Ids of mounts are ints; of a device Linux keeps 12 and 20 bits.
        let mount = match stat.stx_mask & StatxFlags::MNT_ID.bits() {
            0 => major << 20 | minor & 0xf_ffff,
            _ => u32::try_from(stat.stx_mnt_id).unwrap_or(u32::MAX),
        };
        InodeKey { device: (major, minor), ino: stat.stx_ino, mount, generation: 0 }
    }

    /// The device in one word: Linux keeps 12 bits of the major number and 20 of the minor one.
    pub(super) fn packed_device(&self) -> u32 {
        self.device.0 << 20 | self.device.1 & 0xf_ffff
    }

    /// The device of such a word.
    fn unpacked_device(word: u32) -> (u32, u32) {
        (word >> 20, word & 0xf_ffff)
    }

    /// The key in a record.
    pub(super) fn of_entry(entry: &InodeEntry) -> InodeKey {
        let device = InodeKey::unpacked_device(entry.device);
        InodeKey { device, ino: entry.ino, mount: entry.mount, generation: entry.generation }
    }

    /// Where several files may share a number: by the number of the host's kernel, if the handle of `path` has one.
    pub fn on(self, mount: &Mount, path: impl AsFd) -> InodeKey {
        if mount.numbers_alias() { self.with_kernels_number(path) } else { self }
    }

    /// By the number of the host's kernel, if the handle of `path` has one.
    pub(super) fn with_kernels_number(self, path: impl AsFd) -> InodeKey {
        let handle = name_to_handle(path.as_fd()).ok();
        match handle.and_then(|handle| handle.number_and_generation()) {
            Some((ino, generation)) => InodeKey { ino, generation, ..self },
            None => self,
        }
    }
}

impl Hash for InodeKey {
    /// In one word, as each costs time. Inodes that have all but one part in common differ.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let device = u64::from(self.device.0) << 32 | u64::from(self.device.1);
        let mount = u64::from(self.mount) << 32 | u64::from(self.generation);
        state.write_u64(self.ino ^ mount ^ device.rotate_left(48));
    }
}

/// What a system call returned about an inode that the guest may know.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Its key.
    pub key: InodeKey,
    /// Its type.
    pub kind: FileType,
    /// Node ids up to this one, exclusively, had been given before the call.
    pub before: NodeId,
}

impl Seen {
    /// What statx(2) returned by name, called after node ids up to `before` had been given.
    pub fn by_name(stat: &Statx, before: NodeId) -> Seen {
        Seen { key: InodeKey::of(stat), kind: kind(stat), before }
    }

    /// What statx(2) returned for an open descriptor, which keeps the number from being reused.
    pub fn open(stat: &Statx, key: InodeKey) -> Seen {
        Seen { key, kind: kind(stat), before: NodeId(u64::MAX) }
    }
}
