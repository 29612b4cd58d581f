//! Migration by post-copy: the guest goes on at the destination, and its memory comes while it works.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use fuse_protocol::abi::{OutHeader, WriteIn};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{code, protocol};
use lanefsd_frontend::postcopy::Incoming;
use lanefsd_frontend::queue::Token;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::request::Reply;
use lanefsd_frontend::{Backend, Request, Segmentation, Session, SessionOptions};

use super::sessions::start;
use super::transfer::serves_anew;
use crate::common;
use crate::survival::{IMMORTAL, SANDBOXES, kill_worker};

fn options() -> SessionOptions {
    let memory = vec![(0x10_0000, 6 << 20), (1 << 32, 6 << 20)];
    SessionOptions { queues: 2, ring_size: 128, memory, ..SessionOptions::default() }
}

/// A front end up to the messages after which QEMU may advise of post-copy.
fn connect(backend: &Backend) -> Connection {
    let mut connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    let offered = connection.protocol_features().unwrap();
    assert_ne!(offered & protocol::PAGEFAULT, 0);
    connection.set_protocol_features(offered & !protocol::INFLIGHT_SHMFD).unwrap();
    connection.set_owner().unwrap();
    connection
}

/// Two daemons on one share, and a guest at the first of them.
struct Ends {
    share: tempfile::TempDir,
    from: Backend,
    to: Backend,
    session: Session,
}

impl Ends {
    fn new(arguments: &[&str], options: SessionOptions) -> Ends {
        let share = common::disk_directory();
        let common = ["--xattr", "--posix-lock"];
        let from = start(share.path(), &common);
        let to = start(share.path(), &[&common, arguments].concat());
        let session = from.connect(options).unwrap();
        Ends { share, from, to, session }
    }

    /// Moves the guest, which does nothing meanwhile.
    fn go(&mut self, seed: u64) -> Incoming {
        let bases = self.session.stop_queues().unwrap();
        let state = self.session.save_device_state().unwrap();
        let connection = Connection::connect(self.to.socket()).unwrap();
        let moved = self.session.move_by_postcopy(connection, &state, &bases, seed);
        let (former, incoming) = moved.unwrap_or_else(|error| panic!("{error}: {}", self.to.stderr()));
        drop(former);
        self.from.expect_success().unwrap();
        incoming
    }

    fn end(self) {
        let Ends { share, mut to, session, .. } = self;
        drop(session);
        to.expect_success().unwrap();
        drop(share);
    }
}

/// Requests that the guest has written to its memory before it moves: WRITEs of random bytes to a file.
struct Prepared {
    chains: Vec<lanefsd_frontend::chain::Chain>,
    content: Vec<u8>,
    pages: (u64, usize),
}

const PIECE: usize = 20_000;

impl Prepared {
    fn new(session: &Session, (node, fh): (u64, u64), count: usize) -> Prepared {
        let content = Random::new(7).bytes(count * PIECE);
        let mut pages = (0, 0);
        let chains = content.chunks(PIECE).zip(0u64..).map(|(data, number)| {
            let arg = WriteIn {
                fh,
                offset: number * PIECE as u64,
                size: PIECE as u32,
                write_flags: 0,
                lock_owner: 0,
                flags: libc::O_RDWR.cast_unsigned(),
                padding: 0,
            };
            let request = Request::new(Opcode::Write, node).arg(&arg).data(data);
            let request = request.reply::<fuse_protocol::abi::WriteOut>();
            let layout = [Segmentation::Linux, Segmentation::Contiguous, Segmentation::Random(number)];
            let layout = layout[number as usize % layout.len()];
            let chain = request.to_chain(session.memory(), 1 << 40 | number << 1, layout, 100).unwrap();
            let mut segments = Vec::new();
            chain.segments(&mut segments);
            let last = segments.iter().rfind(|segment| !segment.writable).unwrap();
            pages = (last.address, last.len as usize);
            chain
        });
        let chains = chains.collect();
        Prepared { chains, content, pages }
    }

