//! A file system in memory, for fuzzing and tests: the service and the device can be driven without
//! a host directory, and what the guest holds can be counted.
//!
//! It is real as far as a guest can see: names, data, links, attributes, extended attributes and
//! locks are kept. It checks no permissions, as the passthrough file system does not for most
//! requests. Node ids and handles are given out in order, from 2 and from 1, so that a recorded
//! sequence of requests means the same each time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]
#![forbid(unsafe_code)]

mod entries;
mod files;
mod locks;
mod node;
mod serve;
mod state;

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fuse_protocol::ids::NodeId;

use crate::state::State;

/// A file system in memory. Clones are the same file system.
#[derive(Clone, Debug)]
pub struct MemoryFs {
    shared: Arc<Shared>,
    waits: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    lock_freed: Condvar,
}

impl MemoryFs {
    /// An empty file system that holds up to `capacity` bytes of data.
    pub fn new(capacity: usize) -> MemoryFs {
        let shared = Shared { state: Mutex::new(State::new(capacity)), lock_freed: Condvar::new() };
        MemoryFs { shared: Arc::new(shared), waits: true }
    }

    /// The same for a caller with one thread: a lock that would have to be waited for is EDEADLK,
    /// since nobody else can let it go.
    #[must_use]
    pub fn without_waiting(mut self) -> MemoryFs {
        self.waits = false;
        self
    }

    /// Lookups that the guest holds, by node.
    pub fn lookups(&self) -> HashMap<NodeId, u64> {
        let state = self.state();
        let held = state.nodes.iter().filter(|(_, node)| node.lookups > 0);
        held.map(|(id, node)| (*id, node.lookups)).collect()
    }

    /// Open files and directories.
    pub fn open_handles(&self) -> usize {
        self.state().handles.len()
    }

    /// Locks that are held.
    pub fn held_locks(&self) -> usize {
        self.state().nodes.values().map(|node| node.locks.held()).sum()
    }

    /// Nodes that exist, with the root.
    pub fn nodes(&self) -> usize {
        self.state().nodes.len()
    }

    /// Bytes of data in all files.
    pub fn used(&self) -> usize {
        self.state().used
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
