//! Malicious guests: descriptor chains and ring indices that break the rules of virtio.

use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;

use crate::chain::Segmentation;
use crate::error::{Error, Result};
use crate::queue::{Queue, Token};
use crate::request::Request;
use crate::ring::{Descriptor, INDIRECT, NEXT, Ring, WRITE, describe};
use crate::session::Session;

/// A chain that breaks a rule of the virtio specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Two descriptors that follow each other for ever.
    Loop,
    /// A readable buffer where no memory is.
    OutsideMemory,
    /// A writable buffer that begins in memory and ends outside.
    PastTheEnd,
    /// Address plus length wraps around.
    Wraps,
    /// A table of descriptors inside a table of descriptors.
    IndirectInIndirect,
    /// A table where no memory is.
    TableOutsideMemory,
    /// A table whose length is no multiple of 16.
    TableCutOff,
    /// A table of no descriptors.
    TableEmpty,
    /// A table that loops.
    TableLoop,
    /// A `next` past the ring's table.
    NextOutOfRange,
    /// A descriptor that is a table and has a successor.
    IndirectWithNext,
    /// A readable descriptor after a writable one.
    ReadableAfterWritable,
    /// A chain of writable descriptors only.
    NothingToRead,
    /// A descriptor of no bytes.
    ZeroLength,
    /// A table with more descriptors than the ring.
    LongerThanTheRing,
}

impl Malformed {
    /// All of them.
    pub const ALL: &[Malformed] = &[
        Malformed::Loop,
        Malformed::OutsideMemory,
        Malformed::PastTheEnd,
        Malformed::Wraps,
        Malformed::IndirectInIndirect,
        Malformed::TableOutsideMemory,
        Malformed::TableCutOff,
        Malformed::TableEmpty,
        Malformed::TableLoop,
        Malformed::NextOutOfRange,
        Malformed::IndirectWithNext,
        Malformed::ReadableAfterWritable,
        Malformed::NothingToRead,
        Malformed::ZeroLength,
        Malformed::LongerThanTheRing,
    ];

    /// Submits a chain of this kind that would carry `request`, were it well-formed.
    /// The device is to give it back, whatever it makes of it.
    pub fn submit(self, session: &Session, queue: usize, request: &Request<'_>) -> Result<Token> {
        let queue = session.queue(queue);
        let size = queue.size();
        let mut chain = request.to_chain(session.memory(), 0x7777, Segmentation::One, size)?;
        let table = session.memory().allocate_zeroed(16 * (2 * size + 2))?;
        let at = Places { table: table.address(), outside: outside_memory(session), size };
        let (head, in_table) = {
            let mut segments = Vec::new();
            chain.segments(&mut segments);
            let [request, reply] = segments[..] else {
                return Err(Error::RingFull { free: size, needed: segments.len() });
            };
            self.lay(describe(&request, None), describe(&reply, None), at)
        };
        for (i, descriptor) in in_table.iter().enumerate() {
            table.write(16 * i, descriptor.as_bytes());
        }
        // The chain keeps the table until the device gives it back.
        chain.keep = Some(table);
        queue.submit_by_hand(chain, |ring, _| {
            let free =
                |ring: &mut Ring<_>| ring.take_descriptor().ok_or(Error::RingFull { free: 0, needed: 2 });
            let owned = vec![free(ring)?, free(ring)?];
            for (i, descriptor) in head.iter().enumerate() {
                // In `lay`, 0 and 1 stand for the two descriptors that the chain owns.
                let next = owned.get(usize::from(descriptor.next)).copied().unwrap_or(descriptor.next);
                ring.write_descriptor(owned[i], Descriptor { next, ..*descriptor });
            }
            Ok(owned)
        })
    }

    /// The one or two descriptors in the ring's own table, and those in the chain's table.
    fn lay(self, request: Descriptor, reply: Descriptor, at: Places) -> (Vec<Descriptor>, Vec<Descriptor>) {
        let table = |count: usize| Descriptor {
            address: at.table,
            len: (16 * count) as u32,
            flags: INDIRECT,
            next: 0,
        };
        let linked = Descriptor { flags: request.flags | NEXT, next: 1, ..request };
        let direct = |first: Descriptor, second: Descriptor| (vec![first, second], vec![]);
        match self {
            Malformed::Loop => direct(linked, Descriptor { flags: WRITE | NEXT, next: 0, ..reply }),
            Malformed::OutsideMemory => direct(Descriptor { address: at.outside, ..linked }, reply),
            Malformed::PastTheEnd => direct(linked, Descriptor { len: u32::MAX, ..reply }),
            Malformed::Wraps => direct(Descriptor { address: u64::MAX - 8, len: 64, ..linked }, reply),
            Malformed::IndirectInIndirect => (vec![table(2)], vec![linked, table(2)]),
            Malformed::TableOutsideMemory => (vec![Descriptor { address: at.outside, ..table(2) }], vec![]),
            Malformed::TableCutOff => (vec![Descriptor { len: 40, ..table(2) }], vec![linked, reply]),
            Malformed::TableEmpty => (vec![table(0)], vec![]),
            Malformed::TableLoop => {
                (vec![table(2)], vec![linked, Descriptor { flags: WRITE | NEXT, next: 0, ..reply }])
            }
            Malformed::NextOutOfRange => direct(Descriptor { next: u16::MAX, ..linked }, reply),
            Malformed::IndirectWithNext => {
                let head = Descriptor { flags: INDIRECT | NEXT, next: 1, ..table(2) };
                (vec![head, reply], vec![linked, reply])
            }
            Malformed::ReadableAfterWritable => {
                direct(Descriptor { flags: WRITE | NEXT, next: 1, ..reply }, request)
            }
            Malformed::NothingToRead => direct(Descriptor { flags: WRITE | NEXT, next: 1, ..reply }, reply),
            Malformed::ZeroLength => direct(Descriptor { len: 0, ..linked }, reply),
            Malformed::LongerThanTheRing => {
                let count = 2 * at.size;
                let link = |next: usize| Descriptor { len: 1, next: next as u16, ..linked };
                (vec![table(count)], (1..count).map(link).chain([reply]).collect())
            }
        }
    }
}

/// Addresses that malformed chains point to.
#[derive(Clone, Copy)]
struct Places {
    table: u64,
    outside: u64,
    size: usize,
}

/// A page-aligned guest address behind all memory.
pub fn outside_memory(session: &Session) -> u64 {
    let end =
        session.memory().regions().iter().map(|region| region.guest_address() + region.size() as u64).max();
    end.unwrap_or(0) + (1 << 30)
}

/// Offers a head that the ring's table does not have, and kicks. Nothing can come back for it.
pub fn offer_head_out_of_range(queue: &Queue) -> Result<()> {
    queue.with_ring(|ring| {
        ring.offer(u16::MAX);
        ring.publish();
    });
    queue.kick()
}

/// Lets the available index run ahead by `steps` entries that were never filled, and kicks.
/// The ring is of no use until it is set up again.
pub fn run_away(queue: &Queue, steps: u16) -> Result<()> {
    queue.with_ring(|ring| {
        ring.available_index().fetch_add(steps, Ordering::SeqCst);
    });
    queue.kick()
}
