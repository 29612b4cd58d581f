//! The ring and the chain reader over memory of the fuzzer's making. What a walk gives is compared
//! with a reading of the specification that is as plain as can be.

use lanefsd::device::GuestMemoryMmap;
use lanefsd::device::chain::ChainBuffers;
use lanefsd::device::ring::{DESCRIPTOR_SIZE, Layout, Ring};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::guarded;
use crate::input::Input;

/// Most steps of one input.
const MAX_STEPS: usize = 200;
/// Most bytes of one end that are compared.
const COMPARED: usize = 1 << 16;
/// Where the ring is unless the input says otherwise.
pub const PLACE: Layout = Layout { descriptors: 0, available: 0x1000, used: 0x1800, size: 0 };
/// Guest-physical address and size of the two regions, which meet; a hole follows.
const REGIONS: [(u64, usize); 2] = [(0, 0x4000), (0x4000, 0x1000)];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What the input does, one byte each.
#[allow(missing_docs)]
pub mod step {
    pub const POKE: u8 = 0;
    pub const DESCRIBE: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const SERVE: u8 = 3;
    pub const ASK: u8 = 4;
    pub const SPARE: u8 = 5;
    pub const REFUSE: u8 = 6;
    pub const WALK: u8 = 7;
    pub const COUNT: u8 = 8;
}

/// Builds a ring as `data` says, and serves it.
pub fn serve(data: &[u8]) {
    let memory = guarded::memory(&REGIONS);
    for (start, size) in REGIONS {
        memory.write_slice(&vec![0; size], GuestAddress(start)).expect("the regions are there");
    }
    let mut input = Input::new(data);
    let flags = input.byte();
    // Any size up to 256; one that is no power of two is refused.
    let size = if flags & 2 == 0 { 1 << (flags >> 4 & 7) } else { u16::from(input.byte()) };
    let mut layout = Layout { size, ..PLACE };
    if flags & 4 != 0 {
        layout = Layout { descriptors: input.edge(), available: input.edge(), used: input.edge(), size };
    }
    let start = if flags & 8 != 0 { input.short() } else { 0 };
    let Ok(mut ring) = Ring::new(memory, layout, start, flags & 1 != 0) else { return };
    let mut buffers = ChainBuffers::default();
    for _ in 0..MAX_STEPS {
        if input.is_empty() || step(&mut input, memory, layout, &mut ring, &mut buffers).is_none() {
            break;
        }
    }
}

/// One step; `None` when the ring is broken.
fn step(
    input: &mut Input<'_>,
    memory: &GuestMemoryMmap,
    layout: Layout,
    ring: &mut Ring,
    buffers: &mut ChainBuffers,
) -> Option<()> {
    match input.byte() % step::COUNT {
        step::POKE => {
            let (address, count) = (u64::from(input.short()), usize::from(input.byte()));
            let _ = memory.write_slice(input.bytes(count), GuestAddress(address));
        }
        step::DESCRIBE => describe(input, memory, layout),
        step::OFFER => {
            let index = ring.next_available();
            let slot = u64::from(index % layout.size.max(1));
            let head = u16::from(input.byte());
            let _ = memory.write_obj(head, GuestAddress(layout.available.wrapping_add(4 + 2 * slot)));
            let ahead = u16::from(input.byte()) % 4;
            let _ =
                memory.write_obj(index.wrapping_add(ahead), GuestAddress(layout.available.wrapping_add(2)));
        }
        step::SERVE => serve_one(input, memory, layout, ring, buffers)?,
        step::ASK => drop(ring.enable_notification(memory).ok()?),
        step::SPARE => ring.disable_notification(memory).ok()?,
        step::REFUSE => ring.refuse_kicks(memory).ok()?,
        _ => walk(memory, layout, input.short(), buffers),
    }
    Some(())
}

/// Writes a descriptor into the ring's table, or into one somewhere else.
fn describe(input: &mut Input<'_>, memory: &GuestMemoryMmap, layout: Layout) {
    let (place, index) = (input.byte(), u64::from(input.byte()));
    let table = if place & 1 == 0 { layout.descriptors } else { u64::from(place) * 64 };
    let (address, len) = (input.edge(), input.edge());
    let (flags, next) = (u16::from(input.byte()), u16::from(input.byte()));
    let raw = u128::from(address)
        | u128::from(len & u64::from(u32::MAX)) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    let at = table.wrapping_add(index * DESCRIPTOR_SIZE);
    let _ = memory.write_slice(&raw.to_le_bytes(), GuestAddress(at));
}

