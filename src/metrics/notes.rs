//! What the code below a request notes for the one who counts it, on the thread that serves it.

use std::cell::Cell;

use crate::sync::blocking;

thread_local! {
    /// Writers in the lower half, and how the write was made above, so that both are read at once.
    static NOTED: Cell<u64> = const { Cell::new(0) };
}

/// Where the upper half begins.
const MAPPED: u32 = u32::BITS;

/// How a write to a file was made that is written through mappings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapped {
    /// The file is not written so, or this is no write.
    #[default]
    No,
    /// It was copied into a window.
    Copied,
    /// It was made by pwritev2(2).
    FellBack,
}

/// Notes of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Nanoseconds for which it waited for other requests: for ranges, locks or a listing.
    pub waited: u64,
    /// Writers of its file when it was let in, itself among them; 0 if it writes none in parallel.
    pub writers: u32,
    /// How it was written.
    pub mapped: Mapped,
}

impl Notes {
    /// Those of a later part of the same request.
    #[inline]
    pub fn add(&mut self, later: Notes) {
        self.waited = self.waited.saturating_add(later.waited);
        self.writers = self.writers.max(later.writers);
        self.mapped = later.mapped;
    }
}

/// The calling thread serves a writer of a file that `writers` write now, itself among them.
#[inline]
pub fn saw_writers(writers: usize) {
    NOTED.set(u64::from(u32::try_from(writers).unwrap_or(u32::MAX)));
}

/// The calling thread has written a file that is written through mappings.
#[inline]
pub fn wrote_mapped(mapped: Mapped) {
    NOTED.set(NOTED.get() | (mapped as u64) << MAPPED);
}

/// The notes of the request that this thread has served.
#[inline]
pub fn take() -> Notes {
    let noted = NOTED.take();
    let mapped = match noted >> MAPPED {
        0 => Mapped::No,
        1 => Mapped::Copied,
        _ => Mapped::FellBack,
    };
    #[allow(clippy::cast_possible_truncation, reason = "it is the lower half")]
    let writers = noted as u32;
    Notes { waited: blocking::take_waited(), writers, mapped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_a_request_are_taken_once() {
        for mapped in [Mapped::No, Mapped::Copied, Mapped::FellBack] {
            saw_writers(usize::MAX);
            wrote_mapped(mapped);
            assert_eq!(take(), Notes { waited: 0, writers: u32::MAX, mapped });
            assert_eq!(take(), Notes::default());
        }
    }
}
