//! A front end that leaves in mid-sentence, lies in its messages, or sends the wrong descriptors. The
//! daemon keeps listening, loses no descriptor, and serves the next one.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_protocol::abi::StatfsOut;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::{Connection, describe};
use lanefsd_frontend::message::{NEED_REPLY, NO_FD, VERSION, VringState, code, feature, protocol};
use lanefsd_frontend::queue::Queue;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::ring::RingOptions;
use lanefsd_frontend::{Backend, Memory, Request, Segmentation, SessionOptions};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use zerocopy::IntoBytes;

use crate::common;

fn daemon() -> Backend {
    common::start(&["--keep-listening"])
}

/// A well-behaved front end is served.
fn serves(backend: &Backend) {
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
}

fn queue(memory: &Arc<Memory>, index: usize) -> Queue {
    let ring = RingOptions { size: 64, indirect: true, event_idx: true };
    Queue::new(memory, index, ring, Duration::from_secs(5)).unwrap()
}

type Step<'a> = Box<dyn Fn(&mut Connection) -> lanefsd_frontend::Result<()> + 'a>;

/// All that QEMU says until the device runs, one message after the other.
fn handshake<'a>(memory: &'a Memory, queues: &'a [Queue]) -> Vec<Step<'a>> {
    let features = 1 << 30 | 1 << 32;
    let mut steps: Vec<Step<'a>> = vec![
        Box::new(|connection| connection.features().map(drop)),
        Box::new(|connection| connection.protocol_features().map(drop)),
        Box::new(|connection| connection.set_protocol_features(protocol::MQ | protocol::REPLY_ACK)),
        Box::new(|connection| connection.queue_count().map(drop)),
        Box::new(|connection| connection.set_owner()),
        Box::new(move |connection| connection.set_features(features)),
        Box::new(|connection| connection.set_memory(&memory.regions())),
    ];
    for queue in queues {
        let index = queue.index();
        steps.push(Box::new(move |connection| {
            queue
                .with_ring(|ring| connection.set_up_ring(index, ring, queue.kick_event(), queue.call_event()))
        }));
        steps.push(Box::new(move |connection| connection.enable_ring(index, true)));
        steps.push(Box::new(move |_| queue.kick()));
    }
    steps.push(Box::new(|connection| connection.enable_ring(1, false)));
    steps.push(Box::new(|connection| connection.stop_ring(1).map(drop)));
    steps
}

/// Attack: leaving at every point of the handshake.
/// Outcome: no descriptor is lost.
#[test]
fn leaving_after_every_message_and_in_the_middle_of_the_next() {
    let backend = daemon();
    let memory = Memory::new(4 << 20).unwrap();
    let queues = [queue(&memory, 0), queue(&memory, 1)];
    let steps = handshake(&memory, &queues);
    serves(&backend);
    let before = common::steady_descriptors(&backend);
    // Half a header, half a message, and a header without what follows.
    let endings: [&[u8]; 4] =
        [&[], &[8, 0, 0], &[10, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1], &[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0]];
    for until in 0..=steps.len() {
        for ending in endings {
            let mut connection = Connection::connect(backend.socket()).unwrap();
            for step in &steps[..until] {
                step(&mut connection).unwrap();
            }
            connection.send_bytes(ending, &[]).unwrap();
        }
    }
    serves(&backend);
    let after = common::settled_descriptors(&backend, before);
    assert!(after <= before, "{before} descriptors before, {after} after");
}

/// Sends one message in a session of its own; whether the daemon closed the connection.
fn say(backend: &Backend, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    connection.set_owner().unwrap();
    connection.send_raw(request, VERSION, body.len() as u32, body, fds).unwrap();
    connection.wait_closed(Duration::from_millis(200)).unwrap()
}

