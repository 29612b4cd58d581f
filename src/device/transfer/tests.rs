use std::io::{PipeReader, PipeWriter, Read as _, Write as _, pipe};
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use fuse_protocol::flags::InitFlags;

use super::*;
use crate::fs::{Agreement, FileSystem};
use crate::migration::{Inode, Location, Session, Snapshot};

/// A file system of nothing but a state.
#[derive(Default)]
struct Stub {
    agreement: Arc<Agreement>,
    saved: Snapshot,
    loaded: Mutex<Option<Snapshot>>,
}

impl FileSystem for Stub {
    fn agreement(&self) -> crate::fs::Result<&Arc<Agreement>> {
        Ok(&self.agreement)
    }

    fn offered_flags(&self) -> InitFlags {
        InitFlags::all()
    }

    fn save(&self) -> std::result::Result<Snapshot, MigrationError> {
        match self.saved.inodes.is_empty() {
            true => Err(MigrationError("there is nothing".into())),
            false => Ok(self.saved.clone()),
        }
    }

    fn load(&self, snapshot: Snapshot) -> std::result::Result<(), MigrationError> {
        if snapshot.inodes.len() == 1 {
            return Err(MigrationError("there is no file".into()));
        }
        *self.loaded.lock().unwrap() = Some(snapshot);
        Ok(())
    }
}

/// A snapshot whose stream does not fit into a pipe.
fn large() -> Snapshot {
    let child = |node: u64| Inode {
        node,
        lookups: node,
        location: Location::Child { parent: 1, name: format!("file {node}").into_bytes() },
        identity: None,
        handle: None,
    };
    let root = Inode { node: 1, lookups: 1, location: Location::Root, identity: None, handle: None };
    Snapshot {
        session: Some(Session { minor: Some(45), flags: Some(1), ..Session::default() }),
        inodes: std::iter::once(root).chain((2..20_000).map(child)).collect(),
        ..Snapshot::default()
    }
}

struct Device {
    fs: Arc<Stub>,
    state: Arc<StateFile>,
    transfers: Transfers,
}

fn device(saved: Snapshot) -> Device {
    let fs = Arc::new(Stub { saved, ..Stub::default() });
    let server = Arc::new(Server::new(Arc::clone(&fs) as Arc<dyn FileSystem>));
    let state = StateFile::create().unwrap();
    let transfers = Transfers::new(&server, &state, MigrationConfig::default());
    Device { fs, state, transfers }
}

fn file(end: impl Into<OwnedFd>) -> File {
    end.into().into()
}

impl Device {
    fn begin_save(&mut self) -> Result<PipeReader> {
        let (reader, writer) = pipe().unwrap();
        self.transfers.begin(VhostTransferStateDirection::SAVE, file(writer), None)?;
        Ok(reader)
    }

    fn begin_load(&mut self) -> Result<PipeWriter> {
        let (reader, writer) = pipe().unwrap();
        self.transfers.begin(VhostTransferStateDirection::LOAD, file(reader), None)?;
        Ok(writer)
    }

    fn save(&mut self) -> Vec<u8> {
        let mut stream = Vec::new();
        self.begin_save().unwrap().read_to_end(&mut stream).unwrap();
        self.transfers.check().unwrap();
        stream
    }

    fn load(&mut self, stream: &[u8]) -> Result<()> {
        let mut writer = self.begin_load()?;
        // The device may have had enough.
        let _ = writer.write_all(stream);
        drop(writer);
        self.transfers.check()
    }
}

#[test]
fn what_one_device_saves_another_one_loads() {
    let (mut source, mut destination) = (device(large()), device(Snapshot::default()));
    let stream = source.save();
    assert!(stream.len() > 128 << 10);
    // As often as a front end likes.
    assert_eq!(source.save(), stream);
    destination.load(&stream).unwrap();
    assert_eq!(destination.fs.loaded.lock().unwrap().as_ref(), Some(&large()));
    assert_eq!(destination.state.transferred(), Transferred::Loaded);
    // Another process, after the death of this one, is asked.
    destination.transfers.check().unwrap();
    destination.transfers.end_before_start();
    assert!(matches!(destination.transfers.check(), Err(TransferError::None)));
}

#[test]
fn a_pipe_that_nobody_reads_delays_nobody() {
    let mut source = device(large());
    let reader = source.begin_save().unwrap();
    assert!(matches!(source.transfers.check(), Err(TransferError::Early(_))));
    // The queues of the source are started.
    let other = source.begin_save().unwrap();
    assert!(matches!(source.begin_save(), Err(TransferError::Busy)));
    source.transfers.end_before_start();
    assert!(matches!(source.transfers.check(), Err(TransferError::None)));
    drop((reader, other));
    source.save();
}

