//! OPEN, CREATE, TMPFILE, OPENDIR and RELEASE.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, OFlags, openat};
use rustix::io::Errno;

use super::attributes::getattr;
use super::data::flush;
use super::labels::{create_labelled, is_labelled, write_labels};
use super::locks::drop_flock;
use super::lookup::{adopt, lookup_entry};
use super::namespace_ops::remove_made;
use super::replay;
use crate::fs::passthrough::config::{CachePolicy, FsConfig};
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::HostFile;
use crate::fs::passthrough::inode::{Inode, InodeTable, io_mode};
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Context, Opened, Result};
use crate::state_file::Effects;
use fuse_protocol::flags::{OpenReplyFlags, OpenRequestFlags, ReleaseFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::reply::Entry;
use fuse_protocol::request::{Create, Tmpfile};

/// Flags of the guest's open(2) that are passed on to the host. O_APPEND is not among them: each write says whether it is
/// set, since it can change after the open, and so with O_DIRECT where it is allowed.
const PASSED_ON: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

/// OPEN.
pub fn open(
    fs: &PassthroughFs,
    ctx: &Context,
    inode: Arc<Inode>,
    flags: u32,
    open_flags: OpenRequestFlags,
) -> Result<Opened> {
    if inode.is_directory() {
        return Err(Errno::ISDIR);
    }
    let session = fs.session();
    let host_flags = host_flags(&fs.config, &session, flags);
    let truncates = host_flags.contains(OFlags::TRUNC);
    let _guard = truncates.then(|| inode.ranges().write_from(0));
    let kill_priv = fs.kill_priv(&session);
    let bits = kill_priv.bits_after(ctx, open_flags.contains(OpenRequestFlags::KILL_SUIDGID), false);
    let _member = truncates.then(|| kill_priv.begin(ctx, &inode, bits)).transpose()?;
    let permit = fs.inodes.acquire_fd()?;
    let (file, host_flags) = open_with_fallback(fs, &inode, host_flags, flags)?;
    add_handle(fs, ctx, &session, &inode, HostFile::new(permit.wrap(file), host_flags), flags)
}

/// Opens a file with `wanted`, or with what the host allows instead; returns the flags that it was opened with. `flags`
/// are the guest's.
fn open_with_fallback(
    fs: &PassthroughFs,
    inode: &Inode,
    wanted: OFlags,
    flags: u32,
) -> Result<(OwnedFd, OFlags)> {
    let guest = OFlags::from_bits_retain(flags);
    let mut host = wanted;
    loop {
        host = match fs.inodes.open(&fs.host, inode, host) {
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

/// CREATE. A new file belongs to the caller; one that exists is opened, as open(2) does it, unless O_EXCL is set.
pub fn create(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: &Inode,
    create: &Create<'_>,
) -> Result<(Entry, Opened)> {
    let (name, session) = (create.name.as_c_str(), fs.session());
    // O_EXCL follows no link and opens nothing that exists, be it a device or a FIFO.
    let flags = (host_flags(&fs.config, &session, create.flags) - OFlags::TRUNC)
        | OFlags::CREATE
        | OFlags::EXCL
        | OFlags::NOFOLLOW;
    // One for the inode and one for the handle, before there is a file.
    let permits = (fs.inodes.acquire_fd()?, fs.inodes.acquire_fd()?);
    let path = parent.path()?;
    let place = (path.as_fd(), name);
    let make = || {
        if is_labelled(&session, ctx) {
            return create_labelled(fs, &session, ctx, place, (create.mode, create.umask), flags);
        }
        let create_new = |mode| openat(&path, name, flags, mode);
        fs.identity.create_as(&session, ctx, create.mode, create.umask, create_new)
    };
    let created = match create.flags & OFlags::EXCL.bits() {
        // What is there is opened, whoever has made it.
        0 => make(),
        _ => replay::make(&fs.inodes, ctx.effects, place, FileType::RegularFile, make),
    };
    match created {
        Ok(file) => {
            let new_path = fs.inodes.with_room(|| fs.host.path_of(&file));
            let (entry, inode) = new_path
                .and_then(|new| adopt(&fs.inodes, &fs.view(ctx), permits.0.wrap(new), Some(parent)))
                .inspect_err(|_| remove_made(path.as_fd(), name, &file))?;
            let file = HostFile::new(permits.1.wrap(file), flags);
            with_handle(&fs.inodes, ctx.effects, entry, || {
                add_handle(fs, ctx, &session, &inode, file, create.flags)
            })
            .inspect_err(|_| inode.path().map_or((), |made| remove_made(path.as_fd(), name, &*made)))
        }
        Err(Errno::EXIST) if create.flags & OFlags::EXCL.bits() == 0 => {
            drop(permits);
            let entry = lookup_entry(&fs.inodes, &fs.view(ctx), parent, name)?;
            let opened = with_handle(&fs.inodes, ctx.effects, entry, || {
                open(fs, ctx, fs.inode(entry.node)?, create.flags, create.open_flags)
            })?;
            Ok(after_truncation(fs, ctx, create.flags, opened))
        }
        Err(errno) => Err(errno),
    }
}

/// The reply to a CREATE that has opened a file: with O_TRUNC the file has another size than when it was looked up, and
/// guests from Linux 6.12 on believe the reply.
fn after_truncation(
    fs: &PassthroughFs,
    ctx: &Context,
    flags: u32,
    (mut entry, opened): (Entry, Opened),
) -> (Entry, Opened) {
    if OFlags::from_bits_retain(flags).contains(OFlags::TRUNC) {
        // The file is open already: without new attributes, the reply has the old ones for no time at all.
        let found = fs.inode(entry.node).and_then(|inode| getattr(&fs.view(ctx), &inode));
        match found {
            Ok(attributes) => entry.attributes = attributes,
            Err(_) => entry.attributes.valid = Duration::ZERO,
        }
    }
    (entry, opened)
}

/// TMPFILE.
pub fn tmpfile(
    fs: &PassthroughFs,
    ctx: &Context,
    parent: NodeId,
    tmpfile: &Tmpfile,
) -> Result<(Entry, Opened)> {
    if !fs.config.tmpfile {
        return Err(Errno::NOSYS);
    }
    let (parent, session) = (fs.inode(parent)?, fs.session());
    let keep_unnamed = OFlags::from_bits_retain(tmpfile.flags) & OFlags::EXCL;
    let flags =
        (host_flags(&fs.config, &session, tmpfile.flags) - OFlags::TRUNC) | OFlags::TMPFILE | keep_unnamed;
    let permits = (fs.inodes.acquire_fd()?, fs.inodes.acquire_fd()?);
    let path = parent.path()?;
    let create = |mode| fs.host.open(&*path, flags, mode);
    let file = fs.identity.create_as(&session, ctx, tmpfile.mode, tmpfile.umask, create)?;
    if is_labelled(&session, ctx) {
        write_labels(&fs.config, ctx, &file)?;
    }
    let new_path = permits.0.wrap(fs.inodes.with_room(|| fs.host.path_of(&file))?);
    let (entry, inode) = adopt(&fs.inodes, &fs.view(ctx), new_path, Some(&parent))?;
    let file = HostFile::new(permits.1.wrap(file), flags);
    with_handle(&fs.inodes, ctx.effects, entry, || add_handle(fs, ctx, &session, &inode, file, tmpfile.flags))
}

/// OPENDIR.
pub fn opendir(fs: &PassthroughFs, ctx: &Context, inode: Arc<Inode>) -> Result<Opened> {
    if !inode.is_directory() {
        return Err(Errno::NOTDIR);
    }
    let permit = fs.inodes.acquire_fd()?;
    let host_flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let file = fs.inodes.open(&fs.host, &inode, host_flags)?;
    let file = HostFile::new(permit.wrap(file), host_flags);
    let flags = match fs.config.cache {
        CachePolicy::Never | CachePolicy::Auto => OpenReplyFlags::empty(),
        CachePolicy::Metadata | CachePolicy::Always => OpenReplyFlags::CACHE_DIR | OpenReplyFlags::KEEP_CACHE,
    };
    let handle = Handle::new_directory(inode, file, fs.handles.new_listing());
    Ok(Opened { handle: fs.handles.insert(ctx.effects, handle)?, flags })
}

/// Completes a reply that has both an entry and a handle; without the handle the guest gets neither, and so has not
/// looked the inode up.
fn with_handle(
    inodes: &InodeTable,
    effects: Effects<'_>,
    entry: Entry,
    open: impl FnOnce() -> Result<Opened>,
) -> Result<(Entry, Opened)> {
    match open() {
        Ok(opened) => Ok((entry, opened)),
        Err(errno) => {
            inodes.take_back_lookup(effects, entry.node);
            Err(errno)
        }
    }
}

/// Makes a handle of an open file. From here on the inode has one opener more, and its mode is what all its openers are
/// answered with.
fn add_handle(
    fs: &PassthroughFs,
    ctx: &Context,
    session: &Session,
    inode: &Arc<Inode>,
    file: HostFile,
    flags: u32,
) -> Result<Opened> {
    let policy = session.policy;
    let direct = flags & OFlags::DIRECT.bits() != 0;
    let mut mode = inode.open(policy, direct).ok_or(Errno::NFILE)?;
    let writable = file.is_writable();
    // A guest that writes back its cache reads pages before it writes into them, and writes them anywhere. Where this
    // descriptor cannot do that, the opener bypasses the cache.
    if policy.writeback && writable && (file.is_append_only() || !file.is_readable()) {
        mode = io_mode::Mode::Direct;
    }
    let file = for_mode(fs, inode, file, mode).inspect_err(|_| inode.release())?;
    let mut reply = policy.reply_flags(mode);
    // Without locks on the host, closing a file that was never written has no effect there.
    reply.set(OpenReplyFlags::NOFLUSH, !writable && !fs.config.posix_lock);
    let handle = fs.handles.insert(ctx.effects, Handle::new_file(Arc::clone(inode), file, mode))?;
    Ok(Opened { handle, flags: reply })
}

/// The file, opened as this mode needs it.
pub fn for_mode(fs: &PassthroughFs, inode: &Inode, file: HostFile, mode: io_mode::Mode) -> Result<HostFile> {
    if mode == io_mode::Mode::Parallel && fs.writes_directly(inode) {
        file.for_parallel(fs.opener())
    } else {
        Ok(file)
    }
}

/// The host's open flags for those of the guest.
pub fn host_flags(config: &FsConfig, session: &Session, flags: u32) -> OFlags {
    let guest = OFlags::from_bits_retain(flags);
    let mut host = guest & PASSED_ON;
    host.set(OFlags::NOATIME, config.preserve_noatime && guest.contains(OFlags::NOATIME));
    host.set(OFlags::DIRECT, config.allow_direct_io && guest.contains(OFlags::DIRECT));
    // A guest that writes back pages reads them first.
    if session.policy.writeback && guest & OFlags::RWMODE == OFlags::WRONLY {
        host = (host - OFlags::RWMODE) | OFlags::RDWR;
    }
    host
}

/// RELEASE.
pub fn release(
    fs: &PassthroughFs,
    node: NodeId,
    id: HandleId,
    flags: ReleaseFlags,
    owner: LockOwner,
) -> Result<()> {
    // Whatever the flush returns, the guest will not use this handle again.
    let flushed = match flags.contains(ReleaseFlags::FLUSH) {
        true => fs.handles.get(node, id).and_then(|handle| flush(&handle, owner)),
        false => Ok(()),
    };
    if fs.config.posix_lock {
        // First: a process that goes on after a death in between finds the handle, and does both.
        fs.handles.get(node, id)?.inode().locks().drop_handle(id);
    }
    let handle = fs.handles.remove(node, id)?;
    handle.inode().settle();
    if flags.contains(ReleaseFlags::FLOCK_UNLOCK) {
        // A request that is still under way may keep the descriptor, but not the lock.
        drop_flock(&handle)?;
    }
    flushed
}
