//! What the code below a request notes for the one who counts it, on the thread that serves it.

use std::cell::Cell;

use crate::sync::blocking;

thread_local! {
    static WRITERS: Cell<u32> = const { Cell::new(0) };
}

/// Notes of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Nanoseconds for which it waited for other requests: for ranges, locks or a listing.
    pub waited: u64,
    /// Writers of its file when it was let in, itself among them; 0 if it writes none in parallel.
    pub writers: u32,
}

/// The calling thread serves a writer of a file that `writers` write now, itself among them.
#[inline]
pub fn saw_writers(writers: usize) {
    WRITERS.set(u32::try_from(writers).unwrap_or(u32::MAX));
}

/// The notes of the request that this thread has served.
#[inline]
pub fn take() -> Notes {
    Notes { waited: blocking::take_waited(), writers: WRITERS.take() }
}
