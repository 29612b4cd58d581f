//! The dirty log of live migration: whatever the device writes into guest memory is in it.
//!
//! [`Migration`] copies guest memory as the source of a migration does, and compares at the end.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use fuse_protocol::abi::{GetattrIn, OutHeader};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::{Chain, Segments};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::message::{VERSION, code, feature, protocol};
use lanefsd_frontend::migration::Log;
use lanefsd_frontend::ring::Placement;
use lanefsd_frontend::{Backend, Client, Migration, Request, Segmentation, Session, SessionOptions};

use crate::common;

/// Guest memory in several regions, small enough to be compared often.
fn options() -> SessionOptions {
    let memory = vec![(0x10_0000, 16 << 20), (1 << 32, 16 << 20)];
    SessionOptions { queues: 2, memory, ..SessionOptions::default() }
}

/// Files to work with; no byte of their data is 0, as memory is before.
fn fill(share: &std::path::Path) {
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| 1 + (i % 251) as u8).collect();
    fs::write(share.join("large"), &bytes).unwrap();
    fs::write(share.join("small"), &bytes[..100]).unwrap();
    let sparse = fs::File::create(share.join("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    symlink("x".repeat(300), share.join("link")).unwrap();
    fs::create_dir(share.join("directory")).unwrap();
    for number in 0..200 {
        fs::write(share.join(format!("directory/{number:040}")), "").unwrap();
    }
    let value = [7; 3000];
    rustix::fs::setxattr(share.join("small"), "user.large", &value, rustix::fs::XattrFlags::empty()).unwrap();
}

fn daemon(args: &[&str]) -> Backend {
    // What has xattrs and O_DIRECT.
    let directory = common::disk_directory().keep();
    fill(&directory);
    let deaths = (!args.contains(&"--no-survive")).then_some("--max-deaths=100000");
    Backend::of(common::program()).share(&directory).args(deaths).args(args).start().unwrap()
}

/// The daemon removes nothing of its share.
struct Share<'a>(&'a Backend);

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.share());
    }
}

fn ok<T>(result: lanefsd_frontend::Result<T>) {
    result.unwrap();
}

type Operation = (&'static str, fn(&Client<'_>));

fn node(client: &Client<'_>, name: &str) -> u64 {
    client.lookup(ROOT, name).unwrap().nodeid
}

fn reading(client: &Client<'_>, name: &str, flags: i32, reads: &[(u64, usize)]) {
    let node = node(client, name);
    let fh = client.open(node, flags).unwrap().fh;
    for (offset, size) in reads {
        client.read(node, fh, *offset, *size).unwrap();
    }
    client.release(node, fh).unwrap();
}

