//! A guest that lies: every request and every chain comes back, and the next good one is served.

use fuse_protocol::abi::{InHeader, OutHeader};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::Chain;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::malicious::{Malformed, offer_head_out_of_range, run_away};
use lanefsd_frontend::queue::Completion;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::request::Reply;
use lanefsd_frontend::{Request, Segmentation, Session, SessionOptions};
use zerocopy::{FromBytes, IntoBytes};

use crate::common;

fn two_queues(args: &[&str]) -> (lanefsd_frontend::Backend, Session) {
    // virtiofsd has one request queue.
    let queues = if common::is_foreign() { 1 } else { 2 };
    common::serve_with(args, SessionOptions { queues, ..SessionOptions::default() })
}

/// Sends raw bytes with room for a reply of `room` bytes.
fn raw(session: &Session, bytes: &[u8], room: usize, segmentation: Segmentation) -> Completion {
    let chain = Chain::raw(session.memory(), bytes, room, segmentation, 1024).unwrap();
    let token = session.queue(1).submit(chain).unwrap();
    session.queue(1).wait(token).unwrap()
}

/// The error in the reply's header: 0 or a negated errno.
fn error_of(completion: &Completion) -> i32 {
    let header = completion.chain.writable.to_vec(0, size_of::<OutHeader>());
    OutHeader::read_from_bytes(&header).unwrap().error
}

fn header(opcode: u32, nodeid: u64, len: usize) -> Vec<u8> {
    let header = InHeader { len: len as u32, opcode, unique: 99, nodeid, ..InHeader::default() };
    header.as_bytes().to_vec()
}

/// Attack: descriptor loops, indirect in indirect, tables and buffers outside memory, lengths that wrap,
/// chains longer than the ring.
/// Outcome: the chain comes back, empty.
#[test]
fn malformed_chains_come_back_empty() {
    let (_backend, session) = two_queues(&[]);
    let request = Request::new(Opcode::Statfs, ROOT).reply_data(80);
    // Linux makes tables longer than the ring, and a buffer of no bytes does no harm; a chain without a
    // request may be answered with an error.
    let lenient = [Malformed::ZeroLength, Malformed::LongerThanTheRing, Malformed::NothingToRead];
    for round in 0..3 {
        for &kind in Malformed::ALL {
            let token = kind.submit(&session, 1, &request).unwrap();
            let completion = session.queue(1).wait(token).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            assert!(
                completion.used == 0 || lenient.contains(&kind),
                "{kind:?}, round {round}: {}",
                completion.used
            );
            common::every_queue_answers(&session);
        }
    }
}

/// Attack: a head index outside the descriptor table.
/// Outcome: only that queue stops, until a reset.
#[test]
fn a_head_index_out_of_range_stops_at_most_its_queue() {
    let (_backend, session) = two_queues(&[]);
    offer_head_out_of_range(session.queue(1)).unwrap();
    session.client().on(2).getattr(ROOT).unwrap();
    session.reboot().unwrap();
    session.init().unwrap();
    common::every_queue_answers(&session);
}

/// Attack: an available index that runs away.
/// Outcome: only that queue stops, until a reset.
#[test]
fn an_available_index_that_runs_away_stops_at_most_its_queue() {
    for steps in [1025, 20_000, u16::MAX] {
        let (_backend, session) = two_queues(&[]);
        run_away(session.queue(1), steps).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        session.client().on(2).getattr(ROOT).unwrap();
        session.reboot().unwrap();
        session.init().unwrap();
        common::every_queue_answers(&session);
    }
}

#[test]
fn kicks_without_end_cost_nothing_but_time() {
    let (_backend, session) = two_queues(&[]);
    for _ in 0..10_000 {
        session.queue(1).kick().unwrap();
    }
    common::every_queue_answers(&session);
}

