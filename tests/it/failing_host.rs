//! The host's storage fails, dawdles or disappears: the guest gets the host's errno, what is quick is
//! not held up, and the daemon serves on.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use faultfs::{Call, FILE};
use fuse_protocol::abi::{CopyFileRangeIn, EntryOut, FallocateIn, OpenIn, OpenOut, WriteOut};
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::Request;
use lanefsd_frontend::client::{Change, ROOT, data};
use lanefsd_frontend::session::Pending;

use crate::common;
use crate::common::store::Host;
use crate::survival::kill_worker;

/// What must not happen has this long to happen.
const MOMENT: Duration = Duration::from_millis(100);

/// Both engines serve all of it: see main.rs.
fn serve(args: &[&str]) -> Host {
    let engine =
        if module_path!().ends_with("io_uring") { "--io-engine=io-uring" } else { "--io-engine=threads" };
    Host::serve(&[args, &[engine]].concat())
}

/// Attack: storage that fails.
/// Outcome: the host's errno.
#[test]
fn every_error_of_the_host_reaches_the_guest() {
    let Host { session, store, node, fh, .. } = &serve(&["--cache=never"]);
    let (client, node, fh) = (session.client(), *node, *fh);
    for errno in [libc::EIO, libc::ENXIO, libc::EDQUOT, libc::EROFS, libc::ESTALE, libc::ETIMEDOUT] {
        let calls = [
            Call::Lookup,
            Call::Getattr,
            Call::Open,
            Call::Setattr,
            Call::Read,
            Call::Write,
            Call::Fsync,
            Call::Flush,
        ];
        for call in calls {
            let attempt = || match call {
                Call::Lookup => client.lookup(ROOT, FILE).map(drop),
                Call::Getattr => client.getattr(node).map(drop),
                Call::Open => {
                    client.open(node, libc::O_RDWR).map(|open| client.release(node, open.fh).unwrap())
                }
                Call::Read => client.read(node, fh, 0, 10).map(drop),
                Call::Write => client.write(node, fh, 0, b"data").map(drop),
                Call::Fsync => client.fsync(node, fh, false),
                Call::Flush => client.flush(node, fh, 0),
                Call::Setattr => client.setattr(node, Change::none().mode(0o600)).map(drop),
            };
            store.fail(call, errno);
            assert_eq!(common::errno(attempt()), errno, "{call:?}");
            // Nothing else fails with it.
            client.on(2).statfs(ROOT).unwrap();
            store.fail(call, 0);
            attempt().unwrap_or_else(|error| panic!("{call:?} after {errno}: {error}"));
        }
    }
}

/// Attack: storage that fails some of the requests in flight.
/// Outcome: each gets its own answer.
#[test]
fn of_many_requests_in_flight_each_gets_its_own_answer() {
    let Host { session, store, node, fh, .. } = &serve(&["--cache=never"]);
    let client = session.client();
    store.fail(Call::Write, libc::EIO);
    store.delay(Duration::from_millis(50));
    let bytes = [1; 4096];
    let (flags, mode) = (WriteFlags::empty(), libc::O_RDWR);
    let send = |i: u64| {
        let write = data::write_request(*node, *fh, i * 4096, &bytes, flags, mode);
        let read = data::read_request(*node, *fh, i * 4096, 100);
        (client.send(write).unwrap(), client.on(2).send(read).unwrap())
    };
    let sent: Vec<_> = (0..20).map(send).collect();
    for (write, read) in sent {
        assert_eq!(common::errno(session.finish(write)), libc::EIO);
        assert_eq!(session.finish(read).unwrap(), [0; 100]);
    }
}

