//! The dirty log of live migration: a bit for each page of guest memory that the device has written.
//!
//! The front end copies guest memory while the guest runs, and reads in the log which pages it has to copy once more.
//! The device writes in two places only, the device-writable part of a chain and the used ring, so both are marked where
//! the used entry of the chain is added, by their guest-physical addresses. A bitmap for each region, as vm-memory has
//! it, was rejected: data goes by I/O vectors, which no bitmap sees, memory that is plugged in later needs a bitmap of
//! its own, and each write costs a load while no migration runs, which is nearly always.
//!
//! The protocol, with the front end on the other side:
//!
//! 1. A mark comes after the write. A bit that is set already is not set again: a fence between the write and the look at
//!    the bit pairs with the atomic exchange by which the front end clears bits before it copies the pages. Either the
//!    copy has the write, or the bit is seen as clear and is set. So the cache lines of the log stay shared among
//!    workers, and a request pays for one fence in place of an atomic operation for each buffer.
//! 2. Marks are made under the lock of the queue. A log is set and taken away under the same lock, so that after the
//!    reply to the message nothing is marked in the log before, and no write that was not marked is still under way.
//! 3. The device-writable part is marked as a whole. A preadv2(2) that fails or ends early may have written beyond what
//!    it returns, and the bytes that a dead process has written are known by nothing but the chain.
//! 4. A process that dies between a write and its mark leaves a chain in flight or a used ring. The next process marks
//!    the chains in flight, and the used ring as a whole, when it sets the log.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::logging::warn_limited;

/// Bytes of guest memory for each bit of a log (`VHOST_LOG_PAGE` of the vhost-user specification).
const LOG_PAGE: u64 = 4096;

/// Why a log is refused.
#[derive(Debug, Error)]
pub enum LogError {
    /// fstat(2) failed.
    #[error("the file of the dirty log cannot be looked at")]
    File(#[source] Errno),
    /// The file ends before the log: touching what is missing would end the daemon.
    #[error("the dirty log ends at byte {end} of its file, which has {size} bytes")]
    Short {
        /// Offset of the first byte behind the log.
        end: u64,
        /// Length of the file.
        size: u64,
    },
    /// mmap(2) failed: not a memory file, not writable, or an offset that is not that of a page.
    #[error("the dirty log, {size} bytes at offset {offset} of its file, cannot be mapped")]
    Map {
        /// Offset in the file.
        offset: u64,
        /// Length in bytes.
        size: u64,
        /// What mmap(2) said.
        source: MmapRegionError,
    },
}

/// The log that a front end shares: bit `n % 8` of byte `n / 8` stands for page `n` of guest-physical memory.
#[derive(Debug)]
pub struct DirtyLog {
    bits: MmapRegion,
    /// A page behind the end of the log was written.
    has_overflowed: AtomicBool,
}

impl DirtyLog {
    /// The log of `size` bytes at this offset of a file (SET_LOG_BASE).
    pub fn map(file: File, offset: u64, size: u64) -> Result<DirtyLog, LogError> {
        let stat = rustix::fs::fstat(&file).map_err(LogError::File)?;
        let end = offset.saturating_add(size);
        let file_size = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && end > file_size {
            return Err(LogError::Short { end, size: file_size });
        }
        let failed = |source| LogError::Map { offset, size, source };
        let len = usize::try_from(size)
            .map_err(|_| failed(MmapRegionError::Mmap(io::Error::from_raw_os_error(libc::ENOMEM))))?;
        let bits = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(failed)?;
        Ok(DirtyLog { bits, has_overflowed: AtomicBool::new(false) })
    }

    /// Records that `len` bytes at this guest-physical address were written. Pages that the log does not cover are left
    /// out. Between the write and the call there is a SeqCst fence.
    #[inline]
    pub fn mark(&self, address: u64, len: u64) {
        let Some(rest) = len.checked_sub(1) else { return };
        let (first, last) = (address / LOG_PAGE, address.saturating_add(rest) / LOG_PAGE);
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            let bit =
                usize::try_from(byte).ok().and_then(|byte| self.bits.get_atomic_ref::<AtomicU8>(byte).ok());
            match bit {
                Some(bit) => {
                    let mask = 0xff << from & 0xff >> (7 - to);
                    if bit.load(Ordering::Relaxed) & mask != mask {
                        // Release: whoever sees the bit sees what was written.
                        bit.fetch_or(mask, Ordering::Release);
                    }
                }
                None => return self.overflow(byte),
            }
        }
    }

    #[cold]
    fn overflow(&self, byte: u64) {
        if !self.has_overflowed.swap(true, Ordering::Relaxed) {
            let (end, address) = (self.bits.size(), byte.saturating_mul(8 * LOG_PAGE));
            warn_limited!(
                "the dirty log has {end} bytes and ends before guest memory: writes from {address:#x} on are not \
                 recorded"
            );
        }
    }
}

