//! Notifications: messages that a server sends without a request.
//!
//! They travel like replies, with a unique of 0 and a code in place of an error. virtio-fs has no queue for
//! them so far; servers of other transports send them.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use crate::abi;
use crate::flags::InvalEntryFlags;
use crate::ids::{NodeId, Unique};
use crate::name::Name;
use crate::reply::OUT_HEADER_SIZE;

/// A notification.
#[derive(Clone, Copy, Debug)]
pub enum Notification<'a> {
    /// The state that a POLL waits for has changed.
    Poll {
        /// The guest's number for the waiter.
        waiter: u64,
    },
    /// Cached attributes and data of an inode are out of date.
    InvalInode {
        /// The inode.
        node: NodeId,
        /// First byte; less than 0 for the attributes alone.
        offset: i64,
        /// Bytes; 0 or less for all that follow.
        length: i64,
    },
    /// A cached name is out of date.
    InvalEntry {
        /// The directory.
        parent: NodeId,
        /// The entry.
        name: Name<'a>,
        /// How to drop it.
        flags: InvalEntryFlags,
    },
    /// Data for the guest's page cache.
    Store {
        /// The inode.
        node: NodeId,
        /// First byte.
        offset: u64,
        /// The data.
        data: &'a [u8],
    },
    /// Asks the guest for the data in its page cache.
    Retrieve {
        /// The unique of the NOTIFY_REPLY.
        unique: Unique,
        /// The inode.
        node: NodeId,
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u32,
    },
    /// A file was deleted.
    Delete {
        /// The directory.
        parent: NodeId,
        /// The inode that lost its name.
        child: NodeId,
        /// The entry.
        name: Name<'a>,
    },
    /// Asks the guest to send all requests again that have no reply.
    Resend,
    /// All cached names are out of date.
    IncEpoch,
    /// Asks the guest to forget unused inodes.
    Prune {
        /// The inodes.
        nodes: &'a [NodeId],
    },
}

impl Notification<'_> {
    /// Names in `linux/fuse.h` (`enum fuse_notify_code`) with their codes.
    pub const CODES: &'static [(&'static str, i32)] = &[
        ("FUSE_NOTIFY_POLL", 1),
        ("FUSE_NOTIFY_INVAL_INODE", 2),
        ("FUSE_NOTIFY_INVAL_ENTRY", 3),
        ("FUSE_NOTIFY_STORE", 4),
        ("FUSE_NOTIFY_RETRIEVE", 5),
        ("FUSE_NOTIFY_DELETE", 6),
        ("FUSE_NOTIFY_RESEND", 7),
        ("FUSE_NOTIFY_INC_EPOCH", 8),
        ("FUSE_NOTIFY_PRUNE", 9),
    ];

    /// The code in the header.
    pub fn code(&self) -> i32 {
        match self {
            Notification::Poll { .. } => 1,
            Notification::InvalInode { .. } => 2,
            Notification::InvalEntry { .. } => 3,
            Notification::Store { .. } => 4,
            Notification::Retrieve { .. } => 5,
            Notification::Delete { .. } => 6,
            Notification::Resend => 7,
            Notification::IncEpoch => 8,
            Notification::Prune { .. } => 9,
        }
    }

    /// The whole message; `None` if it is longer than the protocol can say.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        self.encode_body(&mut body)?;
        let len = u32::try_from(OUT_HEADER_SIZE.checked_add(body.len())?).ok()?;
        let mut message = abi::OutHeader { len, error: self.code(), unique: 0 }.as_bytes().to_vec();
        message.append(&mut body);
        Some(message)
    }

    fn encode_body(&self, body: &mut Vec<u8>) -> Option<()> {
        let mut put = |bytes: &[u8]| body.extend_from_slice(bytes);
        match *self {
            Notification::Poll { waiter } => put(abi::NotifyPollWakeupOut { kh: waiter }.as_bytes()),
            Notification::InvalInode { node, offset: off, length: len } => {
                put(abi::NotifyInvalInodeOut { ino: node.0, off, len }.as_bytes());
            }
            Notification::InvalEntry { parent, name, flags } => {
                let namelen = u32::try_from(name.as_c_str().count_bytes()).ok()?;
                put(abi::NotifyInvalEntryOut { parent: parent.0, namelen, flags: flags.bits() }.as_bytes());
                put(name.as_c_str().to_bytes_with_nul());
            }
            Notification::Store { node, offset, data } => {
                let size = u32::try_from(data.len()).ok()?;
                put(abi::NotifyStoreOut { nodeid: node.0, offset, size, padding: 0 }.as_bytes());
                put(data);
            }
            Notification::Retrieve { unique, node, offset, size } => {
                let (notify_unique, nodeid) = (unique.0, node.0);
                put(abi::NotifyRetrieveOut { notify_unique, nodeid, offset, size, padding: 0 }.as_bytes());
            }
            Notification::Delete { parent, child, name } => {
                let namelen = u32::try_from(name.as_c_str().count_bytes()).ok()?;
                let (parent, child) = (parent.0, child.0);
                put(abi::NotifyDeleteOut { parent, child, namelen, padding: 0 }.as_bytes());
                put(name.as_c_str().to_bytes_with_nul());
            }
            Notification::Resend | Notification::IncEpoch => {}
            Notification::Prune { nodes } => {
                let count = u32::try_from(nodes.len()).ok()?;
                put(abi::NotifyPruneOut { count, padding: 0, spare: 0 }.as_bytes());
                nodes.iter().for_each(|node| put(node.0.as_bytes()));
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_notification_has_its_code_and_length() {
        let name = Name::new(c"entry").unwrap();
        let node = NodeId(7);
        let flags = InvalEntryFlags::empty();
        for (notification, body) in [
            (Notification::Poll { waiter: 1 }, 8),
            (Notification::InvalInode { node, offset: -1, length: 0 }, 24),
            (Notification::InvalEntry { parent: node, name, flags }, 16 + 6),
            (Notification::Store { node, offset: 0, data: b"data" }, 24 + 4),
            (Notification::Retrieve { unique: Unique(1), node, offset: 0, size: 9 }, 32),
            (Notification::Delete { parent: node, child: node, name }, 24 + 6),
            (Notification::Resend, 0),
            (Notification::IncEpoch, 0),
            (Notification::Prune { nodes: &[node, NodeId::ROOT] }, 16 + 16),
        ] {
            let message = notification.encode().unwrap();
            assert_eq!(message.len(), OUT_HEADER_SIZE + body, "{notification:?}");
            assert_eq!(message[..4], u32::try_from(message.len()).unwrap().to_le_bytes());
            assert_eq!(message[4..8], notification.code().to_le_bytes());
            assert!(Notification::CODES.iter().any(|(_, code)| *code == notification.code()));
        }
    }
}
