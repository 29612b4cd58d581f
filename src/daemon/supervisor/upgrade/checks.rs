//! What has to be true of descriptors around an upgrade, checked in builds for tests.

#[cfg(debug_assertions)]
use std::os::fd::RawFd;
use std::sync::Arc;

#[cfg(debug_assertions)]
use super::super::reconnect::Parked;
use super::super::relay::Relay;
use super::Supervisor;
use super::handover::Handover;
use crate::fs::FileSystem;

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// All that this program has opened is known, since the next worker closes the rest.
    pub(super) fn check_own(&self, handover: &Handover, relay: Option<&Relay>) {
        #[cfg(debug_assertions)]
        {
            let known =
                self.own.iter().copied().chain(self.sandbox.descriptors()).chain(handover.descriptors());
            let parked = self.parked.iter().flat_map(Parked::descriptors);
            let known: Vec<RawFd> =
                known.chain(parked).chain(relay.into_iter().flat_map(Relay::descriptors)).collect();
            for fd in crate::sys::inherited::all_open().unwrap_or_default() {
                let is_own = fd > 2 && crate::sys::exec::is_closed_by_exec(fd);
                debug_assert!(!is_own || known.contains(&fd), "descriptor {fd} is not known");
            }
        }
        let _ = (handover, relay);
    }
}