/// Attack: requests cut off.
/// Outcome: an errno, or no length.
#[test]
fn requests_that_are_cut_off() {
    let (_backend, session) = two_queues(&[]);
    for len in 0..size_of::<InHeader>() {
        let completion =
            raw(&session, &header(Opcode::Getattr as u32, ROOT, len)[..len], 200, Segmentation::One);
        assert!(completion.used == 0 || error_of(&completion) < 0, "{len} bytes of header");
    }
    for (opcode, name) in Opcode::ALL.iter().filter(|(opcode, _)| *opcode != Opcode::Init) {
        // DESTROY has no arguments that could be missing, and ends the session.
        if matches!(opcode, Opcode::Destroy | Opcode::Statfs | Opcode::Readlink | Opcode::Syncfs) {
            continue;
        }
        for args in [0, 1, 3, 7] {
            let mut bytes = header(*opcode as u32, ROOT, 40 + args);
            bytes.resize(40 + args, 0x41);
            let completion = raw(&session, &bytes, 400, Segmentation::Linux);
            assert!(
                completion.used == 0 || error_of(&completion) < 0,
                "{name} with {args} bytes of arguments"
            );
        }
    }
    common::every_queue_answers(&session);
}

/// Attack: requests whose length field is too large or too small.
/// Outcome: an errno, or no length.
#[test]
fn request_lengths_that_disagree_with_the_data() {
    let (_backend, session) = two_queues(&[]);
    let good = Request::new(Opcode::Getattr, ROOT).arg(&[0u8; 16]).parts(2).concat();
    for len in [0, 1, 39, 40, 55, 57, 1000, u32::MAX] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        let completion = raw(&session, &bytes, 200, Segmentation::One);
        assert!(
            completion.used == 0 || error_of(&completion) < 0,
            "a length of {len}, {} were sent",
            good.len()
        );
    }
    // A WRITE that announces more than it carries, and extensions that are longer than the request.
    let (entry, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let mut write = [0u8; 40];
    write[..8].copy_from_slice(&open.fh.to_ne_bytes());
    write[16..20].copy_from_slice(&5000u32.to_ne_bytes());
    let request = Request::new(Opcode::Write, entry.nodeid).arg(&write).data(b"short").reply::<u64>();
    assert!(common::errno(session.client().call_bytes(&request)) > 0);
    let mut bytes = Request::new(Opcode::Mkdir, ROOT).arg(&[0u8; 8]).name("x").parts(2).concat();
    bytes[36..38].copy_from_slice(&u16::MAX.to_ne_bytes());
    assert!(error_of(&raw(&session, &bytes, 400, Segmentation::One)) < 0);
    common::every_queue_answers(&session);
}

/// Attack: replies without room for the header, the struct, the data.
/// Outcome: an errno, or no length; nothing is written past the room.
#[test]
fn reply_buffers_that_are_too_small() {
    let (backend, session) = two_queues(&[]);
    let getattr = Request::new(Opcode::Getattr, ROOT).arg(&[0u8; 16]).parts(2).concat();
    for room in 0..120 {
        let completion = raw(&session, &getattr, room, Segmentation::One);
        match completion.used {
            // No room for a header: the chain comes back all the same.
            0 => assert!(room < 120, "room of {room}"),
            16 => assert!(error_of(&completion) < 0, "room of {room}"),
            used => panic!("{used} bytes in a room of {room}"),
        }
    }
    // Data that does not fit is cut or refused, never written past the room.
    std::fs::write(backend.path("file"), [7; 1000]).unwrap();
    let client = session.client();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
    let mut read = [0u8; 40];
    read[..8].copy_from_slice(&fh.to_ne_bytes());
    read[16..20].copy_from_slice(&1000u32.to_ne_bytes());
    let bytes = Request::new(Opcode::Read, node).arg(&read).parts(2).concat();
    let completion = raw(&session, &bytes, 116, Segmentation::One);
    assert!(completion.used <= 116);
    let listing = Request::new(Opcode::Readdir, ROOT).arg(&read).reply_data(10);
    assert!(client.call_bytes(&listing).is_err(), "a file's handle for a directory");
    common::every_queue_answers(&session);
}

