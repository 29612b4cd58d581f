//! The two ends of a request on the heap, each segment an allocation of its own: one byte too far
//! is a finding of AddressSanitizer.

use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use libc::iovec;

/// What unused room is filled with.
pub const FILLER: u8 = 0xa5;

/// One end of a request.
#[derive(Debug, Default)]
pub struct Buffers {
    segments: Vec<Box<[u8]>>,
    iov: Vec<iovec>,
}

impl Buffers {
    /// `bytes`, cut into segments as `cuts` says.
    pub fn new(bytes: &[u8], cuts: u8) -> Buffers {
        let mut buffers = Buffers::default();
        let mut rest = bytes;
        // Nearly equal pieces, up to 16 of them, the first longer or shorter by a few bytes.
        let pieces = usize::from(cuts & 15) + 1;
        let first = (bytes.len() / pieces + usize::from(cuts >> 4)).max(1);
        let mut next = first;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(next.min(rest.len()));
            buffers.segments.push(now.into());
            rest = later;
            next = (bytes.len() / pieces).max(1);
        }
        for segment in &mut buffers.segments {
            buffers.iov.push(iovec { iov_base: segment.as_mut_ptr().cast(), iov_len: segment.len() });
        }
        buffers
    }

    /// Room for `len` bytes.
    pub fn room(len: usize, cuts: u8) -> Buffers {
        Buffers::new(&vec![FILLER; len], cuts)
    }

    /// To be read from.
    pub fn reader(&mut self) -> GuestReader<'_> {
        // SAFETY: each vector is a heap allocation of `self`, which is borrowed for as long.
        unsafe { GuestReader::new(&mut self.iov) }
    }

    /// To be written to.
    pub fn writer(&mut self) -> GuestWriter<'_> {
        // SAFETY: each vector is a heap allocation of `self`, which is borrowed for as long.
        unsafe { GuestWriter::new(&mut self.iov) }
    }

    /// All bytes in one.
    pub fn contents(&self) -> Vec<u8> {
        self.segments.concat()
    }
}
