//! LOOKUP: from names to inodes.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, Statx, openat};
use rustix::io::Errno;

use super::guest_view::GuestView;
use crate::fs::Result;
use crate::fs::passthrough::host::{PATH, kind, stat, stat_entry};
use crate::fs::passthrough::inode::{Inode, InodeKey, InodeTable, Mount, Seen};
use crate::limits::{FdPermit, GuestFd};
use crate::sys::file_handles::{entry_to_handle, name_to_handle};
use fuse_protocol::ids::NodeId;
use fuse_protocol::name::LookupName;
use fuse_protocol::reply::Entry;

/// LOOKUP.
pub fn lookup(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    parent: &Inode,
    name: LookupName<'_>,
) -> Result<Entry> {
    match name {
        LookupName::Entry(name) => lookup_entry(inodes, view, parent, name.as_c_str()),
        LookupName::This => lookup_self(inodes, view, parent),
        LookupName::Parent => lookup_parent(inodes, view, parent),
    }
}

/// Looks up an entry: one system call for an inode that the guest knows (two if it was evicted), three for a new one.
pub fn lookup_entry(inodes: &InodeTable, view: &GuestView<'_>, parent: &Inode, name: &CStr) -> Result<Entry> {
    lookup_at(inodes, view, parent.path()?.as_fd(), parent, name)
}

/// As [`lookup_entry`], where a descriptor of `parent` is open anyway.
pub fn lookup_at(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    directory: BorrowedFd<'_>,
    parent: &Inode,
    name: &CStr,
) -> Result<Entry> {
    let before = inodes.ids_given();
    let stat = stat_entry(directory, name)?;
    inodes.resolve_met(&stat, Some((parent.node(), name.to_bytes())));
    let seen = Seen::by_name(&stat, before);
    if numbers_identify(inodes, parent, seen.key.mount)
        && let Some(inode) = inodes.find(view.effects, &seen, || entry_to_handle(directory, name))
    {
        return Ok(view.entry(&inode, &stat, Some(parent)));
    }
    match inodes.acquire_fd() {
        Ok(permit) => lookup_new(inodes, view, parent, name, permit),
        // A guest that has used up its quota may look up what it knows already.
        Err(Errno::MFILE) => {
            let path = openat(directory, name, PATH, Mode::empty())?;
            let (inode, stat) = find_open(inodes, view, &path, Some(parent))?.ok_or(Errno::MFILE)?;
            Ok(view.entry(&inode, &stat, Some(parent)))
        }
        Err(errno) => Err(errno),
    }
}

/// Whether numbers are enough to identify inodes on this mount, which an entry of `parent` is on.
fn numbers_identify(inodes: &InodeTable, parent: &Inode, mount: u32) -> bool {
    if mount == parent.key().mount {
        return !parent.mount().numbers_alias();
    }
    inodes.fd_cache().known_mount(mount).is_some_and(|mount| !mount.numbers_alias())
}

/// Looks up an entry that the guest cannot know yet, as it was just made.
pub fn lookup_new(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    parent: &Inode,
    name: &CStr,
    permit: FdPermit,
) -> Result<Entry> {
    let directory = parent.path()?;
    let path = permit.wrap(inodes.with_room(|| openat(&*directory, name, PATH, Mode::empty()))?);
    adopt(inodes, view, path, Some(parent)).map(|(entry, _)| entry)
}

/// The entry of what `path` refers to; counts one lookup.
pub fn adopt(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    path: GuestFd,
    parent: Option<&Inode>,
) -> Result<(Entry, Arc<Inode>)> {
    let stat = stat(&path)?;
    inodes.resolve_met(&stat, None);
    let mount = mount_of(inodes, &path, &stat, parent)?;
    let key = InodeKey::of(&stat).on(&mount, &path);
    let inode = inodes.find_or_insert(view.effects, key, kind(&stat), path, mount)?;
    Ok((view.entry(&inode, &stat, parent), inode))
}

/// The inode that `path` refers to, if the guest knows it; counts one more lookup.
fn find_open(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    path: &OwnedFd,
    parent: Option<&Inode>,
) -> Result<Option<(Arc<Inode>, Statx)>> {
    let stat = stat(path)?;
    inodes.resolve_met(&stat, None);
    let mount = mount_of(inodes, path, &stat, parent)?;
    let seen = Seen::open(&stat, InodeKey::of(&stat).on(&mount, path));
    Ok(inodes.find(view.effects, &seen, || name_to_handle(path.as_fd())).map(|inode| (inode, stat)))
}

fn mount_of(
    inodes: &InodeTable,
    path: impl AsFd,
    stat: &Statx,
    parent: Option<&Inode>,
) -> Result<Arc<Mount>> {
    let id = InodeKey::of(stat).mount;
    match parent.map(Inode::mount) {
        Some(mount) if mount.id() == id => Ok(Arc::clone(mount)),
        _ => inodes.fd_cache().mount(id, path, kind(stat)),
    }
}

/// LOOKUP of `.`.
fn lookup_self(inodes: &InodeTable, view: &GuestView<'_>, inode: &Inode) -> Result<Entry> {
    let stat = stat(inode.path()?)?;
    inodes.look_up_again(view.effects, inode)?;
    Ok(view.entry(inode, &stat, None))
}

/// LOOKUP of `..`: returns only a directory that the guest knows, so that nothing outside the share is found, also
/// when the directory was moved out of it. The root is its own parent.
fn lookup_parent(inodes: &InodeTable, view: &GuestView<'_>, inode: &Inode) -> Result<Entry> {
    if inode.node() == NodeId::ROOT {
        return lookup_self(inodes, view, inode);
    }
    if !inode.is_directory() {
        return Err(Errno::NOTDIR);
    }
    let path = openat(inode.path()?, c"..", PATH | OFlags::DIRECTORY, Mode::empty())?;
    let (parent, stat) = find_open(inodes, view, &path, Some(inode))?.ok_or(Errno::STALE)?;
    Ok(view.entry(&parent, &stat, None))
}
