//! What a front end has: guest memory in two memory files, eventfds, and other descriptors that
//! it might send by mistake or by malice. Made once, and put in order before each input.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Bytes of each of the two regions.
const REGION: u64 = 1 << 16;
/// Where guest memory is in the front end's process, as it says.
const USER: u64 = 0x7000_0000;
/// Queues that have eventfds.
const QUEUES: usize = 3;
/// Descriptors of each ring.
const RING: u16 = 8;
/// Bytes from one ring to the next; a table, and from the middle on both rings.
const RING_SPACE: u64 = 0x1000;
/// Bytes from the available ring to the used ring.
const USED: u64 = 0x400;
/// How often the answer to a request is looked for.
const WAITS: u32 = 40;
/// Where requests are.
const BUFFERS: u64 = 0x8000;

/// Codes of messages.
#[allow(missing_docs)]
pub mod code {
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// A message to be sent.
#[derive(Debug)]
pub struct Message {
    /// What it is.
    pub code: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What comes along.
    pub fds: Vec<RawFd>,
}

/// The front end's memory and descriptors.
#[derive(Debug)]
pub struct Machine {
    memory: [File; 2],
    short: File,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    /// One that is full and blocks.
    full: OwnedFd,
    null: File,
    pipe: (OwnedFd, OwnedFd),
    sockets: (UnixStream, UnixStream),
}

fn memory(len: u64) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file"));
    file.set_len(len).expect("memory");
    file
}

fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags | EventfdFlags::CLOEXEC).expect("an eventfd")
}

/// Reads all that there is.
fn drain(fd: impl AsFd) {
    fcntl_setfl(&fd, OFlags::NONBLOCK).expect("a pipe, socket or eventfd");
    while rustix::io::read(&fd, &mut [0; 4096]).is_ok_and(|count| count > 0) {}
}