    fn submit(&mut self, session: &Session) -> Vec<(usize, Token)> {
        let chains = std::mem::take(&mut self.chains).into_iter().enumerate();
        let queue = |number: usize| 1 + number % 2;
        chains
            .map(|(number, chain)| (queue(number), session.queue(queue(number)).submit(chain).unwrap()))
            .collect()
    }
}

fn wait(session: &Session, sent: Vec<(usize, Token)>) {
    for (queue, token) in sent {
        let done = session.queue(queue).wait(token).unwrap();
        assert_eq!(done.used, size_of::<OutHeader>() + 8);
        Reply::of(&done).unwrap().success().unwrap();
    }
}

/// Works on all queues in all layouts, and compares each byte.
fn work(session: &Session, name: &str) {
    let layouts = [Segmentation::Linux, Segmentation::Scattered, Segmentation::One, Segmentation::Random(3)];
    for (number, layout) in layouts.into_iter().enumerate() {
        let client = session.client().segmentation(layout).on(1 + number % 2);
        let directory = client.mkdir(ROOT, format!("{name}{number}"), 0o755, 0).unwrap().nodeid;
        let (entry, open) = client.create(directory, "file", libc::O_RDWR, 0o600, 0).unwrap();
        let (node, fh) = (entry.nodeid, open.fh);
        let content = Random::new(number as u64).bytes(150_000);
        for (piece, at) in content.chunks(60_000).zip((0..).step_by(60_000)) {
            assert_eq!(client.write(node, fh, at, piece).unwrap(), piece.len());
        }
        assert!(client.read(node, fh, 0, 150_000).unwrap() == content, "other bytes");
        client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, 9)).unwrap();
        client.setxattr(node, "user.name", b"value", 0).unwrap();
        assert_eq!(client.getxattr(node, "user.name", 100).unwrap(), b"value");
        client.symlink(directory, "link", "a/target").unwrap();
        client.link(node, directory, "other").unwrap();
        client.rename2(directory, "other", directory, "third", 0).unwrap();
        let mut names = client.list_names(directory, 4096).unwrap();
        names.sort();
        assert_eq!(names, ["file", "link", "third"]);
        client.unlink(directory, "third").unwrap();
        client.release(node, fh).unwrap();
        assert!(client.read_file(node).unwrap() == content, "other bytes");
        client.forget(node, 1).unwrap();
    }
}

#[test]
fn a_guest_works_while_its_memory_comes() {
    for (seed, by_table) in [(1, false), (2, true), (3, false)] {
        let mut options = options();
        if by_table {
            options.protocol_features &= !protocol::CONFIGURE_MEM_SLOTS;
        }
        let mut ends = Ends::new(&[], options);
        let (node, fh) = common::create_file(&ends.session);
        let mut prepared = Prepared::new(&ends.session, (node, fh), 40);
        let incoming = ends.go(seed);
        if seed == 3 {
            incoming.be_lazy();
        }
        let sent = prepared.submit(&ends.session);
        work(&ends.session, "early");
        wait(&ends.session, sent);
        assert!(incoming.faults() > 10, "the device has missed nothing");
        assert!(incoming.missing() > 0);
        incoming.finish(&ends.session).unwrap();
        assert!(fs::read(ends.share.path().join("file")).unwrap() == prepared.content, "other bytes");
        work(&ends.session, "late");
        common::wait_for_words(&ends.to, "post-copy is over");
        ends.end();
    }
}

/// The queues are stopped and started while requests wait for memory, as by a VM that is paused.
#[test]
fn queues_stop_and_start_while_memory_comes() {
    let mut ends = Ends::new(&[], options());
    let (node, fh) = common::create_file(&ends.session);
    let mut prepared = Prepared::new(&ends.session, (node, fh), 40);
    let incoming = ends.go(4);
    let sent = prepared.submit(&ends.session);
    for _ in 0..5 {
        let bases = ends.session.stop_queues().unwrap();
        // QEMU has nothing to say about memory then, and says it without a code.
        ends.session.connection().acknowledge_memory(0).unwrap();
        ends.session.start_queues_at(&bases).unwrap();
    }
    wait(&ends.session, sent);
    incoming.finish(&ends.session).unwrap();
    // From another thread of QEMU, and late.
    ends.session.connection().acknowledge_memory(code::ADD_MEM_REG).unwrap();
    assert!(fs::read(ends.share.path().join("file")).unwrap() == prepared.content, "other bytes");
    work(&ends.session, "late");
    ends.end();
}

