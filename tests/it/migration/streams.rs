//! Streams that were cut, changed or forged on their way, and ends that fail in the middle, with all that a real session has.

use std::cell::RefCell;
use std::fs;
use std::io::{Read as _, Write as _, pipe};
use std::os::fd::AsFd as _;
use std::path::Path;

use lanefsd::config::MigrationConfig;
use lanefsd::migration::{Location, format};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{LOAD, SAVE};
use lanefsd_frontend::{Backend, Error, Session, SessionOptions};
use tempfile::TempDir;

use super::transfer::{connect, is_rejected, serves_anew};
use crate::common;
use crate::survival::kill_worker;

/// Files that the guest knows: their stream is longer than a pipe.
const FILES: usize = 8000;

/// A guest that has stopped, with a file that it has open, and the daemon that it was served by.
struct Source {
    share: TempDir,
    backend: Backend,
    session: Session,
    bases: RefCell<Vec<u16>>,
    file: (u64, u64),
}

fn start(share: &Path, args: &[&str]) -> Backend {
    Backend::of(common::program()).args(["--log-level=info"]).args(args).share(share).start().unwrap()
}

fn source() -> Source {
    let share = common::disk_directory();
    let backend = start(share.path(), &[]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "open", libc::O_RDWR, 0o600, 0).unwrap();
    let file = (entry.nodeid, open.fh);
    for number in 0..FILES {
        let name = format!("a file with a name of some length {number}");
        let (entry, open) = client.create(ROOT, name, libc::O_RDWR, 0o600, 0).unwrap();
        client.release(entry.nodeid, open.fh).unwrap();
    }
    let bases = RefCell::new(session.stop_queues().unwrap());
    Source { share, backend, session, bases, file }
}

impl Source {
    fn save(&self) -> Vec<u8> {
        self.session.save_device_state().unwrap()
    }

    /// Where the queues run again, the guest has lost nothing.
    fn goes_on(&self) {
        self.session.start_queues_at(&self.bases.borrow()).unwrap();
        self.works();
        *self.bases.borrow_mut() = self.session.stop_queues().unwrap();
    }

    fn works(&self) {
        let (client, (node, fh)) = (self.session.client(), self.file);
        client.write(node, fh, 0, b"data").unwrap();
        assert_eq!(client.read(node, fh, 0, 10).unwrap(), b"data");
        assert_eq!(client.lookup(ROOT, "open").unwrap().nodeid, node);
        client.forget(node, 1).unwrap();
        common::every_queue_answers(&self.session);
    }
}

/// Attack: a stream that was cut short, or in which a byte was changed.
/// Outcome: an error, and nothing is loaded.
#[test]
fn streams_that_were_cut_or_changed_are_refused() {
    let mut source = source();
    let stream = source.save();
    assert!(stream.len() > 1 << 17, "{}", stream.len());
    let mut destination = start(source.share.path(), &[]);
    let connection = connect(&destination);
    let lengths = (0..40).chain((40..stream.len()).step_by(stream.len() / 40)).chain([stream.len() - 1]);
    for length in lengths {
        is_rejected(connection.load_device_state(&stream[..length]));
    }
    for place in (0..40).chain((40..stream.len()).step_by(stream.len() / 40)) {
        let mut changed = stream.clone();
        changed[place] ^= 1 << (place % 8);
        is_rejected(connection.load_device_state(&changed));
    }
    // In another order, twice, and with a byte too many.
    let (begin, end) = stream.split_at(stream.len() / 2);
    for forged in [[end, begin].concat(), [begin, end, begin, end].concat(), [&stream[..], b"\0"].concat()] {
        is_rejected(connection.load_device_state(&forged));
    }
    assert!(destination.stderr().contains("the checksum of the stream is wrong"));
    // The next one counts.
    let moved =
        source.session.move_to(connect_new(&mut destination, connection), &stream, &source.bases.borrow());
    drop(moved.unwrap());
    source.backend.expect_success().unwrap();
    source.works();
}

/// A front end that has failed disconnects, and QEMU is started anew with its daemon.
fn connect_new(destination: &mut Backend, former: Connection) -> Connection {
    drop(former);
    destination.expect_success().unwrap();
    let share = destination.share().to_owned();
    *destination = start(&share, &[]);
    Connection::connect(destination.socket()).unwrap()
}

#[test]
fn a_daemon_with_other_options_says_which() {
    let source = source();
    let stream = source.save();
    for (option, words) in [
        ("--cache=always", "the source has --cache auto and this daemon --cache always"),
        ("--xattr", "the source has --xattr off and this daemon --xattr on"),
        ("--readonly", "the source has --readonly off and this daemon --readonly on"),
        ("--translate-uid=map:0:1000:1", "and this daemon --translate-uid map:0:1000:1"),
        ("--no-readdirplus", "the guest was promised InitFlags(DO_READDIRPLUS | READDIRPLUS_AUTO)"),
    ] {
        let destination = start(source.share.path(), &[option]);
        let connection = connect(&destination);
        is_rejected(connection.load_device_state(&stream));
        common::wait_for_words(&destination, words);
        serves_anew(connection);
        source.goes_on();
    }
}

