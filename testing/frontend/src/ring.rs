//! The driver's side of one split virtqueue (virtio 1.3, section 2.7).
//!
//! Every chain carries a tag that comes back with the used entry. A used entry that names a chain
//! which is not in flight, or claims more bytes than the chain has room for, is an error.
//! Raw access to the rings is there for malicious drivers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory};

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`NEXT`].
    pub next: u16,
}

/// A piece of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// Whether a chain lies in the ring's own table or in one of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// As Linux does it: a table of its own from two segments up if that was negotiated.
    #[default]
    Auto,
    /// In the ring's own table.
    Direct,
    /// Always in a table of its own.
    Indirect,
}

/// How the driver uses the ring; follows from the negotiated features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingOptions {
    /// Number of descriptors; a power of two up to 32768.
    pub size: u16,
    /// INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// A part of a ring that can be hidden from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The used entries, with the event index behind them.
    UsedEntries,
    /// The word that says when the driver wants a notification (EVENT_IDX).
    UsedEvent,
}

#[derive(Debug)]
struct InFlight<T> {
    tag: T,
    /// Descriptors of the ring's own table, in order of the chain.
    descriptors: Vec<u16>,
    writable: u64,
    /// Keeps the chain's own table alive.
    _table: Option<Buffer>,
}

/// One split virtqueue; `T` is what the driver remembers about a chain.
#[derive(Debug)]
pub struct Ring<T> {
    queue: usize,
    options: RingOptions,
    memory: Arc<Memory>,
    descriptors: Buffer,
    available: Buffer,
    used: Buffer,
    free: Vec<u16>,
    in_flight: Vec<Option<InFlight<T>>>,
    count_in_flight: usize,
    /// Next index to write to the available ring.
    next_available: u16,
    /// What the device was told by the last `publish`.
    published: u16,
    /// What the device had been told at the last decision to kick.
    kicked_at: u16,
    next_used: u16,
}

impl<T> Ring<T> {
    /// A fresh ring in `memory`; `queue` is only for messages.
    pub fn new(memory: &Arc<Memory>, queue: usize, options: RingOptions) -> Result<Ring<T>> {
        let size = usize::from(options.size);
        let available = memory.allocate_zeroed(6 + 2 * size)?;
        let used = memory.allocate_zeroed(6 + 8 * size)?;
        Ring::of(memory, queue, options, available, used)
    }

    /// The same with parts that can be hidden from the device ([`Ring::hide`]), in regions of their own from `guest` on.
    pub fn hideable(memory: &Arc<Memory>, queue: usize, options: RingOptions, guest: u64) -> Result<Ring<T>> {
        let size = usize::from(options.size);
        // The used event is the last word of the available ring; entries follow two words of the used ring.
        let available = memory.allocate_hideable(guest, 4 + 2 * size, 6 + 2 * size)?;
        let used = memory.allocate_hideable(guest + (1 << 24), 4, 6 + 8 * size)?;
        Ring::of(memory, queue, options, available, used)
    }

    fn of(
        memory: &Arc<Memory>,
        queue: usize,
        options: RingOptions,
        available: Buffer,
        used: Buffer,
    ) -> Result<Ring<T>> {
        let size = usize::from(options.size);
        Ok(Ring {
            queue,
            options,
            memory: memory.clone(),
            descriptors: memory.allocate_zeroed(16 * size)?,
            available,
            used,
            free: (0..options.size).rev().collect(),
            in_flight: (0..size).map(|_| None).collect(),
            count_in_flight: 0,
            next_available: 0,
            published: 0,
            kicked_at: 0,
            next_used: 0,
        })
    }

    /// Hides a part of the ring from the device, and from this process: who touches it gets SIGBUS.
    pub fn hide(&self, part: Part) -> Result<()> {
        match part {
            Part::UsedEntries => self.used.hide(),
            Part::UsedEvent => self.available.hide(),
        }
    }

    /// Ends [`Ring::hide`] of both parts. Entries that were taken and the used event are zero then.
    pub fn show(&self) -> Result<()> {
        self.used.show()?;
        self.available.show()
    }

    /// Number of descriptors.
    pub fn size(&self) -> usize {
        usize::from(self.options.size)
    }

    /// How the ring is used.
    pub fn options(&self) -> RingOptions {
        self.options
    }