#[test]
fn memory_is_plugged_in_while_memory_comes() {
    let mut ends = Ends::new(&[], options());
    let incoming = ends.go(5);
    let guest = 1 << 34;
    let region = ends.session.memory().add_region(guest, 1 << 20).unwrap();
    let request = Request::new(Opcode::Getattr, ROOT).arg(&fuse_protocol::abi::GetattrIn::default());
    let bytes = request.parts(1 << 41).concat();
    let readable = ends.session.memory().allocate_in(guest, bytes.len()).unwrap();
    readable.write(0, &bytes);
    let writable = ends.session.memory().allocate_in(guest, 8192).unwrap();
    incoming.take_away(&region).unwrap();
    incoming.share(&ends.session.connection(), &[region], true).unwrap();
    let chain = lanefsd_frontend::chain::Chain {
        readable: lanefsd_frontend::chain::Segments::of(readable, vec![(0, bytes.len())]),
        writable: lanefsd_frontend::chain::Segments::of(writable, vec![(0, 8192)]),
        placement: lanefsd_frontend::ring::Placement::Direct,
        keep: None,
    };
    let token = ends.session.queue(1).submit(chain).unwrap();
    let done = ends.session.queue(1).wait(token).unwrap();
    Reply::of(&done).unwrap().success().unwrap();
    incoming.finish(&ends.session).unwrap();
    work(&ends.session, "late");
    ends.end();
}

/// The next worker has other page faults than the front end has been told of.
#[test]
fn workers_are_killed_while_memory_comes() {
    for (seed, sandbox) in (0..).zip(SANDBOXES) {
        let mut ends = Ends::new(&[sandbox, IMMORTAL], options());
        let (node, fh) = common::create_file(&ends.session);
        let mut prepared = Prepared::new(&ends.session, (node, fh), 40);
        let incoming = ends.go(seed);
        let sent = prepared.submit(&ends.session);
        kill_worker(&ends.to);
        let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    work(&ends.session, &format!("round{}-", rounds.fetch_add(1, Ordering::Relaxed)));
                }
            });
            let _done = common::Done(&done);
            for _ in 0..3 {
                kill_worker(&ends.to);
            }
            common::wait_until(|| rounds.load(Ordering::Relaxed) > 1, "a round of work");
        });
        wait(&ends.session, sent);
        kill_worker(&ends.to);
        incoming.finish(&ends.session).unwrap();
        kill_worker(&ends.to);
        assert!(fs::read(ends.share.path().join("file")).unwrap() == prepared.content, "other bytes");
        work(&ends.session, "late");
        ends.end();
    }
}

/// A worker that dies before post-copy has begun, of which the front end has the page faults.
#[test]
fn a_worker_is_killed_before_memory_is_missing() {
    let ends = Ends::new(&[IMMORTAL], options());
    let bases = ends.session.stop_queues().unwrap();
    let state = ends.session.save_device_state().unwrap();
    let mut connection = connect(&ends.to);
    let incoming = Incoming::new(connection.postcopy_advise().unwrap(), 6).unwrap();
    kill_worker(&ends.to);
    let regions = ends.session.memory().regions();
    regions.iter().for_each(|region| incoming.take_away(region).unwrap());
    connection.postcopy_listen().unwrap();
    kill_worker(&ends.to);
    connection.load_device_state(&state).unwrap();
    connection.set_features(ends.session.features()).unwrap();
    incoming.share(&connection, &regions, true).unwrap();
    std::mem::swap(&mut *ends.session.connection(), &mut connection);
    drop(connection);
    ends.session.start_queues_at(&bases).unwrap();
    work(&ends.session, "early");
    incoming.finish(&ends.session).unwrap();
    work(&ends.session, "late");
    ends.end();
}