/// Attack: a stream with a right checksum whose nodes lie outside of the share: through links, mounts above it and handles.
/// Outcome: the guest gets errors for them.
#[test]
fn nodes_of_a_forged_stream_are_inside_of_the_share() {
    let source = source();
    std::os::unix::fs::symlink("/", source.share.path().join("link")).unwrap();
    let secret = source.share.path().parent().unwrap().join(format!("secret-{}", std::process::id()));
    fs::write(&secret, "secret").unwrap();
    let file_name = secret.file_name().unwrap().to_str().unwrap().to_owned();
    let child = |parent, name: &str| Location::Child { parent, name: name.into() };
    let passwd = |name: &str| Location::Path(format!("link/etc/{name}").into_bytes());
    // No options: nothing is compared.
    let nothing = MigrationConfig::default();
    let mut state = format::read(&source.save(), &nothing).unwrap();
    let mut template = state.share.inodes.iter().find(|inode| inode.node == source.file.0).unwrap().clone();
    (template.identity, template.handle) = (None, None);
    let next = state.share.next_node.max(1 << 32);
    for (offset, location) in (0..).zip([
        child(ROOT, "link"),
        child(next, "etc"),
        child(next + 1, "passwd"),
        passwd("passwd"),
        child(ROOT, &file_name),
    ]) {
        let inode = lanefsd::migration::Inode { node: next + offset, location, ..template.clone() };
        state.share.inodes.push(inode);
    }
    state.share.next_node = next + 10;
    let destination = start(source.share.path(), &["--migration-on-error=guest-error"]);
    let forged = format::write(&state, &nothing).unwrap();
    let moved = source.session.move_to(
        Connection::connect(destination.socket()).unwrap(),
        &forged,
        &source.bases.borrow(),
    );
    drop(moved.unwrap_or_else(|error| panic!("{error}: {}", destination.stderr())));
    let client = source.session.client();
    // The link itself is in the share.
    assert_eq!(client.getattr(next).unwrap().mode & libc::S_IFMT, libc::S_IFLNK);
    for node in next + 1..next + 5 {
        let found = client.getattr(node);
        assert!(matches!(found, Err(Error::Refused { .. })), "node {node}: {found:?}");
        client.open(node, libc::O_RDONLY).unwrap_err();
    }
    source.works();
    fs::remove_file(secret).unwrap();
}

/// Whoever should read the stream does not, or goes away in the middle; the source is saved once more, and goes on.
#[test]
fn a_source_whose_state_is_not_read_goes_on() {
    let source = source();
    let connection = source.session.connection();
    let (unread, writer) = pipe().unwrap();
    connection.set_device_state_fd(SAVE, writer.as_fd()).unwrap();
    drop(writer);
    // A second one has to wait.
    let (_other, writer) = pipe().unwrap();
    is_rejected(connection.set_device_state_fd(SAVE, writer.as_fd()));
    is_rejected(connection.check_device_state());
    common::wait_for_words(&source.backend, "before it has read all of it");
    drop((unread, connection));
    source.goes_on();

    let connection = source.session.connection();
    let (mut reader, writer) = pipe().unwrap();
    connection.set_device_state_fd(SAVE, writer.as_fd()).unwrap();
    reader.read_exact(&mut [0; 70_000]).unwrap();
    drop(reader);
    is_rejected(connection.check_device_state());
    common::wait_for_words(&source.backend, "cannot write the device's state");
    drop(connection);
    source.goes_on();

    // Queues that start while it is written, as after a migration that was cancelled.
    let connection = source.session.connection();
    let (unread, writer) = pipe().unwrap();
    connection.set_device_state_fd(SAVE, writer.as_fd()).unwrap();
    drop(connection);
    source.goes_on();
    drop(unread);
    assert_eq!(source.save(), source.save());
    source.goes_on();
}

/// The worker is killed while the stream is written.
#[test]
fn a_save_dies_with_its_process_and_the_guest_lives() {
    let source = source();
    let connection = source.session.connection();
    let (mut reader, writer) = pipe().unwrap();
    connection.set_device_state_fd(SAVE, writer.as_fd()).unwrap();
    drop(writer);
    reader.read_exact(&mut [0; 1000]).unwrap();
    kill_worker(&source.backend);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    is_rejected(connection.check_device_state());
    drop(connection);
    source.goes_on();
    // And moves after all.
    let stream = source.save();
    let destination = start(source.share.path(), &[]);
    let moved = source.session.move_to(
        Connection::connect(destination.socket()).unwrap(),
        &stream,
        &source.bases.borrow(),
    );
    drop(moved.unwrap());
    source.works();
}

/// The worker is killed while it reads, while it takes over, and after that, before anybody has asked.
#[test]
fn a_load_that_dies_is_all_or_nothing() {
    let source = source();
    let stream = source.save();
    let mut loaded = 0;
    for pause in [Some(0), Some(1), Some(3), Some(6), Some(10), Some(20), Some(40), Some(80), None] {
        let destination = start(source.share.path(), &[]);
        let connection = connect(&destination);
        let (reader, mut writer) = pipe().unwrap();
        connection.set_device_state_fd(LOAD, reader.as_fd()).unwrap();
        drop(reader);
        writer.write_all(&stream[..stream.len() - 1]).unwrap();
        if pause != Some(0) {
            writer.write_all(&stream[stream.len() - 1..]).unwrap();
            drop(writer);
        }
        match pause {
            Some(pause) => std::thread::sleep(std::time::Duration::from_millis(pause)),
            None => common::wait_for_words(&destination, "the share was loaded"),
        }
        kill_worker(&destination);
        match connection.check_device_state() {
            Ok(()) => {
                loaded += 1;
                // Nobody else knows the session.
                is_rejected(connection.load_device_state(&stream));
                common::wait_for_words(&destination, "that a guest has mounted already");
            }
            Err(_) => serves_anew(connection),
        }
    }
    // The first one never got its last byte, and the last one all the time that it wanted.
    assert!((1..9).contains(&loaded), "{loaded}");
    source.goes_on();
}
