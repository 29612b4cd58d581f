//! Guest memory: memfd regions that the back end maps too, and an allocator for buffers in them.
//!
//! Addresses are guest-physical. The allocator keeps a free list per power of two: a run of a
//! million requests ends with as much memory in use as it began with, and allocation stays cheap.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Error, Result};

/// Size of a guest page in bytes.
pub const PAGE: usize = 4096;
const SMALLEST_CLASS: usize = 64;
const CLASSES: usize = 40;

/// One mapping of guest memory.
#[derive(Debug)]
pub struct Region {
    guest: u64,
    size: usize,
    file: File,
    host: NonNull<u8>,
    /// Whether there is a copy.
    copied: AtomicBool,
    /// What a destination of a migration has: what this process writes at once, and what the device writes page by page.
    copy: Mutex<Vec<u8>>,
}

// SAFETY: the mapping lives as long as the Region, and all access goes through raw copies and
// atomics, as the device on the other side changes the same bytes at any time anyway.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Creates a zeroed region of `size` bytes at guest-physical address `guest`.
    pub fn new(guest: u64, size: usize) -> Result<Arc<Region>> {
        // SAFETY: the name is a NUL-terminated string.
        let fd = unsafe { libc::memfd_create(c"lanefsd-frontend".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::system("create a memfd for guest memory")(std::io::Error::last_os_error()));
        }
        // SAFETY: memfd_create returned this descriptor and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size as u64).map_err(Error::system(format!("size guest memory to {size} bytes")))?;
        // SAFETY: a fresh shared mapping of a file that is `size` bytes long.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        match NonNull::new(host.cast::<u8>()) {
            Some(host) if host.as_ptr().cast() != libc::MAP_FAILED => Ok(Arc::new(Region {
                guest,
                size,
                file,
                host,
                copied: AtomicBool::new(false),
                copy: Mutex::default(),
            })),
            _ => Err(Error::system(format!("map {size} bytes of guest memory"))(
                std::io::Error::last_os_error(),
            )),
        }
    }

    /// Guest-physical address of the first byte.
    pub fn guest_address(&self) -> u64 {
        self.guest
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Address of the first byte in this process, as vhost-user messages carry it.
    pub fn user_address(&self) -> u64 {
        self.host.as_ptr() as u64
    }

    /// The memfd behind the region; its first byte is the region's first byte.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "access outside guest memory");
        // SAFETY: offset <= size, so the pointer stays inside the mapping or one past its end.
        unsafe { self.host.as_ptr().add(offset) }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; Rust memory and the mapping do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
        self.copy_own(offset, bytes);
    }

    /// Brings the copy up to date with what this process has written.
    fn copy_own(&self, offset: usize, bytes: &[u8]) {
        if self.copied.load(Ordering::Relaxed)
            && let Some(copy) = self.copy().get_mut(offset..offset + bytes.len())
        {
            copy.copy_from_slice(bytes);
        }
    }

    /// Makes a copy of the region, as it is now.
    pub fn begin_copy(&self) {
        let mut copy = self.copy();
        self.copied.store(true, Ordering::SeqCst);
        copy.resize(self.size, 0);
        self.read(0, &mut copy);
    }

    /// Copies one page again.
    pub fn copy_page(&self, page: usize) {
        let range = page * PAGE..((page + 1) * PAGE).min(self.size);
        let mut copy = self.copy();
        self.read(range.start, &mut copy[range]);
    }

    /// Numbers of the pages that differ from their copies.
    pub fn stale_pages(&self) -> Vec<usize> {
        let (mut now, mut stale) = (vec![0; 64 * PAGE], Vec::new());
        for (block, copy) in self.copy().chunks(64 * PAGE).enumerate() {
            let now = &mut now[..copy.len()];
            self.read(block * 64 * PAGE, now);
            // Mostly they are the same.
            if now != copy {
                let pages = now.chunks(PAGE).zip(copy.chunks(PAGE)).enumerate();
                stale.extend(pages.filter(|(_, (now, copy))| now != copy).map(|(page, _)| block * 64 + page));
            }
        }
        stale
    }

    /// Drops the copy.
    pub fn end_copy(&self) {
        self.copied.store(false, Ordering::SeqCst);
        *self.copy() = Vec::new();
    }

    fn copy(&self) -> MutexGuard<'_, Vec<u8>> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the file behind the region shorter or longer; whoever touches what is gone gets SIGBUS.
    pub fn resize_file(&self, size: usize) -> Result<()> {
        self.file.set_len(size as u64).map_err(Error::system("resize guest memory"))
    }

    /// Takes the content away, as it is: no page is there afterwards.
    pub fn take_content(&self) -> Result<Vec<u8>> {
        let mut content = vec![0; self.size];
        self.file.read_exact_at(&mut content, 0).map_err(Error::system("read guest memory"))?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a plain system call on our own file.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, 0, self.size as i64) } {
            0 => Ok(content),
            _ => Err(Error::system("take guest memory away")(std::io::Error::last_os_error())),
        }
    }

    /// Takes the word at `offset`, and leaves 0.
    pub(crate) fn take_u64(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8), "words are aligned");
        let at = self.at(offset, 8);
        // SAFETY: in range, aligned, and alive as long as the region.
        unsafe { AtomicU64::from_ptr(at.cast()) }.swap(0, Ordering::AcqRel)
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; Rust memory and the mapping do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2), "ring indices are aligned");
        let at = self.at(offset, 2);
        // SAFETY: in range, aligned, and alive as long as the region.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping; nothing points into it any more.
        unsafe { libc::munmap(self.host.as_ptr().cast(), self.size) };
    }
}

