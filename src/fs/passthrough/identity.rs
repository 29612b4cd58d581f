//! Owners and callers between guest and host. Every number of a user or group that goes one way or
//! the other passes here or through [`crate::mapping`].

use rustix::fs::{Mode, Statx};
use rustix::io::Errno;

use super::credentials::{Caller, CallerGuard, become_caller};
use super::{Context, PassthroughFs};
use crate::fs::Result;
use crate::fuse::abi::INVALID_UIDGID;
use crate::fuse::ids::{GuestGid, GuestUid};
use crate::mapping::ids::{HostGid, HostUid};
use crate::sys::umask::set_thread_umask;

/// Permission and set-id bits of a mode.
const MODE_BITS: u32 = 0o7777;

/// User and group that the guest sees as an inode's owners.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub uid: GuestUid,
    pub gid: GuestGid,
}

impl PassthroughFs {
    /// The owners of an inode, for the guest.
    pub(super) fn owner(&self, stat: &Statx) -> Owner {
        Owner {
            uid: self.config.uid_map.to_guest(HostUid(stat.stx_uid)),
            gid: self.config.gid_map.to_guest(HostGid(stat.stx_gid)),
        }
    }

    /// The host's number of a user; EPERM for one that the guest must not use,
    /// and EINVAL for none: guests with idmapped mounts (ALLOW_IDMAP) name callers only in requests that
    /// create something.
    pub(super) fn host_uid(&self, uid: GuestUid) -> Result<HostUid> {
        if uid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.config.uid_map.to_host(uid).ok_or(Errno::PERM)
    }

    /// The same for a group.
    pub(super) fn host_gid(&self, gid: GuestGid) -> Result<HostGid> {
        if gid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.config.gid_map.to_host(gid).ok_or(Errno::PERM)
    }

    fn host_caller(&self, ctx: &Context) -> Result<Caller> {
        Ok(Caller {
            uid: self.host_uid(ctx.uid)?,
            gid: self.host_gid(ctx.gid)?,
            group: ctx.supplementary_group.map(|group| self.host_gid(group)).transpose()?,
        })
    }

    /// Creates something as the caller: `create` gets the mode that it is to ask the host for.
    ///
    /// A guest that applies umasks by itself has done so. One that leaves them to us wants them to
    /// count only where the directory has no default ACL, which the host alone can tell in time.
    pub(super) fn create_as<T>(
        &self,
        ctx: &Context,
        mode: u32,
        umask: u32,
        create: impl FnOnce(Mode) -> Result<T>,
    ) -> Result<T> {
        let _caller = self.become_caller(ctx)?;
        if !self.session().leaves_umask {
            return create(Mode::from_raw_mode(mode & !umask & MODE_BITS));
        }
        let _umask = set_thread_umask(Mode::from_raw_mode(umask & 0o777))?;
        create(Mode::from_raw_mode(mode & MODE_BITS))
    }

    /// Acts as the caller until the guard is dropped.
    fn become_caller(&self, ctx: &Context) -> Result<CallerGuard> {
        // The guest's root may do all, also if it is somebody else on the host. Others may do what
        // their groups allow, if we hear of them.
        let keep_override = ctx.uid == GuestUid(0) || !self.session().groups_are_sent;
        become_caller(self.own, self.host_caller(ctx)?, keep_override)
    }

    /// The same for requests that create something, but come without supplementary groups.
    pub(super) fn become_caller_without_groups(&self, ctx: &Context) -> Result<CallerGuard> {
        become_caller(self.own, self.host_caller(ctx)?, true)
    }
}
