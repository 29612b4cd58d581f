//! The transfer of the device's state to or from the front end (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE), by a thread of
//! its own.
//!
//! The front end gives one end of a pipe. To save, the thread makes a stream of all that the guest knows and writes it; to
//! load, it reads a stream up to its end and takes it over. The control path waits for the thread where the front end asks
//! for the outcome, and where the device ends; and whoever is at the other end of the pipe may neither read nor write nor
//! close it. So the thread never blocks on a pipe or a socket: it waits for it and for the wish of the control path, and
//!
//! - once asked for the outcome it takes what the pipe has or has room for, and fails where it would have to wait for more
//!   than two seconds: a front end asks after the end of the stream;
//! - once told to stop it fails at once.
//!
//! What it does without the pipe, the snapshot and its take-over, is not interrupted. Neither is a system call on a file in
//! place of a pipe: a front end whose file lies on storage that hangs waits for its own device.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::info;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::message::VhostTransferStateDirection;

use crate::logging::{Scope, warn_limited};
use crate::migration::config::MigrationConfig;
use crate::migration::{DeviceState, MigrationError, Waiting, format};
use crate::server::Server;
use crate::state_file::{Parked, Place, StateFile, Transferred};

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

/// How long a front end's end of the pipe may stay open after it has asked for the outcome: a process that it has just
/// forked has the descriptor until it executes a program.
const GRACE: Duration = Duration::from_secs(2);

/// Go on.
const GO: u8 = 0;
/// Do not wait for the pipe any more.
const HURRY: u8 = 1;
/// Give up.
const STOP: u8 = 2;

/// Why the state was not transferred.
#[derive(Debug, Error)]
pub enum TransferError {
    /// A queue runs.
    #[error(
        "the front end transfers the device's state while queue {0} runs; it has to stop all queues before"
    )]
    Runs(usize),
    /// There is one already.
    #[error("the front end transfers the device's state while another transfer is under way")]
    Busy,
    /// CHECK_DEVICE_STATE without SET_DEVICE_STATE_FD, or the process that it was for has died.
    #[error("there is no transfer of the device's state whose outcome could be told")]
    None,
    /// There is a session.
    #[error("the front end loads the state of another device into one that a guest has mounted already")]
    Mounted,
    /// No thread, no descriptor.
    #[error("cannot begin to transfer the device's state")]
    Begin(#[source] io::Error),
    /// The device ended, or its queues were started.
    #[error("the transfer of the device's state was broken off")]
    Stopped,
    /// The outcome was asked for before the end.
    #[error("the front end asks how the transfer of the device's state ended before it has {0}")]
    Early(&'static str),
    /// The pipe failed.
    #[error("cannot {what} the device's state: {errno}")]
    Pipe {
        /// read or write.
        what: &'static str,
        /// What the system call said.
        errno: Errno,
    },
    /// The stream is longer than all that a daemon writes.
    #[error(
        "the stream of the device's state has more than {0} bytes, which --migration-unlinked-limit raises"
    )]
    Long(u64),
    /// There is no memory for the stream.
    #[error("there is no memory for the stream of the device's state, of which {0} bytes have come")]
    Memory(usize),
    /// It cannot be saved.
    #[error("the share cannot be saved: {0}")]
    Save(MigrationError),
    /// It cannot be loaded.
    #[error("the share cannot be loaded: {0}")]
    Load(MigrationError),
    /// The thread failed.
    #[error("the thread that transferred the device's state failed inside the daemon")]
    Panicked,
}

type Result<T> = std::result::Result<T, TransferError>;

/// What a transfer works with.
#[derive(Clone)]
struct Ends {
    /// Has the share.
    server: Arc<Server>,
    /// Where is noted that a load is half done.
    state: Arc<StateFile>,
    /// How the stream is written, and what of it is accepted.
    config: MigrationConfig,
}

/// The transfers of one device, of which one at a time is under way.
pub(super) struct Transfers {
    ends: Ends,
    last: Option<Transfer>,
}

impl Transfers {
    /// None, so far.
    pub(super) fn new(server: &Arc<Server>, state: &Arc<StateFile>, config: MigrationConfig) -> Transfers {
        let ends = Ends { server: Arc::clone(server), state: Arc::clone(state), config };
        Transfers { ends, last: None }
    }

