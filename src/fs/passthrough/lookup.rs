//! From names to inodes.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::DecInt;

use super::PassthroughFs;
use super::budget::{Held, Slot};
use super::inodes::{Inode, InodeKey, Seen};
use super::mounts::Mount;
use crate::fs::Result;
use crate::sys::file_handles::{entry_to_handle, name_to_handle};
use fuse_protocol::abi;
use fuse_protocol::flags::AttrFlags;
use fuse_protocol::ids::NodeId;
use fuse_protocol::reply::{Attributes, Entry};

/// What is asked of the host about an inode: all that replies need, and the mount.
pub(super) const WANTED: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);
/// An O_PATH descriptor of an entry itself, whatever it is: nothing is opened or followed.
pub(super) const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Attributes of what `fd` refers to.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// What identifies an inode on the host, by its number.
pub(super) fn key(stat: &Statx) -> InodeKey {
    let (major, minor) = (stat.stx_dev_major, stat.stx_dev_minor);
    // Ids of mounts are ints; of a device Linux keeps 12 and 20 bits.
    let mount = match stat.stx_mask & StatxFlags::MNT_ID.bits() {
        0 => major << 20 | minor & 0xf_ffff,
        _ => u32::try_from(stat.stx_mnt_id).unwrap_or(u32::MAX),
    };
    InodeKey { device: (major, minor), ino: stat.stx_ino, mount, generation: 0 }
}

/// The same where numbers may stand for several files: by the number of the host's kernel, as long as it
/// says that one.
pub(super) fn key_on(mount: &Mount, key: InodeKey, path: impl AsFd) -> InodeKey {
    let handle = mount.numbers_alias.then(|| name_to_handle(path.as_fd()).ok()).flatten();
    match handle.and_then(|handle| handle.number_and_generation()) {
        Some((ino, generation)) => InodeKey { ino, generation, ..key },
        None => key,
    }
}

/// The type of an inode.
pub(super) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

impl PassthroughFs {
    /// The right to hold one more descriptor for the guest. Inodes that can do without theirs give way.
    pub(super) fn slot(&self) -> Result<Slot> {
        match self.budget.take() {
            Err(Errno::MFILE) if self.inodes.make_room() => self.budget.take(),
            result => result,
        }
    }

