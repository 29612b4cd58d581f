//! Memory that may run out.
//!
//! An allocation that fails ends a Rust program. What a guest makes grow asks here first, and is refused
//! while the host (RLIMIT_DATA, RLIMIT_AS, overcommit) gives no more than what requests in flight need.

use rustix::io::{Errno, Result};

/// Bytes that have to be there before anything grows: many times what one request takes. From 64 KiB on, glibc's
/// free(3) consolidates the heap each time.
const HEADROOM: usize = 48 << 10;

/// Bytes that have to be there before a thread is started: some stacks (two MiB each).
const FOR_THREADS: usize = 16 << 20;

/// ENOMEM unless there is memory for what a request may need. The allocator keeps what was asked for
/// here at hand for the same thread, so that this is cheap, and what follows succeeds.
pub fn ask_for_some() -> Result<()> {
    let mut probe = Vec::<u8>::new();
    probe.try_reserve_exact(HEADROOM).map_err(|_| Errno::NOMEM)?;
    // Else the compiler would see that nobody uses it.
    std::hint::black_box(&mut probe);
    Ok(())
}

/// ENOMEM unless there is memory for a thread, and for several that start at the same time.
///
/// The standard library cannot give back what it has begun: a thread that has a stack and gets no
/// memory for its signal stack ends the process.
pub fn ask_for_a_thread() -> Result<()> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at a place of the kernel's choice, which nobody uses, and which goes at once.
    unsafe {
        let room = libc::mmap(std::ptr::null_mut(), FOR_THREADS, access, kind, -1, 0);
        if room == libc::MAP_FAILED {
            return Err(Errno::NOMEM);
        }
        libc::munmap(room, FOR_THREADS);
    }
    ask_for_some()
}

/// Keeps a mapping out of core dumps: guest memory in a dump would be the guest's secrets on the host's disk, and a
/// process that is being dumped is not dead yet, so that nothing takes its place.
pub fn never_dump(start: *mut u8, len: usize) {
    // SAFETY: MADV_DONTDUMP changes nothing that a program can see. An address that is not mapped is an error, and then
    // the memory is dumped as ever.
    unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTDUMP) };
}

/// Keeps a mapping free of huge pages: the kernel would fill up what is missing of one with zeros. Without huge pages in the
/// kernel there is nothing to do.
pub fn without_huge_pages(start: *mut u8, len: usize) {
    // SAFETY: MADV_NOHUGEPAGE changes nothing that a program can see.
    unsafe { libc::madvise(start.cast(), len, libc::MADV_NOHUGEPAGE) };
}

/// `len` zeroed bytes in `buffer`; ENOMEM if they cannot be had.
pub fn resize(buffer: &mut Vec<u8>, len: usize) -> Result<()> {
    buffer.try_reserve(len.saturating_sub(buffer.len())).map_err(|_| Errno::NOMEM)?;
    buffer.resize(len, 0);
    Ok(())
}