    /// Begins to save the state to `pipe`, or to load it from there. `running` is a queue that runs, if there is one.
    pub(super) fn begin(
        &mut self,
        direction: VhostTransferStateDirection,
        pipe: File,
        running: Option<usize>,
    ) -> Result<()> {
        if let Some(queue) = running {
            return Err(TransferError::Runs(queue));
        }
        if self.last.as_ref().is_some_and(|last| !last.is_finished()) {
            return Err(TransferError::Busy);
        }
        // What came of an earlier one was not asked for. That of the new one may be known before this thread goes on.
        self.stop();
        self.ends.state.set_transferred(Transferred::Nothing);
        let ends = self.ends.clone();
        let transfer = match direction {
            VhostTransferStateDirection::SAVE => Transfer::begin(pipe, move |pipe| save(pipe, &ends)),
            VhostTransferStateDirection::LOAD if ends.server.has_session() => Err(TransferError::Mounted),
            VhostTransferStateDirection::LOAD => Transfer::begin(pipe, move |pipe| load(pipe, &ends)),
        };
        self.last = Some(transfer?);
        Ok(())
    }

    /// How the last transfer ended (CHECK_DEVICE_STATE). The front end has taken all that it wants, or sent all that it has.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.last.take() {
            Some(last) => last.end(HURRY),
            // The process that has loaded it has died since, with everything loaded.
            None if self.ends.state.transferred() == Transferred::Loaded => Ok(()),
            None => Err(TransferError::None),
        }
    }

    /// A queue may start: the state changes from now on.
    pub(super) fn end_before_start(&mut self) {
        self.stop();
        self.ends.state.set_transferred(Transferred::Nothing);
        // Also in a process that does not know whether an earlier one has saved the share.
        self.ends.server.resume();
    }

    /// Breaks off what is under way.
    pub(super) fn stop(&mut self) {
        if let Some(last) = self.last.take()
            && !last.is_finished()
            && let Err(error) = last.end(STOP)
        {
            warn_limited!("{error}");
        }
    }
}

/// A transfer that has begun.
#[derive(Debug)]
struct Transfer {
    signal: Arc<Signal>,
    thread: JoinHandle<Result<()>>,
}

/// How the control path reaches the thread.
#[derive(Debug)]
struct Signal {
    /// Readable once `wish` has changed.
    event: OwnedFd,
    wish: AtomicU8,
}

impl Transfer {
    fn begin(file: File, run: impl FnOnce(Pipe) -> Result<()> + Send + 'static) -> Result<Transfer> {
        let begin = |errno: Errno| TransferError::Begin(errno.into());
        fcntl_setfl(&file, OFlags::NONBLOCK).map_err(begin)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(begin)?;
        let signal = Arc::new(Signal { event, wish: AtomicU8::new(GO) });
        let pipe = Pipe { file, signal: Arc::clone(&signal), gives_up: Cell::new(None) };
        let scope = Scope::current();
        let builder = thread::Builder::new().name("lanefsd-state".into());
        let thread = builder.spawn(move || {
            let _scope = scope.enter();
            run(pipe)
        });
        Ok(Transfer { signal, thread: thread.map_err(TransferError::Begin)? })
    }

    /// Whether it has ended, well or not.
    fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it with this wish, and says how.
    fn end(self, wish: u8) -> Result<()> {
        self.signal.wish.store(wish, Ordering::Release);
        // It fails only if it was signalled before.
        let _ = rustix::io::write(&self.signal.event, &1u64.to_ne_bytes());
        self.thread.join().unwrap_or(Err(TransferError::Panicked))
    }
}

/// The front end's pipe.
struct Pipe {
    file: File,
    signal: Arc<Signal>,
    /// The thread has noticed that it is to hurry: when it gives up.
    gives_up: Cell<Option<Instant>>,
}

impl Pipe {
    /// Waits until another attempt may succeed. `missing` is what the front end has not done yet.
    fn wait(&self, flags: PollFlags, missing: &'static str) -> Result<()> {
        loop {
            match (self.signal.wish.load(Ordering::Acquire), self.gives_up.get()) {
                (GO, _) => {}
                (HURRY, Some(end)) => return self.wait_until(end, flags, missing),
                (HURRY, None) => {
                    // The last bytes may have come between the attempt and the wish: one more attempt.
                    self.gives_up.set(Instant::now().checked_add(GRACE));
                    return Ok(());
                }
                _ => return Err(TransferError::Stopped),
            }
            let event = PollFd::new(&self.signal.event, PollFlags::IN);
            match poll(&mut [PollFd::new(&self.file, flags), event], None) {
                Ok(_) if self.signal.wish.load(Ordering::Acquire) == GO => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(TransferError::Begin(errno.into())),
            }
        }
    }

