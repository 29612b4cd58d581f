//! What INIT negotiated, in the one place that the server and the file systems read.
//!
//! The server writes it while it serves no request: INIT and DESTROY hold the session lock exclusively, all
//! other requests hold it shared. That lock orders the writes before the reads of all later requests, so
//! relaxed loads are enough, and a request pays for no lock and no reference count.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fuse_protocol::flags::InitFlags;
use fuse_protocol::init::{Layout, Negotiated};

/// What guest and daemon agreed on, or that there is no session.
#[derive(Debug, Default)]
pub struct Agreement {
    /// The minor version; 0 without a session.
    minor: AtomicU32,
    flags: AtomicU64,
}

impl Agreement {
    /// A session begins. The caller serves no request.
    pub fn begin(&self, negotiated: &Negotiated) {
        self.flags.store(negotiated.flags.bits(), Ordering::Relaxed);
        self.minor.store(negotiated.minor, Ordering::Relaxed);
    }

    /// The session ends. Returns whether there was one. The caller serves no request.
    pub fn end(&self) -> bool {
        self.flags.store(0, Ordering::Relaxed);
        self.minor.swap(0, Ordering::Relaxed) != 0
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
        assert!(!agreement.is_active() && !agreement.end());
        let flags = InitFlags::SETXATTR_EXT | InitFlags::ALLOW_IDMAP;
        agreement.begin(&Negotiated { minor: 45, flags, max_write: 4096, max_readahead: 0, max_pages: 1 });
        assert!(agreement.is_active() && agreement.layout().long_setxattr);
        assert_eq!((agreement.minor(), agreement.flags()), (45, flags));
        assert!(agreement.end() && !agreement.is_active());
        assert_eq!((agreement.flags(), agreement.layout()), (InitFlags::empty(), Layout::default()));
    }
}
