//! The operations as the server calls them.

use std::collections::BTreeMap;

use fuse_protocol::abi;
use fuse_protocol::flags::{InitFlags, OpenReplyFlags};
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::name::Name;
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{
    Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Link, Listxattr, Lock,
    LockKind, Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr,
    Rename, Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};
use lanefsd::fs::{Context, FileSystem, Opened, Result, XattrReply};
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::MemoryFs;
use crate::files::may_open;
use crate::node::{Content, Node};
use crate::state::{Handle, State};

fn owner(ctx: &Context) -> (u32, u32) {
    (ctx.uid.0, ctx.supplementary_group.unwrap_or(ctx.gid).0)
}

impl State {
    /// Opens a file as its O_* flags say.
    fn open_file(&mut self, node: NodeId, flags: u32) -> Result<Opened> {
        may_open(self.node(node)?)?;
        let flags = OFlags::from_bits_retain(flags);
        let access = flags & OFlags::RWMODE;
        if flags.contains(OFlags::TRUNC) {
            self.set_size(node, 0)?;
        }
        let handle = self.open(Handle {
            node,
            directory: false,
            readable: access != OFlags::WRONLY,
            writable: access == OFlags::WRONLY || access == OFlags::RDWR,
            append: flags.contains(OFlags::APPEND),
        })?;
        let flags = OpenReplyFlags::DIRECT_IO | OpenReplyFlags::PARALLEL_DIRECT_WRITES;
        Ok(Opened { handle, flags })
    }

    /// Makes a node that is told to the guest with its labels.
    fn create_labelled(
        &mut self,
        ctx: &Context,
        parent: NodeId,
        name: Name<'_>,
        node: Node,
    ) -> Result<Entry> {
        let entry = self.create(parent, name, node)?;
        for label in ctx.labels.iter() {
            if let Err(errno) = self.setxattr(entry.node, label.name.to_bytes(), label.value, 0) {
                self.forget(entry.node, 1);
                self.remove(parent, name, entry.attributes.attr.mode & libc::S_IFMT == libc::S_IFDIR)?;
                return Err(errno);
            }
        }
        Ok(entry)
    }
}

impl FileSystem for MemoryFs {
    fn offered_flags(&self) -> InitFlags {
        InitFlags::all() - InitFlags::WRITEBACK_CACHE - InitFlags::OVER_IO_URING
    }

    fn destroy(&self) {
        self.state().end_session();
        self.interrupt_all();
    }

