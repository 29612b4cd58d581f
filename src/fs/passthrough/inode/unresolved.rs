//! Inodes that came with a migration and were not found on this host yet.
//!
//! A guest may know a hundred thousand inodes, and it stands still while a snapshot is loaded. So loading opens none of
//! them: each is looked for at its first use, or by a thread in the background ([`super::resolve`]).
//!
//! Such an inode has its record in the state file from the beginning, which counts its lookups. Where it is to be found
//! stands in the state file too ([`StateFile::set_unresolved`]), so that a later process goes on. The record has a
//! descriptor as soon as the inode is found; a record that has neither descriptor nor handle is one of these.
//!
//! Locks: the state of an entry is locked before the shards of the table. No lock is held during a system call that may
//! take long, so two threads may look for the same inode: the first one enters it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::Mount;
use super::records::Record;
use crate::limits::GuestFd;
use crate::migration::{Inode as Wanted, Location};
use crate::state_file::StateFile;
use fuse_protocol::ids::NodeId;

/// What is the same for all inodes of a snapshot; stands in the state file as well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    /// Paths of the source's mounts, by their numbers there.
    pub mounts: Vec<(u64, Vec<u8>)>,
    /// The share is the same directory of the same file system as on the source, so that numbers mean the same.
    pub is_same: bool,
    /// Inodes may be opened by handles of the source.
    pub opens_handles: bool,
}

/// The inodes of a table that were not found yet.
#[derive(Debug, Default)]
pub(super) struct Unresolved {
    /// There may be some. Only a request that does not find its inode reads it.
    any: AtomicBool,
    set: RwLock<Option<Arc<Set>>>,
}

/// All inodes of one snapshot.
#[derive(Debug)]
pub(super) struct Set {
    /// By node id.
    entries: Vec<Entry>,
    /// Two of them have one id.
    pub has_one_twice: bool,
    /// Known to the guest, and neither found nor lost.
    left: AtomicUsize,
    lost: AtomicUsize,
    pub origin: Origin,
    /// Each of them can be recognized by its number.
    pub has_numbers: bool,
    /// Some are found by a path, which a rename of any directory may change.
    pub has_paths: bool,
    by_number: OnceLock<Vec<(u64, usize)>>,
    by_name: OnceLock<Vec<usize>>,
    /// The source's mounts that were looked for here.
    pub mounts: Mutex<HashMap<u64, Option<Arc<Mount>>>>,
    /// Whether numbers mean the same on this host's mounts, by the first inode that was found there.
    pub same_mounts: Mutex<HashMap<u32, bool>>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Entry {
    pub wanted: Wanted,
    state: Mutex<State>,
}

/// How far it is.
#[derive(Debug)]
pub(super) enum State {
    /// Not found yet. Without a record the guest does not know it, and it is here as a directory of others.
    Waiting(Option<Record>),
    /// Found: in the tables, or a directory that the guest does not know.
    Found(Option<Arc<GuestFd>>),
    /// It does not exist here.
    Lost,
}

#[derive(Serialize)]
struct StoredRef<'a>(&'a Origin, Vec<&'a Wanted>);

#[derive(Deserialize)]
struct Stored(Origin, Vec<Wanted>);

/// Keeps in the state file where these inodes are; false if there is no room.
pub(super) fn store(state: &StateFile, origin: &Origin, inodes: &[Wanted]) -> bool {
    // What has no name is made or opened at once, and is never looked for.
    let named = inodes.iter().filter(|inode| !matches!(inode.location, Location::Unlinked(_))).collect();
    postcard::to_stdvec(&StoredRef(origin, named)).is_ok_and(|bytes| state.set_unresolved(&bytes))
}

impl Unresolved {
    /// The inodes of a snapshot, if some may still be waiting.
    pub(super) fn set(&self) -> Option<Arc<Set>> {
        if !self.is_any() {
            return None;
        }
        self.set.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether some may be waiting.
    #[inline]
    pub(super) fn is_any(&self) -> bool {
        // Pairs with `begin`. Whoever does not see it yet finds nothing, as before.
        self.any.load(Ordering::Acquire)
    }

    pub(super) fn begin(&self, set: Set) -> Arc<Set> {
        let set = Arc::new(set);
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&set));
        self.any.store(true, Ordering::Release);
        set
    }

    /// Nothing waits any more, or nothing of `which`; returns what was there.
    pub(super) fn end(&self, which: Option<&Set>) -> Option<Arc<Set>> {
        let mut set = self.set.write().unwrap_or_else(PoisonError::into_inner);
        let is_it = |there: &mut Arc<Set>| which.is_none_or(|which| std::ptr::eq(&**there, which));
        let ended = set.take_if(is_it)?;
        self.any.store(false, Ordering::Release);
        Some(ended)
    }
}

impl Set {
    /// These inodes, each as far as it is. The guest waits, and there may be many: each is looked at once.
    pub(super) fn of(origin: Origin, inodes: impl ExactSizeIterator<Item = (Wanted, State)>) -> Set {
        let (mut left, mut has_numbers, mut has_paths, mut is_sorted) = (0, origin.is_same, false, true);
        let (mut entries, mut before) = (Vec::with_capacity(inodes.len()), 0);
        for (wanted, state) in inodes {
            left += usize::from(matches!(state, State::Waiting(Some(_))));
            has_numbers &= wanted.identity.is_some();
            has_paths |= matches!(wanted.location, Location::Path(_));
            is_sorted &= before < wanted.node;
            before = wanted.node;
            entries.push(Entry { wanted, state: Mutex::new(state) });
        }
        let mut has_one_twice = false;
        if !is_sorted {
            entries.sort_by_key(|entry: &Entry| entry.wanted.node);
            let mut pairs = entries.windows(2);
            has_one_twice = pairs.any(|pair| matches!(pair, [a, b] if a.wanted.node == b.wanted.node));
        }
        Set {
            entries,
            has_one_twice,
            left: AtomicUsize::new(left),
            lost: AtomicUsize::new(0),
            origin,
            has_numbers,
            has_paths,
            by_number: OnceLock::new(),
            by_name: OnceLock::new(),
            mounts: Mutex::default(),
            same_mounts: Mutex::default(),
        }
    }

