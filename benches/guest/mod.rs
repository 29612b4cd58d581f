//! A guest's memory and one ring in it, without a front end and without another thread.
#![allow(dead_code, reason = "every benchmark uses its own part")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuse_protocol::abi::{InHeader, InitIn, KERNEL_VERSION, OpenIn};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd::config::FsConfig;
use lanefsd::device::inline_queue::InlineQueue;
use lanefsd::device::queue::Queue;
use lanefsd::device::ring::{Layout, Ring};
use lanefsd::device::{GuestMemoryMmap, SharedMemory};
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::limits::Limits;
use lanefsd::metrics::counts::Served;
use lanefsd::metrics::{Metrics, slow};
use lanefsd::server::Server;
use lanefsd::state_file::{Journal, Place, StateFile};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{CWD, Mode, OFlags, openat};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

/// Descriptors of the ring.
pub const RING_SIZE: u16 = 256;
/// The ring, and behind it the requests.
pub const LAYOUT: Layout = Layout { descriptors: 0x1000, available: 0x3000, used: 0x4000, size: RING_SIZE };
const TABLE: u64 = 0x6000;
const REQUEST: u64 = 0x10_000;
const REPLY: u64 = 0x20_000;
const DATA: u64 = 0x100_000;
const MEMORY: usize = 4 << 20;
/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory of a guest.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// Writes one descriptor of a table.
pub fn describe(memory: &GuestMemoryMmap, at: u64, (address, len, flags, next): (u64, usize, u16, u16)) {
    let len = u128::try_from(len).unwrap();
    let raw = u128::from(address) | len << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    memory.write_obj(raw.to_le_bytes(), GuestAddress(at)).unwrap();
}

/// Lays an indirect chain with descriptor 0 as its head: these buffers, the first `readable` of
/// them for the device to read.
pub fn lay_chain(memory: &GuestMemoryMmap, buffers: &[(u64, usize)], readable: usize) {
    for (number, &(address, len)) in buffers.iter().enumerate() {
        let next = if number + 1 < buffers.len() { NEXT } else { 0 };
        let write = if number < readable { 0 } else { WRITE };
        let number = u16::try_from(number).unwrap();
        describe(memory, TABLE + 16 * u64::from(number), (address, len, next | write, number + 1));
    }
    describe(memory, LAYOUT.descriptors, (TABLE, 16 * buffers.len(), INDIRECT, 0));
}

/// Makes the chain at descriptor 0 available `count` times.
pub fn offer(memory: &GuestMemoryMmap, count: u16) {
    let index: u16 = memory.read_obj(GuestAddress(LAYOUT.available + 2)).unwrap();
    for number in 0..count {
        let slot = u64::from(index.wrapping_add(number) % RING_SIZE);
        memory.write_obj(0u16, GuestAddress(LAYOUT.available + 4 + 2 * slot)).unwrap();
    }
    memory.write_obj(index.wrapping_add(count), GuestAddress(LAYOUT.available + 2)).unwrap();
    // The guest wants a notification for the last one: the used event follows the available ring.
    let event = index.wrapping_add(count).wrapping_sub(1);
    memory.write_obj(event, GuestAddress(LAYOUT.available + 4 + 2 * u64::from(RING_SIZE))).unwrap();
}

/// A request to send.
pub struct Request<'a> {
    /// The operation.
    pub opcode: Opcode,
    /// The inode.
    pub node: u64,
    /// Arguments, each in a buffer of its own as Linux sends them.
    pub arguments: Vec<&'a [u8]>,
    /// Bytes of the file that a WRITE carries.
    pub data: usize,
    /// Room for the reply's body.
    pub body: usize,
    /// Room for a READ's data.
    pub room: usize,
}

/// A guest that sends one request after the other, and the device that serves it.
pub struct Guest {
    memory: SharedMemory,
    device: InlineQueue,
    kick: OwnedFd,
    call: OwnedFd,
    unique: u64,
    /// Removed at the end.
    _share: tempfile::TempDir,
}

