//! Post-copy: a guest that runs here while much of its memory is at the source of its migration still.
//!
//! The front end gets the userfaultfd of this process (POSTCOPY_ADVISE). Memory that it shares afterwards
//! (POSTCOPY_LISTEN) is registered with it: an access to a page that is not here waits until the front end has put the
//! page into the memory file and says so, also one by the kernel, in the middle of preadv2(2). At the end (POSTCOPY_END)
//! all pages are here.
//!
//! Three things are never done, since a missing page would turn out as one of zeros, which would be read, or written to a
//! file, as the guest's data:
//!
//! 1. to touch memory before it is registered. So a region is registered as soon as it is mapped. Where a table replaces
//!    all regions, queues see it once the front end has acknowledged that it answers faults there;
//! 2. to let go of the descriptor before the end: the kernel takes that for the end. A front end that dies leaves requests
//!    that wait for ever, and the process ends without them ([`LOST`]);
//! 3. to have huge pages in it, which the kernel makes of pages and holes.
//!
//! Who waits: the threads of queues, in the middle of requests and with the locks of their ring, and the control thread,
//! where it starts or stops a queue. What ends the wait is in the front end alone, and takes nothing of this process:
//! QEMU serves faults and receives pages by threads that neither send messages nor wait for replies. POSTCOPY_END comes
//! when nothing is missing, and takes no lock of a queue.
//!
//! A process that dies takes its memory with it, and what the front end has is the descriptor of nothing. The next one
//! registers the same memory with a descriptor of its own, of which the front end does not know: each access to a missing
//! page is made again every [`TICK`] until the page is there, which it will be, since the source sends all of them. To
//! serve nothing until POSTCOPY_END was rejected: the front end may stop and start queues before, and where a ring stands
//! is known to its memory alone.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::info;
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::{GuestMemoryRegion as _, GuestRegionMmap};

use crate::logging::{Scope, warn_limited};
use crate::sync::lock;
use crate::sys::memory::without_huge_pages;
use crate::sys::userfault::{Range, Userfault};

/// What is said of a front end that has gone before the end.
pub const LOST: &str = "the front end has gone, or the daemon was told to end, before post-copy was over; memory of the guest is missing, and requests that waited for it were given up";

/// From one attempt to the next where the front end does not say which pages have come.
const TICK: Duration = Duration::from_millis(2);

/// Why post-copy is refused.
#[derive(Debug, Error)]
pub enum PostcopyError {
    /// There is no userfaultfd.
    #[error(
        "the front end wants post-copy, which this host does not allow: neither /dev/userfaultfd nor userfaultfd(2) is there for the daemon"
    )]
    Missing,
    /// The kernel refuses what is needed of it.
    #[error("the front end wants post-copy, for which the host's userfaultfd cannot be used")]
    Unusable(#[source] Errno),
    /// LISTEN after memory was shared.
    #[error("the front end has shared memory before post-copy began; it has to share all of it afterwards")]
    Early,
    /// A region cannot be registered.
    #[error(
        "guest memory at {address:#x} cannot be registered for post-copy; it has to be a memory file (memory-backend-memfd, memory-backend-shm) in whole pages"
    )]
    Register {
        /// Guest-physical address.
        address: u64,
        /// What userfaultfd said.
        source: Errno,
    },
    /// No thread.
    #[error("there is no thread to wait for pages of the guest")]
    Thread(#[source] io::Error),
}

type Result<T> = std::result::Result<T, PostcopyError>;

/// What a device has to do with post-copy.
#[derive(Default)]
pub(super) struct Postcopy {
    /// `None` if there is none, or it is over.
    faults: Option<Arc<Userfault>>,
    is_offered: bool,
    /// The front end has got the descriptor of a process that has died.
    is_orphaned: bool,
    listening: Option<Listening>,
    /// Whether `listening` is there.
    is_under_way: Arc<AtomicBool>,
}

/// Memory is missing.
struct Listening {
    since: Instant,
    registered: Arc<Mutex<Vec<Range>>>,
    /// For what the front end does not do.
    waker: Option<Waker>,
}

