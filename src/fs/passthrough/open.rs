//! Opening and creating files and directories.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, openat};
use rustix::io::Errno;

use super::budget::Held;
use super::credentials::without_fsetid;
use super::handles::Handle;
use super::inodes::Inode;
use super::{Context, PassthroughFs};
use crate::config::CachePolicy;
use crate::fs::{Opened, Result};
use crate::fuse::flags::{OpenReplyFlags, OpenRequestFlags};
use crate::fuse::ids::HandleId;
use crate::fuse::reply::Entry;
use crate::fuse::request::{Create, Tmpfile};

/// Flags of the guest's open(2) that mean something on the host. O_APPEND is not among them: it is
/// looked at with each write, since it can change after the open. O_DIRECT is added where allowed.
const PASSED_ON: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

impl PassthroughFs {
    /// OPEN.
    pub(super) fn open_file(
        &self,
        inode: Arc<Inode>,
        flags: u32,
        open_flags: OpenRequestFlags,
    ) -> Result<Opened> {
        if inode.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let host_flags = self.host_flags(flags);
        let truncates = host_flags.contains(OFlags::TRUNC);
        let _guard = truncates.then(|| inode.ranges.write_from(0));
        let kill = truncates && open_flags.contains(OpenRequestFlags::KILL_SUIDGID);
        let _unprivileged = kill.then(without_fsetid).transpose()?;
        if truncates {
            self.drop_mapped_capability(&inode)?;
        }
        let slot = self.slot()?;
        let file = slot.hold(self.reopen(&inode, host_flags)?);
        self.add_file(&inode, file, flags)
    }

    /// CREATE. A new file belongs to the caller; one that is there already is opened, as open(2)
    /// does it, unless O_EXCL is set.
    pub(super) fn create_file(
        &self,
        ctx: &Context,
        parent: &Inode,
        create: &Create<'_>,
    ) -> Result<(Entry, Opened)> {
        let name = create.name.as_c_str();
        // O_EXCL follows no link and opens nothing that exists, be it a device or a FIFO.
        let flags = (self.host_flags(create.flags) - OFlags::TRUNC)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        // One for the handle and one for the inode, before there is a file.
        let slots = (self.slot()?, self.slot()?);
        let path = parent.path()?;
        let created = if self.is_labelled(ctx) {
            self.create_labelled(ctx, path.as_fd(), name, (create.mode, create.umask), flags)
        } else {
            let create_new = |mode| openat(&path, name, flags, mode);
            self.create_as(ctx, create.mode, create.umask, create_new)
        };
        match created {
            Ok(file) => {
                let path = slots.0.hold(self.path_of(&file)?);
                let (entry, inode) = self.adopt(path, Some(parent))?;
                self.open_entry(entry, || self.add_file(&inode, slots.1.hold(file), create.flags))
            }
            Err(Errno::EXIST) if create.flags & OFlags::EXCL.bits() == 0 => {
                drop(slots);
                let entry = self.look_up(parent, name)?;
                self.open_entry(entry, || {
                    self.open_file(self.inode(entry.node)?, create.flags, create.open_flags)
                })
            }
            Err(errno) => Err(errno),
        }
    }

    /// TMPFILE.
    pub(super) fn create_unnamed(
        &self,
        ctx: &Context,
        parent: &Inode,
        tmpfile: &Tmpfile,
    ) -> Result<(Entry, Opened)> {
        let keep_unnamed = OFlags::from_bits_retain(tmpfile.flags) & OFlags::EXCL;
        let flags = (self.host_flags(tmpfile.flags) - OFlags::TRUNC) | OFlags::TMPFILE | keep_unnamed;
        let slots = (self.slot()?, self.slot()?);
        let path = parent.path()?;
        let directory = rustix::path::DecInt::from_fd(&*path);
        let file = self.create_as(ctx, tmpfile.mode, tmpfile.umask, |mode| {
            openat(&self.proc_self_fd, directory, flags | OFlags::CLOEXEC, mode)
        })?;
        self.write_labels(ctx, &file)?;
        let (entry, inode) = self.adopt(slots.0.hold(self.path_of(&file)?), Some(parent))?;
        self.open_entry(entry, || self.add_file(&inode, slots.1.hold(file), tmpfile.flags))
    }

    /// OPENDIR.
    pub(super) fn open_directory(&self, inode: Arc<Inode>) -> Result<Opened> {
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let slot = self.slot()?;
        let file = slot.hold(self.reopen(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?);
        let flags = match self.config.cache {
            CachePolicy::Never | CachePolicy::Auto => OpenReplyFlags::empty(),
            CachePolicy::Metadata | CachePolicy::Always => {
                OpenReplyFlags::CACHE_DIR | OpenReplyFlags::KEEP_CACHE
            }
        };
        let handle = Handle::directory(inode, file, self.handles.new_listing());
        Ok(Opened { handle: self.handles.insert(handle)?, flags })
    }

    /// Finishes a reply that has both an entry and a handle; without the handle the guest gets
    /// neither, and so has not looked the inode up.
    fn open_entry(&self, entry: Entry, open: impl FnOnce() -> Result<Opened>) -> Result<(Entry, Opened)> {
        match open() {
            Ok(opened) => Ok((entry, opened)),
            Err(errno) => {
                self.inodes.forget(entry.node, 1);
                Err(errno)
            }
        }
    }

    /// Makes a handle of an open file. From here on the inode has one opener more, and its mode is
    /// what all its openers are answered with.
    fn add_file(&self, inode: &Arc<Inode>, file: Held, flags: u32) -> Result<Opened> {
        let policy = self.session().policy;
        let direct = flags & OFlags::DIRECT.bits() != 0;
        let mode = inode.io_mode.open(policy, direct).ok_or(Errno::NFILE)?;
        let handle: HandleId = self.handles.insert(Handle::file(Arc::clone(inode), file, mode))?;
        Ok(Opened { handle, flags: policy.reply_flags(mode) })
    }

    /// The host's open flags for those of the guest.
    fn host_flags(&self, flags: u32) -> OFlags {
        let guest = OFlags::from_bits_retain(flags);
        let mut host = guest & PASSED_ON;
        host.set(OFlags::NOATIME, self.config.preserve_noatime && guest.contains(OFlags::NOATIME));
        host.set(OFlags::DIRECT, self.config.allow_direct_io && guest.contains(OFlags::DIRECT));
        // A guest that writes back pages reads them first.
        if self.session().policy.writeback && guest & OFlags::RWMODE == OFlags::WRONLY {
            host = (host - OFlags::RWMODE) | OFlags::RDWR;
        }
        host
    }
}