    /// What `open` opens. Where the process has no descriptor left at all, inodes give way.
    pub(super) fn with_room(&self, open: impl Fn() -> Result<OwnedFd>) -> Result<OwnedFd> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) if self.inodes.process_is_full() => open(),
            result => result,
        }
    }

    /// Looks up an entry: one system call for an inode that the guest knows (two if it has no descriptor),
    /// three for a new one.
    pub(super) fn look_up(&self, parent: &Inode, name: &CStr) -> Result<Entry> {
        self.look_up_at(parent.path()?.as_fd(), parent, name)
    }

    /// As [`PassthroughFs::look_up`], where a descriptor of `parent` is at hand.
    pub(super) fn look_up_at(&self, directory: BorrowedFd<'_>, parent: &Inode, name: &CStr) -> Result<Entry> {
        let before = self.inodes.ids_given();
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(directory, name, flags, WANTED)?;
        let seen = Seen { key: key(&stat), kind: kind(&stat), before };
        if self.numbers_tell(parent, seen.key.mount)
            && let Some(inode) = self.inodes.find(&seen, || entry_to_handle(directory, name))
        {
            return Ok(self.entry(&inode, &stat, Some(parent)));
        }
        match self.slot() {
            Ok(slot) => self.open_new(parent, name, slot),
            // What the guest knows already it may look up when it has all descriptors that it may have.
            Err(Errno::MFILE) => {
                let path = openat(directory, name, PATH, Mode::empty())?;
                let (inode, stat) = self.find_open(&path, Some(parent))?.ok_or(Errno::MFILE)?;
                Ok(self.entry(&inode, &stat, Some(parent)))
            }
            Err(errno) => Err(errno),
        }
    }

    /// Whether numbers are enough to tell inodes apart on this mount, which an entry of `parent` is on.
    fn numbers_tell(&self, parent: &Inode, mount: u32) -> bool {
        if mount == parent.key.mount {
            return !parent.mount().numbers_alias;
        }
        self.inodes.descriptors().known_mount(mount).is_some_and(|mount| !mount.numbers_alias)
    }

    /// Looks up an entry that the guest cannot know yet, as it was just made.
    pub(super) fn open_new(&self, parent: &Inode, name: &CStr, slot: Slot) -> Result<Entry> {
        let parent_path = parent.path()?;
        let path = slot.hold(self.with_room(|| openat(&*parent_path, name, PATH, Mode::empty()))?);
        self.adopt(path, Some(parent)).map(|(entry, _)| entry)
    }

    /// The entry of what `path` refers to, which counts as looked up.
    pub(super) fn adopt(&self, path: Held, parent: Option<&Inode>) -> Result<(Entry, Arc<Inode>)> {
        let stat = stat(&path)?;
        let mount = self.mount_of(&path, &stat, parent)?;
        let key = key_on(&mount, key(&stat), &path);
        let inode = self.inodes.find_or_insert(key, kind(&stat), path, mount)?;
        Ok((self.entry(&inode, &stat, parent), inode))
    }

    /// The inode that `path` refers to, if the guest knows it; it counts as looked up once more.
    fn find_open(&self, path: &OwnedFd, parent: Option<&Inode>) -> Result<Option<(Arc<Inode>, Statx)>> {
        let stat = stat(path)?;
        let mount = self.mount_of(path, &stat, parent)?;
        // The descriptor holds the number since before anybody else could have got it.
        let before = NodeId(u64::MAX);
        let seen = Seen { key: key_on(&mount, key(&stat), path), kind: kind(&stat), before };
        Ok(self.inodes.find(&seen, || name_to_handle(path.as_fd())).map(|inode| (inode, stat)))
    }

    fn mount_of(&self, path: impl AsFd, stat: &Statx, parent: Option<&Inode>) -> Result<Arc<Mount>> {
        let id = key(stat).mount;
        match parent.map(Inode::mount) {
            Some(mount) if mount.id == id => Ok(Arc::clone(mount)),
            _ => self.inodes.descriptors().mount(id, path, kind(stat)),
        }
    }

    /// LOOKUP of `.`.
    pub(super) fn look_up_self(&self, inode: &Inode) -> Result<Entry> {
        let stat = stat(inode.path()?)?;
        self.inodes.look_up_again(inode)?;
        Ok(self.entry(inode, &stat, None))
    }

    /// LOOKUP of `..`: only a directory that the guest knows is given, so that nothing outside the
    /// share is found, also when the directory was moved out of it. The root is its own parent.
    pub(super) fn look_up_parent(&self, inode: &Inode) -> Result<Entry> {
        if inode.node == NodeId::ROOT {
            return self.look_up_self(inode);
        }
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let path = openat(inode.path()?, c"..", PATH | OFlags::DIRECTORY, Mode::empty())?;
        let (parent, stat) = self.find_open(&path, Some(inode))?.ok_or(Errno::STALE)?;
        Ok(self.entry(&parent, &stat, None))
    }

    pub(super) fn entry(&self, inode: &Inode, stat: &Statx, parent: Option<&Inode>) -> Entry {
        let timeout = self.config.cache.timeout();
        let attr = self.attr_of(stat);
        let mut attr = abi::Attr { ino: self.shown_number(inode, stat.stx_ino), ..attr };
        // A subvolume (btrfs) has a device for itself on its parent's mount.
        let is_root_of_another =
            |parent: &Inode| (parent.key.mount, parent.key.device) != (inode.key.mount, inode.key.device);
        let is_submount = inode.kind == FileType::Directory && parent.is_some_and(is_root_of_another);
        if is_submount && self.session().submounts {
            attr.flags |= AttrFlags::SUBMOUNT.bits();
        }
        let attributes = Attributes { attr, valid: self.attributes_valid(inode, stat) };
        Entry { node: inode.node, generation: 0, entry_valid: timeout, attributes }
    }

    /// The number of an inode as the guest sees it, which is `number` on the host.
    ///
    /// Where the guest does not know that an inode is on another device than the share's root, numbers of
    /// both would be taken for one: the difference of the devices goes to the upper bits.
    pub(super) fn shown_number(&self, inode: &Inode, number: u64) -> u64 {
        let root = self.inodes.root().key.device;
        if inode.key.device == root || (self.session().submounts && !inode.mount().is_of_a_file) {
            return number;
        }
        let bits = |(major, minor): (u32, u32)| u64::from((major & 0xf) << 12 | minor & 0xfff);
        number ^ (bits(inode.key.device) ^ bits(root)) << 48
    }

    /// Opens an inode anew with `flags`: regular files and directories only. Devices, FIFOs and
    /// sockets belong to the guest's kernel and are never opened on the host.
    pub(super) fn reopen(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        match inode.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let path = inode.path()?;
        let open = |flags| {
            self.with_room(|| {
                openat(&self.proc_self_fd, DecInt::from_fd(&*path), flags | OFlags::CLOEXEC, Mode::empty())
            })
        };
        if self.config.readonly {
            // Only the owner and CAP_FOWNER may.
            match open(flags | OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                result => return result,
            }
        }
        open(flags)
    }

    /// An O_PATH descriptor of what `file` has open.
    pub(super) fn path_of(&self, file: &OwnedFd) -> Result<OwnedFd> {
        path_by_tree(file).or_else(|_| {
            openat(&self.proc_self_fd, DecInt::from_fd(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        })
    }
}

/// As [`PassthroughFs::path_of`], without a walk through /proc. It fails on hosts before Linux 5.2,
/// and in containers that forbid the call.
fn path_by_tree(file: &OwnedFd) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(file, c"", flags)
}

/// The name of an inode below the working directory, which is `/proc/self/fd`: for the system calls
/// that take no descriptor. The kernel goes from there straight to the inode, also if it is a
/// symbolic link.
///
/// `path` has to stay open for as long as the name is used.
pub(super) fn proc_name(path: impl AsFd) -> DecInt {
    DecInt::from_fd(path)
}

/// Where [`proc_name`] is looked up.
pub(super) const PROC: rustix::fd::BorrowedFd<'static> = CWD;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_has_a_path_also_without_a_name() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let name = folder.path().join("file");
        let file: OwnedFd = std::fs::File::create(&name).unwrap().into();
        let unnamed = openat(CWD, folder.path(), OFlags::TMPFILE | OFlags::RDWR, Mode::empty()).unwrap();
        std::fs::remove_file(&name).unwrap();
        for file in [file, unnamed] {
            let path = path_by_tree(&file).unwrap();
            assert_eq!(key(&stat(&path).unwrap()), key(&stat(&file).unwrap()));
            assert!(rustix::fs::fcntl_getfl(&path).unwrap().contains(OFlags::PATH));
            let flags = rustix::io::fcntl_getfd(&path).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
}
