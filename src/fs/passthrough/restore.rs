//! Open files and locks as an earlier process has left them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat};

use super::handle_table::{DIRECTORY, Handle};
use super::host::file::HostFile;
use super::inode::io_mode::Mode as IoMode;
use super::inode::{Inode, OwnerFile, RestoredOwner, adopt_descriptor};
use super::state::PassthroughFs;
use crate::limits::GuestFd;
use crate::state_file::HandleEntry;
use crate::sys::locks::{ByteLock, flock_of_fdinfo, of_fdinfo};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};

impl PassthroughFs {
    /// The handles that the guest has, and its locks. Some of them are of inodes that it has `forgotten`. `fdinfo` is the
    /// directory that tells the locks of open files.
    pub(super) fn restore_files(&self, forgotten: &[Arc<Inode>], fdinfo: &OwnedFd) {
        let forgotten: HashMap<u64, &Arc<Inode>> =
            forgotten.iter().map(|inode| (inode.node().0, inode)).collect();
        self.handles.restore(|entry, descriptor| {
            let handle = self.restore_handle(entry, descriptor, &forgotten)?;
            if self.config.flock {
                let locks = fdinfo_of(fdinfo, handle.fd());
                handle.set_flock(locks.lines().find_map(flock_of_fdinfo));
            }
            Ok(handle)
        });
        self.restore_locks(fdinfo, &forgotten);
    }

    /// A handle; its descriptor if there is no such inode.
    fn restore_handle(
        &self,
        entry: &HandleEntry,
        descriptor: RawFd,
        forgotten: &HashMap<u64, &Arc<Inode>>,
    ) -> Result<Handle, GuestFd> {
        let fd = self.inodes.fds().take().wrap(adopt_descriptor(descriptor));
        let known = self.inodes.restored(NodeId(entry.node));
        let Some(inode) = known.or_else(|| forgotten.get(&entry.node).map(|inode| Arc::clone(inode))) else {
            return Err(fd);
        };
        let flags = OFlags::from_bits_retain(entry.open_flags);
        if entry.mode == DIRECTORY {
            let file = HostFile::new(fd, flags);
            return Ok(Handle::new_directory(inode, file, self.handles.restored_listing()));
        }
        inode.restore_opener(IoMode::of_number(entry.inode_mode));
        self.mapped_files.restore(&inode);
        Ok(Handle::new_file(inode, HostFile::restored(fd, flags), IoMode::of_number(entry.mode)))
    }

    /// The owners of POSIX locks, with what `fdinfo`, the directory, says of their files.
    fn restore_locks(&self, fdinfo: &OwnedFd, forgotten: &HashMap<u64, &Arc<Inode>>) {
        for mut owner in RestoredOwner::all(&self.owner_records) {
            let entry = *owner.entry();
            let file = self.inodes.fds().take().wrap(adopt_descriptor(entry.descriptor));
            if !owner.keep_handles(|handle| self.handles.get(NodeId(entry.node), HandleId(handle)).is_ok()) {
                owner.discard();
                continue;
            }
            let locks = locks_of(fdinfo, &file);
            let known = self.inodes.restored(NodeId(entry.node));
            let Some(inode) = known.or_else(|| forgotten.get(&entry.node).map(|inode| Arc::clone(inode)))
            else {
                owner.discard();
                continue;
            };
            let file = OwnerFile::restored(owner, file, &locks, &self.locked_ranges);
            inode.locks().restore(LockOwner(entry.owner), file);
        }
    }
}

/// The locks of an open file. If the host does not tell, none: they are held all the same, and only the process that
/// stands in the way of a lock is not known.
fn locks_of(fdinfo: &OwnedFd, file: &GuestFd) -> Vec<ByteLock> {
    fdinfo_of(fdinfo, file.as_fd()).lines().filter_map(of_fdinfo).collect()
}

/// What the host tells of a descriptor; nothing if it does not.
fn fdinfo_of(fdinfo: &OwnedFd, file: BorrowedFd<'_>) -> String {
    let name = file.as_raw_fd().to_string();
    let mut text = String::new();
    let open = openat(fdinfo, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    match open.map(|file| File::from(file).read_to_string(&mut text)) {
        Ok(Ok(_)) => text,
        _ => String::new(),
    }
}
