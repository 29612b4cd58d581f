//! The state file: all that a guest can name, in memory that outlives a worker process.
//!
//! Inodes with their counts of lookups, open files, lock owners, what INIT negotiated, and for each queue a journal of
//! the requests in flight. Records have a fixed size and no pointers, so that another process can read them. A process
//! that begins makes its tables of them, as far as it needs them; while it runs, it changes a record with each change of its
//! tables.
//!
//! A process may be killed between any two instructions, and memory then holds what was stored up to there. So:
//!
//! - A record is complete before its first word says that it is there ([`slab`]).
//! - A record gives up a descriptor before the descriptor is closed, and gets one after it is open. A descriptor that
//!   no record names belongs to nobody, and the next process closes it.
//! - What a request has done that must not be done twice stands in its slot of the [`journal`] before it is done.
//!
//! The file is sparse: its size is that of the largest state, and its memory that of the records in use.

mod effects;
mod journal;
mod parked;
mod records;
mod recovery;
mod slab;
mod slot;
mod stored_handle;
mod unresolved;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate, fstat};
use rustix::io::Errno;
use thiserror::Error;

pub use self::effects::Effects;
use self::journal::QueueRecord;
pub use self::journal::{InFlight, Journal, Place, Start, UsedEntry};
pub use self::parked::Parked;
pub use self::records::{
    HandleEntry, HandleRecord, InodeEntry, InodeRecord, LongHandle, MountEntry, MountRecord, OwnerEntry,
    OwnerHandleEntry, OwnerHandleRecord, OwnerRecord,
};
pub use self::recovery::{Recovered, close_strays};
pub use self::slab::{Index, Slab};
use self::slot::Slot;
pub use self::slot::{Attempt, Resumed};
pub use self::stored_handle::StoredHandle;
use crate::sys::shared_map::{Mapping, Record};

/// Says that this is a state file: `lanefsd` and a NUL.
const MAGIC: u64 = u64::from_le_bytes(*b"lanefsd\0");
/// Version of the records. Raised by each change of their layout or meaning.
pub const VERSION: u32 = 2;

/// Queues of a device.
const QUEUES: usize = 64;
/// Descriptors of the largest ring, and so requests in flight in one queue.
const SLOTS: usize = 32_768;
/// Requests at once that have counted more than one lookup: listings with attributes.
const LISTS: usize = 256;
/// Lookups that one of them counts, after the first.
const LIST_LEN: usize = 8192;
const INODES: usize = 1 << 24;
const LONG_HANDLES: usize = 1 << 20;
const MOUNTS: usize = 1 << 12;
const HANDLES: usize = 1 << 20;
const OWNERS: usize = 1 << 20;
const OWNER_HANDLES: usize = 1 << 20;
/// Bytes for inodes that came with a migration and were not found yet.
const UNRESOLVED: usize = 128 << 20;

/// Where the parts of the file begin, and how long it is.
mod offsets {
    use super::*;

    const fn after<T>(offset: usize, count: usize) -> usize {
        (offset + count * size_of::<T>()).next_multiple_of(4096)
    }

    pub const HEADER: usize = 0;
    pub const QUEUE_RECORDS: usize = after::<Header>(HEADER, 1);
    pub const SLOT_RECORDS: usize = after::<QueueRecord>(QUEUE_RECORDS, QUEUES);
    pub const LIST_RECORDS: usize = after::<Slot>(SLOT_RECORDS, QUEUES * SLOTS);
    pub const INODE_RECORDS: usize = after::<AtomicU32>(LIST_RECORDS, LISTS * LIST_LEN);
    pub const LONG_HANDLE_RECORDS: usize = after::<InodeRecord>(INODE_RECORDS, INODES);
    pub const MOUNT_RECORDS: usize = after::<LongHandle>(LONG_HANDLE_RECORDS, LONG_HANDLES);
    pub const HANDLE_RECORDS: usize = after::<MountRecord>(MOUNT_RECORDS, MOUNTS);
    pub const OWNER_RECORDS: usize = after::<HandleRecord>(HANDLE_RECORDS, HANDLES);
    pub const OWNER_HANDLE_RECORDS: usize = after::<OwnerRecord>(OWNER_RECORDS, OWNERS);
    pub const UNRESOLVED_BYTES: usize = after::<OwnerHandleRecord>(OWNER_HANDLE_RECORDS, OWNER_HANDLES);
    pub const END: usize = after::<AtomicU64>(UNRESOLVED_BYTES, UNRESOLVED / 8);
}

