//! Which pages of guest memory the device has written: the dirty log of live migration.
//!
//! vm-memory asks the bitmap of a region to mark each write that goes through it. While no log is set, which is nearly
//! always, a mark is one relaxed load of a flag that nobody writes, so that it stays in every core's cache. (The
//! bitmap of vhost-user-backend takes a lock that all queues share; docs/upstream.md.)
//!
//! Whoever sets a log has to make every worker pass its queue's lock before the front end is told that the log is
//! kept: a worker that loaded the flag just before marks nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use arc_swap::ArcSwapOption;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// Bytes of guest memory for each bit of a log (`VHOST_LOG_PAGE` of the vhost-user specification).
const LOG_PAGE: u64 = 4096;

/// Where written pages are recorded, by their number in guest-physical memory.
pub trait DirtyLog: std::fmt::Debug + Send + Sync {
    /// Records that the page was written; a page that the log does not cover is left out.
    fn insert(&self, page: u64);

    /// Whether the page was recorded.
    fn contains(&self, page: u64) -> bool;
}

/// The log, as one region of guest memory sees it.
#[derive(Debug)]
struct RegionLog {
    log: Arc<dyn DirtyLog>,
    /// Guest-physical address of the region.
    start: u64,
}

/// The bitmap of one region of guest memory.
#[derive(Debug, Default)]
pub struct DirtyBitmap {
    /// Whether there is a log; set after it and reset before it.
    is_logging: AtomicBool,
    region: ArcSwapOption<RegionLog>,
}

impl DirtyBitmap {
    /// Records writes to the region, which begins at guest-physical `start`, in `log` from now on.
    pub fn start_logging(&self, log: Arc<dyn DirtyLog>, start: u64) {
        self.region.store(Some(Arc::new(RegionLog { log, start })));
        self.is_logging.store(true, Ordering::Release);
    }

    /// Records nothing any more.
    pub fn stop_logging(&self) {
        self.is_logging.store(false, Ordering::Relaxed);
        self.region.store(None);
    }

    /// One relaxed load, while there is no log.
    #[inline]
    fn is_logging(&self) -> bool {
        self.is_logging.load(Ordering::Relaxed)
    }

    #[cold]
    fn record(&self, offset: usize, len: usize) {
        // Pairs with the release in `start_logging`.
        fence(Ordering::Acquire);
        let region = self.region.load();
        let Some(region) = region.as_ref().filter(|_| len > 0) else { return };
        let first = region.start.saturating_add(offset as u64);
        let last = first.saturating_add(len as u64 - 1);
        (first / LOG_PAGE..=last / LOG_PAGE).for_each(|page| region.log.insert(page));
    }

    fn is_dirty(&self, offset: usize) -> bool {
        let region = self.region.load();
        let address = |region: &RegionLog| region.start.saturating_add(offset as u64);
        region.as_ref().is_some_and(|region| region.log.contains(address(region) / LOG_PAGE))
    }
}

/// The bitmap from an offset on.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    bitmap: &'a DirtyBitmap,
    offset: usize,
}

impl<'a> DirtySlice<'a> {
    /// The bitmap of the whole region.
    pub fn region(self) -> &'a DirtyBitmap {
        self.bitmap
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyBitmap {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.is_logging() {
            self.record(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { bitmap: self, offset }
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(_len: usize) -> DirtyBitmap {
        DirtyBitmap::default()
    }
}

impl<'a> WithBitmapSlice<'_> for DirtySlice<'a> {
    type S = DirtySlice<'a>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl<'a> Bitmap for DirtySlice<'a> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.bitmap.is_logging() {
            self.bitmap.record(self.offset.saturating_add(offset), len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_dirty(self.offset.saturating_add(offset))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> DirtySlice<'a> {
        // It lies in the region: vm-memory has checked that.
        DirtySlice { bitmap: self.bitmap, offset: self.offset.wrapping_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

    use super::*;
    use crate::device::GuestMemoryMmap;

    #[derive(Debug, Default)]
    struct Pages(Mutex<BTreeSet<u64>>);

    impl DirtyLog for Pages {
        fn insert(&self, page: u64) {
            self.0.lock().unwrap().insert(page);
        }

        fn contains(&self, page: u64) -> bool {
            self.0.lock().unwrap().contains(&page)
        }
    }

    impl Pages {
        fn take(&self) -> Vec<u64> {
            std::mem::take(&mut *self.0.lock().unwrap()).into_iter().collect()
        }
    }

    const START: u64 = 0x10_0000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(START), 0x8000)]).unwrap()
    }

    fn log_of(memory: &GuestMemoryMmap) -> Arc<Pages> {
        let log = Arc::new(Pages::default());
        let start = |region: &vm_memory::GuestRegionMmap<DirtyBitmap>| region.start_addr().0;
        memory.iter().for_each(|region| region.bitmap().region().start_logging(log.clone(), start(region)));
        log
    }

    #[test]
    fn pages_that_are_written_are_in_the_log() {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let log = log_of(&memory);
        assert_eq!(log.take(), [0; 0]);
        memory.write_obj(1u64, GuestAddress(START + 0x1ffc)).unwrap();
        assert_eq!(log.take(), [START / LOG_PAGE + 1, START / LOG_PAGE + 2]);
        memory.store(1u16, GuestAddress(START + 0x7ffe), Ordering::Release).unwrap();
        memory.write_slice(&[0; 0x2001], GuestAddress(0x1000)).unwrap();
        memory.read_obj::<u64>(GuestAddress(0)).unwrap();
        assert_eq!(log.take(), [1, 2, 3, START / LOG_PAGE + 7]);
    }

    #[test]
    fn a_slice_marks_from_its_own_offset_on() {
        let memory = memory();
        let log = log_of(&memory);
        let slice = memory.get_slice(GuestAddress(START + 0x1000), 0x4000).unwrap();
        let slice = slice.offset(0x1000).unwrap();
        slice.get_ref::<u64>(0x800).unwrap().store(7);
        assert_eq!(log.take(), [START / LOG_PAGE + 2]);
        slice.bitmap().mark_dirty(0, 0);
        assert_eq!(log.take(), [0; 0]);
        slice.bitmap().mark_dirty(0xfff, 2);
        assert!(slice.bitmap().dirty_at(0) && slice.bitmap().dirty_at(0x1000));
        assert!(!slice.bitmap().dirty_at(0x2000));
    }

    #[test]
    fn nothing_is_recorded_before_and_after() {
        let memory = memory();
        let log = log_of(&memory);
        memory.iter().for_each(|region| region.bitmap().region().stop_logging());
        memory.write_obj(1u64, GuestAddress(START)).unwrap();
        assert_eq!(log.take(), [0; 0]);
        assert_eq!(Arc::strong_count(&log), 1);
        let region = memory.iter().next().unwrap();
        region.bitmap().mark_dirty(usize::MAX, usize::MAX);
        assert!(!region.bitmap().dirty_at(0));
    }
}