impl Machine {
    /// The one that there is.
    pub fn get() -> &'static Machine {
        static MACHINE: OnceLock<Machine> = OnceLock::new();
        MACHINE.get_or_init(|| Machine {
            memory: [memory(REGION), memory(REGION)],
            short: memory(4096),
            kicks: (0..QUEUES).map(|_| event(EventfdFlags::NONBLOCK)).collect(),
            calls: (0..QUEUES).map(|_| event(EventfdFlags::NONBLOCK)).collect(),
            full: event(EventfdFlags::empty()),
            null: File::options().read(true).write(true).open("/dev/null").expect("/dev/null"),
            pipe: rustix::pipe::pipe().expect("a pipe"),
            sockets: UnixStream::pair().expect("sockets"),
        })
    }

    /// Empties memory and eventfds.
    pub fn reset(&self) {
        for file in &self.memory {
            file.write_all_at(&[0; REGION as usize], 0).expect("memory");
        }
        for event in self.kicks.iter().chain(&self.calls) {
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        drain(&self.pipe.0);
        drain(&self.sockets.1);
        // Filled again, whatever was taken out of it.
        drain(&self.full);
        fcntl_setfl(&self.full, OFlags::empty()).expect("an eventfd");
        rustix::io::write(&self.full, &(u64::MAX - 1).to_ne_bytes()).expect("it is empty");
    }

    /// The front end's address of a guest-physical one.
    pub fn user_address(&self, guest: u64) -> u64 {
        guest.wrapping_add(USER)
    }

    /// One of the descriptors.
    pub fn descriptor(&self, choice: u8) -> RawFd {
        let all: [BorrowedFd<'_>; 16] = [
            self.memory[0].as_fd(),
            self.memory[1].as_fd(),
            self.memory[0].as_fd(),
            self.kicks[0].as_fd(),
            self.kicks[1].as_fd(),
            self.kicks[2].as_fd(),
            self.calls[0].as_fd(),
            self.calls[1].as_fd(),
            self.calls[2].as_fd(),
            self.short.as_fd(),
            self.full.as_fd(),
            self.null.as_fd(),
            self.pipe.0.as_fd(),
            self.pipe.1.as_fd(),
            self.sockets.0.as_fd(),
            self.memory[1].as_fd(),
        ];
        all[usize::from(choice) % all.len()].as_raw_fd()
    }

    /// Writes to guest memory, which both regions hold without a gap.
    pub fn poke(&self, address: usize, bytes: &[u8]) {
        let at = address as u64;
        let file = &self.memory[usize::from(at >= REGION)];
        let end = (REGION - at % REGION).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..end], at % REGION).expect("memory");
    }

    fn peek(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory[0].read_exact_at(&mut bytes, address).expect("memory");
        u16::from_le_bytes(bytes)
    }

    /// Kicks a queue.
    pub fn kick(&self, queue: u8) {
        let _ = rustix::io::write(&self.kicks[usize::from(queue) % QUEUES], &1u64.to_ne_bytes());
    }

    /// Puts a request with room for a reply into the ring of a queue that is where
    /// [`Machine::set_up`] says, and kicks.
    pub fn request(&self, queue: u8, request: &[u8]) {
        let queue = u64::from(queue) % QUEUES as u64;
        let ring = queue * RING_SPACE;
        let available = ring + RING_SPACE / 2;
        let index = self.peek(available + 2);
        let slot = u64::from(index % RING);
        let head = (index % (RING / 2)) * 2;
        let buffer = BUFFERS + queue * RING_SPACE + u64::from(head) * 256;
        self.poke(buffer as usize, request);
        for (number, address, len, flags) in
            [(head, buffer, request.len() as u32, 1u16), (head + 1, buffer + 256, 256, 2)]
        {
            let fields = [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes()].concat();
            let entry = [fields, (head + 1).to_le_bytes().to_vec()].concat();
            self.poke((ring + u64::from(number) * 16) as usize, &entry);
        }
        self.poke((available + 4 + slot * 2) as usize, &head.to_le_bytes());
        self.poke((available + 2) as usize, &index.wrapping_add(1).to_le_bytes());
        self.kick(queue as u8);
    }

    /// Waits a little until all requests of a queue are answered, as [`Machine::request`] sends
    /// them. The queue may be broken or not even run, so that none ever is.
    pub fn wait(&self, queue: u8) {
        let available = u64::from(queue) % QUEUES as u64 * RING_SPACE + RING_SPACE / 2;
        for _ in 0..WAITS {
            if self.peek(available + 2) == self.peek(available + USED + 2) {
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// All that a front end says until a queue runs.
    pub fn set_up(&self, queue: u8) -> Vec<Message> {
        let number = u32::from(queue) % QUEUES as u32;
        let at = usize::from(queue) % QUEUES;
        let ring = USER + u64::from(number) * RING_SPACE;
        let long = |value: u64| value.to_le_bytes().to_vec();
        let state = |value: u32| [number, value].map(u32::to_le_bytes).concat();
        let plain = |code, body| Message { code, body, fds: Vec::new() };
        let region =
            |index: u64| [index * REGION, REGION, USER + index * REGION, 0].map(u64::to_le_bytes).concat();
        let mut messages = Vec::new();
        if queue < 128 {
            messages.push(plain(code::SET_OWNER, Vec::new()));
            let logs = u64::from(queue & 64) >> 6;
            messages
                .push(plain(code::SET_FEATURES, long(1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | logs << 26)));
            messages.push(plain(code::SET_PROTOCOL_FEATURES, long(3 | 1 << 3 | 1 << 13 | 1 << 15)));
            if logs > 0 {
                // A log for a part of the pages, in the guest's second region.
                let body = [long(u64::from(queue & 63) + 1), long(0)].concat();
                messages.push(Message {
                    code: code::SET_LOG_BASE,
                    body,
                    fds: vec![self.memory[1].as_raw_fd()],
                });
            }
            let body = [long(2), region(0), region(1)].concat();
            let fds = self.memory.iter().map(AsRawFd::as_raw_fd).collect();
            messages.push(Message { code: code::SET_MEM_TABLE, body, fds });
        }
        let addresses = [ring, ring + RING_SPACE / 2 + USED, ring + RING_SPACE / 2, 0].map(u64::to_le_bytes);
        messages.push(plain(code::SET_VRING_NUM, state(u32::from(RING))));
        messages.push(plain(code::SET_VRING_BASE, state(0)));
        messages.push(plain(code::SET_VRING_ADDR, [state(0), addresses.concat()].concat()));
        let event =
            |code, fd: &OwnedFd| Message { code, body: long(number.into()), fds: vec![fd.as_raw_fd()] };
        messages.push(event(code::SET_VRING_CALL, &self.calls[at]));
        messages.push(event(code::SET_VRING_KICK, &self.kicks[at]));
        messages.push(plain(code::SET_VRING_ENABLE, state(1)));
        messages
    }
}

/// Sends bytes and descriptors; false if the other end is gone.
pub fn send(stream: &mut UnixStream, bytes: &[u8], fds: &[RawFd]) -> bool {
    if fds.is_empty() {
        return stream.write_all(bytes).is_ok();
    }
    // SAFETY: the descriptors are those of a `Machine`, which lives for ever.
    let fds: Vec<_> = fds.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds))
        && sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
}