impl Guest {
    /// A guest in session with a device that shares a fresh directory.
    pub fn new(config: FsConfig) -> Guest {
        let share = tempfile::tempdir_in("/dev/shm").unwrap();
        let open = |path: &std::path::Path| {
            openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let proc_self_fd = open("/proc/self/fd".as_ref());
        lanefsd::process::prepare_for_requests(&proc_self_fd).unwrap();
        let limits = Limits::of_the_process(&proc_self_fd).unwrap();
        let state = StateFile::create().unwrap();
        let fs = PassthroughFs::new(open(share.path()), proc_self_fd, limits, config, &state).unwrap();
        let memory = SharedMemory::new(memory());
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (kick, call) = (event(), event());
        let ring = Ring::new(&self::memory_of(&memory), LAYOUT, 0, true).unwrap();
        let theirs = (kick.try_clone().unwrap(), call.try_clone().unwrap());
        let journal = Journal::new(&state, 1);
        let _ = journal.start(
            Place {
                descriptors: LAYOUT.descriptors,
                available: LAYOUT.available,
                used: LAYOUT.used,
                size: RING_SIZE,
            },
            0,
            0,
        );
        let metrics = Metrics::create().unwrap().for_queue(1);
        // What is measured is not among the slowest requests.
        let slow = Served { nanos: 60_000_000_000, ..Served::default() };
        (0..slow::KEPT).for_each(|_| metrics.shard().completed(&slow));
        let queue =
            Queue::new(1, memory.clone(), ring, theirs.0.into(), Some(theirs.1.into()), journal, metrics)
                .unwrap();
        let device = InlineQueue::new(queue, Arc::new(Server::new(Arc::new(fs))));
        let mut guest = Guest { memory, device, kick, call, unique: 2, _share: share };
        let init = InitIn {
            major: KERNEL_VERSION,
            minor: 45,
            max_readahead: 128 << 10,
            flags: u32::try_from(InitFlags::INIT_EXT.bits()).unwrap(),
            flags2: 0,
            unused: [0; 11],
        };
        guest.call(&Request {
            opcode: Opcode::Init,
            node: 0,
            arguments: vec![init.as_bytes()],
            data: 0,
            body: 64,
            room: 0,
        });
        guest
    }

    /// The file `name` in the share, 64 KiB long: its node.
    pub fn file(&mut self, name: &str) -> u64 {
        std::fs::write(self._share.path().join(name), vec![1; 64 << 10]).unwrap();
        let name = [name.as_bytes(), b"\0"].concat();
        let reply = self.call(&Request {
            opcode: Opcode::Lookup,
            node: 1,
            arguments: vec![&name],
            data: 0,
            body: 128,
            room: 0,
        });
        u64::read_from_bytes(&reply[..8]).unwrap()
    }

    /// A handle of a file.
    pub fn open(&mut self, node: u64) -> u64 {
        let flags = OpenIn { flags: libc::O_RDWR.cast_unsigned(), open_flags: 0 };
        let reply = self.call(&Request {
            opcode: Opcode::Open,
            node,
            arguments: vec![flags.as_bytes()],
            data: 0,
            body: 16,
            room: 0,
        });
        u64::read_from_bytes(&reply[..8]).unwrap()
    }

    /// Puts a request into memory. Every [`Guest::serve`] from now on serves it.
    pub fn prepare(&mut self, request: &Request<'_>) {
        let memory = memory_of(&self.memory);
        let arguments: usize = request.arguments.iter().map(|argument| argument.len()).sum();
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + arguments + request.data).unwrap(),
            opcode: request.opcode as u32,
            unique: self.unique,
            nodeid: request.node,
            uid: 0,
            gid: 0,
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        self.unique += 2;
        let mut at = REQUEST;
        let mut buffers = Vec::new();
        for part in [header.as_bytes()].into_iter().chain(request.arguments.iter().copied()) {
            memory.write_slice(part, GuestAddress(at)).unwrap();
            buffers.push((at, part.len()));
            // No neighbours, as in Linux.
            at += 256;
        }
        buffers.extend((request.data > 0).then_some((DATA, request.data)));
        let readable = buffers.len();
        buffers.push((REPLY, 16));
        buffers.extend((request.body > 0).then_some((REPLY + 256, request.body)));
        buffers.extend((request.room > 0).then_some((DATA, request.room)));
        lay_chain(&memory, &buffers, readable);
    }

    /// Makes the prepared request available `count` times, and kicks.
    pub fn send(&self, count: u16) {
        offer(&memory_of(&self.memory), count);
        rustix::io::write(self.kick.as_fd(), &1u64.to_ne_bytes()).unwrap();
    }

    /// From the kick to the notification, all of it on this thread.
    pub fn serve(&mut self) {
        self.device.process_kick();
    }

    /// Checks that `count` requests were answered with success and the guest was notified.
    pub fn check(&self, count: u16) -> u32 {
        let memory = memory_of(&self.memory);
        let [available, used] = [LAYOUT.available, LAYOUT.used]
            .map(|ring| memory.read_obj::<u16>(GuestAddress(ring + 2)).unwrap());
        assert_eq!(available, used, "a request was not served");
        let [len, error]: [u32; 2] = memory.read_obj(GuestAddress(REPLY)).unwrap();
        assert_eq!(error, 0, "a request was refused");
        let mut count_bytes = [0; 8];
        rustix::io::read(self.call.as_fd(), &mut count_bytes).unwrap();
        let notifications = u64::from_ne_bytes(count_bytes);
        assert!((1..=u64::from(count)).contains(&notifications), "{notifications} notifications");
        len
    }

    /// Sends a request, has it served, and returns its reply's body.
    pub fn call(&mut self, request: &Request<'_>) -> Vec<u8> {
        self.prepare(request);
        self.send(1);
        self.serve();
        let len = usize::try_from(self.check(1)).unwrap() - 16;
        let mut body = vec![0; len.min(request.body)];
        memory_of(&self.memory).read_slice(&mut body, GuestAddress(REPLY + 256)).unwrap();
        body
    }
}

fn memory_of(memory: &SharedMemory) -> vm_memory::atomic::GuestMemoryLoadGuard<GuestMemoryMmap> {
    use vm_memory::GuestAddressSpace;
    memory.memory()
}
