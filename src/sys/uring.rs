//! A ring of io_uring that can do nothing but read and write files.
//!
//! What io_uring does is seen by no seccomp filter. So a ring is made before the filter, and with it a list of what may
//! be submitted to it, READV and WRITEV, which nobody can change any more ([`Uring::new`]). Afterwards the process
//! needs io_uring_enter(2) alone.
//!
//! A ring outlives the process that has submitted to it: the table of descriptors is shared with the supervisor, and
//! a disk writes what it was given, whoever has died. A thread in pwritev2(2) is waited for by whoever waits for its
//! process; nothing waits for a ring. So the next process looks at the rings that it finds, before it serves anything
//! ([`wait_for_strays`]).

use std::io::{self, Error};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use log::warn;
use rustix::fs::{Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::exec::keep;
use super::guest_buffers::{GuestReader, GuestWriter};
use super::inherited::adopt;

/// What the kernel calls a ring in /proc.
const NAME: &[u8] = b"anon_inode:[io_uring]";
/// Between two looks at a ring of another process.
const PAUSE: Duration = Duration::from_millis(1);
/// After which a wait for it is worth a message.
const LONG: Duration = Duration::from_secs(1);

/// A ring.
pub struct Uring {
    ring: IoUring,
}

/// What is to be read or written.
#[derive(Debug)]
pub enum Data<'a> {
    /// A file is read into this.
    Read(GuestWriter<'a>),
    /// This is written to a file.
    Write(GuestReader<'a>),
}

impl Data<'_> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        match self {
            Data::Read(data) => data.len(),
            Data::Write(data) => data.len(),
        }
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops `count` bytes at the front, which were read or written.
    pub fn advance(&mut self, count: usize) {
        match self {
            Data::Read(data) => data.skip(count),
            Data::Write(data) => data.skip(count),
        }
    }

    /// The system call itself, on the calling thread.
    pub fn transfer(&mut self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> rustix::io::Result<usize> {
        match self {
            Data::Read(data) => data.read_from(file, offset, flags),
            Data::Write(data) => data.write_to(file, offset, flags),
        }
    }
}

/// What came of something that was submitted.
#[derive(Clone, Copy, Debug)]
pub struct Completed {
    /// What it was submitted with.
    pub tag: u64,
    /// Bytes, or an error.
    pub result: rustix::io::Result<usize>,
}

impl Uring {
    /// A ring of which `entries` requests can be in flight.
    pub fn new(entries: u32) -> io::Result<Uring> {
        let ring = match IoUring::builder().setup_r_disabled().setup_coop_taskrun().build(entries) {
            // Before Linux 5.19.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_r_disabled().build(entries)?
            }
            ring => ring?,
        };
        // No flags of an entry and no further registrations are allowed, as none is named.
        let mut allowed = [opcode::Readv::CODE, opcode::Writev::CODE].map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        // A program that goes on in the place of this one's parent waits for it, too.
        keep(ring.as_raw_fd())?;
        Ok(Uring { ring })
    }

    /// Its descriptor, which is readable while something is completed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring is open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Puts a request into the ring; false if there is no room. [`Uring::submit`] is to follow. EINVAL of an offset that
    /// no file has.
    ///
    /// # Safety
    /// The segments of `data`, and the memory behind them, stay where they are until the request is completed. Not more
    /// requests are in flight than the ring has entries.
    pub unsafe fn push(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        flags: i32,
        data: &Data<'_>,
        tag: u64,
    ) -> rustix::io::Result<bool> {
        let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?.cast_unsigned();
        let file = Fd(file.as_raw_fd());
        let entry: squeue::Entry = match data {
            Data::Read(data) => {
                let (iov, count) = data.pieces();
                opcode::Readv::new(file, iov, count).offset(offset).rw_flags(flags).build()
            }
            Data::Write(data) => {
                let (iov, count) = data.pieces();
                opcode::Writev::new(file, iov, count).offset(offset).rw_flags(flags).build()
            }
        };
        // SAFETY: the caller says so.
        Ok(unsafe { self.ring.submission().push(&entry.user_data(tag)) }.is_ok())
    }

    /// Hands the kernel what is in the ring. It may leave a part there; whoever calls this has to call it again.
    pub fn submit(&mut self) -> rustix::io::Result<bool> {
        if self.ring.submission().is_empty() {
            return Ok(true);
        }
        let submitted = self.ring.submit();
        let is_empty = self.ring.submission().is_empty();
        match submitted {
            Ok(_) => Ok(is_empty),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }

    /// Takes out what is completed.
    pub fn reap(&mut self, mut each: impl FnMut(Completed)) {
        for entry in self.ring.completion() {
            let result = match entry.result() {
                errno @ -4095..0 => Err(Errno::from_raw_os_error(errno.saturating_neg())),
                count => usize::try_from(count).map_err(|_| Errno::IO),
            };
            each(Completed { tag: entry.user_data(), result });
        }
    }
}

/// Waits until nothing is in flight any more in rings among `fds`, which a process has left open that has died. Each
/// request that the kernel has taken completes once, and whether it did is in the ring. As long as storage does not answer,
/// this waits, as the end of a process waits for its threads.
pub fn wait_for_strays(fds: impl IntoIterator<Item = RawFd>) -> io::Result<()> {
    let rings: Vec<RawFd> = strays(fds)?;
    if rings.is_empty() {
        return Ok(());
    }
    let offsets = Offsets::of_this_kernel()?;
    for ring in rings {
        let (counts, begun, mut told) = (Counts::of(ring, offsets)?, Instant::now(), false);
        while counts.in_flight() > 0 {
            if !told && begun.elapsed() > LONG {
                told = true;
                warn!("waiting for {} requests of the worker process that has died", counts.in_flight());
            }
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// The rings among descriptors.
fn strays(fds: impl IntoIterator<Item = RawFd>) -> io::Result<Vec<RawFd>> {
    let directory = openat(rustix::fs::CWD, c"/proc/self/fd", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let is_ring = |fd: &RawFd| {
        readlinkat(&directory, fd.to_string(), Vec::new()).is_ok_and(|name| name.to_bytes() == NAME)
    };
    Ok(fds.into_iter().filter(is_ring).collect())
}

/// Where a ring has its counts, in bytes.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    taken: usize,
    dropped: usize,
    completed: usize,
}

/// `struct io_uring_params` in words of 32 bits.
const PARAMETERS: usize = 30;
/// Words of it: the offset of the head of the submission queue, of its count of dropped entries, and of the tail of the
/// completion queue.
const SQ_HEAD: usize = 10;
const SQ_DROPPED: usize = 15;
const CQ_TAIL: usize = 21;
/// All counts are in the first page, in all versions of Linux.
const PAGE: usize = 4096;

impl Offsets {
    /// The kernel tells by the making of a ring.
    fn of_this_kernel() -> io::Result<Offsets> {
        let mut parameters = [0u32; PARAMETERS];
        // SAFETY: the kernel reads and writes the parameters, which are as long as it expects.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if ring < 0 {
            return Err(Error::last_os_error());
        }
        let _ring: OwnedFd = adopt(RawFd::try_from(ring).unwrap_or(-1))?;
        let at = |word: usize| {
            let offset = parameters.get(word).and_then(|offset| usize::try_from(*offset).ok());
            offset.filter(|offset| *offset <= PAGE - 4 && offset % 4 == 0).ok_or(Error::from(Errno::PROTO))
        };
        Ok(Offsets { taken: at(SQ_HEAD)?, dropped: at(SQ_DROPPED)?, completed: at(CQ_TAIL)? })
    }
}

/// The counts of a ring of another process.
struct Counts {
    page: *mut std::ffi::c_void,
    offsets: Offsets,
}

impl Counts {
    fn of(ring: RawFd, offsets: Offsets) -> io::Result<Counts> {
        // SAFETY: borrowed for one system call only; a descriptor that is not open answers EBADF.
        let ring = unsafe { BorrowedFd::borrow_raw(ring) };
        // SAFETY: a new mapping, which nothing else uses.
        let page = unsafe {
            mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, ring, 0)?
        };
        Ok(Counts { page, offsets })
    }

    /// Requests that the kernel has taken and not completed.
    fn in_flight(&self) -> u32 {
        // What is completed is read first: what the kernel takes meanwhile is nobody's, since nobody submits.
        let completed = self.at(self.offsets.completed);
        self.at(self.offsets.taken).wrapping_sub(self.at(self.offsets.dropped)).wrapping_sub(completed)
    }

    fn at(&self, offset: usize) -> u32 {
        // SAFETY: the offset is inside the page and a multiple of four; the kernel stores whole words.
        unsafe { (*self.page.cast::<u8>().add(offset).cast::<AtomicU32>()).load(Ordering::Acquire) }
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and used by nothing else. It fails only for what is not mapped.
        let _ = unsafe { munmap(self.page, PAGE) };
    }
}

#[cfg(test)]
mod tests;
