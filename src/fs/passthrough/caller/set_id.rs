//! Set-user-ID and set-group-ID bits, and file capabilities, of files that are changed.
//!
//! Whoever changes a program must not give it somebody else's rights, so the kernel clears the bits
//! when a file is written, truncated or given away. For a FUSE mount the guest's kernel leaves that
//! to the daemon (HANDLE_KILLPRIV_V2), and the daemon to the host's kernel, which does it in the
//! same step as the change: it asks for CAP_FSETID and for the file's group.
//!
//! The guest says by a flag of WRITE, OPEN, CREATE and SETATTR whether the caller lacks CAP_FSETID.
//! FALLOCATE and COPY_FILE_RANGE have no such flag: there the bits go whoever calls. A caller with
//! user 0 would be no better sign, as the guest's kernel also acts as root for others (overlayfs,
//! NFS server).
//!
//! A set-group-ID bit without execution by the group gives nobody rights, and stays if the caller
//! is in the file's group.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, Statx, chmodat, getxattr_query, removexattr};

use super::credentials::{GroupGuard, SetIdBits, become_member, set_id_bits};
use crate::fs::Result;
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::inode::io_mode;
use crate::fs::passthrough::ops::lookup::{PROC, proc_name, stat};
use crate::fs::passthrough::{Context, PassthroughFs};
use crate::mapping::acl::CAPABILITY;
use crate::mapping::ids::HostGid;
use fuse_protocol::abi::INVALID_UIDGID;
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::ids::GuestUid;
use fuse_protocol::request::Write;

/// Both bits of a mode.
const BITS: Mode = Mode::SUID.union(Mode::SGID);
/// A set-group-ID bit counts with this one.
const GROUP_EXECUTES: Mode = Mode::SGID.union(Mode::XGRP);

/// The permissions of an inode.
fn permissions(stat: &Statx) -> Mode {
    Mode::from_raw_mode(u32::from(stat.stx_mode))
}

/// Whether the set-group-ID bit is set, and the group may not execute the file.
fn has_lone_group_bit(mode: Mode) -> bool {
    mode.intersection(GROUP_EXECUTES) == Mode::SGID
}

impl PassthroughFs {
    /// How long the guest may believe attributes. Not at all, if they have set-id bits: when these
    /// are cleared by a write, no reply says so.
    pub(in crate::fs::passthrough) fn attributes_valid(&self, inode: &Inode, stat: &Statx) -> Duration {
        let mode = permissions(stat);
        if !mode.intersects(BITS) || inode.kind != FileType::RegularFile {
            if inode.lone_group_bit.load(Ordering::Relaxed) {
                inode.lone_group_bit.store(false, Ordering::Relaxed);
            }
            return self.config.cache.timeout();
        }
        inode.lone_group_bit.store(has_lone_group_bit(mode), Ordering::Relaxed);
        Duration::ZERO
    }

    /// What a WRITE does to set-id bits.
    pub(in crate::fs::passthrough) fn bits_after_write(
        &self,
        ctx: &Context,
        mode: io_mode::Mode,
        write: &Write,
    ) -> SetIdBits {
        let flagged = write.write_flags.contains(WriteFlags::KILL_SUIDGID);
        if write.write_flags.contains(WriteFlags::CACHE) && !flagged {
            // Whoever wrote to the guest's cache had them cleared then.
            return SetIdBits::Stay;
        }
        self.bits_after(ctx, flagged, mode == io_mode::Mode::Cached)
    }

    /// What a change with the guest's flag does to set-id bits. Guests that did not agree on the
    /// flag clear them by SETATTR before a change, but not everywhere: `by_guest` says where.
    pub(in crate::fs::passthrough) fn bits_after(
        &self,
        ctx: &Context,
        flagged: bool,
        by_guest: bool,
    ) -> SetIdBits {
        let go = if self.session().says_who_clears {
            flagged
        } else {
            let unknown = ctx.uid.0 == INVALID_UIDGID;
            flagged || (ctx.uid != GuestUid(0) && !(unknown && by_guest))
        };
        if go { SetIdBits::Go } else { SetIdBits::Stay }
    }

    /// Prepares the thread for a change of a file's data or size, for as long as the guard lives.
    pub(in crate::fs::passthrough) fn begin_change(
        &self,
        ctx: &Context,
        inode: &Inode,
        bits: SetIdBits,
    ) -> Result<Option<GroupGuard>> {
        set_id_bits(bits)?;
        self.drop_mapped_capability(inode)?;
        if bits == SetIdBits::Stay || !inode.lone_group_bit.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // A guest that does not say who calls counts as one of the group.
        let group = match ctx.gid.0 {
            INVALID_UIDGID => HostGid(stat(inode.path()?)?.stx_gid),
            // A group that the guest must not use has no members.
            _ => match self.host_gid(ctx.gid) {
                Ok(group) => group,
                Err(_) => return Ok(None),
            },
        };
        Ok(become_member(self.own, group))
    }

    /// Makes a change that the guest has no flag for.
    pub(in crate::fs::passthrough) fn change<T>(
        &self,
        ctx: &Context,
        inode: &Inode,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _member = self.begin_change(ctx, inode, SetIdBits::Go)?;
        let done = change()?;
        self.finish_change(inode)?;
        Ok(done)
    }

    /// After a change that file systems of older hosts do not clear set-id bits and capabilities
    /// for (fallocate(2) before Linux 5.17): does what is left of it.
    fn finish_change(&self, inode: &Inode) -> Result<()> {
        let mode = permissions(&stat(inode.path()?)?);
        let mut left = mode;
        left.remove(Mode::SUID);
        if mode.contains(GROUP_EXECUTES) {
            left.remove(Mode::SGID);
        }
        if left != mode && inode.kind == FileType::RegularFile {
            chmodat(PROC, proc_name(&*inode.path()?), left, AtFlags::empty())?;
        }
        // Without extended attributes the guest knows no capabilities.
        let fd = inode.path()?;
        if self.config.xattr && getxattr_query(proc_name(&*fd).as_c_str(), CAPABILITY).is_ok() {
            return removexattr(proc_name(&*fd), CAPABILITY);
        }
        Ok(())
    }
}
