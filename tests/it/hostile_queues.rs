//! Queues and memory that change while the device works on them. Only the queue that is attacked may
//! stand still, and a reset mends it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::{Chain, Segments};
use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::connection::{Connection, describe};
use lanefsd_frontend::malicious::{outside_memory, run_away};
use lanefsd_frontend::memory::Region;
use lanefsd_frontend::message::{VERSION, VringAddress, VringState, code};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::ring::{Descriptor, INDIRECT, NEXT, Placement, WRITE};
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Error, Request, Segmentation, Session, SessionOptions};
use zerocopy::IntoBytes;

use crate::common;

fn two_queues(args: &[&str]) -> (Backend, Session) {
    common::serve_with(args, common::queues(2))
}

fn reset(session: &Session) {
    session.reboot().unwrap();
    session.init().unwrap();
    common::every_queue_answers(session);
}

/// Writes that take a while, in flight on queue 1.
fn slow_writes(session: &Session, count: u64) -> Vec<Pending> {
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let bytes = vec![3; 4096];
    let flags = WriteFlags::empty();
    let write = |i| data::write_request(entry.nodeid, open.fh, i * 4096, &bytes, flags, libc::O_RDWR);
    let sent = (0..count).map(|i| client.send(write(i)).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(50));
    sent
}

const SLOW: [&str; 2] = ["--store=null:200ms", "--cache=never"];

/// Attack: queues enabled twice.
/// Outcome: each request is answered once.
#[test]
fn a_queue_enabled_and_disabled_again_and_again() {
    let (_backend, session) = two_queues(&SLOW);
    let writes = slow_writes(&session, 8);
    for round in 0..20 {
        let connection = session.connection();
        connection.enable_ring(1, true).unwrap();
        connection.enable_ring(1, true).unwrap();
        if round % 3 == 0 {
            connection.enable_ring(1, false).unwrap();
            connection.enable_ring(1, false).unwrap();
            connection.enable_ring(1, true).unwrap();
        }
    }
    session.queue(1).kick().unwrap();
    // Each comes back once: the ring finds out about a second time.
    for write in writes {
        session.finish(write).unwrap();
    }
    common::every_queue_answers(&session);
}

/// Attack: queues set up twice.
/// Outcome: each request is answered once.
#[test]
fn a_queue_set_up_twice() {
    let (_backend, session) = two_queues(&SLOW);
    let writes = slow_writes(&session, 8);
    for _ in 0..5 {
        // Another kick stops the queue after what is in flight; it goes on where it was.
        let queue = session.queue(1);
        session.connection().set_vring_call(1, Some(queue.call_event())).unwrap();
        session.connection().set_vring_kick(1, Some(queue.kick_event())).unwrap();
    }
    session.queue(1).kick().unwrap();
    for write in writes {
        session.finish(write).unwrap();
    }
    common::every_queue_answers(&session);
}

/// What a front end may not say about a queue that runs; the connection ends, not the daemon.
fn refused(message: impl FnOnce(&Session, &Connection) -> Result<(), Error>) {
    let (backend, session) = two_queues(&["--keep-listening"]);
    {
        let connection = session.connection();
        message(&session, &connection).unwrap_err();
        assert!(connection.wait_closed(Duration::from_secs(5)).unwrap());
    }
    drop(session);
    common::every_queue_answers(&backend.connect(SessionOptions::default()).unwrap());
}

/// Tells of the rings of queue 1 at other addresses: `(descriptors, available, used)`.
fn move_rings(
    session: &Session,
    connection: &Connection,
    to: impl FnOnce((u64, u64, u64)) -> (u64, u64, u64),
) -> Result<(), Error> {
    let (descriptors, available, used) = to(session.queue(1).with_ring(|ring| ring.user_addresses()));
    let address = VringAddress { index: 1, flags: 0, descriptors, used, available, log: 0 };
    connection.send(code::SET_VRING_ADDR, &address, &[])
}

/// Attack: rings that move while the queue runs.
/// Outcome: the front end is disconnected.
#[test]
fn rings_that_move_while_the_queue_runs() {
    refused(|session, connection| move_rings(session, connection, |(d, a, u)| (d + 4096, a, u)));
    refused(|session, connection| move_rings(session, connection, |(d, a, u)| (d, u, a)));
    refused(|session, connection| move_rings(session, connection, |(d, a, _)| (d, a, u64::MAX)));
    refused(|_, connection| connection.send(code::SET_VRING_NUM, &VringState { index: 1, value: 64 }, &[]));
}

/// Stops queue 1 and sets it up again with rings at other addresses.
fn set_up_at(
    session: &Session,
    connection: &Connection,
    to: impl FnOnce((u64, u64, u64)) -> (u64, u64, u64),
) -> Result<(), Error> {
    connection.stop_ring(1).unwrap();
    move_rings(session, connection, to)?;
    connection.set_vring_kick(1, Some(session.queue(1).kick_event()))
}

