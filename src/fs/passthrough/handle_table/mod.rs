//! Open files and directories.

pub mod listing;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use rustix::io::Errno;

use self::listing::Listing;
use crate::fs::Result;
use crate::fs::passthrough::host::file::HostFile;
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::inode::io_mode::Mode;
use crate::fs::passthrough::inode::shards::{BuildIdHasher, Shards};
use crate::limits::{GuestFd, MemoryQuota};
use crate::state_file::{Effects, HandleEntry, HandleRecord, Index, Slab, StateFile};
use crate::sync::blocking::block_in_place;
use fuse_protocol::ids::{HandleId, NodeId};

/// In a record, in place of a file's mode.
pub const DIRECTORY: u8 = 0xff;

/// Writes with a handle before its file is mapped, and between tries where that fails.
const FIRST_TRY: u32 = 16;
const TRY_TO_MAP: u32 = 1024;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    inode: Arc<Inode>,
    // Dropped before `file`: the record gives the descriptor up before it is closed.
    record: Option<HandleRecordGuard>,
    file: HostFile,
    kind: Kind,
    /// The flock(2) lock that the guest has by it: 0 for none, 1 for a shared one, 2 for an exclusive one.
    flock: AtomicU8,
    /// Writes of its file before that was mapped, about.
    writes: AtomicU32,
}

/// The record of a handle in the state file, until it is dropped.
#[derive(Debug)]
struct HandleRecordGuard {
    records: Arc<Slab<HandleRecord>>,
    index: Index<HandleRecord>,
}

impl HandleRecordGuard {
    fn record(&self) -> &HandleRecord {
        self.records.get(self.index)
    }
}

impl Drop for HandleRecordGuard {
    fn drop(&mut self) {
        self.record().clear();
        self.records.give_back(self.index);
    }
}

#[derive(Debug)]
enum Kind {
    File(Mode),
    /// One request at a time moves it.
    Directory(Mutex<Listing>),
}

impl Handle {
    /// An open file, which the inode counts as an opener. `mode` is that of this opener.
    pub fn new_file(inode: Arc<Inode>, file: HostFile, mode: Mode) -> Handle {
        let (flock, writes) = (AtomicU8::new(0), AtomicU32::new(0));
        Handle { inode, record: None, file, kind: Kind::File(mode), flock, writes }
    }

    /// An open directory, at its beginning.
    pub fn new_directory(inode: Arc<Inode>, file: HostFile, listing: Listing) -> Handle {
        let kind = Kind::Directory(Mutex::new(listing));
        let (flock, writes) = (AtomicU8::new(0), AtomicU32::new(0));
        Handle { inode, record: None, file, kind, flock, writes }
    }

    /// The inode it was opened from.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// Whether it has a flock(2) lock, and whether that is exclusive.
    pub fn flock(&self) -> Option<bool> {
        match self.flock.load(Ordering::Relaxed) {
            0 => None,
            kind => Some(kind == 2),
        }
    }

    /// It has taken a flock(2) lock, or given it up.
    pub fn set_flock(&self, exclusive: Option<bool>) {
        let kind = exclusive.map_or(0, |exclusive| if exclusive { 2 } else { 1 });
        self.flock.store(kind, Ordering::Relaxed);
    }

    /// Counts a write; returns whether it is one of those after which the file may be mapped.
    pub fn count_write(&self) -> bool {
        // Of two at once one may count. There will be others.
        let count = self.writes.load(Ordering::Relaxed).wrapping_add(1);
        self.writes.store(count, Ordering::Relaxed);
        count % TRY_TO_MAP == FIRST_TRY
    }

    /// The open file of the host.
    pub fn file(&self) -> &HostFile {
        &self.file
    }

    /// What its record has.
    fn entry(&self, id: u64) -> HandleEntry {
        HandleEntry {
            id,
            node: self.inode.node().0,
            descriptor: Some(self.fd().as_raw_fd()),
            open_flags: self.file.flags().bits(),
            mode: self.mode().map_or(DIRECTORY, Mode::number),
            inode_mode: self.inode.mode().number(),
        }
    }

