//! What lanefsd offers and accepts before the first request: features, queues, config space, INIT.

use std::path::Path;
use std::time::Duration;

use fuse_protocol::abi::{InitIn, InitOut};
use fuse_protocol::flags::{AttrFlags, InitFlags, WriteFlags};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{self, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{VringState, code, feature, protocol};
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Request, Session, SessionOptions};
use zerocopy::IntoBytes;

use crate::common;

/// Request queues that lanefsd supports; the high-priority queue comes on top.
const REQUEST_QUEUES: usize = 63;

fn connect(socket: &Path) -> Connection {
    Connection::connect(socket).unwrap()
}

#[test]
fn offered_features() {
    let backend = common::start(&[]);
    let mut connection = connect(backend.socket());
    let wanted =
        feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX | feature::PROTOCOL_FEATURES;
    assert_eq!(connection.features().unwrap() & wanted, wanted);
    let offered = connection.protocol_features().unwrap();
    let wanted = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS | protocol::RESET_DEVICE;
    assert_eq!(offered & wanted, wanted, "{offered:#x}");
    assert_eq!(offered & protocol::CONFIG, 0, "QEMU up to 8.0 can crash on CONFIG: only with --tag");
    assert_eq!(offered & protocol::INFLIGHT_SHMFD, 0, "nothing implements it");
    connection.set_protocol_features(wanted).unwrap();
    assert_eq!(connection.queue_count().unwrap(), REQUEST_QUEUES as u64 + 1);
    assert!(connection.memory_slots().unwrap() >= 8);
}

#[test]
fn config_space_with_a_tag() {
    let backend = common::start(&["--tag=workspace"]);
    let mut connection = connect(backend.socket());
    assert_ne!(connection.protocol_features().unwrap() & protocol::CONFIG, 0);
    connection.set_protocol_features(protocol::CONFIG | protocol::REPLY_ACK).unwrap();
    let config = connection.config(0, 40).unwrap();
    assert_eq!(&config[..9], b"workspace");
    assert!(config[9..36].iter().all(|&byte| byte == 0));
    let queues = u32::from_le_bytes(config[36..].try_into().unwrap());
    assert!((1..=63).contains(&queues), "{queues} request queues");
    assert_eq!(connection.config(4, 5).unwrap(), b"space");
}

#[test]
fn a_queue_beyond_the_last_is_refused() {
    for message in [code::SET_VRING_NUM, code::SET_VRING_BASE, code::SET_VRING_ENABLE, code::GET_VRING_BASE] {
        let (mut backend, session) = common::serve(&["--log-level=error"]);
        let queue = VringState { index: REQUEST_QUEUES as u32 + 1, value: 64 };
        let answer = session.connection().send(message, &queue, &[]);
        assert!(answer.is_err(), "queue {} was accepted: {answer:?}", REQUEST_QUEUES + 1);
        drop(session);
        let status = backend.wait(Duration::from_secs(10)).unwrap();
        let stderr = backend.stderr();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "one sentence is wanted, not\n{stderr}");
        assert!(stderr.contains("queue"), "{stderr}");
    }
}

#[test]
fn a_queue_beyond_the_last_does_not_end_a_daemon_that_keeps_listening() {
    let (backend, session) = common::serve(&["--keep-listening"]);
    let queue = VringState { index: REQUEST_QUEUES as u32 + 1, value: 64 };
    assert!(session.connection().send(code::SET_VRING_NUM, &queue, &[]).is_err());
    drop(session);
    backend.connect(SessionOptions::default()).unwrap().client().getattr(ROOT).unwrap();
}

#[test]
fn all_queues_serve() {
    let options = SessionOptions { queues: REQUEST_QUEUES, ring_size: 64, ..SessionOptions::default() };
    let (_backend, session) = common::serve_with(&[], options);
    for queue in 1..=REQUEST_QUEUES {
        session.client().on(queue).getattr(ROOT).unwrap();
    }
}

#[test]
fn every_choice_of_ring_features_and_sizes() {
    for optional in
        [0, feature::EVENT_IDX, feature::INDIRECT_DESC, feature::EVENT_IDX | feature::INDIRECT_DESC]
    {
        for ring_size in [4, 16, 128, 1024] {
            let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES | optional;
            let options = SessionOptions { features, ring_size, ..SessionOptions::default() };
            let (backend, session) = common::serve_with(&[], options);
            std::fs::write(backend.path("file"), vec![7; 10_000]).unwrap();
            let client = session.client();
            let node = client.lookup(ROOT, "file").unwrap().nodeid;
            // More rounds than descriptors, so that the indices pass the ring's end.
            for _ in 0..300 {
                assert_eq!(client.getattr(node).unwrap().size, 10_000);
            }
            assert_eq!(client.read_file(node).unwrap(), vec![7; 10_000]);
        }
    }
}

