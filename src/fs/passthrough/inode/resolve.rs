//! The search for inodes that came with a migration: at their first use, when a request meets them by name or by number,
//! and in the background.
//!
//! An inode is opened below the descriptor of its directory, as LOOKUP does it, so directories come first. What is there
//! has to be what the source had: of the same type; where the share is on the same file system, with the same number and
//! time of birth; and with the same file handle, if the snapshot has one beside the name. Otherwise it is another file
//! that took the name, and the inode is lost: the guest gets ESTALE for it alone, and looks the name up again.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;

use log::warn;
use rustix::fs::{FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;

use super::inode_fd::InodeFd;
use super::records::Record;
use super::search::{Found, identity, is_final, is_same};
use super::table::{ByKey, ByNode, entry_of};
use super::unresolved::{Entry, Origin, Set, State, store};
use super::{Inode, InodeKey, InodeTable};
use crate::fs::Result;
use crate::fs::passthrough::host::{PATH, PROC, kind, proc_name, stat};
use crate::migration::{Inode as Wanted, Location, NO_NAME};
use crate::state_file::{Effects, InodeEntry};
use fuse_protocol::ids::NodeId;

/// Lines in the log about inodes that are lost.
const MAX_REPORTS: usize = 20;

impl InodeTable {
    /// Adds the inodes of a snapshot to a table that has none but the root. No system call is made for any of them. A file
    /// handle can name any inode of its file system, also one outside the share: `opens_handles` says whether the snapshot
    /// is trusted with that.
    ///
    /// ENFILE if there are too many, EINVAL for what no daemon would have saved. The first error is final: the table has
    /// to be cleared.
    pub fn add_unresolved(
        &self,
        inodes: Vec<Wanted>,
        mounts: Vec<(u64, Vec<u8>)>,
        opens_handles: bool,
    ) -> Result<()> {
        let here = identity(&stat(self.root.path()?)?);
        let root = inodes.iter().find(|inode| inode.node == NodeId::ROOT.0);
        let there = root.and_then(|root| root.identity);
        let is_same = there.is_some_and(|there| is_same(&there, &here));
        // A handle means something here if the share is the same directory; who cannot say that is believed.
        let opens_handles = opens_handles && there.is_none_or(|_| is_same);
        let origin = Origin { mounts, is_same, opens_handles };
        // Each takes about as long as the other, and the guest waits.
        let store = || store(self.records.state(), &origin, &inodes);
        let (records, is_stored) = thread::scope(|scope| {
            let storing = thread::Builder::new().spawn_scoped(scope, store);
            let records = self.new_records(&inodes);
            (records, storing.map_or_else(|_| store(), |thread| thread.join().unwrap_or(false)))
        });
        let with_records = inodes.into_iter().zip(records?).map(|(inode, record)| match inode.node {
            // It is in the table.
            node if node == NodeId::ROOT.0 => (inode, State::Found(None)),
            _ => (inode, State::Waiting(record)),
        });
        // From here on the records are given back when the table is cleared.
        let set = self.unresolved.begin(Set::of(origin, with_records).hold());
        let next = set.highest().checked_add(1).filter(|next| *next < u64::MAX / 2).ok_or(Errno::INVAL)?;
        self.records.state().next_node().fetch_max(next, Ordering::AcqRel);
        if set.has_one_twice {
            return Err(Errno::INVAL);
        }
        if is_stored { Ok(()) } else { self.resolve_all().map_err(|_| Errno::NOMEM) }
    }

    /// All is loaded that came with [`InodeTable::add_unresolved`]. Until then also those are there that the guest does not
    /// know.
    pub fn end_loading(&self) {
        if let Some(set) = self.unresolved.set() {
            self.count_done(&set);
        }
    }

    /// Records for those that the guest knows, in the same order. The root has its own.
    fn new_records(&self, inodes: &[Wanted]) -> Result<Vec<Option<Record>>> {
        if inodes.iter().any(|inode| inode.node == 0) {
            return Err(Errno::INVAL);
        }
        let needs_one = |inode: &&Wanted| inode.lookups > 0 && inode.node != NodeId::ROOT.0;
        let taken = self.records.inodes().take_many(inodes.iter().filter(needs_one).count());
        let mut taken = taken.ok_or(Errno::NFILE)?.into_iter();
        let record = |inode: &Wanted| {
            if inode.node == NodeId::ROOT.0 {
                self.record_of(&self.root).set_lookups(inode.lookups);
            }
            let record = needs_one(&inode).then(|| taken.next()).flatten();
            record.inspect(|record| self.store_unresolved(*record, inode))
        };
        Ok(inodes.iter().map(record).collect())
    }

    fn store_unresolved(&self, record: Record, inode: &Wanted) {
        let (node, lookups) = (inode.node, inode.lookups);
        let kind = inode.identity.map_or(0, |identity| identity.kind);
        let entry =
            InodeEntry { node, lookups, ino: 0, device: 0, mount: 0, generation: 0, kind, descriptor: None };
        self.records.inode(record).store(&entry, 0);
    }

    /// Goes on with the inodes that an earlier process has not found, which have these records.
    pub(super) fn restore_unresolved(&self, records: &[Record]) {
        let state = Arc::clone(self.records.state());
        let node = |record: &Record| (self.records.inode(*record).node(), *record);
        let by_node: HashMap<u64, _> = records.iter().map(node).collect();
        let progress = |node| match by_node.get(&node) {
            Some(record) => State::Waiting(Some(*record)),
            None if self.knows_node(NodeId(node)) => State::Found(None),
            // A directory of others that the guest does not know, or one that it has forgotten.
            None => State::Waiting(None),
        };
        if let Some(set) = Set::stored(&state, progress) {
            let is_left = |(node, _): &(&u64, _)| set.find(**node).is_none();
            by_node.iter().filter(is_left).for_each(|(_, record)| self.records.give_back(*record));
            if self.unresolved.begin(set).left() == 0 {
                self.end_unresolved(None);
            }
            return;
        }
        by_node.values().for_each(|record| self.records.give_back(*record));
        state.clear_unresolved();
    }

    /// Whether inodes that the guest knows were not found yet.
    #[inline]
    pub fn has_unresolved(&self) -> bool {
        self.unresolved.is_any()
    }

    /// The inodes that were not found yet, as they came, with the guest's lookups.
    pub fn unresolved(&self) -> Vec<Wanted> {
        let Some(set) = self.unresolved.set() else { return Vec::new() };
        let waiting = set.entries().iter().filter_map(|entry| match *entry.state() {
            State::Waiting(record) => {
                let lookups = record.map_or(0, |record| self.records.inode(record).lookups());
                Some(Wanted { lookups, ..entry.wanted.clone() })
            }
            State::Found(Some(_)) => Some(entry.wanted.clone()),
            State::Found(None) | State::Lost => None,
        });
        waiting.collect()
    }

    /// Paths of the mounts that handles in [`InodeTable::unresolved`] name.
    pub fn unresolved_mounts(&self) -> Vec<(u64, Vec<u8>)> {
        self.unresolved.set().map_or(Vec::new(), |set| set.origin.mounts.clone())
    }

    /// The inode with this id, which is not in the table.
    #[cold]
    pub(super) fn resolve(&self, node: NodeId) -> Result<Arc<Inode>> {
        if let Some(set) = self.unresolved.set()
            && let Some(entry) = set.find(node.0)
            && entry.waiting_record().is_some()
        {
            let found = self.find_with_parents(&set, entry);
            found.map_err(|errno| if is_final(errno) { Errno::STALE } else { errno })?;
        }
        // Another thread may have found it.
        self.known(node).ok_or(Errno::STALE)
    }

    /// FORGET of an inode that is not in the table.
    #[cold]
    pub(super) fn forget_unresolved(&self, effects: Effects<'_>, node: NodeId, count: u64) {
        let Some(set) = self.unresolved.set() else { return };
        let Some(entry) = set.find(node.0) else { return };
        let mut state = entry.state();
        let State::Waiting(Some(record)) = *state else {
            // Just found.
            drop(state);
            if self.known(node).is_some() {
                self.forget(effects, node, count);
            }
            return;
        };
        if effects.forget(self.records.inode(record), count).is_some_and(|before| before <= count) {
            *state = State::Waiting(None);
            drop(state);
            self.records.give_back(record);
            self.count_done(&set);
        }
    }

    /// A request has met `stat` as this entry of a directory: what it may be is found first, so that it keeps its node id.
    #[inline]
    pub fn resolve_met(&self, stat: &Statx, place: Option<(NodeId, &[u8])>) {
        if self.has_unresolved() {
            self.resolve_seen(stat, place);
        }
    }

    #[cold]
    fn resolve_seen(&self, stat: &Statx, place: Option<(NodeId, &[u8])>) {
        let Some(set) = self.unresolved.set() else { return };
        // Whatever is not found now is answered as a new inode.
        for entry in set.with_number(stat.stx_ino).filter(|entry| entry.waiting_record().is_some()) {
            let _ = self.find_with_parents(&set, entry);
        }
        if let Some((parent, name)) = place {
            self.resolve_named(&set, parent, name);
        }
        // It may have another name on the list, or none.
        let has_one_name = stat.stx_nlink == 1 && !set.has_paths || kind(stat) == FileType::Directory;
        if !(set.has_numbers || has_one_name && place.is_some()) {
            let _ = self.resolve_all();
        }
    }

    /// An entry of a directory is about to change: what it means now is found first.
    pub fn resolve_entry(&self, parent: NodeId, name: &[u8]) {
        let Some(set) = self.unresolved.set() else { return };
        self.resolve_named(&set, parent, name);
        if set.has_paths {
            let _ = self.resolve_all();
        }
    }

    fn resolve_named(&self, set: &Set, parent: NodeId, name: &[u8]) {
        // Also one that the guest does not know: others may be found through it.
        for entry in set.named((parent.0, name)).filter(|entry| entry.is_waiting()) {
            let _ = self.find_with_parents(set, entry);
        }
    }

    /// Finds all inodes that are left, or says which one cannot be found and why. What was removed is no such one. What
    /// fails for another reason is left for its first use.
    pub fn resolve_all(&self) -> std::result::Result<(), String> {
        let Some(set) = self.unresolved.set() else { return Ok(()) };
        self.search_each(&set, set.entries().iter())
    }

    /// The same for some of them.
    pub(super) fn search_each<'a>(
        &self,
        set: &'a Set,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> std::result::Result<(), String> {
        let mut first = Ok(());
        for entry in entries {
            if entry.waiting_record().is_some()
                && let Err(errno) = self.find_with_parents(set, entry)
                && !is_gone(set, entry, errno)
                && first.is_ok()
            {
                first = Err(format!(
                    "the guest knows {:?}, which cannot be found here: {}",
                    set.path_of(entry),
                    why(entry, errno)
                ));
            }
        }
        first
    }

    /// How many are left.
    pub fn unresolved_len(&self) -> usize {
        self.unresolved.set().map_or(0, |set| set.left())
    }

    /// Makes what requests need to recognize those that are left.
    pub fn prepare_unresolved(&self) {
        if let Some(set) = self.unresolved.set() {
            set.prepare();
        }
    }

    /// Nothing is to be found any more, or nothing of `which`. A thread may look for some of them just now, beside the end
    /// of the session.
    pub(super) fn end_unresolved(&self, which: Option<&Set>) {
        let ended = self.unresolved.end(which);
        let entries = ended.iter().flat_map(|set| set.entries());
        entries.filter_map(Entry::end).for_each(|record| self.records.give_back(record));
        if ended.is_some() || which.is_none() {
            self.records.state().clear_unresolved();
        }
    }

    fn count_done(&self, set: &Set) {
        if set.count_done() {
            self.end_unresolved(Some(set));
        }
    }

    /// Finds an entry, and before it the directories that lead to it. An error that is final is the guest's from now on.
    pub(super) fn find_with_parents(&self, set: &Set, entry: &Entry) -> Result<()> {
        let mut chain = vec![entry];
        let mut parent = entry.parent();
        while let Some(directory) =
            parent.and_then(|node| set.find(node.0)).filter(|entry| entry.is_waiting())
        {
            if chain.len() > set.entries().len() {
                break;
            }
            chain.push(directory);
            parent = directory.parent();
        }
        let mut result = Ok(());
        for entry in chain.into_iter().rev() {
            result = self.find_one(set, entry);
        }
        result
    }

    fn find_one(&self, set: &Set, entry: &Entry) -> Result<()> {
        if !entry.is_waiting() {
            return Ok(());
        }
        let found = self.search(set, entry);
        let mut state = entry.state();
        let State::Waiting(record) = *state else { return Ok(()) };
        let result = match found {
            Ok(found) => {
                *state = match record {
                    Some(record) => {
                        self.insert_found(NodeId(entry.wanted.node), record, found);
                        State::Found(None)
                    }
                    None => State::Found(Some(Arc::new(found.path))),
                };
                Ok(())
            }
            Err(errno) if is_final(errno) => {
                *state = State::Lost;
                record.iter().for_each(|record| self.records.give_back(*record));
                report(set, entry, errno);
                Err(errno)
            }
            Err(errno) => return Err(errno),
        };
        drop(state);
        if record.is_some() {
            self.count_done(set);
        }
        result
    }

    /// Enters an inode under the node id that the guest has for it.
    fn insert_found(&self, node: NodeId, record: Record, found: Found) {
        let Found { path, stat, mount } = found;
        let key = InodeKey::of(&stat).on(&mount, &path);
        let found = entry_of(node, &key, kind(&stat), &path);
        let inode = Arc::new(Inode::new(node, key, kind(&stat), InodeFd::new(Some(path), mount, record)));
        let mut shard = self.key_shard(&key);
        // From here on it is this process's descriptor that a later one goes on with.
        self.records.inode(record).set_found(&found);
        let by_node = self.node_shard(node);
        by_node.write().unwrap_or_else(PoisonError::into_inner).insert(ByNode(Arc::clone(&inode)));
        // Where another one has the number, it was met first.
        if !shard.contains(&key) {
            shard.insert(ByKey(Arc::clone(&inode)));
        }
        drop(shard);
        self.enter_clock(&inode);
    }

    /// An inode that the guest has forgotten and has open, which is not in the table.
    pub fn forgotten(&self, node: NodeId) -> Result<Arc<Inode>> {
        let set = self.unresolved.set().ok_or(Errno::STALE)?;
        let entry = set.find(node.0).filter(|entry| entry.waiting_record().is_none()).ok_or(Errno::STALE)?;
        self.find_with_parents(&set, entry)?;
        let State::Found(Some(path)) = &*entry.state() else { return Err(Errno::STALE) };
        // It keeps a descriptor for itself.
        let path =
            self.open_counted(|| openat(PROC, proc_name(&**path), PATH - OFlags::NOFOLLOW, Mode::empty()))?;
        let Found { path, stat, mount } = self.found(path)?;
        let key = InodeKey::of(&stat).on(&mount, &path);
        let record = self.records.inodes().take().ok_or(Errno::NFILE)?;
        let found = InodeEntry { lookups: 0, ..entry_of(node, &key, kind(&stat), &path) };
        self.records.inode(record).store(&found, 0);
        Ok(Arc::new(Inode::new(node, key, kind(&stat), InodeFd::new(Some(path), mount, record))))
    }
}

fn report(set: &Set, entry: &Entry, errno: Errno) {
    let why = why(entry, errno);
    match set.count_lost() {
        before if before < MAX_REPORTS => {
            warn!(
                "the guest gets ESTALE for {:?}, which is not here as it was on the source: {why}",
                set.path_of(entry)
            );
        }
        MAX_REPORTS => warn!("the guest gets ESTALE for further inodes that are not here"),
        _ => {}
    }
}

/// Why an entry is lost.
fn why(entry: &Entry, errno: Errno) -> String {
    match &entry.wanted.location {
        Location::Lost(why) => why.clone(),
        _ => errno.to_string(),
    }
}

/// Whether an inode exists nowhere any more, so that no migration can have it: it was removed, and the guest has not
/// forgotten it yet. Whether it is open shows when its handles are opened.
fn is_gone(set: &Set, entry: &Entry, errno: Errno) -> bool {
    match &entry.wanted.location {
        Location::Lost(why) => why == NO_NAME,
        Location::Handle(_) => errno == Errno::STALE && set.origin.opens_handles,
        _ => false,
    }
}
