//! A file whose contents are atomic integers, in a mapping that processes share.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The contents of such a file.
///
/// # Safety
///
/// The type is `repr(C)` and made of atomic integers only: any bytes are a valid value, and other processes may change
/// them at any time.
pub unsafe trait Shared: Sync {}

/// A `T` that lies in a file.
#[derive(Debug)]
pub struct Mapped<T: Shared>(NonNull<T>, PhantomData<T>);

// SAFETY: all that is reached is a `&T`.
unsafe impl<T: Shared> Send for Mapped<T> {}
// SAFETY: the same.
unsafe impl<T: Shared> Sync for Mapped<T> {}

impl<T: Shared> Mapped<T> {
    /// Maps the beginning of `file`, which the caller has made as long as a `T`. If somebody shortens it, the next access
    /// ends the process.
    pub fn new(file: impl AsFd) -> Result<Mapped<T>> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so that nothing else is there.
        let start = unsafe { mmap(ptr::null_mut(), size_of::<T>(), protection, MapFlags::SHARED, file, 0) }?;
        // A page is aligned for all that atomic integers need.
        Ok(Mapped(NonNull::new(start.cast()).ok_or(Errno::NOMEM)?, PhantomData))
    }
}

impl<T: Shared> Deref for Mapped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is as long as a `T` and lives as long as this; any bytes are a `T`, and all accesses are atomic.
        unsafe { self.0.as_ref() }
    }
}

impl<T: Shared> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: nothing is borrowed from the mapping any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast::<c_void>(), size_of::<T>()) };
    }
}
