//! Options of the sandbox.

use rustix::thread::CapabilitySet;

/// Ways to confine the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// Own mount, PID and network namespaces, with no mount but the share.
    Namespace,
    /// chroot(2) into an empty directory; needs root.
    Chroot,
    /// No sandbox, only name validation.
    None,
}

/// The ids of a user namespace; without any it has only the daemon's own, unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// Users.
    pub users: Vec<IdRange>,
    /// Groups.
    pub groups: Vec<IdRange>,
}

impl IdMaps {
    /// Whether no id map was given.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }
}

/// A range of ids of a user namespace, mapped to as many ids outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first inside.
    pub inside: u32,
    /// The first outside.
    pub outside: u32,
    /// How many, at least 1.
    pub count: u32,
}

/// Action on a system call outside the allow list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seccomp {
    /// Allow: no filter is installed.
    None,
    /// Kill the daemon.
    Kill,
    /// Allow, and record it in the kernel's log.
    Log,
    /// Raise SIGSYS, which a debugger can catch.
    Trap,
}

/// Changes to the capabilities that the daemon keeps while it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityChanges {
    /// Kept besides those that the other options require.
    pub add: CapabilitySet,
    /// Dropped nevertheless.
    pub drop: CapabilitySet,
}

impl CapabilityChanges {
    /// None.
    pub const NONE: CapabilityChanges =
        CapabilityChanges { add: CapabilitySet::empty(), drop: CapabilitySet::empty() };
}