/// All that is answered, each in its own way: data by preadv2(2), bodies, headers and errors.
const OPERATIONS: &[Operation] = &[
    ("LOOKUP", |client| ok(client.lookup(ROOT, "small"))),
    ("LOOKUP that fails", |client| assert_eq!(common::errno(client.lookup(ROOT, "none")), libc::ENOENT)),
    ("GETATTR", |client| ok(client.getattr(ROOT))),
    ("STATX", |client| ok(client.statx(ROOT, 0x7ff))),
    ("STATFS", |client| ok(client.statfs(ROOT))),
    ("READLINK", |client| assert_eq!(client.readlink(node(client, "link")).unwrap().len(), 300)),
    ("GETXATTR", |client| {
        assert_eq!(client.getxattr(node(client, "small"), "user.large", 5000).unwrap().len(), 3000);
    }),
    ("LISTXATTR", |client| ok(client.listxattr(node(client, "small"), 5000))),
    ("GETXATTR of a size", |client| ok(client.getxattr_size(node(client, "small"), "user.large"))),
    ("READ", |client| {
        reading(client, "small", libc::O_RDONLY, &[(0, 100), (0, 4096), (50, 7), (99, 9), (100, 10)])
    }),
    ("READ of much", |client| {
        let reads = [(0, 4096), (0, 1 << 20), (4097, 100_000), (1 << 20, 1 << 20), (2_999_000, 65_536)];
        reading(client, "large", libc::O_RDONLY, &reads);
    }),
    ("READ of holes", |client| {
        reading(client, "sparse", libc::O_RDONLY, &[(0, 1 << 16), (1 << 19, 1 << 19)])
    }),
    ("READ past the cache", |client| {
        reading(client, "large", libc::O_RDONLY | libc::O_DIRECT, &[(0, 65_536), (2_998_272, 4096)]);
    }),
    ("READ that fails", |client| assert_eq!(common::errno(client.read(ROOT, 99, 0, 5000)), libc::EBADF)),
    ("READDIR", |client| ok(client.list_names(node(client, "directory"), 4096))),
    ("READDIR of much", |client| ok(client.list_names(node(client, "directory"), 1 << 17))),
    ("READDIRPLUS", |client| {
        let node = node(client, "directory");
        let fh = client.opendir(node).unwrap().fh;
        assert!(client.readdirplus(node, fh, 0, 20_000).unwrap().len() > 50);
        client.releasedir(node, fh).unwrap();
    }),
    ("CREATE, WRITE, LSEEK, FALLOCATE, FSYNC", |client| {
        let (entry, open) = client.create(ROOT, "new", libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 10, &[5; 9000]).unwrap();
        client.lseek(entry.nodeid, open.fh, 0, libc::SEEK_HOLE).unwrap();
        client.fallocate(entry.nodeid, open.fh, 0, 0, 20_000).unwrap();
        client.fsync(entry.nodeid, open.fh, true).unwrap();
        client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, 9)).unwrap();
        ok(client.getlk(entry.nodeid, open.fh, Lock::posix(2, libc::F_WRLCK, 0, 9)));
        client.flush(entry.nodeid, open.fh, 1).unwrap();
        client.release(entry.nodeid, open.fh).unwrap();
    }),
    ("LINK, RENAME, UNLINK", |client| {
        client.link(node(client, "new"), ROOT, "other").unwrap();
        client.rename2(ROOT, "other", ROOT, "third", 0).unwrap();
        client.unlink(ROOT, "third").unwrap();
        client.unlink(ROOT, "new").unwrap();
    }),
    ("MKDIR, SYMLINK, RMDIR", |client| {
        client.mkdir(ROOT, "d", 0o755, 0).unwrap();
        client.symlink(ROOT, "s", "target").unwrap();
        client.rmdir(ROOT, "d").unwrap();
        client.unlink(ROOT, "s").unwrap();
    }),
    ("an unknown operation", |client| {
        let mut unknown = Request::new(Opcode::Getattr, ROOT);
        unknown.opcode = 4000;
        assert_eq!(common::errno(client.call_empty(unknown)), libc::ENOSYS);
    }),
    ("FORGET", |client| client.forget(node(client, "small"), 1).unwrap()),
];

#[test]
fn every_operation_in_every_layout() {
    for event_idx in [true, false] {
        let backend = daemon(&["--sandbox=none", "--xattr", "--allow-direct-io", "--posix-lock"]);
        let _share = Share(&backend);
        let mut options = options();
        let mut layouts = vec![
            Segmentation::Linux,
            Segmentation::Scattered,
            Segmentation::Contiguous,
            Segmentation::One,
            Segmentation::Bytes,
        ];
        layouts.extend((0..20).map(Segmentation::Random));
        if !event_idx {
            options.features &= !feature::EVENT_IDX;
            layouts.truncate(1);
        }
        let session = backend.connect(options).unwrap();
        let migration = Migration::begin(&session).unwrap();
        for layout in layouts {
            for (name, operation) in OPERATIONS {
                operation(&session.client().segmentation(layout).on(1 + name.len() % 2));
                if let Err(error) = migration.stop_and_check() {
                    panic!("{name} with {layout:?}: {error}");
                }
                migration.resume().unwrap();
            }
        }
        migration.end().unwrap();
    }
}

/// What is malformed gets its used entry, and is in the log as well.
#[test]
fn requests_that_are_none() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    let migration = Migration::begin(&session).unwrap();
    for len in [0, 1, 39, 40, 41, 80, 5000] {
        for seed in 0..5 {
            let bytes = lanefsd_frontend::random::Random::new(seed).bytes(len);
            let chain = Chain::raw(session.memory(), &bytes, 5000, Segmentation::Random(seed), 64).unwrap();
            let token = session.queue(1).submit(chain).unwrap();
            session.queue(1).wait(token).unwrap();
        }
        migration.stop_and_check().unwrap();
        migration.resume().unwrap();
    }
}

