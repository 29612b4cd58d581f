//! GETATTR, STATX, SETATTR, ACCESS, STATFS and SYNCFS.

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat,
    chownat, fstatvfs, ftruncate,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::guest_view::GuestView;
use crate::fs::passthrough::caller::credentials::{SetIdBits, explain_unmapped, gid_of, set_id_bits, uid_of};
use crate::fs::passthrough::host::{Host, PROC, proc_name, set_times, stat};
use crate::fs::passthrough::inode::{Inode, InodeTable, Mount};
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Context, Result};
use crate::mapping::ids::{HostGid, HostUid};
use fuse_protocol::abi;
use fuse_protocol::ids::HandleId;
use fuse_protocol::reply::{Attributes, StatxReply};
use fuse_protocol::request::{SetTime, Setattr};

/// Bits of a mode that chmod(2) sets.
const PERMISSIONS: u32 = 0o7777;

/// STATFS: figures of the file system that an inode is on.
pub fn statfs(inode: &Inode) -> Result<abi::Kstatfs> {
    let vfs = fstatvfs(inode.path()?)?;
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Ok(abi::Kstatfs {
        blocks: vfs.f_blocks,
        bfree: vfs.f_bfree,
        bavail: vfs.f_bavail,
        files: vfs.f_files,
        ffree: vfs.f_ffree,
        bsize: narrow(vfs.f_bsize),
        namelen: narrow(vfs.f_namemax),
        frsize: narrow(vfs.f_frsize),
        ..Default::default()
    })
}

/// GETATTR.
pub fn getattr(view: &GuestView<'_>, inode: &Inode) -> Result<Attributes> {
    inode.settle();
    Ok(view.settled_attributes(inode, &stat(inode.path()?)?))
}

/// STATX: everything that the host has, without a question to a server. The guest takes of it what it asked for.
pub fn statx(view: &GuestView<'_>, inode: &Inode) -> Result<StatxReply> {
    inode.settle();
    let stat = stat(inode.path()?)?;
    let owner = view.owner(&stat);
    let time = |time: rustix::fs::StatxTimestamp| abi::SxTime {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec,
        reserved: 0,
    };
    let statx = abi::Statx {
        // The mount belongs to the host.
        mask: stat.stx_mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
        blksize: stat.stx_blksize,
        attributes: stat.stx_attributes.bits(),
        nlink: stat.stx_nlink,
        uid: owner.uid.0,
        gid: owner.gid.0,
        mode: stat.stx_mode,
        ino: view.number(inode, stat.stx_ino),
        size: stat.stx_size,
        blocks: view.blocks(&stat),
        attributes_mask: stat.stx_attributes_mask.bits(),
        atime: time(stat.stx_atime),
        btime: time(stat.stx_btime),
        ctime: time(stat.stx_ctime),
        mtime: time(stat.stx_mtime),
        rdev_major: stat.stx_rdev_major,
        rdev_minor: stat.stx_rdev_minor,
        dev_major: stat.stx_dev_major,
        dev_minor: stat.stx_dev_minor,
        ..Default::default()
    };
    Ok(StatxReply { statx, valid: view.valid(inode, &stat) })
}

/// SETATTR, in the order mode, owner, size, times: a later step never undoes an earlier one except where POSIX demands
/// it (a new owner clears set-id bits).
pub fn setattr(fs: &PassthroughFs, ctx: &Context, inode: &Inode, set: &Setattr) -> Result<Attributes> {
    // Owners that the guest must not set are refused before anything is changed.
    let uid: Option<Uid> = set.uid.map(|uid| uid_of(fs.identity.host_uid(uid)?)).transpose()?;
    let gid: Option<Gid> = set.gid.map(|gid| gid_of(fs.identity.host_gid(gid)?)).transpose()?;
    // The guest's kernel has cleared the set-group-ID bit where POSIX demands it.
    set_id_bits(SetIdBits::Keep)?;
    if let Some(mode) = set.mode {
        set_mode(inode, mode & PERMISSIONS)?;
    }
    if uid.is_some() || gid.is_some() {
        fs.kill_priv(&fs.session()).drop_mapped_capability(inode)?;
        let result = chownat(inode.path()?, c"", uid, gid, AtFlags::EMPTY_PATH);
        result.inspect_err(|errno| {
            let (uid, gid) = (uid.map(|uid| HostUid(uid.as_raw())), gid.map(|gid| HostGid(gid.as_raw())));
            explain_unmapped(*errno, uid, gid);
        })?;
    }
    if let Some(size) = set.size {
        set_size(fs, ctx, inode, set.handle, size, set.kill_suidgid)?;
    }
    if set.atime.is_some() || set.mtime.is_some() {
        let times = Timestamps { last_access: timespec(set.atime)?, last_modification: timespec(set.mtime)? };
        inode.settle_and(|| set_times(&*inode.path()?, &times))?;
    }
    getattr(&fs.view(ctx), inode)
}

