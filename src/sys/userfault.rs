//! userfaultfd(2): whoever has the descriptor is told of each access of this process to a missing page of the memory that
//! is registered with it, and provides the page. The access waits.
//!
//! Accesses of the kernel on behalf of the process (preadv2(2) into guest memory) have to wait as well. Not every user may
//! ask for that: by /dev/userfaultfd who may open it, by the system call who has CAP_SYS_PTRACE, or everybody where
//! `vm.unprivileged_userfaultfd` is 1.

use std::ffi::c_long;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, Result, fcntl_dupfd_cloexec};

use super::{check_size, last_errno};

/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h, from which the following are as well.
const IOC_NEW: u32 = 0xaa00;
const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
const UFFDIO_WAKE: u32 = 0x8010_aa02;

/// Commands of ioctl(2) for such a descriptor, without that by which one is made.
pub const COMMANDS: [u32; 4] = [UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE];

/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_MISSING_SHMEM`.
const MISSING_SHMEM: u64 = 1 << 5;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `_UFFDIO_WAKE` and `_UFFDIO_COPY`, as bits: what has to be possible with registered memory.
const NEEDED: u64 = 1 << 2 | 1 << 3;

/// Bytes of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Address of the first one.
    pub start: u64,
    /// How many there are.
    pub len: u64,
}

/// A descriptor for the memory of this process, also if another process has it.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// A new one. A path is opened for it, so this is for a process that is not in its sandbox yet.
    pub fn open() -> Result<Userfault> {
        Userfault::by_device().or_else(|_| Userfault::by_call())
    }

    fn by_device() -> Result<Userfault> {
        let device = open(c"/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: the command takes flags and no pointer.
        let fd =
            unsafe { libc::syscall(libc::SYS_ioctl, device.as_raw_fd(), c_long::from(IOC_NEW), flags()) };
        Userfault::adopt(fd)
    }

    fn by_call() -> Result<Userfault> {
        // SAFETY: the call takes flags and no pointer.
        Userfault::adopt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags()) })
    }

    fn adopt(fd: c_long) -> Result<Userfault> {
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(last_errno)?;
        // SAFETY: the kernel has just given this descriptor to us.
        Ok(Userfault(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Agrees on the interface with the kernel, once. EOPNOTSUPP if it is for no shared memory.
    pub fn enable(&self) -> Result<()> {
        let mut api = [API, 0, 0];
        self.control(UFFDIO_API, &mut api)?;
        let [_, features, _] = api;
        if features & MISSING_SHMEM == 0 { Err(Errno::OPNOTSUPP) } else { Ok(()) }
    }

    /// A copy of the descriptor, for whoever provides the pages.
    pub fn copy(&self) -> Result<OwnedFd> {
        fcntl_dupfd_cloexec(&self.0, 0)
    }

    /// From now on accesses to missing pages wait. `memory` is a mapping of a memory file.
    pub fn register(&self, memory: Range) -> Result<()> {
        let mut argument = [memory.start, memory.len, MODE_MISSING, 0];
        self.control(UFFDIO_REGISTER, &mut argument)?;
        let [.., possible] = argument;
        if possible & NEEDED == NEEDED { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    /// From now on a missing page is one of zeros, as ever; accesses that wait go on.
    pub fn unregister(&self, memory: Range) -> Result<()> {
        self.control(UFFDIO_UNREGISTER, &mut [memory.start, memory.len])
    }

    /// Accesses that wait look once more for their page.
    pub fn wake(&self, memory: Range) -> Result<()> {
        self.control(UFFDIO_WAKE, &mut [memory.start, memory.len])
    }

    fn control(&self, command: u32, argument: &mut [u64]) -> Result<()> {
        let (fd, command) = (self.0.as_raw_fd(), c_long::from(command));
        // SAFETY: each command reads and writes a struct of as many 64-bit words as its caller passes.
        let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, command, argument.as_mut_ptr()) };
        check_size(isize::try_from(result).unwrap_or(-1)).map(drop)
    }
}

/// Reads do not wait: whoever reads from it may wait for other things as well.
fn flags() -> c_long {
    c_long::from(libc::O_CLOEXEC | libc::O_NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestRegionMmap};
    use vm_memory::{MemoryRegionAddress, MmapRegion};

    const PAGE: u64 = 4096;

    fn memory(pages: u64) -> (Arc<File>, GuestRegionMmap, Range) {
        let file = memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages * PAGE).unwrap();
        let file = Arc::new(File::from(file));
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let mapped = MmapRegion::from_file(offset, usize::try_from(pages * PAGE).unwrap()).unwrap();
        let range = Range { start: mapped.as_ptr() as u64, len: pages * PAGE };
        (file, GuestRegionMmap::new(mapped, GuestAddress(0)).unwrap(), range)
    }

    #[test]
    fn an_access_waits_for_its_page() {
        let faults = Userfault::open().expect("run the tests as root");
        faults.enable().unwrap();
        let (file, region, range) = memory(4);
        file.write_all_at(b"there", PAGE).unwrap();
        faults.register(range).unwrap();
        let mut there = [0; 5];
        region.read_slice(&mut there, MemoryRegionAddress(PAGE)).unwrap();
        assert_eq!(&there, b"there");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut late = [0; 5];
                region.read_slice(&mut late, MemoryRegionAddress(2 * PAGE)).unwrap();
                late
            });
            // It waits again each time.
            for _ in 0..5 {
                std::thread::sleep(std::time::Duration::from_millis(2));
                faults.wake(range).unwrap();
                assert!(!reader.is_finished());
            }
            let mut page = [0; 4096];
            page[..4].copy_from_slice(b"late");
            file.write_all_at(&page, 2 * PAGE).unwrap();
            faults.wake(range).unwrap();
            assert_eq!(&reader.join().unwrap(), b"late\0");
        });
        std::thread::scope(|scope| {
            let reader = scope
                .spawn(|| region.load::<u32>(MemoryRegionAddress(0), std::sync::atomic::Ordering::SeqCst));
            faults.unregister(range).unwrap();
            assert_eq!(reader.join().unwrap().unwrap(), 0);
        });
    }

    #[test]
    fn a_mapping_of_a_file_on_disk_cannot_be_registered() {
        let faults = Userfault::open().expect("run the tests as root");
        faults.enable().unwrap();
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(PAGE).unwrap();
        let mapped = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 4096).unwrap();
        let range = Range { start: mapped.as_ptr() as u64, len: PAGE };
        assert!(faults.register(range).is_err());
        let (_file, _region, range) = memory(1);
        assert_eq!(faults.register(Range { len: 100, ..range }), Err(Errno::INVAL));
    }
}
