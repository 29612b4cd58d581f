//! Inodes that the guest knows: what identifies them on the host, and how they stay reachable.
//!
//! [`InodeTable`] finds an [`Inode`] by the guest's node id or by its [`InodeKey`]. Each has an O_PATH descriptor
//! ([`InodeFd`]), which [`FdCache`] closes when descriptors are scarce; a file handle takes its place then.
//! What openers and lock owners of a file share belongs to its inode: [`IoMode`], [`RangeLock`], [`PosixLocks`].
//!
//! Fields are private to this folder, so that the count of lookups, the two ways to find an inode, and the number of
//! open descriptors stay true together.

mod eviction;
mod fd_cache;
mod inode_fd;
pub mod io_mode;
mod key;
mod listed;
mod locked_ranges;
pub mod mapped;
mod mount;
mod owner_records;
mod posix_locks;
pub mod range_lock;
mod records;
mod reopen;
mod resolve;
mod restore;
mod search;
pub mod settler;
pub mod shards;
mod stored;
mod survey;
mod table;
mod unnamed;
mod unresolved;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::{ArcSwapOption, Guard};
use rustix::fs::FileType;

pub use self::fd_cache::FdCache;
use self::inode_fd::{InodeFd, PathGuard};
use self::io_mode::{IoMode, IoPolicy, Mode};
pub use self::key::{InodeKey, Seen};
use self::mapped::{MappedFile, STAYS, Times, present};
pub use self::mount::{Kind as FileSystemKind, Mount};
pub use self::owner_records::OwnerRecords;
pub use self::posix_locks::{OwnerFile, PosixLocks, RestoredOwner};
use self::range_lock::RangeLock;
pub use self::records::Records;
pub use self::reopen::reopen;
pub use self::restore::{adopt_descriptor, on_threads, root_descriptor, threads_for};
pub use self::search::{identity, is_same};
pub use self::table::InodeTable;
use crate::fs::Result;
use crate::fs::passthrough::host::set_times;
use fuse_protocol::ids::NodeId;

/// A file or directory that the guest knows.
#[derive(Debug)]
pub struct Inode {
    node: NodeId,
    key: InodeKey,
    kind: FileType,
    io_mode: IoMode,
    ranges: RangeLock,
    locks: PosixLocks,
    /// Set while it is open and written through mappings.
    mapped: ArcSwapOption<MappedFile>,
    /// It was set before, which costs less to read.
    was_mapped: AtomicBool,
    /// It had a set-group-ID bit without execution by the group when its attributes were last read.
    lone_group_bit: AtomicBool,
    /// It may have set-id bits that the host does not clear.
    set_id_bits: AtomicBool,
    /// Also knows its record, which counts how often the guest has looked it up and not forgotten it. The count goes up
    /// only under the lock of the inode's key, so that a count of 0 seen there is final.
    fd: InodeFd,
}

impl Inode {
    /// An inode that was not looked up yet.
    fn new(node: NodeId, key: InodeKey, kind: FileType, fd: InodeFd) -> Inode {
        let leaves_set_id_bits = fd.mount().leaves_set_id_bits();
        Inode {
            node,
            key,
            kind,
            io_mode: IoMode::default(),
            ranges: RangeLock::default(),
            locks: PosixLocks::default(),
            mapped: ArcSwapOption::const_empty(),
            was_mapped: AtomicBool::new(false),
            lone_group_bit: AtomicBool::new(false),
            set_id_bits: AtomicBool::new(leaves_set_id_bits),
            fd,
        }
    }

    /// The guest's number for it.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// What identifies it on the host.
    pub fn key(&self) -> &InodeKey {
        &self.key
    }

