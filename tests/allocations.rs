//! A worker allocates nothing for what it serves over and over: READ, WRITE, GETATTR, LOOKUP.
//!
//! The daemon's parts run in this process, over the socket and with the threads that they have in the
//! daemon. The allocator counts for all threads but the one that plays the guest.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuse_protocol::abi::{AttrOut, EntryOut, GetattrIn};
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd::config::{CachePolicy, DeviceConfig, FsConfig, MigrationConfig};
use lanefsd::daemon::{Share, Statistics, frontend};
use lanefsd::device::engine::Stations;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::limits::Limits;
use lanefsd::metrics::Metrics;
use lanefsd::process::{self, Signals};
use lanefsd::server::Server;
use lanefsd::state_file::StateFile;
use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::{Request, Segmentation, Session, SessionOptions};

/// Allocations by all threads that are not exempt.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

impl Counting {
    fn count() {
        // A thread that is ending has no thread-locals left; it is one of the daemon's.
        if !EXEMPT.try_with(Cell::get).unwrap_or(false) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: all work is the system allocator's; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests that are in flight at once.
const DEPTH: u64 = 32;
/// Requests between two looks at the counter.
const WINDOW: u64 = 640;
/// Windows in a row without an allocation that make the steady state.
const STEADY: usize = 30;
/// Windows after which it has to be reached: queues start their workers when the load asks for
/// them, and each worker needs memory for its first requests.
const WINDOWS: usize = 600;

/// Serves `share` to the one front end that comes, as the daemon does.
fn serve(share: &Path, listener: &UnixListener, workers: usize, cache: CachePolicy) {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    let open = |path: &Path| -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    };
    let config = FsConfig { cache, ..FsConfig::default() };
    let proc_self_fd = open(Path::new("/proc/self/fd"));
    process::prepare_for_requests(&proc_self_fd).unwrap();
    let limits = Limits::of_the_process(&proc_self_fd).unwrap();
    let state = StateFile::create().unwrap();
    let fs = PassthroughFs::new(open(share), proc_self_fd, limits, config, &state).unwrap();
    let device = DeviceConfig {
        tag: None,
        request_queues: 1,
        thread_pool_size: workers,
        poll_time: Duration::from_micros(20),
        rates: lanefsd::limits::Rates::default(),
        group: None,
        descriptors_are_copied: false,
        migration: MigrationConfig::default(),
    };
    let server = Arc::new(Server::new(Arc::new(fs)));
    let share = Share {
        stations: Stations::default(),
        name: "test".into(),
        directory: share.to_owned(),
        socket: listener.try_clone().unwrap().into(),
        keep_listening: false,
        device,
        server,
        state,
        metrics: Metrics::create().unwrap(),
        statistics: Statistics::default(),
    };
    frontend::serve(&share, &Signals::catch().unwrap()).unwrap();
}

/// Sends requests like `request`, [`DEPTH`] at once, until [`STEADY`] windows went by in which the
/// daemon allocated nothing; returns what it allocated per window on the way there.
fn allocations(session: &Session, request: &Request<'_>) -> Vec<u64> {
    let mut unique = 1_000_000;
    let mut window = || {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..WINDOW / DEPTH {
            let chains = (0..DEPTH).map(|i| {
                request
                    .to_chain(session.memory(), unique + 2 * i, Segmentation::Linux, 1024)
                    .expect("a chain")
            });
            session.queue(1).submit_batch(chains).unwrap();
            unique += 2 * DEPTH;
            while let Some(completion) = session.queue(1).complete().unwrap() {
                lanefsd_frontend::request::Reply::of(&completion).unwrap().success().unwrap();
            }
        }
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    let mut counts = Vec::new();
    while counts.len() < WINDOWS {
        counts.push(window());
        if counts.len() >= STEADY && counts[counts.len() - STEADY..].iter().all(|count| *count == 0) {
            break;
        }
    }
    counts
}

#[test]
fn nothing_is_allocated_in_the_steady_state() {
    EXEMPT.set(true);
    let directory = tempfile::tempdir().unwrap();
    let share = directory.path().join("share");
    std::fs::create_dir(&share).unwrap();
    // One worker, many, and reads that lock their ranges.
    for (workers, cache) in [(1, CachePolicy::Auto), (8, CachePolicy::Auto), (8, CachePolicy::Never)] {
        let socket = directory.path().join(format!("socket{workers}{cache:?}"));
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&share, &listener, workers, cache));
            let session = Session::connect(&socket, SessionOptions::default()).unwrap();
            let client = session.client();
            let name = format!("file{workers}{cache:?}");
            let (entry, open) = client.create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
            let (node, bytes) = (entry.nodeid, [7; 4096]);
            client.write(node, open.fh, 0, &bytes).unwrap();
            let getattr = Request::new(Opcode::Getattr, node).arg(&GetattrIn::default());
            for (what, request) in [
                ("WRITE", data::write_request(node, open.fh, 0, &bytes, WriteFlags::empty(), libc::O_RDWR)),
                ("READ", data::read_request(node, open.fh, 0, bytes.len())),
                ("GETATTR", getattr.reply::<AttrOut>()),
                ("LOOKUP", Request::new(Opcode::Lookup, ROOT).name(&name).reply::<EntryOut>()),
            ] {
                let counts = allocations(&session, &request);
                let begin = counts.iter().sum::<u64>();
                let last = &counts[counts.len().saturating_sub(STEADY)..];
                println!(
                    "{workers} workers, cache {cache:?}, {what}: {} allocations in the last {} requests, \
                     {begin} in {} from the first one on",
                    last.iter().sum::<u64>(),
                    last.len() as u64 * WINDOW,
                    counts.len() as u64 * WINDOW,
                );
                assert!(last.iter().all(|count| *count == 0), "{what} goes on allocating: {counts:?}");
            }
            drop(session);
        });
    }
}
