//! A share as another daemon has saved it.
//!
//! Node ids and counts of lookups are taken over as they are; an inode is opened when the guest uses it, or by a thread in
//! the background. With `--migration-on-error=abort` all are looked for before the migration counts as done, on all CPUs,
//! since an inode that is missing has to make it fail. Open files are opened at once in either case: the source's
//! descriptors end with it.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::Builder;

use log::{info, warn};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::locks;
use crate::fs::passthrough::handle_table::{DIRECTORY, Handle};
use crate::fs::passthrough::host::file::HostFile;
use crate::fs::passthrough::inode::io_mode::Mode as IoMode;
use crate::fs::passthrough::inode::{Inode, InodeTable, on_threads, threads_for};
use crate::fs::passthrough::ops::open::{for_mode, host_flags};
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Agreement, Result};
use crate::logging::Scope;
use crate::migration::config::{Mode, OnError};
use crate::migration::{self, Location, MigrationError, Snapshot};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::{HandleId, NodeId};
use fuse_protocol::init::Negotiated;

type Loaded<T> = std::result::Result<T, MigrationError>;

/// What an open file is not opened with again: it is there.
const ONCE: OFlags =
    OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC).union(OFlags::NOFOLLOW).union(OFlags::TMPFILE);

/// Takes a snapshot over. After an error the caller ends the session.
pub fn load(fs: &PassthroughFs, snapshot: Snapshot) -> Loaded<()> {
    let Some(session) = &snapshot.session else { return Ok(()) };
    let negotiated = negotiated(session)?;
    load_all(fs, &negotiated, snapshot)?;
    // Now all is in the state file.
    fs.agreement.begin(&negotiated);
    Ok(())
}

fn load_all(fs: &PassthroughFs, negotiated: &Negotiated, snapshot: Snapshot) -> Loaded<()> {
    let Snapshot { inodes, handles, locks, next_node, next_handle, mounts, .. } = snapshot;
    let unnamed: Vec<u64> = inodes
        .iter()
        .filter(|inode| matches!(inode.location, Location::Unlinked(_)))
        .map(|inode| inode.node)
        .collect();
    let unknown = inodes.iter().filter(|inode| inode.lookups == 0).map(|inode| inode.node).collect();
    let count = inodes.len();
    let opens_handles = fs.config.migration.mode != Mode::FindPaths;
    fs.inodes.add_unresolved(inodes, mounts, opens_handles).map_err(|errno| match errno {
        Errno::INVAL => MigrationError("the node ids of the stream contradict each other".to_owned()),
        errno => MigrationError(format!("there is no room for {count} inodes: {errno}")),
    })?;
    let state = fs.inodes.state();
    let order = std::sync::atomic::Ordering::AcqRel;
    state.next_node().fetch_max(next_node.min(u64::MAX / 2), order);
    state.next_handle().fetch_max(next_handle.min(u64::MAX / 2), order);
    let forgotten = forgotten(fs, &unknown, &handles);
    if fs.config.migration.on_error == OnError::Abort {
        look_for_all(&fs.inodes)?;
    }
    for node in unnamed {
        // It has no second chance: a later process does not have the content.
        let _ = fs.inodes.get(NodeId(node));
    }
    open_handles(fs, negotiated, &handles, &forgotten)?;
    locks::load(fs, &locks)?;
    fs.inodes.end_loading();
    Ok(())
}

/// The inodes that the guest has forgotten and has open.
fn forgotten(
    fs: &PassthroughFs,
    unknown: &HashSet<u64>,
    handles: &[migration::Handle],
) -> HashMap<u64, Arc<Inode>> {
    let nodes: HashSet<u64> = handles.iter().map(|handle| handle.node).collect();
    let found = |node: &u64| Some((*node, fs.inodes.forgotten(NodeId(*node)).ok()?));
    nodes.intersection(unknown).filter_map(found).collect()
}

fn look_for_all(inodes: &Arc<InodeTable>) -> Loaded<()> {
    let threads = threads_for(inodes.unresolved_len());
    let results = on_threads(threads, |number| inodes.look_for_part(number, threads));
    results.into_iter().collect::<std::result::Result<(), String>>().map_err(MigrationError)
}

/// Makes the inodes of an earlier process and finds those that came with a migration, as far as they are left, beside
/// requests.
pub fn resolve_in_background(inodes: &Arc<InodeTable>) {
    if !inodes.has_stored() && !inodes.has_unresolved() {
        return;
    }
    let (inodes, scope) = (Arc::downgrade(inodes), Scope::current());
    let work = move || {
        let _scope = scope.enter();
        let Some(inodes) = inodes.upgrade() else { return };
        inodes.make_rest_in_background();
        if inodes.has_unresolved() {
            resolve(&inodes);
        }
    };
    // Without a thread, each is made and found at its first use.
    if let Err(error) = Builder::new().name("resolve".to_owned()).spawn(work) {
        warn!("no thread to find the guest's inodes: {error}");
    }
}