/// Attack: storage that is slow.
/// Outcome: only requests for it wait.
#[test]
fn slow_storage_delays_only_requests_for_it() {
    let Host { session, mut backend, store, node, fh, directory: _directory } = serve(&["--cache=never"]);
    let client = session.client();
    let gate = store.hold(Call::Read);
    let reads: Vec<_> =
        (0..8).map(|i| client.send(data::read_request(node, fh, i * 4096, 100)).unwrap()).collect();
    client.getattr(node).unwrap();
    client.on(2).lookup(ROOT, FILE).unwrap();
    assert!(reads.iter().all(|read| !session.queue(1).is_done(read.token).unwrap()));
    drop(gate);
    for read in reads {
        session.finish(read).unwrap();
    }
    // A stop waits for what is in flight.
    let write = data::write_request(node, fh, 0, b"last", WriteFlags::empty(), libc::O_RDWR);
    let gate = store.hold(Call::Write);
    let write = client.send(write).unwrap();
    common::wait_until(|| store.under_way(Call::Write) == 1, "the write is under way");
    backend.signal(libc::SIGTERM).unwrap();
    std::thread::sleep(MOMENT);
    assert!(backend.try_wait().unwrap().is_none(), "the daemon has ended without the write");
    drop(gate);
    backend.expect_success().unwrap();
    session.finish(write).unwrap();
    assert_eq!(&std::fs::read(backend.path(FILE)).unwrap()[..4], b"last");
}

/// Only the server knows where the file ends by now: other hosts may have appended.
#[test]
fn a_fuse_server_is_told_of_appends() {
    for args in [&["--cache=never"][..], &["--cache=never", "--allow-direct-io"]] {
        let Host { session, backend, store, node, .. } = &serve(args);
        let client = session.client();
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let before = store.appends();
        for (number, more) in [0, libc::O_DIRECT].into_iter().enumerate() {
            let fh = client.open(*node, flags | more).unwrap().fh;
            let write = |offset| {
                let written =
                    client.write_with(*node, fh, offset, &[1; 4096], WriteFlags::empty(), flags | more);
                // The store does not grow.
                let _ = written;
            };
            (0..3).for_each(|_| write(0));
            assert_eq!(store.appends() - before, 3 + 3 * number as u64, "{args:?} {more:#o}");
            client.fsync(*node, fh, false).unwrap();
            kill_worker(backend);
            client.release(*node, fh).unwrap();
        }
        let fh = client.open(*node, libc::O_WRONLY).unwrap().fh;
        let after = store.appends();
        client.write(*node, fh, 0, b"x").unwrap();
        assert_eq!(store.appends(), after, "{args:?}");
    }
}

/// The host's FUSE client leaves the bits to a server that gets writes directly, and that may leave them, too.
#[test]
fn set_id_bits_are_cleared_where_the_host_leaves_them() {
    for args in [&["--cache=never"][..], &["--cache=never", "--no-killpriv-v2"]] {
        let Host { session, backend, node, fh, .. } = &serve(args);
        let root = session.client();
        let user = root.user(1000, 1000);
        let mode = || std::fs::metadata(backend.path(FILE)).unwrap().permissions().mode() & 0o7777;
        for (before, after) in [(0o4755, 0o755), (0o6755, 0o755), (0o2755, 0o755), (0o755, 0o755)] {
            root.setattr(*node, Change::none().mode(before)).unwrap();
            user.write_with(*node, *fh, 0, b"x", WriteFlags::KILL_SUIDGID, libc::O_RDWR).unwrap();
            assert_eq!(mode(), after, "{args:?} {before:o}");
        }
        // Who may keep them does.
        root.setattr(*node, Change::none().mode(0o4755)).unwrap();
        root.write(*node, *fh, 0, b"x").unwrap();
        assert_eq!(mode(), 0o4755, "{args:?}");
        // Another worker has not seen the attributes yet.
        kill_worker(backend);
        user.write_with(*node, *fh, 0, b"x", WriteFlags::KILL_SUIDGID, libc::O_RDWR).unwrap();
        assert_eq!(mode(), 0o755, "{args:?}");
    }
}

/// Attack: storage that does not answer for one file, and more requests for it than a queue has workers.
/// Outcome: other requests of the queue are served.
#[test]
fn storage_that_hangs_holds_up_no_other_request() {
    let host = serve(&["--cache=never", "--thread-pool-size=4", "--log-level=info"]);
    let Host { session, backend, store, node, fh, .. } = &host;
    let client = session.client();
    store.delay(Duration::from_secs(600));
    let read = |i: u64| client.send(data::read_request(*node, *fh, i * 4096, 100)).unwrap();
    let first: Vec<_> = (0..30).map(read).collect();
    client.getattr(*node).unwrap();
    client.lookup(ROOT, FILE).unwrap();
    if module_path!().ends_with("failing_host") {
        // An engine has no worker that waits.
        common::wait_for_words(backend, "the storage does not answer");
    }
    // What comes later meets the same.
    let second: Vec<_> = (30..60).map(read).collect();
    client.getattr(*node).unwrap();
    client.on(2).statfs(ROOT).unwrap();
    store.break_down();
    for read in first.into_iter().chain(second) {
        common::errno(session.finish(read));
    }
}

