//! The records of what a guest can name.
//!
//! Each kind has a plain type beside it, whose name ends with `Entry`: what is stored and read at once.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use super::slab::{Index, Kind, Slab};
use super::stored_handle::{LONGEST_HANDLE, StoredHandle, load, store};
use super::{HANDLES, INODES, LONG_HANDLES, MOUNTS, OWNER_HANDLES, OWNERS, offsets};
use crate::sys::shared_map::Record;

/// No descriptor.
const NONE: i32 = -1;
/// Bits of the count of lookups that say who changed it last ([`super::Effects`]).
pub(super) const TAG_BITS: u32 = 24;
/// Bytes of a file handle that fit into the record of its inode: those of ext4, XFS, tmpfs and btrfs.
const SHORT_HANDLE: usize = 20;
/// In place of the length: the handle stands in a record of its own.
const IS_LONG: u8 = 0xff;

/// In the highest byte of an inode's kinds: it was written, and its times were not set yet.
const UNSETTLED: u32 = 1 << 24;

/// What the guest knows of an inode.
#[repr(C)]
pub struct InodeRecord {
    /// The node id; 0 if the record is not in use.
    node: AtomicU64,
    /// How often the guest has looked it up and not forgotten it, above [`TAG_BITS`].
    lookups: AtomicU64,
    ino: AtomicU64,
    device: AtomicU32,
    mount: AtomicU32,
    generation: AtomicU32,
    /// An O_PATH descriptor, or [`NONE`].
    descriptor: AtomicI32,
    /// From the lowest byte up: type as the upper bits of a mode, length and type of the handle, and [`UNSETTLED`] or 0.
    kinds: AtomicU32,
    /// The bytes of the handle, or the number of its record.
    handle: [AtomicU32; SHORT_HANDLE / 4],
}

/// An inode, as its record has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InodeEntry {
    /// The guest's number.
    pub node: u64,
    /// How often the guest has looked it up and not forgotten it.
    pub lookups: u64,
    /// Number on the host.
    pub ino: u64,
    /// Device: 12 bits of the major number and 20 of the minor one.
    pub device: u32,
    /// The mount that it is on.
    pub mount: u32,
    /// Beside the number, where that is not enough.
    pub generation: u32,
    /// Its type: the upper four bits of a mode.
    pub kind: u8,
    /// An O_PATH descriptor.
    pub descriptor: Option<i32>,
}

/// A file handle that is too long for the record of its inode.
#[repr(C)]
pub struct LongHandle {
    /// The node id of its inode; 0 if the record is not in use.
    node: AtomicU64,
    len: AtomicU32,
    words: [AtomicU32; LONGEST_HANDLE / 4],
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for InodeRecord {}
// SAFETY: the same.
unsafe impl Record for LongHandle {}
// SAFETY: the same.
unsafe impl Record for MountRecord {}
// SAFETY: the same.
unsafe impl Record for HandleRecord {}
// SAFETY: the same.
unsafe impl Record for OwnerRecord {}
// SAFETY: the same.
unsafe impl Record for OwnerHandleRecord {}

macro_rules! kind {
    ($record:ty, $number:literal, $offset:ident, $count:ident, $first:ident) => {
        impl Kind for $record {
            const NUMBER: usize = $number;
            const OFFSET: usize = offsets::$offset;
            const COUNT: usize = $count;

            fn is_used(&self) -> bool {
                self.$first.load(Ordering::Acquire) != 0
            }
        }
    };
}

kind!(InodeRecord, 0, INODE_RECORDS, INODES, node);
kind!(LongHandle, 1, LONG_HANDLE_RECORDS, LONG_HANDLES, node);
kind!(MountRecord, 2, MOUNT_RECORDS, MOUNTS, used);
kind!(HandleRecord, 3, HANDLE_RECORDS, HANDLES, id);
kind!(OwnerRecord, 4, OWNER_RECORDS, OWNERS, node);
kind!(OwnerHandleRecord, 5, OWNER_HANDLE_RECORDS, OWNER_HANDLES, handle);

impl InodeRecord {
    /// Stores an inode; from now on the record is in use. `tag` says which request counted its lookups.
    pub fn store(&self, entry: &InodeEntry, tag: u32) {
        self.lookups.store(entry.lookups << TAG_BITS | u64::from(tag), Ordering::Relaxed);
        self.ino.store(entry.ino, Ordering::Relaxed);
        self.device.store(entry.device, Ordering::Relaxed);
        self.mount.store(entry.mount, Ordering::Relaxed);
        self.generation.store(entry.generation, Ordering::Relaxed);
        self.descriptor.store(entry.descriptor.unwrap_or(NONE), Ordering::Relaxed);
        self.kinds.store(u32::from(entry.kind), Ordering::Relaxed);
        self.node.store(entry.node, Ordering::Release);
    }