/// A destination that has been told of post-copy may get all by pre-copy, or nothing.
#[test]
fn a_migration_is_advised_of_post_copy_and_does_without() {
    let share = common::disk_directory();
    let mut backend = start(share.path(), &["--keep-listening"]);
    for round in 0..3 {
        let connection = connect(&backend);
        let faults = connection.postcopy_advise().unwrap();
        if round == 0 {
            drop(connection);
            continue;
        }
        if round == 1 {
            kill_worker(&backend);
        }
        serves_anew(connection);
        drop(faults);
    }
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
}

/// A front end that breaks the order is disconnected with a reason.
#[test]
fn messages_of_post_copy_have_an_order() {
    type Act = fn(&Connection);
    let cases: [(&str, Act); 6] = [
        ("postcopy already advised", |connection| {
            connection.postcopy_advise().unwrap();
            let _ = connection.postcopy_advise();
        }),
        ("postcopy not advised", |connection| assert!(connection.postcopy_listen().is_err())),
        ("postcopy not listening", |connection| {
            connection.postcopy_advise().unwrap();
            assert!(connection.postcopy_end().is_err());
        }),
        ("postcopy not advised", |connection| {
            connection.postcopy_advise().unwrap();
            connection.postcopy_listen().unwrap();
            let _ = connection.postcopy_listen();
        }),
        ("has shared memory before post-copy began", |connection| {
            let memory = lanefsd_frontend::Memory::new(1 << 20).unwrap();
            connection.postcopy_advise().unwrap();
            connection.set_memory(&memory.regions()).unwrap();
            assert!(connection.postcopy_listen().is_err());
        }),
        ("cannot be registered for post-copy", |connection| {
            connection.postcopy_advise().unwrap();
            connection.postcopy_listen().unwrap();
            let region = lanefsd_frontend::memory::Region::new(0, 10_000).unwrap();
            assert!(connection.add_missing_memory(&region).is_err());
        }),
    ];
    for (words, act) in cases {
        let share = common::disk_directory();
        let mut backend = start(share.path(), &[]);
        let connection = connect(&backend);
        act(&connection);
        assert!(connection.wait_closed(Duration::from_secs(10)).unwrap(), "{words}");
        common::wait_for_words(&backend, words);
        assert!(!backend.wait(Duration::from_secs(10)).unwrap().success());
    }
}

/// A request that waits for a page which never comes.
fn waiting(ends: &mut Ends, seed: u64) -> (Incoming, Vec<(usize, Token)>, Vec<u8>) {
    let (node, fh) = common::create_file(&ends.session);
    let mut prepared = Prepared::new(&ends.session, (node, fh), 1);
    let incoming = ends.go(seed);
    incoming.withhold(prepared.pages.0, prepared.pages.1);
    let sent = prepared.submit(&ends.session);
    common::wait_until(|| incoming.is_waited_for(), "a request that waits for memory");
    (incoming, sent, prepared.content)
}

/// The host's kernel writes page by page what has come of a request that has no reply.
fn is_a_part(ends: &Ends, content: &[u8]) {
    let written = fs::read(ends.share.path().join("file")).unwrap();
    assert!(content.starts_with(&written), "{} bytes, which are not the guest's", written.len());
    assert!(written.len() < content.len());
}

/// Attack: a front end goes while requests wait for memory, of which the kernel would make zeros.
/// Outcome: nothing is written to the file; the daemon ends with a sentence, or serves another front end.
#[test]
fn what_has_not_come_is_not_written() {
    for keep in [false, true] {
        let arguments: &[&str] = if keep { &["--keep-listening"] } else { &[] };
        let mut ends = Ends::new(arguments, options());
        let (incoming, _sent, content) = waiting(&mut ends, 8);
        ends.session.disconnect();
        // Its descriptors, too.
        drop(incoming);
        common::wait_for_words(&ends.to, "before post-copy was over");
        if keep {
            serves_anew(Connection::connect(ends.to.socket()).unwrap());
            ends.to.signal(libc::SIGTERM).unwrap();
            ends.to.expect_success().unwrap();
        } else {
            assert!(!ends.to.wait(Duration::from_secs(10)).unwrap().success());
        }
        is_a_part(&ends, &content);
    }
}

