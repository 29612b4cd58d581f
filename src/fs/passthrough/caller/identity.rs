//! Owners and callers between guest and host. Every number of a user or group that goes one way or
//! the other passes here or through [`crate::mapping`].

use rustix::fs::{Mode, Statx};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::credentials::{self, Caller, CallerGuard, become_caller};
use crate::fs::Result;
use crate::fs::passthrough::{Context, PassthroughFs};
use crate::mapping::ids::{HostGid, HostUid};
use crate::sys::umask::set_thread_umask;
use fuse_protocol::abi::INVALID_UIDGID;
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::{GuestGid, GuestUid};
use fuse_protocol::init::Negotiated;

/// The guest's root.
const ROOT: GuestUid = GuestUid(0);
/// Permission and set-id bits of a mode.
const MODE_BITS: u32 = 0o7777;

/// Whether the guest's kernel alone decides on the set-group-ID bit of new files. From Linux 6.1 on
/// it takes the bit off by itself where the caller is not in the directory's group. The host does
/// so as well, but not as well if it is not told of the caller's groups: it takes the bit from
/// members, too.
pub(in crate::fs::passthrough) fn guest_strips_group_bit(negotiated: &Negotiated) -> bool {
    negotiated.minor >= 37 && !negotiated.flags.contains(InitFlags::CREATE_SUPP_GROUP)
}

/// User and group that the guest sees as an inode's owners.
#[derive(Clone, Copy, Debug)]
pub(in crate::fs::passthrough) struct Owner {
    pub uid: GuestUid,
    pub gid: GuestGid,
}

impl PassthroughFs {
    /// The owners of an inode, for the guest.
    pub(in crate::fs::passthrough) fn owner(&self, stat: &Statx) -> Owner {
        Owner {
            uid: self.config.uid_map.to_guest(HostUid(stat.stx_uid)),
            gid: self.config.gid_map.to_guest(HostGid(stat.stx_gid)),
        }
    }

    /// The host's number of a user; EPERM for one that the guest must not use,
    /// and EINVAL for none: guests with idmapped mounts (ALLOW_IDMAP) name callers only in requests that
    /// create something.
    pub(in crate::fs::passthrough) fn host_uid(&self, uid: GuestUid) -> Result<HostUid> {
        if uid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.config.uid_map.to_host(uid).ok_or(Errno::PERM)
    }

    /// The same for a group.
    pub(in crate::fs::passthrough) fn host_gid(&self, gid: GuestGid) -> Result<HostGid> {
        if gid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.config.gid_map.to_host(gid).ok_or(Errno::PERM)
    }

    /// As whom a request that creates something acts on the host, and with which capabilities.
    ///
    /// The guest's kernel has checked that the caller may create this, with all of the caller's groups
    /// and capabilities, of which the request tells little: so the daemon's own count here.
    /// CAP_FSETID is not among them, since the guest's kernel leaves it to the host to keep the
    /// set-group-ID bit of a new file from those who are not in its group, unless it does that itself.
    fn host_caller(&self, ctx: &Context) -> Result<Caller> {
        let (uid, gid) = (self.host_uid(ctx.uid)?, self.host_gid(ctx.gid)?);
        let group = ctx.supplementary_group.map(|group| self.host_gid(group)).transpose()?;
        let held = credentials::held()?;
        let caller = Caller {
            uid: self.own.user_for(uid, held),
            gid: self.own.group_for(gid, held),
            group,
            effective: self.creating_capabilities(ctx),
        };
        // What a user of the guest makes must not look like its root's.
        if caller.uid != uid && ctx.uid != ROOT && self.config.uid_map.to_guest(caller.uid) == ROOT {
            return Err(Errno::PERM);
        }
        Ok(caller)
    }

    fn creating_capabilities(&self, ctx: &Context) -> CapabilitySet {
        if ctx.uid == ROOT {
            return CapabilitySet::all();
        }
        let mut capabilities = CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::MKNOD;
        if self.session().keeps_group_bit {
            capabilities |= CapabilitySet::FSETID;
        }
        capabilities
    }

    /// The mode for something new: set-id bits only if the guest will see the caller as the owner.
    /// A program that a user of the guest makes must not run as another one.
    fn permitted_mode(&self, ctx: &Context, caller: &Caller, mode: u32) -> u32 {
        let mut mode = mode & MODE_BITS;
        if mode & (libc::S_ISUID | libc::S_ISGID) == 0 || ctx.uid == ROOT {
            return mode;
        }
        if self.config.uid_map.to_guest(caller.uid) != ctx.uid {
            mode &= !libc::S_ISUID;
        }
        if self.config.gid_map.to_guest(caller.gid) != ctx.gid {
            mode &= !libc::S_ISGID;
        }
        mode
    }

    /// Creates something as the caller: `create` gets the mode that it is to ask the host for.
    ///
    /// A guest that applies umasks by itself has done so. One that leaves them to us wants them to
    /// count only where the directory has no default ACL, which the host alone can tell in time.
    pub(in crate::fs::passthrough) fn create_as<T>(
        &self,
        ctx: &Context,
        mode: u32,
        umask: u32,
        create: impl FnOnce(Mode) -> Result<T>,
    ) -> Result<T> {
        let caller = self.host_caller(ctx)?;
        let mode = self.permitted_mode(ctx, &caller, mode);
        let _caller = become_caller(self.own, caller)?;
        if !self.session().leaves_umask {
            return create(Mode::from_raw_mode(mode & !umask));
        }
        let _umask = set_thread_umask(Mode::from_raw_mode(umask & 0o777))?;
        create(Mode::from_raw_mode(mode))
    }

    /// Acts as the caller without any capability until the guard is dropped: where the host's kernel
    /// decides what only an owner may do.
    pub(in crate::fs::passthrough) fn become_user(&self, ctx: &Context) -> Result<CallerGuard> {
        become_caller(self.own, Caller { effective: CapabilitySet::empty(), ..self.host_caller(ctx)? })
    }

    /// Acts as the caller until the guard is dropped.
    pub(in crate::fs::passthrough) fn become_caller(&self, ctx: &Context) -> Result<CallerGuard> {
        become_caller(self.own, self.host_caller(ctx)?)
    }
}