fn resolve(inodes: &InodeTable) {
    inodes.prepare_unresolved();
    let count = inodes.unresolved_len();
    if let Err(error) = inodes.resolve_all() {
        info!("{error}");
    }
    let left = inodes.unresolved_len();
    info!("{} of {count} inodes that came with the guest are found", count.saturating_sub(left));
}

/// What the source has negotiated. The server has filled in what a stream of virtiofsd leaves out.
fn negotiated(session: &migration::Session) -> Loaded<Negotiated> {
    let said = session.minor.zip(session.flags);
    let (minor, flags) =
        said.ok_or_else(|| MigrationError("the snapshot does not say what INIT negotiated".to_owned()))?;
    let flags = InitFlags::from_bits_retain(flags);
    Ok(Negotiated { minor, flags, max_write: 0, max_readahead: 0, max_pages: 0 })
}

fn open_handles(
    fs: &PassthroughFs,
    negotiated: &Negotiated,
    handles: &[migration::Handle],
    forgotten: &HashMap<u64, Arc<Inode>>,
) -> Loaded<()> {
    let agreement = Agreement::default();
    agreement.begin(negotiated);
    let session = Session::new(&fs.config, &agreement);
    let highest = handles.iter().map(|handle| handle.id).max().unwrap_or(0);
    let next = highest.checked_add(1).filter(|next| *next < u64::MAX / 2);
    let next = next.ok_or_else(|| MigrationError("the handle ids of the stream are used up".to_owned()))?;
    fs.inodes.state().next_handle().fetch_max(next, std::sync::atomic::Ordering::AcqRel);
    for handle in handles {
        let inode = match forgotten.get(&handle.node) {
            Some(inode) => Ok(Arc::clone(inode)),
            None => fs.inodes.get(NodeId(handle.node)),
        };
        let opened = inode.and_then(|inode| open(fs, &session, inode, handle));
        let added = opened.and_then(|opened| fs.handles.insert_as(HandleId(handle.id), opened));
        let Err(errno) = added else { continue };
        if fs.config.migration.on_error == OnError::Abort {
            return Err(MigrationError(format!(
                "the guest has node {} open, which cannot be opened here: {errno}",
                handle.node
            )));
        }
        warn!(
            "the guest gets EIO for handle {} of node {}: it cannot be opened here: {errno}",
            handle.id, handle.node
        );
        fs.handles.lose(NodeId(handle.node), HandleId(handle.id));
    }
    Ok(())
}

fn open(
    fs: &PassthroughFs,
    session: &Session,
    inode: Arc<Inode>,
    handle: &migration::Handle,
) -> Result<Handle> {
    let permit = fs.inodes.acquire_fd()?;
    if handle.directory.unwrap_or_else(|| inode.is_directory()) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = HostFile::new(permit.wrap(fs.inodes.open(&fs.host, &inode, flags)?), flags);
        return Ok(Handle::new_directory(inode, file, fs.handles.restored_listing()));
    }
    let bits = handle.flags.cast_unsigned();
    // Without modes the flags are the guest's.
    let wanted = match handle.modes {
        Some(_) => OFlags::from_bits_retain(bits),
        None => host_flags(&fs.config, session, bits),
    };
    let (file, flags) = open_file(fs, &inode, wanted - ONCE)?;
    let file = HostFile::new(permit.wrap(file), flags);
    let mode = match handle.modes {
        Some((mode, of_inode)) if mode != DIRECTORY => {
            inode.restore_opener(IoMode::of_number(of_inode));
            IoMode::of_number(mode)
        }
        _ => inode.open(session.policy, wanted.contains(OFlags::DIRECT)).ok_or(Errno::NFILE)?,
    };
    let file = for_mode(fs, &inode, file, mode).inspect_err(|_| inode.release())?;
    Ok(Handle::new_file(inode, file, mode))
}

/// Opens a file with these flags, or with those that the host allows instead.
fn open_file(fs: &PassthroughFs, inode: &Inode, wanted: OFlags) -> Result<(OwnedFd, OFlags)> {
    let mut last = Errno::INVAL;
    for flags in
        [wanted, wanted - OFlags::NOATIME, wanted - OFlags::DIRECT - OFlags::NOATIME, wanted | OFlags::APPEND]
    {
        match fs.inodes.open(&fs.host, inode, flags) {
            Ok(file) => return Ok((file, flags)),
            Err(errno @ (Errno::INVAL | Errno::PERM)) => last = errno,
            Err(errno) => return Err(errno),
        }
    }
    Err(last)
}
