//! Guest memory as the readable and the writable part of a request: what it carries, and the room for its reply.
//!
//! Data goes between guest memory and host files by the addresses in here, not through a buffer of
//! ours, but for what one system call cannot take. The guest may change the bytes at any time, so they are only ever copied out once or
//! handed to the kernel, never borrowed as a Rust slice.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use rustix::io::{Errno, Result};

use super::check_size;

/// `IOV_MAX` of Linux: the most segments of one preadv(2).
const IOV_MAX: usize = 1024;
/// Of memory that is written with O_DIRECT: no block device wants more.
const ALIGNMENT: usize = 4096;

/// A list of segments with a front that moves.
#[derive(Debug)]
struct Segments<'a> {
    iov: &'a mut [iovec],
    len: usize,
}

// SAFETY: a segment is an address in a mapping that all threads share. Whoever made the list says how long the memory
// stays mapped, and not on which thread it is used.
unsafe impl Send for Segments<'_> {}

impl Segments<'_> {
    /// Drops `count` bytes at the front; `count` is at most `len`.
    fn advance(&mut self, mut count: usize) {
        self.len -= count.min(self.len);
        let iov = std::mem::take(&mut self.iov);
        let mut done = 0;
        for segment in iov.iter_mut() {
            if count < segment.iov_len {
                segment.iov_base = segment.iov_base.wrapping_byte_add(count);
                segment.iov_len -= count;
                break;
            }
            count -= segment.iov_len;
            done += 1;
        }
        self.iov = iov.get_mut(done..).unwrap_or_default();
    }

    /// Keeps the first `len` bytes only.
    fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        let mut left = len;
        let iov = std::mem::take(&mut self.iov);
        let mut keep = 0;
        for segment in iov.iter_mut() {
            if left == 0 {
                break;
            }
            segment.iov_len = segment.iov_len.min(left);
            left -= segment.iov_len;
            keep += 1;
        }
        self.iov = iov.get_mut(..keep).unwrap_or_default();
    }

    /// Whether one system call takes all.
    fn fits_one_call(&self) -> bool {
        self.iov.len() <= IOV_MAX
    }

    /// The same as the kernel's other interfaces take it.
    fn pieces(&self) -> (*const iovec, u32) {
        let count = self.iov.len().min(IOV_MAX);
        (self.iov.as_ptr(), u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// The front part that one system call takes: its segments and their bytes.
    fn head(&self) -> (*const iovec, i32) {
        let count = self.iov.len().min(IOV_MAX);
        (self.iov.as_ptr(), i32::try_from(count).unwrap_or(i32::MAX))
    }
}

/// The device-readable part of a chain, read from front to back.
#[derive(Debug)]
pub struct GuestReader<'a> {
    segments: Segments<'a>,
    _memory: PhantomData<&'a ()>,
}

/// The device-writable part of a chain, written from front to back.
#[derive(Debug)]
pub struct GuestWriter<'a> {
    segments: Segments<'a>,
    _memory: PhantomData<&'a ()>,
}

impl<'a> GuestReader<'a> {
    /// Wraps segments of mapped memory that the guest shares with us.
    ///
    /// # Safety
    /// Every segment lies in memory that stays mapped and readable during `'a`, and no Rust
    /// reference to it exists.
    pub unsafe fn new(iov: &'a mut [iovec]) -> GuestReader<'a> {
        let len = iov.iter().map(|segment| segment.iov_len).sum();
        GuestReader { segments: Segments { iov, len }, _memory: PhantomData }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.segments.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.segments.len == 0
    }

    /// Keeps the first `len` bytes only.
    pub fn truncate(&mut self, len: usize) {
        self.segments.truncate(len);
    }

    /// Drops `count` bytes at the front, all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        self.segments.advance(count);
    }

