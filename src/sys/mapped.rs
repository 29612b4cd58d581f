//! A file whose contents are atomic integers, in a mapping that processes share.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::io::Result;
use rustix::mm::munmap;

use super::shared_map::{Record, map};

/// A `T` that lies in a file.
#[derive(Debug)]
pub struct Mapped<T: Record>(NonNull<T>, PhantomData<T>);

// SAFETY: all that is reached is a `&T`.
unsafe impl<T: Record> Send for Mapped<T> {}
// SAFETY: the same.
unsafe impl<T: Record> Sync for Mapped<T> {}

impl<T: Record> Mapped<T> {
    /// Maps the beginning of `file`, which the caller has made as long as a `T`. If somebody shortens it, the next access
    /// ends the process.
    pub fn new(file: impl AsFd) -> Result<Mapped<T>> {
        // A page is aligned for all that atomic integers need.
        Ok(Mapped(map(file, size_of::<T>())?.cast(), PhantomData))
    }
}

impl<T: Record> Deref for Mapped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is as long as a `T` and lives as long as this; any bytes are a `T`, and all accesses are atomic.
        unsafe { self.0.as_ref() }
    }
}

impl<T: Record> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: nothing is borrowed from the mapping any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast::<c_void>(), size_of::<T>()) };
    }
}
