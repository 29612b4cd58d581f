//! Opening and creating files and directories.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, openat};
use rustix::io::Errno;

use super::config::CachePolicy;
use super::handles::Handle;
use super::host_file::HostFile;
use super::inodes::Inode;
use super::io_mode::Mode;
use super::names::take_away;
use super::{Context, PassthroughFs};
use crate::fs::{Opened, Result};
use fuse_protocol::flags::{OpenReplyFlags, OpenRequestFlags};
use fuse_protocol::ids::HandleId;
use fuse_protocol::reply::Entry;
use fuse_protocol::request::{Create, Tmpfile};

/// Flags of the guest's open(2) that mean something on the host. O_APPEND is not among them: each write
/// says whether it is set, since it can change after the open, and so with O_DIRECT where it is allowed.
const PASSED_ON: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

impl PassthroughFs {
    /// OPEN.
    pub(super) fn open_file(
        &self,
        ctx: &Context,
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
        let bits = self.bits_after(ctx, open_flags.contains(OpenRequestFlags::KILL_SUIDGID), false);
        let _member = truncates.then(|| self.begin_change(ctx, &inode, bits)).transpose()?;
        let slot = self.slot()?;
        let (file, host_flags) = self.open_for_guest(&inode, host_flags, flags)?;
        self.add_file(&inode, HostFile::new(slot.hold(file), host_flags), flags)
    }

    /// Opens a file with `wanted`, or with what the host allows instead; returns the flags that it
    /// took. `flags` are the guest's.
    fn open_for_guest(&self, inode: &Inode, wanted: OFlags, flags: u32) -> Result<(OwnedFd, OFlags)> {
        let guest = OFlags::from_bits_retain(flags);
        let mut host = wanted;
        loop {
            host = match self.reopen(inode, host) {
                // With the append-only attribute (chattr +a) a file can be opened for nothing else.
                Err(Errno::PERM) if guest.contains(OFlags::APPEND) && !host.contains(OFlags::APPEND) => {
                    host | OFlags::APPEND
                }
                // The daemon may not read what the guest opened for writing alone.
                Err(Errno::ACCESS) if (host ^ guest).intersects(OFlags::RWMODE) => {
                    (host - OFlags::RWMODE) | (guest & OFlags::RWMODE)
                }
                result => return result.map(|file| (file, host)),
            }
        }
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
                let new_path = self.with_room(|| self.path_of(&file));
                let (entry, inode) = new_path
                    .and_then(|new| self.adopt(slots.0.hold(new), Some(parent)))
                    .inspect_err(|_| take_away(path.as_fd(), name, &file))?;
                let file = HostFile::new(slots.1.hold(file), flags);
                self.open_entry(entry, || self.add_file(&inode, file, create.flags))
                    .inspect_err(|_| inode.path().map_or((), |made| take_away(path.as_fd(), name, &*made)))
            }
            Err(Errno::EXIST) if create.flags & OFlags::EXCL.bits() == 0 => {
                drop(slots);
                let entry = self.look_up(parent, name)?;
                self.open_entry(entry, || {
                    self.open_file(ctx, self.inode(entry.node)?, create.flags, create.open_flags)
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
        let (entry, inode) =
            self.adopt(slots.0.hold(self.with_room(|| self.path_of(&file))?), Some(parent))?;
        let file = HostFile::new(slots.1.hold(file), flags);
        self.open_entry(entry, || self.add_file(&inode, file, tmpfile.flags))
    }

    /// OPENDIR.
    pub(super) fn open_directory(&self, inode: Arc<Inode>) -> Result<Opened> {
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let slot = self.slot()?;
        let host_flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = HostFile::new(slot.hold(self.reopen(&inode, host_flags)?), host_flags);
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
    fn add_file(&self, inode: &Arc<Inode>, file: HostFile, flags: u32) -> Result<Opened> {
        let policy = self.session().policy;
        let direct = flags & OFlags::DIRECT.bits() != 0;
        let mut mode = inode.io_mode.open(policy, direct).ok_or(Errno::NFILE)?;
        let writable = file.is_writable();
        // A guest that writes its cache back reads pages before it writes into them, and writes them
        // anywhere. Where this descriptor cannot do that, the opener goes past the cache.
        if policy.writeback && writable && (file.is_append_only() || !file.is_readable()) {
            mode = Mode::Direct;
        }
        let mut reply = policy.reply_flags(mode);
        // Without locks on the host, closing a file that was never written tells it nothing.
        reply.set(OpenReplyFlags::NOFLUSH, !writable && !self.config.posix_lock);
        let handle: HandleId = self.handles.insert(Handle::file(Arc::clone(inode), file, mode))?;
        Ok(Opened { handle, flags: reply })
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
