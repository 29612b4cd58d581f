//! A request in flight: one descriptor chain from its pop to its used entry.
//!
//! A request owns all that it needs on the way: the head of the chain, the header, the segments and the
//! guest memory in which they lie, the buffers of the server. So it can move to another thread, and no
//! part of it is read from the guest twice. Each phase is a type, and each step consumes the one before:
//!
//! ```text
//! Scratch ── pop ──> Popped ── decode ──> InFlight ── complete ──> Completion ── pop_next ──> Popped
//!  no chain           head        ^        header         │         length        │
//!    ^                            └─────── put back ──────┘                    add_used
//!    └────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Every chain gets exactly one used entry. [`InFlight::complete`] fixes its length, and the next step adds
//! it. A request that is dropped on the way, also by a panic, adds the entry at once: an empty one if it was
//! not completed. Only [`Popped::into_head`] takes a chain out of its request without an entry.
//!
//! All phases share one allocation, which moves from request to request of a worker: a request allocates
//! nothing. A worker whose request has moved away makes a new one.

use std::sync::Arc;
use std::time::Instant;

use fuse_protocol::abi::InHeader;
use fuse_protocol::decode::RawHeader;
use fuse_protocol::ids::Unique;
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::GuestAddressSpace;
use zerocopy::FromZeros;

use super::SharedMemory;
use super::chain::{ChainBuffers, ChainError};
use super::queue::{Backlog, PoppedChain, Queue, Used};
use crate::server::{self, Class, Server};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// Why a chain is not a request.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    /// The chain cannot be walked.
    #[error("a malformed chain: {0}")]
    Chain(#[from] ChainError),
    /// The readable part is shorter than a header.
    #[error("a request without a header")]
    NoHeader,
}

/// Memory for the next request of a worker.
pub(super) struct Scratch(Box<Request>);

/// A chain that was popped. Nothing of it is decoded.
pub(super) struct Popped(Box<Request>);

/// A request that is decoded and not completed.
pub(super) struct InFlight(Box<Request>);

/// A request whose reply is written; the used entry is not added yet.
pub(super) struct Completion(Box<Request>);

/// The one representation of all phases. The types above say which fields are meaningful.
struct Request {
    queue: Arc<Queue>,
    /// There is a chain, and its used entry is not added.
    owes_entry: bool,
    /// The chain, and the bytes of the reply: 0 before [`InFlight::complete`].
    used: Used,
    /// Holds the memory of the segments.
    memory: Option<<SharedMemory as GuestAddressSpace>::T>,
    segments: ChainBuffers,
    header: RawHeader,
    class: Class,
    /// The worker was free for this request: it completed the one before, or woke up.
    start: Instant,
    server: server::Scratch,
}

impl Scratch {
    /// Memory for requests of `queue`.
    pub fn new(queue: &Arc<Queue>) -> Scratch {
        Scratch(Box::new(Request {
            queue: Arc::clone(queue),
            owes_entry: false,
            used: Used::default(),
            memory: None,
            segments: ChainBuffers::default(),
            header: RawHeader::from(InHeader::new_zeroed()),
            class: Class::Inline,
            start: Instant::now(),
            server: server::Scratch::default(),
        }))
    }

    /// Pops a chain, if there is one. Otherwise the guest kicks for the next one.
    pub fn pop(mut self) -> Result<(Popped, Backlog), Scratch> {
        self.0.start = Instant::now();
        let found = self.0.queue.complete_and_pop(None);
        self.0.begin(found)
    }
}

impl Popped {
    /// A chain that was popped from the ring of `queue` before the queue started.
    pub fn from_head(queue: &Arc<Queue>, head: u16) -> Popped {
        let Scratch(mut request) = Scratch::new(queue);
        request.used.head = head;
        request.owes_entry = true;
        Popped(request)
    }

    /// Gives up the chain without a used entry. The caller sees to it that the chain is served later.
    pub fn into_head(mut self) -> u16 {
        self.0.owes_entry = false;
        self.0.used.head
    }

    /// Walks the chain and reads the header. A chain that is not a request is completed without a reply.
    pub fn decode(mut self) -> Result<InFlight, (RequestError, Completion)> {
        match self.0.decode() {
            Ok(()) => Ok(InFlight(self.0)),
            Err(error) => Err((error, Completion::new(self.0, 0))),
        }
    }
}

impl InFlight {
    /// How it is served.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// The guest's number for it.
    pub fn unique(&self) -> Unique {
        self.0.header.unique()
    }

    /// Prepares the request for a thread of its own, where it may stay for long.
    pub fn detach(&mut self) {
        // A clone does not occupy one of the few guards that a thread has for short accesses.
        self.0.memory = self.0.memory.clone();
    }

    /// Serves the request on the calling thread.
    pub fn serve(mut self, server: &Server) -> Completion {
        let (header, input, output, scratch) = self.parts();
        let written = server.serve(header, input, output, scratch);
        self.complete(written)
    }

    /// Serves the request, which may wait for others. It comes back if [`Server::put_back`] ended its wait.
    pub fn serve_blocking(mut self, server: &Server) -> Result<Completion, Popped> {
        let (header, input, output, scratch) = self.parts();
        match server.serve_and_wait(header, input, output, scratch) {
            Some(written) => Ok(self.complete(written)),
            None => {
                self.0.memory = None;
                Err(Popped(self.0))
            }
        }
    }