#[test]
fn a_pipe_that_is_never_closed_delays_nobody() {
    let mut destination = device(Snapshot::default());
    let stream = device(large()).save();
    let mut writer = destination.begin_load().unwrap();
    writer.write_all(&stream).unwrap();
    assert!(matches!(destination.transfers.check(), Err(TransferError::Early("closed its end"))));
    let writer = (writer, destination.begin_load().unwrap());
    destination.transfers.stop();
    drop(writer);
    assert!(destination.fs.loaded.lock().unwrap().is_none());
    destination.load(&stream).unwrap();
}

/// What the thread has not read when it is asked for the outcome counts.
#[test]
fn the_last_bytes_before_the_question_are_read() {
    let stream = device(large()).save();
    for _ in 0..50 {
        let mut destination = device(Snapshot::default());
        destination.load(&stream).unwrap();
    }
}

/// A process that was just forked has the front end's end of the pipe for a moment.
#[test]
fn an_end_that_is_closed_a_little_later_is_an_end() {
    let stream = device(large()).save();
    let mut destination = device(Snapshot::default());
    let mut writer = destination.begin_load().unwrap();
    writer.write_all(&stream).unwrap();
    let signal = Arc::clone(&destination.transfers.last.as_ref().unwrap().signal);
    thread::scope(|scope| {
        scope.spawn(move || {
            while signal.wish.load(Ordering::Acquire) == GO {
                thread::yield_now();
            }
            drop(writer);
        });
        destination.transfers.check().unwrap();
    });
    assert!(destination.fs.loaded.lock().unwrap().is_some());
}

#[test]
fn a_reader_that_goes_away_is_an_error_once() {
    let mut source = device(large());
    drop(source.begin_save().unwrap());
    let error = source.transfers.check().unwrap_err();
    assert!(matches!(error, TransferError::Pipe { what: "write", errno: Errno::PIPE }), "{error}");
    source.save();
}

#[test]
fn errors_of_the_file_system_and_of_the_stream_are_told() {
    let mut source = device(Snapshot::default());
    let mut nothing = Vec::new();
    source.begin_save().unwrap().read_to_end(&mut nothing).unwrap();
    let error = source.transfers.check().unwrap_err().to_string();
    assert_eq!((error.as_str(), nothing.len()), ("the share cannot be saved: there is nothing", 0));
    let mut destination = device(Snapshot::default());
    for (stream, words) in [(&b""[..], "is empty"), (b"LANEFSDM\x01", "ends within"), (b"\x07", "neither")] {
        let error = destination.load(stream).unwrap_err().to_string();
        assert!(error.starts_with("the share cannot be loaded") && error.contains(words), "{error}");
        assert_eq!(destination.state.transferred(), Transferred::Nothing);
    }
    let mut small = large();
    small.inodes.truncate(1);
    let error = destination.load(&device(small).save()).unwrap_err().to_string();
    assert_eq!(error, "the share cannot be loaded: there is no file");
    assert_eq!(destination.state.transferred(), Transferred::Nothing);
}

#[test]
fn transfers_are_for_devices_that_are_stopped_and_loads_for_new_ones() {
    let mut source = device(large());
    let (_reader, writer) = pipe().unwrap();
    let refused = source.transfers.begin(VhostTransferStateDirection::SAVE, file(writer), Some(1));
    assert!(matches!(refused, Err(TransferError::Runs(1))));
    let negotiated = fuse_protocol::init::Negotiated {
        minor: 45,
        flags: InitFlags::empty(),
        max_write: 4096,
        max_readahead: 0,
        max_pages: 1,
    };
    source.fs.agreement.begin(&negotiated);
    assert!(matches!(source.begin_load(), Err(TransferError::Mounted)));
    source.save();
}

#[test]
fn a_stream_without_end_is_cut() {
    let (reader, mut writer) = pipe().unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let signal = Arc::new(Signal { event, wish: AtomicU8::new(GO) });
    let pipe = Pipe { file: file(reader), signal, gives_up: Cell::new(None) };
    writer.write_all(&[1; 5000]).unwrap();
    assert!(matches!(pipe.read(4999), Err(TransferError::Long(4999))));
    writer.write_all(&[1; 5000]).unwrap();
    drop(writer);
    assert_eq!(pipe.read(5000).unwrap(), [1; 5000]);
}
