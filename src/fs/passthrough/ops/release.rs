//! Closing files.

use super::locks::drop_flock;
use crate::fs::Result;
use crate::fs::passthrough::PassthroughFs;
use fuse_protocol::flags::ReleaseFlags;
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};

impl PassthroughFs {
    /// RELEASE.
    pub(in crate::fs::passthrough) fn close_file(
        &self,
        node: NodeId,
        id: HandleId,
        flags: ReleaseFlags,
        owner: LockOwner,
    ) -> Result<()> {
        // Whatever the flush says, the guest will not name this handle again.
        let flushed = match flags.contains(ReleaseFlags::FLUSH) {
            true => self.handles.get(node, id).and_then(|handle| self.flush_handle(&handle, owner)),
            false => Ok(()),
        };
        let handle = self.handles.remove(node, id)?;
        if self.config.posix_lock {
            handle.inode.locks.drop_handle(id);
        }
        if flags.contains(ReleaseFlags::FLOCK_UNLOCK) {
            // A request that is still under way may keep the descriptor, but not the lock.
            drop_flock(&handle)?;
        }
        flushed
    }
}
