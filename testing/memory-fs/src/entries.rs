//! Names in directories.

use std::collections::BTreeMap;

use fuse_protocol::ids::NodeId;
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::{DirectoryEntry, DirectoryWriter, Entry};
use fuse_protocol::request::Rename;
use lanefsd::fs::Result;
use rustix::io::Errno;

use crate::node::{Content, Node};
use crate::state::State;

/// Most names of one node.
const MAX_LINKS: u32 = 1000;

type Entries = BTreeMap<Vec<u8>, NodeId>;

fn bytes(name: Name<'_>) -> Vec<u8> {
    name.as_c_str().to_bytes().to_vec()
}

impl State {
    fn entries(&self, directory: NodeId) -> Result<(&Entries, NodeId)> {
        match &self.node(directory)?.content {
            Content::Directory { entries, parent } => Ok((entries, *parent)),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn entries_mut(&mut self, directory: NodeId) -> Result<&mut Entries> {
        match &mut self.node_mut(directory)?.content {
            Content::Directory { entries, .. } => Ok(entries),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// The node behind a name.
    pub fn find(&self, parent: NodeId, name: Name<'_>) -> Result<NodeId> {
        let (entries, _) = self.entries(parent)?;
        entries.get(name.as_c_str().to_bytes()).copied().ok_or(Errno::NOENT)
    }

    /// Tells the guest of a node.
    pub fn tell(&mut self, id: NodeId) -> Result<Entry> {
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.lookups += 1;
        Ok(node.entry(id))
    }

    /// LOOKUP. `..` gives a parent only if the guest knows it.
    pub fn lookup(&mut self, parent: NodeId, name: LookupName<'_>) -> Result<Entry> {
        let id = match name {
            LookupName::Entry(name) => self.find(parent, name)?,
            LookupName::This => self.entries(parent).map(|_| parent)?,
            LookupName::Parent => {
                let (_, above) = self.entries(parent)?;
                self.node(above)?;
                above
            }
        };
        self.tell(id)
    }

    /// Gives a new node a name, and tells the guest.
    pub fn create(&mut self, parent: NodeId, name: Name<'_>, node: Node) -> Result<Entry> {
        match self.find(parent, name) {
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
            Ok(_) => return Err(Errno::EXIST),
        }
        if self.node(parent)?.links == 0 {
            return Err(Errno::NOENT);
        }
        let id = self.add(node)?;
        self.attach(parent, bytes(name), id)?;
        self.tell(id)
    }

    /// LINK.
    pub fn link(&mut self, id: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry> {
        let node = self.node(id)?;
        if node.is_directory() {
            return Err(Errno::PERM);
        }
        if node.links >= MAX_LINKS {
            return Err(Errno::MLINK);
        }
        if node.links == 0 || self.node(parent)?.links == 0 {
            return Err(Errno::NOENT);
        }
        if self.entries(parent)?.0.contains_key(name.as_c_str().to_bytes()) {
            return Err(Errno::EXIST);
        }
        self.attach(parent, bytes(name), id)?;
        self.tell(id)
    }

    /// Adds an entry; a directory's parent is where its name is.
    fn attach(&mut self, parent: NodeId, name: Vec<u8>, id: NodeId) -> Result<()> {
        self.entries_mut(parent)?.insert(name, id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.links += 1;
            if let Content::Directory { parent: above, .. } = &mut node.content {
                *above = parent;
            }
        }
        Ok(())
    }

    fn detach(&mut self, parent: NodeId, name: &[u8]) -> Result<NodeId> {
        let id = self.entries_mut(parent)?.remove(name).ok_or(Errno::NOENT)?;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.links -= 1;
        }
        Ok(id)
    }

    /// UNLINK and RMDIR.
    pub fn remove(&mut self, parent: NodeId, name: Name<'_>, directory: bool) -> Result<()> {
        let id = self.find(parent, name)?;
        self.may_remove(id, directory)?;
        self.detach(parent, name.as_c_str().to_bytes())?;
        self.tidy(id);
        Ok(())
    }

    fn may_remove(&self, id: NodeId, directory: bool) -> Result<()> {
        match &self.nodes.get(&id).ok_or(Errno::STALE)?.content {
            Content::Directory { .. } if !directory => Err(Errno::ISDIR),
            Content::Directory { entries, .. } if !entries.is_empty() => Err(Errno::NOTEMPTY),
            Content::Directory { .. } => Ok(()),
            _ if directory => Err(Errno::NOTDIR),
            _ => Ok(()),
        }
    }

    /// RENAME and RENAME2.
    pub fn rename(&mut self, parent: NodeId, rename: &Rename<'_>) -> Result<()> {
        let (no_replace, exchange) = (libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE);
        if rename.flags & !(no_replace | exchange) != 0 || rename.flags == no_replace | exchange {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.find(parent, rename.name)?, self.find(rename.new_parent, rename.new_name));
        if self.node(rename.new_parent)?.links == 0 || self.is_below(rename.new_parent, from) {
            return Err(Errno::INVAL);
        }
        let to = match to {
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno),
            Ok(_) if rename.flags == no_replace => return Err(Errno::EXIST),
            Ok(to) if to == from => return Ok(()),
            Ok(to) => Some(to),
        };
        let (old, new) = (bytes(rename.name), bytes(rename.new_name));
        if rename.flags == exchange {
            let to = to.ok_or(Errno::NOENT)?;
            if self.is_below(parent, to) {
                return Err(Errno::INVAL);
            }
            self.detach(parent, &old)?;
            self.detach(rename.new_parent, &new)?;
            self.attach(rename.new_parent, new, from)?;
            return self.attach(parent, old, to);
        }
        if let Some(to) = to {
            let directory = self.nodes.get(&from).is_some_and(Node::is_directory);
            self.may_remove(to, directory)?;
            self.detach(rename.new_parent, &new)?;
            self.tidy(to);
        }
        self.detach(parent, &old)?;
        self.attach(rename.new_parent, new, from)
    }

    /// Whether `directory` is `above` or somewhere below it.
    fn is_below(&self, directory: NodeId, above: NodeId) -> bool {
        let mut at = directory;
        loop {
            if at == above {
                return true;
            }
            match self.nodes.get(&at).map(|node| &node.content) {
                Some(Content::Directory { parent, .. }) if *parent != at => at = *parent,
                _ => return false,
            }
        }
    }

    /// READDIR and READDIRPLUS. Offsets count entries; `.` and `..` come first.
    pub fn list(&mut self, directory: NodeId, offset: u64, out: &mut DirectoryWriter<'_>) -> Result<()> {
        let (entries, parent) = self.entries(directory)?;
        let dots = [(b".".to_vec(), directory), (b"..".to_vec(), parent)];
        let named = entries.iter().map(|(name, id)| (name.clone(), *id));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let listed: Vec<_> = dots.into_iter().chain(named).enumerate().skip(skip).collect();
        for (at, (name, id)) in listed {
            if !out.fits(name.len()) {
                return if out.is_empty() { Err(Errno::INVAL) } else { Ok(()) };
            }
            let told = if at >= 2 && out.plus() { Some(self.tell(id)?) } else { None };
            let kind = self.nodes.get(&id).map_or(libc::DT_DIR.into(), Node::kind);
            let record = DirectoryEntry { ino: id.0, next_offset: at as u64 + 1, kind, name: &name };
            if out.push(&record, told.as_ref()).is_err() {
                return Err(Errno::IO);
            }
        }
        Ok(())
    }
}
