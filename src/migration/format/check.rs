//! What a snapshot has to be, whoever made it: ids that are there once, inodes that can be found through others in finitely
//! many steps, names that are names.
//!
//! A stream comes from another host by way of the front end. A file system that takes a snapshot over may rely on all that
//! is checked here.

use std::collections::{HashMap, HashSet};

use crate::migration::{
    DeviceState, FileHandle, Inode, Location, MigrationError, Snapshot, Unlinked, Waiting,
};

/// Inodes, open files and locks that a share has room for (`src/state_file/`).
const MOST_INODES: usize = 1 << 24;
const MOST_HANDLES: usize = 1 << 20;
const MOST_LOCKS: usize = 1 << 20;
/// Mounts below a share, of which there is one for each file handle's mount number.
const MOST_MOUNTS: usize = 1 << 16;
/// Queues of a device, and descriptors of one.
const QUEUES: u8 = 64;
const LARGEST_QUEUE: u16 = 32_768;
/// The root's node id, `FUSE_ROOT_ID`.
const ROOT: u64 = 1;
/// Longest name of a file (`NAME_MAX`).
const LONGEST_NAME: usize = 255;
/// Longest path: a file may lie deeper than `PATH_MAX` allows in one step.
const LONGEST_PATH: usize = 1 << 20;
/// Longest file handle (`MAX_HANDLE_SZ`).
const LONGEST_HANDLE: usize = 128;
/// Numbers above are no ids or counts of any daemon: so one more is never too many.
const HIGHEST: u64 = i64::MAX.cast_unsigned();

type Result<T> = std::result::Result<T, MigrationError>;

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(MigrationError(why.into()))
}

/// Whether a device may take the state over; the error names the first thing that does not fit.
pub fn check(state: &DeviceState) -> Result<()> {
    let mut queues = HashSet::new();
    for waiting in &state.queues {
        check_waiting(waiting)?;
        if !queues.insert(waiting.queue) {
            return refuse(format!("queue {} is there twice", waiting.queue));
        }
    }
    check_share(&state.share)
}

fn check_waiting(waiting: &Waiting) -> Result<()> {
    let Waiting { queue, size, heads, .. } = waiting;
    if *queue >= QUEUES || !size.is_power_of_two() || *size > LARGEST_QUEUE {
        return refuse(format!("queue {queue} with {size} descriptors is none"));
    }
    let mut seen = HashSet::with_capacity(heads.len());
    match heads.iter().find(|head| *head >= size || !seen.insert(**head)) {
        Some(head) => {
            refuse(format!("queue {queue} has a request at descriptor {head} twice, or no such descriptor"))
        }
        None => Ok(()),
    }
}

fn check_share(snapshot: &Snapshot) -> Result<()> {
    let Snapshot { session, inodes, handles, locks, mounts, .. } = snapshot;
    if session.is_none() {
        return match inodes.is_empty() && handles.is_empty() && locks.is_empty() {
            true => Ok(()),
            false => refuse("the stream has files and no session that knows them"),
        };
    }
    for (what, count, most) in [
        ("inodes", inodes.len(), MOST_INODES),
        ("open files", handles.len(), MOST_HANDLES),
        ("locks", locks.len(), MOST_LOCKS),
        ("mounts", mounts.len(), MOST_MOUNTS),
    ] {
        if count > most {
            return refuse(format!("the stream has {count} {what}, and a share has room for {most}"));
        }
    }
    let nodes = check_inodes(snapshot)?;
    check_parents(&nodes)?;
    check_handles(snapshot, &nodes)?;
    check_mounts(mounts)
}

/// Where nodes are in the list. The guest stands still meanwhile, so nothing is hashed: lists of lanefsd are in the order of
/// the ids, which mostly follow each other.
struct Nodes<'a> {
    inodes: &'a [Inode],
    /// Indices in the order of the ids, if the list has another one.
    order: Option<Vec<usize>>,
}