#[test]
fn names_that_are_none() {
    let (backend, session) = two_queues(&[]);
    let outside = backend.share().parent().unwrap().join("evil");
    let client = session.client();
    let long = vec![b'n'; 256];
    let bad: &[&[u8]] = &[b"", b".", b"..", b"a/b", b"/", b"../evil", b"/etc/passwd", &long];
    for name in bad {
        let text = String::from_utf8_lossy(name).into_owned();
        assert!(common::errno(client.mkdir(ROOT, name, 0o700, 0)) > 0, "{text:?}");
        assert!(common::errno(client.create(ROOT, name, libc::O_RDWR, 0o600, 0)) > 0, "{text:?}");
        assert!(common::errno(client.mknod(ROOT, name, libc::S_IFREG | 0o600, 0, 0)) > 0, "{text:?}");
        assert!(common::errno(client.symlink(ROOT, name, "x")) > 0, "{text:?}");
        assert!(common::errno(client.unlink(ROOT, name)) > 0, "{text:?}");
        assert!(common::errno(client.rmdir(ROOT, name)) > 0, "{text:?}");
        client.mkdir(ROOT, "good", 0o700, 0).unwrap();
        assert!(common::errno(client.rename(ROOT, "good", ROOT, name)) > 0, "{text:?}");
        assert!(common::errno(client.rename(ROOT, name, ROOT, "new")) > 0, "{text:?}");
        client.rmdir(ROOT, "good").unwrap();
    }
    assert_eq!(common::errno(client.mkdir(ROOT, &long, 0o700, 0)), libc::ENAMETOOLONG);
    client.mkdir(ROOT, &long[..255], 0o700, 0).unwrap();
    client.rmdir(ROOT, &long[..255]).unwrap();
    // A name without its NUL.
    let mut bytes = Request::new(Opcode::Lookup, ROOT).name("abc").parts(2).concat();
    bytes.pop();
    bytes[..4].copy_from_slice(&43u32.to_ne_bytes());
    assert!(error_of(&raw(&session, &bytes, 200, Segmentation::One)) < 0);
    assert!(!outside.exists());
    assert_eq!(std::fs::read_dir(backend.share()).unwrap().count(), 0);
    common::every_queue_answers(&session);
}

#[test]
fn the_root_has_no_parent() {
    let (_backend, session) = two_queues(&[]);
    match session.client().lookup(ROOT, "..") {
        Ok(entry) => assert_eq!(entry.attr.ino, session.client().getattr(ROOT).unwrap().ino),
        Err(error) => assert!(error.errno().is_some(), "{error}"),
    }
    match session.client().lookup(ROOT, ".") {
        Ok(entry) => assert_eq!(entry.attr.ino, session.client().getattr(ROOT).unwrap().ino),
        Err(error) => assert!(error.errno().is_some(), "{error}"),
    }
}

