//! The stream of virtiofsd, versions 1 and 2, as virtiofsd 1.14 reads and writes it.
//!
//! It is postcard of the types below, and nothing around it: neither a length nor a checksum. The first byte is the number
//! of the variant of [`Stream`], 0 or 1. What is not obvious:
//!
//! - An inode that is found by parent and name owns one of the parent's references; the destination drops it once the child
//!   is found. So directories are in the stream that the guest has never looked up, or has forgotten.
//! - The root has two references more than its children.
//! - Open files come without O_CREAT, O_EXCL and O_TRUNC. How the guest has them open (FOPEN flags) is not said: the
//!   destination has to run with the source's `--cache`.
//! - Names are UTF-8. A file with another one is written as lost.
//! - Of what INIT negotiated there are four flags. The server fills in the rest.
//! - Neither locks nor the content of unlinked files can be written.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::logging::warn_limited;
use crate::migration::config::{MigrationConfig, OnError};
use crate::migration::{self, DeviceState, FileHandle, Location, MigrationError, NO_NAME, Snapshot};

/// References of the root that are nobody's.
const OF_ROOT: u64 = 2;
/// The root's id.
const ROOT: u64 = 1;

/// A stream.
#[derive(Serialize, Deserialize)]
enum Stream {
    V1(State),
    V2(State, Mounts),
}

/// Paths of mounts below the share's root by their numbers on the source; `.` for the root's.
type Mounts = BTreeMap<u64, String>;

#[derive(Default, Serialize, Deserialize)]
struct State {
    inodes: Vec<Inode>,
    next_inode: u64,
    handles: Vec<Handle>,
    next_handle: u64,
    negotiated: Negotiated,
}

#[derive(Serialize, Deserialize)]
struct Inode {
    id: u64,
    references: u64,
    place: Place,
    /// To compare with what is found.
    handle: Option<RawHandle>,
}

#[derive(Serialize, Deserialize)]
enum Place {
    Root,
    Child { parent: u64, name: String },
    Lost,
    Path(String),
    Handle(RawHandle),
}

