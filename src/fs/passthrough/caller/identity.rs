//! Owners and callers between guest and host. Every number of a user or group that goes one way or the other passes
//! here or through [`crate::mapping`].

use rustix::fs::{Mode, Statx};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::credentials::{self, Caller, CallerGuard, GroupGuard, OwnIds};
use crate::fs::passthrough::config::FsConfig;
use crate::fs::passthrough::session::Session;
use crate::fs::{Context, Result};
use crate::mapping::ids::{GidMap, HostGid, HostUid, UidMap};
use crate::sys::umask::set_thread_umask;
use fuse_protocol::abi::INVALID_UIDGID;
use fuse_protocol::ids::{GuestGid, GuestUid};

/// The guest's root.
const ROOT: GuestUid = GuestUid(0);
/// Permission and set-id bits of a mode.
const MODE_BITS: u32 = 0o7777;

/// User and group that the guest sees as an inode's owners.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// User.
    pub uid: GuestUid,
    /// Group.
    pub gid: GuestGid,
}

/// The users and groups of a share: those of the daemon, and the maps between guest and host.
#[derive(Debug)]
pub struct Identity {
    own: OwnIds,
    uid_map: UidMap,
    gid_map: GidMap,
}

impl Identity {
    /// The daemon's own ids, and the configured maps.
    pub fn new(config: &FsConfig) -> Identity {
        Identity { own: OwnIds::current(), uid_map: config.uid_map.clone(), gid_map: config.gid_map.clone() }
    }

    /// The maps of users and groups.
    pub fn maps(&self) -> (&UidMap, &GidMap) {
        (&self.uid_map, &self.gid_map)
    }

    /// The owners of an inode, for the guest.
    pub fn owner(&self, stat: &Statx) -> Owner {
        Owner {
            uid: self.uid_map.to_guest(HostUid(stat.stx_uid)),
            gid: self.gid_map.to_guest(HostGid(stat.stx_gid)),
        }
    }

    /// The host's number of a user; EPERM for one that the guest must not use, and EINVAL for the invalid one: guests
    /// with idmapped mounts (ALLOW_IDMAP) name callers only in requests that create something.
    pub fn host_uid(&self, uid: GuestUid) -> Result<HostUid> {
        if uid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.uid_map.to_host(uid).ok_or(Errno::PERM)
    }

    /// The same for a group.
    pub fn host_gid(&self, gid: GuestGid) -> Result<HostGid> {
        if gid.0 == INVALID_UIDGID {
            return Err(Errno::INVAL);
        }
        self.gid_map.to_host(gid).ok_or(Errno::PERM)
    }

    /// As whom a request that creates something acts on the host, without capabilities.
    fn host_caller(&self, ctx: &Context) -> Result<Caller> {
        let (uid, gid) = (self.host_uid(ctx.uid)?, self.host_gid(ctx.gid)?);
        let group = ctx.supplementary_group.map(|group| self.host_gid(group)).transpose()?;
        let permitted = credentials::permitted()?;
        let caller = Caller {
            uid: self.own.user_for(uid, permitted),
            gid: self.own.group_for(gid, permitted),
            group,
            effective: CapabilitySet::empty(),
        };
        // What a user of the guest creates must not look like its root's.
        if caller.uid != uid && ctx.uid != ROOT && self.uid_map.to_guest(caller.uid) == ROOT {
            return Err(Errno::PERM);
        }
        Ok(caller)
    }

    /// The mode of something new: set-id bits only if the guest will see the caller as the owner. A program that a user
    /// of the guest creates must not run as another one.
    fn permitted_mode(&self, ctx: &Context, caller: &Caller, mode: u32) -> u32 {
        let mut mode = mode & MODE_BITS;
        if mode & (libc::S_ISUID | libc::S_ISGID) == 0 || ctx.uid == ROOT {
            return mode;
        }
        if self.uid_map.to_guest(caller.uid) != ctx.uid {
            mode &= !libc::S_ISUID;
        }
        if self.gid_map.to_guest(caller.gid) != ctx.gid {
            mode &= !libc::S_ISGID;
        }
        mode
    }

    /// Creates something as the caller: `create` gets the mode for the host.
    ///
    /// A guest that applies umasks has done so already. One that leaves them to the daemon wants them applied only where
    /// the directory has no default ACL, which the host alone knows in time.
    pub fn create_as<T>(
        &self,
        session: &Session,
        ctx: &Context,
        mode: u32,
        umask: u32,
        create: impl FnOnce(Mode) -> Result<T>,
    ) -> Result<T> {
        let caller = Caller { effective: creating_capabilities(session, ctx.uid), ..self.host_caller(ctx)? };
        let mode = self.permitted_mode(ctx, &caller, mode);
        let _caller = credentials::become_caller(self.own, caller)?;
        if !session.leaves_umask {
            return create(Mode::from_raw_mode(mode & !umask));
        }
        let _umask = set_thread_umask(Mode::from_raw_mode(umask & 0o777))?;
        create(Mode::from_raw_mode(mode))
    }

    /// Acts as the caller without any capability until the guard is dropped: where the host's kernel decides what only
    /// an owner may do.
    pub fn become_user(&self, ctx: &Context) -> Result<CallerGuard> {
        credentials::become_caller(self.own, self.host_caller(ctx)?)
    }

    /// Acts as the caller until the guard is dropped.
    pub fn become_caller(&self, session: &Session, ctx: &Context) -> Result<CallerGuard> {
        let effective = creating_capabilities(session, ctx.uid);
        credentials::become_caller(self.own, Caller { effective, ..self.host_caller(ctx)? })
    }

    /// Makes the thread a member of `group` alone, if the daemon may do that.
    pub fn become_member(&self, group: HostGid) -> Option<GroupGuard> {
        credentials::become_member(self.own, group)
    }
}

/// The capabilities with which a caller creates something.
///
/// The guest's kernel has checked that the caller may create this, with all of the caller's groups and capabilities, of
/// which the request tells little: so the daemon's own apply. CAP_FSETID is not among them, since the guest's
/// kernel leaves it to the host to keep the set-group-ID bit of a new file from those who are not in its group, unless
/// it does that itself.
fn creating_capabilities(session: &Session, uid: GuestUid) -> CapabilitySet {
    if uid == ROOT {
        return CapabilitySet::all();
    }
    let mut capabilities = CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER | CapabilitySet::MKNOD;
    if session.keeps_group_bit {
        capabilities |= CapabilitySet::FSETID;
    }
    capabilities
}