#[test]
fn a_daemon_is_told_to_end_while_a_request_waits() {
    let mut ends = Ends::new(&[], options());
    let (_incoming, _sent, content) = waiting(&mut ends, 9);
    ends.to.signal(libc::SIGTERM).unwrap();
    ends.to.expect_success().unwrap();
    common::wait_for_words(&ends.to, "before post-copy was over");
    is_a_part(&ends, &content);
}

#[test]
fn a_worker_ends_with_its_supervisor_while_a_request_waits() {
    let mut ends = Ends::new(&[], options());
    let (_incoming, _sent, content) = waiting(&mut ends, 12);
    let worker = ends.to.worker().unwrap();
    ends.to.signal(libc::SIGKILL).unwrap();
    common::expect_end(worker);
    is_a_part(&ends, &content);
}

#[test]
fn a_worker_is_killed_while_a_request_waits() {
    let mut ends = Ends::new(&[IMMORTAL], options());
    let (incoming, sent, content) = waiting(&mut ends, 10);
    kill_worker(&ends.to);
    // Another queue is served meanwhile.
    ends.session.client().on(2).getattr(ROOT).unwrap();
    incoming.complete().unwrap();
    wait(&ends.session, sent);
    incoming.finish(&ends.session).unwrap();
    assert!(fs::read(ends.share.path().join("file")).unwrap() == content, "other bytes");
    ends.end();
}

/// The one who would end a process that waits for memory is its supervisor.
#[test]
fn post_copy_is_offered_with_a_supervisor_alone() {
    let share = common::disk_directory();
    let backend = start(share.path(), &["--no-survive"]);
    let connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    assert_eq!(connection.protocol_features().unwrap() & protocol::PAGEFAULT, 0);
}

/// A user for whom the kernel makes no userfaultfd. A front end that wants it in spite of that gets none, and a reason.
#[test]
fn a_user_without_the_right_does_not_offer_it() {
    let sysctl = "/proc/sys/vm/unprivileged_userfaultfd";
    if fs::read_to_string(sysctl).unwrap().trim() != "0" {
        eprintln!("skipped: every user has the right here ({sysctl})");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, share) = (home.path().join("lanefsd"), home.path().join("share"));
    common::copy_program(&program);
    fs::create_dir(&share).unwrap();
    chown(&share, Some(4321), Some(4321)).unwrap();
    let backend = Backend::of("setpriv")
        .args(["--reuid=4321", "--regid=4321", "--clear-groups"])
        .args([&program])
        .args(["--log-level=debug", "--sandbox=none"]);
    let backend = backend.share(share).by_fd().start().unwrap();
    let mut connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    let offered = connection.protocol_features().unwrap();
    assert_eq!(offered & protocol::PAGEFAULT, 0);
    common::wait_for_words(&backend, "post-copy is not offered, since there is no userfaultfd");
    connection.set_protocol_features(offered & !protocol::INFLIGHT_SHMFD | protocol::PAGEFAULT).unwrap();
    connection.set_owner().unwrap();
    assert!(connection.postcopy_advise().is_err());
    common::wait_for_words(&backend, "which this host does not allow");
    serves_anew(connection);
}

#[test]
fn a_daemon_is_upgraded_after_post_copy() {
    let mut ends = Ends::new(&[], options());
    let incoming = ends.go(11);
    let before = ends.to.worker();
    ends.to.signal(libc::SIGHUP).unwrap();
    work(&ends.session, "early");
    assert_eq!(ends.to.worker(), before);
    incoming.finish(&ends.session).unwrap();
    common::wait_until(|| ends.to.worker().is_some_and(|worker| Some(worker) != before), "the upgrade");
    work(&ends.session, "late");
    ends.end();
}
