//! Guest memory: regions with gaps, plugged and unplugged under way, not shared, or bad.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fuse_protocol::abi::{AttrOut, GetattrIn, OutHeader};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::{Chain, Segments};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::{Connection, describe};
use lanefsd_frontend::memory::Region;
use lanefsd_frontend::message::{MemoryRegion, VERSION, code};
use lanefsd_frontend::request::Reply;
use lanefsd_frontend::ring::Placement;
use lanefsd_frontend::{Request, Session, SessionOptions};
use zerocopy::IntoBytes;

use crate::common;

#[test]
fn regions_with_gaps_by_table_and_by_slots() {
    use lanefsd_frontend::message::protocol;
    for protocol_features in [protocol::MQ | protocol::REPLY_ACK, SessionOptions::default().protocol_features]
    {
        let memory = vec![(0, 16 << 20), (1 << 30, 16 << 20), (1 << 40, 64 << 20)];
        let options = SessionOptions { memory, protocol_features, ..SessionOptions::default() };
        let (backend, session) = common::serve_with(&[], options);
        let bytes: Vec<u8> = (0..100_000).map(|i| (i % 249) as u8).collect();
        std::fs::write(backend.path("file"), &bytes).unwrap();
        let client = session.client();
        let node = client.lookup(ROOT, "file").unwrap().nodeid;
        for _ in 0..20 {
            assert_eq!(client.read_file(node).unwrap(), bytes);
        }
    }
}

/// A GETATTR of the root that lies wholly in the region at `guest`.
fn getattr_in(session: &Session, guest: u64) -> Chain {
    let request = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default());
    let bytes: Vec<u8> = request.parts(4242).concat();
    let buffer = session.memory().allocate_in(guest, 8192).unwrap();
    buffer.write(0, &bytes);
    let readable = Segments::of(buffer, vec![(0, bytes.len())]);
    let room = size_of::<OutHeader>() + size_of::<AttrOut>();
    let buffer = session.memory().allocate_in(guest, room).unwrap();
    let writable = Segments::of(buffer, vec![(0, room)]);
    Chain { readable, writable, placement: Placement::Direct, keep: None }
}

#[test]
fn memory_is_plugged_and_unplugged() {
    let (_backend, session) = common::serve(&[]);
    for round in 0..5 {
        let guest = (8 + round) << 30;
        let region = session.memory().add_region(guest, 4 << 20).unwrap();
        let chain = getattr_in(&session, guest);
        let early = getattr_in(&session, guest);
        // The device does not know the region yet: the chain comes back, with nothing in it.
        let token = session.queue(1).submit(early).unwrap();
        assert_eq!(session.queue(1).wait(token).unwrap().used, 0);

        session.connection().add_memory(&region).unwrap();
        let token = session.queue(1).submit(chain).unwrap();
        let completion = session.queue(1).wait(token).unwrap();
        let attr = Reply::of(&completion).unwrap().success().unwrap().body::<AttrOut>().unwrap().attr;
        assert_eq!(attr.mode & libc::S_IFMT, libc::S_IFDIR);

        let late = getattr_in(&session, guest);
        session.connection().remove_memory(&region).unwrap();
        let token = session.queue(1).submit(late).unwrap();
        assert_eq!(session.queue(1).wait(token).unwrap().used, 0, "the region is gone");
        session.memory().remove_region(guest).unwrap();
        session.client().getattr(ROOT).unwrap();
    }
}

#[test]
fn unplugged_memory_is_unmapped() {
    let (backend, session) = common::serve(&[]);
    let before = backend.descriptors().unwrap().len();
    for _ in 0..20 {
        let region = session.memory().add_region(1 << 42, 1 << 20).unwrap();
        session.connection().add_memory(&region).unwrap();
        session.connection().remove_memory(&region).unwrap();
        session.memory().remove_region(1 << 42).unwrap();
    }
    session.client().getattr(ROOT).unwrap();
    assert!(common::settled_descriptors(&backend, before) <= before);
    let maps = std::fs::read_to_string(backend.proc("maps")).unwrap();
    assert_eq!(maps.matches("memfd:lanefsd-frontend").count(), 1, "regions are still mapped:\n{maps}");
}

/// Tells of one region with these descriptors; the daemon has to end with one sentence and status 1.
fn refused(region: MemoryRegion, fds: &[BorrowedFd<'_>]) {
    let mut backend = common::start(&["--log-level=error"]);
    let connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    connection.set_owner().unwrap();
    let mut body = 1u64.to_ne_bytes().to_vec();
    body.extend_from_slice(region.as_bytes());
    connection.send_raw(code::SET_MEM_TABLE, VERSION, body.len() as u32, &body, fds).unwrap();
    let status = backend.wait(std::time::Duration::from_secs(10)).unwrap();
    let stderr = backend.stderr();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "one sentence is wanted, not\n{stderr}");
    assert!(stderr.contains("memory"), "{stderr}");
}

#[test]
fn memory_that_is_not_shared_is_refused() {
    let region = Region::new(0x10_0000, 1 << 20).unwrap();
    refused(describe(&region), &[]);
}

#[test]
fn bad_memory_is_refused() {
    let region = Region::new(0x10_0000, 1 << 20).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    refused(describe(&region), &[OwnedFd::from(reader).as_fd()]);
    refused(MemoryRegion { size: 1 << 30, ..describe(&region) }, &[region.fd()]);
    refused(MemoryRegion { guest: u64::MAX - 4095, ..describe(&region) }, &[region.fd()]);
    refused(MemoryRegion { size: 0, ..describe(&region) }, &[region.fd()]);
    let read_only = File::open("/etc/passwd").unwrap();
    refused(MemoryRegion { size: 512, ..describe(&region) }, &[read_only.as_fd()]);
}

#[test]
fn with_keep_listening_bad_memory_ends_only_the_connection() {
    let backend = common::start(&["--keep-listening"]);
    let region = Region::new(0x10_0000, 1 << 20).unwrap();
    let connection = Connection::connect(backend.socket()).unwrap();
    connection.set_owner().unwrap();
    let mut body = 1u64.to_ne_bytes().to_vec();
    body.extend_from_slice(describe(&region).as_bytes());
    connection.send_raw(code::SET_MEM_TABLE, VERSION, body.len() as u32, &body, &[]).unwrap();
    assert!(connection.wait_closed(std::time::Duration::from_secs(5)).unwrap());
    backend.connect(SessionOptions::default()).unwrap().client().getattr(ROOT).unwrap();
}

#[test]
fn memory_is_the_front_ends_own() {
    // What the device writes arrives in the memfd itself, not in a private copy.
    let (_backend, session) = common::serve(&[]);
    session.client().getattr(ROOT).unwrap();
    let regions = session.memory().regions();
    let mut file = File::from(regions[0].fd().try_clone_to_owned().unwrap());
    let mut used_ring_and_more = Vec::new();
    file.by_ref().take(1 << 20).read_to_end(&mut used_ring_and_more).unwrap();
    assert!(used_ring_and_more.iter().any(|&byte| byte != 0));
}
