//! The snapshot of a share.

use std::collections::BTreeMap;
use std::sync::Arc;

use log::warn;
use rustix::io::Errno;

use super::collector::{Locations, is_lost};
use super::locate::{Located, Locator};
use super::{content, links, locks};
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::stat;
use crate::fs::passthrough::inode::{Inode, identity, on_threads, threads_for};
use crate::fs::passthrough::state::PassthroughFs;
use crate::migration::{self, Location, MigrationError, Session, Snapshot};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::NodeId;

/// Lines in the log about what the destination will not find.
const MAX_REPORTS: usize = 20;

/// All that the guest knows. The share serves no request meanwhile; it lets go of the guest's locks, and takes them
/// again when it goes on.
pub fn save(fs: &PassthroughFs) -> Result<Snapshot, MigrationError> {
    let collected = fs.collector.take();
    if !fs.agreement.is_active() {
        return Ok(Snapshot::default());
    }
    let handles = fs.handles.all();
    // Before all others: one that is found meanwhile is among both.
    let unresolved = fs.inodes.unresolved();
    let open = Open::of(fs, &handles);
    let mut saved = locate_all(fs, &open, collected);
    add_content(fs, &open, &mut saved);
    report(&saved);
    let mounts = mounts(fs, &saved);
    saved.extend(unresolved);
    // A directory that the guest has forgotten and has open is among both, if others are found through it. Its open one
    // comes first.
    saved.sort_by_key(|inode| inode.node);
    saved.dedup_by_key(|inode| inode.node);
    let state = fs.inodes.state();
    let order = std::sync::atomic::Ordering::Acquire;
    Ok(Snapshot {
        session: Some(session(fs)),
        inodes: saved,
        handles: handles.iter().map(|(id, handle)| saved_handle(*id, handle)).collect(),
        next_node: state.next_node().load(order),
        next_handle: state.next_handle().load(order),
        mounts,
        // Last: nothing can fail from here on.
        locks: locks::save(fs),
    })
}

fn session(fs: &PassthroughFs) -> Session {
    let flags = fs.agreement.flags();
    Session {
        minor: Some(fs.agreement.minor()),
        flags: Some(flags.bits()),
        writeback: flags.contains(InitFlags::WRITEBACK_CACHE),
        submounts: flags.contains(InitFlags::SUBMOUNTS),
        posix_acl: flags.contains(InitFlags::POSIX_ACL),
        create_supp_group: flags.contains(InitFlags::CREATE_SUPP_GROUP),
    }
}

fn saved_handle(id: u64, handle: &Handle) -> migration::Handle {
    let mode = handle.mode();
    migration::Handle {
        id,
        node: handle.inode().node().0,
        flags: handle.file().flags().bits().cast_signed(),
        directory: Some(mode.is_none()),
        modes: mode.map(|mode| (mode.number(), handle.inode().mode().number())),
    }
}

/// Inodes that the guest has open, by their ids.
struct Open(BTreeMap<u64, (Arc<Inode>, IsForgotten)>);

/// The guest has forgotten it, so it is in no table.
type IsForgotten = bool;

impl Open {
    fn of(fs: &PassthroughFs, handles: &[(u64, Arc<Handle>)]) -> Open {
        let is_forgotten = |inode: &Inode| fs.inodes.lookups_of(inode) == 0 && inode.node() != NodeId::ROOT;
        let inodes = handles.iter().map(|(_, handle)| handle.inode());
        Open(inodes.map(|inode| (inode.node().0, (Arc::clone(inode), is_forgotten(inode)))).collect())
    }

    /// An inode of the table, or one that is open.
    fn inode(&self, fs: &PassthroughFs, node: u64) -> Option<Arc<Inode>> {
        match self.0.get(&node) {
            Some((inode, _)) => Some(Arc::clone(inode)),
            None => fs.inodes.restored(NodeId(node)),
        }
    }
}

/// All inodes that were found, each with its lookups, in the order of their ids.
fn all_nodes(fs: &PassthroughFs, open: &Open) -> Vec<(u64, u64)> {
    let mut nodes = fs.inodes.nodes();
    let forgotten = open.0.iter().filter(|(_, (_, is_forgotten))| *is_forgotten);
    nodes.extend(forgotten.map(|(node, _)| (*node, 0)));
    nodes.sort();
    nodes
}

/// Where they all are, by what was found before the guest stood still, and by all CPUs for the rest.
fn locate_all(fs: &PassthroughFs, open: &Open, collected: Locations) -> Vec<migration::Inode> {
    let config = &fs.config.migration;
    let nodes = all_nodes(fs, open);
    let mut saved = Vec::with_capacity(nodes.len());
    let mut doubtful = Vec::new();
    let mut collected = collected.into_iter().peekable();
    for (node, lookups) in nodes {
        while collected.next_if(|(other, _)| *other < node).is_some() {}
        let known = collected.next_if(|(other, _)| *other == node).map(|(_, located)| located);
        let known = known.filter(|located| !is_lost(located));
        if known.is_none() || config.confirm_paths {
            doubtful.push(saved.len());
        }
        let Located { location, identity, handle } = known.unwrap_or_else(Located::nowhere);
        saved.push(migration::Inode { node, lookups, location, identity, handle });
    }
    let threads = threads_for(doubtful.len());
    let parts: Vec<_> = doubtful.chunks(doubtful.len().div_ceil(threads).max(1)).collect();
    let found = on_threads(parts.len(), |number| {
        let mut locator = Locator::new(&fs.inodes, config);
        let part = parts.get(number).copied().unwrap_or_default();
        let look = |index: &usize| {
            let known = saved.get(*index)?;
            let stays = !matches!(known.location, Location::Lost(_)) && locator.confirm(known);
            if stays {
                return None;
            }
            // What is in no table is being found just now, and among those that were not.
            let located = open.inode(fs, known.node).map(|inode| locator.locate(&inode));
            Some((*index, located))
        };
        part.iter().filter_map(look).collect::<Vec<_>>()
    });
    let mut in_no_table = false;
    for (index, located) in found.into_iter().flatten() {
        match (saved.get_mut(index), located) {
            (Some(inode), Some(located)) => put(inode, located),
            (Some(inode), None) => (inode.node, in_no_table) = (0, true),
            (None, _) => {}
        }
    }
    if in_no_table {
        saved.retain(|inode| inode.node != 0);
    }
    find_other_names(fs, open, &mut saved);
    saved
}

