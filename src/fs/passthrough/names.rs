//! Changes to directories: new names, and names that go.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat, renameat_with, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

use super::inodes::Inode;
use super::lookup::{PROC, proc_name};
use super::{Context, PassthroughFs};
use crate::fs::Result;
use crate::fuse::name::Name;
use crate::fuse::reply::Entry;
use crate::fuse::request::Rename;

impl PassthroughFs {
    pub(super) fn make_directory(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        mode: u32,
        umask: u32,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let (slot, path) = (self.slot()?, parent.path()?);
        self.create_as(ctx, mode, umask, |mode| mkdirat(&path, name, mode))?;
        self.label_entry(ctx, path.as_fd(), name, AtFlags::REMOVEDIR)?;
        self.open_new(parent, name, slot)
    }

    pub(super) fn make_node(
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
        let (slot, path) = (self.slot()?, parent.path()?);
        self.create_as(ctx, mode, umask, |mode| mknodat(&path, name, kind, mode, device))?;
        self.label_entry(ctx, path.as_fd(), name, AtFlags::empty())?;
        self.open_new(parent, name, slot)
    }

    pub(super) fn make_symlink(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry> {
        let name = name.as_c_str();
        let (slot, path) = (self.slot()?, parent.path()?);
        self.create_as(ctx, 0, 0, |_| symlinkat(target, &path, name))?;
        self.label_entry(ctx, path.as_fd(), name, AtFlags::empty())?;
        self.open_new(parent, name, slot)
    }

    pub(super) fn make_link(&self, inode: &Arc<Inode>, parent: &Inode, name: Name<'_>) -> Result<Entry> {
        let name = name.as_c_str();
        linkat(PROC, proc_name(&*inode.path()?), parent.path()?, name, AtFlags::SYMLINK_FOLLOW)?;
        self.look_up(parent, name)
    }

    pub(super) fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        readlinkat(inode.path()?, c"", Vec::new()).map(|target| target.into_bytes())
    }

    pub(super) fn remove_name(&self, parent: &Inode, name: Name<'_>, directory: bool) -> Result<()> {
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(parent.path()?, name.as_c_str(), flags)
    }

    /// RENAME and RENAME2. A whiteout that is left behind belongs to the caller.
    pub(super) fn rename_entry(
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

/// A device number as the protocol packs it (`new_decode_dev()` of Linux), as mknod(2) takes it.
fn decode_device(rdev: u32) -> u64 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}