#[derive(Debug, Default)]
struct Heap {
    /// Per region: the first byte that was never handed out.
    fresh: Vec<(Arc<Region>, usize)>,
    /// Per power of two: blocks that came back.
    free: Vec<Vec<(Arc<Region>, usize)>>,
}

/// The guest's memory: one or more regions and the buffers in them.
#[derive(Debug)]
pub struct Memory {
    regions: RwLock<Vec<Arc<Region>>>,
    heap: Mutex<Heap>,
    in_use: AtomicUsize,
}

impl Memory {
    /// Guest memory of one region of `size` bytes at address 0x10_0000.
    pub fn new(size: usize) -> Result<Arc<Memory>> {
        Memory::with_regions(&[(0x10_0000, size)])
    }

    /// Guest memory of several regions, each `(guest address, size)`; gaps between them are allowed.
    /// Buffers come from the regions in turn, so that every region is used.
    pub fn with_regions(regions: &[(u64, usize)]) -> Result<Arc<Memory>> {
        let memory = Arc::new(Memory {
            regions: RwLock::default(),
            heap: Mutex::new(Heap { fresh: Vec::new(), free: vec![Vec::new(); CLASSES] }),
            in_use: AtomicUsize::new(0),
        });
        for &(guest, size) in regions {
            memory.add_region(guest, size)?;
        }
        Ok(memory)
    }

    /// Adds a region (memory hot-plug). The back end does not know it until it is told.
    pub fn add_region(&self, guest: u64, size: usize) -> Result<Arc<Region>> {
        let region = Region::new(guest, size)?;
        self.regions.write().unwrap_or_else(PoisonError::into_inner).push(region.clone());
        self.heap().fresh.push((region.clone(), 0));
        Ok(region)
    }

