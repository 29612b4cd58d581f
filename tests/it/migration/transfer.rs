//! The transfer of the device's state, whoever is at the other end of the pipe, and whenever a process dies.

use std::io::{PipeWriter, Write as _, pipe};
use std::os::fd::AsFd as _;
use std::time::Duration;

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{LOAD, SAVE, feature, protocol};
use lanefsd_frontend::{Backend, Error, Session, SessionOptions};

use crate::common;
use crate::survival::kill_worker;

/// A daemon as its users start it: in the sandbox, with a supervisor.
fn start() -> Backend {
    Backend::of(common::program()).args(["--log-level=info"]).start().unwrap()
}

/// A front end up to the messages after which QEMU loads the state.
pub fn connect(backend: &Backend) -> Connection {
    let mut connection = Connection::connect(backend.socket()).unwrap();
    connection.features().unwrap();
    let features = connection.protocol_features().unwrap();
    assert_ne!(features & protocol::DEVICE_STATE, 0);
    let wanted = protocol::REPLY_ACK | protocol::MQ | protocol::CONFIGURE_MEM_SLOTS | protocol::DEVICE_STATE;
    connection.set_protocol_features(features & wanted).unwrap();
    connection.set_owner().unwrap();
    connection
}

/// A load that has begun, with this much of the stream.
fn begin_load(connection: &Connection, stream: &[u8]) -> PipeWriter {
    let (reader, mut writer) = pipe().unwrap();
    connection.set_device_state_fd(LOAD, reader.as_fd()).unwrap();
    writer.write_all(stream).unwrap();
    writer
}

pub fn is_rejected<T: std::fmt::Debug>(result: lanefsd_frontend::Result<T>) {
    assert!(matches!(result, Err(Error::Rejected { .. })), "{result:?}");
}

