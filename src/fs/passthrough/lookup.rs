//! From names to inodes.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::DecInt;

use super::PassthroughFs;
use super::budget::{Held, Slot};
use super::inodes::{Inode, InodeKey};
use crate::fs::Result;
use crate::fuse::flags::AttrFlags;
use crate::fuse::reply::{Attributes, Entry};

/// What is asked of the host about an inode: all that replies need, and the mount.
const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);
/// An O_PATH descriptor of an entry itself, whatever it is: nothing is opened or followed.
pub(super) const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Attributes of what `fd` refers to.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// What identifies an inode on the host.
pub(super) fn key(stat: &Statx) -> InodeKey {
    InodeKey {
        device: (stat.stx_dev_major, stat.stx_dev_minor),
        ino: stat.stx_ino,
        mount: if stat.stx_mask & StatxFlags::MNT_ID.bits() != 0 { stat.stx_mnt_id } else { 0 },
    }
}

/// The type of an inode.
pub(super) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

impl PassthroughFs {
    /// Looks up an entry: one system call for an inode that the guest knows, three for a new one.
    pub(super) fn look_up(&self, parent: &Inode, name: &CStr) -> Result<Entry> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let seen = statx(parent.path()?, name, flags, WANTED)?;
        if let Some(inode) = self.inodes.find(&key(&seen)) {
            return Ok(self.entry(&inode, &seen, Some(parent)));
        }
        self.open_new(parent, name, self.budget.take()?)
    }

    /// Looks up an entry that the guest cannot know yet, as it was just made.
    pub(super) fn open_new(&self, parent: &Inode, name: &CStr, slot: Slot) -> Result<Entry> {
        let path = slot.hold(openat(parent.path()?, name, PATH, Mode::empty())?);
        self.adopt(path, Some(parent)).map(|(entry, _)| entry)
    }

    /// The entry of what `path` refers to, which counts as looked up.
    pub(super) fn adopt(&self, path: Held, parent: Option<&Inode>) -> Result<(Entry, Arc<Inode>)> {
        let stat = stat(&path)?;
        let inode = self.inodes.find_or_insert(key(&stat), kind(&stat), path)?;
        Ok((self.entry(&inode, &stat, parent), inode))
    }

    /// LOOKUP of `.`.
    pub(super) fn look_up_self(&self, inode: &Inode) -> Result<Entry> {
        let stat = stat(inode.path()?)?;
        let inode = self.inodes.find(&key(&stat)).ok_or(Errno::STALE)?;
        Ok(self.entry(&inode, &stat, None))
    }

    /// LOOKUP of `..`: only a directory that the guest knows is given, so that nothing outside the
    /// share is found, also when the directory was moved out of it. The root is its own parent.
    pub(super) fn look_up_parent(&self, inode: &Inode) -> Result<Entry> {
        if inode.node == crate::fuse::ids::NodeId::ROOT {
            return self.look_up_self(inode);
        }
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let stat = statx(inode.path()?, c"..", AtFlags::NO_AUTOMOUNT, WANTED)?;
        let parent = self.inodes.find(&key(&stat)).ok_or(Errno::STALE)?;
        Ok(self.entry(&parent, &stat, None))
    }

    fn entry(&self, inode: &Inode, stat: &Statx, parent: Option<&Inode>) -> Entry {
        let timeout = self.config.cache.timeout();
        let mut attr = self.attr_of(stat);
        let other_mount = parent.is_some_and(|parent| parent.key.mount != inode.key.mount);
        if other_mount && inode.kind == FileType::Directory && self.session().submounts {
            attr.flags |= AttrFlags::SUBMOUNT.bits();
        }
        let attributes = Attributes { attr, valid: self.attributes_valid(inode, stat) };
        Entry { node: inode.node, generation: 0, entry_valid: timeout, attributes }
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
            openat(&self.proc_self_fd, DecInt::from_fd(&*path), flags | OFlags::CLOEXEC, Mode::empty())
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
