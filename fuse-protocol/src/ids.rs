//! Numbers that name something, each a type of its own so that none is mistaken for another.

use crate::abi;

/// Names an inode in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root, which needs no LOOKUP.
    pub const ROOT: NodeId = NodeId(abi::ROOT_ID);
}

/// Names an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// The guest's opaque name for whoever holds a POSIX lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner(pub u64);

/// The guest's number for a request; INTERRUPT refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unique(pub u64);

/// A user id in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestUid(pub u32);

/// A group id in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestGid(pub u32);
