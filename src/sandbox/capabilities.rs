//! Capabilities: drops those that are not required, in all sets.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
    capability_is_in_bounding_set, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
};
use thiserror::Error;

use super::config::CapabilityChanges;

/// To read any file: permissions are checked by the guest's kernel. FOWNER allows O_NOATIME.
const TO_READ: CapabilitySet = CapabilitySet::DAC_READ_SEARCH.union(CapabilitySet::FOWNER);
/// To make files that belong to the guest's users, and to keep set-id bits where POSIX does.
const TO_CHANGE: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD);

/// Why the capabilities cannot be dropped.
#[derive(Debug, Error)]
pub enum CapabilityError {
    /// --modcaps names a capability that the process was not started with.
    #[error(
        "--modcaps adds {0}, which the daemon was not started with; leave it out, or start the daemon with it"
    )]
    NotHeld(String),
    /// Requests would be carried out with the daemon's capabilities in place of their callers'.
    #[error(
        "the daemon was started with the securebit no_setuid_fixup and may not clear it, so it would keep its capabilities while it acts as a user of the guest; start it without that bit, or with --modcaps=-setuid"
    )]
    NoSetuidFixup,
    /// A system call failed.
    #[error("cannot drop capabilities: {step} failed")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the system call said.
        source: Errno,
    },
}

/// The options that decide which capabilities serving requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequiredCaps {
    /// Nothing is changed.
    pub readonly: bool,
    /// Extended attributes are served, file capabilities among them.
    pub xattr: bool,
    /// Inodes may be held by file handles.
    pub file_handles: bool,
}

impl RequiredCaps {
    fn capabilities(self) -> CapabilitySet {
        let mut needed = if self.readonly { TO_READ } else { TO_CHANGE };
        if !self.readonly && self.xattr {
            needed |= CapabilitySet::SETFCAP;
        }
        if self.file_handles {
            needed |= CapabilitySet::DAC_READ_SEARCH;
        }
        needed
    }
}

/// Drops all capabilities but those that are `required` and those that `changes` adds, in every set, and the
/// ways to get others. No capability is gained.
///
/// It affects the calling thread and the threads that it starts later, so there must be no others.
pub fn give_up(required: RequiredCaps, changes: CapabilityChanges) -> Result<(), CapabilityError> {
    let held = capabilities(None).map_err(step("capget(2)"))?;
    let missing = changes.add - held.permitted;
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect();
        return Err(CapabilityError::NotHeld(names.join(" and ")));
    }
    let kept = held.permitted & ((required.capabilities() | changes.add) - changes.drop);
    let follow = capabilities_follow_the_user_id(held.effective.contains(CapabilitySet::SETPCAP))?;
    if !follow && kept.contains(CapabilitySet::SETUID) {
        return Err(CapabilityError::NoSetuidFixup);
    }
    set_no_new_privs(true).map_err(step("PR_SET_NO_NEW_PRIVS"))?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept)?;
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(step("capset(2)"))?;
    clear_ambient_capability_set().map_err(step("clearing the ambient set"))
}

/// Drops all capabilities of a process that serves no request.
pub(super) fn give_up_all() -> Result<(), CapabilityError> {
    let held = capabilities(None).map_err(step("capget(2)"))?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(CapabilitySet::empty())?;
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(step("capset(2)"))
}

/// Does something with the rights of the calling thread's user alone.
pub fn without_capabilities<T>(act: impl FnOnce() -> T) -> Result<T, Errno> {
    let held = capabilities(None)?;
    set_capabilities(None, CapabilitySets { effective: CapabilitySet::empty(), ..held })?;
    let result = act();
    set_capabilities(None, held)?;
    Ok(result)
}

/// Drops all capabilities of a process that starts servers, but those that servers may require and `more`. The ways to get
/// others that may be shut without harm to a server are shut.
pub(super) fn keep_for_workers(more: CapabilitySet) -> Result<(), CapabilityError> {
    let held = capabilities(None).map_err(step("capget(2)"))?;
    let served = TO_CHANGE | CapabilitySet::DAC_READ_SEARCH | CapabilitySet::SETFCAP;
    let kept = held.permitted & (served | more);
    if held.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept)?;
    }
    let sets = CapabilitySets {
        effective: held.effective & kept,
        permitted: kept,
        inheritable: held.inheritable & kept,
    };
    set_capabilities(None, sets).map_err(step("capset(2)"))
}

/// Lets the process keep its capabilities when it executes another program, as nobody but root does otherwise: the user
/// who has made a user namespace has all capabilities in it, until then.
pub fn make_ambient() -> Result<(), CapabilityError> {
    let held = capabilities(None).map_err(step("capget(2)"))?;
    let sets = CapabilitySets { inheritable: held.permitted, ..held };
    set_capabilities(None, sets).map_err(step("capset(2)"))?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if held.permitted.contains(capability) {
            configure_capability_in_ambient_set(capability, true).map_err(step("PR_CAP_AMBIENT_RAISE"))?;
        }
    }
    Ok(())
}

/// The reverse.
pub fn clear_ambient() -> Result<(), CapabilityError> {
    clear_ambient_capability_set().map_err(step("clearing the ambient set"))?;
    let held = capabilities(None).map_err(step("capget(2)"))?;
    let sets = CapabilitySets { inheritable: CapabilitySet::empty(), ..held };
    set_capabilities(None, sets).map_err(step("capset(2)"))
}

/// Whether the kernel changes the effective capabilities along with the user id, as workers that act as a user of the
/// guest count on. A launcher may have switched that off, which survives execve(2); it is switched on again with
/// CAP_SETPCAP, if `may_change`.
fn capabilities_follow_the_user_id(may_change: bool) -> Result<bool, CapabilityError> {
    let off = CapabilitiesSecureBits::NO_SETUID_FIXUP;
    let bits = capabilities_secure_bits().map_err(step("PR_GET_SECUREBITS"))?;
    // A bit that is locked cannot be cleared.
    Ok(!bits.contains(off) || may_change && set_capabilities_secure_bits(bits - off).is_ok())
}

/// Takes all but `kept` off the bounding set, also capabilities that have no name here yet.
fn shrink_bounding_set(kept: CapabilitySet) -> Result<(), CapabilityError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            // The kernel knows no more.
            Err(Errno::INVAL) => break,
            Err(source) => return Err(step("PR_CAPBSET_READ")(source)),
            Ok(true) if !kept.contains(capability) => {
                remove_capability_from_bounding_set(capability).map_err(step("PR_CAPBSET_DROP"))?;
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

fn step(step: &'static str) -> impl Fn(Errno) -> CapabilityError {
    move |source| CapabilityError::Step { step, source }
}