/// Runs `work` beside threads that read and list on all queues, and checks that they were served in the end.
fn under_load(session: &Session, work: impl FnOnce()) {
    let (done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (done, served) = (&done, &served);
            scope.spawn(move || {
                let layout = [Segmentation::Linux, Segmentation::Random(number as u64)][number % 2];
                let client = session.client().on(1 + number % 2).segmentation(layout);
                let node = node(&client, "large");
                let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
                let mut offset = number as u64;
                while !done.load(Ordering::Relaxed) {
                    offset = (offset * 5 + 4099) % 2_900_000;
                    let size = [4096, 70_000, 100, 9000][number];
                    let got = client.read(node, fh, offset, size).unwrap();
                    assert!(got.iter().zip(offset..).all(|(byte, at)| *byte == 1 + (at % 251) as u8));
                    client.lookup(ROOT, "small").unwrap();
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _done = common::Done(&done);
        work();
        let before = served.load(Ordering::Relaxed);
        common::wait_until(|| served.load(Ordering::Relaxed) > before + 10, "progress after the migration");
    });
}

#[test]
fn the_log_is_switched_on_and_off_under_load() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    under_load(&session, || {
        for round in 0..30 {
            let migration = Migration::begin(&session).unwrap();
            let mut pages = 0;
            for _ in 0..round {
                pages += migration.pass();
                std::thread::yield_now();
            }
            // Some are cancelled.
            if round % 3 != 0 {
                pages += migration.stop_and_check().unwrap();
                assert!(round < 5 || pages > 0, "the load has written nothing");
                migration.resume().unwrap();
            }
            migration.end().unwrap();
        }
    });
}

/// Front ends change to a larger log when memory is plugged in.
#[test]
fn the_log_is_changed_under_load() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    under_load(&session, || {
        let mut migration = Migration::begin(&session).unwrap();
        let size = migration.log().size();
        for round in 0..30 {
            migration.pass();
            let log =
                if round % 2 == 0 { Log::at(4096 * round, size + 8 * round) } else { Log::of(&session) };
            migration.change_log(log.unwrap()).unwrap();
        }
        migration.stop_and_check().unwrap();
        migration.resume().unwrap();
        migration.end().unwrap();
    });
}

/// A GETATTR of the root that lies wholly in the region at `guest`.
fn getattr_in(session: &Session, guest: u64) -> Chain {
    let request = Request::new(Opcode::Getattr, ROOT).arg(&GetattrIn::default());
    let bytes = request.parts(4).concat();
    let readable = session.memory().allocate_in(guest, bytes.len()).unwrap();
    readable.write(0, &bytes);
    let writable = session.memory().allocate_in(guest, 4096).unwrap();
    Chain {
        readable: Segments::of(readable, vec![(0, bytes.len())]),
        writable: Segments::of(writable, vec![(0, 4096)]),
        placement: Placement::Direct,
        keep: None,
    }
}

#[test]
fn memory_that_is_plugged_in_is_in_the_log() {
    for by_table in [false, true] {
        let backend = daemon(&["--sandbox=none"]);
        let _share = Share(&backend);
        let mut options = options();
        if by_table {
            options.protocol_features &= !protocol::CONFIGURE_MEM_SLOTS;
        }
        let session = backend.connect(options).unwrap();
        let mut migration = Migration::begin(&session).unwrap();
        let guest = 1 << 33;
        let region = session.memory().add_region(guest, 1 << 20).unwrap();
        migration.change_log(Log::of(&session).unwrap()).unwrap();
        if by_table {
            session.connection().set_memory(&session.memory().regions()).unwrap();
        } else {
            session.connection().add_memory(&region).unwrap();
        }
        region.begin_copy();
        for _ in 0..3 {
            let token = session.queue(1).submit(getattr_in(&session, guest)).unwrap();
            let done = session.queue(1).wait(token).unwrap();
            assert!(done.used > size_of::<OutHeader>());
            migration.stop_and_check().unwrap();
            migration.resume().unwrap();
        }
    }
}

#[test]
fn a_log_that_ends_early_loses_what_lies_behind_it_alone() {
    let mut backend = daemon(&["--sandbox=none"]);
    let session = backend.connect(options()).unwrap();
    // The first region, of which the log ends in the middle of a byte's pages.
    let log = Log::new(((0x10_0000 + (16 << 20)) / 4096 / 64 + 1) * 8).unwrap();
    session.begin_logging(&log).unwrap();
    let [low, high] = [0x10_0000, 1 << 32];
    for guest in [low, high, low] {
        let chain = getattr_in(&session, guest);
        let mut segments = Vec::new();
        chain.segments(&mut segments);
        let page = segments[1].address / 4096;
        log.take();
        let token = session.queue(1).submit(chain).unwrap();
        session.queue(1).wait(token).unwrap();
        session.stop_queue(1).unwrap();
        assert_eq!(log.take().contains(&page), guest == low);
        session.start_queue(1).unwrap();
    }
    // One that has no page of memory.
    session.set_log(&Log::new(8).unwrap()).unwrap();
    session.client().getattr(ROOT).unwrap();
    let migration = Migration::begin(&session).unwrap();
    session.client().getattr(ROOT).unwrap();
    migration.stop_and_check().unwrap();
    let share = backend.share().to_owned();
    migration.end().unwrap();
    drop(session);
    backend.expect_success().unwrap();
    let words = backend.stderr();
    assert_eq!(words.matches("ends before guest memory").count(), 2, "once for each log: {words}");
    fs::remove_dir_all(share).unwrap();
}

