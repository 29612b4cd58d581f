use std::sync::mpsc::channel;

use fuse_protocol::abi::{FileLock, InitIn, LkIn, WriteIn};
use fuse_protocol::ids::NodeId;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::request::{Lock, Write};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::*;
use crate::device::GuestMemoryMmap;
use crate::device::ring::{Layout, Ring};
use crate::fs::{Context, FileSystem, PUT_BACK, Result as FsResult};
use crate::metrics::Metrics;
use crate::state_file::{Journal, StateFile};

const LAYOUT: Layout = Layout { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };
/// Length of a reply without a body.
const REPLY: u32 = 16;

/// Every lock is held by others until the queue stops.
struct Locked;

impl FileSystem for Locked {
    fn setlkw(&self, _: &Context, _: NodeId, _: &Lock) -> FsResult<()> {
        Err(PUT_BACK)
    }

    fn write(&self, _: &Context, _: NodeId, write: &Write, _: &mut GuestReader<'_>) -> FsResult<usize> {
        Ok(write.size.try_into().unwrap())
    }
}

/// A guest with one queue.
struct Guest {
    memory: SharedMemory,
    queue: Arc<Queue>,
    server: Server,
    metrics: Arc<Metrics>,
}

impl Guest {
    /// A guest whose session has begun with the request in chain 7.
    fn new() -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let memory = SharedMemory::new(memory);
        let ring = Ring::new(&memory.memory(), LAYOUT, 0, true).unwrap();
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let journal = Journal::new(&StateFile::create().unwrap(), 1);
        let metrics = Metrics::create().unwrap();
        let queue = Queue::new(1, memory.clone(), ring, Arc::new(kick), None, journal, metrics.for_queue(1));
        let queue = Arc::new(queue.unwrap());
        let guest = Guest { memory, queue, server: Server::new(Arc::new(Locked)), metrics };
        let init = InitIn { major: 7, minor: 45, max_readahead: 0, flags: 0, flags2: 0, unused: [0; 11] };
        guest.offer(7, Opcode::Init, init.as_bytes());
        guest.in_flight().serve(&guest.server).add_used();
        assert_eq!(guest.used().len(), 1);
        guest
    }

    /// Offers the chain with this head: a readable and a writable descriptor.
    fn offer(&self, head: u16, opcode: Opcode, arguments: &[u8]) {
        let len = u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap();
        let header = InHeader { len, opcode: opcode as u32, unique: head.into(), ..InHeader::new_zeroed() };
        self.offer_bytes(head, &[header.as_bytes(), arguments].concat());
    }

    fn offer_bytes(&self, head: u16, bytes: &[u8]) {
        let (memory, at) = (self.memory.memory(), 0x4000 + 0x800 * u64::from(head));
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        // An indirect table for each chain.
        let table = 0x800 + 32 * u64::from(head);
        let describe = |at: u64, address: u64, len: usize, flags: u128, next: u128| {
            let len = u128::try_from(len).unwrap();
            let raw = u128::from(address) | len << 64 | flags << 96 | next << 112;
            memory.write_obj(raw.to_le_bytes(), GuestAddress(at)).unwrap();
        };
        describe(LAYOUT.descriptors + 16 * u64::from(head), table, 32, 4, 0);
        describe(table, at, bytes.len(), 1, 1);
        describe(table + 16, at + 0x400, 0x400, 2, 0);
        let index: u16 = memory.read_obj(GuestAddress(LAYOUT.available + 2)).unwrap();
        let slot = LAYOUT.available + 4 + 2 * u64::from(index % LAYOUT.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        memory.write_obj(index.wrapping_add(1), GuestAddress(LAYOUT.available + 2)).unwrap();
    }

    fn popped(&self) -> Popped {
        Scratch::new(&self.queue).pop().ok().unwrap().0
    }

    fn in_flight(&self) -> InFlight {
        self.popped().decode().ok().unwrap()
    }

    /// Heads and lengths of all used entries.
    fn used(&self) -> Vec<(u32, u32)> {
        let memory = self.memory.memory();
        let count: u16 = memory.read_obj(GuestAddress(LAYOUT.used + 2)).unwrap();
        let entry = |number: u16| {
            let [head, len]: [u32; 2] =
                memory.read_obj(GuestAddress(LAYOUT.used + 4 + 8 * u64::from(number))).unwrap();
            (head, len)
        };
        (0..count).map(entry).collect()
    }

    /// The used entries after the one of INIT.
    fn used_since(&self) -> Vec<(u32, u32)> {
        self.used().split_off(1)
    }
}

fn setlkw() -> LkIn {
    let lk = FileLock { start: 0, end: 9, typ: libc::F_WRLCK.cast_unsigned(), pid: 1 };
    LkIn { fh: 1, owner: 1, lk, lk_flags: 0, padding: 0 }
}