#[test]
fn without_acknowledgements_and_without_memory_slots() {
    let options = SessionOptions { protocol_features: protocol::MQ, ..SessionOptions::default() };
    let (_backend, session) = common::serve_with(&[], options);
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn init_for_guests_of_every_age() {
    for minor in [27, 28, 31, 35, 36, 38, 39, 40, 45, 99] {
        let backend = common::start(&[]);
        let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
        let reply = session.init_with(minor, linux_init_flags()).unwrap();
        assert_eq!(reply.major, 7);
        assert!(reply.minor <= 45 && reply.minor >= minor.min(27), "{}", reply.minor);
        let flags = InitFlags::from_bits_retain(u64::from(reply.flags) | u64::from(reply.flags2) << 32);
        let wanted = InitFlags::MAX_PAGES | InitFlags::BIG_WRITES | InitFlags::HANDLE_KILLPRIV_V2;
        assert!(flags.contains(wanted), "{flags:?}");
        assert!(!flags.contains(InitFlags::NO_OPEN_SUPPORT), "it would end parallel direct writes");
        if minor < 40 {
            assert!(!flags.contains(InitFlags::DIRECT_IO_ALLOW_MMAP));
        }
        assert!(reply.max_write >= 1 << 20);
        assert!(u32::from(reply.max_pages) * 4096 >= reply.max_write);
        assert!(reply.max_background >= 64);
        session.client().getattr(ROOT).unwrap();
    }
}

#[test]
fn set_id_bits_are_left_to_the_guest_if_asked_for() {
    for (args, agreed) in [
        (&[][..], true),
        (&["--killpriv-v2"], true),
        (&["--no-killpriv-v2"], false),
        (&["--no-killpriv-v2", "--killpriv-v2"], true),
        (&["--killpriv-v2", "--no-killpriv-v2"], false),
    ] {
        let (_backend, session) = common::serve(args);
        assert_eq!(session.init_flags().contains(InitFlags::HANDLE_KILLPRIV_V2), agreed, "{args:?}");
    }
}

#[test]
fn submounts_are_announced_unless_told_otherwise() {
    // /proc is another file system wherever there is one at all.
    for (args, told) in [
        (&[][..], AttrFlags::SUBMOUNT),
        (&["--announce-submounts"], AttrFlags::SUBMOUNT),
        (&["--no-announce-submounts"], AttrFlags::empty()),
    ] {
        let backend = common::starter().args(args).share("/").start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        assert_eq!(session.init_flags().contains(InitFlags::SUBMOUNTS), !told.is_empty(), "{args:?}");
        for (name, flags) in [("proc", told), ("usr", AttrFlags::empty())] {
            let attr = session.client().lookup(ROOT, name).unwrap().attr;
            assert_eq!(AttrFlags::from_bits_retain(attr.flags), flags, "{args:?} {name}");
        }
    }
}

#[test]
fn nothing_is_agreed_that_the_guest_does_not_know() {
    let backend = common::start(&[]);
    let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
    let reply = session.init_with(45, InitFlags::BIG_WRITES).unwrap();
    let flags = u64::from(reply.flags) | u64::from(reply.flags2) << 32;
    assert_eq!(flags & !InitFlags::BIG_WRITES.bits(), 0, "{flags:#x}");
    // Without MAX_PAGES a guest sends at most 32 pages.
    assert!(reply.max_write <= 32 * 4096);
}

#[test]
fn too_old_a_guest_is_refused_and_a_newer_major_is_answered() {
    let backend = common::start(&[]);
    let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
    let refused = session.init_with(26, InitFlags::empty());
    assert!(common::errno(refused) > 0);
    let newer = InitIn { major: 8, minor: 0, ..InitIn::default() };
    let reply: InitOut =
        session.client().call(Request::new(Opcode::Init, 0).arg(&newer).reply::<InitOut>()).unwrap();
    assert_eq!(reply.major, 7);
    // After that the guest asks again with 7, as here.
    session.init().unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn requests_before_init_are_refused() {
    let backend = common::start(&[]);
    let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
    assert!(common::errno(session.client().getattr(ROOT)) > 0);
    assert!(common::errno(session.client().lookup(ROOT, "x")) > 0);
    session.init().unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn the_headers_last_word_is_padding_until_extensions_are_agreed_on() {
    use fuse_protocol::abi::{EntryOut, GetattrIn, LkIn, MkdirIn, ReadIn, StatfsOut};
    // By the guest's age and what it knows: whether the word has a meaning.
    for (minor, flags, extended) in [
        (31, InitFlags::DO_READDIRPLUS | InitFlags::MAX_PAGES, false),
        (37, linux_init_flags() - InitFlags::CREATE_SUPP_GROUP, false),
        (45, linux_init_flags() - InitFlags::CREATE_SUPP_GROUP, false),
        (45, linux_init_flags(), true),
    ] {
        let backend = common::start(&["--posix-lock"]);
        let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
        let client = session.client();
        for word in [1, 5, 0x1234, 0xffff, 0x5678_0001, u32::MAX] {
            let [low, high]: [u32; 2] = zerocopy::transmute!(flags.bits());
            let init = InitIn { major: 7, minor, flags: low, flags2: high, ..InitIn::default() };
            let len = if minor >= 36 { size_of::<InitIn>() } else { 16 };
            let init = Request::new(Opcode::Init, 0).arg(&init.as_bytes()[..len]);
            client.call::<InitOut>(init.last_word(word).reply::<InitOut>()).unwrap();
            // Nothing but creating requests has extensions.
            let name = format!("file-{word:x}");
            let (entry, open) = client.create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
            let (node, fh) = (entry.nodeid, open.fh);
            let write = client::data::write_request(node, fh, 0, b"data", WriteFlags::empty(), libc::O_RDWR);
            client.call_bytes(&write.last_word(word)).unwrap();
            let read = client::data::read_request(node, fh, 0, 100);
            assert_eq!(client.call_bytes(&read.last_word(word)).unwrap(), b"data");
            let request = |opcode, node| Request::new(opcode, node).last_word(word);
            client.call::<EntryOut>(request(Opcode::Lookup, ROOT).name(&name).reply::<EntryOut>()).unwrap();
            client
                .call_bytes(&request(Opcode::Getattr, node).arg(&GetattrIn::default()).reply_data(104))
                .unwrap();
            client.call::<StatfsOut>(request(Opcode::Statfs, ROOT).reply::<StatfsOut>()).unwrap();
            let lock = LkIn { fh, owner: 1, ..LkIn::default() };
            client.call_empty(request(Opcode::Setlkw, node).arg(&lock)).unwrap();
            let root = client.opendir(ROOT).unwrap().fh;
            let list = ReadIn { fh: root, size: 4096, ..ReadIn::default() };
            assert!(
                !client
                    .call_bytes(&request(Opcode::Readdir, ROOT).arg(&list).reply_data(4096))
                    .unwrap()
                    .is_empty()
            );
            client.call_empty(request(Opcode::Unlink, ROOT).name(&name)).unwrap();
            let mkdir = request(Opcode::Mkdir, ROOT).arg(&MkdirIn { mode: 0o755, umask: 0 }).name("dir");
            let made = client.call::<EntryOut>(mkdir.reply::<EntryOut>());
            match extended {
                true => assert_eq!(common::errno(made), libc::EINVAL, "{word:#x}"),
                false => {
                    made.unwrap();
                    client.call_empty(request(Opcode::Rmdir, ROOT).name("dir")).unwrap();
                }
            }
            client.call_empty(request(Opcode::Destroy, 0)).unwrap();
        }
    }
}

#[test]
fn no_more_pages_are_promised_than_a_guest_is_known_to_carry() {
    let backend = common::start(&[]);
    let session = Session::start(connect(backend.socket()), SessionOptions::default()).unwrap();
    for (minor, flags, max_pages, max_write) in [
        (31, linux_init_flags(), 4096, 16 << 20),
        (32, linux_init_flags(), 4096, 16 << 20),
        (45, linux_init_flags(), 4096, 16 << 20),
        (45, linux_init_flags() - InitFlags::MAX_PAGES, 0, 128 << 10),
        (31, InitFlags::DO_READDIRPLUS | InitFlags::MAX_PAGES, 256, 1 << 20),
        (31, InitFlags::DO_READDIRPLUS, 0, 128 << 10),
        (45, InitFlags::MAX_PAGES | InitFlags::INIT_EXT, 256, 1 << 20),
    ] {
        let reply = session.init_with(minor, flags).unwrap();
        assert_eq!((reply.max_pages, reply.max_write), (max_pages, max_write), "{minor} {flags:?}");
    }
}