    /// The same once it hurries.
    fn wait_until(&self, end: Instant, flags: PollFlags, missing: &'static str) -> Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| TransferError::Early(missing))?;
        match poll(&mut [PollFd::new(&self.file, flags)], Some(&left)) {
            Ok(0) => Err(TransferError::Early(missing)),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(TransferError::Begin(errno.into())),
        }
    }

    fn is_stopped(&self) -> bool {
        self.signal.wish.load(Ordering::Acquire) == STOP
    }

    fn write(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.is_stopped() {
                return Err(TransferError::Stopped);
            }
            match rustix::io::write(self.file.as_fd(), bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, "read all of it")?,
                Err(errno) => return Err(TransferError::Pipe { what: "write", errno }),
            }
        }
        Ok(())
    }

    /// All up to the end, unless it is more than `limit`.
    fn read(&self, limit: u64) -> Result<Vec<u8>> {
        let mut stream = Vec::new();
        let mut piece = vec![0; PIECE];
        loop {
            if self.is_stopped() {
                return Err(TransferError::Stopped);
            }
            match rustix::io::read(self.file.as_fd(), &mut piece) {
                Ok(0) => return Ok(stream),
                Ok(read) => {
                    let new = piece.get(..read).unwrap_or_default();
                    stream.try_reserve(new.len()).map_err(|_| TransferError::Memory(stream.len()))?;
                    stream.extend_from_slice(new);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, "closed its end")?,
                Err(errno) => return Err(TransferError::Pipe { what: "read", errno }),
            }
            if stream.len() as u64 > limit {
                return Err(TransferError::Long(limit));
            }
        }
    }
}

fn save(pipe: Pipe, ends: &Ends) -> Result<()> {
    let begun = Instant::now();
    let share = ends.server.save().map_err(TransferError::Save)?;
    let state = DeviceState { share, queues: ends.state.parked().into_iter().filter_map(waiting).collect() };
    let stream = format::write(&state, &ends.config).map_err(TransferError::Save)?;
    let (inodes, handles) = (state.share.inodes.len(), state.share.handles.len());
    pipe.write(&stream)?;
    let (bytes, time) = (stream.len(), begun.elapsed().as_millis());
    info!("the share was saved: {inodes} inodes, {handles} open files, {bytes} bytes, {time} ms");
    Ok(())
}

fn load(pipe: Pipe, ends: &Ends) -> Result<()> {
    let stream = pipe.read(format::longest(&ends.config))?;
    drop(pipe);
    let begun = Instant::now();
    let DeviceState { share, queues } = format::read(&stream, &ends.config).map_err(TransferError::Load)?;
    let (bytes, inodes, handles) = (stream.len(), share.inodes.len(), share.handles.len());
    drop(stream);
    // A process that dies from here on leaves half of it.
    ends.state.set_transferred(Transferred::Loading);
    let loaded = ends.server.load(share);
    if loaded.is_ok() {
        queues.iter().for_each(|queue| ends.state.park(&parked(queue)));
    }
    ends.state.set_transferred(if loaded.is_ok() { Transferred::Loaded } else { Transferred::Nothing });
    loaded.map_err(TransferError::Load)?;
    let time = begun.elapsed().as_millis();
    info!("the share was loaded: {inodes} inodes, {handles} open files, {bytes} bytes, {time} ms");
    Ok(())
}

/// Requests that wait, for another daemon.
fn waiting(parked: Parked) -> Option<Waiting> {
    let Parked { queue, place, next_available, used_index, heads } = parked;
    let Place { descriptors, available, used, size } = place;
    let ring = [descriptors, available, used];
    Some(Waiting { queue: u8::try_from(queue).ok()?, ring, size, next_available, used_index, heads })
}

/// Requests that wait, of another daemon.
fn parked(waiting: &Waiting) -> Parked {
    let [descriptors, available, used] = waiting.ring;
    Parked {
        queue: waiting.queue.into(),
        place: Place { descriptors, available, used, size: waiting.size },
        next_available: waiting.next_available,
        used_index: waiting.used_index,
        heads: waiting.heads.clone(),
    }
}

#[cfg(test)]
mod tests;
