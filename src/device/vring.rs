//! One queue as the front end sets it up, and the worker pool that serves it while it runs.
//!
//! A queue runs while it is enabled, has a kick and knows its addresses. Everything else stores what the front
//! end said until that is the case, or stops the queue and stores where its ring stood.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use log::debug;
use rustix::fs::OFlags;
use thiserror::Error;
use vm_memory::GuestAddressSpace;

use super::SharedMemory;
use super::dirty_log::{DirtyLog, QueueLog};
use super::engine::Stations;
use super::quarantine::Quarantine;
use super::queue::{Queue, QueueError};
use super::ring::{Layout, MAX_SIZE, Ring};
use super::watchdog::Watchdog;
use super::worker_pool::WorkerPool;
use crate::limits::PaceHandle;
use crate::metrics::Metrics;
use crate::metrics::counts::QueueMetrics;
use crate::server::Server;
use crate::state_file::{Journal, Place, StateFile};

/// Descriptors of a queue that runs, at most.
pub(super) const DESCRIPTORS: usize = 5;
/// How many of these the front end sends: kick and call.
pub(super) const RECEIVED: usize = 2;

/// Why a message about a queue is refused.
#[derive(Debug, Error)]
pub enum VringError {
    /// Not a power of two, or more than virtio allows.
    #[error("queue {index} cannot have {size} descriptors")]
    Size {
        /// Number of the queue; 0 is the high-priority queue.
        index: usize,
        /// Descriptors, as the front end says.
        size: u32,
    },
    /// The ring of a queue that runs would move.
    #[error("queue {index} runs; its {what} cannot change")]
    Runs {
        /// Number of the queue.
        index: usize,
        /// What was to change.
        what: &'static str,
    },
    /// Neither kick nor workers that poll without one.
    #[error("queue {0} has no kick; polled queues are not supported")]
    Polled(usize),
    /// There is no room for a copy of a descriptor, or it has no flags.
    #[error("queue {index} cannot use a descriptor")]
    Descriptor {
        /// Number of the queue.
        index: usize,
        /// What the system call said.
        source: io::Error,
    },
    /// The queue cannot be started.
    #[error(transparent)]
    Start(#[from] QueueError),
}

type Result<T> = std::result::Result<T, VringError>;

/// What the queues of a device are served with.
pub(super) struct Serving {
    /// Guest memory, in which the rings lie.
    pub memory: SharedMemory,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Where writes to guest memory are recorded, while they are.
    pub log: Option<Arc<DirtyLog>>,
    /// Serves the requests.
    pub server: Arc<Server>,
    /// Wakes a worker when a queue with pending requests makes no progress.
    pub watchdog: Arc<Watchdog>,
    /// Rings for the engines of request queues.
    pub stations: Stations,
    /// Workers of a queue, at most.
    pub workers: usize,
    /// How long a worker polls its ring before it sleeps.
    pub poll_time: Duration,
    /// Rate limits of request queues.
    pub pace: PaceHandle,
    /// The same of a group of shares.
    pub group: Option<PaceHandle>,
}

/// What the front end said about one queue, and the worker pool that serves it while it runs.
pub(super) struct Vring {
    index: usize,
    layout: Layout,
    /// Where writes to the used ring are recorded: a guest-physical address, which need not be in shared memory.
    log_address: Option<u64>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    enabled: bool,
    /// The guest wanted a notification while there was no call.
    owes_notification: bool,
    journal: Journal,
    metrics: QueueMetrics,
    quarantine: Arc<Quarantine>,
    pool: Option<Arc<WorkerPool>>,
}

impl Vring {
    /// A queue of which nothing was said.
    pub fn new(
        index: usize,
        state: &Arc<StateFile>,
        metrics: &Arc<Metrics>,
        quarantine: &Arc<Quarantine>,
    ) -> Vring {
        Vring {
            index,
            layout: Layout::default(),
            log_address: None,
            base: 0,
            kick: None,
            call: None,
            enabled: false,
            owes_notification: false,
            journal: Journal::new(state, index),
            metrics: metrics.for_queue(index),
            quarantine: Arc::clone(quarantine),
            pool: None,
        }
    }

    /// How many descriptors it has. A worker pool has three of its own.
    pub fn descriptors(&self) -> usize {
        let pool = if self.pool.is_some() { DESCRIPTORS - RECEIVED } else { 0 };
        pool + self.received()
    }

    /// How many descriptors of the front end it has, of which another process may have copies.
    pub fn received(&self) -> usize {
        usize::from(self.kick.is_some()) + usize::from(self.call.is_some())
    }

    /// Whether workers serve it.
    pub fn is_running(&self) -> bool {
        self.pool.is_some()
    }

    /// Sets the number of descriptors (SET_VRING_NUM).
    pub fn set_size(&mut self, size: u32) -> Result<()> {
        let refused = VringError::Size { index: self.index, size };
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size = size.ok_or(refused)?;
        self.must_rest("size")?;
        self.layout.size = size;
        Ok(())
    }

    /// Sets the guest-physical addresses of the ring (SET_VRING_ADDR).
    pub fn set_addresses(&mut self, descriptors: u64, available: u64, used: u64) -> Result<()> {
        let layout = Layout { descriptors, available, used, size: self.layout.size };
        if layout != self.layout {
            self.must_rest("addresses")?;
        }
        self.layout = layout;
        Ok(())
    }

    /// Sets the address for which writes to the used ring are recorded, also of a queue that runs.
    pub fn set_log_address(&mut self, address: Option<u64>, serving: &Serving) {
        self.log_address = address;
        self.update_log(serving);
    }