    /// What an earlier process has left in the state file. `progress` says of a node how far that has come.
    pub(super) fn stored(state: &StateFile, progress: impl Fn(u64) -> State) -> Option<Set> {
        let Stored(origin, inodes) = postcard::from_bytes(&state.unresolved()).ok()?;
        let with_state = |inode: Wanted| {
            let state = progress(inode.node);
            (inode, state)
        };
        Some(Set::of(origin, inodes.into_iter().map(with_state)))
    }

    /// All of them.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The highest id; 0 if there are none.
    pub(super) fn highest(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.wanted.node)
    }

    /// The one with this id.
    pub(super) fn find(&self, node: u64) -> Option<&Entry> {
        let index = self.entries.binary_search_by_key(&node, |entry| entry.wanted.node).ok()?;
        self.entries.get(index)
    }

    /// Those that had this inode number on the source.
    pub(super) fn with_number(&self, ino: u64) -> impl Iterator<Item = &Entry> {
        let all = self.by_number.get_or_init(|| {
            let number = |(index, entry): (usize, &Entry)| Some((entry.wanted.identity?.ino, index));
            let mut all: Vec<_> = self.entries.iter().enumerate().filter_map(number).collect();
            all.sort_unstable();
            all
        });
        let from = all.partition_point(|(number, _)| *number < ino);
        let same = all.iter().skip(from).take_while(move |(number, _)| *number == ino);
        same.filter_map(|(_, index)| self.entries.get(*index))
    }

    /// Those that are this entry of a directory.
    pub(super) fn named<'a>(&'a self, place: (u64, &'a [u8])) -> impl Iterator<Item = &'a Entry> {
        let name = |index: &usize| self.entries.get(*index).and_then(Entry::place);
        let all = self.by_name.get_or_init(|| {
            let mut all: Vec<usize> = (0..self.entries.len()).collect();
            all.retain(|index| name(index).is_some());
            all.sort_by(|a, b| name(a).cmp(&name(b)));
            all
        });
        let from = all.partition_point(|index| name(index) < Some(place));
        let same = all.iter().skip(from).take_while(move |index| name(index) == Some(place));
        same.filter_map(|index| self.entries.get(*index))
    }

    /// Makes the ways to find an entry, which a request would have to wait for.
    pub(super) fn prepare(&self) {
        drop(self.with_number(0));
        drop(self.named((0, b"")));
    }

    /// As if one more were left, until it is counted as done.
    pub(super) fn hold(self) -> Set {
        self.left.fetch_add(1, Ordering::AcqRel);
        self
    }

    /// One more that the guest knows is found, lost, or forgotten; whether it was the last.
    pub(super) fn count_done(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Known to the guest, and neither found nor lost.
    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }

    /// One more is lost; how many there were before.
    pub(super) fn count_lost(&self) -> usize {
        self.lost.fetch_add(1, Ordering::Relaxed)
    }

    /// The path of an entry, for messages.
    pub(super) fn path_of(&self, entry: &Entry) -> String {
        let (mut names, mut next): (Vec<&[u8]>, _) = (Vec::new(), Some(entry));
        while let Some(entry) = next.take().filter(|_| names.len() < MAX_NAMES) {
            match &entry.wanted.location {
                Location::Child { parent, name } => {
                    names.push(name);
                    next = self.find(*parent);
                }
                Location::Path(path) => names.push(path),
                Location::Root => {}
                Location::Handle(_) | Location::Unlinked(_) | Location::Lost(_) => names.push(b"?"),
            }
        }
        names.reverse();
        String::from_utf8_lossy(&names.join(&b'/')).into_owned()
    }
}

/// Names of a path in a message.
const MAX_NAMES: usize = 64;

impl Entry {
    /// How far it is, locked.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was neither found nor lost.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(*self.state(), State::Waiting(_))
    }

    /// Whether it was found.
    pub(super) fn is_found(&self) -> bool {
        matches!(*self.state(), State::Found(_))
    }

    /// Nobody looks for it any more: a thread that does just now enters nothing. Its record, if it was still waiting.
    pub(super) fn end(&self) -> Option<Record> {
        match std::mem::replace(&mut *self.state(), State::Lost) {
            State::Waiting(record) => record,
            State::Found(_) | State::Lost => None,
        }
    }

    /// The record, if the guest knows it and it was neither found nor lost.
    pub(super) fn waiting_record(&self) -> Option<Record> {
        match *self.state() {
            State::Waiting(record) => record,
            State::Found(_) | State::Lost => None,
        }
    }

    /// Its directory and its name there.
    pub(super) fn place(&self) -> Option<(u64, &[u8])> {
        match &self.wanted.location {
            Location::Child { parent, name } => Some((*parent, name)),
            _ => None,
        }
    }

    /// The directory that has to be found before it.
    pub(super) fn parent(&self) -> Option<NodeId> {
        self.place().map(|(parent, _)| NodeId(parent)).filter(|parent| *parent != NodeId::ROOT)
    }
}
