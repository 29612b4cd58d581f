//! One split virtqueue in guest memory (virtio 1.3, section 2.7), as the device sees it.
//!
//! [`virtio_queue::Queue`] holds the state, adds used entries and decides about notifications. What it does not offer
//! stands here: the number of available chains (an index that runs away is an error with both numbers), the place of an
//! address that is not in memory, chains that are put back, the guest's wish for no notifications without EVENT_IDX, and
//! with EVENT_IDX an avail_event by which the guest does not kick; and taking a chain whose index was checked already.
//! docs/upstream.md has the reports.
//!
//! The guest may write anything at any time. Every access is checked by the memory map, and no value read from the
//! guest is used as an index before it was checked.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Error as VirtqError, Queue as Virtqueue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::GuestMemoryMmap;
use super::dirty_log::QueueLog;

/// Largest ring that virtio allows, in descriptors.
pub const MAX_SIZE: u16 = 32_768;
/// Bytes of one descriptor.
pub const DESCRIPTOR_SIZE: u64 = 16;
/// `VRING_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// Offset of the first entry in both rings, behind flags and index.
const ENTRIES: u64 = 4;
/// Bytes of one entry of the available ring.
const AVAIL_ENTRY: u64 = 2;
/// Bytes of one entry of the used ring.
const USED_ENTRY: u64 = 8;
/// Bytes of avail_event, behind the entries of the used ring.
const AVAIL_EVENT: u64 = 2;

/// What a guest can do to its own ring.
#[derive(Debug, Error)]
pub enum RingError {
    /// A ring address has no memory behind it.
    #[error("the ring at {address:#x} is not in guest memory")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// What the memory map says.
        source: GuestMemoryError,
    },
    /// The available index is more than a ring ahead.
    #[error("the available index {available} is more than {size} past {next}")]
    Runaway {
        /// The guest's index.
        available: u16,
        /// Ours.
        next: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// An available chain begins with a descriptor that does not exist.
    #[error("descriptor {head} is available, and there are {size}")]
    Head {
        /// The guest's index.
        head: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A chain is available that was not given back.
    #[error("descriptor {head} is available, and its chain is in flight")]
    InFlight {
        /// The guest's index.
        head: u16,
    },
    /// Size, addresses or state are such as virtio forbids.
    #[error("the ring is unusable: {0}")]
    Virtqueue(VirtqError),
}

type Result<T> = std::result::Result<T, RingError>;

/// Where the parts of a ring are: guest-physical addresses, and the number of descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring, written by the guest.
    pub available: u64,
    /// Used ring, written by us.
    pub used: u64,
    /// Number of descriptors: 1 to [`MAX_SIZE`]; a power of two.
    pub size: u16,
}

/// The device's side of a ring: its place and both indices.
#[derive(Debug)]
pub struct Ring {
    queue: Virtqueue,
    /// Used entries were added since the guest was last considered for a notification.
    added: bool,
    /// Kicks were refused and not enabled since: nothing is stored for that once more, since a worker that
    /// polls refuses them again and again, and each store takes the cache line from the guest.
    kicks_refused: bool,
    /// Where writes are recorded while the guest migrates.
    log: Option<QueueLog>,
}

impl Ring {
    /// A ring that goes on at `next_available`. The used index is where the guest's memory says,
    /// since vhost-user hands over only one of the two.
    pub fn new(
        memory: &GuestMemoryMmap,
        layout: Layout,
        next_available: u16,
        event_idx: bool,
    ) -> Result<Ring> {
        check_range(memory, layout)?;
        let mut queue = Virtqueue::new(MAX_SIZE).map_err(RingError::Virtqueue)?;
        queue
            .try_set_size(layout.size)
            .and_then(|()| queue.try_set_desc_table_address(GuestAddress(layout.descriptors)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(layout.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(layout.used)))
            .map_err(RingError::Virtqueue)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(next_available);
        let used = queue.used_idx(memory, Ordering::Acquire).map_err(|error| at(layout.used, error))?;
        queue.set_next_used(used.0);
        queue.set_ready(true);
        Ok(Ring { queue, added: false, kicks_refused: false, log: None })
    }

    /// Where the ring is.
    pub fn layout(&self) -> Layout {
        Layout {
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            size: self.queue.size(),
        }
    }

    /// Records writes in this log from now on, or no more. The used ring is recorded at once: a process that has died may
    /// have written it and not recorded that.
    pub fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log;
        self.mark();
    }

    /// Where writes are recorded, if they are.
    #[inline]
    pub fn log(&self) -> Option<&QueueLog> {
        self.log.as_ref()
    }

    /// Records that the used ring was written, if writes are recorded.
    #[inline]
    fn mark(&self) {
        if let Some(log) = &self.log {
            fence(Ordering::SeqCst);
            self.mark_in(log);
        }
    }

    #[inline(never)]
    fn mark_in(&self, log: &QueueLog) {
        log.mark_used_ring(ENTRIES + u64::from(self.queue.size()) * USED_ENTRY + AVAIL_EVENT);
    }

    /// Index of the next chain to take; what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Index of the next used entry.
    pub fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Goes on with the chain of this index.
    pub fn set_next_available(&mut self, next_available: u16) {
        self.queue.set_next_avail(next_available);
    }