    /// An inode that was known by its node id alone is found. Its lookups, which others may change meanwhile, stay.
    pub fn set_found(&self, entry: &InodeEntry) {
        self.ino.store(entry.ino, Ordering::Relaxed);
        self.device.store(entry.device, Ordering::Relaxed);
        self.mount.store(entry.mount, Ordering::Relaxed);
        self.generation.store(entry.generation, Ordering::Relaxed);
        self.kinds.store(u32::from(entry.kind), Ordering::Relaxed);
        self.set_descriptor(entry.descriptor);
    }

    /// The inode, if the record is in use.
    pub fn load(&self) -> Option<InodeEntry> {
        let node = self.node.load(Ordering::Acquire);
        let [kind, ..] = self.kinds.load(Ordering::Relaxed).to_le_bytes();
        let descriptor = self.descriptor.load(Ordering::Relaxed);
        (node != 0).then(|| InodeEntry {
            node,
            lookups: self.lookups(),
            ino: self.ino.load(Ordering::Relaxed),
            device: self.device.load(Ordering::Relaxed),
            mount: self.mount.load(Ordering::Relaxed),
            generation: self.generation.load(Ordering::Relaxed),
            kind,
            descriptor: (descriptor >= 0).then_some(descriptor),
        })
    }

    /// The guest does not know the inode any more.
    pub fn clear(&self) {
        self.node.store(0, Ordering::Release);
    }

    /// The guest's number; 0 if the record is not in use.
    pub fn node(&self) -> u64 {
        self.node.load(Ordering::Acquire)
    }

    /// The count of lookups.
    #[inline]
    pub fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed) >> TAG_BITS
    }

    /// Who changed the count last.
    pub(super) fn tag(&self) -> u32 {
        let mask = (1 << TAG_BITS) - 1;
        u32::try_from(self.lookups.load(Ordering::Relaxed) & mask).unwrap_or(0)
    }

    /// The count, and who changed it last, in one word.
    pub(super) fn lookups_and_tag(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed)
    }

    /// Changes the count as `tag` says who; returns the count before.
    #[inline]
    pub(super) fn change_lookups(&self, tag: u32, change: impl Fn(u64) -> u64) -> u64 {
        let update = |word: u64| {
            let count = change(word >> TAG_BITS).min(u64::MAX >> TAG_BITS);
            Some(count << TAG_BITS | u64::from(tag))
        };
        // It never fails: `update` always has a value.
        self.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).unwrap_or(0) >> TAG_BITS
    }

    /// The inode has this descriptor now, or none.
    pub fn set_descriptor(&self, descriptor: Option<i32>) {
        self.descriptor.store(descriptor.unwrap_or(NONE), Ordering::Release);
    }

    /// Whether its handle is known.
    #[inline]
    pub fn has_handle(&self) -> bool {
        let [_, len, ..] = self.kinds.load(Ordering::Acquire).to_le_bytes();
        len != 0
    }

    /// Its handle, if that is known. `long` has the records of long ones.
    pub fn handle(&self, long: &Slab<LongHandle>) -> Option<StoredHandle> {
        let [_, len, kind, _] = self.kinds.load(Ordering::Acquire).to_le_bytes();
        let mut stored = StoredHandle { kind, len, bytes: [0; LONGEST_HANDLE] };
        match len {
            0 => return None,
            IS_LONG => {
                let record = long.get(Index::new(self.long()));
                stored.len = record.len.load(Ordering::Relaxed).try_into().unwrap_or(0);
                load(&record.words, &mut stored.bytes);
            }
            _ => load(&self.handle, &mut stored.bytes),
        }
        Some(stored)
    }

    fn long(&self) -> u32 {
        self.handle.first().map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Stores its handle, which is set once; false if there is no room for it. One thread at a time does this.
    pub fn set_handle(&self, handle: &StoredHandle, long: &Slab<LongHandle>) -> bool {
        if self.has_handle() {
            return true;
        }
        let [kind, _, _, flags] = self.kinds.load(Ordering::Relaxed).to_le_bytes();
        let len = match handle.bytes().len() {
            0 => return false,
            short if short <= SHORT_HANDLE => {
                store(&self.handle, handle.bytes());
                handle.len
            }
            _ => {
                let Some(index) = long.take() else { return false };
                let record = long.get(index);
                record.len.store(handle.len.into(), Ordering::Relaxed);
                store(&record.words, handle.bytes());
                record.node.store(self.node(), Ordering::Release);
                store(&self.handle, &index.raw().to_ne_bytes());
                IS_LONG
            }
        };
        self.kinds.store(u32::from_le_bytes([kind, len, handle.kind, flags]), Ordering::Release);
        true
    }

    /// The file was written and its times were not set yet, or they were. Its lock is the one of [`InodeRecord::set_handle`].
    pub fn set_unsettled(&self, is: bool) {
        if is {
            self.kinds.fetch_or(UNSETTLED, Ordering::Release);
        } else {
            self.kinds.fetch_and(!UNSETTLED, Ordering::Release);
        }
    }

    /// Whether the file was written and its times were not set yet.
    pub fn is_unsettled(&self) -> bool {
        self.kinds.load(Ordering::Acquire) & UNSETTLED != 0
    }

    /// Forgets the handle. The inode's record is not in use any more.
    pub fn drop_handle(&self, long: &Slab<LongHandle>) {
        let [kind, len, ..] = self.kinds.load(Ordering::Relaxed).to_le_bytes();
        self.kinds.store(u32::from(kind), Ordering::Relaxed);
        if len == IS_LONG {
            let index = Index::new(self.long());
            long.get(index).node.store(0, Ordering::Release);
            long.give_back(index);
        }
    }
}

