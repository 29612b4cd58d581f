//! Changes to directories: new names, and names that go.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, RenameFlags, Statx, linkat, mkdirat, mknodat, readlinkat, renameat, renameat_with,
    statx, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::lookup::{PROC, WANTED, key, kind, proc_name, stat};
use crate::fs::Result;
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::{Context, PassthroughFs};
use crate::limits::FdPermit;
use fuse_protocol::name::Name;
use fuse_protocol::reply::Entry;
use fuse_protocol::request::Rename;

impl PassthroughFs {
    pub(in crate::fs::passthrough) fn make_directory(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        mode: u32,
        umask: u32,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let (permit, path) = (self.fd_permit()?, parent.path()?);
        self.create_as(ctx, mode, umask, |mode| mkdirat(&path, name, mode))?;
        self.enter_made(ctx, parent, name, FileType::Directory, permit)
    }

    pub(in crate::fs::passthrough) fn make_node(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        (mode, umask): (u32, u32),
        rdev: u32,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let kind = match mode & libc::S_IFMT {
            // mknod(2) without a type makes a regular file.
            0 => FileType::RegularFile,
            _ => FileType::from_raw_mode(mode),
        };
        let device = decode_device(rdev);
        let (permit, path) = (self.fd_permit()?, parent.path()?);
        self.create_as(ctx, mode, umask, |mode| mknodat(&path, name, kind, mode, device))?;
        self.enter_made(ctx, parent, name, kind, permit)
    }

    pub(in crate::fs::passthrough) fn make_symlink(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let (permit, path) = (self.fd_permit()?, parent.path()?);
        self.create_as(ctx, 0, 0, |_| symlinkat(target, &path, name))?;
        self.enter_made(ctx, parent, name, FileType::Symlink, permit)
    }

    /// Labels and looks up what was just made, or takes it away: the guest is not to find what it was
    /// refused. No system call makes a directory, a node or a link and opens it in one step, and the host may
    /// run out of descriptors in between, whatever is kept back.
    fn enter_made(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: &CStr,
        kind: FileType,
        permit: FdPermit,
    ) -> Result<Entry> {
        let path = parent.path()?;
        let labelled = self.label_entry(ctx, path.as_fd(), name);
        let entered = labelled.and_then(|()| self.open_new(parent, name, permit));
        entered.inspect_err(|_| take_away_empty(path.as_fd(), name, kind))
    }

    /// LINK. What is linked is known, so nothing has to be opened, or can be refused, once it has its new name.
    pub(in crate::fs::passthrough) fn make_link(
        &self,
        inode: &Arc<Inode>,
        parent: &Inode,
        name: Name<'_>,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let (path, directory) = (inode.path()?, parent.path()?);
        self.inodes.look_up_again(inode)?;
        linkat(PROC, proc_name(&*path), directory, name, AtFlags::SYMLINK_FOLLOW)
            .and_then(|()| stat(&*path))
            .map(|stat| self.entry(inode, &stat, Some(parent)))
            .inspect_err(|_| self.inodes.forget(inode.node, 1))
    }

    pub(in crate::fs::passthrough) fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        readlinkat(inode.path()?, c"", Vec::new()).map(|target| target.into_bytes())
    }

    pub(in crate::fs::passthrough) fn remove_name(
        &self,
        parent: &Inode,
        name: Name<'_>,
        directory: bool,
    ) -> Result<()> {
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(parent.path()?, name.as_c_str(), flags)
    }

    /// RENAME and RENAME2. A whiteout that is left behind belongs to the caller.
    pub(in crate::fs::passthrough) fn rename_entry(
        &self,
        ctx: &Context,
        from: &Inode,
        to: &Inode,
        rename: &Rename<'_>,
    ) -> Result<()> {
        let (name, new_name) = (rename.name.as_c_str(), rename.new_name.as_c_str());
        let flags = RenameFlags::from_bits(rename.flags).ok_or(Errno::INVAL)?;
        // Opened as the daemon: a caller may open nothing by file handle.
        let (from, to) = (from.path()?, to.path()?);
        if flags.is_empty() {
            return renameat(from, name, to, new_name);
        }
        let whiteout = flags.contains(RenameFlags::WHITEOUT);
        let _caller = whiteout.then(|| self.become_caller(ctx)).transpose()?;
        renameat_with(from, name, to, new_name, flags)
    }
}

/// Takes a name away that stands for `made`, which this request has made.
pub(in crate::fs::passthrough) fn take_away(parent: BorrowedFd<'_>, name: &CStr, made: impl AsFd) {
    let is_it = |made| Some(key(&made) == key(&stat_entry(parent, name)?));
    if stat(made).ok().and_then(is_it).unwrap_or(false) {
        // The errno that led here says more than that of a removal that fails too.
        let _ = unlinkat(parent, name, AtFlags::empty());
    }
}

/// The same for what could not be opened, and so cannot be told for sure from what another request has put
/// in its place since: nothing that has a content or another name is taken away.
fn take_away_empty(parent: BorrowedFd<'_>, name: &CStr, made: FileType) {
    let Some(found) = stat_entry(parent, name).filter(|found| kind(found) == made) else { return };
    let flags = match made {
        // It has to be empty for that.
        FileType::Directory => AtFlags::REMOVEDIR,
        FileType::RegularFile if found.stx_size > 0 => return,
        _ if found.stx_nlink != 1 => return,
        _ => AtFlags::empty(),
    };
    let _ = unlinkat(parent, name, flags);
}

fn stat_entry(parent: BorrowedFd<'_>, name: &CStr) -> Option<Statx> {
    statx(parent, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED).ok()
}

/// A device number as the protocol packs it (`new_decode_dev()` of Linux), as mknod(2) takes it.
fn decode_device(rdev: u32) -> u64 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}