    /// Takes a region out (hot-unplug): no new buffer comes from it; buffers that live there stay valid
    /// on the front end's side.
    pub fn remove_region(&self, guest: u64) -> Option<Arc<Region>> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let at = regions.iter().position(|region| region.guest == guest)?;
        let gone = regions.remove(at);
        let mut heap = self.heap();
        heap.fresh.retain(|(region, _)| !Arc::ptr_eq(region, &gone));
        for class in &mut heap.free {
            class.retain(|(region, _)| !Arc::ptr_eq(region, &gone));
        }
        Some(gone)
    }

    /// The regions, as they are to be told to the back end.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes in buffers that are alive, rounded up as the allocator does.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }

    /// A buffer of `len` bytes; page-aligned from a page up, else aligned to its size rounded up to
    /// a power of two. Its content is whatever was there.
    pub fn allocate(self: &Arc<Self>, len: usize) -> Result<Buffer> {
        let class = len.max(SMALLEST_CLASS).next_power_of_two();
        let (region, offset) = self.heap().take(class).ok_or(Error::OutOfMemory(len))?;
        self.in_use.fetch_add(class, Ordering::Relaxed);
        Ok(Buffer { memory: self.clone(), region, offset, len })
    }

    /// A buffer of `len` zero bytes.
    pub fn allocate_zeroed(self: &Arc<Self>, len: usize) -> Result<Buffer> {
        let buffer = self.allocate(len)?;
        buffer.fill(0);
        Ok(buffer)
    }

    /// A buffer in the region that starts at `guest`, for tests that need a certain region.
    pub fn allocate_in(self: &Arc<Self>, guest: u64, len: usize) -> Result<Buffer> {
        let class = len.max(SMALLEST_CLASS).next_power_of_two();
        let (region, offset) =
            self.heap().take_fresh(class, |region| region.guest == guest).ok_or(Error::OutOfMemory(len))?;
        self.in_use.fetch_add(class, Ordering::Relaxed);
        Ok(Buffer { memory: self.clone(), region, offset, len })
    }

    /// A buffer of `len` zero bytes in a region of its own at `guest`, laid out so that its first `head` bytes end where a
    /// page ends: the rest can be hidden from the device ([`Buffer::hide`]).
    pub fn allocate_hideable(self: &Arc<Self>, guest: u64, head: usize, len: usize) -> Result<Buffer> {
        let pages = head.next_multiple_of(PAGE);
        let region = Region::new(guest, pages + (len - head).next_multiple_of(PAGE))?;
        self.regions.write().unwrap_or_else(PoisonError::into_inner).push(region.clone());
        self.in_use.fetch_add(len.max(SMALLEST_CLASS).next_power_of_two(), Ordering::Relaxed);
        Ok(Buffer { memory: self.clone(), region, offset: pages - head, len })
    }

    fn heap(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heap {
    fn take(&mut self, class: usize) -> Option<(Arc<Region>, usize)> {
        let index = class.trailing_zeros() as usize;
        if let Some(block) = self.free.get_mut(index)?.pop() {
            return Some(block);
        }
        let block = self.take_fresh(class, |_| true)?;
        // Take turns, so that requests touch all regions.
        self.fresh.rotate_left(1);
        Some(block)
    }

    fn take_fresh(&mut self, class: usize, wanted: impl Fn(&Region) -> bool) -> Option<(Arc<Region>, usize)> {
        let align = class.min(PAGE);
        self.fresh.iter_mut().filter(|(region, _)| wanted(region)).find_map(|(region, fresh)| {
            let offset = fresh.next_multiple_of(align);
            (offset + class <= region.size).then(|| {
                *fresh = offset + class;
                (region.clone(), offset)
            })
        })
    }
}

/// A piece of guest memory, given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl Buffer {
    /// Guest-physical address.
    pub fn address(&self) -> u64 {
        self.region.guest + self.offset as u64
    }

    /// Address in the front end's process, as SET_VRING_ADDR wants it.
    pub fn user_address(&self) -> u64 {
        self.region.user_address() + self.offset as u64
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `bytes` to `offset`. Panics outside the buffer.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        self.region.write(self.offset + offset, bytes);
    }

    /// Copies from `offset` into `bytes`. Panics outside the buffer.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        self.region.read(self.offset + offset, bytes);
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        let at = self.region.at(self.offset, self.len);
        // SAFETY: `at` checked the range.
        unsafe { std::ptr::write_bytes(at, byte, self.len) }
        if self.region.copied.load(Ordering::Relaxed) {
            self.region.copy_own(self.offset, &vec![byte; self.len]);
        }
    }

    /// Stores the aligned 16-bit word at `offset`, for ring indices.
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.atomic_u16(offset).store(value, order);
        self.region.copy_own(self.offset + offset, &value.to_ne_bytes());
    }

    /// The aligned 16-bit word at `offset`, for ring indices.
    pub fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        self.check(offset, 2);
        self.region.atomic_u16(self.offset + offset)
    }

    /// Hides what follows the first page boundary in the buffer, and all that lies behind it in its region: whoever
    /// touches that, this process too, gets SIGBUS until [`Buffer::show`].
    pub fn hide(&self) -> Result<()> {
        self.resize((self.offset + 1).next_multiple_of(PAGE))
    }

    /// Ends [`Buffer::hide`]. What was hidden is zero.
    pub fn show(&self) -> Result<()> {
        self.resize(self.region.size)
    }

    fn resize(&self, size: usize) -> Result<()> {
        self.region.resize_file(size)
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "access of {len} bytes at {offset} in a buffer of {}",
            self.len
        );
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let class = self.len.max(SMALLEST_CLASS).next_power_of_two();
        self.memory.in_use.fetch_sub(class, Ordering::Relaxed);
        let mut heap = self.memory.heap();
        // A block of an unplugged region must not come back into use.
        if heap.fresh.iter().any(|(region, _)| Arc::ptr_eq(region, &self.region))
            && let Some(list) = heap.free.get_mut(class.trailing_zeros() as usize)
        {
            list.push((self.region.clone(), self.offset));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_reused_and_aligned() {
        let memory = Memory::new(1 << 20).unwrap();
        let small = memory.allocate(100).unwrap();
        assert_eq!(small.address() % 128, 0);
        let page = memory.allocate(5000).unwrap();
        assert_eq!(page.address() % PAGE as u64, 0);
        let was = page.address();
        drop(page);
        assert_eq!(memory.allocate(8192).unwrap().address(), was);
        drop(small);
        assert_eq!(memory.in_use(), 0);
    }

    #[test]
    fn memory_ends() {
        let memory = Memory::new(PAGE).unwrap();
        let all = memory.allocate(PAGE).unwrap();
        assert!(matches!(memory.allocate(1), Err(Error::OutOfMemory(1))));
        drop(all);
        memory.allocate(PAGE).unwrap();
    }

    #[test]
    fn an_unplugged_region_gives_no_buffers() {
        let memory = Memory::with_regions(&[(0, PAGE), (1 << 30, PAGE)]).unwrap();
        let first = memory.allocate_in(1 << 30, 64).unwrap();
        assert_eq!(first.address(), 1 << 30);
        memory.remove_region(1 << 30).unwrap();
        drop(first);
        assert!(memory.allocate_in(1 << 30, 64).is_err());
        for _ in 0..4 {
            assert!(memory.allocate(64).unwrap().address() < 1 << 30);
        }
    }
}
