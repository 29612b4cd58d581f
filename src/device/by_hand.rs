//! A queue that is served on its owner's thread, step by step and with no other thread at it: for
//! benchmarks, which have to do the same each time.

use std::sync::Arc;

use super::queue::Queue;
use super::watch::Watch;
use super::worker::{Crew, Kit};
use crate::service::Service;

/// A queue, and what its only worker keeps from request to request.
pub struct ByHand {
    crew: Arc<Crew>,
    kit: Kit,
}

impl ByHand {
    /// Serves `queue` from now on.
    pub fn new(queue: Queue, service: Arc<Service>) -> ByHand {
        let crew = Crew::without_workers(queue, service, &Watch::nobody());
        ByHand { crew, kit: Kit::default() }
    }

    /// Does what a worker does from one sleep to the next: waits for a kick, takes all chains,
    /// serves them, gives them back, notifies the guest.
    pub fn serve_a_kick(&mut self) {
        self.crew.wait_and_serve(&mut self.kit);
    }
}
