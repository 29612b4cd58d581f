//! Watches over the openers of each file: as long as two have it open, they were told the same.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fuse_protocol::flags::OpenReplyFlags;
use fuse_protocol::ids::{HandleId, NodeId};
use lanefsd::fs::Opened;
use log::{error, warn};

/// The flags that all openers of a file have to agree on.
const MODE: OpenReplyFlags = OpenReplyFlags::DIRECT_IO.union(OpenReplyFlags::PARALLEL_DIRECT_WRITES);

/// Who has what open.
#[derive(Default)]
pub struct Openers(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    open: HashMap<NodeId, Vec<Opened>>,
    /// Openers that found the file open already, with O_DIRECT's mode and without.
    met_direct: u64,
    met_cached: u64,
}

impl Openers {
    /// An answer to OPEN or CREATE is on its way.
    pub fn opened(&self, node: NodeId, opened: Opened) {
        let mut seen = self.lock();
        let others = seen.open.entry(node).or_default();
        if let Some(other) = others.iter().find(|other| other.flags & MODE != opened.flags & MODE) {
            error!("openers of node {} disagree: {:?} and {:?}", node.0, other.flags, opened.flags);
        }
        let met = !others.is_empty();
        others.push(opened);
        match opened.flags.contains(OpenReplyFlags::DIRECT_IO) {
            true => seen.met_direct += u64::from(met),
            false => seen.met_cached += u64::from(met),
        }
    }

    /// RELEASE has come; the file system has not seen it yet.
    pub fn released(&self, node: NodeId, handle: HandleId) {
        if let Some(open) = self.lock().open.get_mut(&node) {
            open.retain(|opened| opened.handle != handle);
        }
    }

    /// The session is over.
    pub fn report(&self) {
        let mut seen = self.lock();
        warn!("{} openers met others in direct mode, {} in cached mode", seen.met_direct, seen.met_cached);
        *seen = Seen::default();
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