/// Attack: rings in missing memory or at odd addresses.
/// Outcome: the front end is disconnected.
#[test]
fn rings_that_lie_in_no_memory() {
    let end = |session: &Session| {
        let region = &session.memory().regions()[0];
        region.user_address() + region.size() as u64
    };
    // At addresses that no 16-bit number may have.
    refused(|session, connection| set_up_at(session, connection, |(d, a, u)| (d, a + 1, u)));
    refused(|session, connection| set_up_at(session, connection, |(d, a, u)| (d, a, u + 1)));
    // In no region, and with only its beginning in one.
    for gap in [-4096i64, 0, 1 << 40] {
        let at = |session: &Session| end(session).wrapping_add_signed(gap);
        refused(|session, connection| {
            let at = at(session);
            set_up_at(session, connection, |(_, a, u)| (at, a, u))
        });
        refused(|session, connection| {
            let at = at(session) + 3072;
            set_up_at(session, connection, |(d, _, u)| (d, at, u))
        });
        refused(|session, connection| {
            let at = at(session);
            set_up_at(session, connection, |(d, a, _)| (d, a, at))
        });
    }
}

/// Attack: rings in read-only memory.
/// Outcome: the front end is disconnected.
#[test]
fn rings_in_read_only_memory() {
    let read_only =
        |region: &Region| fs::File::open(format!("/proc/self/fd/{}", region.fd().as_raw_fd())).unwrap();
    let refuses = |request: u32, body: &[u8], fd: BorrowedFd<'_>| {
        let backend = common::start(&["--keep-listening"]);
        let connection = Connection::connect(backend.socket()).unwrap();
        connection.features().unwrap();
        connection.set_owner().unwrap();
        connection.send_raw(request, VERSION, body.len() as u32, body, &[fd]).unwrap();
        assert!(connection.wait_closed(Duration::from_secs(5)).unwrap());
        drop(connection);
        common::every_queue_answers(&backend.connect(SessionOptions::default()).unwrap());
    };
    let region = Region::new(0x10_0000, 1 << 20).unwrap();
    let table = [&1u64.to_ne_bytes(), describe(&region).as_bytes()].concat();
    refuses(code::SET_MEM_TABLE, &table, read_only(&region).as_fd());
    let single = [&0u64.to_ne_bytes(), describe(&region).as_bytes()].concat();
    refuses(code::ADD_MEM_REG, &single, read_only(&region).as_fd());
}

/// Attack: memory unplugged with requests in flight.
/// Outcome: they finish; the mapping lives as long.
#[test]
fn memory_unplugged_with_requests_in_flight() {
    let (_backend, session) = two_queues(&SLOW);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    for round in 0..3 {
        let guest = (8 + round) << 30;
        let region = session.memory().add_region(guest, 4 << 20).unwrap();
        session.connection().add_memory(&region).unwrap();
        let flags = WriteFlags::empty();
        let write = data::write_request(entry.nodeid, open.fh, 0, b"unplugged", flags, libc::O_RDWR);
        let bytes = [write.parts(4242).concat(), write.data.to_vec()].concat();
        let buffer = session.memory().allocate_in(guest, 4096).unwrap();
        buffer.write(0, &bytes);
        let readable = Segments::of(buffer, vec![(0, bytes.len())]);
        let writable = Segments::of(session.memory().allocate_in(guest, 4096).unwrap(), vec![(0, 24)]);
        let chain = Chain { readable, writable, placement: Placement::Direct, keep: None };
        let token = session.queue(1).submit(chain).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!session.queue(1).is_done(token).unwrap(), "the write is to be in flight");
        session.connection().remove_memory(&region).unwrap();
        client.on(2).getattr(ROOT).unwrap();
        // The mapping lives as long as the request.
        assert_eq!(session.queue(1).wait(token).unwrap().used, 24);
        session.memory().remove_region(guest).unwrap();
        common::every_queue_answers(&session);
    }
}

/// Attack: memory unplugged under the rings.
/// Outcome: queues stop until a reset.
#[test]
fn all_memory_unplugged_under_the_rings() {
    let (mut backend, session) = two_queues(&SLOW);
    let region = session.memory().regions()[0].clone();
    for _ in 0..3 {
        slow_writes(&session, 4);
        session.connection().remove_memory(&region).unwrap();
        for queue in session.queues() {
            queue.kick().unwrap();
        }
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(backend.try_wait().unwrap(), None, "the daemon ended");
        session.connection().add_memory(&region).unwrap();
        reset(&session);
    }
}

