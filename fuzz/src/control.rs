//! The control protocol against the real device: messages, descriptors, guest memory and kicks in
//! any order. Afterwards no descriptor, thread, handle or lookup is left.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lanefsd::config::{DeviceConfig, MigrationConfig};
use lanefsd::device::backend::Backend;
use lanefsd::device::engine::Stations;
use lanefsd::metrics::Metrics;
use lanefsd::server::Server;
use lanefsd::state_file::StateFile;
use lanefsd_memory_fs::MemoryFs;
use vhost::vhost_user::BackendReqHandler;

use crate::front_end::{Machine, code};
use crate::input::Input;

/// Most steps of one input.
const MAX_STEPS: usize = 64;
/// Bytes that the file system holds.
const CAPACITY: usize = 1 << 18;
/// How long what is left may take to go.
const PATIENCE: Duration = Duration::from_secs(10);
/// Codes of messages that the protocol has, and one that it has not.
const CODES: [u32; 29] = [
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 24, 25, 31, 32, 33, 34, 36, 37, 38, 42,
    99,
];

/// What the input does, one byte each.
#[allow(missing_docs)]
pub mod step {
    pub const FRAME: u8 = 0;
    pub const SET_UP: u8 = 1;
    pub const KICK: u8 = 2;
    pub const POKE: u8 = 3;
    pub const REQUEST: u8 = 4;
    pub const MESSAGE: u8 = 5;
    pub const RAW: u8 = 6;
    pub const COUNT: u8 = 7;
}

type Handler = BackendReqHandler<Mutex<Backend>>;

/// A conversation as `data` tells it.
pub fn converse(data: &[u8]) {
    let machine = Machine::get();
    machine.reset();
    let before = (descriptors(), threads());
    let memory = MemoryFs::new(CAPACITY);
    let server = Arc::new(Server::new(Arc::new(memory.clone())));
    let mut input = Input::new(data);
    let choice = input.byte();
    let config = DeviceConfig {
        tag: (choice & 1 != 0).then(|| "share".to_owned()),
        request_queues: 2,
        descriptors_are_copied: false,
        migration: MigrationConfig::default(),
        thread_pool_size: if choice & 2 != 0 { 4 } else { 0 },
        poll_time: Duration::from_micros(if choice & 4 != 0 { 20 } else { 0 }),
        rates: lanefsd::limits::Rates::default(),
        group: None,
    };
    talk(&mut input, machine, &config, &server);
    assert_eq!(memory.open_handles(), 0);
    assert!(memory.lookups().is_empty());
    assert_eq!(memory.held_locks(), 0);
    settle(before);
}

/// One front end from its coming to its leaving.
fn talk(input: &mut Input<'_>, machine: &Machine, config: &DeviceConfig, server: &Arc<Server>) {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    // The replies of at most MAX_STEPS messages are read by nobody; they find room in the socket.
    let backend = Backend::new(
        config,
        Arc::clone(server),
        StateFile::create().expect("memory"),
        Metrics::create().expect("memory"),
        None,
        Stations::default(),
    )
    .expect("a device");
    let backend = Arc::new(Mutex::new(backend));
    let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&backend));
    for _ in 0..MAX_STEPS {
        if input.is_empty() || !step(input, machine, &mut ours, &mut handler) {
            break;
        }
    }
    // What was begun and not ended ends here.
    let _ = ours.shutdown(Shutdown::Both);
    while handler.handle_request().is_ok() {}
    backend.lock().expect("no panic before").shut_down();
}

/// One step; false when the conversation is over.
fn step(input: &mut Input<'_>, machine: &Machine, ours: &mut UnixStream, handler: &mut Handler) -> bool {
    match input.byte() % step::COUNT {
        step::FRAME => {
            let (code, flags) = (u32::from(input.byte()), u32::from(input.byte()));
            let count = usize::from(input.byte());
            let body = input.bytes(count).to_vec();
            let fds = fds(input, machine);
            say(ours, handler, code, flags, &body, &fds)
        }
        step::SET_UP => machine
            .set_up(input.byte())
            .into_iter()
            .all(|message| say(ours, handler, message.code, 1, &message.body, &message.fds)),
        step::KICK => {
            machine.kick(input.byte());
            true
        }
        step::POKE => {
            let (address, count) = (usize::from(input.short()), usize::from(input.byte()));
            machine.poke(address, input.bytes(count));
            true
        }
        step::REQUEST => {
            let (queue, count) = (input.byte(), usize::from(input.byte()));
            machine.request(queue, input.bytes(count));
            // Some are to be in flight when the next message comes.
            if queue < 128 {
                machine.wait(queue);
            }
            true
        }
        step::MESSAGE => message(input, machine, ours, handler),
        _ => {
            let count = usize::from(input.byte());
            let _ = ours.write_all(input.bytes(count));
            false
        }
    }
}