/// Attack: the wrong number of descriptors.
/// Outcome: the front end is disconnected; none is lost.
#[test]
fn the_wrong_number_of_descriptors() {
    let backend = daemon();
    let memory = Memory::new(4 << 20).unwrap();
    let region = &memory.regions()[0];
    let table = [&1u64.to_ne_bytes(), describe(region).as_bytes()].concat();
    let single = [&0u64.to_ne_bytes(), describe(region).as_bytes()].concat();
    let kick = queue(&memory, 1);
    // SAFETY: the eventfd lives longer than what borrows it.
    let event = unsafe { BorrowedFd::borrow_raw(kick.kick_event().as_raw_fd()) };
    let fd = region.fd();
    serves(&backend);
    let before = common::steady_descriptors(&backend);
    for _ in 0..5 {
        // A region for each descriptor and a descriptor for each region.
        assert!(say(&backend, code::SET_MEM_TABLE, &table, &[]));
        assert!(say(&backend, code::SET_MEM_TABLE, &table, &[fd, fd]));
        assert!(say(&backend, code::SET_MEM_TABLE, &table, &[fd; 30]));
        assert!(say(&backend, code::ADD_MEM_REG, &single, &[]));
        assert!(say(&backend, code::ADD_MEM_REG, &single, &[fd, fd]));
        // One eventfd each, or the flag that says there is none.
        for request in [code::SET_VRING_KICK, code::SET_VRING_CALL] {
            assert!(say(&backend, request, &1u64.to_ne_bytes(), &[]));
            assert!(say(&backend, request, &1u64.to_ne_bytes(), &[event, event]));
            say(&backend, request, &(1 | NO_FD).to_ne_bytes(), &[event, event]);
        }
        // Descriptors where none belong are closed, whatever becomes of the message.
        say(&backend, code::SET_OWNER, &[], &[event]);
        say(&backend, code::GET_FEATURES, &[], &[event, event, fd]);
        say(&backend, code::GET_VRING_BASE, VringState { index: 1, value: 0 }.as_bytes(), &[fd]);
    }
    serves(&backend);
    let after = common::settled_descriptors(&backend, before);
    assert!(after <= before, "{before} descriptors before, {after} after");
}

/// Attack: a kick that is no eventfd.
/// Outcome: the next front end is served.
#[test]
fn a_kick_that_is_no_eventfd() {
    let memory = Memory::new(4 << 20).unwrap();
    let queues = [queue(&memory, 1)];
    let (reader, writer) = std::io::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    for fd in [reader.as_fd(), writer.as_fd(), file.as_fd()] {
        let backend = daemon();
        let mut connection = Connection::connect(backend.socket()).unwrap();
        for step in &handshake(&memory, &queues)[..9] {
            step(&mut connection).unwrap();
        }
        // Taken or refused; a regular file cannot be waited for.
        for request in [code::SET_VRING_CALL, code::SET_VRING_KICK] {
            let _ = connection.send(request, &1u64, &[fd]);
        }
        let _ = queues[0].kick();
        drop(connection);
        serves(&backend);
    }
}

/// Found by fuzzing: the worker that notified the front end waited for room for ever, and with it
/// whoever stopped the queue, so that no other front end was served and SIGTERM was not heeded.
///
/// Attack: a call that is full, and blocks.
/// Outcome: the notification is dropped; the next front end is served.
#[test]
fn a_call_that_is_full_holds_nothing_up() {
    let backend = daemon();
    let (_reader, pipe) = std::io::pipe().unwrap();
    fill(&pipe);
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for call in [pipe.as_fd(), eventfd.as_fd()] {
        // Without EVENT_IDX: each reply is notified.
        let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        let session = backend.connect(SessionOptions { features, ..Default::default() }).unwrap();
        session.connection().send(code::SET_VRING_CALL, &1u64, &[call]).unwrap();
        let statfs = Request::new(Opcode::Statfs, ROOT).reply::<StatfsOut>();
        let sent = session.send(1, &statfs, Segmentation::Linux).unwrap();
        while !session.queue(1).is_done(sent.token).unwrap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(session);
        serves(&backend);
    }
}