/// A device that was not loaded serves a guest that begins a session.
pub fn serves_anew(connection: Connection) {
    let session = Session::start(connection, SessionOptions::default()).unwrap();
    session.init().unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn a_device_that_runs_is_not_saved() {
    let mut backend = start();
    let session = backend.connect(SessionOptions::default()).unwrap();
    is_rejected(session.save_device_state());
    session.client().getattr(ROOT).unwrap();
    common::wait_for_words(&backend, "has to stop all queues before");
    // Of one that is mounted nothing is loaded, also while it rests.
    let bases = session.stop_queues().unwrap();
    is_rejected(session.connection().load_device_state(b"LANEFSDM"));
    common::wait_for_words(&backend, "that a guest has mounted already");
    is_rejected(session.connection().check_device_state());
    session.start_queues_at(&bases).unwrap();
    session.client().getattr(ROOT).unwrap();
    drop(session);
    backend.expect_success().unwrap();
}

#[test]
fn streams_that_are_none_are_refused_by_one_sentence_each() {
    let mut backend = start();
    let connection = connect(&backend);
    for (stream, words) in [
        (&b""[..], "the stream is empty"),
        (b"LANE", "the stream ends within its header, after 4 bytes"),
        (b"LANEFSDM\x02\0\0\0", "the stream has version 2"),
        (
            b"LANEFSDM\x01\0\0\0\x09\0\0\0\0\0\0\0\0\0\0\0",
            "the stream has 0 bytes behind its header, which says 9",
        ),
        (b"lanefsd", "the stream is neither lanefsd's nor virtiofsd's"),
        (&[0xff; 300_000], "the stream is neither lanefsd's nor virtiofsd's"),
    ] {
        is_rejected(connection.load_device_state(stream));
        common::wait_for_words(&backend, &format!("the share cannot be loaded: {words}"));
    }
    serves_anew(connection);
    backend.expect_success().unwrap();
}

/// CHECK_DEVICE_STATE does not wait for a front end that holds the pipe open.
#[test]
fn a_pipe_that_stays_open_is_an_error_and_no_wait() {
    let mut backend = start();
    let connection = connect(&backend);
    let writer = begin_load(&connection, b"LANEFSDM");
    // One at a time.
    let (reader, _other) = pipe().unwrap();
    is_rejected(connection.set_device_state_fd(LOAD, reader.as_fd()));
    is_rejected(connection.check_device_state());
    common::wait_for_words(&backend, "before it has closed its end");
    // There is no second answer.
    is_rejected(connection.check_device_state());
    drop(writer);
    serves_anew(connection);
    backend.expect_success().unwrap();
}

#[test]
fn a_daemon_ends_in_the_middle_of_a_transfer() {
    for signal in [None, Some(libc::SIGTERM)] {
        let mut backend = start();
        let connection = connect(&backend);
        let writer = begin_load(&connection, b"LANEFSDM");
        match signal {
            Some(signal) => backend.signal(signal).unwrap(),
            None => drop(connection),
        }
        backend.expect_success().unwrap();
        drop(writer);
    }
}

#[test]
fn queues_that_start_break_a_transfer_off() {
    let mut backend = start();
    let connection = connect(&backend);
    let writer = begin_load(&connection, b"LANEFSDM");
    serves_anew(connection);
    common::wait_for_words(&backend, "was broken off");
    drop(writer);
    backend.expect_success().unwrap();
}

/// A front end may say once more that a queue is stopped.
#[test]
fn queues_that_stay_stopped_break_nothing_off() {
    let mut backend = start();
    let connection = connect(&backend);
    let state = {
        let source = start();
        connect(&source).save_device_state().unwrap()
    };
    let (last, first) = state.split_last().unwrap();
    let mut writer = begin_load(&connection, first);
    let features = connection.features().unwrap();
    connection.set_features(features & (feature::PROTOCOL_FEATURES | feature::EVENT_IDX)).unwrap();
    for queue in 0..2 {
        connection.enable_ring(queue, false).unwrap();
    }
    writer.write_all(&[*last]).unwrap();
    drop(writer);
    connection.check_device_state().unwrap();
    serves_anew(connection);
    backend.expect_success().unwrap();
}

/// Attack: descriptors that are no pipes.
/// Outcome: the transfer fails; nothing waits.
#[test]
fn any_descriptor_may_be_sent_for_a_pipe() {
    let mut backend = start();
    let connection = connect(&backend);
    let directory = std::fs::File::open("/").unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let (_reader, writer) = pipe().unwrap();
    for fd in [directory.as_fd(), socket.as_fd(), writer.as_fd()] {
        connection.set_device_state_fd(LOAD, fd).unwrap();
        is_rejected(connection.check_device_state());
        connection.set_device_state_fd(SAVE, fd).unwrap();
        // A stream of nothing may fit into a socket.
        let _ = connection.check_device_state();
    }
    serves_anew(connection);
    backend.expect_success().unwrap();
}

/// A phase or direction that does not exist ends the connection, as all malformed messages do.
#[test]
fn phases_that_do_not_exist_are_refused() {
    for body in [[0u32, 1], [2, 0], [u32::MAX, u32::MAX]] {
        let mut backend = start();
        let connection = connect(&backend);
        let (reader, _writer) = pipe().unwrap();
        let bytes = body.map(u32::to_ne_bytes).concat();
        connection.send_raw(42, 1, 8, &bytes, &[reader.as_fd()]).unwrap();
        assert!(connection.wait_closed(Duration::from_secs(10)).unwrap());
        assert!(!backend.wait(Duration::from_secs(10)).unwrap().success());
    }
}

#[test]
fn a_load_dies_with_its_process() {
    let mut backend = start();
    let connection = connect(&backend);
    let writer = begin_load(&connection, b"LANEFSDM");
    kill_worker(&backend);
    // The pipe was the dead one's.
    common::wait_until(|| (&writer).write(b"x").is_err(), "the end of the pipe");
    is_rejected(connection.check_device_state());
    common::wait_for_words(&backend, "no transfer of the device's state");
    is_rejected(connection.load_device_state(b"LANEFSDM"));
    serves_anew(connection);
    backend.expect_success().unwrap();
}
