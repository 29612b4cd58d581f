//! One split virtqueue in guest memory (virtio 1.3, section 2.7), as the device sees it.
//!
//! The guest may write anything at any time. Every access is checked by the memory map, and no
//! value read from the guest is used as an index before it was checked.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::GuestMemoryMmap;

/// Largest ring that virtio allows, in descriptors.
pub const MAX_SIZE: u16 = 32_768;
/// Bytes of one descriptor.
pub const DESCRIPTOR_SIZE: u64 = 16;
/// `VRING_USED_F_NO_NOTIFY` and `VRING_AVAIL_F_NO_INTERRUPT`.
const SUPPRESS: u16 = 1;
/// Offset of the index in both rings; the flags stand at 0.
const INDEX: u64 = 2;
/// Offset of the first entry in both rings.
const ENTRIES: u64 = 4;
/// Bytes of one entry of the available ring.
const AVAIL_ENTRY: u64 = 2;
/// Bytes of one entry of the used ring.
const USED_ENTRY: u64 = 8;

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
    layout: Layout,
    event_idx: bool,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the guest was last considered for a notification.
    signalled_used: u16,
    /// What the guest was told last about kicks: the value of avail_event or of the used ring's flags.
    told_of_kicks: Option<u16>,
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
        let mut ring =
            Ring { layout, event_idx, next_available, next_used: 0, signalled_used: 0, told_of_kicks: None };
        ring.next_used = ring.load(memory, layout.used, INDEX)?;
        ring.signalled_used = ring.next_used;
        // Touch what will be used, so that a ring outside memory is refused at its start.
        ring.load(memory, layout.available, INDEX)?;
        for (address, bytes) in [
            (layout.descriptors, DESCRIPTOR_SIZE * u64::from(layout.size)),
            (layout.available, ENTRIES + AVAIL_ENTRY * u64::from(layout.size) + 2),
            (layout.used, ENTRIES + USED_ENTRY * u64::from(layout.size) + 2),
        ] {
            let len = usize::try_from(bytes).unwrap_or(usize::MAX);
            if !memory.check_range(GuestAddress(address), len) {
                let source = GuestMemoryError::InvalidGuestAddress(GuestAddress(address));
                return Err(RingError::Memory { address, source });
            }
        }
        Ok(ring)
    }

    /// Where the ring is.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Index of the next chain to take; what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Index of the next used entry.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Goes on with the chain of this index.
    pub fn go_on_at(&mut self, next_available: u16) {
        self.next_available = next_available;
    }

    /// Makes it that chains were not taken. They have to be those that were taken last, in any order:
    /// false if they are not.
    pub fn put_back(&mut self, memory: &GuestMemoryMmap, heads: &[u16]) -> Result<bool> {
        let Ok(count) = u16::try_from(heads.len()) else { return Ok(false) };
        let first = self.next_available.wrapping_sub(count);
        let mut heads = heads.to_vec();
        for distance in 0..count {
            let head = self.head(memory, first.wrapping_add(distance))?;
            let Some(place) = heads.iter().position(|other| *other == head) else { return Ok(false) };
            heads.swap_remove(place);
        }
        self.next_available = first;
        Ok(true)
    }

    /// Chains that the guest has made available and nobody has taken.
    pub fn waiting(&self, memory: &GuestMemoryMmap) -> Result<u16> {
        let available = self.load(memory, self.layout.available, INDEX)?;
        let waiting = available.wrapping_sub(self.next_available);
        if waiting > self.layout.size {
            let (next, size) = (self.next_available, self.layout.size);
            return Err(RingError::Runaway { available, next, size });
        }
        Ok(waiting)
    }

    /// Takes the next chain: the index of its first descriptor, unchecked. Only after
    /// [`Ring::waiting`] said that there is one.
    pub fn take(&mut self, memory: &GuestMemoryMmap) -> Result<u16> {
        let head = self.head(memory, self.next_available)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// The first descriptor of the chain with this index, unchecked.
    fn head(&self, memory: &GuestMemoryMmap, index: u16) -> Result<u16> {
        let slot = u64::from(index % self.layout.size.max(1));
        self.load(memory, self.layout.available, ENTRIES + slot * AVAIL_ENTRY)
    }

    /// Gives a chain back: `written` bytes of its device-writable part are valid.
    pub fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<()> {
        let slot = u64::from(self.next_used % self.layout.size.max(1));
        let entry = (u64::from(written) << 32) | u64::from(head);
        let address = self.layout.used.wrapping_add(ENTRIES + slot * USED_ENTRY);
        memory
            .write_obj(entry.to_le_bytes(), GuestAddress(address))
            .map_err(|source| RingError::Memory { address, source })?;
        self.next_used = self.next_used.wrapping_add(1);
        // The store is a release: the guest sees the entry before the index.
        self.store(memory, self.layout.used, INDEX, self.next_used)
    }

    /// Whether the guest wants to hear of what was given back since the last call.
    pub fn wants_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool> {
        // Our used index must be visible before we look at what the guest wrote (2.7.7.2).
        fence(Ordering::SeqCst);
        let (old, new) = (self.signalled_used, self.next_used);
        self.signalled_used = new;
        if old == new {
            return Ok(false);
        }
        if !self.event_idx {
            return Ok(self.load(memory, self.layout.available, 0)? & SUPPRESS == 0);
        }
        let used_event_at = ENTRIES + u64::from(self.layout.size) * AVAIL_ENTRY;
        let used_event = self.load(memory, self.layout.available, used_event_at)?;
        Ok(new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the guest to kick when it makes the next chain available. The ring has to be looked at
    /// once more afterwards: a chain may have come just before.
    pub fn ask_for_kick(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        self.tell_of_kicks(memory, if self.event_idx { self.next_available } else { 0 })?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Tells the guest that kicks are not needed for now. With EVENT_IDX an old event index does
    /// that by itself.
    pub fn spare_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if self.event_idx { Ok(()) } else { self.tell_of_kicks(memory, SUPPRESS) }
    }

    /// Takes back that the guest was asked to kick, until [`Ring::ask_for_kick`].
    pub fn refuse_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        // An index that the guest has passed already.
        self.tell_of_kicks(
            memory,
            if self.event_idx { self.next_available.wrapping_sub(1) } else { SUPPRESS },
        )
    }

    /// Stores avail_event, or the used ring's flags, if it is something new: a worker that polls refuses kicks
    /// again and again, and each store takes the cache line from the guest.
    fn tell_of_kicks(&mut self, memory: &GuestMemoryMmap, value: u16) -> Result<()> {
        if self.told_of_kicks == Some(value) {
            return Ok(());
        }
        let at = if self.event_idx { ENTRIES + u64::from(self.layout.size) * USED_ENTRY } else { 0 };
        self.store(memory, self.layout.used, at, value)?;
        self.told_of_kicks = Some(value);
        Ok(())
    }

    fn load(&self, memory: &GuestMemoryMmap, base: u64, offset: u64) -> Result<u16> {
        let address = base.wrapping_add(offset);
        memory
            .load(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|source| RingError::Memory { address, source })
    }

    fn store(&self, memory: &GuestMemoryMmap, base: u64, offset: u64, value: u16) -> Result<()> {
        let address = base.wrapping_add(offset);
        memory
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|source| RingError::Memory { address, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: Layout = Layout { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn set(memory: &GuestMemoryMmap, address: u64, value: u16) {
        memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get(memory: &GuestMemoryMmap, address: u64) -> u16 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn takes_and_gives_back_in_order_past_the_wrap() {
        let memory = memory();
        set(&memory, LAYOUT.available + INDEX, 65_534);
        set(&memory, LAYOUT.used + INDEX, 65_534);
        let mut ring = Ring::new(&memory, LAYOUT, 65_534, false).unwrap();
        assert_eq!(ring.waiting(&memory).unwrap(), 0);
        for i in 0..20u16 {
            let index = 65_534u16.wrapping_add(i);
            set(&memory, LAYOUT.available + ENTRIES + u64::from(index % 8) * 2, i % 8);
            set(&memory, LAYOUT.available + INDEX, index.wrapping_add(1));
            assert_eq!(ring.waiting(&memory).unwrap(), 1);
            assert_eq!(ring.take(&memory).unwrap(), i % 8);
            ring.give_back(&memory, i % 8, 100 + u32::from(i)).unwrap();
            let entry = LAYOUT.used + ENTRIES + u64::from(index % 8) * 8;
            let used: u64 = memory.read_obj(GuestAddress(entry)).unwrap();
            assert_eq!(used, (u64::from(100 + i) << 32) | u64::from(i % 8));
            assert_eq!(get(&memory, LAYOUT.used + INDEX), index.wrapping_add(1));
        }
    }

    #[test]
    fn only_what_was_taken_last_is_put_back() {
        let memory = memory();
        for (start, size) in [(0u16, 4u16), (65_534, 4)] {
            for i in 0..size {
                let index = start.wrapping_add(i);
                set(&memory, LAYOUT.available + ENTRIES + u64::from(index % 8) * 2, 5 + i % 8);
            }
            set(&memory, LAYOUT.available + INDEX, start.wrapping_add(size));
            let mut ring = Ring::new(&memory, LAYOUT, start, true).unwrap();
            let taken: Vec<u16> = (0..size).map(|_| ring.take(&memory).unwrap()).collect();
            assert_eq!(taken, [5, 6, 7, 8]);
            assert!(!ring.put_back(&memory, &[5]).unwrap());
            assert!(!ring.put_back(&memory, &[8, 6]).unwrap());
            assert_eq!(ring.waiting(&memory).unwrap(), 0);
            assert!(ring.put_back(&memory, &[]).unwrap());
            assert!(ring.put_back(&memory, &[8, 7]).unwrap());
            assert_eq!(ring.waiting(&memory).unwrap(), 2);
            assert_eq!(ring.take(&memory).unwrap(), 7);
        }
    }

    #[test]
    fn a_runaway_index_is_an_error() {
        let memory = memory();
        let ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
        set(&memory, LAYOUT.available + INDEX, 8);
        assert_eq!(ring.waiting(&memory).unwrap(), 8);
        set(&memory, LAYOUT.available + INDEX, 9);
        assert!(matches!(ring.waiting(&memory), Err(RingError::Runaway { available: 9, next: 0, size: 8 })));
    }

    #[test]
    fn a_ring_outside_memory_is_refused() {
        let memory = memory();
        for layout in [
            Layout { descriptors: 0xffc0, ..LAYOUT },
            Layout { available: 0xfff8, ..LAYOUT },
            Layout { used: 0x20000, ..LAYOUT },
            Layout { used: u64::MAX - 1, ..LAYOUT },
        ] {
            assert!(Ring::new(&memory, layout, 0, true).is_err());
        }
    }

    #[test]
    fn flags_steer_notifications_without_event_idx() {
        let memory = memory();
        let mut ring = Ring::new(&memory, LAYOUT, 0, false).unwrap();
        assert!(!ring.wants_notification(&memory).unwrap());
        ring.give_back(&memory, 0, 0).unwrap();
        assert!(ring.wants_notification(&memory).unwrap());
        set(&memory, LAYOUT.available, SUPPRESS);
        ring.give_back(&memory, 0, 0).unwrap();
        assert!(!ring.wants_notification(&memory).unwrap());
        ring.spare_kicks(&memory).unwrap();
        assert_eq!(get(&memory, LAYOUT.used), SUPPRESS);
        ring.ask_for_kick(&memory).unwrap();
        assert_eq!(get(&memory, LAYOUT.used), 0);
    }

    /// As a Linux guest decides: does it kick after it made chains from `old` to `new` available?
    fn guest_kicks(memory: &GuestMemoryMmap, old: u16, new: u16) -> bool {
        let event = get(memory, LAYOUT.used + ENTRIES + 64);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    #[test]
    fn kicks_come_when_they_are_asked_for() {
        for start in [0, 7, 65_535] {
            let memory = memory();
            set(&memory, LAYOUT.available + INDEX, start);
            let mut ring = Ring::new(&memory, LAYOUT, start, true).unwrap();
            for chains in 1..8 {
                ring.ask_for_kick(&memory).unwrap();
                assert!(guest_kicks(&memory, start, start.wrapping_add(chains)));
                ring.refuse_kicks(&memory).unwrap();
                assert!(!guest_kicks(&memory, start, start.wrapping_add(chains)));
            }
            let mut ring = Ring::new(&memory, LAYOUT, start, false).unwrap();
            ring.refuse_kicks(&memory).unwrap();
            assert_eq!(get(&memory, LAYOUT.used), SUPPRESS);
            ring.ask_for_kick(&memory).unwrap();
            assert_eq!(get(&memory, LAYOUT.used), 0);
        }
    }

    /// One worker that polls, and another that asks for a kick before it sleeps.
    #[test]
    fn kicks_are_refused_again_after_another_worker_asked_and_otherwise_nothing_is_stored() {
        for (event_idx, at) in [(true, LAYOUT.used + ENTRIES + 64), (false, LAYOUT.used)] {
            let memory = memory();
            let mut ring = Ring::new(&memory, LAYOUT, 7, event_idx).unwrap();
            ring.refuse_kicks(&memory).unwrap();
            let refused = get(&memory, at);
            set(&memory, at, 0x5a5a);
            ring.refuse_kicks(&memory).unwrap();
            assert_eq!(get(&memory, at), 0x5a5a, "the word was stored once more");
            ring.ask_for_kick(&memory).unwrap();
            ring.refuse_kicks(&memory).unwrap();
            assert_eq!(get(&memory, at), refused);
        }
    }

    proptest! {
        /// The guest hears of a batch exactly if its event index lies in it.
        #[test]
        fn event_idx_names_one_entry(start: u16, batch in 1u16..8, event_offset in -20i32..20) {
            let memory = memory();
            set(&memory, LAYOUT.used + INDEX, start);
            let mut ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
            let event = start.wrapping_add_signed(i16::try_from(event_offset).unwrap());
            set(&memory, LAYOUT.available + ENTRIES + 16, event);
            for _ in 0..batch {
                ring.give_back(&memory, 0, 0).unwrap();
            }
            let inside = (0..i32::from(batch)).contains(&event_offset);
            prop_assert_eq!(ring.wants_notification(&memory).unwrap(), inside);
            prop_assert!(!ring.wants_notification(&memory).unwrap());
        }
    }
}