/// The used ring is recorded at the address that the front end names, which need not be in memory, or not at all.
#[test]
fn the_used_ring_is_recorded_where_the_front_end_says() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    let log = Log::of(&session).unwrap();
    session.begin_logging(&log).unwrap();
    let own = session.queue(1).with_ring(|ring| ring.used_address()) / 4096;
    let outside = 0x8000_0000 / 4096;
    for address in [Some(outside * 4096), None, Some(own * 4096), Some(u64::MAX), Some(outside * 4096 + 4095)]
    {
        let set = |address| {
            session
                .queue(1)
                .with_ring(|ring| session.connection().set_ring_addresses(1, ring, address))
                .unwrap();
        };
        set(address);
        // Setting it records the ring as a whole.
        log.take();
        session.client().getattr(ROOT).unwrap();
        // No write is missing once the next message is answered, and nobody writes before the next request.
        set(None);
        let pages = log.take();
        let has = |page: u64| pages.contains(&page);
        match address.map(|address| address / 4096) {
            Some(page) if page == outside => assert!(has(outside) && !has(own), "{address:?}: {pages:?}"),
            Some(page) if page == own => assert!(has(own) && !has(outside), "{address:?}: {pages:?}"),
            _ => assert!(!has(own) && !has(outside), "{address:?}: {pages:?}"),
        }
        assert!(!pages.is_empty(), "the reply is recorded in any case");
    }
}

#[test]
fn nothing_is_recorded_without_the_feature() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    let log = Log::of(&session).unwrap();
    session.set_log(&log).unwrap();
    session.client().getattr(ROOT).unwrap();
    assert_eq!(log.take().len(), 0);
    session.begin_logging(&log).unwrap();
    session.client().getattr(ROOT).unwrap();
    session.end_logging().unwrap();
    assert!(!log.take().is_empty());
    session.client().getattr(ROOT).unwrap();
    session.stop_queue(1).unwrap();
    assert_eq!(log.take().len(), 0);
}

/// The device sends no news of marks, so it needs no descriptor for that.
#[test]
fn a_descriptor_for_news_of_marks_is_accepted() {
    for args in [&["--sandbox=none"][..], &["--sandbox=none", "--no-survive"], &[]] {
        let backend = daemon(args);
        let _share = Share(&backend);
        let session = backend.connect(options()).unwrap();
        let migration = Migration::begin(&session).unwrap();
        let news = tempfile::tempfile().unwrap();
        let before = backend.descriptors().unwrap().len();
        for body in [&[][..], &[0; 8], &[0; 4000]] {
            session.connection().send(code::SET_LOG_FD, body, &[news.as_fd()]).unwrap();
            session.connection().send_raw(code::SET_LOG_FD, VERSION, body.len() as u32, body, &[]).unwrap();
        }
        session.client().getattr(ROOT).unwrap();
        migration.stop_and_check().unwrap();
        assert!(common::settled_descriptors(&backend, before) <= before);
    }
}

/// A guest that reboots while it migrates.
#[test]
fn a_reset_does_not_end_the_log() {
    let backend = daemon(&["--sandbox=none"]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    let migration = Migration::begin(&session).unwrap();
    for _ in 0..3 {
        session.reboot().unwrap();
        session.init_with(45, session.init_flags()).unwrap();
        session.client().getattr(ROOT).unwrap();
        migration.stop_and_check().unwrap();
        migration.resume().unwrap();
    }
}

/// A worker that dies may have written what it has not recorded.
#[test]
fn workers_are_killed_while_the_guest_migrates() {
    for sandbox in ["--sandbox=namespace", "--sandbox=none"] {
        let backend = daemon(&[sandbox]);
        let _share = Share(&backend);
        let session = backend.connect(options()).unwrap();
        under_load(&session, || {
            for round in 0..4 {
                let migration = Migration::begin(&session).unwrap();
                for kill in 0..5 {
                    migration.pass();
                    backend.replace_worker(libc::SIGKILL).unwrap();
                    if (round + kill) % 2 == 0 {
                        migration.pass();
                    }
                }
                migration.stop_and_check().unwrap();
                migration.resume().unwrap();
                migration.end().unwrap();
            }
        });
    }
}

#[test]
fn a_daemon_is_upgraded_while_the_guest_migrates() {
    let backend = daemon(&[]);
    let _share = Share(&backend);
    let session = backend.connect(options()).unwrap();
    under_load(&session, || {
        let migration = Migration::begin(&session).unwrap();
        for _ in 0..3 {
            migration.pass();
            backend.upgrade().unwrap();
        }
        migration.stop_and_check().unwrap();
        migration.resume().unwrap();
        backend.upgrade().unwrap();
        migration.stop_and_check().unwrap();
        migration.resume().unwrap();
        migration.end().unwrap();
    });
}
