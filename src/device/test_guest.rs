//! A guest for unit tests. All that a process of the device leaves is the state file and guest memory.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use fuse_protocol::abi::{FileLock, InHeader, InitIn, LkIn, ReadIn};
use fuse_protocol::ids::NodeId;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::request::{Lock, Read};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use zerocopy::{FromZeros, IntoBytes};

use super::dirty_log::{DirtyLog, QueueLog};
use super::inflight::Scratch;
use super::queue::Queue;
use super::ring::{Layout, Ring};
use super::{GuestMemoryMmap, SharedMemory};
use crate::fs::{Context, FileSystem, PUT_BACK, Result as FsResult};
use crate::metrics::Metrics;
use crate::server::Server;
use crate::state_file::{Journal, Place, Resumed, StateFile};
use crate::sys::guest_buffers::GuestWriter;

/// Length of a reply without a body.
pub(super) const REPLY: u32 = 16;

/// Requests that were served: number, and whether as a replay.
pub(super) type Served = Arc<Mutex<Vec<(u64, bool)>>>;

/// READ reads as many bytes as it is asked for, and every lock is held by others until the queue stops.
pub(super) struct Recorder(pub Served);

impl FileSystem for Recorder {
    fn read(&self, ctx: &Context, _: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> FsResult<usize> {
        self.0.lock().unwrap().push((ctx.unique.0, ctx.effects.is_replay()));
        Ok(data.write_zeros(usize::try_from(read.size).unwrap()))
    }

    fn setlkw(&self, _: &Context, _: NodeId, _: &Lock) -> FsResult<()> {
        Err(PUT_BACK)
    }
}

/// A guest with one queue.
pub(super) struct Guest {
    /// Number of the queue.
    pub index: usize,
    pub memory: SharedMemory,
    pub layout: Layout,
    /// Next used entry that the guest has not seen.
    seen: u16,
    next_unique: u64,
    /// Length of the reply that each chain in flight waits for.
    pub expected: HashMap<u16, u32>,
    copy: Copy,
}

/// A copy of what the device writes, which is brought up to date by the dirty log.
struct Copy {
    log: Arc<DirtyLog>,
    file: File,
    bytes: Vec<u8>,
}

impl Copy {
    fn new() -> Copy {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY / PAGE / 8).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, MEMORY / PAGE / 8).unwrap();
        Copy { log: Arc::new(log), file, bytes: Vec::new() }
    }
}

const MEMORY: u64 = 0x10000;
const PAGE: u64 = 4096;

impl Guest {
    /// A guest whose ring of this size begins with this index.
    pub fn new(size: u16, start: u16) -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let copy = Copy::new();
        let layout = Layout { descriptors: 0x1000, available: 0x2000, used: 0x3000, size };
        for ring in [layout.available, layout.used] {
            memory.write_obj(start, GuestAddress(ring + 2)).unwrap();
        }
        let memory = SharedMemory::new(memory);
        let mut guest =
            Guest { index: 1, memory, layout, seen: start, next_unique: 100, expected: HashMap::new(), copy };
        guest.copy.bytes = guest.bytes();
        guest
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// Copies the pages that the log names, as a front end does while it migrates the guest. All that the device may
    /// write is the same then: it writes nothing now.
    pub fn check_log(&mut self) {
        let mut bits = [0; 2];
        self.copy.file.read_exact_at(&mut bits, 0).unwrap();
        self.copy.file.write_all_at(&[0; 2], 0).unwrap();
        let (bits, now) = (u16::from_le_bytes(bits), self.bytes());
        for (page, (new, old)) in now.chunks(4096).zip(self.copy.bytes.chunks_mut(4096)).enumerate() {
            if bits >> page & 1 == 1 {
                old.copy_from_slice(new);
            }
            // The used ring, or the second halves of the chains' places.
            let is_same = match page {
                3 => old == new,
                4.. => [0x400..0x800, 0xc00..0x1000].into_iter().all(|half| old[half.clone()] == new[half]),
                _ => true,
            };
            assert!(is_same, "page {page} was written and is not in the log");
        }
    }

    /// A process writes the beginning of a reply, and dies.
    pub fn begin_reply(&self, head: u16) {
        let at = 0x4000 + 0x800 * u64::from(head) + 0x400;
        self.memory.memory().write_obj(!self.next_unique, GuestAddress(at)).unwrap();
    }

    /// Sends INIT in chain 0 to a device that is served here and now.
    pub fn begin_session(&mut self, queue: &Arc<Queue>, server: &Server) {
        let init = InitIn { major: 7, minor: 45, max_readahead: 0, flags: 0, flags2: 0, unused: [0; 11] };
        self.offer(0, Opcode::Init, init.as_bytes());
        let popped = Scratch::new(queue).pop().ok().unwrap().0;
        popped.decode().ok().unwrap().serve(server).add_used();
        assert_eq!(self.used().len(), 1);
    }

