//! The guest's memory as the front end shares it: regions that come and go.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryRegion, GuestRegionMmap};

use super::SharedMemory;
use super::guest_memory::GuestMemoryMmap;
use crate::sys::memory::never_dump;

/// Why a region is refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// mmap(2) failed: not a memory file, or too short.
    #[error("guest memory at {address:#x} cannot be mapped; give the VM shared memory (share=on)")]
    Map {
        /// Guest-physical address.
        address: u64,
        /// What mmap(2) said.
        source: vhost::vhost_user::Error,
    },
    /// The file ends before the region: touching what is missing would end the daemon.
    #[error("guest memory at {0:#x} is longer than the file behind it")]
    Short(u64),
    /// fstat(2) failed.
    #[error("the file behind guest memory at {0:#x} cannot be looked at")]
    File(u64, #[source] Errno),
    /// The region wraps around or overlaps another.
    #[error("guest memory at {0:#x} overlaps another region or wraps around")]
    Overlap(u64),
    /// No such region.
    #[error("there is no region of guest memory at {0:#x}")]
    Missing(u64),
    /// An address of the front end that is in no region.
    #[error(
        "the front end's address {0:#x} is in no memory region that it shares; give the VM shared memory (share=on of QEMU's memory-backend-memfd, <access mode='shared'/> of libvirt)"
    )]
    Address(u64),
}

/// Maps addresses of the front end's process to guest-physical ones.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    user: u64,
    size: u64,
    guest: u64,
}

/// All regions that the front end shares.
pub struct MemoryTable {
    shared: SharedMemory,
    mappings: Vec<Mapping>,
    /// What replaces them with [`MemoryTable::commit`].
    staged: Option<(GuestMemoryMmap, Vec<Mapping>)>,
}

impl MemoryTable {
    /// A table without regions.
    pub fn new() -> MemoryTable {
        MemoryTable { shared: SharedMemory::new(GuestMemoryMmap::new()), mappings: Vec::new(), staged: None }
    }

    /// How many regions there are; each has a descriptor.
    pub fn regions(&self) -> usize {
        self.mappings.len()
    }

    /// The memory, for queues.
    pub fn shared(&self) -> &SharedMemory {
        &self.shared
    }

    /// Prepares to replace all regions (SET_MEM_TABLE): the new ones, in the same order.
    pub fn stage(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<Vec<Arc<GuestRegionMmap>>, MemoryError> {
        let mut mapped = Vec::with_capacity(regions.len());
        let mut mappings = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            mapped.push(Arc::new(map(region, file)?));
            mappings.push(mapping(region));
        }
        let in_order = mapped.clone();
        mapped.sort_by_key(|region| region.start_addr());
        let first = mappings.first().map_or(0, |mapping: &Mapping| mapping.guest);
        let memory = GuestMemoryMmap::from_arc_regions(mapped).map_err(|_| MemoryError::Overlap(first))?;
        self.staged = Some((memory, mappings));
        Ok(in_order)
    }

    /// Prepares to add a region (ADD_MEM_REG), which is returned: memory was plugged in.
    pub fn stage_more(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
    ) -> Result<Arc<GuestRegionMmap>, MemoryError> {
        self.commit();
        let mapped = Arc::new(map(region, file)?);
        let memory = self.shared.memory().insert_region(Arc::clone(&mapped));
        let memory = memory.map_err(|_| MemoryError::Overlap(region.guest_phys_addr))?;
        let mappings = self.mappings.iter().copied().chain([mapping(region)]).collect();
        self.staged = Some((memory, mappings));
        Ok(mapped)
    }

    /// Lets queues have what was prepared.
    pub fn commit(&mut self) {
        if let Some((memory, mappings)) = self.staged.take() {
            self.replace(memory);
            self.mappings = mappings;
        }
    }

    /// Removes a region (REM_MEM_REG). Requests in flight keep their mapping until they end.
    pub fn remove(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<(), MemoryError> {
        self.commit();
        let start = region.guest_phys_addr;
        let removed = self.shared.memory().remove_region(GuestAddress(start), region.memory_size);
        self.replace(removed.map_err(|_| MemoryError::Missing(start))?);
        self.mappings.retain(|mapping| mapping.guest != start);
        Ok(())
    }

    /// The guest-physical address of `user`, an address of the front end's process.
    pub fn guest_address(&self, user: u64) -> Result<u64, MemoryError> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = user.checked_sub(mapping.user).filter(|offset| *offset < mapping.size)?;
                mapping.guest.checked_add(offset)
            })
            .ok_or(MemoryError::Address(user))
    }

    fn replace(&self, memory: GuestMemoryMmap) {
        // Nobody panics while holding the lock, which only orders writers.
        let guard = self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        guard.replace(memory);
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let address = region.guest_phys_addr;
    let stat = rustix::fs::fstat(&file).map_err(|errno| MemoryError::File(address, errno))?;
    let end = region.mmap_offset.checked_add(region.memory_size);
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file && end.is_none_or(|end| end > u64::try_from(stat.st_size).unwrap_or(0)) {
        return Err(MemoryError::Short(address));
    }
    let mapped = region.mmap_region(file).map_err(|source| MemoryError::Map { address, source })?;
    never_dump(mapped.as_ptr(), mapped.size());
    GuestRegionMmap::new(mapped, GuestAddress(address)).ok_or(MemoryError::Overlap(address))
}

fn mapping(region: &VhostUserMemoryRegion) -> Mapping {
    Mapping { user: region.user_addr, size: region.memory_size, guest: region.guest_phys_addr }
}