    /// Copies bytes from the front into `buffer`, and leaves them there; returns how many there were.
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        self.peek_at(0, buffer)
    }

    /// The same from `offset` on.
    pub fn peek_at(&self, offset: usize, buffer: &mut [u8]) -> usize {
        copy_in(self.segments.iov, offset, buffer)
    }

    /// Copies bytes from the front into `buffer` and moves on; returns how many there were.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let done = copy_in(self.segments.iov, 0, buffer);
        self.segments.advance(done);
        done
    }

    /// As [`GuestReader::write_to`], all in one system call: segments past the first `IOV_MAX` - 1 are
    /// copied together. Linux fits a request into the ring, and QEMU's rings have 1024 descriptors at
    /// most, so its guests never have as many.
    pub fn write_at_once_to(&mut self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> Result<usize> {
        if self.segments.fits_one_call() {
            return self.write_to(file, offset, flags);
        }
        let (front, rest) = self.segments.iov.split_at(IOV_MAX - 1);
        let len = rest.iter().map(|segment| segment.iov_len).sum::<usize>();
        let mut copy = Vec::new();
        copy.try_reserve_exact(len + ALIGNMENT).map_err(|_| Errno::NOMEM)?;
        // The host may write it with O_DIRECT.
        copy.resize(len + ALIGNMENT, 0);
        let start = copy.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let Some(copy) = copy.get_mut(start..start + len) else { return Err(Errno::NOMEM) };
        copy_in(rest, 0, copy);
        let mut iov = Vec::new();
        iov.try_reserve_exact(IOV_MAX).map_err(|_| Errno::NOMEM)?;
        iov.extend_from_slice(front);
        iov.push(iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: len });
        // SAFETY: all segments are mapped and readable (see `new`), and the last one is the copy, which
        // lives until the call has returned.
        let written = unsafe { GuestReader::new(&mut iov) }.write_to(file, offset, flags)?;
        self.segments.advance(written);
        Ok(written)
    }

    /// Whether one system call takes all.
    pub fn fits_one_call(&self) -> bool {
        self.segments.fits_one_call()
    }

    /// All segments.
    pub(super) fn segments(&self) -> &[iovec] {
        self.segments.iov
    }

    /// The segments that one system call takes, and how many they are.
    pub(super) fn pieces(&self) -> (*const iovec, u32) {
        self.segments.pieces()
    }

    /// pwritev2(2) from the front; moves on by what was written, and returns that. At most
    /// `IOV_MAX` segments go at once, so a short count is no error.
    pub fn write_to(&mut self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> Result<usize> {
        let offset = file_offset(offset)?;
        let (iov, count) = self.segments.head();
        // SAFETY: `iov` points to `count` segments that are mapped and readable (see `new`).
        let written = check_size(unsafe { libc::pwritev2(file.as_raw_fd(), iov, count, offset, flags) })?;
        self.segments.advance(written);
        Ok(written)
    }
}

impl<'a> GuestWriter<'a> {
    /// Wraps segments of mapped memory that the guest shares with us.
    ///
    /// # Safety
    /// Every segment lies in memory that stays mapped and writable during `'a`, and no Rust
    /// reference to it exists.
    pub unsafe fn new(iov: &'a mut [iovec]) -> GuestWriter<'a> {
        let len = iov.iter().map(|segment| segment.iov_len).sum();
        GuestWriter { segments: Segments { iov, len }, _memory: PhantomData }
    }

    /// Bytes of room left.
    pub fn len(&self) -> usize {
        self.segments.len
    }

    /// Whether no room is left.
    pub fn is_empty(&self) -> bool {
        self.segments.len == 0
    }

    /// Keeps the first `len` bytes of room only.
    pub fn truncate(&mut self, len: usize) {
        self.segments.truncate(len);
    }

    /// Takes the first `N` bytes of room off, to be filled later; `None` if there is less room.
    pub fn reserve<const N: usize>(&mut self) -> Option<Reserved<'a, N>> {
        if self.segments.len < N {
            return None;
        }
        if let Some(first) = self.segments.iov.first().copied().filter(|segment| segment.iov_len >= N) {
            self.segments.advance(N);
            return Some(Reserved { place: Place::One(first), _memory: PhantomData });
        }
        let mut iov = [EMPTY; N];
        let mut left = N;
        let filled = self.segments.iov.iter().filter(|segment| segment.iov_len > 0);
        for (slot, segment) in iov.iter_mut().zip(filled) {
            let len = segment.iov_len.min(left);
            *slot = iovec { iov_base: segment.iov_base, iov_len: len };
            left -= len;
        }
        self.segments.advance(N);
        Some(Reserved { place: Place::Many(iov), _memory: PhantomData })
    }