    /// Offers the chain with this head: a readable and a writable descriptor. Returns the number of the request.
    pub fn offer(&mut self, head: u16, opcode: Opcode, arguments: &[u8]) -> u64 {
        let len = u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap();
        self.next_unique += 2;
        let unique = self.next_unique;
        let header = InHeader { len, opcode: opcode as u32, unique, ..InHeader::new_zeroed() };
        self.write_request(head, &[header.as_bytes(), arguments].concat());
        self.make_available(head);
        unique
    }

    /// Offers a READ whose reply has as many bytes as no other one that is in flight.
    pub fn offer_read(&mut self, head: u16) -> u64 {
        let size = u32::try_from(self.next_unique % 500).unwrap();
        self.expected.insert(head, REPLY + size);
        self.offer(head, Opcode::Read, ReadIn { size, ..ReadIn::default() }.as_bytes())
    }

    /// Offers a SETLKW.
    pub fn offer_wait(&mut self, head: u16) -> u64 {
        let lk = FileLock { start: 0, end: 9, typ: libc::F_WRLCK.cast_unsigned(), pid: 1 };
        let lock = LkIn { fh: 1, owner: 1, lk, lk_flags: 0, padding: 0 };
        self.offer(head, Opcode::Setlkw, lock.as_bytes())
    }

    /// Lays the chain with this head.
    pub fn write_request(&self, head: u16, bytes: &[u8]) {
        let (memory, at) = (self.memory.memory(), 0x4000 + 0x800 * u64::from(head));
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        // An indirect table for each chain.
        let table = 0x800 + 32 * u64::from(head);
        let describe = |at: u64, address: u64, len: usize, flags: u128, next: u128| {
            let len = u128::try_from(len).unwrap();
            let raw = u128::from(address) | len << 64 | flags << 96 | next << 112;
            memory.write_obj(raw.to_le_bytes(), GuestAddress(at)).unwrap();
        };
        describe(self.layout.descriptors + 16 * u64::from(head), table, 32, 4, 0);
        describe(table, at, bytes.len(), 1, 1);
        describe(table + 16, at + 0x400, 0x400, 2, 0);
    }

    pub fn make_available(&self, head: u16) {
        let memory = self.memory.memory();
        let index: u16 = memory.read_obj(GuestAddress(self.layout.available + 2)).unwrap();
        let slot = self.layout.available + 4 + 2 * u64::from(index % self.layout.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_index(self.layout.available, index.wrapping_add(1));
    }

    /// Writes the index of one of the rings.
    pub fn set_index(&self, ring: u64, index: u16) {
        self.memory.memory().write_obj(index, GuestAddress(ring + 2)).unwrap();
    }

    /// The index of the used ring.
    pub fn used_index(&self) -> u16 {
        self.memory.memory().read_obj(GuestAddress(self.layout.used + 2)).unwrap()
    }

    /// Adds a used entry in the device's place.
    pub fn write_used(&self, head: u16, len: u32) {
        let index = self.used_index();
        let slot = self.layout.used + 4 + 8 * u64::from(index % self.layout.size);
        self.memory.memory().write_obj([u32::from(head), len], GuestAddress(slot)).unwrap();
        self.set_index(self.layout.used, index.wrapping_add(1));
    }

    /// Errno of the reply in a chain.
    pub fn error(&self, head: u16) -> i32 {
        self.memory.memory().read_obj(GuestAddress(0x4000 + 0x800 * u64::from(head) + 0x404)).unwrap()
    }

    /// Heads and lengths of the used entries that are new.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let memory = self.memory.memory();
        let index: u16 = memory.read_obj(GuestAddress(self.layout.used + 2)).unwrap();
        let mut entries = Vec::new();
        while self.seen != index {
            let slot = self.layout.used + 4 + 8 * u64::from(self.seen % self.layout.size);
            let [head, len]: [u32; 2] = memory.read_obj(GuestAddress(slot)).unwrap();
            entries.push((u16::try_from(head).unwrap(), len));
            self.seen = self.seen.wrapping_add(1);
        }
        entries
    }

    /// Takes the used entries that are new, each of which has to be one that is expected.
    pub fn receive(&mut self) {
        for (head, len) in self.used() {
            assert_eq!(self.expected.remove(&head), Some(len), "the used entry of chain {head}");
        }
    }

    /// A process of the device begins with the queue, as a vring does it; with what it says of the beginning.
    pub fn start(&self, state: &Arc<StateFile>, base: u16) -> (Arc<Queue>, Vec<Resumed>, bool) {
        let journal = Journal::new(state, self.index);
        let mut ring = Ring::new(&self.memory.memory(), self.layout, base, true).unwrap();
        ring.set_log(Some(QueueLog::new(Arc::clone(&self.copy.log), Some(self.layout.used))));
        let start = journal.start(self.place(), base, ring.next_used());
        ring.set_next_available(start.next_available);
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (memory, metrics) = (self.memory.clone(), Metrics::create().unwrap().for_queue(self.index));
        let queue = Queue::new(self.index, memory, ring, Arc::new(kick), None, journal, metrics).unwrap();
        let queue = queue.resuming(start.resumed.clone(), false);
        (Arc::new(queue), start.resumed, start.after_crash)
    }

    fn place(&self) -> Place {
        let Layout { descriptors, available, used, size } = self.layout;
        Place { descriptors, available, used, size }
    }
}
