//! Memory files: records in a mapping that several processes share.

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::memory::never_dump;

/// A record of the file.
///
/// # Safety
///
/// The type is `repr(C)` and made of atomic integers only: any bytes are a valid value, and other processes may change
/// them at any time.
pub unsafe trait Record: Sync {}

// SAFETY: it is atomic.
unsafe impl Record for AtomicU32 {}
// SAFETY: the same.
unsafe impl Record for AtomicU64 {}

/// A memory file that is mapped as a whole. Its size never changes, and pages that nobody wrote take no memory.
#[derive(Debug)]
pub struct Mapping {
    file: OwnedFd,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is reached through records only, which are atomic.
unsafe impl Send for Mapping {}
// SAFETY: the same.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A new file of `len` zero bytes.
    pub fn create(name: &CStr, len: usize) -> Result<Mapping> {
        let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len as u64)?;
        // A worker that fails cannot make the others fail by SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Mapping::of(file, len)
    }

    /// The file of another process. The caller has checked its size.
    pub fn of(file: OwnedFd, len: usize) -> Result<Mapping> {
        let start = map(&file, len)?;
        never_dump(start.as_ptr(), len);
        Ok(Mapping { file, start, len })
    }

    /// The file.
    pub fn file(&self) -> impl AsFd {
        &self.file
    }

    /// `count` records from byte `offset` on, which are inside the file and aligned: an empty slice if not.
    #[inline]
    pub fn records<T: Record>(&self, offset: usize, count: usize) -> &[T] {
        let end = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > self.len) || !offset.is_multiple_of(align_of::<T>()) {
            return &[];
        }
        // SAFETY: the bytes are inside the mapping, which is aligned to pages and lives as long as the slice;
        // a record takes any bytes, and only atomic accesses are made of it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast(), count) }
    }
}

/// Maps `len` bytes of a file, to be shared with others.
pub(super) fn map(file: impl AsFd, len: usize) -> Result<NonNull<u8>> {
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
    // SAFETY: the kernel chooses the address, so that nothing else is there.
    let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }?;
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

/// Records of one kind in the file of `O`, which are found without a check of their place.
pub struct Table<T, O> {
    start: NonNull<T>,
    /// Their number less one; the number is a power of two.
    mask: usize,
    /// Keeps the mapping.
    owner: Arc<O>,
}

// SAFETY: records are atomic, and may be used by all threads.
unsafe impl<T: Record, O: Send + Sync> Send for Table<T, O> {}
// SAFETY: the same.
unsafe impl<T: Record, O: Send + Sync> Sync for Table<T, O> {}

impl<T: Record, O: AsRef<Mapping>> Table<T, O> {
    /// The `count` records from byte `offset` on. `None` if they are not inside the file, or no power of two.
    pub fn new(owner: Arc<O>, offset: usize, count: usize) -> Option<Table<T, O>> {
        let records = (*owner).as_ref().records::<T>(offset, count);
        if records.len() != count || !count.is_power_of_two() {
            return None;
        }
        let start = NonNull::from(records).cast();
        Some(Table { start, mask: count - 1, owner })
    }

    /// The record with this number, modulo their number.
    #[inline]
    pub fn get(&self, index: usize) -> &T {
        // SAFETY: `new` has got as many records from the owner's mapping, which lives as long as the owner, and never
        // moves. A record takes any bytes, and only atomic accesses are made of it.
        unsafe { self.start.add(index & self.mask).as_ref() }
    }

    /// Whose file it is.
    #[inline]
    pub fn owner(&self) -> &Arc<O> {
        &self.owner
    }
}

impl<T, O> Clone for Table<T, O> {
    fn clone(&self) -> Table<T, O> {
        Table { start: self.start, mask: self.mask, owner: Arc::clone(&self.owner) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: no record can be borrowed any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.len) };
    }
}