/// A mount with inodes of the guest.
#[repr(C)]
pub struct MountRecord {
    used: AtomicU32,
    id: AtomicU32,
    descriptor: AtomicI32,
    flags: AtomicU32,
}

/// A mount, as its record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Its number.
    pub id: u32,
    /// An open directory on it, to open inodes by handle.
    pub descriptor: Option<i32>,
    /// Different inodes may have the same number.
    pub numbers_alias: bool,
    /// A single file is mounted.
    pub is_of_a_file: bool,
}

impl MountRecord {
    /// Stores a mount; from now on the record is in use.
    pub fn store(&self, entry: &MountEntry) {
        self.id.store(entry.id, Ordering::Relaxed);
        self.descriptor.store(entry.descriptor.unwrap_or(NONE), Ordering::Relaxed);
        let flags = u32::from(entry.numbers_alias) | u32::from(entry.is_of_a_file) << 1;
        self.flags.store(flags, Ordering::Relaxed);
        self.used.store(1, Ordering::Release);
    }

    /// The mount, if the record is in use.
    pub fn load(&self) -> Option<MountEntry> {
        let (descriptor, flags) =
            (self.descriptor.load(Ordering::Relaxed), self.flags.load(Ordering::Relaxed));
        self.is_used().then(|| MountEntry {
            id: self.id.load(Ordering::Relaxed),
            descriptor: (descriptor >= 0).then_some(descriptor),
            numbers_alias: flags & 1 != 0,
            is_of_a_file: flags & 2 != 0,
        })
    }

    /// The guest knows no inode there any more.
    pub fn clear(&self) {
        self.used.store(0, Ordering::Release);
    }
}

/// An open file or directory of the guest.
#[repr(C)]
pub struct HandleRecord {
    /// The handle id; 0 if the record is not in use.
    id: AtomicU64,
    node: AtomicU64,
    descriptor: AtomicI32,
    open_flags: AtomicU32,
    /// The handle's mode and the inode's, as the file system numbers them.
    modes: AtomicU32,
    unused: AtomicU32,
}

/// A handle, as its record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleEntry {
    /// The guest's number.
    pub id: u64,
    /// Its inode.
    pub node: u64,
    /// The open descriptor; `None` for a handle that the guest has and that has no file.
    pub descriptor: Option<i32>,
    /// `O_*` flags that it was opened with on the host.
    pub open_flags: u32,
    /// How the guest has it open, as the file system numbers that.
    pub mode: u8,
    /// The mode of the inode, which all of its openers share.
    pub inode_mode: u8,
}

/// In a record that begins with the id of a handle, in place of 0, which means that the record is not in use. lanefsd gives
/// no handle the id 0, but other daemons do.
const ID_ZERO: u64 = u64::MAX;

