//! Acting as the caller, for the length of one system call.
//!
//! Only the calling thread changes: these are the raw system calls, which do not touch the
//! process's other threads as the C library's functions would. Ids are changed back when the guard
//! is dropped, on every path.
//!
//! CAP_FSETID alone stays as the last request needed it: it decides whether the host clears set-id bits of a file that
//! is changed, and to lower and raise it for each WRITE would cost four system calls. Every operation for which it
//! matters calls [`set_id_bits`] first.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{error, warn};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::fs::Result;
use crate::mapping::ids::{HostGid, HostUid};

thread_local! {
    /// The capabilities of this thread, once the kernel was asked. A thread inherits those of the thread that starts it,
    /// and from then on only this file changes them.
    static SETS: Cell<Option<CapabilitySets>> = const { Cell::new(None) };
}

/// The daemon's own ids, which every thread has between requests.
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

    /// The user that a request of `uid` acts as: the daemon's own where it cannot be another.
    ///
    /// A daemon that is not root cannot act as root: a thread that becomes root and changes back loses all capabilities
    /// (capabilities(7), "Effect of user ID changes").
    pub fn user_for(self, uid: HostUid, held: CapabilitySet) -> HostUid {
        let can = self.uid.is_root() || (uid.0 != 0 && held.contains(CapabilitySet::SETUID));
        if can { uid } else { HostUid(self.uid.as_raw()) }
    }

    /// The same for a group.
    pub fn group_for(self, gid: HostGid, held: CapabilitySet) -> HostGid {
        let can = self.uid.is_root() || (gid.0 != 0 && held.contains(CapabilitySet::SETGID));
        if can { gid } else { HostGid(self.gid.as_raw()) }
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
    /// Capabilities to act with, as far as the daemon has them.
    pub effective: CapabilitySet,
}

/// The thread has the caller's ids until this is dropped.
#[derive(Debug)]
#[must_use = "the ids are changed back when this is dropped"]
pub struct CallerGuard {
    own: OwnIds,
    uid_changed: bool,
    gid_changed: bool,
    groups_changed: bool,
}

/// Capabilities that the daemon may use.
pub fn permitted() -> Result<CapabilitySet> {
    sets().map(|sets| sets.permitted)
}

/// Gives the thread the caller's user, group and the one supplementary group that matters, with the caller's
/// capabilities.
pub fn become_caller(own: OwnIds, caller: Caller) -> Result<CallerGuard> {
    let (uid, gid) = (uid_of(caller.uid)?, gid_of(caller.gid)?);
    let group = caller.group.map(gid_of).transpose()?.filter(|group| *group != gid);
    let sets = sets()?;
    let mut guard = CallerGuard { own, uid_changed: false, gid_changed: false, groups_changed: false };
    if let Some(group) = group
        && sets.permitted.contains(CapabilitySet::SETGID)
    {
        // It decides on the set-group-id bit alone, which is cleared where the namespace knows no
        // such group or no setgroups(2).
        guard.groups_changed = set_thread_groups(&[group]).is_ok();
    }
    if gid != own.gid {
        let result = set_thread_res_gid(None::<Gid>, Some(gid), None::<Gid>);
        result.inspect_err(|errno| explain_unmapped(*errno, None, Some(caller.gid)))?;
        guard.gid_changed = true;
    }
    if uid != own.uid {
        let result = set_thread_res_uid(None::<Uid>, Some(uid), None::<Uid>);
        result.inspect_err(|errno| explain_unmapped(*errno, Some(caller.uid), None))?;
        guard.uid_changed = true;
        if own.uid.is_root() {
            note(CapabilitySets { effective: CapabilitySet::empty(), ..sets });
        }
    }
    make_effective(caller.effective)?;
    Ok(guard)
}

impl Drop for CallerGuard {
    fn drop(&mut self) {
        // The thread's real ids are always allowed. Should a change fail nevertheless, the thread must not serve another
        // caller.
        let mut result = Ok(());
        if self.uid_changed {
            result = result.and(set_thread_res_uid(None::<Uid>, Some(self.own.uid), None::<Uid>));
            if self.own.uid.is_root() {
                // The kernel has given the capabilities back with the user.
                result =
                    result.and(sets().map(|sets| note(CapabilitySets { effective: sets.permitted, ..sets })));
            }
        }
        result = result.and_then(|()| make_effective(CapabilitySet::all()));
        if self.gid_changed {
            result = result.and(set_thread_res_gid(None::<Gid>, Some(self.own.gid), None::<Gid>));
        }
        if self.groups_changed {
            result = result.and(set_thread_groups(&[]));
        }
        abort_unless(result);
    }
}

/// The thread has another group until this is dropped, but the user and capabilities of the daemon.
#[derive(Debug)]
#[must_use = "the group is changed back when this is dropped"]
pub struct GroupGuard(Gid);

/// Makes the thread a member of `gid` alone, if the daemon may do that.
pub fn become_member(own: OwnIds, gid: HostGid) -> Option<GroupGuard> {
    let gid = gid_of(gid).ok()?;
    let changed = gid != own.gid && set_thread_res_gid(None::<Gid>, Some(gid), None::<Gid>).is_ok();
    changed.then_some(GroupGuard(own.gid))
}

impl Drop for GroupGuard {
    fn drop(&mut self) {
        abort_unless(set_thread_res_gid(None::<Gid>, Some(self.0), None::<Gid>));
    }
}

