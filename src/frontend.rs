//! Front ends come and go: one is served at a time, until a signal or the last one has left.

mod acceptor;
mod room;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use log::{error, info};
use signal_hook::low_level::pipe;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use self::acceptor::{Acceptor, Event};
use crate::config::DeviceConfig;
use crate::device::backend::Backend;
use crate::logging::info_limited;
use crate::service::Service;
use crate::sys::{descriptors, signals};

/// Why serving came to a bad end.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The signal handlers or the threads cannot be set up.
    #[error("the server cannot be set up")]
    SetUp(#[source] io::Error),
    /// The listening socket fails.
    #[error("the listening socket fails; check what was given with --fd or --socket-path")]
    Listen(#[source] io::Error),
    /// The front end broke the protocol, or shares memory that cannot be used.
    #[error("the front end was disconnected: {0}")]
    FrontEnd(String),
}

/// Signals that end the daemon, ready to be waited for.
pub struct Signals(UnixStream);

impl Signals {
    /// Catches the signals of [`endings`] from now on, and those that [`hold`] has kept back.
    ///
    /// [`endings`]: signals::endings
    /// [`hold`]: signals::hold
    pub fn catch() -> Result<Signals, ServerError> {
        let (ours, theirs) = UnixStream::pair().map_err(ServerError::SetUp)?;
        for signal in signals::endings() {
            let end = theirs.try_clone().map_err(ServerError::SetUp)?;
            pipe::register(signal, end).map_err(ServerError::SetUp)?;
        }
        signals::release();
        Ok(Signals(ours))
    }
}

/// Readable when a signal has come.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a conversation came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The front end has left.
    Left,
    /// Not one of its messages could be handled: this was not a front end.
    NoFrontEnd,
}

/// The connection with one front end, served by a thread of its own.
struct Connection {
    stream: Arc<UnixStream>,
    /// Its other end is closed when the thread is done.
    done: UnixStream,
    thread: JoinHandle<Result<Ending, ServerError>>,
}

/// Serves front ends that connect to `listener` until a signal comes or, without
/// `keep_listening`, the first one has left. All that is in flight is finished before the return.
pub fn serve(
    listener: &UnixListener,
    signals: &Signals,
    config: &DeviceConfig,
    keep_listening: bool,
    service: &Arc<Service>,
) -> Result<(), ServerError> {
    let mut acceptor = Acceptor::new(listener).map_err(|errno| ServerError::SetUp(errno.into()))?;
    loop {
        info!("Waiting for vhost-user socket connection...");
        let Some(connection) = next_front_end(&mut acceptor, signals, config, keep_listening, service)?
        else {
            return Ok(());
        };
        let signalled = loop {
            match acceptor.wait(signals.as_fd(), Some(connection.done.as_fd()))? {
                Event::Signal => break true,
                Event::Watched => break false,
                // It waits until the current front end disconnects.
                Event::Pending => {}
            }
        };
        if signalled {
            info!("a signal ends the daemon");
            return connection.end().map(drop);
        }
        match connection.end() {
            Ok(Ending::NoFrontEnd) => {}
            Err(error) if keep_listening => error!("{error}"),
            Ok(Ending::Left) if keep_listening => {}
            ended => return ended.map(drop),
        }
    }
}

/// Waits for a front end and begins to serve it; `None` when a signal has come instead.
fn next_front_end(
    acceptor: &mut Acceptor<'_>,
    signals: &Signals,
    config: &DeviceConfig,
    keep_listening: bool,
    service: &Arc<Service>,
) -> Result<Option<Connection>, ServerError> {
    loop {
        while let Some(stream) = acceptor.next() {
            match Connection::begin(stream, config, service) {
                Ok(connection) => return Ok(Some(connection)),
                // Another time there may be a thread and a descriptor for it.
                Err(error) if keep_listening => {
                    error!("a front end cannot be served: {}", with_cause(&error))
                }
                Err(error) => return Err(error),
            }
        }
        if acceptor.wait(signals.as_fd(), None)? == Event::Signal {
            info!("a signal ends the daemon");
            return Ok(None);
        }
    }
}

fn with_cause(error: &ServerError) -> String {
    match std::error::Error::source(error) {
        Some(cause) if descriptors::is_lack(cause) => format!("{error}: {cause}; {}", descriptors::TOO_FEW),
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

impl Connection {
    fn begin(
        stream: UnixStream,
        config: &DeviceConfig,
        service: &Arc<Service>,
    ) -> Result<Connection, ServerError> {
        let backend = Backend::new(config, Arc::clone(service)).map_err(ServerError::SetUp)?;
        let ours = Arc::new(stream.try_clone().map_err(ServerError::SetUp)?);
        let theirs = Arc::clone(&ours);
        let (done, guard) = UnixStream::pair().map_err(ServerError::SetUp)?;
        let run = move || {
            let _guard = guard;
            talk(stream, theirs, backend)
        };
        let thread = thread::Builder::new().name("lanefsd-control".into()).spawn(run);
        info!("a front end is connected");
        Ok(Connection { stream: ours, done, thread: thread.map_err(ServerError::SetUp)? })
    }

    /// Ends the conversation, if it has not ended yet, and waits for all requests in flight.
    fn end(self) -> Result<Ending, ServerError> {
        // It fails only if the front end was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.thread.join().unwrap_or_else(|_| Err(ServerError::FrontEnd("the control thread failed".into())))
    }
}

/// Answers the front end's messages until it leaves, then stops the device.
fn talk(stream: UnixStream, ours: Arc<UnixStream>, backend: Backend) -> Result<Ending, ServerError> {
    let backend = Arc::new(Mutex::new(backend));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
    let mut answered = false;
    let error = loop {
        if !room::is_there_for_next(&ours) {
            break ProtocolError::ReqHandlerError(io::Error::other(descriptors::TOO_FEW));
        }
        match handler.handle_request() {
            Ok(()) => {
                answered = true;
                backend.lock().unwrap_or_else(PoisonError::into_inner).keep_descriptors_back();
            }
            Err(error) => break error,
        }
    };
    // Before the queues give theirs back. Requests that were served just then may have taken what there was.
    let is_short = room::is_short();
    backend.lock().unwrap_or_else(PoisonError::into_inner).shut_down();
    if !answered {
        info_limited!("a connection was closed that is not from a front end: {error}");
        return Ok(Ending::NoFrontEnd);
    }
    match error {
        ProtocolError::Disconnected | ProtocolError::PartialMessage | ProtocolError::SocketBroken(_) => {
            info!("the front end has left");
            Ok(Ending::Left)
        }
        ProtocolError::ReqHandlerError(error) => Err(ServerError::FrontEnd(error.to_string())),
        _ if is_short => Err(ServerError::FrontEnd(descriptors::TOO_FEW.into())),
        ProtocolError::InvalidMessage => Err(ServerError::FrontEnd(
            "it sent a message that makes no sense; does the VM have shared memory (share=on)?".into(),
        )),
        ProtocolError::InvalidParam => Err(ServerError::FrontEnd(
            "it sent a message about a queue or a memory region with a value out of range".into(),
        )),
        error => Err(ServerError::FrontEnd(error.to_string())),
    }
}
