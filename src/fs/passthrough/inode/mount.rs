//! Mounts that inodes of the guest are on: the share's own, and those below it.
//!
//! A mount is known for as long as the guest knows an inode on it. Then all of its descriptors are closed, so that the
//! host can unmount it.
//!
//! The file system of a mount decides how its inodes are identified. File systems where that is unusual:
//!
//! | file system | handles | inode numbers |
//! |---|---|---|
//! | FUSE (also GlusterFS, ceph-fuse, sshfs, virtiofs) | valid only while the kernel has the inode in its cache | the server's choice: two files may have one number |
//! | vfat | as FUSE, by default (`nfs=stale_rw`) | made by the kernel; kept while the inode is in use |
//! | 9p | none | the server's, unless `-o` says otherwise; unique in practice |
//! | NFS | the server's, and durable; an unlinked file's ends when its last client closes it | the server's |
//! | ceph (kernel client) | durable: looked up at the metadata server | unique |
//! | overlayfs | none without `nfs_export=on`, durable with it | may change at copy-up where the layers are on several file systems |
//! | btrfs | durable | each subvolume has its own, and a device number for itself |
//! | CIFS | cannot be opened | made by the kernel with `noserverino`; kept while the inode is in use |
//!
//! Where handles are not durable, or cannot be opened when the mount is met, inodes keep their descriptors, which also
//! keeps their numbers from being reused.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};

use rustix::fs::{FileType, Mode, OFlags, StatFs, fstatfs, openat};
use rustix::io::Errno;

use super::Inode;
use super::fd_cache::FdCache;
use crate::fs::Result;
use crate::limits::GuestFd;
use crate::state_file::{Index, MountEntry, MountRecord};
use crate::sys::file_handles::{name_to_handle, open_by_handle};

/// `FUSE_SUPER_MAGIC` of linux/magic.h.
const FUSE: u32 = 0x6573_5546;
/// `MSDOS_SUPER_MAGIC`: vfat.
const VFAT: u32 = 0x4d44;
/// `TMPFS_MAGIC`.
const TMPFS: u32 = 0x0102_1994;
/// `EXT4_SUPER_MAGIC`; ext2 and ext3, which the same code serves, have it too.
const EXT4: u32 = 0xef53;
/// The page size of most machines, in bytes: of smaller blocks, several share a page.
const BLOCK: i64 = 4096;
/// `XFS_SUPER_MAGIC`.
const XFS: u32 = 0x5846_5342;

/// What a file system is, as far as mappings of its files are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Files are in memory.
    Memory,
    /// A local disk, whose page cache is what mappings show.
    Disk,
    /// Another one, perhaps of other hosts.
    Other,
}

impl Kind {
    /// What fstatfs(2) says of it.
    fn of(stat: &StatFs) -> Kind {
        match magic(stat) {
            Some(TMPFS) => Kind::Memory,
            // With smaller blocks, kernels before 2025 may leave a page writable of which a block was taken away.
            Some(EXT4 | XFS) if stat.f_bsize >= BLOCK => Kind::Disk,
            _ => Kind::Other,
        }
    }
}

/// A mount, with what is needed to open its inodes by file handle. Each LOOKUP reads it, and each new inode
/// changes the count of those who share it: they have cache lines of their own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Mount {
    id: u32,
    is_fuse: bool,
    is_of_a_file: bool,
    kind: OnceLock<Kind>,
    /// A directory on it that is open, not only as O_PATH, if its inodes may be opened by handle.
    directory: Option<GuestFd>,
    /// The first directory on it that the guest looked up.
    top: OnceLock<Weak<Inode>>,
    fd_cache: Arc<FdCache>,
    /// `None` if there was none left: its inodes do not outlive the process.
    record: Option<Index<MountRecord>>,
}

impl Mount {
    /// The mount that `inode` (an O_PATH descriptor is enough) is on.
    pub(super) fn new(id: u32, inode: impl AsFd, kind: FileType, fd_cache: &Arc<FdCache>) -> Mount {
        let file_system = file_system(&inode);
        let limited = fd_cache.evicts() && kind == FileType::Directory;
        let directory = limited.then(|| open_for_handles(&inode, file_system, fd_cache));
        if let Some(Err(errno)) = &directory {
            fd_cache.report_mount(*errno);
        }
        let directory = directory.and_then(Result::ok);
        let numbers_alias = numbers_alias_on(file_system);
        if file_system == Some(FUSE) {
            fd_cache.report_fuse();
        }
        let descriptor = directory.as_ref().map(|directory| directory.as_fd().as_raw_fd());
        let is_of_a_file = kind != FileType::Directory;
        let entry = MountEntry { id, descriptor, numbers_alias, is_of_a_file };
        let record = fd_cache.records().add_mount(&entry);
        Mount::with(&entry, directory, record, fd_cache)
    }