    /// Addresses of descriptor table, available ring and used ring in the front end's process.
    pub fn user_addresses(&self) -> (u64, u64, u64) {
        (self.descriptors.user_address(), self.available.user_address(), self.used.user_address())
    }

    /// Guest-physical address of the used ring.
    pub fn used_address(&self) -> u64 {
        self.used.address()
    }

    /// The next available index that the driver will write.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The next used index that the driver will read.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Chains that the device owns.
    pub fn in_flight(&self) -> usize {
        self.count_in_flight
    }

    /// Tags of the chains that the device owns.
    pub fn tags(&self) -> impl Iterator<Item = &T> {
        self.in_flight.iter().flatten().map(|chain| &chain.tag)
    }

    /// Takes back all chains that the device owns, e.g. after it was stopped for good.
    pub fn abandon(&mut self) -> Vec<T> {
        let heads: Vec<u16> = (0..self.options.size).collect();
        heads.into_iter().filter_map(|head| self.retire(head)).map(|chain| chain.tag).collect()
    }

    /// Whether [`Ring::add`] of so many segments would find room.
    pub fn has_room(&self, segments: usize, placement: Placement) -> bool {
        let needed = if self.is_indirect(segments, placement) { 1 } else { segments };
        needed <= self.free.len()
    }

    fn is_indirect(&self, segments: usize, placement: Placement) -> bool {
        match placement {
            Placement::Auto => self.options.indirect && segments > 1,
            Placement::Direct => false,
            Placement::Indirect => true,
        }
    }

    /// Puts a chain into the ring, not yet visible to the device, and returns its head.
    /// On failure the tag comes back.
    pub fn add(
        &mut self,
        segments: &[Segment],
        placement: Placement,
        tag: T,
    ) -> std::result::Result<u16, (Error, T)> {
        if !self.has_room(segments.len(), placement) {
            return Err((Error::RingFull { free: self.free.len(), needed: segments.len() }, tag));
        }
        let writable = segments.iter().filter(|s| s.writable).map(|s| u64::from(s.len)).sum();
        let (descriptors, table) = if self.is_indirect(segments.len(), placement) {
            match self.write_table(segments) {
                Ok((head, table)) => (vec![head], Some(table)),
                Err(error) => return Err((error, tag)),
            }
        } else {
            (self.write_direct(segments), None)
        };
        let Some(&head) = descriptors.first() else {
            return Err((Error::RingFull { free: self.free.len(), needed: 0 }, tag));
        };
        self.in_flight[usize::from(head)] = Some(InFlight { tag, descriptors, writable, _table: table });
        self.count_in_flight += 1;
        self.offer(head);
        Ok(head)
    }