fn to_record(handle: u64) -> u64 {
    if handle == 0 { ID_ZERO } else { handle }
}

fn of_record(handle: u64) -> u64 {
    if handle == ID_ZERO { 0 } else { handle }
}

impl HandleRecord {
    /// Stores a handle; from now on the record is in use.
    pub fn store(&self, entry: &HandleEntry) {
        self.node.store(entry.node, Ordering::Relaxed);
        self.descriptor.store(entry.descriptor.unwrap_or(NONE), Ordering::Relaxed);
        self.open_flags.store(entry.open_flags, Ordering::Relaxed);
        let modes = u32::from_le_bytes([entry.mode, entry.inode_mode, 0, 0]);
        self.modes.store(modes, Ordering::Relaxed);
        self.id.store(to_record(entry.id), Ordering::Release);
    }

    /// The handle, if the record is in use.
    pub fn load(&self) -> Option<HandleEntry> {
        let id = self.id.load(Ordering::Acquire);
        let [mode, inode_mode, ..] = self.modes.load(Ordering::Relaxed).to_le_bytes();
        let descriptor = self.descriptor.load(Ordering::Relaxed);
        (id != 0).then(|| HandleEntry {
            id: of_record(id),
            node: self.node.load(Ordering::Relaxed),
            descriptor: (descriptor >= 0).then_some(descriptor),
            open_flags: self.open_flags.load(Ordering::Relaxed),
            mode,
            inode_mode,
        })
    }

    /// The guest has closed it.
    pub fn clear(&self) {
        self.id.store(0, Ordering::Release);
    }
}

/// An owner of POSIX locks on one inode.
#[repr(C)]
pub struct OwnerRecord {
    /// The inode; 0 if the record is not in use.
    node: AtomicU64,
    owner: AtomicU64,
    descriptor: AtomicI32,
    process: AtomicU32,
    unused: AtomicU64,
}

/// A lock owner, as its record has it. Its locks are those of the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerEntry {
    /// The inode.
    pub node: u64,
    /// The guest's number for the owner.
    pub owner: u64,
    /// The open file that has its locks.
    pub descriptor: i32,
    /// The process in the guest.
    pub process: u32,
}

impl OwnerRecord {
    /// Stores an owner; from now on the record is in use.
    pub fn store(&self, entry: &OwnerEntry) {
        self.owner.store(entry.owner, Ordering::Relaxed);
        self.descriptor.store(entry.descriptor, Ordering::Relaxed);
        self.process.store(entry.process, Ordering::Relaxed);
        self.node.store(entry.node, Ordering::Release);
    }

    /// The owner, if the record is in use.
    pub fn load(&self) -> Option<OwnerEntry> {
        let node = self.node.load(Ordering::Acquire);
        (node != 0).then(|| OwnerEntry {
            node,
            owner: self.owner.load(Ordering::Relaxed),
            descriptor: self.descriptor.load(Ordering::Relaxed),
            process: self.process.load(Ordering::Relaxed),
        })
    }

    /// The owner has no locks any more.
    pub fn clear(&self) {
        self.node.store(0, Ordering::Release);
    }
}

/// A handle that a lock owner has locked through.
#[repr(C)]
pub struct OwnerHandleRecord {
    /// The handle id; 0 if the record is not in use.
    handle: AtomicU64,
    owner: AtomicU32,
    unused: AtomicU32,
}

/// A handle that a lock owner has locked through, as its record has it.
#[derive(Clone, Copy, Debug)]
pub struct OwnerHandleEntry {
    /// The record of the owner.
    pub owner: Index<OwnerRecord>,
    /// The handle.
    pub handle: u64,
}

impl OwnerHandleRecord {
    /// Stores a handle; from now on the record is in use.
    pub fn store(&self, entry: &OwnerHandleEntry) {
        self.owner.store(entry.owner.raw(), Ordering::Relaxed);
        self.handle.store(to_record(entry.handle), Ordering::Release);
    }

    /// The handle, if the record is in use.
    pub fn load(&self) -> Option<OwnerHandleEntry> {
        let handle = self.handle.load(Ordering::Acquire);
        let owner = Index::new(self.owner.load(Ordering::Relaxed));
        (handle != 0).then_some(OwnerHandleEntry { owner, handle: of_record(handle) })
    }

    /// The handle does not count for the owner any more.
    pub fn clear(&self) {
        self.handle.store(0, Ordering::Release);
    }
}
