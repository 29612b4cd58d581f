//! A queue that is served on its owner's thread, step by step and by no other thread.
//!
//! Benchmarks count instructions with it: they need the same steps each time.

use std::sync::Arc;

use super::queue::Queue;
use super::watchdog::Watchdog;
use super::worker::{Scratch, WorkerPool};
use crate::service::Service;

/// A queue, and the scratch memory of its only worker.
pub struct InlineQueue {
    pool: Arc<WorkerPool>,
    scratch: Scratch,
}

impl InlineQueue {
    /// Serves `queue` from now on.
    pub fn new(queue: Queue, service: Arc<Service>) -> InlineQueue {
        let pool = WorkerPool::without_workers(queue, service, &Watchdog::disabled());
        InlineQueue { pool, scratch: Scratch::default() }
    }

    /// What a worker does from one sleep to the next: waits for a kick, pops all chains, serves them, adds
    /// the used entries, notifies the guest.
    pub fn process_kick(&mut self) {
        self.pool.wait_and_process(&mut self.scratch);
    }
}
