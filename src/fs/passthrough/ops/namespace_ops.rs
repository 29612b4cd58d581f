//! Changes to directories: MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME; and READLINK.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, FileType, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat, renameat_with, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

use super::guest_view::GuestView;
use super::labels::label_entry;
use super::lookup::lookup_new;
use super::replay;
use crate::fs::passthrough::caller::identity::Identity;
use crate::fs::passthrough::host::{PROC, kind, proc_name, stat, stat_entry};
use crate::fs::passthrough::inode::{Inode, InodeKey, InodeTable};
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Context, Result};
use crate::limits::FdPermit;
use crate::state_file::Effects;
use fuse_protocol::name::Name;
use fuse_protocol::reply::Entry;
use fuse_protocol::request::Rename;

/// MKDIR.
pub fn mkdir(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: &Inode,
    name: Name<'_>,
    mode: u32,
    umask: u32,
) -> Result<Entry> {
    let (name, session) = (name.as_c_str(), fs.session());
    let (permit, path) = (fs.inodes.acquire_fd()?, parent.path()?);
    let make = || fs.identity.create_as(&session, ctx, mode, umask, |mode| mkdirat(&path, name, mode));
    replay::make(&fs.inodes, ctx.effects, (path.as_fd(), name), FileType::Directory, make)?;
    enter_made(fs, &session, ctx, (parent, name), FileType::Directory, permit)
}

/// MKNOD.
pub fn mknod(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: &Inode,
    name: Name<'_>,
    (mode, umask): (u32, u32),
    rdev: u32,
) -> Result<Entry> {
    let (name, session) = (name.as_c_str(), fs.session());
    let kind = match mode & libc::S_IFMT {
        // mknod(2) without a type creates a regular file.
        0 => FileType::RegularFile,
        _ => FileType::from_raw_mode(mode),
    };
    let device = decode_device(rdev);
    let (permit, path) = (fs.inodes.acquire_fd()?, parent.path()?);
    let make =
        || fs.identity.create_as(&session, ctx, mode, umask, |mode| mknodat(&path, name, kind, mode, device));
    replay::make(&fs.inodes, ctx.effects, (path.as_fd(), name), kind, make)?;
    enter_made(fs, &session, ctx, (parent, name), kind, permit)
}

/// SYMLINK.
pub fn symlink(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: &Inode,
    name: Name<'_>,
    target: &CStr,
) -> Result<Entry> {
    let (name, session) = (name.as_c_str(), fs.session());
    let (permit, path) = (fs.inodes.acquire_fd()?, parent.path()?);
    let make = || fs.identity.create_as(&session, ctx, 0, 0, |_| symlinkat(target, &path, name));
    replay::make(&fs.inodes, ctx.effects, (path.as_fd(), name), FileType::Symlink, make)?;
    enter_made(fs, &session, ctx, (parent, name), FileType::Symlink, permit)
}

/// Labels and looks up what was just made, or removes it: a request that fails must not leave anything behind. No system
/// call makes a directory, a node or a link and opens it in one step, and the host may run out of descriptors in
/// between, whatever the reserve.
fn enter_made(
    fs: &PassthroughFs,
    session: &Session,
    ctx: &Context,
    (parent, name): (&Inode, &CStr),
    kind: FileType,
    permit: FdPermit,
) -> Result<Entry> {
    let path = parent.path()?;
    let labelled = label_entry(fs, session, ctx, path.as_fd(), name);
    let entered = labelled.and_then(|()| lookup_new(&fs.inodes, &fs.view(ctx), parent, name, permit));
    entered.inspect_err(|_| remove_made_empty(path.as_fd(), name, kind))
}