    /// Refuses the request with `errno`.
    pub fn refuse(mut self, errno: Errno) -> Completion {
        let (header, _, output, _) = self.parts();
        let written = Server::refuse(header, output, errno);
        self.complete(written)
    }

    /// Completes the request: `written` bytes of the chain's writable part are valid.
    fn complete(self, written: u32) -> Completion {
        Completion::new(self.0, written)
    }

    /// The header, the readable part of the chain behind it, the writable part, and the server's buffers.
    fn parts(&mut self) -> (&RawHeader, GuestReader<'_>, GuestWriter<'_>, &mut server::Scratch) {
        let Request { header, segments, server, .. } = &mut *self.0;
        // SAFETY: `decode` took the segments from the memory that the request holds. It holds it until it is
        // completed or put back, which takes `self`, and so ends the borrow first.
        let (mut input, output) = unsafe { segments.ends() };
        input.skip(size_of::<InHeader>());
        (header, input, output, server)
    }
}

impl Completion {
    fn new(mut request: Box<Request>, written: u32) -> Completion {
        request.used.written = written;
        request.memory = None;
        Completion(request)
    }

    /// Adds the used entry, and pops the next chain in the same step. The notification of the guest may
    /// be coalesced with later ones.
    pub fn pop_next(mut self) -> Result<(Popped, Backlog), Scratch> {
        let end = Instant::now();
        let service_time = end - self.0.start;
        self.0.start = end;
        self.0.owes_entry = false;
        let found = self.0.queue.complete_and_pop(Some((self.0.used, service_time)));
        self.0.begin(found)
    }

    /// Adds the used entry.
    pub fn add_used(mut self) -> Scratch {
        self.0.owes_entry = false;
        self.0.queue.complete(self.0.used);
        Scratch(self.0)
    }
}

impl Request {
    /// The next phase, if a chain was `found`.
    fn begin(mut self: Box<Self>, found: Option<PoppedChain>) -> Result<(Popped, Backlog), Scratch> {
        let Some(PoppedChain { head, backlog }) = found else { return Err(Scratch(self)) };
        self.used = Used { head, written: 0 };
        self.owes_entry = true;
        Ok((Popped(self), backlog))
    }

    fn decode(&mut self) -> Result<(), RequestError> {
        // As it is after the pop: the chain may lie in memory that was added just before.
        let memory = self.memory.insert(self.queue.memory().memory());
        self.segments.collect(memory, self.queue.layout(), self.used.head)?;
        // SAFETY: the segments were just taken from the memory that the request holds.
        let (input, _) = unsafe { self.segments.ends() };
        self.header = Server::read_header(&input).ok_or(RequestError::NoHeader)?;
        self.class = Server::class(&self.header);
        Ok(())
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.owes_entry {
            self.queue.complete(self.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use fuse_protocol::abi::{FileLock, InitIn, LkIn};
    use fuse_protocol::ids::NodeId;
    use fuse_protocol::opcode::Opcode;
    use fuse_protocol::request::Lock;
    use rustix::event::{EventfdFlags, eventfd};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    use zerocopy::IntoBytes;

    use super::*;
    use crate::device::ring::{Layout, Ring};
    use crate::fs::{Context, FileSystem, PUT_BACK, Result as FsResult};

    const LAYOUT: Layout = Layout { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };
    /// Length of a reply without a body.
    const REPLY: u32 = 16;

    /// Every lock is held by others until the queue stops.
    struct Locked;

    impl FileSystem for Locked {
        fn setlkw(&self, _: &Context, _: NodeId, _: &Lock) -> FsResult<()> {
            Err(PUT_BACK)
        }
    }

    /// A guest with one queue.
    struct Guest {
        memory: SharedMemory,
        queue: Arc<Queue>,
        server: Server,
    }

    impl Guest {
        /// A guest whose session has begun with the request in chain 7.
        fn new() -> Guest {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let memory = SharedMemory::new(memory);
            let ring = Ring::new(&memory.memory(), LAYOUT, 0, true).unwrap();
            let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
            let queue = Arc::new(Queue::new(1, memory.clone(), ring, kick, None).unwrap());
            let guest = Guest { memory, queue, server: Server::new(Arc::new(Locked)) };
            let init = InitIn { major: 7, minor: 45, max_readahead: 0, flags: 0, flags2: 0, unused: [0; 11] };
            guest.offer(7, Opcode::Init, init.as_bytes());
            guest.in_flight().serve(&guest.server).add_used();
            assert_eq!(guest.used().len(), 1);
            guest
        }

        /// Offers the chain with this head: a readable and a writable descriptor.
        fn offer(&self, head: u16, opcode: Opcode, arguments: &[u8]) {
            let len = u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap();
            let header =
                InHeader { len, opcode: opcode as u32, unique: head.into(), ..InHeader::new_zeroed() };
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
        let request = Popped::from_head(&guest.queue, head).decode().ok().unwrap();
        request.refuse(Errno::NOLCK).add_used();
        assert_eq!(guest.used_since(), [(5, REPLY)]);
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
}