/// The log, as one queue uses it.
#[derive(Clone, Debug)]
pub struct QueueLog {
    log: Arc<DirtyLog>,
    used_ring: Option<u64>,
}

impl QueueLog {
    /// A log for a queue whose used ring is recorded at this guest-physical address, if it is.
    pub fn new(log: Arc<DirtyLog>, used_ring: Option<u64>) -> QueueLog {
        QueueLog { log, used_ring }
    }

    /// The log, for buffers of chains.
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }

    /// Records that the used ring was written, which has `len` bytes: as a whole, since entries, index and avail_event take
    /// turns in a few pages. Between the write and the call there is a SeqCst fence.
    #[inline]
    pub fn mark_used_ring(&self, len: u64) {
        if let Some(start) = self.used_ring {
            self.log.mark(start, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    /// Numbers of the pages that are marked in the file, which are forgotten.
    fn take(file: &File) -> Vec<usize> {
        let mut bits = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&vec![0; bits.len()], 0).unwrap();
        (0..8 * bits.len()).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect()
    }

    #[test]
    fn pages_that_are_written_are_marked_and_no_others() {
        let file = file(8);
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 8).unwrap();
        log.mark(0, 0);
        log.mark(5 * LOG_PAGE, 0);
        assert_eq!(take(&file), [0; 0]);
        for (address, len, pages) in [
            (0, 1, 0..=0),
            (4095, 1, 0..=0),
            (4095, 2, 0..=1),
            (7 * LOG_PAGE, 4096, 7..=7),
            (7 * LOG_PAGE, 4097, 7..=8),
            (6 * LOG_PAGE + 5, 4 * LOG_PAGE, 6..=10),
            (3 * LOG_PAGE, 30 * LOG_PAGE, 3..=32),
            (0, 64 * LOG_PAGE, 0..=63),
        ] {
            log.mark(address, len);
            assert_eq!(take(&file), pages.collect::<Vec<_>>(), "{len} bytes at {address:#x}");
        }
    }

    #[test]
    fn what_lies_behind_the_log_is_left_out() {
        let file = file(4);
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 3).unwrap();
        log.mark(23 * LOG_PAGE, 3 * LOG_PAGE);
        assert_eq!(take(&file), [23]);
        for (address, len) in
            [(24 * LOG_PAGE, 1), (u64::MAX, 1), (u64::MAX - 1, u64::MAX), (1 << 63, 1 << 40)]
        {
            log.mark(address, len);
        }
        assert_eq!(take(&file), [0; 0]);
        assert!(log.has_overflowed.load(Ordering::Relaxed));
    }

    #[test]
    fn a_log_begins_at_its_offset_and_no_bit_is_lost() {
        let file = file(4096 + 2);
        let log = DirtyLog::map(file.try_clone().unwrap(), 4096, 2).unwrap();
        file.write_all_at(&[0x80], 4096).unwrap();
        log.mark(8 * LOG_PAGE, 1);
        log.mark(0, 1);
        assert_eq!(take(&file).iter().map(|page| page - 8 * 4096).collect::<Vec<_>>(), [0, 7, 8]);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_refused() {
        let short = |offset, size| DirtyLog::map(file(4096), offset, size);
        for (offset, size) in [(0, 4097), (4096, 1), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(
                matches!(short(offset, size), Err(LogError::Short { size: 4096, .. })),
                "{offset} {size}"
            );
        }
        assert!(matches!(short(8, 8), Err(LogError::Map { offset: 8, .. })));
        let directory = File::open("/").unwrap();
        assert!(matches!(DirtyLog::map(directory, 0, 4096), Err(LogError::Map { .. })));
        let read_only = tempfile::NamedTempFile::new().unwrap();
        read_only.as_file().set_len(4096).unwrap();
        let read_only = File::open(read_only.path()).unwrap();
        assert!(matches!(DirtyLog::map(read_only, 0, 4096), Err(LogError::Map { .. })));
    }

    #[test]
    fn a_used_ring_is_recorded_where_the_front_end_says() {
        let file = file(8);
        let log = Arc::new(DirtyLog::map(file.try_clone().unwrap(), 0, 8).unwrap());
        QueueLog::new(Arc::clone(&log), None).mark_used_ring(4096);
        assert_eq!(take(&file), [0; 0]);
        QueueLog::new(Arc::clone(&log), Some(20 * LOG_PAGE - 4)).mark_used_ring(4);
        assert_eq!(take(&file), [19]);
        QueueLog::new(Arc::clone(&log), Some(20 * LOG_PAGE - 4)).mark_used_ring(5);
        assert_eq!(take(&file), [19, 20]);
        QueueLog::new(log, Some(u64::MAX)).mark_used_ring(8);
    }
}