    fn write_direct(&mut self, segments: &[Segment]) -> Vec<u16> {
        let at = self.free.len() - segments.len();
        let mut chain = self.free.split_off(at);
        chain.reverse();
        for (i, segment) in segments.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            self.write_descriptor(chain[i], describe(segment, next));
        }
        chain
    }

    fn write_table(&mut self, segments: &[Segment]) -> Result<(u16, Buffer)> {
        let table = self.memory.allocate(16 * segments.len())?;
        for (i, segment) in segments.iter().enumerate() {
            let next = (i + 1 < segments.len()).then_some(i as u16 + 1);
            table.write(16 * i, describe(segment, next).as_bytes());
        }
        let head = self.free.pop().ok_or(Error::RingFull { free: 0, needed: 1 })?;
        let len = 16 * segments.len() as u32;
        self.write_descriptor(head, Descriptor { address: table.address(), len, flags: INDIRECT, next: 0 });
        Ok((head, table))
    }

    /// Writes any index to the next slot of the available ring, not yet visible to the device.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.next_available) % self.size();
        self.available.store_u16(4 + 2 * slot, head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Makes all added chains visible to the device.
    pub fn publish(&mut self) {
        self.published = self.next_available;
        self.available.store_u16(2, self.published, Ordering::Release);
    }

    /// Whether the device wants to be told about what was published since the last call.
    pub fn needs_kick(&mut self) -> bool {
        // The index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked_at, self.published);
        self.kicked_at = new;
        if self.options.event_idx {
            let event = self.available_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            new != old && self.used.atomic_u16(0).load(Ordering::Acquire) & 1 == 0
        }
    }

    /// Takes the next used entry: the chain's tag and the bytes that the device wrote.
    pub fn take_used(&mut self) -> Result<Option<(T, u32)>> {
        let index = self.used_index();
        if index == self.next_used {
            return Ok(None);
        }
        if usize::from(index.wrapping_sub(self.next_used)) > self.size() {
            return Err(self.broken(format!("the used index {index} ran away from {}", self.next_used)));
        }
        let mut entry = [0u32; 2];
        self.used.read(4 + 8 * (usize::from(self.next_used) % self.size()), entry.as_mut_bytes());
        let [id, len] = entry;
        let chain = u16::try_from(id).ok().and_then(|head| self.retire(head));
        let Some(chain) = chain else {
            return Err(self.broken(format!("used entry {} names chain {id}, not in flight", self.next_used)));
        };
        self.next_used = self.next_used.wrapping_add(1);
        if u64::from(len) > chain.writable {
            let problem = format!("chain {id} was used with {len} bytes, it has room for {}", chain.writable);
            return Err(self.broken(problem));
        }
        Ok(Some((chain.tag, len)))
    }

    /// Takes the next used entry as the device wrote it, head and length, and nothing else: for drivers
    /// that keep their own books of chains that they [`Ring::offer`] again and again.
    pub fn take_used_entry(&mut self) -> Option<(u32, u32)> {
        let index = self.next_used;
        if index == self.used_index() {
            return None;
        }
        self.next_used = index.wrapping_add(1);
        Some(self.used_entry(usize::from(index)))
    }

    fn retire(&mut self, head: u16) -> Option<InFlight<T>> {
        let chain = self.in_flight.get_mut(usize::from(head))?.take()?;
        self.free.extend(chain.descriptors.iter().rev());
        self.count_in_flight -= 1;
        Some(chain)
    }

    fn broken(&self, problem: String) -> Error {
        Error::BrokenRing { queue: self.queue, problem }
    }

    /// Asks for a notification with the next used entry; true if there is one already, for which no
    /// notification will come.
    pub fn ask_for_call(&mut self) -> bool {
        if self.options.event_idx {
            self.available.store_u16(4 + 2 * self.size(), self.next_used, Ordering::Relaxed);
        } else {
            self.available.store_u16(0, 0, Ordering::Relaxed);
        }
        // The wish must be visible before the used index is read again.
        fence(Ordering::SeqCst);
        self.used_index() != self.next_used
    }

    /// Asks for no notifications.
    pub fn refuse_calls(&mut self) {
        if self.options.event_idx {
            let event = self.next_used.wrapping_sub(1);
            self.available.store_u16(4 + 2 * self.size(), event, Ordering::Relaxed);
        } else {
            self.available.store_u16(0, 1, Ordering::Relaxed);
        }
    }

    /// The available index; a driver that lies stores what it wants.
    pub fn available_index(&self) -> &AtomicU16 {
        self.available.atomic_u16(2)
    }

    /// The word in which the driver says when it wants a notification (EVENT_IDX).
    pub fn used_event(&self) -> &AtomicU16 {
        self.available.atomic_u16(4 + 2 * self.size())
    }

    /// The word in which the device says when it wants a kick (EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        self.used.atomic_u16(4 + 8 * self.size()).load(Ordering::Acquire)
    }

    /// The available index as the device reads it.
    pub fn published_index(&self) -> u16 {
        self.published
    }

    /// The used index as the device wrote it.
    pub fn used_index(&self) -> u16 {
        self.used.atomic_u16(2).load(Ordering::Acquire)
    }

    /// The used entry in a slot of the ring, as the device wrote it: head and length.
    pub fn used_entry(&self, slot: usize) -> (u32, u32) {
        let mut entry = [0u32; 2];
        self.used.read(4 + 8 * (slot % self.size()), entry.as_mut_bytes());
        (entry[0], entry[1])
    }

    /// Writes any descriptor into the ring's own table.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.descriptors.write(16 * usize::from(index), descriptor.as_bytes());
    }

    /// Guest-physical address of the ring's own descriptor table.
    pub fn table_address(&self) -> u64 {
        self.descriptors.address()
    }

    /// Takes a descriptor out of the driver's hands, for chains written by hand.
    pub fn take_descriptor(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Declares a chain written by hand as in flight, so that its used entry is expected, and offers it.
    /// `owned` are the descriptors that come back with it, the head first.
    pub fn offer_by_hand(&mut self, owned: Vec<u16>, writable: u64, tag: T) -> Result<()> {
        let head = *owned.first().ok_or(Error::RingFull { free: self.free.len(), needed: 1 })?;
        self.in_flight[usize::from(head)] =
            Some(InFlight { tag, descriptors: owned, writable, _table: None });
        self.count_in_flight += 1;
        self.offer(head);
        Ok(())
    }
}

