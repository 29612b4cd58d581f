//! The share is mounted anew: the guest's inodes and open files are opened again, below the new root.
//!
//! The server of a FUSE mount may die, or an administrator may unmount what is in use. What was open stays on the old mount,
//! where everything fails (ENOTCONN), also when the path of the share leads to a new mount. The host's kernel still tells
//! the path of each descriptor, without asking the server. So each inode is looked for by its path below the new root, and
//! gets the place of the old descriptor, under the same number; then each open file is opened again through its inode.
//!
//! This happens in a new worker, before it makes its tables of the records, so that nothing else uses them. One that dies
//! meanwhile leaves records of both mounts, and the next one goes on: the root comes last.
//!
//! What has no path any more (removed files, names that others have given to another type of file) stays on the old mount.
//! Locks are gone with it: the server has dropped them.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom, StatxFlags, fcntl_getfl, openat, openat2,
    readlinkat, seek, statx,
};
use rustix::io::{Errno, dup2};
use rustix::path::DecInt;

use super::mount::{file_system, numbers_alias_on};
use super::records::{Record, Records};
use super::{InodeKey, adopt_descriptor};
use crate::fs::Result;
use crate::fs::passthrough::host::{PATH, kind, stat};
use crate::state_file::{HandleRecord, InodeEntry, OwnerEntry, OwnerRecord, Slab, StateFile};
use fuse_protocol::ids::NodeId;

/// What the kernel appends to the path of what has no name any more.
const DELETED: &[u8] = b" (deleted)";
/// What an open file is not opened with again: it is there.
const ONCE: OFlags =
    OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC).union(OFlags::NOFOLLOW).union(OFlags::TMPFILE);

/// What was opened again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reopened {
    /// Inodes below the new root, of so many on the old mount.
    pub inodes: (usize, usize),
    /// Open files, of so many.
    pub files: (usize, usize),
    /// Owners of file locks, which have none any more.
    pub lock_owners: usize,
}

/// Opens again below `root` what the records in `state` have on the mount of their root. `proc_self_fd` is the directory
/// `/proc/self/fd` of this process.
pub fn reopen(state: &Arc<StateFile>, root: &OwnedFd, proc_self_fd: &OwnedFd) -> Result<Reopened> {
    let records = Records::new(state);
    let all: Vec<(Record, InodeEntry)> =
        records.inodes().used().filter_map(|index| Some((index, records.inode(index).load()?))).collect();
    let (root_record, root_entry) =
        all.iter().find(|(_, entry)| entry.node == NodeId::ROOT.0).ok_or(Errno::STALE)?;
    let old_root = root_entry.descriptor.ok_or(Errno::STALE)?;
    let names = Names { proc_self_fd, root, root_path: path_of(proc_self_fd, old_root)? };
    let mut done = Reopened::default();
    for (record, entry) in all.iter().filter(|(_, entry)| entry.mount == root_entry.mount) {
        let Some(number) = entry.descriptor.filter(|_| entry.node != NodeId::ROOT.0) else { continue };
        done.inodes.1 += 1;
        let Ok((found, key)) = names.find(number, entry) else { continue };
        replace(&found, number)?;
        records.inode(*record).set_found(&with_key(entry, &key));
        done.inodes.0 += 1;
    }
    let mut paths: HashMap<u64, RawFd> =
        all.iter().filter_map(|(_, entry)| Some((entry.node, entry.descriptor?))).collect();
    paths.insert(NodeId::ROOT.0, root.as_raw_fd());
    let files = Files { proc_self_fd, paths, old_mount: root_entry.mount };
    done.files = files.reopen(&Slab::new(state));
    done.lock_owners = files.reopen_lock_owners(&Slab::new(state));
    let key = InodeKey::of(&stat(root)?);
    replace(root, old_root)?;
    records.inode(*root_record).set_found(&with_key(root_entry, &key));
    Ok(done)
}

fn with_key(entry: &InodeEntry, key: &InodeKey) -> InodeEntry {
    InodeEntry {
        ino: key.ino,
        device: key.packed_device(),
        mount: key.mount,
        generation: key.generation,
        ..entry.clone()
    }
}