impl<'a> Nodes<'a> {
    /// These nodes; an error if one is there twice.
    fn of(inodes: &'a [Inode]) -> Result<Nodes<'a>> {
        if inodes.is_sorted_by(|a, b| a.node < b.node) {
            return Ok(Nodes { inodes, order: None });
        }
        let node = |index: &usize| inodes.get(*index).map(|inode| inode.node);
        let mut order: Vec<usize> = (0..inodes.len()).collect();
        order.sort_by_key(node);
        let twice = order.windows(2).find(|pair| matches!(pair, [a, b] if node(a) == node(b)));
        match twice.and_then(|pair| node(pair.first()?)) {
            Some(node) => refuse(format!("node {node} is there twice")),
            None => Ok(Nodes { inodes, order: Some(order) }),
        }
    }

    fn find(&self, node: u64) -> Option<usize> {
        let id = |index: usize| self.inodes.get(index).map(|inode| inode.node);
        if let Some(order) = &self.order {
            let place = order.binary_search_by_key(&Some(node), |index| id(*index)).ok()?;
            return order.get(place).copied();
        }
        // Without gaps among the ids, this is it.
        let guess = usize::try_from(node.wrapping_sub(id(0)?)).ok()?;
        if id(guess) == Some(node) {
            return Some(guess);
        }
        self.inodes.binary_search_by_key(&node, |inode| inode.node).ok()
    }

    fn has(&self, node: u64) -> bool {
        self.find(node).is_some()
    }
}

fn check_inodes(snapshot: &Snapshot) -> Result<Nodes<'_>> {
    for inode in &snapshot.inodes {
        let node = inode.node;
        if node == 0 || node >= HIGHEST || inode.lookups > HIGHEST {
            return refuse(format!(
                "node {node} with {} lookups is none that a guest can have",
                inode.lookups
            ));
        }
        if snapshot.next_node != 0 && node >= snapshot.next_node {
            return refuse(format!("node {node} is there, and {} is the next one", snapshot.next_node));
        }
        check_inode(inode)?;
    }
    if snapshot.next_node > HIGHEST {
        return refuse(format!("{} is no number for the next node", snapshot.next_node));
    }
    let nodes = Nodes::of(&snapshot.inodes)?;
    if nodes.has(ROOT) { Ok(nodes) } else { refuse("the root is missing") }
}

fn check_inode(inode: &Inode) -> Result<()> {
    let node = inode.node;
    if (node == ROOT) != (inode.location == Location::Root) {
        return refuse(format!("node {node} is the root, or its place is: they do not go together"));
    }
    if let Some(identity) = inode.identity
        && identity.kind > 15
    {
        return refuse(format!("node {node} has file type {}, which is none", identity.kind));
    }
    let handle = inode.handle.iter();
    match &inode.location {
        Location::Root => check_all(node, handle),
        Location::Child { name, .. } => {
            check_name(node, name)?;
            check_all(node, handle)
        }
        Location::Path(path) => {
            check_path(node, path)?;
            check_all(node, handle)
        }
        Location::Handle(place) => check_all(node, handle.chain([place])),
        Location::Lost(why) if why.len() > LONGEST_PATH => {
            refuse(format!("node {node} is lost for a reason of {} bytes", why.len()))
        }
        Location::Lost(_) => check_all(node, handle),
        Location::Unlinked(unlinked) => {
            check_unlinked(node, unlinked)?;
            check_all(node, handle)
        }
    }
}

fn check_all<'a>(node: u64, handles: impl Iterator<Item = &'a FileHandle>) -> Result<()> {
    for handle in handles {
        if handle.bytes.len() > LONGEST_HANDLE {
            return refuse(format!("node {node} has a file handle of {} bytes", handle.bytes.len()));
        }
    }
    Ok(())
}

/// Whether these bytes are one component of a path.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= LONGEST_NAME
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

fn check_name(node: u64, name: &[u8]) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let shown = name.get(..LONGEST_NAME).unwrap_or(name).escape_ascii();
    refuse(format!("node {node} is named {shown:?}, which is no name of a file"))
}