    fn lookup(&self, _: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry> {
        self.state().lookup(parent, lookup.name)
    }

    fn forget(&self, _: &Context, node: NodeId, count: u64) {
        self.state().forget(node, count);
    }

    fn getattr(&self, _: &Context, node: NodeId, getattr: &Getattr) -> Result<Attributes> {
        let state = self.state();
        if let Some(handle) = getattr.handle {
            state.handle(node, handle, false)?;
        }
        Ok(state.node(node)?.attributes(node))
    }

    fn setattr(&self, _: &Context, node: NodeId, set: &Setattr) -> Result<Attributes> {
        let mut state = self.state();
        state.setattr(node, set)?;
        Ok(state.node(node)?.attributes(node))
    }

    fn statx(&self, ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply> {
        let Attributes { attr, valid } = self.getattr(ctx, node, &Getattr { handle: statx.handle })?;
        let time = |seconds: u64, nanoseconds| abi::SxTime {
            tv_sec: seconds.cast_signed(),
            tv_nsec: nanoseconds,
            reserved: 0,
        };
        let statx = abi::Statx {
            mask: libc::STATX_BASIC_STATS,
            blksize: attr.blksize,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: u16::try_from(attr.mode).unwrap_or_default(),
            ino: attr.ino,
            size: attr.size,
            blocks: attr.blocks,
            atime: time(attr.atime, attr.atimensec),
            mtime: time(attr.mtime, attr.mtimensec),
            ctime: time(attr.ctime, attr.ctimensec),
            ..Default::default()
        };
        Ok(StatxReply { statx, valid })
    }

    fn readlink(&self, _: &Context, node: NodeId) -> Result<Vec<u8>> {
        match &self.state().node(node)?.content {
            Content::Link(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    fn symlink(&self, ctx: &Context, parent: NodeId, symlink: &Symlink<'_>) -> Result<Entry> {
        let Symlink { name, target } = *symlink;
        if target.is_empty() {
            return Err(Errno::NOENT);
        }
        if target.count_bytes() > 4095 {
            return Err(Errno::NAMETOOLONG);
        }
        let node = Node::new(Content::Link(target.to_bytes().to_vec()), 0o777, owner(ctx));
        self.state().create_labelled(ctx, parent, name, node)
    }

    fn mknod(&self, ctx: &Context, parent: NodeId, mknod: &Mknod<'_>) -> Result<Entry> {
        let Mknod { name, mode, rdev, umask } = *mknod;
        let content = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => Content::File(Vec::new()),
            libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => Content::Special,
            _ => return Err(Errno::INVAL),
        };
        let mut node = Node::new(content, mode & !umask, owner(ctx));
        node.rdev = rdev;
        self.state().create_labelled(ctx, parent, name, node)
    }

    fn mkdir(&self, ctx: &Context, parent: NodeId, mkdir: &Mkdir<'_>) -> Result<Entry> {
        let Mkdir { name, mode, umask } = *mkdir;
        let content = Content::Directory { entries: BTreeMap::new(), parent };
        self.state().create_labelled(ctx, parent, name, Node::new(content, mode & !umask, owner(ctx)))
    }

    fn unlink(&self, _: &Context, parent: NodeId, unlink: &Unlink<'_>) -> Result<()> {
        self.state().remove(parent, unlink.name, false)
    }

    fn rmdir(&self, _: &Context, parent: NodeId, rmdir: &Rmdir<'_>) -> Result<()> {
        self.state().remove(parent, rmdir.name, true)
    }

    fn rename(&self, _: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        self.state().rename(parent, rename)
    }

    fn link(&self, _: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry> {
        self.state().link(link.target, parent, link.name)
    }

    fn open(&self, _: &Context, node: NodeId, open: &Open) -> Result<Opened> {
        self.state().open_file(node, open.flags)
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        let mut state = self.state();
        let node = Node::new(Content::File(Vec::new()), create.mode & !create.umask, owner(ctx));
        let entry = match state.find(parent, create.name) {
            Ok(_) if OFlags::from_bits_retain(create.flags).contains(OFlags::EXCL) => {
                return Err(Errno::EXIST);
            }
            Ok(found) => state.tell(found)?,
            Err(_) => state.create_labelled(ctx, parent, create.name, node)?,
        };
        let opened = state.open_file(entry.node, create.flags);
        let opened = opened.inspect_err(|_| state.forget(entry.node, 1))?;
        Ok((state.node(entry.node)?.entry(entry.node), opened))
    }

    fn tmpfile(&self, ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)> {
        let mut state = self.state();
        if !state.node(parent)?.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let mode = tmpfile.mode & !tmpfile.umask;
        let id = state.add(Node::new(Content::File(Vec::new()), mode, owner(ctx)))?;
        let entry = state.tell(id)?;
        let opened = state.open_file(id, tmpfile.flags);
        let opened = opened.inspect_err(|_| state.forget(id, 1))?;
        Ok((entry, opened))
    }

    fn read(&self, _: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        self.state().read(node, read, data)
    }

    fn write(&self, _: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        self.state().write(node, write, data)
    }

    fn statfs(&self, _: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        let state = self.state();
        state.node(node)?;
        let free = (state.capacity - state.used) as u64;
        let blocks = state.capacity as u64;
        Ok(abi::Kstatfs {
            blocks,
            bfree: free,
            bavail: free,
            bsize: 1,
            frsize: 1,
            namelen: 255,
            ..Default::default()
        })
    }

    fn release(&self, _: &Context, node: NodeId, release: &Release) -> Result<()> {
        let mut state = self.state();
        state.close(node, release.handle, false)?;
        if let Some(node) = state.nodes.get_mut(&node) {
            node.locks.drop_owner(release.lock_owner);
        }
        self.shared.lock_freed.notify_all();
        Ok(())
    }

    fn fsync(&self, _: &Context, node: NodeId, fsync: &Fsync) -> Result<()> {
        self.state().handle(node, fsync.handle, false).map(drop)
    }

    fn flush(&self, _: &Context, node: NodeId, flush: &Flush) -> Result<()> {
        let mut state = self.state();
        state.handle(node, flush.handle, false)?;
        if let Some(node) = state.nodes.get_mut(&node) {
            node.locks.drop_owner(flush.lock_owner);
        }
        self.shared.lock_freed.notify_all();
        Ok(())
    }

    fn opendir(&self, _: &Context, node: NodeId, _: &Opendir) -> Result<Opened> {
        let mut state = self.state();
        if !state.node(node)?.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let handle = Handle { node, directory: true, readable: true, writable: false, append: false };
        Ok(Opened { handle: state.open(handle)?, flags: OpenReplyFlags::empty() })
    }

    fn readdir(
        &self,
        _: &Context,
        node: NodeId,
        readdir: &Readdir,
        out: &mut DirectoryWriter<'_>,
    ) -> Result<()> {
        let mut state = self.state();
        state.handle(node, readdir.handle, true)?;
        state.list(node, readdir.offset, out)
    }

    fn releasedir(&self, _: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()> {
        self.state().close(node, releasedir.handle, true)
    }

    fn fsyncdir(&self, _: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()> {
        self.state().handle(node, fsyncdir.handle, true).map(drop)
    }

    fn access(&self, _: &Context, node: NodeId, _: &Access) -> Result<()> {
        self.state().node(node).map(drop)
    }

    fn fallocate(&self, _: &Context, node: NodeId, fallocate: &Fallocate) -> Result<()> {
        let Fallocate { handle, offset, length, mode } = *fallocate;
        self.state().fallocate(node, handle, mode, (offset, length))
    }

    fn lseek(&self, _: &Context, node: NodeId, lseek: &Lseek) -> Result<u64> {
        self.state().lseek(node, lseek.handle, lseek.offset, lseek.whence)
    }

    fn copy_file_range(&self, _: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64> {
        self.state().copy(node, copy)
    }

    fn syncfs(&self, _: &Context, node: NodeId) -> Result<()> {
        self.state().node(node).map(drop)
    }

    fn setxattr(&self, _: &Context, node: NodeId, setxattr: &Setxattr<'_>) -> Result<()> {
        let Setxattr { name, value, flags, .. } = *setxattr;
        self.state().setxattr(node, name.to_bytes(), value, flags)
    }

    fn getxattr(&self, _: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply> {
        self.state().getxattr(node, getxattr.name.to_bytes(), getxattr.size)
    }

    fn listxattr(&self, _: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply> {
        self.state().listxattr(node, listxattr.size)
    }

    fn removexattr(&self, _: &Context, node: NodeId, removexattr: &Removexattr<'_>) -> Result<()> {
        self.state().removexattr(node, removexattr.name.to_bytes())
    }

    fn getlk(&self, _: &Context, node: NodeId, lock: &Lock) -> Result<abi::FileLock> {
        let state = self.state();
        state.handle(node, lock.handle, false)?;
        let (start, end, kind, pid) = match state.node(node)?.locks.in_the_way(lock) {
            Some(held) => (held.start, held.end, held.kind, held.pid),
            None => (lock.start, lock.end, LockKind::Unlock, lock.pid),
        };
        Ok(abi::FileLock { start, end, typ: kind.to_wire(), pid })
    }

    fn setlk(&self, _: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        let mut state = self.state();
        state.handle(node, lock.handle, false)?;
        let locks = &mut state.node_mut(node)?.locks;
        if locks.in_the_way(lock).is_some() {
            return Err(Errno::AGAIN);
        }
        locks.set(lock);
        self.shared.lock_freed.notify_all();
        Ok(())
    }

    fn setlkw(&self, ctx: &Context, node: NodeId, lock: &Lock) -> Result<()> {
        let stops = self.state().stops;
        loop {
            match self.setlk(ctx, node, lock) {
                Err(Errno::AGAIN) if self.waits => {}
                Err(Errno::AGAIN) => return Err(Errno::DEADLK),
                done => return done,
            }
            let mut state = self.state();
            if state.stops != stops || state.interrupted.remove(&ctx.unique) {
                return Err(Errno::INTR);
            }
            state.waiting.insert(ctx.unique);
            // With a limit, since a lock may have been let go before the wait began.
            let limit = std::time::Duration::from_millis(10);
            let waited = self.shared.lock_freed.wait_timeout(state, limit);
            waited.unwrap_or_else(std::sync::PoisonError::into_inner).0.waiting.remove(&ctx.unique);
        }
    }

    fn interrupt(&self, unique: Unique) -> Result<()> {
        let mut state = self.state();
        let waits = state.waiting.contains(&unique);
        if waits {
            state.interrupted.insert(unique);
        }
        self.shared.lock_freed.notify_all();
        if waits { Ok(()) } else { Err(Errno::AGAIN) }
    }

    fn interrupt_all(&self) {
        self.state().stops += 1;
        self.shared.lock_freed.notify_all();
    }
}
