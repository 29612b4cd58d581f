//! Guest memory between pages that nobody may touch, so that one byte too far is a crash.

use std::cell::OnceCell;
use std::ptr::null_mut;
use std::sync::Arc;

use lanefsd::device::GuestMemoryMmap;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

const PAGE: usize = 4096;

/// Memory with these regions (address and size in whole pages); the same at each call.
pub fn memory(regions: &[(u64, usize)]) -> &'static GuestMemoryMmap {
    thread_local! {
        static MEMORY: OnceCell<&'static GuestMemoryMmap> = const { OnceCell::new() };
    }
    MEMORY.with(|memory| *memory.get_or_init(|| Box::leak(Box::new(map(regions)))))
}

fn map(regions: &[(u64, usize)]) -> GuestMemoryMmap {
    let regions = regions.iter().map(|(address, size)| {
        let region = GuestRegionMmap::new(guarded(*size), GuestAddress(*address));
        Arc::new(region.expect("regions do not wrap"))
    });
    GuestMemoryMmap::from_arc_regions(regions.collect()).expect("regions do not overlap")
}

fn guarded(size: usize) -> MmapRegion {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, which is never unmapped; only its inner pages become accessible, and
    // they are whole pages that lie in it.
    unsafe {
        let all = libc::mmap(null_mut(), size + 2 * PAGE, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(all, libc::MAP_FAILED, "there is no memory");
        let inner = all.cast::<u8>().add(PAGE);
        assert_eq!(libc::mprotect(inner.cast(), size, prot), 0, "the pages are ours");
        MmapRegion::build_raw(inner, size, prot, flags).expect("whole pages")
    }
}