/// Attack: requests for bytes that a slow one holds.
/// Outcome: no other request waits.
#[test]
fn waiting_for_a_range_blocks_no_other_request() {
    const WAITING: u64 = 30; // More than the workers of a queue by default.
    for pool in ["--thread-pool-size=16", "--thread-pool-size=1"] {
        let host = serve(&["--cache=never", pool]);
        let Host { session, store, node, fh, .. } = &host;
        let (node, fh) = (*node, *fh);
        let (client, other) = (session.client(), session.client().on(2));
        let copy = |i| {
            let arg = CopyFileRangeIn {
                fh_in: fh,
                off_in: 1 << 19,
                nodeid_out: node,
                fh_out: fh,
                off_out: i,
                len: 100,
                ..CopyFileRangeIn::default()
            };
            Request::new(Opcode::CopyFileRange, node).arg(&arg).reply::<WriteOut>()
        };
        let kinds: [&dyn Fn(u64) -> Request<'static>; 6] = [
            &|i| data::write_request(node, fh, i, b"later", WriteFlags::empty(), libc::O_RDWR),
            &|i| data::read_request(node, fh, i, 10),
            &|i| Change::none().size(i).handle(fh).request(node),
            &|i| {
                let arg = FallocateIn { fh, offset: i, length: 10, ..FallocateIn::default() };
                Request::new(Opcode::Fallocate, node).arg(&arg)
            },
            &copy,
            &|_| {
                let flags = (libc::O_RDWR | libc::O_TRUNC).cast_unsigned();
                let arg = OpenIn { flags, open_flags: 0 };
                Request::new(Opcode::Open, node).arg(&arg).reply::<OpenOut>()
            },
        ];
        for (kind, request) in kinds.iter().enumerate() {
            let gate = store.hold(Call::Write);
            let first = [b'f'; 100];
            let first = data::write_request(node, fh, 0, &first, WriteFlags::empty(), libc::O_RDWR);
            let first = client.send(first).unwrap();
            common::wait_until(|| store.under_way(Call::Write) == 1, "the first write is under way");
            gate.admit();
            let waiting: Vec<_> = (0..WAITING).map(|i| other.send(request(i)).unwrap()).collect();
            for _ in 0..5 {
                other.getattr(ROOT).unwrap();
                other.lookup(ROOT, FILE).unwrap();
            }
            let is_done = |sent: &Pending| session.queue(sent.queue).is_done(sent.token).unwrap();
            assert!(!waiting.iter().any(is_done), "{pool}, kind {kind}: a request has met the first one");
            drop(gate);
            session.finish(first).unwrap();
            for sent in waiting {
                // The store cannot do all of it.
                session.wait(sent).unwrap();
            }
        }
        // Those that stood in for others are not needed any more, and a stop waits for nobody.
        session.stop_queue(2).unwrap();
    }
}

/// Attack: the end of a session among requests that wait for the host.
/// Outcome: nothing is left to the next one.
#[test]
fn destroy_among_requests_leaves_nothing() {
    let Host { session, backend, store, node, directory: _directory, .. } =
        serve(&["--cache=never", "--keep-listening"]);
    let connect = || {
        let options = common::queues(2);
        backend.connect(options).unwrap()
    };
    let lookup = || Request::new(Opcode::Lookup, ROOT).name(FILE).reply::<EntryOut>();
    let open = |node| Request::new(Opcode::Open, node).arg(&OpenIn::default()).reply::<OpenOut>();
    let mut before = None;
    let mut next = Some((session, node));
    for (by_name, destroyed_on, init) in
        [(true, 1, false), (false, 1, false), (true, 0, false), (false, 0, true), (true, 1, true)]
    {
        let (session, node) = next.take().unwrap();
        let client = session.client();
        let (call, request) = if by_name { (Call::Lookup, lookup()) } else { (Call::Open, open(node)) };
        let gate = store.hold(call);
        let pending: Vec<_> = (0..4).map(|_| client.on(2).send(request.clone()).unwrap()).collect();
        // All of them are popped. The host's kernel asks for a name once at a time.
        client.on(2).getattr(ROOT).unwrap();
        common::wait_until(|| store.under_way(call) > 0, "a request is under way");
        std::thread::scope(|scope| {
            let end = scope.spawn(|| {
                if init {
                    session.init().map(drop).unwrap();
                } else {
                    client.on(destroyed_on).destroy().unwrap();
                }
            });
            std::thread::sleep(MOMENT);
            assert!(!end.is_finished(), "a session has ended among its requests");
            drop(gate);
        });
        // One that a worker has popped and not begun may come after the end of the session.
        let is_served = |sent: Pending| match session.finish(sent) {
            Ok(_) => true,
            Err(error) => {
                assert!(error.errno().is_some(), "{error}");
                false
            }
        };
        assert!(pending.into_iter().filter(|sent| is_served(*sent)).count() > 0);
        drop(session);
        let limit = before.unwrap_or(usize::MAX);
        let session = connect();
        let now = common::settled_descriptors(&backend, limit);
        assert!(now <= limit, "{limit} descriptors before, now {now}");
        before = Some(now);
        let node = session.client().lookup(ROOT, FILE).unwrap().nodeid;
        let fh = session.client().open(node, libc::O_RDWR).unwrap().fh;
        session.client().release(node, fh).unwrap();
        next = Some((session, node));
    }
}

