//! A front end whose dirty log cannot be used, or not for long.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::message::{LogArea, VERSION, code, protocol};
use lanefsd_frontend::migration::Log;
use lanefsd_frontend::{Backend, Migration, Session, SessionOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use zerocopy::IntoBytes;

use crate::common;

fn daemon(args: &[&str]) -> Backend {
    // The default sandbox.
    Backend::of(common::program()).args(["--keep-listening"]).args(args).start().unwrap()
}

fn options() -> SessionOptions {
    SessionOptions { memory: vec![(0x10_0000, 16 << 20)], ..SessionOptions::default() }
}

/// A well-behaved front end is served, and its log is kept.
fn serves(backend: &Backend) {
    let session = backend.connect(options()).unwrap();
    let migration = Migration::begin(&session).unwrap();
    session.client().getattr(ROOT).unwrap();
    migration.stop_and_check().unwrap();
}

fn memory_file(size: u64, seals: SealFlags) -> File {
    let file = memfd_create("log", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

/// Sends SET_LOG_BASE, which has to end the connection.
fn is_refused(session: &Session, size: u64, offset: u64, fds: &[BorrowedFd<'_>]) {
    let connection = session.connection();
    let body = LogArea { size, offset };
    let body = body.as_bytes();
    connection.send_raw(code::SET_LOG_BASE, VERSION, body.len() as u32, body, fds).unwrap();
    let answer = connection.receive_raw("SET_LOG_BASE");
    assert!(answer.is_err(), "{size} bytes at {offset} were taken: {answer:?}");
}

/// Attack: a dirty log that cannot be mapped: of no size, longer than its file, at an odd offset, sealed, read-only, no
/// memory.
/// Outcome: the front end is disconnected with a sentence; the next one is served.
#[test]
fn a_log_that_cannot_be_mapped() {
    let backend = daemon(&[]);
    let file = memory_file(8192, SealFlags::empty());
    let empty = memory_file(0, SealFlags::empty());
    let sealed = memory_file(8192, SealFlags::WRITE);
    let sealed_later = memory_file(8192, SealFlags::FUTURE_WRITE);
    let read_only = File::open("/proc/self/exe").unwrap();
    let directory = File::open("/").unwrap();
    let null = File::open("/dev/null").unwrap();
    let (reader, writer) = io::pipe().unwrap();
    let sentences = [
        ("which has 8192 bytes", vec![(8193, 0), (1, 8192), (4097, 4096), (1, 1 << 62), (1 << 62, 0)]),
        ("cannot be mapped", vec![(8, 8), (8, 4095), (4096, 1)]),
        ("makes no sense", vec![(0, 0), (0, 4096), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)]),
    ];
    for (sentence, areas) in sentences {
        for (size, offset) in areas {
            let before = backend.stderr().matches(sentence).count();
            is_refused(&backend.connect(options()).unwrap(), size, offset, &[file.as_fd()]);
            common::wait_for(&backend, |words| words.matches(sentence).count() > before, sentence);
        }
    }
    let files = [
        sealed.as_fd(),
        sealed_later.as_fd(),
        directory.as_fd(),
        null.as_fd(),
        reader.as_fd(),
        writer.as_fd(),
    ];
    for file in files {
        let sentence = "the dirty log, 4096 bytes at offset 0 of its file, cannot be mapped";
        let before = backend.stderr().matches(sentence).count();
        is_refused(&backend.connect(options()).unwrap(), 4096, 0, &[file]);
        common::wait_for(&backend, |words| words.matches(sentence).count() > before, sentence);
    }
    is_refused(&backend.connect(options()).unwrap(), 1, 0, &[empty.as_fd()]);
    is_refused(&backend.connect(options()).unwrap(), 1, 0, &[read_only.as_fd()]);
    for fds in [&[][..], &[file.as_fd(); 2], &[file.as_fd(); 20]] {
        is_refused(&backend.connect(options()).unwrap(), 4096, 0, fds);
    }
    let mut without = options();
    without.protocol_features &= !protocol::LOG_SHMFD;
    is_refused(&backend.connect(without).unwrap(), 4096, 0, &[file.as_fd()]);
    serves(&backend);
    assert!(!backend.stderr().contains("the worker process was"), "{}", backend.stderr());
}

/// Attack: a file of the dirty log that is cut while it is used.
/// Outcome: the worker ends by SIGBUS; the next one refuses the log, so that the front end is disconnected.
#[test]
fn a_log_that_is_cut_while_it_is_used() {
    let backend = daemon(&[]);
    let session = backend.connect(options()).unwrap();
    let log = Log::of(&session).unwrap();
    session.begin_logging(&log).unwrap();
    session.client().getattr(ROOT).unwrap();
    log.file().resize_file(0).unwrap();
    let request = lanefsd_frontend::Request::new(fuse_protocol::opcode::Opcode::Statfs, ROOT);
    let request = request.reply::<fuse_protocol::abi::StatfsOut>();
    session.send(1, &request, lanefsd_frontend::Segmentation::Linux).unwrap();
    let sentence = "the dirty log ends at byte";
    common::wait_for(&backend, |words| words.contains(sentence), sentence);
    assert!(session.connection().wait_closed(std::time::Duration::from_secs(10)).unwrap());
    let words = backend.stderr();
    assert_eq!(words.matches("the worker process was ended by SIGBUS").count(), 1, "{words}");
    drop(session);
    serves(&backend);
}

/// Attack: a migration that begins again and again, each time with a log of its own.
/// Outcome: the daemon keeps the last one.
#[test]
fn a_thousand_logs_leave_one() {
    for args in [&[][..], &["--no-survive"]] {
        let backend = daemon(args);
        let session = backend.connect(options()).unwrap();
        let log = Log::of(&session).unwrap();
        session.begin_logging(&log).unwrap();
        let before = backend.descriptors().unwrap().len();
        for _ in 0..1000 {
            session.set_log(&log).unwrap();
        }
        session.end_logging().unwrap();
        session.begin_logging(&log).unwrap();
        session.client().getattr(ROOT).unwrap();
        let after = common::settled_descriptors(&backend, before);
        assert!(after <= before, "{before} descriptors before, {after} after");
    }
}