/// Why a state file cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// The memory file cannot be made or mapped.
    #[error("no memory file for the state of the share")]
    Memory(#[from] Errno),
    /// It is something else.
    #[error("this is no state file of lanefsd")]
    Foreign,
    /// Another version of lanefsd wrote it.
    #[error("the state file has version {found}, and this lanefsd reads version {VERSION}")]
    Version {
        /// The file's.
        found: u32,
    },
}

/// The first page of the file.
#[repr(C)]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    /// Minor version of FUSE that was negotiated; 0 without a session.
    minor: AtomicU32,
    /// INIT flags that were negotiated.
    flags: AtomicU64,
    /// The next node id and the next handle id. Ids are not used twice.
    next_node: AtomicU64,
    next_handle: AtomicU64,
    /// Descriptors that the process had before there was a guest.
    own_descriptors: AtomicU32,
    /// Records of each kind that were ever in use, from the first on.
    high_water: [AtomicU32; KINDS],
    /// Requests that were refused since they made workers fail.
    poisoned: AtomicU64,
    /// When the last process that died was noticed, in nanoseconds since 1970.
    recovered_at: AtomicU64,
    /// Whether the state of another daemon was loaded, as a number of [`Transferred`].
    transferred: AtomicU32,
    unused: AtomicU32,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for Header {}
/// Whether what another daemon has saved was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transferred {
    /// Nothing was.
    Nothing,
    /// It is half done: records mean nothing yet.
    Loading,
    /// All of it was, and no queue has been started since.
    Loaded,
}

/// Kinds of records that are allocated.
const KINDS: usize = 6;

/// The state file of one share.
#[derive(Debug)]
pub struct StateFile {
    mapping: Mapping,
    /// Another process may go on with it.
    outlives: bool,
    /// Lists that no request of this process has.
    lists: Mutex<Vec<u32>>,
}

impl AsRef<Mapping> for StateFile {
    fn as_ref(&self) -> &Mapping {
        &self.mapping
    }
}

impl StateFile {
    /// A file without a session, for this process alone.
    pub fn create() -> Result<Arc<StateFile>, StateError> {
        StateFile::create_for(false)
    }

    /// A file without a session that other processes go on with.
    pub fn create_shared() -> Result<Arc<StateFile>, StateError> {
        StateFile::create_for(true)
    }

    fn create_for(outlives: bool) -> Result<Arc<StateFile>, StateError> {
        let state = StateFile::of(Mapping::create(c"lanefsd-state", offsets::END)?, outlives);
        state.begin();
        Ok(Arc::new(state))
    }

    /// Whether another process may go on with it.
    #[inline]
    pub fn outlives(&self) -> bool {
        self.outlives
    }

    /// The file of an earlier process.
    pub fn open(file: OwnedFd) -> Result<Arc<StateFile>, StateError> {
        let len = usize::try_from(fstat(&file)?.st_size).unwrap_or(0);
        if len < size_of::<Header>() {
            return Err(StateError::Foreign);
        }
        let state = StateFile::of(Mapping::of(file, len)?, true);
        if state.header().magic.load(Ordering::Acquire) != MAGIC {
            return Err(StateError::Foreign);
        }
        match state.header().version.load(Ordering::Relaxed) {
            VERSION if len == offsets::END => Ok(Arc::new(state)),
            found => Err(StateError::Version { found }),
        }
    }

    fn of(mapping: Mapping, outlives: bool) -> StateFile {
        let all = u32::try_from(LISTS).unwrap_or(0);
        StateFile { mapping, outlives, lists: Mutex::new((1..=all).collect()) }
    }