    /// Its type, which never changes: what has another one is another inode.
    pub fn kind(&self) -> FileType {
        self.kind
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// An O_PATH descriptor for system calls that take AT_EMPTY_PATH, or names relative to a directory. It stays open
    /// for as long as the caller has it.
    pub fn path(&self) -> Result<PathGuard> {
        self.fd.path(self.node)
    }

    /// The mount it is on.
    pub fn mount(&self) -> &Arc<Mount> {
        self.fd.mount()
    }

    /// Ranges that requests read or write just now.
    pub fn ranges(&self) -> &RangeLock {
        &self.ranges
    }

    /// POSIX locks of the guest's programs.
    pub fn locks(&self) -> &PosixLocks {
        &self.locks
    }

    /// The mode that all of its openers share.
    pub fn mode(&self) -> Mode {
        self.io_mode.current()
    }

    /// Counts an opener from before this process began, when the inode had this mode.
    pub fn restore_opener(&self, mode: Mode) {
        self.io_mode.restore(mode);
    }

    /// Counts one more opener; see [`IoMode::open`].
    pub fn open(&self, policy: IoPolicy, direct_requested: bool) -> Option<Mode> {
        self.io_mode.open(policy, direct_requested)
    }

    /// One opener has closed it. The last one frees the memory that only openers need.
    pub fn release(&self) {
        if self.io_mode.release() {
            self.ranges.trim();
            self.unmap();
        }
    }

    /// How it is written through mappings, if it is.
    pub fn mapped(&self) -> Guard<Option<Arc<MappedFile>>> {
        self.mapped.load()
    }

    /// Whether it is written through mappings.
    pub fn is_mapped(&self) -> bool {
        self.was_mapped() && self.mapped().is_some()
    }

    /// Whether it is, or was, written through mappings since it is known.
    pub fn was_mapped(&self) -> bool {
        self.was_mapped.load(Ordering::Acquire)
    }

    /// From now on it is written through mappings, until the last opener has closed it. If it is already, nothing changes.
    pub fn map(&self, file: MappedFile) {
        self.was_mapped.store(true, Ordering::Release);
        self.mapped.compare_and_swap(std::ptr::null::<MappedFile>(), Some(Arc::new(file)));
    }

    /// Its last opener has closed it. A write that is still under way finds that it is not mapped any more, after it has
    /// unsettled the file, and settles it itself.
    fn unmap(&self) {
        if self.was_mapped()
            && let Some(file) = self.mapped.swap(None)
        {
            file.settle_and(self, || ());
        }
    }

    /// Sets the times of a file that was written through mappings since they were set.
    pub fn settle(&self) {
        if self.was_mapped()
            && let Some(file) = self.mapped().as_ref().filter(|file| file.is_unsettled())
        {
            file.settle_and(self, || ());
        }
    }

    /// Does what sets times: those of writes that were acknowledged before do not come later.
    pub fn settle_and<T>(&self, set: impl FnOnce() -> T) -> T {
        match &*self.mapped() {
            Some(file) => file.settle_and(self, set),
            None => set(),
        }
    }

    /// What a write checks has changed.
    pub fn revoke_mapping(&self) {
        if let Some(file) = &*self.mapped() {
            file.revoke();
        }
    }

    /// It was made durable.
    pub fn synced(&self) {
        if let Some(file) = &*self.mapped() {
            file.synced();
        }
    }

    /// Gives back windows that were not used for a while, or all of them since memory is short; returns whether it has others.
    fn drop_windows(&self, now: u64, memory_is_short: bool) -> bool {
        let mapped = self.mapped();
        let Some(file) = &*mapped else { return false };
        if memory_is_short {
            file.pause(now);
        }
        file.drop_idle(now)
    }

    /// Whether writes were acknowledged since the times were set.
    fn is_unsettled(&self) -> bool {
        self.was_mapped() && self.mapped().as_ref().is_some_and(|file| file.is_unsettled())
    }

    /// Is written through mappings no more, if it is unsettled: then its times are all that is left of them.
    fn leave_unsettled(&self) -> Option<Arc<MappedFile>> {
        if !self.is_unsettled() {
            return None;
        }
        let file = self.mapped.swap(None)?;
        file.drop_windows();
        Some(file)
    }

    /// Whether an earlier process has died before it set the times.
    fn is_unsettled_after_death(&self) -> bool {
        self.mount().fd_cache().records().inode(self.fd.record()).is_unsettled()
    }

    /// Sets the times, if an earlier process has died before it did; false if that has to be tried again.
    fn settle_after_death(&self) -> bool {
        // A write that comes meanwhile unsettles it after this.
        self.settle_and(|| {
            if !self.is_unsettled_after_death() {
                return true;
            }
            let is_done = self.touch().map_or_else(|errno| STAYS.contains(&errno), |()| true);
            if is_done {
                self.note_unsettled(false);
            }
            is_done
        })
    }

    /// Whether it had a set-group-ID bit without execution by the group when its attributes were last read.
    pub fn has_lone_group_bit(&self) -> bool {
        self.lone_group_bit.load(Ordering::Relaxed)
    }

    /// Whether it may have set-id bits that the daemon has to clear, since the host does not.
    pub fn may_have_set_id_bits(&self) -> bool {
        self.set_id_bits.load(Ordering::Relaxed)
    }

    /// Its attributes were read, and it has such bits or not.
    pub fn set_set_id_bits(&self, has: bool) {
        let has = has && self.mount().leaves_set_id_bits();
        if self.may_have_set_id_bits() != has {
            self.set_id_bits.store(has, Ordering::Relaxed);
        }
    }

    /// Its attributes were read.
    pub fn set_lone_group_bit(&self, is_set: bool) {
        // Nearly always it is so already: workers share the cache line until it changes.
        if self.has_lone_group_bit() != is_set {
            self.lone_group_bit.store(is_set, Ordering::Relaxed);
        }
    }
}

impl Times for Inode {
    fn note_unsettled(&self, is: bool) {
        let records = self.mount().fd_cache().records();
        let _lock = records.lock(self.node.0);
        records.inode(self.fd.record()).set_unsettled(is);
    }

    fn touch(&self) -> Result<()> {
        set_times(&*self.path()?, &present())
    }
}
