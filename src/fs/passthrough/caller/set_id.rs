//! Set-user-ID and set-group-ID bits, and file capabilities, of files that are changed.
//!
//! A change of a program must not give its author the rights of the program's owner, so the kernel clears the bits
//! when a file is written, truncated or given away. For a FUSE mount the guest's kernel leaves that to the daemon
//! (HANDLE_KILLPRIV_V2), and the daemon to the host's kernel, which does it in the same step as the change, depending
//! on CAP_FSETID and the file's group.
//!
//! A flag of WRITE, OPEN, CREATE and SETATTR says whether the caller lacks CAP_FSETID. FALLOCATE and COPY_FILE_RANGE have
//! no such flag: there the bits are cleared for every caller. Caller 0 would be no better sign, as the guest's kernel
//! also acts as root for others (overlayfs, NFS server).
//!
//! A set-group-ID bit without execution by the group gives no rights, and stays if the caller is in the file's
//! group.

use std::ffi::CStr;

use rustix::fs::{AtFlags, FileType, Mode, Statx, chmodat, getxattr_query, removexattr};
use rustix::io::Errno;

use super::credentials::{GroupGuard, SetIdBits, set_id_bits};
use super::identity::Identity;
use crate::fs::passthrough::host::{PROC, proc_name, stat};
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::inode::io_mode;
use crate::fs::{Context, Result};
use crate::mapping::acl::CAPABILITY;
use crate::mapping::ids::HostGid;
use fuse_protocol::abi::INVALID_UIDGID;
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::ids::GuestUid;
use fuse_protocol::request::Write;

/// Both bits of a mode.
const BITS: Mode = Mode::SUID.union(Mode::SGID);
/// A set-group-ID bit has an effect with this one.
const GROUP_EXECUTES: Mode = Mode::SGID.union(Mode::XGRP);

/// The permissions of an inode.
fn permissions(stat: &Statx) -> Mode {
    Mode::from_raw_mode(u32::from(stat.stx_mode))
}

/// Whether an inode has set-id bits that a change may clear. Remembers a set-group-ID bit that stays for members of the
/// file's group.
pub fn has_set_id_bits(inode: &Inode, stat: &Statx) -> bool {
    let mode = permissions(stat);
    let has = mode.intersects(BITS) && inode.kind() == FileType::RegularFile;
    inode.set_set_id_bits(has);
    inode.set_lone_group_bit(has && mode.intersection(GROUP_EXECUTES) == Mode::SGID);
    has
}

/// Decides what a change does to set-id bits, and prepares the thread for it.
#[derive(Clone, Copy, Debug)]
pub struct KillPriv<'a> {
    /// Users and groups of the share.
    pub identity: &'a Identity,
    /// HANDLE_KILLPRIV_V2: the guest says whether a change clears set-id bits.
    pub guest_says: bool,
    /// The name on the host of `security.capability`, if it is mapped: the host's kernel does not clear that one.
    pub mapped_capability: Option<&'a CStr>,
    /// The guest sees extended attributes, and so capabilities.
    pub shows_capabilities: bool,
}

impl KillPriv<'_> {
    /// What a WRITE does to set-id bits.
    pub fn bits_after_write(self, ctx: &Context, mode: io_mode::Mode, write: &Write) -> SetIdBits {
        let flagged = write.write_flags.contains(WriteFlags::KILL_SUIDGID);
        if write.write_flags.contains(WriteFlags::CACHE) && !flagged {
            // They were cleared when the program wrote to the guest's cache.
            return SetIdBits::Keep;
        }
        self.bits_after(ctx, flagged, mode == io_mode::Mode::Cached)
    }

    /// What a change with the guest's flag does to set-id bits. Guests without HANDLE_KILLPRIV_V2 clear them by SETATTR
    /// before a change, but not everywhere: `by_guest` says where.
    pub fn bits_after(self, ctx: &Context, flagged: bool, by_guest: bool) -> SetIdBits {
        let clear = if self.guest_says {
            flagged
        } else {
            let unknown = ctx.uid.0 == INVALID_UIDGID;
            flagged || (ctx.uid != GuestUid(0) && !(unknown && by_guest))
        };
        if clear { SetIdBits::Clear } else { SetIdBits::Keep }
    }

    /// Prepares the thread for a change of a file's data or size, for as long as the guard lives.
    pub fn begin(self, ctx: &Context, inode: &Inode, bits: SetIdBits) -> Result<Option<GroupGuard>> {
        set_id_bits(bits)?;
        self.drop_mapped_capability(inode)?;
        if bits == SetIdBits::Clear && inode.may_have_set_id_bits() {
            self.clear_rest(inode)?;
        }
        if bits == SetIdBits::Keep || !inode.has_lone_group_bit() {
            return Ok(None);
        }
        // A caller that the guest does not name is treated as a member of the group.
        let group = match ctx.gid.0 {
            INVALID_UIDGID => HostGid(stat(inode.path()?)?.stx_gid),
            // A group that the guest must not use has no members.
            _ => match self.identity.host_gid(ctx.gid) {
                Ok(group) => group,
                Err(_) => return Ok(None),
            },
        };
        Ok(self.identity.become_member(group))
    }

    /// Makes a change that the guest has no flag for.
    pub fn change<T>(self, ctx: &Context, inode: &Inode, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let _member = self.begin(ctx, inode, SetIdBits::Clear)?;
        let done = change()?;
        self.clear_rest(inode)?;
        Ok(done)
    }

    /// Clears the set-id bits and capabilities that some file systems leave (FUSE; all at fallocate(2) before Linux 5.17).
    fn clear_rest(self, inode: &Inode) -> Result<()> {
        let mode = permissions(&stat(inode.path()?)?);
        let mut left = mode;
        left.remove(Mode::SUID);
        if mode.contains(GROUP_EXECUTES) {
            left.remove(Mode::SGID);
        }
        if left != mode && inode.kind() == FileType::RegularFile {
            chmodat(PROC, proc_name(&*inode.path()?), left, AtFlags::empty())?;
        }
        let path = inode.path()?;
        if self.shows_capabilities && getxattr_query(proc_name(&*path).as_c_str(), CAPABILITY).is_ok() {
            removexattr(proc_name(&*path), CAPABILITY)?;
        }
        // What is left gives no rights, or comes with the next look at its attributes.
        inode.set_set_id_bits(false);
        Ok(())
    }

    /// Removes capabilities of a file whose data or owner is about to change, where the host's kernel does not.
    pub fn drop_mapped_capability(self, inode: &Inode) -> Result<()> {
        let Some(name) = self.mapped_capability else { return Ok(()) };
        match removexattr(proc_name(&*inode.path()?), name) {
            // Most files have none; on some inodes and file systems there is no such attribute.
            Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM) => Ok(()),
            result => result,
        }
    }
}
