//! Replies: typed values to bytes.
//!
//! A reply is a header and, without an error, a body. Each kind of body is a type with [`ReplyBody`].

mod body;
mod directory;

use alloc::vec::Vec;
use core::time::Duration;

use zerocopy::IntoBytes;

pub use self::body::{Block, Copied, Events, Offset, ReplyBody, Written};
pub use self::directory::{DirectoryEntry, DirectoryWriter, Full};
use crate::abi;
use crate::errno::Errno;
use crate::flags::OpenReplyFlags;
use crate::ids::{HandleId, NodeId, Unique};

/// Bytes of the header in front of every reply.
pub const OUT_HEADER_SIZE: usize = size_of::<abi::OutHeader>();

/// An inode that a guest may use from now on, with its attributes.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its id.
    pub node: NodeId,
    /// Tells apart inodes that had the same id at different times.
    pub generation: u64,
    /// How long the guest may believe the name.
    pub entry_valid: Duration,
    /// The attributes and how long the guest may believe them.
    pub attributes: Attributes,
}

/// Attributes and how long the guest may believe them.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// The attributes.
    pub attr: abi::Attr,
    /// How long the guest may believe them.
    pub valid: Duration,
}

/// Attributes in the form of statx(2), and how long the guest may believe them.
#[derive(Clone, Copy, Debug)]
pub struct StatxReply {
    /// The attributes.
    pub statx: abi::Statx,
    /// How long the guest may believe them.
    pub valid: Duration,
}

impl Entry {
    /// The reply's body.
    pub fn to_wire(&self) -> abi::EntryOut {
        abi::EntryOut {
            nodeid: self.node.0,
            generation: self.generation,
            entry_valid: self.entry_valid.as_secs(),
            attr_valid: self.attributes.valid.as_secs(),
            entry_valid_nsec: self.entry_valid.subsec_nanos(),
            attr_valid_nsec: self.attributes.valid.subsec_nanos(),
            attr: self.attributes.attr,
        }
    }
}

impl Attributes {
    /// The reply's body.
    pub fn to_wire(&self) -> abi::AttrOut {
        abi::AttrOut {
            attr_valid: self.valid.as_secs(),
            attr_valid_nsec: self.valid.subsec_nanos(),
            dummy: 0,
            attr: self.attr,
        }
    }
}

impl StatxReply {
    /// The reply's body.
    pub fn to_wire(&self) -> abi::StatxOut {
        abi::StatxOut {
            attr_valid: self.valid.as_secs(),
            attr_valid_nsec: self.valid.subsec_nanos(),
            flags: 0,
            spare: [0; 2],
            stat: self.statx,
        }
    }
}

/// A file or directory that was opened: its handle and how the guest is to treat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The new handle.
    pub handle: HandleId,
    /// Flags of the reply.
    pub flags: OpenReplyFlags,
}

impl Opened {
    /// The reply's body.
    pub fn to_wire(&self) -> abi::OpenOut {
        abi::OpenOut { fh: self.handle.0, open_flags: self.flags.bits(), backing_id: 0 }
    }
}

/// An answer to GETXATTR or LISTXATTR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// The caller only asked how many bytes there are.
    Size(u32),
    /// The bytes.
    Data(Vec<u8>),
}

/// The header of a reply to request `unique` whose body has `body` bytes, or that reports an error.
pub fn header(unique: Unique, result: Result<usize, Errno>) -> abi::OutHeader {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw(), 0),
    };
    let len = u32::try_from(OUT_HEADER_SIZE.saturating_add(body)).unwrap_or(u32::MAX);
    abi::OutHeader { len, error, unique: unique.0 }
}

/// The whole reply to request `unique`.
pub fn encode<T: ReplyBody>(unique: Unique, result: Result<&T, Errno>) -> Vec<u8> {
    match result {
        Ok(body) => body.with_bytes(|pieces| {
            let len = pieces.iter().map(|piece| piece.len()).sum();
            let mut reply = header(unique, Ok(len)).as_bytes().to_vec();
            pieces.iter().for_each(|piece| reply.extend_from_slice(piece));
            reply
        }),
        Err(errno) => header(unique, Err(errno)).as_bytes().to_vec(),
    }
}