    /// The open descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd()
    }

    /// How the guest has the file open; `None` for a directory.
    pub fn mode(&self) -> Option<Mode> {
        match self.kind {
            Kind::File(mode) => Some(mode),
            Kind::Directory(_) => None,
        }
    }

    /// The state of the directory's listing, locked; EBADF for a file.
    pub fn listing(&self) -> Result<MutexGuard<'_, Listing>> {
        match &self.kind {
            Kind::File(_) => Err(Errno::BADF),
            Kind::Directory(listing) => Ok(match listing.try_lock() {
                Ok(listing) => listing,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                // Another request lists the directory, which takes as long as the host needs.
                Err(TryLockError::WouldBlock) => {
                    block_in_place(|| listing.lock().unwrap_or_else(PoisonError::into_inner))
                }
            }),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Kind::File(_) = self.kind {
            self.inode.release();
        }
    }
}

/// All handles of a session.
#[derive(Debug)]
pub struct HandleTable {
    shards: Shards<RwLock<HashMap<u64, Arc<Handle>, BuildIdHasher>>>,
    records: Arc<Slab<HandleRecord>>,
    /// Handles of the guest that have no file on this host, for which it gets EIO, with their records if there was room.
    lost: Mutex<HashMap<u64, Option<HandleRecordGuard>>>,
    any_lost: AtomicBool,
    /// Memory that listings of all handles keep.
    memory: Arc<MemoryQuota>,
}

impl HandleTable {
    /// A table without handles, whose directories share `memory`. Handles have their records in `state`.
    pub fn new(memory: Arc<MemoryQuota>, state: &Arc<StateFile>) -> HandleTable {
        HandleTable {
            shards: Shards::default(),
            records: Arc::new(Slab::new(state)),
            lost: Mutex::default(),
            any_lost: AtomicBool::new(false),
            memory,
        }
    }

    /// Adds the handles that are in the state file already. `restore` makes one of a record and its descriptor, or returns
    /// that, which is closed after the record is gone.
    pub fn restore(&self, restore: impl Fn(&HandleEntry, RawFd) -> std::result::Result<Handle, GuestFd>) {
        for index in self.records.used() {
            let record = HandleRecordGuard { records: Arc::clone(&self.records), index };
            let Some(entry) = record.record().load() else { continue };
            let Some(descriptor) = entry.descriptor else {
                self.add_lost(entry.id, Some(record));
                continue;
            };
            let mut handle = match restore(&entry, descriptor) {
                Ok(handle) => handle,
                Err(descriptor) => {
                    drop(record);
                    drop(descriptor);
                    continue;
                }
            };
            handle.record = Some(record);
            let mut shard = self.shard(entry.id).write().unwrap_or_else(PoisonError::into_inner);
            shard.insert(entry.id, Arc::new(handle));
        }
    }

    /// A listing that an earlier process may have begun.
    pub fn restored_listing(&self) -> Listing {
        Listing::restored(Arc::clone(&self.memory))
    }

    /// A listing that was not begun.
    pub fn new_listing(&self) -> Listing {
        Listing::new(Arc::clone(&self.memory))
    }

    /// Adds a handle under a new id; ENOMEM if there is no memory for it, ENFILE if there are too many.
    pub fn insert(&self, effects: Effects<'_>, mut handle: Handle) -> Result<HandleId> {
        let record = self.new_record().ok_or(Errno::NFILE)?;
        let id = self.records.state().next_handle().fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(id).write().unwrap_or_else(PoisonError::into_inner);
        shard.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        effects.open_handle(id);
        record.record().store(&handle.entry(id));
        handle.record = Some(record);
        shard.insert(id, Arc::new(handle));
        Ok(HandleId(id))
    }

