//! Sessions that follow each other in one connection: UEFI firmware that reads the share before the guest's
//! kernel does, and guests that boot again and leave everything behind.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use fuse_protocol::abi::{ForgetIn, InitIn, InitOut};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd::sys::locks::{ByteLock, LockType, ofd_get};
use lanefsd_frontend::chain::Segmentation;
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::protocol;
use lanefsd_frontend::{Backend, Client, Request, Session, SessionOptions};
use zerocopy::{FromBytes, IntoBytes};

use crate::common;

const END: u64 = i64::MAX as u64;

/// INIT of OVMF's driver, which takes no answer of any other length.
fn firmware_init(session: &Session) {
    let flags = InitFlags::DO_READDIRPLUS.bits() as u32;
    let init = InitIn { major: 7, minor: 31, flags, ..InitIn::default() };
    let request = Request::new(Opcode::Init, 0).arg(&init.as_bytes()[..16]).reply::<InitOut>();
    let reply = session.client().call_bytes(&request).unwrap();
    let reply = InitOut::read_from_bytes(&reply).map_err(drop).expect("the reply has its whole length");
    assert!(reply.major == 7 && reply.minor >= 31 && reply.flags == flags && reply.max_write >= 4096);
}

/// On the request queue, and without room for a reply.
fn firmware_forget(session: &Session, node: u64) {
    let request = Request::new(Opcode::Forget, node).arg(&ForgetIn { nlookup: 1 }).no_reply();
    let completion = session.wait(session.send(1, &request, Segmentation::Linux).unwrap()).unwrap();
    assert_eq!(completion.used, 0);
}

/// What the boot manager does to find and start a loader, and a shell to list a directory.
fn boot_from_share(session: &Session) {
    let client = session.client();
    let volume = client.opendir(ROOT).unwrap().fh;
    // Each component is looked up, and forgotten as soon as the next one is known.
    let efi = client.lookup(ROOT, "EFI").unwrap().nodeid;
    let loader = client.lookup(efi, "loader.efi").unwrap();
    firmware_forget(session, efi);
    let fh = client.open(loader.nodeid, libc::O_RDONLY).unwrap().fh;
    let size = client.getattr(loader.nodeid).unwrap().size;
    let (mut image, mut at) = (Vec::new(), 0);
    while at < size {
        let piece = client.read(loader.nodeid, fh, at, 100_000).unwrap();
        assert!(!piece.is_empty());
        at += piece.len() as u64;
        image.extend(piece);
    }
    assert!(client.read(loader.nodeid, fh, at, 100_000).unwrap().is_empty());
    assert_eq!(image, vec![0x4d; 300_000]);
    let mut offset = 0;
    let mut listed = Vec::new();
    loop {
        let entries = client.readdirplus(ROOT, volume, offset, 1024).unwrap();
        let Some(last) = entries.last() else { break };
        offset = last.offset;
        for entry in entries {
            if let Some(node) = entry.entry.map(|entry| entry.nodeid).filter(|node| *node != 0) {
                firmware_forget(session, node);
            }
            listed.push(entry.name);
        }
    }
    listed.sort();
    assert_eq!(listed, [&b"."[..], b"..", b"EFI"]);
    assert_eq!(common::errno(client.lookup(ROOT, "startup.nsh")), libc::ENOENT);
    client.flush(loader.nodeid, fh, 0).unwrap();
    client.fsync(loader.nodeid, fh, false).unwrap();
    client.release(loader.nodeid, fh).unwrap();
    firmware_forget(session, loader.nodeid);
    client.fsyncdir(ROOT, volume).unwrap();
    client.releasedir(ROOT, volume).unwrap();
}

fn start(options: SessionOptions, args: &[&str]) -> (Backend, Session) {
    let backend = Backend::of(common::program()).args(args).start().unwrap();
    std::fs::create_dir(backend.path("EFI")).unwrap();
    std::fs::write(backend.path("EFI/loader.efi"), vec![0x4d; 300_000]).unwrap();
    let session = Session::start(Connection::connect(backend.socket()).unwrap(), options).unwrap();
    (backend, session)
}