#[derive(Serialize, Deserialize)]
struct RawHandle {
    mount: u64,
    kind: i32,
    bytes: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Handle {
    id: u64,
    inode: u64,
    source: Source,
}

#[derive(Serialize, Deserialize)]
enum Source {
    Inode { flags: i32 },
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Negotiated {
    writeback: bool,
    submounts: bool,
    posix_acl: bool,
    create_supp_group: bool,
}

/// Whether the stream begins as one of these does.
pub(super) fn is_begun_by(stream: &[u8]) -> bool {
    matches!(stream.first(), Some(0 | 1))
}

/// The snapshot in a stream.
pub(super) fn read(stream: &[u8]) -> Result<Snapshot, MigrationError> {
    let malformed = |error| MigrationError(format!("virtiofsd's stream is malformed: {error}"));
    let (stream, rest) = postcard::take_from_bytes(stream).map_err(malformed)?;
    if !rest.is_empty() {
        return Err(MigrationError(format!("virtiofsd's stream has {} bytes behind its end", rest.len())));
    }
    let (state, mounts) = match stream {
        Stream::V1(state) => (state, Mounts::new()),
        Stream::V2(state, mounts) => (state, mounts),
    };
    let children = children(state.inodes.iter().filter_map(|inode| match &inode.place {
        Place::Child { parent, .. } => Some(*parent),
        _ => None,
    }));
    let Negotiated { writeback, submounts, posix_acl, create_supp_group } = state.negotiated;
    let session =
        migration::Session { minor: None, flags: None, writeback, submounts, posix_acl, create_supp_group };
    // Without the root, nothing was mounted.
    let is_mounted = !state.inodes.is_empty() || !state.handles.is_empty();
    let inodes = state.inodes.into_iter().map(|inode| read_inode(inode, &children));
    Ok(Snapshot {
        session: is_mounted.then_some(session),
        inodes: inodes.collect::<Result<_, _>>()?,
        handles: state.handles.into_iter().map(read_handle).collect(),
        locks: Vec::new(),
        next_node: state.next_inode,
        next_handle: state.next_handle,
        mounts: mounts.into_iter().map(|(mount, path)| (mount, read_mount(path))).collect(),
    })
}

/// How many children each parent has.
fn children(parents: impl Iterator<Item = u64>) -> HashMap<u64, u64> {
    let mut children = HashMap::new();
    parents.for_each(|parent| {
        let count: &mut u64 = children.entry(parent).or_default();
        *count = count.saturating_add(1);
    });
    children
}

fn read_inode(inode: Inode, children: &HashMap<u64, u64>) -> Result<migration::Inode, MigrationError> {
    let Inode { id, references, place, handle } = inode;
    let below = children.get(&id).copied().unwrap_or(0);
    let lookups = references.checked_sub(below).ok_or_else(|| {
        MigrationError(format!("node {id} has {references} references, and {below} files that hold one each"))
    })?;
    let location = match place {
        Place::Root => Location::Root,
        Place::Child { parent, name } => Location::Child { parent, name: name.into_bytes() },
        Place::Lost => Location::Lost("virtiofsd did not find it any more".into()),
        Place::Path(path) => Location::Path(path.into_bytes()),
        Place::Handle(handle) => Location::Handle(handle.into()),
    };
    Ok(migration::Inode { node: id, lookups, location, identity: None, handle: handle.map(Into::into) })
}

fn read_handle(handle: Handle) -> migration::Handle {
    let Handle { id, inode, source: Source::Inode { flags } } = handle;
    // virtiofsd adds the flag to each OPENDIR, and an OPEN never has it.
    let directory = Some(flags & libc::O_DIRECTORY != 0);
    migration::Handle { id, node: inode, flags, directory, modes: None }
}

fn read_mount(path: String) -> Vec<u8> {
    if path == "." { Vec::new() } else { path.into_bytes() }
}

/// A state as a stream of version 2.
pub(super) fn write(device: &DeviceState, config: &MigrationConfig) -> Result<Vec<u8>, MigrationError> {
    let snapshot = &device.share;
    let waiting = device.queues.iter().map(|queue| queue.heads.len()).fold(0, usize::saturating_add);
    for (count, what) in [(snapshot.locks.len(), "locks"), (waiting, "requests that wait for locks")] {
        if count == 0 {
            continue;
        }
        if config.on_error == OnError::Abort {
            return Err(MigrationError(format!(
                "the guest has {count} {what}, which virtiofsd does not take over; --migration-on-error=guest-error \
                 drops them"
            )));
        }
        warn_limited!("{count} {what} of the guest are dropped, which virtiofsd does not take over");
    }
    let parents = snapshot.inodes.iter().filter(|inode| writes_name(inode));
    let children = children(parents.filter_map(|inode| match inode.location {
        Location::Child { parent, .. } => Some(parent),
        _ => None,
    }));
    let highest = |ids: &mut dyn Iterator<Item = u64>| ids.max().map_or(0, |id| id.saturating_add(1));
    let next_inode = highest(&mut snapshot.inodes.iter().map(|inode| inode.node));
    let next_handle = highest(&mut snapshot.handles.iter().map(|handle| handle.id));
    let state = State {
        inodes: snapshot.inodes.iter().map(|inode| write_inode(inode, &children, config)).collect(),
        next_inode: next_inode.max(snapshot.next_node).max(ROOT.saturating_add(1)),
        handles: snapshot.handles.iter().map(write_handle).collect(),
        next_handle: next_handle.max(snapshot.next_handle),
        negotiated: snapshot.session.as_ref().map_or_else(Negotiated::default, |session| Negotiated {
            writeback: session.writeback,
            submounts: session.submounts,
            posix_acl: session.posix_acl,
            create_supp_group: session.create_supp_group,
        }),
    };
    postcard::to_stdvec(&Stream::V2(state, write_mounts(&snapshot.mounts)))
        .map_err(|error| MigrationError(format!("the state cannot be written: {error}")))
}

/// Whether an inode is found by its name in a stream, and owns a reference of its parent.
fn writes_name(inode: &migration::Inode) -> bool {
    matches!(&inode.location, Location::Child { name, .. } if std::str::from_utf8(name).is_ok())
}

fn write_inode(inode: &migration::Inode, children: &HashMap<u64, u64>, config: &MigrationConfig) -> Inode {
    let id = inode.node;
    let lost = |why: &str| {
        warn_limited!("node {id} cannot be found by virtiofsd: {why}");
        Place::Lost
    };
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).map(str::to_owned);
    let place = match &inode.location {
        Location::Root => Place::Root,
        Location::Child { parent, name } => match text(name) {
            Ok(name) => Place::Child { parent: *parent, name },
            Err(_) => lost("its name is not UTF-8"),
        },
        Location::Path(path) => text(path).map_or_else(|_| lost("its path is not UTF-8"), Place::Path),
        Location::Handle(handle) => Place::Handle(handle.into()),
        Location::Lost(why) => match &inode.handle {
            Some(handle) if why == NO_NAME => Place::Handle(handle.into()),
            _ => lost(why),
        },
        Location::Unlinked(_) => match &inode.handle {
            Some(handle) => Place::Handle(handle.into()),
            None => lost("it has no name any more"),
        },
    };
    // One that is not to be compared is none: virtiofsd needs handles of its own to compare.
    let handle = inode.handle.as_ref().filter(|_| config.verify_handles).map(Into::into);
    let of_root = if id == ROOT { OF_ROOT } else { 0 };
    let below = children.get(&id).copied().unwrap_or(0);
    Inode { id, references: inode.lookups.max(of_root).saturating_add(below), place, handle }
}

fn write_handle(handle: &migration::Handle) -> Handle {
    let once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
    let directory = if handle.directory == Some(true) { libc::O_DIRECTORY } else { 0 };
    let flags = handle.flags & !once | directory;
    Handle { id: handle.id, inode: handle.node, source: Source::Inode { flags } }
}

fn write_mounts(mounts: &[(u64, Vec<u8>)]) -> Mounts {
    let path = |path: &[u8]| match std::str::from_utf8(path) {
        Ok("") => Some(".".to_owned()),
        Ok(path) => Some(path.to_owned()),
        Err(_) => None,
    };
    mounts.iter().filter_map(|(mount, bytes)| Some((*mount, path(bytes)?))).collect()
}

impl From<RawHandle> for FileHandle {
    fn from(handle: RawHandle) -> FileHandle {
        FileHandle { mount: handle.mount, kind: handle.kind, bytes: handle.bytes }
    }
}

impl From<&FileHandle> for RawHandle {
    fn from(handle: &FileHandle) -> RawHandle {
        RawHandle { mount: handle.mount, kind: handle.kind, bytes: handle.bytes.clone() }
    }
}

#[cfg(test)]
mod tests;