/// Takes a chain, walks it, gives it back.
fn serve_one(
    input: &mut Input<'_>,
    memory: &GuestMemoryMmap,
    layout: Layout,
    ring: &mut Ring,
    buffers: &mut ChainBuffers,
) -> Option<()> {
    let waiting = ring.avail_len(memory).ok()?;
    assert!(waiting <= layout.size, "more chains than descriptors");
    if waiting == 0 {
        return Some(());
    }
    let before = ring.next_available();
    let head = ring.pop(memory).ok()?;
    assert_eq!(ring.next_available(), before.wrapping_add(1));
    walk(memory, layout, head, buffers);
    ring.add_used(memory, head, input.word()).ok()?;
    ring.needs_notification(memory).ok()?;
    assert!(!ring.needs_notification(memory).ok()?, "notified twice");
    Some(())
}

/// Walks a chain, and checks what comes of it.
fn walk(memory: &GuestMemoryMmap, layout: Layout, head: u16, buffers: &mut ChainBuffers) {
    let expected = reference(memory, layout, head);
    let (mut reader, mut writer) = match (buffers.walk(memory, layout, head), &expected) {
        (Ok(ends), Some(_)) => ends,
        (Err(_), None) => return,
        (Ok(_), None) => panic!("a malformed chain was taken"),
        (Err(error), Some(_)) => panic!("a good chain was refused: {error}"),
    };
    let Some((readable, writable)) = expected else { return };
    let total = |ranges: &[(u64, u32)]| ranges.iter().map(|(_, len)| *len as usize).sum::<usize>();
    assert_eq!(reader.len(), total(&readable));
    assert_eq!(writer.len(), total(&writable));
    let mut bytes = vec![0; COMPARED.min(reader.len())];
    assert_eq!(reader.read(&mut bytes), bytes.len());
    assert_eq!(bytes, contents(memory, &readable, bytes.len()));
    // Where buffers overlap, what is written later is what stands there: compared only if not.
    let pattern: Vec<u8> = (0..=255).cycle().take(COMPARED.min(writer.len())).collect();
    assert_eq!(writer.write(&pattern), pattern.len());
    if !overlap(&writable) {
        assert_eq!(pattern, contents(memory, &writable, pattern.len()));
    }
}

/// The first `len` bytes of `ranges`.
fn contents(memory: &GuestMemoryMmap, ranges: &[(u64, u32)], len: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(len);
    for (address, count) in ranges {
        let start = all.len();
        all.resize(len.min(start + *count as usize), 0);
        if start == all.len() {
            continue;
        }
        memory.read_slice(&mut all[start..], GuestAddress(*address)).expect("the walk checked it");
    }
    all
}

fn overlap(ranges: &[(u64, u32)]) -> bool {
    let mut sorted = ranges.to_vec();
    sorted.retain(|(_, len)| *len > 0);
    sorted.sort_unstable();
    sorted.windows(2).any(|pair| pair[0].0 + u64::from(pair[0].1) > pair[1].0)
}

type Ranges = Vec<(u64, u32)>;

/// What a chain means by section 2.7.5 of the virtio specification; `None` if it is malformed.
fn reference(memory: &GuestMemoryMmap, layout: Layout, head: u16) -> Option<(Ranges, Ranges)> {
    let (mut table, mut count) = (layout.descriptors, u32::from(layout.size));
    let (mut index, mut left, mut inside) = (u32::from(head), count, false);
    let (mut readable, mut writable) = (Ranges::new(), Ranges::new());
    loop {
        if index >= count || left == 0 {
            return None;
        }
        left -= 1;
        let at = table.checked_add(u64::from(index) * DESCRIPTOR_SIZE)?;
        let address: u64 = memory.read_obj(GuestAddress(at)).ok()?;
        let len: u32 = memory.read_obj(GuestAddress(at.checked_add(8)?)).ok()?;
        let flags: u16 = memory.read_obj(GuestAddress(at.checked_add(12)?)).ok()?;
        let next: u16 = memory.read_obj(GuestAddress(at.checked_add(14)?)).ok()?;
        if flags & INDIRECT != 0 {
            if inside || flags & NEXT != 0 || len == 0 || !len.is_multiple_of(16) || len / 16 > 1 << 16 {
                return None;
            }
            (table, count, index, left, inside) = (address, len / 16, 0, len / 16, true);
            continue;
        }
        if len > 0 && !memory.check_range(GuestAddress(address), len as usize) {
            return None;
        }
        if flags & WRITE != 0 {
            writable.push((address, len));
        } else if writable.iter().all(|(_, len)| *len == 0) {
            readable.push((address, len));
        } else {
            return None;
        }
        if flags & NEXT == 0 {
            return Some((readable, writable));
        }
        index = u32::from(next);
    }
}
