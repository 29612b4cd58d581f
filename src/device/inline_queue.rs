//! A queue that is served on its owner's thread, step by step and by no other thread.
//!
//! Benchmarks count instructions with it: they need the same steps each time.

use std::sync::Arc;

use super::inflight::Scratch;
use super::queue::Queue;
use super::worker::Worker;
use super::worker_pool::WorkerPool;
use crate::server::Server;

/// A queue, and its only worker.
pub struct InlineQueue {
    worker: Worker,
    /// `None` while the worker serves.
    scratch: Option<Scratch>,
}

impl InlineQueue {
    /// Serves `queue` from now on.
    pub fn new(queue: Queue, server: Arc<Server>) -> InlineQueue {
        let worker = Worker::new(WorkerPool::without_threads(queue, server));
        InlineQueue { worker, scratch: None }
    }

    /// What a worker does from one sleep to the next: waits for a kick, pops all chains, serves them, adds
    /// the used entries, notifies the guest.
    pub fn process_kick(&mut self) {
        let scratch = self.scratch.take().unwrap_or_else(|| self.worker.scratch());
        self.scratch = self.worker.process_kick(scratch);
    }
}
