//! All that the file system holds: nodes, handles, and how much room is left.

use std::collections::{BTreeMap, HashMap, HashSet};

use fuse_protocol::ids::{HandleId, NodeId, Unique};
use lanefsd::fs::Result;
use rustix::io::Errno;

use crate::node::{Content, Node};

/// Most nodes.
const MAX_NODES: usize = 4096;
/// Most open handles.
const MAX_HANDLES: usize = 1024;

/// All that the file system holds.
#[derive(Debug)]
pub struct State {
    pub nodes: HashMap<NodeId, Node>,
    pub handles: HashMap<HandleId, Handle>,
    /// Bytes of data in all files.
    pub used: usize,
    pub capacity: usize,
    /// Waits for locks that are to end.
    pub interrupted: HashSet<Unique>,
    /// Waits for locks.
    pub waiting: HashSet<Unique>,
    /// Grows with each call that ends all waits.
    pub stops: u64,
    next_node: u64,
    next_handle: u64,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Handle {
    pub node: NodeId,
    pub directory: bool,
    pub readable: bool,
    pub writable: bool,
    pub append: bool,
}

impl State {
    /// A root directory and nothing else.
    pub fn new(capacity: usize) -> State {
        let root = Content::Directory { entries: BTreeMap::new(), parent: NodeId::ROOT };
        let mut root = Node::new(root, 0o755, (0, 0));
        root.links = 1;
        State {
            nodes: HashMap::from([(NodeId::ROOT, root)]),
            handles: HashMap::new(),
            used: 0,
            capacity,
            interrupted: HashSet::new(),
            waiting: HashSet::new(),
            stops: 0,
            next_node: NodeId::ROOT.0 + 1,
            next_handle: 1,
        }
    }

    /// A node that the guest knows; ESTALE for any other.
    pub fn node(&self, id: NodeId) -> Result<&Node> {
        let known = |node: &&Node| id == NodeId::ROOT || node.lookups > 0;
        self.nodes.get(&id).filter(known).ok_or(Errno::STALE)
    }

    /// The same, to be changed.
    pub fn node_mut(&mut self, id: NodeId) -> Result<&mut Node> {
        let known = |node: &&mut Node| id == NodeId::ROOT || node.lookups > 0;
        self.nodes.get_mut(&id).filter(known).ok_or(Errno::STALE)
    }

    /// The open file or directory behind `handle`; EBADF if it is not one of `node`.
    pub fn handle(&self, node: NodeId, handle: HandleId, directory: bool) -> Result<Handle> {
        let found = self.handles.get(&handle).filter(|h| h.node == node && h.directory == directory);
        found.copied().ok_or(Errno::BADF)
    }

    /// Takes in a node that has no name yet.
    pub fn add(&mut self, node: Node) -> Result<NodeId> {
        if self.nodes.len() >= MAX_NODES {
            return Err(Errno::NOSPC);
        }
        let id = NodeId(self.next_node);
        self.next_node += 1;
        self.nodes.insert(id, node);
        Ok(id)
    }

    /// Opens `handle`; ENFILE if there are too many.
    pub fn open(&mut self, handle: Handle) -> Result<HandleId> {
        if self.handles.len() >= MAX_HANDLES {
            return Err(Errno::NFILE);
        }
        self.node_mut(handle.node)?.opens += 1;
        let id = HandleId(self.next_handle);
        self.next_handle += 1;
        self.handles.insert(id, handle);
        Ok(id)
    }

    /// Closes `handle`.
    pub fn close(&mut self, node: NodeId, handle: HandleId, directory: bool) -> Result<()> {
        self.handle(node, handle, directory)?;
        self.handles.remove(&handle);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.opens = node.opens.saturating_sub(1);
            node.locks.drop_flock(handle);
        }
        self.tidy(node);
        Ok(())
    }

    /// Takes `count` lookups off a node; more than there are is as many as there are.
    pub fn forget(&mut self, id: NodeId, count: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.tidy(id);
    }

    /// Drops a node that has no name and that nobody holds.
    pub fn tidy(&mut self, id: NodeId) {
        let held = |node: &Node| node.links > 0 || node.lookups > 0 || node.opens > 0;
        if self.nodes.get(&id).is_some_and(|node| !held(node))
            && let Some(node) = self.nodes.remove(&id)
            && let Content::File(data) = node.content
        {
            self.used -= data.len();
        }
    }

    /// Drops all that the session holds.
    pub fn end_session(&mut self) {
        self.handles.clear();
        for node in self.nodes.values_mut() {
            node.opens = 0;
            node.lookups = 0;
            node.locks = Default::default();
        }
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        ids.into_iter().for_each(|id| self.tidy(id));
    }
}
