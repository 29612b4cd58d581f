//! Windows: parts of files in shared writable mappings, into which guest memory is copied.
//!
//! How many a process has is bounded, and with it the address space and the page tables that they take: 8 bytes for each
//! page that was touched, 64 KiB for a window.

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::fault_copy::{Fault, Guarded};
use super::guest_buffers::GuestReader;
use super::memory::never_dump;

/// Bytes of a window, whose start is a multiple of them.
pub const WINDOW: u64 = 32 << 20;
/// Windows of a process: 16 GiB of address space, and 32 MiB of page tables if all of it is written.
pub const MAX_WINDOWS: usize = 512;

/// Windows that there are.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// How many windows the process has.
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// A part of a file in a mapping. It holds the file open until it is dropped.
#[derive(Debug)]
pub struct Window {
    start: NonNull<u8>,
    guarded: Guarded,
}

// SAFETY: the mapping is written by its address only, and whoever does says that nobody else writes the same bytes.
unsafe impl Send for Window {}
// SAFETY: the same.
unsafe impl Sync for Window {}

impl Window {
    /// Maps [`WINDOW`] bytes of `file`, which is open for reading and writing, from `index` times as many on. The file may end
    /// before. ENOBUFS if the process has enough windows.
    pub fn new(file: impl AsFd, index: u64) -> Result<Window> {
        let guarded = Guarded::new()?;
        if COUNT.fetch_add(1, Ordering::Relaxed) >= MAX_WINDOWS {
            COUNT.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::NOBUFS);
        }
        let start = map(file, index).inspect_err(|_| {
            COUNT.fetch_sub(1, Ordering::Relaxed);
        })?;
        never_dump(start.as_ptr(), LEN);
        Ok(Window { start, guarded })
    }

    /// Copies all of `data` to `at` and behind it, and leaves it there to be read again. The fault tells that a page cannot
    /// be had, or that the window ends before.
    ///
    /// Nobody but a program of the host or another daemon writes or reads the same bytes meanwhile: the caller has locked them.
    pub fn write(&self, at: u64, data: &GuestReader<'_>) -> std::result::Result<(), Fault> {
        let at = usize::try_from(at).map_err(|_| Fault)?;
        if at.checked_add(data.len()).is_none_or(|end| end > LEN) {
            return Err(Fault);
        }
        let mut to = self.start.as_ptr().wrapping_add(at);
        for segment in data.segments() {
            // SAFETY: the segment is mapped and readable (see `GuestReader::new`), and the target is inside this mapping, of
            // which there are no references.
            unsafe { self.guarded.copy(to, segment.iov_base.cast::<u8>().cast_const(), segment.iov_len) }?;
            to = to.wrapping_add(segment.iov_len);
        }
        Ok(())
    }
}

#[allow(clippy::cast_possible_truncation, reason = "all machines that are served have 64 bits")]
const LEN: usize = WINDOW as usize;

fn map(file: impl AsFd, index: u64) -> Result<NonNull<u8>> {
    let offset = index.checked_mul(WINDOW).ok_or(Errno::FBIG)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the address, so that nothing else is there.
    let start = unsafe { mmap(std::ptr::null_mut(), LEN, protection, MapFlags::SHARED, file, offset) }?;
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: nothing is copied any more, since that borrows the window.
        let _ = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), LEN) };
        COUNT.fetch_sub(1, Ordering::Relaxed);
    }
}
