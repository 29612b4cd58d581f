//! Finds out where all inodes are while the guest runs, so that little is left to do when it stands still.
//!
//! A thread goes over the table again and again. A location is a directory's node id and a name, so it stays true when
//! directories above are renamed. A request that renames or removes a name tells it ([`Collector::touch`], after its
//! system call), and whatever was found there is looked for again. Names that others change on the host are not
//! noticed: the destination compares what it finds, and `--migration-confirm-paths` checks all once more.
//!
//! The thread ends before [`Collector::take`] returns, so the guest's last requests come after all that it has found.

use std::collections::{HashMap, HashSet};
use std::mem::take;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use log::warn;

use super::links;
use super::locate::{Located, Locator};
use crate::fs::passthrough::inode::InodeTable;
use crate::fs::passthrough::inode::shards::BuildIdHasher;
use crate::logging::Scope;
use crate::migration::Location;
use crate::migration::config::MigrationConfig;
use fuse_protocol::ids::NodeId;

/// From one look at the table to the next.
const PERIOD: Duration = Duration::from_millis(250);

/// What was found, each with its node id, in the order of these: that in which a share is saved, so that nothing has to be
/// looked up while the guest stands still.
#[derive(Debug, Default)]
pub struct Locations(Vec<(u64, Located)>);

impl Locations {
    /// Adds others, which are in order as well.
    fn add(&mut self, mut others: Vec<(u64, Located)>) {
        self.0.append(&mut others);
        // It merges what is in order.
        self.0.sort_by_key(|(node, _)| *node);
    }

    fn set(&mut self, node: NodeId, located: Located) {
        if let Ok(place) = self.0.binary_search_by_key(&node.0, |(node, _)| *node)
            && let Some((_, there)) = self.0.get_mut(place)
        {
            *there = located;
        }
    }
}

impl IntoIterator for Locations {
    type Item = (u64, Located);
    type IntoIter = std::vec::IntoIter<(u64, Located)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Names that requests have changed, by the node ids of their directories.
type Touched = HashMap<u64, HashSet<Vec<u8>>, BuildIdHasher>;

/// The thread, if it runs, and the names that requests have changed since.
#[derive(Debug, Default)]
pub struct Collector {
    running: Mutex<Option<Running>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Running(JoinHandle<Locations>);

#[derive(Debug, Default)]
struct Shared {
    /// The thread runs. Requests read it before they tell what they have changed.
    is_active: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ends: bool,
    touched: Touched,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector {
    /// Begins, unless it runs already.
    pub fn start(&self, inodes: &Arc<InodeTable>, config: &MigrationConfig) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return;
        }
        *self.shared.lock() = State::default();
        self.shared.is_active.store(true, Ordering::SeqCst);
        let (inodes, config, shared) = (Arc::clone(inodes), config.clone(), Arc::clone(&self.shared));
        let scope = Scope::current();
        let work = move || {
            let _scope = scope.enter();
            collect(&inodes, &config, &shared)
        };
        match Builder::new().name("collect".to_owned()).spawn(work) {
            Ok(thread) => *running = Some(Running(thread)),
            Err(error) => {
                self.shared.is_active.store(false, Ordering::SeqCst);
                warn!("no thread to prepare a migration, whose downtime will be longer: {error}");
            }
        }
    }

    /// A request has renamed, removed or replaced an entry of a directory.
    pub fn touch(&self, parent: NodeId, name: &[u8]) {
        if self.shared.is_active.load(Ordering::SeqCst) {
            self.shared.lock().touched.entry(parent.0).or_default().insert(name.to_vec());
        }
    }

    /// Ends the thread and returns what it has found and is still true, as far as requests can tell.
    pub fn take(&self) -> Locations {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running(thread)) = running else { return Locations::default() };
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        let mut locations = thread.join().unwrap_or_default();
        self.shared.is_active.store(false, Ordering::SeqCst);
        let touched = take(&mut self.shared.lock().touched);
        drop_touched(&mut locations, &touched);
        locations
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// Forgets what may not be true any more.
fn drop_touched(locations: &mut Locations, touched: &Touched) {
    if touched.is_empty() {
        return;
    }
    for (_, located) in &mut locations.0 {
        let is_true = match &located.location {
            Location::Child { parent, name } => {
                touched.get(parent).is_none_or(|names| !names.contains(name.as_slice()))
            }
            // Any of its directories may have another name now.
            Location::Path(_) => false,
            _ => true,
        };
        if !is_true {
            *located = Located::nowhere();
        }
    }
}

fn collect(inodes: &InodeTable, config: &MigrationConfig, shared: &Shared) -> Locations {
    let mut locator = Locator::new(inodes, config);
    let mut locations = Locations::default();
    let mut without_name = HashSet::new();
    loop {
        let touched = {
            let mut state = shared.lock();
            if state.ends {
                return locations;
            }
            take(&mut state.touched)
        };
        drop_touched(&mut locations, &touched);
        if !touched.is_empty() {
            locator.forget_paths();
        }
        if !locate_new(inodes, &mut locator, &mut locations, shared) {
            return locations;
        }
        let nameless = locations.0.iter().filter(|(_, located)| locator.may_lack_name(&located.location));
        let nameless = nameless.filter_map(|(node, _)| inodes.restored(NodeId(*node)));
        // Each is looked for once: all directories have to be listed for it.
        let files: Vec<_> =
            nameless.filter(|inode| locator.has_name(inode) && without_name.insert(inode.node())).collect();
        for (index, located) in links::find(inodes, &locator, &files, || shared.lock().ends) {
            files.get(index).iter().for_each(|inode| locations.set(inode.node(), located.clone()));
        }
        let state = shared.lock();
        let wait = shared.changed.wait_timeout_while(state, PERIOD, |state| !state.ends);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Finds out where those are that were not located; false if the thread is to end.
fn locate_new(
    inodes: &InodeTable,
    locator: &mut Locator<'_>,
    locations: &mut Locations,
    shared: &Shared,
) -> bool {
    let (mut new, mut goes_on) = (Vec::new(), true);
    let mut known = locations.0.iter_mut().peekable();
    for (node, _) in inodes.nodes() {
        while known.next_if(|(other, _)| *other < node).is_some() {}
        let place = known.next_if(|(other, _)| *other == node);
        // What was lost may have been found between two names.
        if place.as_ref().is_some_and(|(_, located)| !is_lost(located)) {
            continue;
        }
        goes_on = !shared.lock().ends;
        if !goes_on {
            break;
        }
        let Some(inode) = inodes.restored(NodeId(node)) else { continue };
        let located = locator.locate(&inode);
        match place {
            Some((_, there)) => *there = located,
            None => new.push((node, located)),
        }
    }
    locations.add(new);
    goes_on
}

/// Whether it was not found.
pub fn is_lost(located: &Located) -> bool {
    matches!(located.location, Location::Lost(_))
}