/// Puts a copy of `new` in the place of the descriptor with this number, in one step.
fn replace(new: &OwnedFd, number: RawFd) -> Result<()> {
    let mut old = ManuallyDrop::new(adopt_descriptor(number));
    dup2(new, &mut old)
}

/// The path of a descriptor, as the kernel tells it, without a slash at the end.
fn path_of(proc_self_fd: &OwnedFd, number: RawFd) -> Result<Vec<u8>> {
    let link = readlinkat(proc_self_fd, DecInt::new(number), Vec::new())?.into_bytes();
    Ok(link.strip_suffix(b"/").unwrap_or(&link).to_vec())
}

/// Finds inodes by their paths.
struct Names<'a> {
    proc_self_fd: &'a OwnedFd,
    root: &'a OwnedFd,
    /// The path of the old root.
    root_path: Vec<u8>,
}

impl Names<'_> {
    /// What has the path of the descriptor with this number now, and the type of the entry.
    fn find(&self, number: RawFd, entry: &InodeEntry) -> Result<(OwnedFd, InodeKey)> {
        let path = path_of(self.proc_self_fd, number)?;
        let below = path.strip_prefix(&*self.root_path).and_then(|path| path.strip_prefix(b"/"));
        let below = below.filter(|path| !path.is_empty() && !path.ends_with(DELETED)).ok_or(Errno::NOENT)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let found = openat2(self.root, below, PATH, Mode::empty(), resolve)?;
        let now = stat(&found)?;
        if kind(&now) != FileType::from_raw_mode(u32::from(entry.kind) << 12) {
            return Err(Errno::STALE);
        }
        let key = InodeKey::of(&now);
        let key = if numbers_alias_on(file_system(&found)) { key.with_kernels_number(&found) } else { key };
        Ok((found, key))
    }
}

/// Opens files through their inodes, of which these are the descriptors by now.
struct Files<'a> {
    proc_self_fd: &'a OwnedFd,
    paths: HashMap<u64, RawFd>,
    old_mount: u32,
}

impl Files<'_> {
    /// Whether a descriptor is still on the old mount. The server is not asked.
    fn is_old(&self, number: RawFd) -> bool {
        let fd = ManuallyDrop::new(adopt_descriptor(number));
        let stat = statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID);
        stat.is_ok_and(|stat| InodeKey::of(&stat).mount == self.old_mount)
    }

    /// Opens the inode with this node id, and puts what is open in the place of the descriptor `number`.
    fn open(&self, node: u64, flags: OFlags, number: RawFd) -> Result<()> {
        let path = self.paths.get(&node).filter(|path| !self.is_old(**path)).ok_or(Errno::STALE)?;
        let file = openat(self.proc_self_fd, DecInt::new(*path), flags, Mode::empty())?;
        // A directory is read on from where it was.
        let old = ManuallyDrop::new(adopt_descriptor(number));
        if let Ok(position @ 1..) = seek(old.as_fd(), SeekFrom::Current(0)) {
            let _ = seek(&file, SeekFrom::Start(position));
        }
        replace(&file, number)
    }

    /// Opens the guest's files again; how many of how many.
    fn reopen(&self, records: &Slab<HandleRecord>) -> (usize, usize) {
        let (mut done, mut all) = (0, 0);
        for entry in records.used().filter_map(|index| records.get(index).load()) {
            let Some(number) = entry.descriptor.filter(|number| self.is_old(*number)) else { continue };
            let flags = OFlags::from_bits_retain(entry.open_flags) - ONCE;
            all += 1;
            done += usize::from(self.open(entry.node, flags, number).is_ok());
        }
        (done, all)
    }

    /// Gives owners of file locks other open files, in which they have none; returns how many there are.
    fn reopen_lock_owners(&self, records: &Slab<OwnerRecord>) -> usize {
        let owners = records.used().filter_map(|index| records.get(index).load());
        let mut count = 0;
        for OwnerEntry { node, descriptor, .. } in owners.filter(|owner| self.is_old(owner.descriptor)) {
            let old = ManuallyDrop::new(adopt_descriptor(descriptor));
            let flags = fcntl_getfl(old.as_fd()).unwrap_or(OFlags::RDWR) & OFlags::RWMODE;
            // One that cannot be opened fails as its inode does.
            let _ = self.open(node, flags, descriptor);
            count += 1;
        }
        count
    }
}