    /// Records writes as `serving` says. After the return no other log is used.
    pub fn update_log(&self, serving: &Serving) {
        if let Some(pool) = &self.pool {
            pool.queue().set_log(self.log(serving));
        }
    }

    fn log(&self, serving: &Serving) -> Option<QueueLog> {
        serving.log.clone().map(|log| QueueLog::new(log, self.log_address))
    }

    /// Sets the index of the next chain (SET_VRING_BASE), unless the queue runs.
    pub fn set_base(&mut self, base: u16) {
        if self.pool.is_none() {
            self.base = base;
        }
    }

    /// Stops the queue until it is set up anew, and returns the index of the next chain (GET_VRING_BASE).
    pub fn take_base(&mut self) -> u16 {
        self.stop();
        // The queue starts again with the next SET_VRING_KICK.
        self.kick = None;
        self.call = None;
        self.base
    }

    /// Sets the eventfd by which the guest kicks (SET_VRING_KICK).
    pub fn set_kick(&mut self, kick: Option<File>, serving: &Serving) -> Result<()> {
        let kick = kick.ok_or(VringError::Polled(self.index))?;
        self.stop();
        self.kick = Some(Arc::new(kick.into()));
        self.update(serving)
    }

    /// Sets the eventfd by which the guest is notified (SET_VRING_CALL).
    pub fn set_call(&mut self, call: Option<File>) -> Result<()> {
        self.call = call.map(|call| Arc::new(call.into()));
        if let Some(call) = &self.call {
            never_wait(call).map_err(|errno| self.no_descriptor(errno.into()))?;
        }
        if let Some(pool) = &self.pool {
            pool.queue().set_call(self.call.clone());
        }
        Ok(())
    }

    /// Enables or disables the queue (SET_VRING_ENABLE).
    pub fn set_enabled(&mut self, enabled: bool, serving: &Serving) -> Result<()> {
        self.enabled = enabled;
        self.update(serving)
    }

    /// Starts the queue if it has all it needs, and stops it if not.
    fn update(&mut self, serving: &Serving) -> Result<()> {
        let ready = self.enabled && self.layout.size > 0 && self.layout.descriptors != 0;
        let Some(kick) = self.kick.as_ref().filter(|_| ready) else {
            self.stop();
            return Ok(());
        };
        if self.pool.is_some() {
            return Ok(());
        }
        self.start(Arc::clone(kick), serving)
    }

    fn start(&mut self, kick: Arc<OwnedFd>, serving: &Serving) -> Result<()> {
        let Serving { memory, server, watchdog, .. } = serving;
        let ring = Ring::new(&memory.memory(), self.layout, self.base, serving.event_idx);
        let mut ring = ring.map_err(|source| QueueError::Ring { index: self.index, source })?;
        ring.set_log(self.log(serving));
        let call = self.call.clone();
        let start = self.journal.start(self.place(), self.base, ring.next_used());
        ring.set_next_available(start.next_available);
        let is_held = self.quarantine.holds();
        let (journal, mut metrics) = (self.journal.clone(), self.metrics.clone());
        metrics.start(self.layout.size);
        let pool =
            Queue::new(self.index, memory.clone(), ring, kick, call, journal, metrics).and_then(|queue| {
                let queue = queue
                    .with_busy_poll(serving.poll_time)
                    .paced_by(&serving.pace, serving.group.as_ref())
                    .resuming(start.resumed, is_held);
                let engine = serving.stations.engine(self.index);
                WorkerPool::start(queue, Arc::clone(server), watchdog, serving.workers, engine)
            });
        let pool = pool.inspect_err(|_| self.metrics.stop())?;
        if std::mem::take(&mut self.owes_notification) || start.after_crash {
            pool.queue().notify_guest();
        }
        if is_held {
            self.quarantine.add(&pool);
        }
        self.pool = Some(pool);
        debug!("queue {} runs with {} descriptors", self.index, self.layout.size);
        Ok(())
    }

    /// Stops after what is in flight, and remembers where the ring stood.
    pub fn stop(&mut self) {
        if let Some(pool) = self.pool.take() {
            self.quarantine.remove(&pool);
            pool.stop();
            self.metrics.stop();
            let (available, used) = pool.queue().position();
            self.base = available;
            self.owes_notification = pool.queue().owes_notification();
            self.journal.stop(available, used);
        }
    }

    /// Pops no more chains.
    pub fn begin_drain(&self) {
        if let Some(pool) = &self.pool {
            pool.begin_stop();
        }
    }

    /// Stops after what is in flight. The journal is left as it is: another process goes on where the queue stands.
    pub fn drain(&mut self) {
        if let Some(pool) = self.pool.take() {
            self.quarantine.remove(&pool);
            pool.stop();
        }
    }

    /// Stops after what is in flight, and forgets what was put back: the guest or the front end is gone.
    pub fn forget(&mut self) {
        self.stop();
        self.journal.clear();
    }

    fn place(&self) -> Place {
        let Layout { descriptors, available, used, size } = self.layout;
        Place { descriptors, available, used, size }
    }

    fn must_rest(&self, what: &'static str) -> Result<()> {
        if self.pool.is_some() { Err(VringError::Runs { index: self.index, what }) } else { Ok(()) }
    }

    fn no_descriptor(&self, source: io::Error) -> VringError {
        VringError::Descriptor { index: self.index, source }
    }
}

/// Makes notifications that find no room get lost: one is on its way then. A worker that waited for
/// room could be stopped by nobody but a front end that reads what it was sent.
fn never_wait(call: &OwnedFd) -> rustix::io::Result<()> {
    rustix::fs::fcntl_setfl(call, OFlags::NONBLOCK)
}