    /// Makes it that chains were not taken. They have to be those that were taken last, in any order:
    /// false if they are not.
    pub fn put_back(&mut self, memory: &GuestMemoryMmap, heads: &[u16]) -> Result<bool> {
        let Ok(count) = u16::try_from(heads.len()) else { return Ok(false) };
        let first = self.queue.next_avail().wrapping_sub(count);
        let mut heads = heads.to_vec();
        for distance in 0..count {
            let head = self.head(memory, first.wrapping_add(distance))?;
            let Some(place) = heads.iter().position(|other| *other == head) else { return Ok(false) };
            heads.swap_remove(place);
        }
        self.queue.set_next_avail(first);
        Ok(true)
    }

    /// Number of available chains that were not popped.
    pub fn avail_len(&self, memory: &GuestMemoryMmap) -> Result<u16> {
        let available = self.queue.avail_idx(memory, Ordering::Acquire);
        let available = available.map_err(|error| at(self.queue.avail_ring(), error))?.0;
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        let len = available.wrapping_sub(next);
        if len > size { Err(RingError::Runaway { available, next, size }) } else { Ok(len) }
    }

    /// Takes the next chain: the index of its first descriptor. Only after [`Ring::avail_len`] said that
    /// there is one. The crate's iterator would load and check the available index once more, which takes 122
    /// instructions, 3 % of a GETATTR.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<u16> {
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        let head = self.head(memory, next)?;
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(head)
    }

    /// The index of the first descriptor of the next chain, which is not taken. Only after [`Ring::avail_len`] said that there
    /// is one; the guest may change it before [`Ring::pop`].
    pub fn peek(&self, memory: &GuestMemoryMmap) -> Result<u16> {
        let size = self.queue.size();
        let head = self.head(memory, self.queue.next_avail())?;
        if head >= size { Err(RingError::Head { head, size }) } else { Ok(head) }
    }

    /// The first descriptor of the chain with this index, unchecked.
    fn head(&self, memory: &GuestMemoryMmap, index: u16) -> Result<u16> {
        let slot = u64::from(index % self.queue.size().max(1));
        load(memory, self.queue.avail_ring(), ENTRIES + slot * AVAIL_ENTRY)
    }

    /// Gives a chain back: `written` bytes of its device-writable part are valid.
    pub fn add_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<()> {
        self.added = true;
        let added = self.queue.add_used(memory, head, written);
        self.mark();
        added.map_err(|error| at(self.queue.used_ring(), error))
    }

    /// Whether the guest wants a notification for the entries that were added since the last call.
    pub fn needs_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        if !std::mem::take(&mut self.added) {
            return Ok(false);
        }
        let available = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory).map_err(|error| at(available, error));
        }
        // The used index must be visible before the guest's flags are read (2.7.7.2).
        fence(Ordering::SeqCst);
        Ok(load(memory, available, 0)? & NO_INTERRUPT == 0)
    }

    /// Whether kicks are refused, until [`Ring::enable_notification`].
    pub fn has_refused_kicks(&self) -> bool {
        self.kicks_refused
    }

    /// Makes the guest kick when it makes the next chain available. Returns whether one came just before, for
    /// which there is no kick.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        self.kicks_refused = false;
        let enabled = self.queue.enable_notification(memory);
        if let Some(log) = &self.log {
            // A fence follows the write already.
            self.mark_in(log);
        }
        enabled.map_err(|error| at(self.queue.used_ring(), error))
    }

    /// Kicks are not needed for now. With EVENT_IDX an avail_event that was passed says that by itself.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if self.queue.event_idx_enabled() { Ok(()) } else { self.refuse_kicks(memory) }
    }

    /// Takes back that the guest was asked to kick, until [`Ring::enable_notification`].
    pub fn refuse_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if std::mem::replace(&mut self.kicks_refused, true) {
            return Ok(());
        }
        if !self.queue.event_idx_enabled() {
            let disabled = self.queue.disable_notification(memory);
            self.mark();
            return disabled.map_err(|error| at(self.queue.used_ring(), error));
        }
        // avail_event, with an index that the guest has passed already.
        let value = self.queue.next_avail().wrapping_sub(1);
        let offset = ENTRIES + u64::from(self.queue.size()) * USED_ENTRY;
        let address = self.queue.used_ring().wrapping_add(offset);
        let stored = memory.store(value.to_le(), GuestAddress(address), Ordering::Relaxed);
        self.mark();
        stored.map_err(|source| RingError::Memory { address, source })
    }
}

/// Refuses a ring outside memory at its start, with its address: `QueueT::is_valid` knows it and logs it only.
fn check_range(memory: &GuestMemoryMmap, layout: Layout) -> Result<()> {
    for (address, bytes) in [
        (layout.descriptors, DESCRIPTOR_SIZE * u64::from(layout.size)),
        (layout.available, ENTRIES + AVAIL_ENTRY * u64::from(layout.size) + 2),
        (layout.used, ENTRIES + USED_ENTRY * u64::from(layout.size) + AVAIL_EVENT),
    ] {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        if !memory.check_range(GuestAddress(address), len) {
            let source = GuestMemoryError::InvalidGuestAddress(GuestAddress(address));
            return Err(RingError::Memory { address, source });
        }
    }
    Ok(())
}

/// An error of the crate, which does not say where in guest memory it is: at `address`.
#[cold]
fn at(address: u64, error: VirtqError) -> RingError {
    match error {
        VirtqError::GuestMemory(source) => RingError::Memory { address, source },
        other => RingError::Virtqueue(other),
    }
}

fn load(memory: &GuestMemoryMmap, base: u64, offset: u64) -> Result<u16> {
    let address = base.wrapping_add(offset);
    memory
        .load(GuestAddress(address), Ordering::Acquire)
        .map(u16::from_le)
        .map_err(|source| RingError::Memory { address, source })
}

#[cfg(test)]
mod tests;