/// Attack: all queues broken at once.
/// Outcome: served again after a reset.
#[test]
fn queues_that_were_broken_serve_after_a_reset() {
    let (_backend, session) = two_queues(&[]);
    for _ in 0..3 {
        for queue in [0, 1, 2] {
            run_away(session.queue(queue), 5000).unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
        reset(&session);
    }
}

/// Attack: kicks without end.
/// Outcome: other queues are served.
#[test]
fn kicks_without_end_while_others_work() {
    let (backend, session) = two_queues(&[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                session.queue(0).kick().unwrap();
                session.queue(1).kick().unwrap();
            }
        });
        for _ in 0..2000 {
            session.client().on(2).getattr(ROOT).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    // A counter that is full makes the next kick fail, for the guest alone.
    session.queue(1).kick_event().write(u64::MAX - 1_000_000_000).unwrap();
    common::every_queue_answers(&session);
    assert!(backend.threads().unwrap() < 100);
}

/// Descriptor tables of two or three entries, good and bad, over the same request and reply.
fn tables(request: Descriptor, reply: Descriptor, table: u64, outside: u64) -> Vec<[Descriptor; 3]> {
    let linked = Descriptor { flags: NEXT, next: 1, ..request };
    let good = [linked, reply, reply];
    vec![
        good,
        [Descriptor { len: 7, ..linked }, reply, reply],
        [Descriptor { address: outside, ..linked }, reply, reply],
        [linked, Descriptor { address: outside, ..reply }, reply],
        [linked, Descriptor { flags: WRITE | NEXT, next: 0, ..reply }, reply],
        [linked, Descriptor { flags: WRITE | NEXT, next: 2, ..reply }, reply],
        [Descriptor { next: 2, ..linked }, reply, Descriptor { address: table, ..reply }],
        [linked, Descriptor { address: u64::MAX - 3, ..reply }, reply],
        [Descriptor { address: table, len: 16, flags: INDIRECT, next: 0 }, reply, reply],
        [linked, Descriptor { flags: 0, ..reply }, Descriptor { len: 0, ..reply }],
    ]
}

/// Attack: descriptors and requests that change while they are read.
/// Outcome: answered, whole or with an error.
#[test]
fn descriptors_and_requests_that_change_while_they_are_read() {
    const ROOM: usize = 1024;
    let (_backend, session) = two_queues(&[]);
    let memory = session.memory();
    let (request, reply) = (memory.allocate_zeroed(4096).unwrap(), memory.allocate_zeroed(4096).unwrap());
    let table = memory.allocate_zeroed(4096).unwrap();
    let good = Request::new(Opcode::Getattr, ROOT).arg(&[0u8; 16]).parts(2).concat();
    request.write(0, &good);
    let read = Descriptor { address: request.address(), len: good.len() as u32, flags: 0, next: 0 };
    let room = Descriptor { address: reply.address(), len: (ROOM / 4) as u32, flags: WRITE, next: 0 };
    let tables = tables(read, room, table.address(), outside_memory(&session));
    let write_table = |entries: &[Descriptor; 3]| {
        for (i, descriptor) in entries.iter().enumerate() {
            table.write(16 * i, descriptor.as_bytes());
        }
    };
    write_table(&tables[0]);
    let stop = AtomicBool::new(false);
    let mut served = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(7);
            while !stop.load(Ordering::Relaxed) {
                write_table(&tables[random.below(tables.len())]);
                // Length, operation and node of the request; INIT and DESTROY are not among them.
                request.write(0, &(random.below(60) as u32).to_ne_bytes());
                request.write(4, &[1u32, 3, 14, 17, 22, 27][random.below(6)].to_ne_bytes());
                request.write(16, &(random.below(3) as u64).to_ne_bytes());
                write_table(&tables[0]);
                request.write(0, &good);
            }
        });
        for round in 0..5000 {
            let token = submit_table(&session, table.address(), ROOM);
            let completion = session.queue(1).wait(token).unwrap();
            assert!(completion.used <= ROOM, "round {round}");
            served += u32::from(completion.used > 16);
            if round % 500 == 0 {
                session.client().on(2).getattr(ROOT).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(served > 0, "no request was ever good");
    common::every_queue_answers(&session);
}

/// Submits a chain that is one indirect table, with so much room in the driver's books.
fn submit_table(session: &Session, table: u64, room: usize) -> lanefsd_frontend::queue::Token {
    let head = Descriptor { address: table, len: 48, flags: INDIRECT, next: 0 };
    let writable = Segments::new(session.memory(), &[room], 0, Segmentation::One, 8).unwrap();
    let books = Chain { readable: Segments::none(), writable, placement: Placement::Direct, keep: None };
    let lay = |ring: &mut lanefsd_frontend::ring::Ring<_>, _: &[_]| {
        let owned = ring.take_descriptor().ok_or(Error::RingFull { free: 0, needed: 1 })?;
        ring.write_descriptor(owned, head);
        Ok(vec![owned])
    };
    session.queue(1).submit_by_hand(books, lay).unwrap()
}