    fn begin(&self) {
        let header = self.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.next_node.store(2, Ordering::Relaxed);
        header.next_handle.store(1, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
    }

    /// Forgets everything, and gives the memory back. No process has tables of it.
    pub fn reset(&self) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(self.mapping.file(), flags, 0, offsets::END as u64)?;
        self.begin();
        Ok(())
    }

    /// The file's descriptor.
    pub fn file(&self) -> impl AsFd {
        self.mapping.file()
    }

    /// What was negotiated: minor version and flags; 0 and none without a session.
    pub fn session(&self) -> (u32, u64) {
        let header = self.header();
        (header.minor.load(Ordering::Acquire), header.flags.load(Ordering::Relaxed))
    }

    /// A session begins, or ends with version 0.
    pub fn set_session(&self, minor: u32, flags: u64) {
        let header = self.header();
        // A session whose flags are not there yet has not begun.
        header.minor.store(0, Ordering::Release);
        header.flags.store(flags, Ordering::Release);
        header.minor.store(minor, Ordering::Release);
    }

    /// Whether the state of another daemon was loaded.
    pub fn transferred(&self) -> Transferred {
        match self.header().transferred.load(Ordering::Acquire) {
            1 => Transferred::Loading,
            2 => Transferred::Loaded,
            _ => Transferred::Nothing,
        }
    }

    /// The state of another daemon is loaded from now on, or was, or will not be.
    pub fn set_transferred(&self, transferred: Transferred) {
        let number = match transferred {
            Transferred::Nothing => 0,
            Transferred::Loading => 1,
            Transferred::Loaded => 2,
        };
        self.header().transferred.store(number, Ordering::Release);
    }

    /// The counter of node ids.
    pub fn next_node(&self) -> &AtomicU64 {
        &self.header().next_node
    }

    /// The counter of handle ids.
    pub fn next_handle(&self) -> &AtomicU64 {
        &self.header().next_handle
    }

    /// Descriptors that the first process had of its own; 0 before it said so.
    pub fn own_descriptors(&self) -> &AtomicU32 {
        &self.header().own_descriptors
    }

    /// When the death of a process was noticed last, in nanoseconds since 1970.
    fn recovered_at(&self) -> u64 {
        self.header().recovered_at.load(Ordering::Relaxed)
    }

    /// Requests that were refused since they made workers fail.
    pub fn poisoned(&self) -> &AtomicU64 {
        &self.header().poisoned
    }

    /// The record of an inode.
    #[inline]
    pub fn inode(&self, index: Index<InodeRecord>) -> &InodeRecord {
        self.record(offsets::INODE_RECORDS, INODES, index.get())
    }

    #[inline]
    fn header(&self) -> &Header {
        self.record(offsets::HEADER, 1, 0)
    }

    #[inline]
    fn queue(&self, index: usize) -> &QueueRecord {
        self.record(offsets::QUEUE_RECORDS, QUEUES, index)
    }

    #[inline]
    fn slot(&self, queue: usize, head: u16) -> &Slot {
        self.record(offsets::SLOT_RECORDS, QUEUES * SLOTS, queue * SLOTS + usize::from(head) % SLOTS)
    }

    /// A list for a request that counts several lookups, by its number from 1 on.
    fn take_list(&self) -> Option<u32> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    #[cold]
    fn give_list_back(&self, list: u32) {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        // Its place is there: a list is given back once.
        if lists.len() < LISTS {
            lists.push(list);
        }
    }

    fn list(&self, list: usize) -> &[AtomicU32] {
        let offset = offsets::LIST_RECORDS + list.min(LISTS - 1) * LIST_LEN * size_of::<AtomicU32>();
        self.mapping.records(offset, LIST_LEN)
    }

    /// A record, of `count` from `offset` on. An index that is out of range, which none is, means the first.
    #[inline]
    #[allow(
        clippy::indexing_slicing,
        reason = "offsets and counts are constants inside the file, as a test shows"
    )]
    fn record<T: Record>(&self, offset: usize, count: usize, index: usize) -> &T {
        let index = if index < count { index } else { 0 };
        &self.mapping.records(offset + index * size_of::<T>(), 1)[0]
    }
}