fn set_mode(inode: &Inode, mode: u32) -> Result<()> {
    match inode.kind() {
        // A symbolic link has no mode that could be set.
        FileType::Symlink => Err(Errno::OPNOTSUPP),
        _ => chmodat(PROC, proc_name(&*inode.path()?), Mode::from_raw_mode(mode), AtFlags::empty()),
    }
}

fn set_size(
    fs: &PassthroughFs,
    ctx: &Context,
    inode: &Inode,
    handle: Option<HandleId>,
    size: u64,
    kill_suidgid: bool,
) -> Result<()> {
    match inode.kind() {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ => return Err(Errno::INVAL),
    }
    let _guard = inode.ranges().write_from(size.min(stat(inode.path()?)?.stx_size));
    let kill_priv = fs.kill_priv(&fs.session());
    let _member = kill_priv.begin(ctx, inode, kill_priv.bits_after(ctx, kill_suidgid, true))?;
    let handle = handle.and_then(|handle| fs.handles.get(inode.node(), handle).ok());
    if let Some(handle) = handle {
        match ftruncate(handle.fd(), size) {
            // Not open for writing on the host, as with truncate(2) of a file open for reading.
            Err(Errno::INVAL | Errno::BADF) => {}
            result => return result,
        }
    }
    ftruncate(fs.inodes.open(&fs.host, inode, OFlags::WRONLY)?, size)
}

/// ACCESS, which guests send when they do not check permissions themselves: by owner, group and mode, as the caller's
/// other groups are not known here.
pub fn access(view: &GuestView<'_>, ctx: &Context, inode: &Inode, mask: u32) -> Result<()> {
    let stat = stat(inode.path()?)?;
    let (mode, owner) = (u32::from(stat.stx_mode), view.owner(&stat));
    let wanted = mask & 0o7;
    if ctx.uid.0 == 0 {
        // Root may do all but execute a file without any execute bit.
        let executable = inode.is_directory() || mode & 0o111 != 0;
        return if wanted & 0o1 == 0 || executable { Ok(()) } else { Err(Errno::ACCESS) };
    }
    let granted = if ctx.uid == owner.uid {
        mode >> 6
    } else if ctx.gid == owner.gid {
        mode >> 3
    } else {
        mode
    };
    if wanted & !granted == 0 { Ok(()) } else { Err(Errno::ACCESS) }
}

/// SYNCFS. `all` mounts that the guest knows are one file system to it, unless submounts were negotiated.
pub fn syncfs(inodes: &InodeTable, host: &Host, inode: &Inode, all: bool) -> Result<()> {
    let result = sync_mount(inodes, host, inode.mount(), inode);
    if !all {
        return result;
    }
    let mounts = inodes.fd_cache().known_mounts();
    let others = mounts.iter().filter(|mount| mount.id() != inode.mount().id());
    others.fold(result, |result, mount| result.and(sync_mount(inodes, host, mount, inodes.root())))
}

/// syncfs(2) takes no O_PATH descriptor. A directory takes the place of what cannot be opened.
fn sync_mount(inodes: &InodeTable, host: &Host, mount: &Mount, inode: &Inode) -> Result<()> {
    let top = mount.top();
    let open = match (inode.kind(), &top) {
        (FileType::RegularFile | FileType::Directory, _) if inode.mount().id() == mount.id() => inode,
        (_, Some(top)) => top,
        (_, None) => inodes.root(),
    };
    rustix::fs::syncfs(inodes.open(host, open, OFlags::RDONLY)?.as_fd())
}

fn timespec(time: Option<SetTime>) -> Result<Timespec> {
    let special = |tv_nsec| Ok(Timespec { tv_sec: 0, tv_nsec });
    match time {
        None => special(UTIME_OMIT),
        Some(SetTime::Now) => special(UTIME_NOW),
        Some(SetTime::At { nanoseconds, .. }) if nanoseconds > 999_999_999 => Err(Errno::INVAL),
        Some(SetTime::At { seconds, nanoseconds }) => {
            Ok(Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() })
        }
    }
}
