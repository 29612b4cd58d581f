//! What INIT negotiated, in the one place that the server and the file systems read.
//!
//! The server writes it while it serves no request: INIT and DESTROY hold the session lock exclusively, all
//! other requests hold it shared. That lock orders the writes before the reads of all later requests, so
//! relaxed loads are enough, and a request pays for no lock and no reference count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::state_file::StateFile;
use fuse_protocol::flags::InitFlags;
use fuse_protocol::init::{Layout, Negotiated};

/// What guest and daemon agreed on, or that there is no session.
#[derive(Debug, Default)]
pub struct Agreement {
    /// The minor version; 0 without a session.
    minor: AtomicU32,
    flags: AtomicU64,
    /// Where another process finds it.
    state: Option<Arc<StateFile>>,
}

impl Agreement {
    /// The agreement in a state file, and all further ones.
    pub fn of(state: &Arc<StateFile>) -> Agreement {
        let (minor, flags) = state.session();
        Agreement {
            minor: AtomicU32::new(minor),
            flags: AtomicU64::new(flags),
            state: Some(Arc::clone(state)),
        }
    }

    /// A session begins. The caller serves no request.
    pub fn begin(&self, negotiated: &Negotiated) {
        if let Some(state) = &self.state {
            state.set_session(negotiated.minor, negotiated.flags.bits());
        }
        self.flags.store(negotiated.flags.bits(), Ordering::Relaxed);
        self.minor.store(negotiated.minor, Ordering::Relaxed);
    }

    /// The session ends. The caller serves no request.
    pub fn end(&self) {
        if let Some(state) = &self.state {
            state.set_session(0, 0);
        }
        self.flags.store(0, Ordering::Relaxed);
        self.minor.store(0, Ordering::Relaxed);
    }

    /// Whether there is a session.
    pub fn is_active(&self) -> bool {
        self.minor() != 0
    }

    /// The lower of both minor versions; 0 without a session.
    pub fn minor(&self) -> u32 {
        self.minor.load(Ordering::Relaxed)
    }

    /// Flags that both sides know and want; none without a session.
    pub fn flags(&self) -> InitFlags {
        InitFlags::from_bits_retain(self.flags.load(Ordering::Relaxed))
    }

    /// How requests are laid out.
    pub fn layout(&self) -> Layout {
        Layout::new(self.minor(), self.flags())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_leaves_nothing_for_the_next() {
        let agreement = Agreement::default();
        agreement.end();
        assert!(!agreement.is_active());
        let flags = InitFlags::SETXATTR_EXT | InitFlags::ALLOW_IDMAP;
        agreement.begin(&Negotiated { minor: 45, flags, max_write: 4096, max_readahead: 0, max_pages: 1 });
        assert!(agreement.is_active() && agreement.layout().long_setxattr);
        assert_eq!((agreement.minor(), agreement.flags()), (45, flags));
        agreement.end();
        assert!(!agreement.is_active());
        assert_eq!((agreement.flags(), agreement.layout()), (InitFlags::empty(), Layout::default()));
    }
}
