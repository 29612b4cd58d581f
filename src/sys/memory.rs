//! Memory that may run out.
//!
//! An allocation that fails ends a Rust program. What a guest makes grow asks here first, and is refused
//! while the host (RLIMIT_DATA, RLIMIT_AS, overcommit) gives no more than what requests in flight need.

use rustix::io::{Errno, Result};

/// Bytes that have to be there before anything grows: many times what one request takes.
const HEADROOM: usize = 64 << 10;

/// ENOMEM unless there is memory for what a request may need. The allocator keeps what was asked for
/// here at hand for the same thread, so that this is cheap, and what follows succeeds.
pub fn ask_for_some() -> Result<()> {
    let mut probe = Vec::<u8>::new();
    probe.try_reserve_exact(HEADROOM).map_err(|_| Errno::NOMEM)?;
    // Else the compiler would see that nobody uses it.
    std::hint::black_box(&mut probe);
    Ok(())
}

/// `len` zeroed bytes in `buffer`; ENOMEM if they cannot be had.
pub fn resize(buffer: &mut Vec<u8>, len: usize) -> Result<()> {
    buffer.try_reserve(len.saturating_sub(buffer.len())).map_err(|_| Errno::NOMEM)?;
    buffer.resize(len, 0);
    Ok(())
}
