//! From a descriptor chain to the readable and the writable part of a request: one walk, and neighbours are
//! merged.

use libc::iovec;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::GuestMemoryMmap;
use super::dirty_log::DirtyLog;
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
/// More bytes than a reply has, whose length is a 32-bit number. A chain may name the same page again and again, and
/// to record it takes time.
const MAX_WRITTEN: u64 = 1 << 32;

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
    /// The host has no memory for that many buffers.
    #[error("there is no memory for the buffers of the chain")]
    NoMemory,
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
#[derive(Debug)]
struct Table<'a> {
    memory: &'a GuestMemoryMmap,
    address: u64,
    size: u32,
    /// The whole table, if it lies in one region as it always does with Linux: then it has to be
    /// found only once.
    slice: Option<VolatileSlice<'a>>,
}

impl<'a> Table<'a> {
    fn new(memory: &'a GuestMemoryMmap, address: u64, size: u32) -> Table<'a> {
        let bytes = usize::try_from(u64::from(size) * DESCRIPTOR_SIZE).unwrap_or(usize::MAX);
        Table { memory, address, size, slice: memory.slice_of_one(address, bytes) }
    }

    // Out of line, with two callers, it costs 130 instructions a request.
    #[inline(always)]
    fn read(&self, index: u32) -> Result<Descriptor, ChainError> {
        if index >= self.size {
            return Err(ChainError::Index(index));
        }
        let offset = u64::from(index) * DESCRIPTOR_SIZE;
        let address = self.address.wrapping_add(offset);
        let outside = ChainError::Memory { address, len: 16 };
        let raw = match &self.slice {
            Some(table) => {
                let offset = usize::try_from(offset).map_err(|_| outside)?;
                table.get_ref::<u128>(offset).map_err(|_| outside)?.load()
            }
            None => self.memory.read_obj::<u128>(GuestAddress(address)).map_err(|_| outside)?,
        };
        let raw = u128::from_le(raw);
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

/// The segments of one chain. The room for them is used again, so that no request allocates.
#[derive(Debug, Default)]
pub struct ChainBuffers {
    readable: Vec<iovec>,
    writable: Vec<iovec>,
}

// SAFETY: a segment is an address in a mapping that all threads share. Whoever accesses the memory behind it
// says that it is still mapped ([`ChainBuffers::ends`]).
unsafe impl Send for ChainBuffers {}

impl ChainBuffers {
    /// Walks the chain that starts at descriptor `head`, and returns its readable and its writable part.
    pub fn walk<'a>(
        &'a mut self,
        memory: &'a GuestMemoryMmap,
        ring: Layout,
        head: u16,
    ) -> Result<(GuestReader<'a>, GuestWriter<'a>), ChainError> {
        self.collect(memory, ring, head)?;
        // SAFETY: the segments were taken from `memory`, which lives during 'a.
        Ok(unsafe { self.ends() })
    }

    /// Walks the chain that starts at descriptor `head`, and keeps its segments.
    pub fn collect(&mut self, memory: &GuestMemoryMmap, ring: Layout, head: u16) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        walk(memory, ring, head, |descriptor| self.add(memory, descriptor))
    }

    /// The same as [`ChainBuffers::walk`], of a chain that is not popped yet.
    // A walk of its own, so that the one of each request stays inlined.
    #[cold]
    #[inline(never)]
    pub fn peek<'a>(
        &'a mut self,
        memory: &'a GuestMemoryMmap,
        ring: Layout,
        head: u16,
    ) -> Result<(GuestReader<'a>, GuestWriter<'a>), ChainError> {
        self.readable.clear();
        self.writable.clear();
        walk(memory, ring, head, |descriptor| self.add(memory, descriptor))?;
        // SAFETY: the segments were taken from `memory`, which lives during 'a.
        Ok(unsafe { self.ends() })
    }

    /// Keeps so many bytes of the readable and of the writable part, at most.
    #[cold]
    pub fn truncate(&mut self, readable: usize, writable: usize) {
        for (segments, mut left) in [(&mut self.readable, readable), (&mut self.writable, writable)] {
            segments.retain_mut(|segment| {
                segment.iov_len = segment.iov_len.min(left);
                left -= segment.iov_len;
                segment.iov_len > 0
            });
        }
    }

