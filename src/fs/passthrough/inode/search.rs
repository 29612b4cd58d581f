//! What an inode of a snapshot is on this host: opens it below the descriptor of its directory, by path or by handle, and
//! compares it with what the source had.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use rustix::fs::{Mode, Statx, openat};
use rustix::io::Errno;

use super::inode_fd::PathGuard;
use super::unresolved::{Entry, Set, State};
use super::{InodeKey, InodeTable, Mount, unnamed};
use crate::fs::Result;
use crate::fs::passthrough::host::{PATH, kind, stat};
use crate::limits::GuestFd;
use crate::migration::{FileHandle, Identity, Inode as Wanted, Location};
use crate::sys::file_handles::{self, name_to_handle, open_by_handle};
use fuse_protocol::ids::NodeId;

/// What was found.
pub(super) struct Found {
    pub path: GuestFd,
    pub stat: Statx,
    pub mount: Arc<Mount>,
}

/// The descriptor of a directory.
pub(super) enum Directory {
    Known(PathGuard),
    Passed(Arc<GuestFd>),
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Directory::Known(path) => path.as_fd(),
            Directory::Passed(path) => path.as_fd(),
        }
    }
}

/// What tells an inode from others, by its attributes.
pub fn identity(stat: &Statx) -> Identity {
    let time = &stat.stx_btime;
    let has_birth = stat.stx_mask & rustix::fs::StatxFlags::BTIME.bits() != 0;
    // 64 bits last until the year 2262.
    let born = time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec.into());
    let kind = u8::try_from(kind(stat).as_raw_mode() >> 12).unwrap_or(0);
    Identity { kind, ino: stat.stx_ino, born: has_birth.then_some(born) }
}

/// Whether one of these can be the other, some time apart.
pub fn is_same(before: &Identity, now: &Identity) -> bool {
    let born = before.born.is_none() || now.born.is_none() || before.born == now.born;
    before.kind == now.kind && before.ino == now.ino && born
}

/// Errors that say that an inode does not exist here any more, or will never be reached.
pub(super) fn is_final(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOENT
            | Errno::NOTDIR
            | Errno::LOOP
            | Errno::STALE
            | Errno::NAMETOOLONG
            | Errno::ACCESS
            | Errno::PERM
    )
}

impl InodeTable {
    /// Opens what an entry was, and checks that it is the same.
    pub(super) fn search(&self, set: &Set, entry: &Entry) -> Result<Found> {
        let opened = self.open_location(set, &entry.wanted);
        let checked = opened.and_then(|path| {
            let found = self.found(path)?;
            if self.is_it(set, entry, &found)? { Ok(found) } else { Err(Errno::STALE) }
        });
        match (checked, &entry.wanted.handle) {
            // It was moved or replaced, and may still be there.
            (Err(errno), Some(handle)) if is_final(errno) => {
                let found = self.open_handle(set, handle).and_then(|path| self.found(path));
                found.map_err(|_| errno)
            }
            (checked, _) => checked,
        }
    }

    pub(super) fn found(&self, path: GuestFd) -> Result<Found> {
        let stat = stat(&path)?;
        let mount = self.fd_cache.mount(InodeKey::of(&stat).mount, &path, kind(&stat))?;
        Ok(Found { path, stat, mount })
    }

    fn open_location(&self, set: &Set, wanted: &Wanted) -> Result<GuestFd> {
        match &wanted.location {
            Location::Child { parent, name } => {
                let directory = self.directory(set, NodeId(*parent))?;
                self.open_counted(|| open_entry(directory.as_fd(), name))
            }
            Location::Path(path) => self.open_counted(|| self.open_below_root(path)),
            Location::Handle(handle) => self.open_handle(set, handle),
            Location::Unlinked(content) => {
                if let Some(handle) = &wanted.handle
                    && let Ok(path) = self.open_handle(set, handle)
                    && stat(&path)
                        .is_ok_and(|now| wanted.identity.is_none_or(|was| is_same(&was, &identity(&now))))
                {
                    return Ok(path);
                }
                self.open_counted(|| unnamed::make(&*self.root.path()?, content))
            }
            Location::Root | Location::Lost(_) => Err(Errno::STALE),
        }
    }

    pub(super) fn open_counted(&self, open: impl Fn() -> Result<OwnedFd>) -> Result<GuestFd> {
        if self.fd_cache.over_limit() {
            self.evict_some();
        }
        let permit = self.acquire_fd()?;
        Ok(permit.wrap(self.with_room(open)?))
    }

