//! The source of a live migration: copies guest memory while it is in use, page by page as the dirty log says.
//!
//! What the guest writes itself is in the copy at once, byte by byte, so that a page which the device has written and not
//! recorded stays stale, also where the guest has written the same page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::{PAGE, Region};
use crate::session::Session;

/// How long threads of a guest may take until each waits for the device.
const PATIENCE: Duration = Duration::from_secs(2);

/// A dirty log in shared memory: a bit for each page of guest-physical memory.
#[derive(Debug)]
pub struct Log {
    file: Arc<Region>,
    /// Bytes that the device is told of, and where they begin.
    size: usize,
    offset: usize,
}

impl Log {
    /// A log of `size` bytes, a multiple of eight, at the begin of a file that has as many.
    pub fn new(size: usize) -> Result<Log> {
        Log::at(0, size)
    }

    /// The same at an offset of its file.
    pub fn at(offset: usize, size: usize) -> Result<Log> {
        Ok(Log { file: Region::new(0, offset + size)?, size, offset })
    }

    /// A log that covers all of guest memory.
    pub fn of(session: &Session) -> Result<Log> {
        let ends = session
            .memory()
            .regions()
            .into_iter()
            .map(|region| region.guest_address() + region.size() as u64);
        let pages = (ends.max().unwrap_or(0) as usize).div_ceil(PAGE);
        Log::new(pages.div_ceil(64) * 8)
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The file that the log lies in.
    pub fn file(&self) -> &Region {
        &self.file
    }

    /// Numbers of the pages that were written since the last call.
    pub fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for word in 0..self.size / 8 {
            let bits = self.file.take_u64(self.offset + word * 8);
            if bits != 0 {
                pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit));
            }
        }
        pages
    }
}

impl Session {
    /// Has the device record what it writes: SET_LOG_BASE, then the feature, then the addresses of all rings, as QEMU does.
    pub fn begin_logging(&self, log: &Log) -> Result<()> {
        self.set_log(log)?;
        self.logs.store(true, Ordering::SeqCst);
        self.set_logging()
    }

    /// Gives the device a log, also in place of another one.
    pub fn set_log(&self, log: &Log) -> Result<()> {
        self.connection().set_log_base(log.file.fd(), log.size as u64, log.offset as u64)
    }

    /// Has the device record nothing any more.
    pub fn end_logging(&self) -> Result<()> {
        self.logs.store(false, Ordering::SeqCst);
        self.set_logging()
    }

    fn set_logging(&self) -> Result<()> {
        let connection = self.connection();
        connection.set_features(self.features_now())?;
        let logs = self.logs.load(Ordering::SeqCst);
        self.queues().iter().try_for_each(|queue| {
            queue.with_ring(|ring| {
                connection.set_ring_addresses(queue.index(), ring, logs.then(|| ring.used_address()))
            })
        })
    }
}

/// A migration under way.
#[derive(Debug)]
pub struct Migration<'s> {
    session: &'s Session,
    log: Log,
}

impl<'s> Migration<'s> {
    /// Begins to migrate the guest: from now on its memory is copied.
    pub fn begin(session: &'s Session) -> Result<Migration<'s>> {
        Migration::with_log(session, Log::of(session)?)
    }

    /// The same with this log.
    pub fn with_log(session: &'s Session, log: Log) -> Result<Migration<'s>> {
        session.begin_logging(&log)?;
        session.memory().regions().iter().for_each(|region| region.begin_copy());
        Ok(Migration { session, log })
    }

    /// The log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Changes to another log, after which no mark comes into the one before.
    pub fn change_log(&mut self, log: Log) -> Result<()> {
        self.session.set_log(&log)?;
        let before = std::mem::replace(&mut self.log, log);
        self.copy(before.take());
        let late = before.take();
        if late.is_empty() { Ok(()) } else { Err(broken(format!("{} marks came too late", late.len()))) }
    }

    /// Copies the pages that were written since the last call, and returns how many there were.
    pub fn pass(&self) -> usize {
        let pages = self.log.take();
        let count = pages.len();
        self.copy(pages);
        count
    }

    fn copy(&self, pages: BTreeSet<u64>) {
        let regions = self.session.memory().regions();
        for page in pages {
            let address = page * PAGE as u64;
            let of = |region: &&Arc<Region>| {
                (region.guest_address()..region.guest_address() + region.size() as u64).contains(&address)
            };
            if let Some(region) = regions.iter().find(of) {
                region.copy_page(((address - region.guest_address()) as usize) / PAGE);
            }
        }
    }

    /// Stops all queues, copies what is left, and compares: the copy has to be what guest memory is. Returns how many
    /// pages were left.
    pub fn stop_and_check(&self) -> Result<usize> {
        let queues = 0..self.session.queues().len();
        queues.clone().try_for_each(|queue| self.session.stop_queue(queue).map(drop))?;
        let left = self.pass();
        self.check()?;
        Ok(left)
    }

    /// Compares while no queue runs. Threads of the guest may still write what the device is to get next.
    pub fn check(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.compare() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                result => return result,
            }
        }
    }

    fn compare(&self) -> Result<()> {
        for region in self.session.memory().regions() {
            let stale = region.stale_pages();
            if let Some(first) = stale.first() {
                let address = region.guest_address() + (first * PAGE) as u64;
                return Err(broken(format!(
                    "{} pages were written and are not in the log, the first one at {address:#x}",
                    stale.len()
                )));
            }
        }
        Ok(())
    }

    /// Goes on after [`Migration::stop_and_check`].
    pub fn resume(&self) -> Result<()> {
        (0..self.session.queues().len()).try_for_each(|queue| self.session.start_queue(queue))
    }

    /// Ends the migration; the guest goes on.
    pub fn end(self) -> Result<()> {
        self.session.end_logging()?;
        self.session.memory().regions().iter().for_each(|region| region.end_copy());
        Ok(())
    }
}

fn broken(problem: String) -> Error {
    Error::Protocol { message: "the dirty log", problem }
}
