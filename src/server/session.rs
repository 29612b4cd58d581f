//! The session: from INIT to DESTROY, a reset or a disconnect.
//!
//! What was negotiated stands in the file system's [`Agreement`], the only copy. INIT, DESTROY and a reset
//! exclude all other requests ([`SessionLock`]), so that no request leaves an inode, a handle or a lock
//! behind for the next session.

use std::sync::Arc;

use rustix::io::Errno;

use super::session_lock::{SessionLock, SharedGuard, Slot};
use crate::fs::{Agreement, FileSystem, Result};
use crate::logging::{info_limited, warn_limited};
use fuse_protocol::abi::InitOut;
use fuse_protocol::init::{self, negotiate};
use fuse_protocol::request::Init;

/// The session with one guest, and who may be inside it.
pub(super) struct Session {
    agreement: Arc<Agreement>,
    lock: Arc<SessionLock>,
}

impl Session {
    /// No session yet: everything but INIT is refused.
    pub(super) fn new(fs: &dyn FileSystem) -> Session {
        Session { agreement: fs.agreement().cloned().unwrap_or_default(), lock: Arc::default() }
    }

    /// What was negotiated.
    pub(super) fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// Lets a request of the calling thread in, among others.
    pub(super) fn enter<'a>(&self, slot: &'a mut Option<Slot>) -> SharedGuard<'a> {
        if slot.as_ref().is_none_or(|slot| !slot.belongs_to(&self.lock)) {
            *slot = None;
        }
        slot.get_or_insert_with(|| Slot::register(&self.lock)).lock_shared()
    }

    /// Runs `act` while no request is served. Those that wait for locks are interrupted.
    pub(super) fn exclusive<T>(&self, fs: &dyn FileSystem, act: impl FnOnce() -> T) -> T {
        self.lock.exclusive(|| fs.interrupt_all(), act)
    }

    /// INIT. The caller has excluded all other requests.
    pub(super) fn init(&self, fs: &dyn FileSystem, init: &Init) -> Result<InitOut> {
        // A guest that begins anew has lost what it had, also if it is refused now.
        self.destroy(fs);
        let negotiated = match negotiate(init, fs.offered_flags()) {
            Ok(Some(negotiated)) => negotiated,
            Ok(None) => return Ok(init::major_mismatch()),
            Err(error) => {
                warn_limited!("a guest was refused: {error}");
                return Err(Errno::PROTO);
            }
        };
        let missing = fs.required_flags() - negotiated.flags;
        if !missing.is_empty() {
            warn_limited!(
                "a guest was refused, which --posix-acl=auto or --security-label=auto would serve: it lacks \
                 {missing:?}, which that option demands without a mode or with always"
            );
            return Err(Errno::PROTO);
        }
        self.agreement.begin(&negotiated);
        info_limited!("session begins: FUSE 7.{}, {:?}", negotiated.minor, negotiated.flags);
        Ok(negotiated.to_wire())
    }

    /// Ends the session, if there is one. The caller has excluded all requests but DESTROY.
    pub(super) fn destroy(&self, fs: &dyn FileSystem) {
        if self.agreement.is_active() {
            // First: a process that dies meanwhile leaves a session, which ends once more.
            fs.destroy();
            self.agreement.end();
        }
    }
}