    /// The directory with this id, which was found before.
    pub(super) fn directory(&self, set: &Set, node: NodeId) -> Result<Directory> {
        if let Some(directory) = self.open_directory(set, node) {
            return directory;
        }
        // The guest has forgotten it since, and has not forgotten what is in it: these requests may overtake each other.
        let (mut chain, mut next) = (Vec::new(), node);
        while self.open_directory(set, next).is_none() {
            let entry = set.find(next.0).filter(|entry| entry.is_found()).ok_or(Errno::STALE)?;
            chain.push(entry);
            next = entry.place().map(|(parent, _)| NodeId(parent)).ok_or(Errno::STALE)?;
            if chain.len() > set.entries().len() {
                return Err(Errno::LOOP);
            }
        }
        for entry in chain.into_iter().rev() {
            let found = self.search(set, entry)?;
            *entry.state() = State::Found(Some(Arc::new(found.path)));
        }
        self.open_directory(set, node).unwrap_or(Err(Errno::STALE))
    }

    /// The same if it has a descriptor, or is in the table.
    fn open_directory(&self, set: &Set, node: NodeId) -> Option<Result<Directory>> {
        let known = if node == NodeId::ROOT { Some(Arc::clone(&self.root)) } else { self.known(node) };
        if let Some(inode) = known {
            return Some(inode.path().map(Directory::Known));
        }
        match &*set.find(node.0)?.state() {
            State::Found(Some(path)) => Some(Ok(Directory::Passed(Arc::clone(path)))),
            _ => None,
        }
    }

    /// Opens a path component by component. No link is followed, and none leads upwards.
    pub fn open_below_root(&self, path: &[u8]) -> Result<OwnedFd> {
        let mut at: Option<OwnedFd> = None;
        let root = self.root.path()?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let directory = at.as_ref().map_or(root.as_fd(), AsFd::as_fd);
            at = Some(open_entry(directory, name)?);
        }
        at.ok_or(Errno::NOENT)
    }

    fn open_handle(&self, set: &Set, handle: &FileHandle) -> Result<GuestFd> {
        if !set.origin.opens_handles {
            return Err(Errno::STALE);
        }
        let mount = self.mount_of(set, handle.mount).ok_or(Errno::STALE)?;
        let directory = mount.directory().ok_or(Errno::STALE)?;
        let host = file_handles::FileHandle::new(handle.kind, &handle.bytes);
        self.open_counted(|| open_by_handle(directory.as_fd(), &host))
    }

    /// The mount that the source calls so.
    fn mount_of(&self, set: &Set, number: u64) -> Option<Arc<Mount>> {
        let path =
            set.origin.mounts.iter().find(|(mount, _)| *mount == number).map(|(_, path)| path.as_slice());
        // A stream without paths of mounts knows one mount.
        let is_root = path.map_or(set.origin.mounts.is_empty(), <[u8]>::is_empty);
        if is_root {
            return Some(Arc::clone(self.root.mount()));
        }
        let mut mounts = set.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let path = self.open_below_root(path?).ok()?;
            let stat = stat(&path).ok()?;
            self.fd_cache.mount(InodeKey::of(&stat).mount, &path, kind(&stat)).ok()
        };
        mounts.entry(number).or_insert_with(open).clone()
    }

    /// Whether what was found is what the source had.
    fn is_it(&self, set: &Set, entry: &Entry, found: &Found) -> Result<bool> {
        if matches!(entry.wanted.location, Location::Unlinked(_)) {
            return Ok(true);
        }
        let now = identity(&found.stat);
        if let Some(was) = entry.wanted.identity {
            let mut mounts = set.same_mounts.lock().unwrap_or_else(PoisonError::into_inner);
            let root = self.root.mount().id();
            let first = || if found.mount.id() == root { set.origin.is_same } else { is_same(&was, &now) };
            let numbers_count = *mounts.entry(found.mount.id()).or_insert_with(first);
            if was.kind != now.kind || numbers_count && !is_same(&was, &now) {
                return Ok(false);
            }
        }
        match &entry.wanted.handle {
            Some(was) => {
                let now = name_to_handle(found.path.as_fd())?;
                Ok((now.kind(), now.bytes()) == (was.kind, was.bytes.as_slice()))
            }
            None => Ok(true),
        }
    }
}

/// An entry of a directory itself, whatever it is.
fn open_entry(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(Errno::NOENT);
    }
    let name = CString::new(name).map_err(|_| Errno::NOENT)?;
    openat(directory, name.as_c_str(), PATH, Mode::empty())
}