fn check_path(node: u64, path: &[u8]) -> Result<()> {
    if path.len() > LONGEST_PATH {
        return refuse(format!("node {node} has a path of {} bytes", path.len()));
    }
    path.split(|byte| *byte == b'/').try_for_each(|name| check_name(node, name))
}

fn check_unlinked(node: u64, unlinked: &Unlinked) -> Result<()> {
    if unlinked.mode & !0o7777 != 0 {
        return refuse(format!("node {node} has mode {:#o}, which are no permissions", unlinked.mode));
    }
    if unlinked.size > HIGHEST {
        return refuse(format!("node {node} has {} bytes, more than a file can have", unlinked.size));
    }
    let mut behind = 0;
    for (offset, bytes) in &unlinked.extents {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= unlinked.size);
        let Some(end) = end.filter(|_| *offset >= behind) else {
            return refuse(format!(
                "the content of node {node} has bytes at {offset}, out of their order or range"
            ));
        };
        behind = end;
    }
    Ok(())
}

/// Each inode that is found through a directory leads to one that is not.
fn check_parents(nodes: &Nodes<'_>) -> Result<()> {
    let inodes = nodes.inodes;
    // The number of the walk that has met an inode, from 1 on. Each inode is walked through once.
    let mut met = vec![0; inodes.len()];
    for start in 0..inodes.len() {
        let walk = start.saturating_add(1);
        let mut here = start;
        while let Some(inode) = inodes.get(here)
            && let Some(seen) = met.get_mut(here)
        {
            match *seen {
                0 => *seen = walk,
                other if other == walk => {
                    return refuse(format!("node {} is found through itself", inode.node));
                }
                _ => break,
            }
            let Location::Child { parent, .. } = &inode.location else { break };
            let Some(next) = nodes.find(*parent) else {
                return refuse(format!(
                    "node {} is found through node {parent}, which is missing",
                    inode.node
                ));
            };
            let directory = inodes.get(next).map(|parent| &parent.location);
            if matches!(directory, Some(Location::Unlinked(_))) {
                return refuse(format!(
                    "node {} is found through node {parent}, which is a file",
                    inode.node
                ));
            }
            here = next;
        }
    }
    Ok(())
}

fn check_handles(snapshot: &Snapshot, nodes: &Nodes<'_>) -> Result<()> {
    let mut handles = HashMap::with_capacity(snapshot.handles.len());
    for handle in &snapshot.handles {
        let (id, node) = (handle.id, handle.node);
        if id >= HIGHEST || snapshot.next_handle > HIGHEST {
            return refuse(format!("open file {id} is none that a guest can have"));
        }
        if handles.insert(id, node).is_some() {
            return refuse(format!("open file {id} is there twice"));
        }
        if snapshot.next_handle != 0 && id >= snapshot.next_handle {
            return refuse(format!("open file {id} is there, and {} is the next one", snapshot.next_handle));
        }
        if !nodes.has(node) {
            return refuse(format!("open file {id} is of node {node}, which is missing"));
        }
    }
    for lock in &snapshot.locks {
        let node = lock.node;
        if !nodes.has(node) {
            return refuse(format!("there is a lock on node {node}, which is missing"));
        }
        if lock.start > lock.end {
            return refuse(format!("a lock on node {node} goes from {} to {}", lock.start, lock.end));
        }
        let of_handle = handles.get(&lock.handle);
        // The owner of a POSIX lock may have closed the file it was taken through.
        if of_handle.is_some_and(|other| *other != node) || of_handle.is_none() && lock.owner.is_none() {
            return refuse(format!(
                "a lock on node {node} was taken through open file {}, which is none of it",
                lock.handle
            ));
        }
    }
    Ok(())
}

fn check_mounts(mounts: &[(u64, Vec<u8>)]) -> Result<()> {
    let mut numbers = HashSet::with_capacity(mounts.len());
    for (number, path) in mounts {
        if !numbers.insert(number) {
            return refuse(format!("mount {number} is there twice"));
        }
        if path.len() > LONGEST_PATH || path.contains(&0) {
            return refuse(format!("mount {number} is at a path that is none"));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests;