/// What the host does to the set-id bits of a file that a request changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetIdBits {
    /// It keeps them, as for a process with CAP_FSETID.
    Keep,
    /// It clears them, as for a process without.
    Clear,
}

/// Raises or lowers CAP_FSETID of the thread; does nothing if it is so already.
///
/// It stays until this is called again.
pub fn set_id_bits(bits: SetIdBits) -> Result<()> {
    let effective = sets()?.effective;
    make_effective(match bits {
        SetIdBits::Keep => effective | CapabilitySet::FSETID,
        SetIdBits::Clear => effective - CapabilitySet::FSETID,
    })
}

/// Logs once how to map an id that the daemon's user namespace does not have, for which the host's kernel returns
/// EINVAL.
pub fn explain_unmapped(errno: Errno, uid: Option<HostUid>, gid: Option<HostGid>) {
    // The user namespace is the process's, so one message does for all shares.
    static LOGGED: AtomicBool = AtomicBool::new(false);
    if errno != Errno::INVAL || LOGGED.swap(true, Ordering::Relaxed) {
        return;
    }
    let uid = uid.map(|uid| format!("user {} (see --uid-map)", uid.0));
    let gid = gid.map(|gid| format!("group {} (see --gid-map)", gid.0));
    let ids: Vec<String> = uid.into_iter().chain(gid).collect();
    warn!(
        "the daemon's user namespace has no {}: a request that named it was refused. Map it, or give it another \
         number with --translate-uid and --translate-gid. Further ids are refused without a message",
        ids.join(", or no ")
    );
}

/// A user, as system calls take one; EINVAL for the id that system calls take for "unchanged".
pub fn uid_of(uid: HostUid) -> Result<Uid> {
    if uid.0 == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(uid.0)) }
}

/// A group, as system calls take one; EINVAL for the id that system calls take for "unchanged".
pub fn gid_of(gid: HostGid) -> Result<Gid> {
    if gid.0 == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(gid.0)) }
}

/// The thread's capabilities, which the kernel is asked for once.
fn sets() -> Result<CapabilitySets> {
    match SETS.get() {
        Some(sets) => Ok(sets),
        None => capabilities(None).inspect(|sets| note(*sets)),
    }
}

fn note(sets: CapabilitySets) {
    SETS.set(Some(sets));
}

/// Makes `wanted` the effective capabilities, as far as they are permitted.
fn make_effective(wanted: CapabilitySet) -> Result<()> {
    let sets = sets()?;
    let new = CapabilitySets { effective: wanted & sets.permitted, ..sets };
    if new != sets {
        set_capabilities(None, new)?;
        note(new);
    }
    Ok(())
}

/// A thread that cannot change a caller's ids back must not serve another caller.
fn abort_unless(result: Result<()>) {
    if let Err(errno) = result {
        error!("a worker cannot change a caller's ids back ({errno}); the daemon ends");
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The remembered capabilities have to be those of the kernel after each step.
    #[test]
    fn remembered_capabilities_are_those_of_the_kernel() {
        let own = OwnIds::current();
        if !own.uid.is_root() {
            return;
        }
        let check = |step: &str| {
            let (kernel, known) = (capabilities(None).unwrap(), sets().unwrap());
            assert_eq!((kernel.effective, kernel.permitted), (known.effective, known.permitted), "{step}");
            kernel.effective
        };
        let begin = check("at the beginning");
        let user = |uid, effective| Caller { uid: HostUid(uid), gid: HostGid(5), group: None, effective };
        for bits in [SetIdBits::Clear, SetIdBits::Keep, SetIdBits::Clear] {
            for uid in [0, 1000] {
                for effective in [CapabilitySet::DAC_OVERRIDE, CapabilitySet::all(), CapabilitySet::empty()] {
                    set_id_bits(bits).unwrap();
                    let has = check("with or without CAP_FSETID").contains(CapabilitySet::FSETID);
                    assert_eq!(has, bits == SetIdBits::Keep && begin.contains(CapabilitySet::FSETID));
                    let guard = become_caller(own, user(uid, effective)).unwrap();
                    assert_eq!(check("as a caller"), effective & begin);
                    drop(guard);
                    assert_eq!(check("after the call"), begin);
                }
            }
        }
        // A thread that is started by one without the capability begins without it.
        set_id_bits(SetIdBits::Clear).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                check("in a new thread");
                set_id_bits(SetIdBits::Keep).unwrap();
                check("in a new thread that took it");
            });
        });
    }

    #[test]
    fn only_a_daemon_of_root_acts_as_root() {
        let own = |uid| OwnIds { uid: Uid::from_raw(uid), gid: Gid::from_raw(uid) };
        let (all, none) = (CapabilitySet::all(), CapabilitySet::empty());
        for (daemon, caller, held, acts) in [
            (0, 0, all, 0),
            (0, 1000, all, 1000),
            (0, 1000, none, 1000),
            (7, 0, all, 7),
            (7, 0, none, 7),
            (7, 1000, all, 1000),
            (7, 1000, none, 7),
            (7, 7, none, 7),
        ] {
            assert_eq!(own(daemon).user_for(HostUid(caller), held), HostUid(acts), "{daemon} {caller}");
            assert_eq!(own(daemon).group_for(HostGid(caller), held), HostGid(acts), "{daemon} {caller}");
        }
    }
}