/// Protocol features of front ends without RESET_DEVICE, which only stop the queues.
fn without_reset() -> SessionOptions {
    let all = SessionOptions::default();
    SessionOptions { protocol_features: all.protocol_features - protocol::RESET_DEVICE, ..all }
}

#[test]
fn firmware_reads_the_share_and_hands_over_to_the_kernel() {
    for options in [SessionOptions::default(), without_reset()] {
        for destroys in [true, false] {
            let (backend, session) = start(options.clone(), &[]);
            let mut descriptors = None;
            for _ in 0..2 {
                firmware_init(&session);
                let limit = descriptors.unwrap_or(usize::MAX);
                let begin = common::settled_descriptors(&backend, limit);
                assert!(begin <= limit, "{begin} descriptors, {limit} at the last boot");
                descriptors = Some(begin);
                boot_from_share(&session);
                assert!(common::settled_descriptors(&backend, begin) <= begin);
                if destroys {
                    session.client().destroy().unwrap();
                }
                session.reboot().unwrap();
                // The kernel speaks its own dialect from here on.
                let reply = session.init().unwrap();
                assert_eq!(reply.max_pages, 4096);
                let client = session.client();
                let node = client.walk(ROOT, "EFI/loader.efi").unwrap().nodeid;
                assert_eq!(client.read_file(node).unwrap().len(), 300_000);
                session.reboot().unwrap();
            }
        }
    }
}

/// Files left open, locks held, and one waited for.
fn leave_a_mess(client: &Client<'_>) {
    let dir = client.mkdir(ROOT, "dir", 0o755, 0).unwrap().nodeid;
    client.opendir(dir).unwrap();
    for name in ["one", "two"] {
        let (entry, open) = client.create(dir, name, libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"data").unwrap();
        client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, 9)).unwrap();
        client.setlk(entry.nodeid, open.fh, Lock::posix(2, libc::F_RDLCK, 10, END)).unwrap();
        client.setlk(entry.nodeid, open.fh, Lock::flock(1, libc::F_WRLCK)).unwrap();
        let other = client.open(entry.nodeid, libc::O_RDWR).unwrap().fh;
        client.send(Lock::posix(3, libc::F_WRLCK, 0, END).waiting_request(entry.nodeid, other)).unwrap();
        client.send(Lock::flock(3, libc::F_WRLCK).waiting_request(entry.nodeid, other)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn a_guest_that_boots_again_leaves_no_file_open_and_no_lock() {
    for options in [SessionOptions::default(), without_reset()] {
        let options = SessionOptions { queues: 2, ..options };
        let (backend, session) = start(options, &["--posix-lock", "--flock"]);
        session.init().unwrap();
        let client = session.client();
        let begin = backend.descriptors().unwrap().len();
        for round in 0..3 {
            leave_a_mess(&client);
            // SET_VRING_ENABLE 0 and GET_VRING_BASE for every queue, as QEMU does it.
            for queue in 0..session.queues().len() {
                session.connection().enable_ring(queue, false).unwrap();
            }
            session.reboot().unwrap();
            session.init().unwrap();
            let now = common::settled_descriptors(&backend, begin);
            assert!(now <= begin, "round {round}: {now} descriptors, {begin} at first");
            for name in ["dir/one", "dir/two"] {
                let file = File::options().read(true).write(true).open(backend.path(name)).unwrap();
                let all = ByteLock { kind: LockType::Write, start: 0, end: END };
                assert_eq!(ofd_get(file.as_fd(), all).unwrap(), None, "{name} is locked");
                file.try_lock().unwrap();
            }
            let dir = client.lookup(ROOT, "dir").unwrap().nodeid;
            for name in ["one", "two"] {
                client.unlink(dir, name).unwrap();
            }
            client.rmdir(ROOT, "dir").unwrap();
            client.forget(dir, 1).unwrap();
        }
    }
}