/// The descriptor of a segment, with its successor if there is one.
pub fn describe(segment: &Segment, next: Option<u16>) -> Descriptor {
    Descriptor {
        address: segment.address,
        len: segment.len,
        flags: if segment.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 },
        next: next.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(size: u16, indirect: bool, event_idx: bool) -> Ring<u32> {
        let memory = Memory::new(1 << 20).unwrap();
        Ring::new(&memory, 1, RingOptions { size, indirect, event_idx }).unwrap()
    }

    fn use_entry(ring: &Ring<u32>, id: u32, len: u32) {
        let index = ring.used_index();
        ring.used.write(4 + 8 * (usize::from(index) % ring.size()), [id, len].as_bytes());
        ring.used.atomic_u16(2).store(index.wrapping_add(1), Ordering::Release);
    }

    const READ: Segment = Segment { address: 0x10_0000, len: 8, writable: false };
    const ROOM: Segment = Segment { address: 0x10_0100, len: 8, writable: true };

    #[test]
    fn chains_come_back_with_their_tag_for_ever() {
        for indirect in [false, true] {
            let mut ring = ring(4, indirect, true);
            for tag in 0..200_000 {
                let head = ring.add(&[READ, ROOM], Placement::Auto, tag).unwrap();
                ring.publish();
                assert_eq!(ring.in_flight(), 1);
                use_entry(&ring, u32::from(head), 8);
                assert_eq!(ring.take_used().unwrap(), Some((tag, 8)));
            }
            assert_eq!(ring.in_flight(), 0);
        }
    }

    #[test]
    fn full_ring_gives_the_tag_back() {
        let mut ring = ring(4, false, false);
        ring.add(&[READ, ROOM], Placement::Auto, 1).unwrap();
        ring.add(&[READ, ROOM], Placement::Auto, 2).unwrap();
        assert!(matches!(ring.add(&[READ], Placement::Auto, 3), Err((Error::RingFull { free: 0, .. }, 3))));
        assert_eq!(ring.abandon().len(), 2);
        assert!(ring.has_room(4, Placement::Direct));
    }

    #[test]
    fn a_lying_device_is_caught() {
        let mut doubled = ring(4, false, false);
        let head = u32::from(doubled.add(&[READ, ROOM], Placement::Auto, 1).unwrap());
        use_entry(&doubled, head, 8);
        use_entry(&doubled, head, 8);
        doubled.take_used().unwrap();
        assert!(matches!(doubled.take_used(), Err(Error::BrokenRing { queue: 1, .. })));

        let mut never_submitted = ring(4, false, false);
        use_entry(&never_submitted, 70_000, 0);
        assert!(matches!(never_submitted.take_used(), Err(Error::BrokenRing { .. })));

        let mut too_long = ring(4, false, false);
        let head = u32::from(too_long.add(&[READ, ROOM], Placement::Auto, 1).unwrap());
        use_entry(&too_long, head, 9);
        assert!(matches!(too_long.take_used(), Err(Error::BrokenRing { .. })));

        let mut run_away = ring(4, false, false);
        run_away.used.atomic_u16(2).store(5, Ordering::Release);
        assert!(matches!(run_away.take_used(), Err(Error::BrokenRing { .. })));
    }

    #[test]
    fn kicks_follow_the_devices_wish() {
        let mut ring = ring(8, false, true);
        let event =
            |ring: &Ring<u32>, value: u16| ring.used.atomic_u16(4 + 8 * 8).store(value, Ordering::Release);
        ring.add(&[READ], Placement::Auto, 1).unwrap();
        ring.publish();
        assert!(ring.needs_kick());
        assert!(!ring.needs_kick());
        ring.add(&[READ], Placement::Auto, 2).unwrap();
        ring.publish();
        assert!(!ring.needs_kick(), "the device has not asked again");
        event(&ring, 3);
        for tag in 3..6 {
            ring.add(&[READ], Placement::Auto, tag).unwrap();
        }
        ring.publish();
        assert!(ring.needs_kick(), "index 3 was passed on the way to 5");
    }
}