/// Attack: storage gone for good.
/// Outcome: ENOTCONN; the daemon lives.
#[test]
fn storage_that_is_gone_for_good() {
    let Host { session, mut backend, store, node, fh, directory: _directory } = serve(&["--cache=never"]);
    let client = session.client();
    let gate = store.hold(Call::Read);
    let waiting = client.send(data::read_request(node, fh, 0, 100)).unwrap();
    common::wait_until(|| store.under_way(Call::Read) == 1, "the read is under way");
    store.break_down();
    let gone = [libc::ENOTCONN, libc::ECONNABORTED];
    assert!(gone.contains(&common::errno(session.finish(waiting))));
    drop(gate);
    for _ in 0..3 {
        for errno in [
            common::errno(client.getattr(node)),
            common::errno(client.lookup(ROOT, FILE)),
            common::errno(client.create(ROOT, "new", libc::O_RDWR, 0o600, 0)),
            common::errno(client.read(node, fh, 0, 10)),
            common::errno(client.write(node, fh, 0, b"x")),
            common::errno(client.fsync(node, fh, false)),
            common::errno(client.on(2).statfs(ROOT)),
        ] {
            assert!(gone.contains(&errno), "errno {errno}");
        }
        // Another worker asks the storage for nothing before it serves.
        kill_worker(&backend);
    }
    client.release(node, fh).unwrap();
    client.forget(node, 1).unwrap();
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn a_read_that_meets_the_end_asks_the_host_once() {
    let Host { session, store, node, fh, .. } = &serve(&["--cache=never"]);
    let client = session.client();
    let end = faultfs::LENGTH as u64;
    for (offset, wanted) in [(end - 5, 5), (end - 4096, 4096), (end, 0), (0, 8192)] {
        let before = store.calls(Call::Read);
        assert_eq!(client.read(*node, *fh, offset, 8192).unwrap().len(), wanted);
        assert_eq!(store.calls(Call::Read) - before, 1, "READ at {offset}");
    }
}

#[test]
fn a_host_that_gives_less_than_it_has_is_asked_again() {
    let Host { session, store, node, fh, .. } = &serve(&["--cache=never"]);
    let client = session.client();
    store.shorten_reads(1000);
    // A guest takes a short answer for the end of the file.
    assert_eq!(client.read(*node, *fh, 10, 8192).unwrap().len(), 8192);
    assert_eq!(client.read(*node, *fh, faultfs::LENGTH as u64 - 2500, 8192).unwrap().len(), 2500);
}

#[test]
fn closing_what_was_only_read_asks_the_host_nothing() {
    let Host { session, store, node, fh, .. } = &serve(&["--cache=never"]);
    let client = session.client();
    let reader = client.open(*node, libc::O_RDONLY).unwrap().fh;
    let before = store.calls(Call::Flush);
    client.flush(*node, reader, 1).unwrap();
    assert_eq!(store.calls(Call::Flush), before);
    client.flush(*node, *fh, 1).unwrap();
    assert!(store.calls(Call::Flush) > before, "a writer gets to know of delayed errors");
}