#[test]
fn no_symlink_is_followed_and_no_special_file_opened() {
    let (backend, session) = two_queues(&[]);
    std::os::unix::fs::symlink("/etc/passwd", backend.path("link")).unwrap();
    std::os::unix::fs::symlink("/etc", backend.path("dirlink")).unwrap();
    let client = session.client();
    let link = client.lookup(ROOT, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(common::errno(client.open(link.nodeid, libc::O_RDONLY)) > 0);
    let dirlink = client.lookup(ROOT, "dirlink").unwrap();
    assert!(common::errno(client.lookup(dirlink.nodeid, "passwd")) > 0);
    assert!(common::errno(client.opendir(dirlink.nodeid)) > 0);
    let before = std::time::Instant::now();
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
    // Opening a FIFO on the host would wait for its other end.
    assert!(common::errno(client.open(fifo.nodeid, libc::O_RDONLY)) > 0);
    assert!(before.elapsed() < std::time::Duration::from_secs(5));
    common::every_queue_answers(&session);
}

/// Attack: unknown node ids and handles, offsets at integer limits.
/// Outcome: an errno.
#[test]
fn unknown_nodes_and_handles() {
    let (_backend, session) = two_queues(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let dir = client.opendir(ROOT).unwrap();
    for node in [0, 2_000_000, u64::MAX] {
        assert!(common::errno(client.getattr(node)) > 0);
        assert!(common::errno(client.open(node, libc::O_RDONLY)) > 0);
        assert!(common::errno(client.lookup(node, "file")) > 0);
        client.forget(node, u64::MAX).unwrap();
    }
    for fh in [0x7777_7777, u64::MAX, dir.fh.wrapping_add(1000)] {
        assert_eq!(common::errno(client.read(entry.nodeid, fh, 0, 1)), libc::EBADF);
        assert_eq!(common::errno(client.write(entry.nodeid, fh, 0, b"x")), libc::EBADF);
        assert_eq!(common::errno(client.readdir(ROOT, fh, 0, 4096)), libc::EBADF);
        assert!(common::errno(client.release(entry.nodeid, fh)) > 0);
    }
    assert!(common::errno(client.lookup(entry.nodeid, "below a file")) > 0);
    assert!(common::errno(client.opendir(entry.nodeid)) > 0);
    for offset in [i64::MAX as u64, 1 << 63, u64::MAX] {
        // Past what the host can hold: an error or nothing, but an answer.
        let _ = client.read(entry.nodeid, open.fh, offset, 100);
        assert!(common::errno(client.write(entry.nodeid, open.fh, offset, b"xx")) > 0, "{offset:#x}");
        let _ = client.lseek(entry.nodeid, open.fh, offset, libc::SEEK_DATA);
        let _ = client.readdir(ROOT, dir.fh, offset, 4096);
        assert!(common::errno(client.fallocate(entry.nodeid, open.fh, 0, offset, u64::MAX)) > 0);
    }
    client.release(entry.nodeid, open.fh).unwrap();
    assert_eq!(common::errno(client.release(entry.nodeid, open.fh)), libc::EBADF, "released twice");
    client.forget(entry.nodeid, 1000).unwrap();
    client.forget(entry.nodeid, 1000).unwrap();
    common::every_queue_answers(&session);
}

/// Attack: random bytes.
/// Outcome: answered.
#[test]
fn random_bytes_are_answered() {
    let (_backend, session) = two_queues(&["--xattr", "--posix-lock"]);
    let mut random = Random::new(2026);
    for round in 0..5000 {
        // A header that is often nearly right, and arguments that are noise.
        let args = [0, 8, 16, 40, 64, 200][random.below(6)] + random.below(3);
        let mut opcode = random.below(56) as u32;
        // These end the session or wait for ever by right.
        while [Opcode::Destroy, Opcode::Init, Opcode::Setlkw].iter().any(|&op| op as u32 == opcode) {
            opcode = random.below(56) as u32;
        }
        let mut bytes = header(opcode, random.below(4) as u64, 40 + args);
        bytes.extend(random.bytes(args));
        if random.below(4) == 0 {
            let at = random.below(40);
            bytes[at] = random.bits() as u8;
        }
        let room = random.below(300);
        let segmentation = Segmentation::Random(random.bits());
        // The noise may have made it one of those after all.
        if u32::from_ne_bytes(bytes[4..8].try_into().unwrap()) != opcode {
            continue;
        }
        let completion = raw(&session, &bytes, room, segmentation);
        assert!(completion.used <= room, "round {round}");
        if completion.used > 0 {
            let out = OutHeader::read_from_bytes(&completion.chain.writable.to_vec(0, 16)).unwrap();
            assert_eq!(out.len as usize, completion.used, "round {round}, opcode {opcode}");
        }
    }
    common::every_queue_answers(&session);
}

#[test]
fn an_unknown_operation_is_enosys() {
    let (_backend, session) = two_queues(&[]);
    for opcode in [0, 7, 19, 48, 49, 54, 4096, u32::MAX] {
        let request = Request { opcode, ..Request::new(Opcode::Statfs, ROOT).reply_data(100) };
        let sent = session.send(1, &request, Segmentation::Linux).unwrap();
        let completion = session.wait(sent).unwrap();
        assert_eq!(Reply::of(&completion).unwrap().errno.unwrap(), libc::ENOSYS, "{opcode}");
    }
    common::every_queue_answers(&session);
}

#[test]
fn control_messages_that_are_none() {
    use lanefsd_frontend::connection::Connection;
    let backend = common::start(&["--keep-listening"]);
    for (request, flags, size, body) in [
        (0u32, 1u32, 0u32, &[][..]),
        (4000, 1, 0, &[]),
        (1, 7, 0, &[]),
        (8, 1, 8, &[0xff; 8]),
        (8, 1, 3, &[0; 3]),
        (9, 1, 40, &[0xff; 40]),
        (12, 1, 8, &[0; 8]),
        (18, 1, 8, &[0xff; 8]),
        (5, 1, 8, &[0xff; 8]),
        (24, 1, 12, &[0xff; 12]),
        (37, 1, 40, &[0xff; 40]),
        (2, 1, u32::MAX, &[0; 8]),
    ] {
        let connection = Connection::connect(backend.socket()).unwrap();
        connection.features().unwrap();
        // A daemon that closes at once is right, too.
        let _ = connection.send_raw(request, flags, size, body, &[]);
        let _ = connection.wait_closed(std::time::Duration::from_millis(50));
    }
    let session = backend.connect(SessionOptions::default()).unwrap();
    common::every_queue_answers(&session);
}