#[test]
fn a_request_dropped_in_any_phase_adds_one_entry() {
    let guest = Guest::new();
    (0..3).for_each(|head| guest.offer(head, Opcode::Statfs, &[]));
    drop(guest.popped());
    assert_eq!(guest.used_since(), [(0, 0)]);
    drop(guest.in_flight());
    assert_eq!(guest.used_since(), [(0, 0), (1, 0)]);
    let completion = guest.in_flight().serve(&guest.server);
    assert_eq!(guest.used_since().len(), 2, "the entry comes with the next step");
    drop(completion);
    assert_eq!(guest.used_since(), [(0, 0), (1, 0), (2, REPLY)]);
}

#[test]
fn a_panic_adds_an_empty_entry() {
    let guest = Guest::new();
    guest.offer(3, Opcode::Statfs, &[]);
    let request = guest.in_flight();
    let failed = std::thread::spawn(move || {
        let _request = request;
        panic!("a worker fails");
    });
    assert!(failed.join().is_err());
    assert_eq!(guest.used_since(), [(3, 0)]);
}

#[test]
fn an_entry_is_added_together_with_the_next_pop() {
    let guest = Guest::new();
    (0..2).for_each(|head| guest.offer(head, Opcode::Statfs, &[]));
    let (popped, backlog) = Scratch::new(&guest.queue).pop().ok().unwrap();
    assert_eq!(backlog.waiting, 1);
    let completion = popped.decode().ok().unwrap().serve(&guest.server);
    let (popped, backlog) = completion.pop_next().ok().unwrap();
    assert_eq!((guest.used_since(), backlog.waiting), (vec![(0, REPLY)], 0));
    let scratch = popped.decode().ok().unwrap().refuse(Errno::NOLCK).pop_next().err().unwrap();
    assert_eq!(guest.used_since(), [(0, REPLY), (1, REPLY)]);
    drop(scratch);
    assert_eq!(guest.used_since().len(), 2);
}

#[test]
fn a_chain_that_is_not_a_request_is_completed_empty() {
    let guest = Guest::new();
    guest.offer_bytes(0, &[0; size_of::<InHeader>() - 1]);
    guest.offer_bytes(1, &[0; size_of::<InHeader>()]);
    // A descriptor of 8 bytes, behind which one follows that does not exist.
    let broken = 0x4000u128 | 8 << 64 | 1 << 96 | 99 << 112;
    guest.memory.memory().write_obj(broken.to_le_bytes(), GuestAddress(LAYOUT.descriptors + 16)).unwrap();
    let (error, completion) = guest.popped().decode().err().unwrap();
    assert!(matches!(error, RequestError::NoHeader));
    let (popped, _) = completion.pop_next().ok().unwrap();
    let (error, completion) = popped.decode().err().unwrap();
    assert!(matches!(error, RequestError::Chain(ChainError::Index(99))));
    drop(completion);
    assert_eq!(guest.used_since(), [(0, 0), (1, 0)]);
}

#[test]
fn a_request_that_is_put_back_is_served_later() {
    let guest = Guest::new();
    guest.offer(5, Opcode::Setlkw, setlkw().as_bytes());
    let mut request = guest.in_flight();
    assert_eq!((request.class(), request.unique()), (Class::Blocking, Unique(5)));
    request.detach();
    let popped = request.serve_blocking(&guest.server).err().unwrap();
    let head = popped.into_head();
    assert_eq!((head, guest.used_since()), (5, vec![]));
    let chain = Resumed { head, written: None, deaths: 0, is_poison: false, unique: 5, opcode: 33, len: 0 };
    let resumed = monotonic();
    let request = Popped::resumed(&guest.queue, chain, channel().0).decode().ok().unwrap();
    let (since, _) = guest.metrics.progress(1, 5);
    assert!(since >= resumed, "its time counts from then on");
    request.refuse(Errno::NOLCK).add_used();
    assert_eq!(guest.used_since(), [(5, REPLY)]);
    let sample = guest.metrics.sample();
    let counted = sample.ops.iter().find(|op| op.name == "setlkw").unwrap();
    assert!(counted.nanos <= monotonic() - resumed);
}

#[test]
fn a_chain_that_is_not_a_request_counts_nothing_of_the_one_before() {
    let guest = Guest::new();
    let arguments = WriteIn { size: 8, ..WriteIn::new_zeroed() };
    guest.offer(0, Opcode::Write, &[arguments.as_bytes(), &[1; 8]].concat());
    let completion = guest.in_flight().serve(&guest.server);
    guest.offer_bytes(1, &[0; 8]);
    let (popped, _) = completion.pop_next().ok().unwrap();
    drop(popped.decode().err().unwrap());
    let sample = guest.metrics.sample();
    assert_eq!((sample.bytes_read, sample.bytes_written), (0, 8));
}

#[test]
fn a_header_that_changes_later_is_not_read_again() {
    let guest = Guest::new();
    guest.offer(0, Opcode::Statfs, &[]);
    let request = guest.in_flight();
    guest.memory.memory().write_slice(&[0xff; 40], GuestAddress(0x4000)).unwrap();
    assert_eq!((request.class(), request.unique()), (Class::Inline, Unique(0)));
    assert_eq!(request.serve(&guest.server).0.used.written, REPLY);
}
