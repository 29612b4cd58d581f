//! A file that is open without a descriptor.
//!
//! A lock of flock(2) belongs to the open file, and lasts as long as a descriptor or a mapping of it. A process that
//! shares its table of descriptors can so keep a lock to itself.

use std::ffi::c_void;
use std::fs::File;
use std::ptr::NonNull;

use rustix::io::{Errno, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Bytes of the mapping. It is never accessed, so that the file may be shorter.
const LEN: usize = 1;

/// An open file, which is closed when this is dropped.
#[derive(Debug)]
pub struct HeldFile(NonNull<c_void>);

// SAFETY: the mapping is never accessed.
unsafe impl Send for HeldFile {}
// SAFETY: the same.
unsafe impl Sync for HeldFile {}

impl HeldFile {
    /// Holds `file` open after its descriptor is closed. Children do not inherit it. Fails on file systems whose files
    /// cannot be mapped.
    pub fn new(file: &File) -> Result<HeldFile> {
        // SAFETY: the kernel chooses the address, so that nothing else is there.
        let start =
            unsafe { mmap(std::ptr::null_mut(), LEN, ProtFlags::empty(), MapFlags::PRIVATE, file, 0) }?;
        let held = HeldFile(NonNull::new(start).ok_or(Errno::NOMEM)?);
        // SAFETY: the advice changes nothing for this process.
        unsafe { madvise(start, LEN, Advice::LinuxDontFork) }?;
        Ok(held)
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        // SAFETY: nothing accesses the mapping.
        let _ = unsafe { munmap(self.0.as_ptr(), LEN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::TryLockError;

    #[test]
    fn a_lock_outlives_its_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || File::open(&path).unwrap();
        let file = open();
        file.try_lock().unwrap();
        let held = HeldFile::new(&file).unwrap();
        drop(file);
        assert!(matches!(open().try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        open().try_lock().unwrap();
    }
}