impl Postcopy {
    /// By this descriptor. `is_orphaned` if the front end has another one, which it got from a process that has died.
    pub fn new(faults: Option<Userfault>, is_orphaned: bool) -> Postcopy {
        let is_offered = faults.is_some();
        Postcopy { faults: faults.map(Arc::new), is_offered, is_orphaned, ..Postcopy::default() }
    }

    /// Whether a front end may ask for it.
    pub fn is_offered(&self) -> bool {
        self.is_offered
    }

    /// Whether memory may be missing.
    pub fn is_under_way(&self) -> &Arc<AtomicBool> {
        &self.is_under_way
    }

    /// A migration may become one by post-copy: the descriptor for the front end.
    pub fn advise(&self) -> Result<OwnedFd> {
        let faults = self.faults.as_ref().ok_or(PostcopyError::Missing)?;
        faults.enable().map_err(PostcopyError::Unusable)?;
        faults.copy().map_err(PostcopyError::Unusable)
    }

    /// Memory that is shared from now on may be missing. `regions` are shared already.
    pub fn listen(&mut self, regions: usize) -> Result<()> {
        let faults = self.faults.as_ref().ok_or(PostcopyError::Missing)?;
        if regions > 0 {
            return Err(PostcopyError::Early);
        }
        let registered = Arc::default();
        let waker = self.is_orphaned.then(|| Waker::start(faults, &registered)).transpose()?;
        match &waker {
            None => info!("post-copy begins: memory of the guest comes as it is used"),
            Some(_) => info!("post-copy goes on in another process"),
        }
        self.is_under_way.store(true, Ordering::Relaxed);
        self.listening = Some(Listening { since: Instant::now(), registered, waker });
        Ok(())
    }

    /// Makes accesses to what is missing of a region wait, which nobody has touched. Returns its address in this process.
    pub fn register(&self, region: &GuestRegionMmap) -> Result<u64> {
        let failed = |source| PostcopyError::Register { address: region.start_addr().0, source };
        let (Some(faults), Some(listening)) = (&self.faults, &self.listening) else {
            return Err(failed(Errno::INVAL));
        };
        without_huge_pages(region.as_ptr(), region.size());
        let range = Range { start: region.as_ptr() as u64, len: region.len() };
        faults.register(range).map_err(failed)?;
        lock(&listening.registered).push(range);
        Ok(range.start)
    }

    /// All memory is here.
    pub fn end(&mut self) {
        let (Some(faults), Some(listening)) = (self.faults.take(), self.listening.take()) else { return };
        if let Some(waker) = listening.waker {
            waker.stop();
        }
        for range in lock(&listening.registered).drain(..) {
            match faults.unregister(range) {
                // Of a region that was removed nothing is mapped any more.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => warn_limited!("memory of the guest stays registered for post-copy: {errno}"),
            }
        }
        self.is_under_way.store(false, Ordering::Relaxed);
        info!("post-copy is over after {} ms", listening.since.elapsed().as_millis());
    }
}

/// Wakes accesses that wait for pages, again and again.
struct Waker {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Waker {
    fn start(faults: &Arc<Userfault>, registered: &Arc<Mutex<Vec<Range>>>) -> Result<Waker> {
        let (faults, registered, scope) = (Arc::clone(faults), Arc::clone(registered), Scope::current());
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let run = move || {
            let _scope = scope.enter();
            while !ended.load(Ordering::Relaxed) {
                thread::park_timeout(TICK);
                for range in &*lock(&registered) {
                    // One that is not mapped any more has nobody who waits.
                    let _ = faults.wake(*range);
                }
            }
        };
        let thread = thread::Builder::new().name("lanefsd-faults".into()).spawn(run);
        Ok(Waker { ends, thread: thread.map_err(PostcopyError::Thread)? })
    }

    fn stop(self) {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        // It has nothing that fails.
        let _ = self.thread.join();
    }
}