    /// Copies bytes to the front and moves on; returns how many found room.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let done = copy_out(self.segments.iov, bytes);
        self.segments.advance(done);
        done
    }

    /// Fills up to `count` bytes with zeros and moves on; returns how many found room.
    pub fn write_zeros(&mut self, count: usize) -> usize {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < count {
            let chunk = ZEROS.get(..count - done).unwrap_or(&ZEROS);
            match self.write(chunk) {
                0 => break,
                n => done += n,
            }
        }
        done
    }

    /// Takes all room that is left.
    pub fn take(&mut self) -> GuestWriter<'a> {
        let empty = Segments { iov: &mut [], len: 0 };
        GuestWriter { segments: std::mem::replace(&mut self.segments, empty), _memory: PhantomData }
    }

    /// Drops `count` bytes of room at the front, all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        self.segments.advance(count);
    }

    /// The segments that one system call takes, and how many they are.
    pub(super) fn pieces(&self) -> (*const iovec, u32) {
        self.segments.pieces()
    }

    /// Whether [`GuestWriter::read_from`] fills all that is left, if the file has as much.
    pub fn fits_one_call(&self) -> bool {
        self.segments.fits_one_call()
    }

    /// preadv2(2) to the front; moves on by what was read, and returns that. At most `IOV_MAX`
    /// segments go at once, so a short count says nothing about the end of the file.
    pub fn read_from(&mut self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> Result<usize> {
        let offset = file_offset(offset)?;
        let (iov, count) = self.segments.head();
        // SAFETY: `iov` points to `count` segments that are mapped and writable (see `new`).
        let read = check_size(unsafe { libc::preadv2(file.as_raw_fd(), iov, count, offset, flags) })?;
        self.segments.advance(read);
        Ok(read)
    }
}

/// Room for `N` bytes in guest memory that were set aside.
#[derive(Debug)]
pub struct Reserved<'a, const N: usize> {
    place: Place<N>,
    _memory: PhantomData<&'a ()>,
}

/// Where reserved bytes are.
#[derive(Debug)]
enum Place<const N: usize> {
    /// At the begin of one segment, as guests have it.
    One(iovec),
    /// In as many segments as there are bytes at most.
    Many([iovec; N]),
}

// SAFETY: as for the segments of a list.
unsafe impl<const N: usize> Send for Place<N> {}

impl<const N: usize> Reserved<'_, N> {
    /// Fills the room.
    pub fn fill(self, bytes: &[u8; N]) {
        match &self.place {
            Place::One(segment) => copy_out(std::slice::from_ref(segment), bytes),
            Place::Many(segments) => copy_out(segments, bytes),
        };
    }
}

const EMPTY: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Copies bytes of `iov` from `offset` on into `buffer`; returns how many there were.
fn copy_in(iov: &[iovec], mut offset: usize, buffer: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in iov {
        let skipped = segment.iov_len.min(offset);
        offset -= skipped;
        let count = (segment.iov_len - skipped).min(buffer.len() - done);
        if count == 0 && done == buffer.len() {
            break;
        }
        // SAFETY: the segment is mapped and readable (see `GuestReader::new`), the buffer has room for
        // `count` more bytes, and a private buffer never overlaps guest memory.
        unsafe {
            let to = buffer.as_mut_ptr().add(done);
            let from = segment.iov_base.cast::<u8>().cast_const().add(skipped);
            std::ptr::copy_nonoverlapping(from, to, count);
        }
        done += count;
    }
    done
}

/// Copies `bytes` over `iov` from its front; returns how many found room.
fn copy_out(iov: &[iovec], bytes: &[u8]) -> usize {
    let mut rest = bytes;
    for segment in iov {
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at(segment.iov_len.min(rest.len()));
        // SAFETY: the segment is mapped and writable (see `GuestWriter::new`), holds at least
        // `now.len()` bytes, and guest memory never overlaps a Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), segment.iov_base.cast::<u8>(), now.len()) };
        rest = later;
    }
    bytes.len() - rest.len()
}

/// `offset` as the kernel takes it; EINVAL past `i64::MAX`.
fn file_offset(offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::INVAL)
}
