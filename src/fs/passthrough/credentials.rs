//! Acting as the caller, for the length of one system call.
//!
//! Only the calling thread changes: these are the raw system calls, which do not touch the
//! process's other threads as the C library's functions would. What was changed is changed back
//! when the guard is dropped, on every path.

use log::error;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::fs::Result;
use crate::mapping::ids::{HostGid, HostUid};

/// The daemon's own ids, which every thread has while it serves nobody.
#[derive(Clone, Copy, Debug)]
pub struct OwnIds {
    uid: Uid,
    gid: Gid,
}

impl OwnIds {
    /// Those of the process.
    pub fn current() -> OwnIds {
        OwnIds { uid: rustix::process::geteuid(), gid: rustix::process::getegid() }
    }
}

/// A caller in the host's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: HostUid,
    /// Group.
    pub gid: HostGid,
    /// The one supplementary group that matters.
    pub group: Option<HostGid>,
}

/// The thread has the caller's ids until this is dropped.
#[derive(Debug)]
#[must_use = "the ids are taken off again when this is dropped"]
pub struct CallerGuard {
    own: OwnIds,
    uid_changed: bool,
    gid_changed: bool,
    groups_changed: bool,
}

/// Puts the caller's user, group and the one supplementary group that matters on the thread.
///
/// The guest has already checked the caller's permissions. With `keep_override` a daemon that had
/// CAP_DAC_OVERRIDE keeps it, where the host would refuse what the guest's kernel rightly allowed.
pub fn become_caller(own: OwnIds, caller: Caller, keep_override: bool) -> Result<CallerGuard> {
    let (uid, gid) = (uid_of(caller.uid)?, gid_of(caller.gid)?);
    let mut guard = CallerGuard { own, uid_changed: false, gid_changed: false, groups_changed: false };
    let group = caller.group.map(gid_of).transpose()?.filter(|group| *group != gid);
    if let Some(group) = group
        && uid != own.uid
    {
        set_thread_groups(&[group])?;
        guard.groups_changed = true;
    }
    if gid != own.gid {
        set_thread_res_gid(None::<Gid>, Some(gid), None::<Gid>)?;
        guard.gid_changed = true;
    }
    if uid != own.uid {
        let could_override =
            keep_override && capabilities(None)?.effective.contains(CapabilitySet::DAC_OVERRIDE);
        set_thread_res_uid(None::<Uid>, Some(uid), None::<Uid>)?;
        guard.uid_changed = true;
        if could_override {
            raise(CapabilitySet::DAC_OVERRIDE)?;
        }
    }
    Ok(guard)
}

impl Drop for CallerGuard {
    fn drop(&mut self) {
        // Back to an id that the thread has as its real one is always allowed; with the user, the
        // kernel gives the capabilities back. Should it fail all the same, the thread must not
        // serve anybody else.
        let mut result = Ok(());
        if self.uid_changed {
            result = result.and(set_thread_res_uid(None::<Uid>, Some(self.own.uid), None::<Uid>));
        }
        if self.gid_changed {
            result = result.and(set_thread_res_gid(None::<Gid>, Some(self.own.gid), None::<Gid>));
        }
        if self.groups_changed {
            result = result.and(set_thread_groups(&[]));
        }
        if let Err(errno) = result {
            error!("a worker cannot take a caller's ids off again ({errno}); the daemon ends");
            std::process::abort();
        }
    }
}

/// The thread lacks CAP_FSETID until this is dropped, so that the host clears set-id bits on write
/// and truncate as it does for an unprivileged caller.
#[derive(Debug)]
#[must_use = "the capability comes back when this is dropped"]
pub struct NoFsetid(bool);

/// Drops CAP_FSETID from the thread, if it has it.
pub fn without_fsetid() -> Result<NoFsetid> {
    let mut sets = capabilities(None)?;
    let had = sets.effective.contains(CapabilitySet::FSETID);
    if had {
        sets.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, sets)?;
    }
    Ok(NoFsetid(had))
}

impl Drop for NoFsetid {
    fn drop(&mut self) {
        if self.0
            && let Err(errno) = raise(CapabilitySet::FSETID)
        {
            error!("a worker cannot take CAP_FSETID back ({errno}); set-id bits may be lost");
        }
    }
}

/// A user, as system calls take one; EINVAL for the id that system calls take for "unchanged".
pub fn uid_of(uid: HostUid) -> Result<Uid> {
    if uid.0 == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(uid.0)) }
}

/// A group, as system calls take one; EINVAL for the id that system calls take for "unchanged".
pub fn gid_of(gid: HostGid) -> Result<Gid> {
    if gid.0 == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(gid.0)) }
}

/// Adds a permitted capability to the effective ones.
fn raise(capability: CapabilitySet) -> std::result::Result<(), Errno> {
    let mut sets = capabilities(None)?;
    sets.effective.insert(capability);
    set_capabilities(None, sets)
}
