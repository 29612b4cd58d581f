//! The vhost-user connections of a share: one front end at a time, until a signal or the last disconnection.
//!
//! The calling thread accepts connections and waits for signals; each connection has a control thread (`talk`) that
//! answers the front end's messages. Its end is the end of a socket pair, which the accepting thread polls.

pub(super) mod acceptor;
mod log_fd;
pub(super) mod room;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use log::{error, info};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use self::acceptor::{Acceptor, Event};
use super::share::{Share, pace_of};
use crate::device::backend::Backend;
use crate::device::postcopy;
use crate::logging::{Scope, describe, info_limited};
use crate::process::Signals;
use crate::sandbox;
use crate::sys::descriptors;

/// Why serving front ends failed.
#[derive(Debug, Error)]
pub enum FrontendError {
    /// The signal handlers or the threads cannot be set up.
    #[error("the daemon cannot be set up")]
    SetUp(#[source] io::Error),
    /// The listening socket fails.
    #[error("the listening socket fails; check --fd or --socket-path")]
    Listen(#[source] io::Error),
    /// The front end broke the protocol, or shares memory that cannot be used.
    #[error("the front end was disconnected: {0}")]
    FrontEnd(String),
}

/// Exit status of a process whose connection with its supervisor has failed.
const WITHOUT_SUPERVISOR: i32 = 12;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// The front end itself.
    FrontEnd,
    /// The process that passes the messages of one on.
    Supervisor {
        /// The session does not end with the connection.
        leaves: bool,
    },
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The front end has disconnected.
    Disconnected,
    /// Not one message was valid: this was not a front end.
    NoFrontEnd,
    /// The process was told to drain, and another one serves the front end.
    Drained,
}

/// The connection with one front end, served by a thread of its own.
struct Connection {
    stream: Arc<UnixStream>,
    /// The front end goes on with another process.
    drains: Arc<AtomicBool>,
    /// The thread may wait for memory of the guest.
    lacks_memory: Arc<AtomicBool>,
    /// Its other end is closed when the thread is done.
    done: UnixStream,
    thread: JoinHandle<Result<Ending, FrontendError>>,
}

/// Serves the front ends that connect to the socket of `share`, until a signal comes or, unless the share keeps
/// listening, the first one has disconnected. All that is in flight is finished before the return.
pub fn serve(share: &Share, signals: &Signals) -> Result<(), FrontendError> {
    let _scope = Scope::of_share(&share.name).enter();
    let listener = share.socket.listener();
    let mut acceptor = Acceptor::new(listener).map_err(|errno| FrontendError::SetUp(errno.into()))?;
    loop {
        info!("Waiting for vhost-user socket connection...");
        let Some(connection) = next_front_end(&mut acceptor, signals, share)? else {
            return Ok(());
        };
        let signalled = loop {
            match acceptor.wait(signals.as_fd(), &[PollFd::new(&connection.done, PollFlags::IN)], true)? {
                Event::Signal => break true,
                Event::Watched => break false,
                // It waits until the current front end disconnects.
                Event::Pending | Event::Interrupted => {}
            }
        };
        if signalled {
            info!("received a signal, exiting");
            return connection.end().map(drop);
        }
        let ended = connection.end();
        share.metrics.set_front_end(false);
        if ended.is_err() {
            share.statistics.count_failure();
        }
        match ended {
            Ok(Ending::NoFrontEnd) => {}
            Err(error) if share.keep_listening => error!("{error}"),
            Ok(Ending::Disconnected) if share.keep_listening => {}
            ended => return ended.map(drop),
        }
    }
}

/// Serves the one front end at the other end of `stream` by the device `backend`, until it disconnects, `parent` is
/// readable, since that process has died, or `drain` is. For a process that another one accepts connections for.
/// `leaves`: the session may be another front end's, and is left as it is.
pub(super) fn serve_one(
    stream: UnixStream,
    backend: io::Result<Backend>,
    parent: &OwnedFd,
    drain: &Signals,
    leaves: bool,
) -> Result<Ending, FrontendError> {
    let connection = Connection::begin(stream, backend, Peer::Supervisor { leaves })?;
    let entry = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
    let mut watched = [entry(drain.as_fd()), entry(parent.as_fd()), entry(connection.done.as_fd())];
    while matches!(poll(&mut watched, None), Err(Errno::INTR)) {}
    let ready = watched.map(|fd| !fd.revents().is_empty());
    if ready[1] && connection.lacks_memory.load(Ordering::Relaxed) {
        return Err(FrontendError::FrontEnd(postcopy::LOST.into()));
    }
    if ready == [true, false, false] { connection.drain() } else { connection.end() }
}

/// Waits for a front end and begins to serve it; `None` on a signal.
fn next_front_end(
    acceptor: &mut Acceptor<'_>,
    signals: &Signals,
    share: &Share,
) -> Result<Option<Connection>, FrontendError> {
    loop {
        while let Some(stream) = acceptor.next() {
            let (server, state) = (Arc::clone(&share.server), Arc::clone(&share.state));
            let (metrics, stations) = (Arc::clone(&share.metrics), share.stations.clone());
            let pace = pace_of(&metrics);
            let backend = Backend::new(&share.device, server, state, metrics, None, stations);
            let backend = backend.map(|backend| backend.paced_by(pace));
            match Connection::begin(stream, backend, Peer::FrontEnd) {
                Ok(connection) => {
                    info!("front end connected");
                    share.statistics.count_front_end();
                    share.metrics.set_front_end(true);
                    return Ok(Some(connection));
                }
                // The next attempt may find a free thread and descriptor.
                Err(error) if share.keep_listening => {
                    share.statistics.count_failure();
                    error!("cannot serve a front end: {}", describe(&error));
                }
                Err(error) => return Err(error),
            }
        }
        if acceptor.wait(signals.as_fd(), &[], false)? == Event::Signal {
            info!("received a signal, exiting");
            return Ok(None);
        }
    }
}

impl Connection {
    fn begin(
        stream: UnixStream,
        backend: io::Result<Backend>,
        peer: Peer,
    ) -> Result<Connection, FrontendError> {
        let backend = backend.map_err(FrontendError::SetUp)?;
        let ours = Arc::new(stream.try_clone().map_err(FrontendError::SetUp)?);
        let (theirs, drains) = (Arc::clone(&ours), Arc::new(AtomicBool::new(false)));
        let (drained, lacks_memory) = (Arc::clone(&drains), Arc::clone(backend.lacks_memory()));
        let (done, guard) = UnixStream::pair().map_err(FrontendError::SetUp)?;
        let scope = Scope::current();
        let run = move || {
            let (_guard, _scope) = (guard, scope.enter());
            talk(stream, theirs, backend, &drained, peer)
        };
        let thread = thread::Builder::new().name("lanefsd-control".into()).spawn(run);
        Ok(Connection {
            stream: ours,
            drains,
            lacks_memory,
            done,
            thread: thread.map_err(FrontendError::SetUp)?,
        })
    }