/// Writes until there is no more room, and leaves the descriptor blocking.
fn fill(pipe: &std::io::PipeWriter) {
    let flags = rustix::fs::fcntl_getfl(pipe).unwrap();
    rustix::fs::fcntl_setfl(pipe, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(pipe, &[0; 8]).is_ok() {}
    rustix::fs::fcntl_setfl(pipe, flags).unwrap();
}

/// Attack: messages out of order and out of range.
/// Outcome: the next front end is served.
#[test]
fn messages_out_of_order_and_out_of_range() {
    let backend = daemon();
    let memory = Memory::new(4 << 20).unwrap();
    let region = [&0u64.to_ne_bytes(), describe(&memory.regions()[0]).as_bytes()].concat();
    let state = |index: u32, value: u32| VringState { index, value }.as_bytes().to_vec();
    let queue = queue(&memory, 1);
    // SAFETY: as above.
    let event = unsafe { BorrowedFd::borrow_raw(queue.kick_event().as_raw_fd()) };
    let messages: &[(u32, Vec<u8>, &[BorrowedFd<'_>])] = &[
        // Of queues without memory, size or addresses.
        (code::SET_VRING_ENABLE, state(1, 1), &[]),
        (code::SET_VRING_ENABLE, state(1, 2), &[]),
        (code::SET_VRING_KICK, 1u64.to_ne_bytes().to_vec(), &[event]),
        (code::GET_VRING_BASE, state(1, 0), &[]),
        (code::SET_VRING_ADDR, vec![0; 40], &[]),
        // Of queues that there are not.
        (code::SET_VRING_NUM, state(64, 64), &[]),
        (code::SET_VRING_BASE, state(u32::MAX, 0), &[]),
        (code::GET_VRING_BASE, state(1000, 0), &[]),
        (code::SET_VRING_ENABLE, state(1000, 1), &[]),
        // Sizes that no ring has.
        (code::SET_VRING_NUM, state(1, 0), &[]),
        (code::SET_VRING_NUM, state(1, 3), &[]),
        (code::SET_VRING_NUM, state(1, 65_536), &[]),
        (code::SET_VRING_NUM, state(1, u32::MAX), &[]),
        (code::SET_VRING_BASE, state(1, 65_536), &[]),
        // Memory and features that were never there.
        (code::REM_MEM_REG, region, &[]),
        (code::SET_FEATURES, u64::MAX.to_ne_bytes().to_vec(), &[]),
        (code::SET_PROTOCOL_FEATURES, u64::MAX.to_ne_bytes().to_vec(), &[]),
        (code::RESET_DEVICE, vec![], &[]),
        (code::RESET_OWNER, vec![], &[]),
        (code::GET_CONFIG, [1000u32, 1000, 0].as_bytes().to_vec(), &[]),
    ];
    for (request, body, fds) in messages {
        say(&backend, *request, body, fds);
        serves(&backend);
    }
}

/// Attack: a message that sends a GPU socket.
/// Outcome: the front end is disconnected.
#[test]
fn a_gpu_socket_is_refused() {
    // The filter of system calls has to let through what the answer takes.
    const GPU_SET_SOCKET: u32 = 33;
    let backend = daemon();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    for fd in [ours.as_fd(), file.as_fd()] {
        say(&backend, GPU_SET_SOCKET, &[], &[fd]);
        say(&backend, code::REM_MEM_REG, &[0; 40], &[fd]);
        serves(&backend);
    }
}

/// Attack: random messages.
/// Outcome: the next front end is served.
#[test]
fn random_messages() {
    let backend = daemon();
    let memory = Memory::new(4 << 20).unwrap();
    let queues = [queue(&memory, 0), queue(&memory, 1)];
    let steps = handshake(&memory, &queues);
    let fd = memory.regions()[0].fd().try_clone_to_owned().unwrap();
    let mut random = Random::new(11);
    for round in 0..600 {
        let mut connection = Connection::connect(backend.socket()).unwrap();
        // From any point of a session that began well.
        for step in &steps[..random.below(steps.len())] {
            step(&mut connection).unwrap();
        }
        for _ in 0..random.below(4) {
            let len = [0, 8, 8, 12, 32, 40, 256][random.below(7)];
            let mut body = random.bytes(len);
            // Mostly about queues that there are.
            if random.below(2) == 0 && body.len() >= 8 {
                body[..8].copy_from_slice(&(random.below(3) as u64).to_ne_bytes());
            }
            let flags = VERSION | [0, NEED_REPLY, 4, 0x40][random.below(4)];
            let size = if random.below(8) == 0 { random.bits() as u32 } else { body.len() as u32 };
            let fds = vec![fd.as_fd(); random.below(3)];
            // A daemon that closed at the message before is right.
            if connection.send_raw(random.below(46) as u32, flags, size, &body, &fds).is_err() {
                break;
            }
        }
        drop(connection);
        if round % 50 == 0 {
            serves(&backend);
        }
    }
    serves(&backend);
}
