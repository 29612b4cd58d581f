//! From a descriptor chain to the two ends of a request: one walk, and neighbours are merged.

use libc::iovec;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::ring::{DESCRIPTOR_SIZE, Layout};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// `VRING_DESC_F_NEXT`.
const NEXT: u16 = 1;
/// `VRING_DESC_F_WRITE`.
const WRITE: u16 = 2;
/// `VRING_DESC_F_INDIRECT`.
const INDIRECT: u16 = 4;
/// Most descriptors of an indirect table. Linux makes tables longer than the ring, so the ring's
/// size is no limit, but something has to end a walk.
const MAX_INDIRECT: u32 = 1 << 16;

/// Why a chain is malformed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// An index past the table's end.
    #[error("descriptor {0} is past the end of its table")]
    Index(u32),
    /// More descriptors than the table has: a loop.
    #[error("the chain is longer than its table; it has a loop")]
    Loop,
    /// A buffer or table that is not in guest memory.
    #[error("{len} bytes at {address:#x} are not in guest memory")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable buffer behind a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// An indirect table inside another, or with a next descriptor, or of a length that is no
    /// multiple of a descriptor's.
    #[error("an indirect table is malformed")]
    Indirect,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A descriptor table in guest memory.
#[derive(Clone, Copy, Debug)]
struct Table {
    address: u64,
    size: u32,
}

impl Table {
    fn read(self, memory: &GuestMemoryMmap, index: u32) -> Result<Descriptor, ChainError> {
        if index >= self.size {
            return Err(ChainError::Index(index));
        }
        let address = self.address.wrapping_add(u64::from(index) * DESCRIPTOR_SIZE);
        let raw: [u8; 16] =
            memory.read_obj(GuestAddress(address)).map_err(|_| ChainError::Memory { address, len: 16 })?;
        let raw = u128::from_le_bytes(raw);
        // The casts cut the fields out of the 16 bytes.
        #[allow(clippy::cast_possible_truncation, reason = "each field is one slice of the bytes")]
        Ok(Descriptor {
            address: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }
}

/// Room for the segments of one chain; kept by a worker so that no request allocates.
#[derive(Debug, Default)]
pub struct ChainBuffers {
    readable: Vec<iovec>,
    writable: Vec<iovec>,
}

impl ChainBuffers {
    /// Walks the chain that starts at descriptor `head` and gives its two ends.
    pub fn walk<'a>(
        &'a mut self,
        memory: &'a GuestMemoryMmap,
        ring: Layout,
        head: u16,
    ) -> Result<(GuestReader<'a>, GuestWriter<'a>), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let table = Table { address: ring.descriptors, size: u32::from(ring.size) };
        self.walk_table(memory, table, u32::from(head), true)?;
        // SAFETY: every segment was cut from a mapped region of `memory`, which lives during 'a
        // and is only ever accessed through raw pointers.
        unsafe { Ok((GuestReader::new(&mut self.readable), GuestWriter::new(&mut self.writable))) }
    }

    fn walk_table(
        &mut self,
        memory: &GuestMemoryMmap,
        table: Table,
        head: u32,
        indirect_allowed: bool,
    ) -> Result<(), ChainError> {
        let mut index = head;
        for _ in 0..table.size {
            let descriptor = table.read(memory, index)?;
            if descriptor.flags & INDIRECT != 0 {
                if !indirect_allowed || descriptor.flags & NEXT != 0 {
                    return Err(ChainError::Indirect);
                }
                return self.walk_table(memory, indirect_table(descriptor)?, 0, false);
            }
            self.add(memory, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next);
        }
        Err(ChainError::Loop)
    }

    /// Adds a buffer to its end of the chain; it may span regions of guest memory.
    fn add(&mut self, memory: &GuestMemoryMmap, descriptor: Descriptor) -> Result<(), ChainError> {
        let Descriptor { address, len, flags, .. } = descriptor;
        let segments = if flags & WRITE != 0 {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(ChainError::Order);
        };
        let outside = ChainError::Memory { address, len };
        let count = usize::try_from(len).map_err(|_| outside)?;
        for slice in GuestMemoryBackend::get_slices(memory, GuestAddress(address), count) {
            let slice = slice.map_err(|_| outside)?;
            append(segments, slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        Ok(())
    }
}

fn indirect_table(descriptor: Descriptor) -> Result<Table, ChainError> {
    let Descriptor { address, len, .. } = descriptor;
    if len == 0 || len % 16 != 0 || len / 16 > MAX_INDIRECT {
        return Err(ChainError::Indirect);
    }
    Ok(Table { address, size: len / 16 })
}

/// Adds a segment, or lengthens the last one if this begins where it ends.
fn append(segments: &mut Vec<iovec>, base: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    if let Some(last) = segments.last_mut()
        && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
    {
        last.iov_len += len;
        return;
    }
    segments.push(iovec { iov_base: base.cast(), iov_len: len });
}