    /// The readable and the writable part of the chain that was walked last.
    ///
    /// # Safety
    /// The memory of that walk stays mapped during `'a`.
    pub unsafe fn ends<'a>(&'a mut self) -> (GuestReader<'a>, GuestWriter<'a>) {
        // SAFETY: every segment lies in a region of the memory of the last walk, which is mapped during 'a,
        // and no Rust reference to guest memory exists.
        unsafe { (GuestReader::new(&mut self.readable), GuestWriter::new(&mut self.writable)) }
    }

    /// The same for a request that leaves this thread with the segments.
    ///
    /// # Safety
    /// As long as what is returned is there, the memory of that walk stays mapped, and nothing else is done with the
    /// segments, which are neither moved out of this nor dropped. (This may be moved.)
    pub unsafe fn ends_for_long(&mut self) -> (GuestReader<'static>, GuestWriter<'static>) {
        let [readable, writable] = [&mut self.readable, &mut self.writable].map(|segments| {
            // SAFETY: the segments are on the heap, where they stay when the vector is moved.
            unsafe { std::slice::from_raw_parts_mut(segments.as_mut_ptr(), segments.len()) }
        });
        // SAFETY: as in `ends`.
        unsafe { (GuestReader::new(readable), GuestWriter::new(writable)) }
    }

    /// Adds a buffer to its part of the chain; it may span regions of guest memory.
    // With two callers it would not be inlined.
    #[inline(always)]
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
        if let Some(slice) = memory.slice_of_one(address, count) {
            append(segments, slice.ptr_guard_mut().as_ptr(), slice.len())?;
            return Ok(());
        }
        for slice in GuestMemoryBackend::get_slices(memory, GuestAddress(address), count) {
            let slice = slice.map_err(|_| outside)?;
            append(segments, slice.ptr_guard_mut().as_ptr(), slice.len())?;
        }
        Ok(())
    }
}

/// Records in `log` that the writable part of a chain was written.
///
/// Of a chain that is malformed from some descriptor on, what comes before it is recorded: the device has written no part
/// of such a chain. Between the write and the call there is a SeqCst fence.
#[inline(never)]
pub fn mark_writable(memory: &GuestMemoryMmap, ring: Layout, head: u16, log: &DirtyLog) {
    let mut left = MAX_WRITTEN;
    let _ = walk(memory, ring, head, |Descriptor { address, len, flags, .. }| {
        if flags & WRITE != 0 {
            log.mark(address, u64::from(len).min(left));
            left = left.saturating_sub(len.into());
        }
        Ok(())
    });
}

/// Calls `visit` for each buffer of the chain that starts at descriptor `head`.
#[inline]
fn walk(
    memory: &GuestMemoryMmap,
    ring: Layout,
    head: u16,
    mut visit: impl FnMut(Descriptor) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let table = Table::new(memory, ring.descriptors, u32::from(ring.size));
    match walk_table(&table, u32::from(head), &mut visit)? {
        None => Ok(()),
        Some(descriptor) => match walk_table(&indirect_table(memory, descriptor)?, 0, &mut visit)? {
            None => Ok(()),
            Some(_) => Err(ChainError::Indirect),
        },
    }
}

/// The same for one table; returns the descriptor of an indirect table if the chain goes on there.
#[inline]
fn walk_table(
    table: &Table<'_>,
    head: u32,
    visit: &mut impl FnMut(Descriptor) -> Result<(), ChainError>,
) -> Result<Option<Descriptor>, ChainError> {
    let mut index = head;
    for _ in 0..table.size {
        let descriptor = table.read(index)?;
        if descriptor.flags & INDIRECT != 0 {
            return if descriptor.flags & NEXT != 0 {
                Err(ChainError::Indirect)
            } else {
                Ok(Some(descriptor))
            };
        }
        visit(descriptor)?;
        if descriptor.flags & NEXT == 0 {
            return Ok(None);
        }
        index = u32::from(descriptor.next);
    }
    Err(ChainError::Loop)
}

fn indirect_table(memory: &GuestMemoryMmap, descriptor: Descriptor) -> Result<Table<'_>, ChainError> {
    let Descriptor { address, len, .. } = descriptor;
    if len == 0 || len % 16 != 0 || len / 16 > MAX_INDIRECT {
        return Err(ChainError::Indirect);
    }
    Ok(Table::new(memory, address, len / 16))
}

