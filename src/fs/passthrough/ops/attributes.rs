//! Attributes: of inodes, and of the file system.

use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat,
    chownat, fstatvfs, ftruncate, utimensat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::lookup::{PROC, proc_name, stat};
use crate::fs::Result;
use crate::fs::passthrough::caller::credentials::{SetIdBits, explain_unmapped, gid_of, set_id_bits, uid_of};
use crate::fs::passthrough::caller::identity::Owner;
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::inode::mount::Mount;
use crate::fs::passthrough::{Context, PassthroughFs};
use crate::mapping::ids::{HostGid, HostUid};
use fuse_protocol::abi;
use fuse_protocol::ids::{HandleId, NodeId};
use fuse_protocol::reply::{Attributes, StatxReply};
use fuse_protocol::request::{self, SetTime, Setattr};

/// Bits of a mode that chmod(2) sets.
const PERMISSIONS: u32 = 0o7777;

/// Attributes in the protocol's form.
fn attr(stat: &Statx, owner: Owner) -> abi::Attr {
    abi::Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        // Seconds before 1970 are negative on both sides.
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: owner.uid.0,
        gid: owner.gid.0,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// A device number as the protocol packs it: `new_encode_dev()` of Linux.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Figures of the file system that an inode is on.
pub(in crate::fs::passthrough) fn file_system(inode: &Inode) -> Result<abi::Kstatfs> {
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

impl PassthroughFs {
    /// Attributes in the protocol's form and the guest's ids.
    pub(in crate::fs::passthrough) fn attr_of(&self, stat: &Statx) -> abi::Attr {
        abi::Attr { blocks: self.blocks(stat), ..attr(stat, self.owner(stat)) }
    }

    /// Sectors of a file. Of one without any, a guest that writes its cache back may hold data that it
    /// has not sent yet; tar(1) and others take a file with none for one hole, and do not read it.
    fn blocks(&self, stat: &Statx) -> u64 {
        let file = FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::RegularFile;
        let unsent = stat.stx_blocks == 0 && file && self.session().policy.writeback;
        if unsent { 1 } else { stat.stx_blocks }
    }

    pub(in crate::fs::passthrough) fn attributes(&self, inode: &Inode) -> Result<Attributes> {
        let stat = stat(inode.path()?)?;
        let attr = abi::Attr { ino: self.shown_number(inode, stat.stx_ino), ..self.attr_of(&stat) };
        Ok(Attributes { attr, valid: self.attributes_valid(inode, &stat) })
    }

    /// STATX. The host is asked for what the guest wants, but never to synchronize with a server.
    pub(in crate::fs::passthrough) fn extended_attributes(
        &self,
        inode: &Inode,
        _wanted: &request::Statx,
    ) -> Result<StatxReply> {
        let stat = stat(inode.path()?)?;
        let owner = self.owner(&stat);
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
            ino: self.shown_number(inode, stat.stx_ino),
            size: stat.stx_size,
            blocks: self.blocks(&stat),
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
        Ok(StatxReply { statx, valid: self.attributes_valid(inode, &stat) })
    }

    /// SETATTR, in the order mode, owner, size, times: a later step never undoes an earlier one but
    /// as POSIX asks for it (a new owner clears set-id bits).
    pub(in crate::fs::passthrough) fn set_attributes(
        &self,
        ctx: &Context,
        node: NodeId,
        set: &Setattr,
    ) -> Result<Attributes> {
        let inode = self.inode(node)?;
        // Owners that the guest must not give are refused before anything is changed.
        let uid: Option<Uid> = set.uid.map(|uid| uid_of(self.host_uid(uid)?)).transpose()?;
        let gid: Option<Gid> = set.gid.map(|gid| gid_of(self.host_gid(gid)?)).transpose()?;
        // The guest's kernel has taken off the set-group-ID bit where it has to go.
        set_id_bits(SetIdBits::Stay)?;
        if let Some(mode) = set.mode {
            self.set_mode(&inode, mode & PERMISSIONS)?;
        }
        if uid.is_some() || gid.is_some() {
            self.drop_mapped_capability(&inode)?;
            let result = chownat(inode.path()?, c"", uid, gid, AtFlags::EMPTY_PATH);
            result.inspect_err(|errno| {
                let (uid, gid) = (uid.map(|uid| HostUid(uid.as_raw())), gid.map(|gid| HostGid(gid.as_raw())));
                explain_unmapped(*errno, uid, gid);
            })?;
        }
        if let Some(size) = set.size {
            self.set_size(ctx, &inode, set.handle, size, set.kill_suidgid)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times =
                Timestamps { last_access: timespec(set.atime)?, last_modification: timespec(set.mtime)? };
            set_times(&*inode.path()?, &times)?;
        }
        self.attributes(&inode)
    }

    fn set_mode(&self, inode: &Inode, mode: u32) -> Result<()> {
        match inode.kind {
            // A symbolic link has no mode that could be set.
            FileType::Symlink => Err(Errno::OPNOTSUPP),
            _ => chmodat(PROC, proc_name(&*inode.path()?), Mode::from_raw_mode(mode), AtFlags::empty()),
        }
    }

    fn set_size(
        &self,
        ctx: &Context,
        inode: &Inode,
        handle: Option<HandleId>,
        size: u64,
        kill_suidgid: bool,
    ) -> Result<()> {
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let _guard = inode.ranges.write_from(size.min(stat(inode.path()?)?.stx_size));
        let _member = self.begin_change(ctx, inode, self.bits_after(ctx, kill_suidgid, true))?;
        let handle = handle.and_then(|handle| self.handles.get(inode.node, handle).ok());
        if let Some(handle) = handle {
            match ftruncate(handle.fd(), size) {
                // Not open for writing on the host, as with truncate(2) of a file open for reading.
                Err(Errno::INVAL | Errno::BADF) => {}
                result => return result,
            }
        }
        ftruncate(self.reopen(inode, OFlags::WRONLY)?, size)
    }

    /// ACCESS, which guests send when they do not check permissions themselves: by owner, group
    /// and mode, as the caller's other groups are not known here.
    pub(in crate::fs::passthrough) fn check_access(
        &self,
        ctx: &Context,
        inode: &Inode,
        mask: u32,
    ) -> Result<()> {
        let stat = stat(inode.path()?)?;
        let (mode, owner) = (u32::from(stat.stx_mode), self.owner(&stat));
        let wanted = mask & 0o7;
        if ctx.uid.0 == 0 {
            // Root may do all but execute what nobody may.
            let executable = inode.kind == FileType::Directory || mode & 0o111 != 0;
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

    pub(in crate::fs::passthrough) fn sync_file_system(&self, inode: &Inode) -> Result<()> {
        let result = self.sync_mount(inode.mount(), inode);
        if self.session().submounts {
            return result;
        }
        // The guest has one file system, and we have those of all mounts that it knows.
        let others = self.inodes.fd_cache().known_mounts();
        let others = others.iter().filter(|mount| mount.id != inode.mount().id);
        others.fold(result, |result, mount| result.and(self.sync_mount(mount, self.inodes.root())))
    }

    /// syncfs(2) takes no O_PATH descriptor. A directory stands in for what cannot be opened.
    fn sync_mount(&self, mount: &Mount, inode: &Inode) -> Result<()> {
        let top = mount.top();
        let file = match (inode.kind, &top) {
            (FileType::RegularFile | FileType::Directory, _) if inode.mount().id == mount.id => {
                self.reopen(inode, OFlags::RDONLY)?
            }
            (_, Some(top)) => self.reopen(top, OFlags::RDONLY)?,
            (_, None) => self.reopen(self.inodes.root(), OFlags::RDONLY)?,
        };
        rustix::fs::syncfs(file.as_fd())
    }
}

fn set_times(path: impl AsFd, times: &Timestamps) -> Result<()> {
    match utimensat(&path, c"", times, AtFlags::EMPTY_PATH) {
        // Hosts before Linux 5.8 do not know the flag here.
        Err(Errno::INVAL | Errno::NOENT) => set_times_by_name(&path, times),
        result => result,
    }
}

fn set_times_by_name(path: impl AsFd, times: &Timestamps) -> Result<()> {
    utimensat(PROC, proc_name(path), times, AtFlags::empty())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::passthrough::ops::lookup::PATH;
    use rustix::fs::openat;

    #[test]
    fn times_are_set_without_the_flag_of_newer_hosts() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let [file, link, fifo] = ["file", "link", "fifo"].map(|name| folder.path().join(name));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        rustix::fs::mknodat(PROC, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let proc = std::fs::File::open("/proc/self/fd").unwrap();
        for (number, name) in [&link, &fifo, &file].into_iter().enumerate() {
            let path = openat(PROC, name, PATH, Mode::empty()).unwrap();
            let time = Timespec { tv_sec: -7 - i64::try_from(number).unwrap(), tv_nsec: 5 };
            let times = Timestamps { last_access: time, last_modification: time };
            // As above, but the working directory of a test is another one.
            utimensat(&proc, proc_name(&path), &times, AtFlags::empty()).unwrap();
            assert_eq!(stat(&path).unwrap().stx_mtime.tv_sec, time.tv_sec);
            assert_eq!(set_times(&path, &times), Ok(()));
        }
        // The link's own, not those of what it points to.
        assert_eq!(stat(openat(PROC, &link, PATH, Mode::empty()).unwrap()).unwrap().stx_mtime.tv_sec, -7);
    }
}