    /// Closes the connection, if the front end has not, and waits for all requests in flight.
    fn end(self) -> Result<Ending, FrontendError> {
        // It fails only if the front end has disconnected.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.join()
    }

    /// Takes no more messages, and waits for all requests in flight. A message that was taken is answered.
    fn drain(self) -> Result<Ending, FrontendError> {
        self.drains.store(true, Ordering::Release);
        // The same.
        let _ = self.stream.shutdown(Shutdown::Read);
        self.join()
    }

    fn join(self) -> Result<Ending, FrontendError> {
        self.thread
            .join()
            .unwrap_or_else(|_| Err(FrontendError::FrontEnd("the control thread failed".into())))
    }
}

/// Answers the front end's messages until it disconnects, or there are to be no more, then stops the device.
fn talk(
    stream: UnixStream,
    ours: Arc<UnixStream>,
    backend: Backend,
    drains: &AtomicBool,
    peer: Peer,
) -> Result<Ending, FrontendError> {
    let backend = Arc::new(Mutex::new(backend));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
    let mut answered = false;
    let error = loop {
        match answer_next(&mut handler, &ours) {
            Ok(()) => {
                answered = true;
                backend.lock().unwrap_or_else(PoisonError::into_inner).keep_descriptors_back();
            }
            Err(error) => break error,
        }
    };
    if peer != Peer::FrontEnd && is_broken(&error) {
        error!("the connection of the worker process with its supervisor fails: {error}");
        // The front end is still there. What it has is for the next process, so nothing is dropped.
        sandbox::exit(WITHOUT_SUPERVISOR);
    }
    if drains.load(Ordering::Acquire) && is_the_end(&error) {
        leave_device(&backend);
        return Ok(Ending::Drained);
    }
    // Before the queues give theirs back. Requests that were served just then may have taken what there was.
    let is_short = room::is_short();
    if backend.lock().unwrap_or_else(PoisonError::into_inner).lacks_memory().load(Ordering::Relaxed) {
        // Its threads may wait for ever, and end with the process.
        std::mem::forget(Arc::clone(&backend));
        let why = if is_the_end(&error) { postcopy::LOST.into() } else { error.to_string() };
        return Err(FrontendError::FrontEnd(why));
    }
    end_device(&backend, peer);
    if !answered {
        info_limited!("closed a connection that is not from a vhost-user front end: {error}");
        return Ok(Ending::NoFrontEnd);
    }
    match error {
        error if is_the_end(&error) => {
            info!("front end disconnected");
            Ok(Ending::Disconnected)
        }
        ProtocolError::ReqHandlerError(error) => Err(FrontendError::FrontEnd(error.to_string())),
        _ if is_short => Err(FrontendError::FrontEnd(descriptors::TOO_FEW.into())),
        ProtocolError::InvalidMessage => Err(FrontendError::FrontEnd(
            "it sent a message that makes no sense; does the VM have shared memory (share=on)?".into(),
        )),
        ProtocolError::InvalidParam => Err(FrontendError::FrontEnd(
            "it sent a message about a queue or a memory region with a value out of range".into(),
        )),
        error => Err(FrontendError::FrontEnd(error.to_string())),
    }
}

/// Ends what the front end has begun, or leaves it as it is.
fn end_device(backend: &Arc<Mutex<Backend>>, peer: Peer) {
    if peer == (Peer::Supervisor { leaves: true }) {
        leave_device(backend);
    } else {
        backend.lock().unwrap_or_else(PoisonError::into_inner).shut_down();
    }
}

/// Drains the device, whose session is for the next process.
fn leave_device(backend: &Arc<Mutex<Backend>>) {
    backend.lock().unwrap_or_else(PoisonError::into_inner).drain();
    // To drop it would end the session.
    std::mem::forget(Arc::clone(backend));
}

/// Whether the descriptor is no stream any more. One that the other side has shut down has ended.
fn is_broken(error: &ProtocolError) -> bool {
    matches!(error, ProtocolError::SocketError(_))
}

/// Waits for the next message, and answers it.
fn answer_next(
    handler: &mut BackendReqHandler<Mutex<Backend>>,
    stream: &UnixStream,
) -> Result<(), ProtocolError> {
    if !room::is_there_for_next(stream) {
        return Err(ProtocolError::ReqHandlerError(io::Error::other(descriptors::TOO_FEW)));
    }
    match log_fd::take(stream) {
        Ok(true) => Ok(()),
        Ok(false) => handler.handle_request(),
        Err(error) => Err(ProtocolError::SocketBroken(error)),
    }
}

/// Whether no more can be read from the front end.
fn is_the_end(error: &ProtocolError) -> bool {
    matches!(
        error,
        ProtocolError::Disconnected | ProtocolError::PartialMessage | ProtocolError::SocketBroken(_)
    )
}