/// LINK. The inode is known, so nothing has to be opened, or can be refused, once it has its new name.
pub fn link(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    inode: &Inode,
    parent: &Inode,
    name: Name<'_>,
) -> Result<Entry> {
    let name = name.as_c_str();
    let (path, directory) = (inode.path()?, parent.path()?);
    inodes.look_up_again(view.effects, inode)?;
    let is_linked =
        || stat_entry(&directory, name).is_ok_and(|there| InodeKey::of(&there).ino == inode.key().ino);
    let link = || linkat(PROC, proc_name(&*path), &directory, name, AtFlags::SYMLINK_FOLLOW);
    let linked = replay::link(view.effects, is_linked, link);
    linked
        .and_then(|()| stat(&*path))
        .map(|stat| view.entry(inode, &stat, Some(parent)))
        .inspect_err(|_| inodes.take_back_lookup(view.effects, inode.node()))
}

/// READLINK.
pub fn readlink(inode: &Inode) -> Result<Vec<u8>> {
    if inode.kind() != FileType::Symlink {
        return Err(Errno::INVAL);
    }
    readlinkat(inode.path()?, c"", Vec::new()).map(|target| target.into_bytes())
}

/// UNLINK.
pub fn unlink(effects: Effects<'_>, parent: &Inode, name: Name<'_>) -> Result<()> {
    let path = parent.path()?;
    let find = || replay::find(&path, name.as_c_str());
    replay::remove(effects, find, || unlinkat(&path, name.as_c_str(), AtFlags::empty()))
}

/// RMDIR.
pub fn rmdir(effects: Effects<'_>, parent: &Inode, name: Name<'_>) -> Result<()> {
    let path = parent.path()?;
    let find = || replay::find(&path, name.as_c_str());
    replay::remove(effects, find, || unlinkat(&path, name.as_c_str(), AtFlags::REMOVEDIR))
}

/// RENAME and RENAME2. A whiteout that is left behind belongs to the caller.
pub fn rename(
    identity: &Identity,
    session: &Session,
    ctx: &Context,
    (from, to): (&Inode, &Inode),
    rename: &Rename<'_>,
) -> Result<()> {
    let (name, new_name) = (rename.name.as_c_str(), rename.new_name.as_c_str());
    let flags = RenameFlags::from_bits(rename.flags).ok_or(Errno::INVAL)?;
    // Opened as the daemon: a caller may open nothing by file handle.
    let (from, to) = (from.path()?, to.path()?);
    replay::rename(ctx.effects, (from.as_fd(), name), (to.as_fd(), new_name), || {
        if flags.is_empty() {
            return renameat(&from, name, &to, new_name);
        }
        let whiteout = flags.contains(RenameFlags::WHITEOUT);
        let _caller = whiteout.then(|| identity.become_caller(session, ctx)).transpose()?;
        renameat_with(&from, name, &to, new_name, flags)
    })
}

/// Removes a name that belongs to `made`, which this request has made.
pub fn remove_made(parent: BorrowedFd<'_>, name: &CStr, made: impl AsFd) {
    let is_it = |made| Some(InodeKey::of(&made) == InodeKey::of(&stat_entry(parent, name).ok()?));
    if stat(made).ok().and_then(is_it).unwrap_or(false) {
        // The errno that led here says more than that of a removal that fails too.
        let _ = unlinkat(parent, name, AtFlags::empty());
    }
}

/// The same for what could not be opened, and so may have been replaced by another request: removes nothing that has a
/// content or another name.
fn remove_made_empty(parent: BorrowedFd<'_>, name: &CStr, made: FileType) {
    let Ok(found) = stat_entry(parent, name) else { return };
    if kind(&found) != made {
        return;
    }
    let flags = match made {
        // It has to be empty for that.
        FileType::Directory => AtFlags::REMOVEDIR,
        FileType::RegularFile if found.stx_size > 0 => return,
        _ if found.stx_nlink != 1 => return,
        _ => AtFlags::empty(),
    };
    let _ = unlinkat(parent, name, flags);
}

/// A device number as the protocol packs it (`new_decode_dev()` of Linux), as mknod(2) takes it.
fn decode_device(rdev: u32) -> u64 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}
