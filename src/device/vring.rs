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
use super::queue::{Queue, QueueError};
use super::ring::{Layout, MAX_SIZE, Ring};
use super::watchdog::Watchdog;
use super::worker_pool::WorkerPool;
use crate::server::Server;

/// Descriptors of a queue that runs, at most.
pub(super) const DESCRIPTORS: usize = 7;

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
    /// Serves the requests.
    pub server: Arc<Server>,
    /// Wakes a worker when a queue with pending requests makes no progress.
    pub watchdog: Arc<Watchdog>,
    /// Workers of a queue, at most.
    pub workers: usize,
    /// How long a worker polls its ring before it sleeps.
    pub poll_time: Duration,
}

/// What the front end said about one queue, and the worker pool that serves it while it runs.
pub(super) struct Vring {
    index: usize,
    layout: Layout,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    /// The guest wanted a notification while there was no call.
    owes_notification: bool,
    put_back: PutBack,
    pool: Option<Arc<WorkerPool>>,
}

impl Vring {
    /// A queue of which nothing was said.
    pub fn new(index: usize) -> Vring {
        Vring {
            index,
            layout: Layout::default(),
            base: 0,
            kick: None,
            call: None,
            enabled: false,
            owes_notification: false,
            put_back: PutBack::default(),
            pool: None,
        }
    }

    /// How many descriptors it has. A worker pool has copies of kick and call, and three of its own.
    pub fn descriptors(&self) -> usize {
        let pool = if self.pool.is_some() { 4 + usize::from(self.call.is_some()) } else { 0 };
        pool + usize::from(self.kick.is_some()) + usize::from(self.call.is_some())
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
        self.kick = Some(kick.into());
        self.update(serving)
    }

    /// Sets the eventfd by which the guest is notified (SET_VRING_CALL).
    pub fn set_call(&mut self, call: Option<File>) -> Result<()> {
        self.call = call.map(OwnedFd::from);
        if let Some(call) = &self.call {
            never_wait(call).map_err(|errno| self.no_descriptor(errno.into()))?;
        }
        if let Some(pool) = &self.pool {
            pool.queue().set_call(self.copy(self.call.as_ref())?);
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
        let kick = kick.try_clone().map_err(|source| self.no_descriptor(source))?;
        self.start(kick, serving)
    }

    fn start(&mut self, kick: OwnedFd, serving: &Serving) -> Result<()> {
        let Serving { memory, server, watchdog, .. } = serving;
        let ring = Ring::new(&memory.memory(), self.layout, self.base, serving.event_idx);
        let mut ring = ring.map_err(|source| QueueError::Ring { index: self.index, source })?;
        let call = self.copy(self.call.as_ref())?;
        let put_back = std::mem::take(&mut self.put_back);
        let heads = put_back.of(&mut ring);
        let queue =
            Queue::new(self.index, memory.clone(), ring, kick, call)?.with_busy_poll(serving.poll_time);
        let pool = WorkerPool::start(queue, Arc::clone(server), watchdog, serving.workers, heads)?;
        if std::mem::take(&mut self.owes_notification) {
            pool.queue().notify_guest();
        }
        self.pool = Some(pool);
        debug!("queue {} runs with {} descriptors", self.index, self.layout.size);
        Ok(())
    }

    /// Stops after what is in flight, and remembers where the ring stood.
    pub fn stop(&mut self) {
        if let Some(pool) = self.pool.take() {
            let heads = pool.stop();
            let (available, used) = pool.queue().position();
            self.base = available;
            self.owes_notification = pool.queue().owes_notification();
            self.put_back = PutBack { heads, layout: self.layout, available, used };
        }
    }

    fn must_rest(&self, what: &'static str) -> Result<()> {
        if self.pool.is_some() { Err(VringError::Runs { index: self.index, what }) } else { Ok(()) }
    }

    fn copy(&self, descriptor: Option<&OwnedFd>) -> Result<Option<OwnedFd>> {
        let copy = descriptor.map(OwnedFd::try_clone).transpose();
        copy.map_err(|source| self.no_descriptor(source))
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

/// Chains that were taken from a ring and are served when it goes on: requests that waited for locks
/// when it was stopped, while later ones were done. To answer them would be to make programs fail that
/// have done nothing wrong.
#[derive(Default)]
struct PutBack {
    heads: Vec<u16>,
    layout: Layout,
    /// Where the ring stood.
    available: u16,
    used: u16,
}

impl PutBack {
    /// The chains, if `ring` is the one that they were taken from, and not one that was made anew. The
    /// front end lets it go on where it stood, or else behind the last used entry; it goes on where it
    /// stood.
    fn of(&self, ring: &mut Ring) -> &[u16] {
        let stood = ring.layout() == self.layout && ring.next_used() == self.used;
        // A new ring begins with 0.
        let behind = ring.next_available() == self.used && self.used != 0;
        if self.heads.is_empty() || !stood || !(behind || ring.next_available() == self.available) {
            return &[];
        }
        ring.set_next_available(self.available);
        &self.heads
    }
}