/// Adds a segment, or lengthens the last one if this begins where it ends.
#[inline(always)]
fn append(segments: &mut Vec<iovec>, base: *mut u8, len: usize) -> Result<(), ChainError> {
    if len == 0 {
        return Ok(());
    }
    if let Some(last) = segments.last_mut()
        && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
    {
        last.iov_len += len;
        return Ok(());
    }
    // What a worker has once needed it keeps.
    segments.try_reserve(1).map_err(|_| ChainError::NoMemory)?;
    segments.push(iovec { iov_base: base.cast(), iov_len: len });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RING: Layout = Layout { descriptors: 0x1000, available: 0, used: 0, size: 8 };

    fn memory() -> GuestMemoryMmap {
        // Two regions that meet at 0x10000, and a hole behind them.
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x1000)]).unwrap()
    }

    fn put(memory: &GuestMemoryMmap, table: u64, index: u64, entry: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = entry;
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        memory.write_obj(raw.to_le_bytes(), GuestAddress(table + index * 16)).unwrap();
    }

    fn walk(memory: &GuestMemoryMmap, head: u16) -> Result<(usize, usize), ChainError> {
        let mut buffers = ChainBuffers::default();
        buffers.walk(memory, RING, head).map(|(reader, writer)| (reader.len(), writer.len()))
    }

    #[test]
    fn splits_readable_from_writable() {
        let memory = memory();
        put(&memory, 0x1000, 3, (0x2000, 40, NEXT, 0));
        put(&memory, 0x1000, 0, (0x5000, 8, NEXT, 7));
        put(&memory, 0x1000, 7, (0x3000, 16, WRITE | NEXT, 1));
        put(&memory, 0x1000, 1, (0x4000, 100, WRITE, 0));
        assert_eq!(walk(&memory, 3), Ok((48, 116)));
    }

    #[test]
    fn merges_neighbours_within_and_across_regions() {
        let memory = memory();
        put(&memory, 0x1000, 0, (0x2000, 0x1000, NEXT, 1));
        put(&memory, 0x1000, 1, (0x3000, 0x800, NEXT, 2));
        put(&memory, 0x1000, 2, (0x8000, 4, 0, 0));
        let mut buffers = ChainBuffers::default();
        buffers.walk(&memory, RING, 0).unwrap();
        assert_eq!(buffers.readable.iter().map(|s| s.iov_len).collect::<Vec<_>>(), [0x1800, 4]);
        put(&memory, 0x1000, 0, (0xff00, 0x200, WRITE, 0));
        assert_eq!(walk(&memory, 0), Ok((0, 0x200)));
    }

    #[test]
    fn follows_an_indirect_table() {
        let memory = memory();
        put(&memory, 0x1000, 0, (0x2000, 10, NEXT, 1));
        put(&memory, 0x1000, 1, (0x6000, 32, INDIRECT, 0));
        put(&memory, 0x6000, 0, (0x4000, 20, NEXT, 1));
        put(&memory, 0x6000, 1, (0x5000, 30, WRITE, 0));
        assert_eq!(walk(&memory, 0), Ok((30, 30)));
    }

    #[test]
    fn refuses_what_the_specification_forbids() {
        let memory = memory();
        assert_eq!(walk(&memory, 8), Err(ChainError::Index(8)));
        put(&memory, 0x1000, 0, (0x2000, 1, NEXT, 0));
        assert_eq!(walk(&memory, 0), Err(ChainError::Loop));
        put(&memory, 0x1000, 0, (0x2000, 1, NEXT, 9));
        assert_eq!(walk(&memory, 0), Err(ChainError::Index(9)));
        put(&memory, 0x1000, 0, (0x2000, 1, NEXT | WRITE, 1));
        put(&memory, 0x1000, 1, (0x2000, 1, 0, 0));
        assert_eq!(walk(&memory, 0), Err(ChainError::Order));
        for (address, len) in [(0x11000, 1), (0x10fff, 2), (u64::MAX, 1), (u64::MAX, 2), (0, u32::MAX)] {
            put(&memory, 0x1000, 0, (address, len, 0, 0));
            assert_eq!(walk(&memory, 0), Err(ChainError::Memory { address, len }));
        }
        for (len, flags) in [(0, 0), (8, 0), (17, 0), (16, NEXT)] {
            put(&memory, 0x1000, 0, (0x6000, len, INDIRECT | flags, 1));
            assert_eq!(walk(&memory, 0), Err(ChainError::Indirect));
        }
        put(&memory, 0x1000, 0, (0x6000, 16, INDIRECT, 0));
        put(&memory, 0x6000, 0, (0x6000, 16, INDIRECT, 0));
        assert_eq!(walk(&memory, 0), Err(ChainError::Indirect));
    }

    #[test]
    fn the_writable_part_of_a_chain_is_in_the_log() {
        use std::os::unix::fs::FileExt;

        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, 4).unwrap();
        let pages = |head| {
            mark_writable(&memory, RING, head, &log);
            let mut bits = [0; 4];
            file.read_exact_at(&mut bits, 0).unwrap();
            file.write_all_at(&[0; 4], 0).unwrap();
            (0..32).filter(|page| u32::from_le_bytes(bits) >> page & 1 == 1).collect::<Vec<_>>()
        };
        put(&memory, 0x1000, 0, (0x2000, 0x1000, NEXT, 1));
        put(&memory, 0x1000, 1, (0x5ff0, 0x20, WRITE | NEXT, 2));
        put(&memory, 0x1000, 2, (0xff00, 0x200, WRITE, 0));
        assert_eq!(pages(0), [5, 6, 15, 16]);
        put(&memory, 0x1000, 3, (0x6000, 32, INDIRECT, 0));
        put(&memory, 0x6000, 0, (0x4000, 20, NEXT, 1));
        put(&memory, 0x6000, 1, (0x9000, 0x1001, WRITE, 0));
        assert_eq!(pages(3), [9, 10]);
        assert_eq!(pages(9), [0; 0], "there is no such descriptor");
        // A loop is not walked for ever, and what lies outside memory harms nobody.
        put(&memory, 0x1000, 0, (0, u32::MAX, WRITE | NEXT, 0));
        assert_eq!(pages(0).len(), 32);
        put(&memory, 0x1000, 0, (u64::MAX, u32::MAX, WRITE, 0));
        assert_eq!(pages(0), [0; 0]);
    }

    proptest! {
        /// Whatever the table contains, a walk ends, and both parts lie in memory.
        #[test]
        fn any_table_is_walked(table: [[u8; 16]; 8], small in proptest::collection::vec(0u64..0x11000, 8), head: u16) {
            let memory = memory();
            for (i, (raw, address)) in table.iter().zip(small).enumerate() {
                let mut raw = *raw;
                if raw[15] < 200 {
                    // Mostly plausible entries, or nearly all chains end at their first one.
                    raw[..8].copy_from_slice(&address.to_le_bytes());
                    raw[9..12].fill(0);
                    raw[13..16].fill(0);
                    raw[12] &= 3;
                    raw[14] &= 7;
                }
                memory.write_slice(&raw, GuestAddress(0x1000 + 16 * i as u64)).unwrap();
            }
            if let Ok((readable, writable)) = walk(&memory, head % 10) {
                prop_assert!(readable + writable <= 8 * 0x11000);
            }
        }

        /// A request reads the same however it is cut into descriptors.
        #[test]
        fn any_split_reads_the_same(bytes in proptest::collection::vec(any::<u8>(), 1..200), cuts in proptest::collection::vec(1usize..60, 7)) {
            let memory = memory();
            let mut rest = bytes.as_slice();
            let mut address = 0x3000;
            for (i, cut) in (0u16..8).zip(cuts.iter().copied().chain([usize::MAX])) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                memory.write_slice(now, GuestAddress(address)).unwrap();
                let flags = if later.is_empty() { 0 } else { NEXT };
                put(&memory, 0x1000, u64::from(i), (address, u32::try_from(now.len()).unwrap(), flags, i + 1));
                address += now.len() as u64 + u64::from(i % 2);
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let mut buffers = ChainBuffers::default();
            let (mut reader, _) = buffers.walk(&memory, RING, 0).unwrap();
            let mut read = vec![0; bytes.len() + 1];
            prop_assert_eq!(reader.read(&mut read), bytes.len());
            prop_assert_eq!(&read[..bytes.len()], bytes.as_slice());
            prop_assert!(reader.is_empty());
        }
    }
}
