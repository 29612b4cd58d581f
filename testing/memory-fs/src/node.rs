//! An inode: its attributes and what it holds.

use std::collections::BTreeMap;
use std::time::Duration;

use fuse_protocol::abi;
use fuse_protocol::ids::NodeId;
use fuse_protocol::reply::{Attributes, Entry};

use crate::locks::Locks;

/// How long guests may believe attributes and names.
const VALID: Duration = Duration::from_secs(1);

/// What an inode holds.
#[derive(Debug)]
pub enum Content {
    /// A regular file's data.
    File(Vec<u8>),
    /// A directory's entries. The root is its own parent.
    Directory { entries: BTreeMap<Vec<u8>, NodeId>, parent: NodeId },
    /// A symbolic link's target.
    Link(Vec<u8>),
    /// A device node, FIFO or socket.
    Special,
}

/// An inode.
#[derive(Debug)]
pub struct Node {
    pub content: Content,
    /// Type and permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Names in directories, and for a directory its own.
    pub links: u32,
    /// Access and modification time, in seconds and nanoseconds.
    pub times: [(i64, u32); 2],
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub locks: Locks,
    /// What the guest was told of and has not forgotten.
    pub lookups: u64,
    /// Open handles.
    pub opens: u32,
}

impl Node {
    /// A node without names.
    pub fn new(content: Content, mode: u32, (uid, gid): (u32, u32)) -> Node {
        let kind = match &content {
            Content::File(_) => libc::S_IFREG,
            Content::Directory { .. } => libc::S_IFDIR,
            Content::Link(_) => libc::S_IFLNK,
            Content::Special => mode & libc::S_IFMT,
        };
        Node {
            content,
            mode: kind | (mode & 0o7777),
            uid,
            gid,
            rdev: 0,
            links: 0,
            times: [(0, 0); 2],
            xattrs: BTreeMap::new(),
            locks: Locks::default(),
            lookups: 0,
            opens: 0,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory { .. })
    }

    /// `DT_*` of readdir(3).
    pub fn kind(&self) -> u32 {
        (self.mode & libc::S_IFMT) >> 12
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        match &self.content {
            Content::File(bytes) | Content::Link(bytes) => bytes.len(),
            Content::Directory { entries, .. } => entries.len(),
            Content::Special => 0,
        }
    }

    /// What the guest sees of it.
    pub fn attributes(&self, id: NodeId) -> Attributes {
        let size = self.size() as u64;
        let [(atime, atimensec), (mtime, mtimensec)] = self.times;
        let attr = abi::Attr {
            ino: id.0,
            size,
            blocks: size.div_ceil(512),
            atime: atime.cast_unsigned(),
            mtime: mtime.cast_unsigned(),
            ctime: mtime.cast_unsigned(),
            atimensec,
            mtimensec,
            ctimensec: mtimensec,
            mode: self.mode,
            nlink: self.links,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            blksize: 4096,
            flags: 0,
        };
        Attributes { attr, valid: VALID }
    }

    /// An entry that names it.
    pub fn entry(&self, id: NodeId) -> Entry {
        Entry { node: id, generation: 0, entry_valid: VALID, attributes: self.attributes(id) }
    }
}
