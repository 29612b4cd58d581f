use super::*;
use crate::device::dirty_log::{DirtyLog, QueueLog};
use proptest::prelude::*;

const INDEX: u64 = 2;
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
    assert_eq!(ring.avail_len(&memory).unwrap(), 0);
    for i in 0..20u16 {
        let index = 65_534u16.wrapping_add(i);
        set(&memory, LAYOUT.available + ENTRIES + u64::from(index % 8) * 2, i % 8);
        set(&memory, LAYOUT.available + INDEX, index.wrapping_add(1));
        assert_eq!(ring.avail_len(&memory).unwrap(), 1);
        assert_eq!(ring.pop(&memory).unwrap(), i % 8);
        ring.add_used(&memory, i % 8, 100 + u32::from(i)).unwrap();
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
            set(&memory, LAYOUT.available + ENTRIES + u64::from(index % 8) * 2, 4 + i % 8);
        }
        set(&memory, LAYOUT.available + INDEX, start.wrapping_add(size));
        let mut ring = Ring::new(&memory, LAYOUT, start, true).unwrap();
        let taken: Vec<u16> = (0..size).map(|_| ring.pop(&memory).unwrap()).collect();
        assert_eq!(taken, [4, 5, 6, 7]);
        assert!(!ring.put_back(&memory, &[4]).unwrap());
        assert!(!ring.put_back(&memory, &[7, 5]).unwrap());
        assert_eq!(ring.avail_len(&memory).unwrap(), 0);
        assert!(ring.put_back(&memory, &[]).unwrap());
        assert!(ring.put_back(&memory, &[7, 6]).unwrap());
        assert_eq!(ring.avail_len(&memory).unwrap(), 2);
        assert_eq!(ring.pop(&memory).unwrap(), 6);
    }
}

#[test]
fn a_head_past_the_table_is_an_error() {
    let memory = memory();
    set(&memory, LAYOUT.available + ENTRIES, 7);
    set(&memory, LAYOUT.available + ENTRIES + 2, 8);
    set(&memory, LAYOUT.available + INDEX, 2);
    let mut ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
    assert_eq!(ring.pop(&memory).unwrap(), 7);
    assert!(matches!(ring.pop(&memory), Err(RingError::Head { head: 8, size: 8 })));
}

#[test]
fn a_ring_that_virtio_forbids_is_refused() {
    let memory = memory();
    for layout in [
        Layout { size: 0, ..LAYOUT },
        Layout { size: 7, ..LAYOUT },
        Layout { descriptors: 0x1008, ..LAYOUT },
        Layout { available: 0x2001, ..LAYOUT },
        Layout { used: 0x3002, ..LAYOUT },
    ] {
        assert!(matches!(Ring::new(&memory, layout, 0, true), Err(RingError::Virtqueue(_))), "{layout:?}");
    }
}

#[test]
fn a_runaway_index_is_an_error() {
    let memory = memory();
    let ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
    set(&memory, LAYOUT.available + INDEX, 8);
    assert_eq!(ring.avail_len(&memory).unwrap(), 8);
    set(&memory, LAYOUT.available + INDEX, 9);
    assert!(matches!(ring.avail_len(&memory), Err(RingError::Runaway { available: 9, next: 0, size: 8 })));
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
    assert!(!ring.needs_notification(&memory).unwrap());
    ring.add_used(&memory, 0, 0).unwrap();
    assert!(ring.needs_notification(&memory).unwrap());
    set(&memory, LAYOUT.available, 1);
    ring.add_used(&memory, 0, 0).unwrap();
    assert!(!ring.needs_notification(&memory).unwrap());
    ring.disable_notification(&memory).unwrap();
    assert_eq!(get(&memory, LAYOUT.used), 1);
    ring.enable_notification(&memory).unwrap();
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
            ring.enable_notification(&memory).unwrap();
            assert!(guest_kicks(&memory, start, start.wrapping_add(chains)));
            ring.refuse_kicks(&memory).unwrap();
            assert!(!guest_kicks(&memory, start, start.wrapping_add(chains)));
        }
        let mut ring = Ring::new(&memory, LAYOUT, start, false).unwrap();
        ring.refuse_kicks(&memory).unwrap();
        assert_eq!(get(&memory, LAYOUT.used), 1);
        ring.enable_notification(&memory).unwrap();
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
        ring.enable_notification(&memory).unwrap();
        ring.refuse_kicks(&memory).unwrap();
        assert_eq!(get(&memory, at), refused);
    }
}

proptest! {
    /// The guest is notified of a batch exactly if its event index lies in it.
    #[test]
    fn event_idx_names_one_entry(start: u16, batch in 1u16..8, event_offset in -20i32..20) {
        let memory = memory();
        set(&memory, LAYOUT.used + INDEX, start);
        let mut ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
        let event = start.wrapping_add_signed(i16::try_from(event_offset).unwrap());
        set(&memory, LAYOUT.available + ENTRIES + 16, event);
        for _ in 0..batch {
            ring.add_used(&memory, 0, 0).unwrap();
        }
        let inside = (0..i32::from(batch)).contains(&event_offset);
        prop_assert_eq!(ring.needs_notification(&memory).unwrap(), inside);
        prop_assert!(!ring.needs_notification(&memory).unwrap());
    }
}

/// A ring whose used ring lies in three pages, of which each write is recorded at another address.
#[test]
fn each_write_to_the_used_ring_is_in_the_log() {
    use std::os::unix::fs::FileExt;

    for event_idx in [true, false] {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let layout = Layout { descriptors: 0x4000, available: 0x2000, used: 0x8ffc, size: 1024 };
        let file = tempfile::tempfile().unwrap();
        file.set_len(8).unwrap();
        let pages = || {
            let mut bits = [0; 8];
            file.read_exact_at(&mut bits, 0).unwrap();
            file.write_all_at(&[0; 8], 0).unwrap();
            let bits = u64::from_le_bytes(bits);
            (0..64u64).filter(|page| bits >> page & 1 == 1).collect::<Vec<_>>()
        };
        let log = std::sync::Arc::new(DirtyLog::map(file.try_clone().unwrap(), 0, 8).unwrap());
        let mut ring = Ring::new(&memory, layout, 0, event_idx).unwrap();
        ring.set_log(Some(QueueLog::new(std::sync::Arc::clone(&log), Some(0x20ffc))));
        assert_eq!(pages(), [0x20, 0x21, 0x22, 0x23], "a process before may have written all of it");
        ring.enable_notification(&memory).unwrap();
        assert_eq!(pages(), [0x20, 0x21, 0x22, 0x23]);
        ring.refuse_kicks(&memory).unwrap();
        assert_eq!(pages(), [0x20, 0x21, 0x22, 0x23]);
        ring.refuse_kicks(&memory).unwrap();
        assert_eq!(pages(), [0; 0], "nothing was stored");
        ring.add_used(&memory, 3, 16).unwrap();
        assert_eq!(pages(), [0x20, 0x21, 0x22, 0x23]);
        // Without an address, and without a log.
        for log in [Some(QueueLog::new(log, None)), None] {
            ring.set_log(log);
            ring.add_used(&memory, 3, 16).unwrap();
            ring.enable_notification(&memory).unwrap();
            assert_eq!(pages(), [0; 0]);
        }
    }
}