fn put(inode: &mut migration::Inode, located: Located) {
    let Located { location, identity, handle } = located;
    (inode.location, inode.identity, inode.handle) = (location, identity, handle);
}

fn find_other_names(fs: &PassthroughFs, open: &Open, saved: &mut [migration::Inode]) {
    let locator = Locator::new(&fs.inodes, &fs.config.migration);
    let places = saved.iter().enumerate().filter(|(_, saved)| locator.may_lack_name(&saved.location));
    let nameless = places.filter_map(|(place, saved)| Some((place, open.inode(fs, saved.node)?)));
    let (places, files): (Vec<usize>, Vec<_>) = nameless.filter(|(_, inode)| locator.has_name(inode)).unzip();
    for (index, found) in links::find(&fs.inodes, &locator, &files, || false) {
        if let Some(inode) = places.get(index).and_then(|place| saved.get_mut(*place)) {
            put(inode, found);
        }
    }
}

/// Open files without a name go along with their content, as long as that is not too much; and with their handles, since on
/// the same host they can still be opened.
fn add_content(fs: &PassthroughFs, open: &Open, saved: &mut [migration::Inode]) {
    let mut copied = 0;
    for (node, (inode, _)) in &open.0 {
        let place = saved.binary_search_by_key(node, |inode| inode.node).ok();
        let Some(saved) = place.and_then(|place| saved.get_mut(place)) else { continue };
        let may_lack_a_name = matches!(saved.location, Location::Lost(_) | Location::Handle(_))
            && inode.kind() == rustix::fs::FileType::RegularFile;
        if !may_lack_a_name {
            continue;
        }
        let now = inode.path().and_then(|path| stat(&*path));
        if now.is_ok_and(|now| now.stx_nlink > 0) {
            continue;
        }
        let limit = fs.config.migration.unlinked_limit.saturating_sub(copied);
        let why = match content::read(&fs.host, inode, limit) {
            Ok(content) => {
                let bytes: usize = content.extents.iter().map(|(_, bytes)| bytes.len()).sum();
                copied = copied.saturating_add(bytes as u64);
                saved.handle = Locator::new(&fs.inodes, &fs.config.migration).handle(inode).ok();
                saved.identity = now.as_ref().ok().map(identity);
                saved.location = Location::Unlinked(Box::new(content));
                continue;
            }
            // A handle may still find it.
            Err(_) if matches!(saved.location, Location::Handle(_)) || saved.handle.is_some() => continue,
            Err(Errno::FBIG) => "more bytes than --migration-unlinked-limit".to_owned(),
            Err(errno) => format!("cannot be read: {errno}"),
        };
        saved.identity = None;
        saved.location = Location::Lost(format!("it is open, has no name any more, and {why}"));
    }
}

/// The paths of the mounts that handles are on; the share's own has none.
fn mounts(fs: &PassthroughFs, saved: &[migration::Inode]) -> Vec<(u64, Vec<u8>)> {
    let number = |inode: &migration::Inode| match (&inode.location, &inode.handle) {
        (Location::Handle(handle), _) | (_, Some(handle)) => Some(handle.mount),
        _ => None,
    };
    let mut used: Vec<u64> = saved.iter().filter_map(number).collect();
    // Most are on one.
    used.dedup();
    used.sort_unstable();
    used.dedup();
    let root = u64::from(fs.inodes.root().mount().id());
    let locator = Locator::new(&fs.inodes, &fs.config.migration);
    let mut mounts = fs.inodes.unresolved_mounts();
    mounts.retain(|(mount, _)| !used.contains(mount));
    for mount in used {
        if mount == root {
            mounts.push((mount, Vec::new()));
            continue;
        }
        let known = u32::try_from(mount).ok().and_then(|id| fs.inodes.fd_cache().known_mount(id));
        // Any directory on it leads there.
        let path = known.and_then(|mount| locator.path_of(mount.directory()?));
        if let Some(path) = path {
            mounts.push((mount, path));
        }
    }
    mounts.sort_unstable();
    mounts
}

fn report(saved: &[migration::Inode]) {
    let lost = saved.iter().filter_map(|inode| match &inode.location {
        Location::Lost(why) => Some((inode.node, why)),
        _ => None,
    });
    for (node, why) in lost.clone().take(MAX_REPORTS) {
        warn!("node {node} cannot move with the guest: {why}");
    }
    let more = lost.count().saturating_sub(MAX_REPORTS);
    if more > 0 {
        warn!("{more} more nodes cannot move with the guest");
    }
}