    /// The mount in a record. `directory` is its descriptor, if it has one.
    pub(super) fn restored(
        entry: &MountEntry,
        directory: Option<GuestFd>,
        record: Index<MountRecord>,
        fd_cache: &Arc<FdCache>,
    ) -> Mount {
        Mount::with(entry, directory, Some(record), fd_cache)
    }

    fn with(
        entry: &MountEntry,
        directory: Option<GuestFd>,
        record: Option<Index<MountRecord>>,
        fd_cache: &Arc<FdCache>,
    ) -> Mount {
        let MountEntry { id, numbers_alias, is_of_a_file, .. } = *entry;
        if numbers_alias {
            fd_cache.note_fuse();
        }
        let (top, fd_cache) = (OnceLock::new(), Arc::clone(fd_cache));
        let kind = OnceLock::new();
        Mount { id, is_fuse: numbers_alias, is_of_a_file, kind, directory, top, fd_cache, record }
    }

    /// Its number; see [`super::InodeKey::mount`].
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether different inodes may have the same number: the kernel's own number, which stands in the handle, tells
    /// them apart.
    pub fn numbers_alias(&self) -> bool {
        self.is_fuse
    }

    /// Whether its files are a FUSE server's, or may be.
    pub fn is_fuse(&self) -> bool {
        self.is_fuse
    }

    /// Whether the host's kernel may leave set-id bits of a file that is written. Its FUSE client clears them before a write
    /// to its page cache. Direct writes go to the server as they are, with a flag that few servers look at.
    pub fn leaves_set_id_bits(&self) -> bool {
        self.is_fuse
    }

    /// Whether appends are a matter of a FUSE server, which has to be told that a write is one: other hosts may have
    /// appended since this one has last asked for the size.
    pub fn server_appends(&self) -> bool {
        self.is_fuse
    }

    /// What kind of file system it is; `file` is one of its files.
    pub fn kind(&self, file: impl AsFd) -> Kind {
        *self.kind.get_or_init(|| fstatfs(file).map_or(Kind::Other, |stat| Kind::of(&stat)))
    }

    /// Whether a single file is mounted, not a directory.
    pub fn is_of_a_file(&self) -> bool {
        self.is_of_a_file
    }

    /// The descriptors of all inodes.
    pub(super) fn fd_cache(&self) -> &FdCache {
        &self.fd_cache
    }

    /// Where its inodes are opened by handle; `None` if they must keep their descriptors.
    pub fn directory(&self) -> Option<&GuestFd> {
        self.directory.as_ref()
    }

    /// Whether its inodes can be opened by handle, by this daemon and for as long as they exist.
    pub fn opens_handles(&self) -> bool {
        self.directory.is_some()
    }

    /// Remembers a directory of it, by a weak reference.
    pub(super) fn add_top(&self, inode: &Arc<Inode>) {
        if inode.is_directory() && self.top.get().is_none() {
            // Another thread's directory is as good.
            let _ = self.top.set(Arc::downgrade(inode));
        }
    }

    /// The first directory on it that the guest looked up. The guest knows it for as long as any other inode there, since
    /// its kernel forgets children first.
    pub fn top(&self) -> Option<Arc<Inode>> {
        self.top.get().and_then(Weak::upgrade)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.fd_cache.forget_mount(self.id);
        if let Some(record) = self.record {
            // Before the descriptor is closed.
            self.fd_cache.records().drop_mount(record);
        }
    }
}

/// Why inodes cannot be held by file handles at the share: the file system's handles are not durable, or a
/// system call failed.
pub(super) fn try_handles(root: impl AsFd) -> Result<()> {
    open_directory(&root, file_system(&root)).map(drop)
}

fn open_for_handles(inode: impl AsFd, file_system: Option<u32>, fd_cache: &FdCache) -> Result<GuestFd> {
    let permit = fd_cache.quota().acquire()?;
    Ok(permit.wrap(open_directory(inode, file_system)?))
}

/// The directory itself, after an inode was opened there by its handle.
fn open_directory(directory: impl AsFd, file_system: Option<u32>) -> Result<OwnedFd> {
    if !handles_are_durable(file_system) {
        return Err(Errno::OPNOTSUPP);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let open = openat(&directory, c".", flags, Mode::empty())?;
    open_by_handle(open.as_fd(), &name_to_handle(directory.as_fd())?)?;
    Ok(open)
}

/// Whether different inodes may have one number on a file system. A FUSE server may leave the question for its kind
/// unanswered.
pub(super) fn numbers_alias_on(file_system: Option<u32>) -> bool {
    matches!(file_system, None | Some(FUSE))
}

/// The magic number of the file system; `None` if it cannot be had.
pub(super) fn file_system(fd: impl AsFd) -> Option<u32> {
    magic(&fstatfs(fd).ok()?)
}

fn magic(stat: &StatFs) -> Option<u32> {
    // The number has 32 bits, and its type on some machines a sign.
    u32::try_from(stat.f_type & 0xffff_ffff).ok()
}

fn handles_are_durable(file_system: Option<u32>) -> bool {
    !matches!(file_system, None | Some(FUSE | VFAT))
}