    /// The handle with this id, opened from `node`; EBADF for any other.
    pub fn get(&self, node: NodeId, id: HandleId) -> Result<Arc<Handle>> {
        let shard = self.shard(id.0).read().unwrap_or_else(PoisonError::into_inner);
        let found = shard.get(&id.0).filter(|handle| handle.inode.node() == node).cloned();
        found.ok_or_else(|| self.missing(id))
    }

    /// The error for a handle that is not there.
    #[cold]
    fn missing(&self, id: HandleId) -> Errno {
        let is_lost = self.any_lost.load(Ordering::Relaxed) && self.lost_handles().contains_key(&id.0);
        if is_lost { Errno::IO } else { Errno::BADF }
    }

    fn lost_handles(&self) -> MutexGuard<'_, HashMap<u64, Option<HandleRecordGuard>>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the guest gets EIO for this handle, until it is released.
    pub fn lose(&self, node: NodeId, id: HandleId) {
        drop(self.remove(node, id));
        let record = self.new_record();
        if let Some(record) = &record {
            record.record().store(&HandleEntry {
                id: id.0,
                node: node.0,
                descriptor: None,
                open_flags: 0,
                mode: 0,
                inode_mode: 0,
            });
        }
        self.add_lost(id.0, record);
    }

    fn add_lost(&self, id: u64, record: Option<HandleRecordGuard>) {
        self.lost_handles().insert(id, record);
        self.any_lost.store(true, Ordering::Relaxed);
    }

    fn new_record(&self) -> Option<HandleRecordGuard> {
        let index = self.records.take()?;
        Some(HandleRecordGuard { records: Arc::clone(&self.records), index })
    }

    /// The numbers of files that are open in the usual way, of those in parallel mode, and of directories.
    pub fn count(&self) -> [u64; 3] {
        let mut numbers = [0; 3];
        for shard in self.shards.iter() {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            let [plain, parallel, directories] = &mut numbers;
            for handle in shard.values() {
                let number = match handle.mode() {
                    Some(Mode::Parallel) => &mut *parallel,
                    Some(_) => &mut *plain,
                    None => &mut *directories,
                };
                *number += 1;
            }
        }
        numbers
    }

    /// All handles, by their ids.
    pub fn all(&self) -> Vec<(u64, Arc<Handle>)> {
        let shards = self.shards.iter().map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner));
        let mut all = Vec::new();
        for shard in shards {
            all.extend(shard.iter().map(|(id, handle)| (*id, Arc::clone(handle))));
        }
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }

    /// Adds a handle that the guest has already; ENFILE if there are too many.
    pub fn insert_as(&self, id: HandleId, mut handle: Handle) -> Result<()> {
        let record = self.new_record().ok_or(Errno::NFILE)?;
        record.record().store(&handle.entry(id.0));
        handle.record = Some(record);
        self.shard(id.0).write().unwrap_or_else(PoisonError::into_inner).insert(id.0, Arc::new(handle));
        Ok(())
    }

    /// Removes a handle. Its descriptor is closed when the last request that uses it is done.
    pub fn remove(&self, node: NodeId, id: HandleId) -> Result<Arc<Handle>> {
        let mut shard = self.shard(id.0).write().unwrap_or_else(PoisonError::into_inner);
        if shard.get(&id.0).is_none_or(|handle| handle.inode.node() != node) {
            return Err(if self.lost_handles().remove(&id.0).is_some() { Errno::IO } else { Errno::BADF });
        }
        let handle = shard.remove(&id.0).ok_or(Errno::BADF)?;
        if let Some(record) = &handle.record {
            // Requests may still have the handle, but the guest has it no more.
            record.record().clear();
        }
        Ok(handle)
    }

    /// Removes all handles.
    pub fn clear(&self) {
        self.lost_handles().clear();
        for shard in self.shards.iter() {
            // Their descriptors are closed when no lock is held.
            let handles = std::mem::take(&mut *shard.write().unwrap_or_else(PoisonError::into_inner));
            drop(handles);
        }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>, BuildIdHasher>> {
        self.shards.of(id)
    }
}