/// A message whose parts are plausible.
fn message(input: &mut Input<'_>, machine: &Machine, ours: &mut UnixStream, handler: &mut Handler) -> bool {
    let code = input.choose(&CODES);
    let flags = input.choose(&[1, 9, 9, 1, 5, 0, 3]);
    let queue = u32::from(input.byte() % 5);
    let user = |input: &mut Input<'_>| machine.user_address(input.edge());
    let mut body = Vec::new();
    match code {
        code::SET_VRING_NUM | code::SET_VRING_BASE | code::GET_VRING_BASE | code::SET_VRING_ENABLE => {
            body.extend(queue.to_le_bytes());
            body.extend(input.edge().to_le_bytes().iter().take(4));
        }
        code::SET_VRING_ADDR => {
            body.extend(queue.to_le_bytes());
            body.extend(u32::from(input.byte() & 1).to_le_bytes());
            (0..4).for_each(|_| body.extend(user(input).to_le_bytes()));
        }
        code::SET_MEM_TABLE => {
            let count = u32::from(input.byte() % 9);
            body.extend(count.to_le_bytes());
            body.extend([0; 4]);
            (0..count).for_each(|_| body.extend(region(input, machine)));
        }
        code::ADD_MEM_REG | code::REM_MEM_REG => {
            body.extend([0; 8]);
            body.extend(region(input, machine));
        }
        code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
            let none = u64::from(input.byte() >> 7) << 8;
            body.extend((u64::from(queue) | none).to_le_bytes());
        }
        code::GET_CONFIG | code::SET_CONFIG => {
            let (offset, size) = (u32::from(input.byte()), u32::from(input.byte()));
            body.extend([offset, size, 0].map(u32::to_le_bytes).concat());
            body.resize(body.len() + usize::try_from(size).unwrap_or(0), 0);
        }
        code::SET_LOG_BASE => {
            let (size, offset) = (input.edge(), input.edge());
            let round = if input.byte() & 1 == 0 { 0 } else { 4095 };
            body.extend([size, offset & !round].map(u64::to_le_bytes).concat());
        }
        code::SET_FEATURES | code::SET_PROTOCOL_FEATURES => body.extend(input.long().to_le_bytes()),
        _ => {
            let count = usize::from(input.byte() % 64);
            body.extend(input.bytes(count));
        }
    }
    let fds = fds(input, machine);
    say(ours, handler, code, flags, &body, &fds)
}

/// A memory region: guest address, size, user address, offset in the file.
fn region(input: &mut Input<'_>, machine: &Machine) -> Vec<u8> {
    let (guest, size) = (input.edge(), input.edge());
    let [user, offset] = [machine.user_address(input.edge()), input.edge()];
    let round = if input.byte() & 3 == 0 { 0 } else { 4095 };
    [guest & !round, size & !round, user & !round, offset & !round].map(u64::to_le_bytes).concat()
}

fn fds(input: &mut Input<'_>, machine: &Machine) -> Vec<RawFd> {
    let count = input.choose(&[0, 1, 1, 2, 8, 9]);
    (0..count).map(|_| machine.descriptor(input.byte())).collect()
}

/// Sends a message that is as long as it says, and has it handled.
fn say(
    ours: &mut UnixStream,
    handler: &mut Handler,
    code: u32,
    flags: u32,
    body: &[u8],
    fds: &[RawFd],
) -> bool {
    let size = u32::try_from(body.len()).unwrap_or(0);
    let message = [&[code, flags, size].map(u32::to_le_bytes).concat(), body].concat();
    crate::front_end::send(ours, &message, fds) && handler.handle_request().is_ok()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// Waits until no more descriptors and threads are there than before.
fn settle(before: (usize, usize)) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = (descriptors(), threads());
        if now.0 <= before.0 && now.1 <= before.1 {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {now:?} descriptors and threads, before {before:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
}
