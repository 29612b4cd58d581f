//! Front ends come and go: one is served at a time, until a signal or the last one has left.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use log::{error, info};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::low_level::pipe;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::config::DeviceConfig;
use crate::device::backend::Backend;
use crate::service::Service;
use crate::sys::signals;

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

/// The connection with one front end, served by a thread of its own.
struct Connection {
    stream: UnixStream,
    /// Its other end is closed when the thread is done.
    done: UnixStream,
    thread: JoinHandle<Result<(), ServerError>>,
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
    info!("Waiting for vhost-user socket connection...");
    let mut connection: Option<Connection> = None;
    loop {
        // While one front end is served, the next one waits in the socket's queue.
        let source = connection.as_ref().map_or(listener.as_fd(), |connection| connection.done.as_fd());
        if wait(signals, source)? {
            info!("a signal ends the daemon");
            return connection.map_or(Ok(()), Connection::end);
        }
        match connection.take() {
            None => {
                let (stream, _) = listener.accept().map_err(ServerError::Listen)?;
                connection = Some(Connection::begin(stream, config, service)?);
            }
            Some(finished) if keep_listening => {
                if let Err(error) = finished.end() {
                    error!("{error}");
                }
                info!("Waiting for vhost-user socket connection...");
            }
            Some(finished) => return finished.end(),
        }
    }
}

/// Waits until `source` is readable, or a signal has come: then true.
fn wait(signals: &Signals, source: BorrowedFd<'_>) -> Result<bool, ServerError> {
    let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::from_borrowed_fd(source, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(!fds.first().is_none_or(|fd| fd.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ServerError::SetUp(errno.into())),
        }
    }
}

impl Connection {
    fn begin(
        stream: UnixStream,
        config: &DeviceConfig,
        service: &Arc<Service>,
    ) -> Result<Connection, ServerError> {
        let backend = Backend::new(config, Arc::clone(service)).map_err(ServerError::SetUp)?;
        let ours = stream.try_clone().map_err(ServerError::SetUp)?;
        let (done, guard) = UnixStream::pair().map_err(ServerError::SetUp)?;
        let run = move || {
            let _guard = guard;
            talk(stream, backend)
        };
        let thread = thread::Builder::new().name("lanefsd-control".into()).spawn(run);
        info!("a front end is connected");
        Ok(Connection { stream: ours, done, thread: thread.map_err(ServerError::SetUp)? })
    }

    /// Ends the conversation, if it has not ended yet, and waits for all requests in flight.
    fn end(self) -> Result<(), ServerError> {
        // It fails only if the front end was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.thread.join().unwrap_or_else(|_| Err(ServerError::FrontEnd("the control thread failed".into())))
    }
}

/// Answers the front end's messages until it leaves, then stops the device.
fn talk(stream: UnixStream, backend: Backend) -> Result<(), ServerError> {
    let backend = Arc::new(Mutex::new(backend));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
    let error = loop {
        if let Err(error) = handler.handle_request() {
            break error;
        }
    };
    backend.lock().unwrap_or_else(PoisonError::into_inner).shut_down();
    match error {
        ProtocolError::Disconnected | ProtocolError::PartialMessage | ProtocolError::SocketBroken(_) => {
            info!("the front end has left");
            Ok(())
        }
        ProtocolError::ReqHandlerError(error) => Err(ServerError::FrontEnd(error.to_string())),
        ProtocolError::InvalidMessage => Err(ServerError::FrontEnd(
            "it sent a message that makes no sense; does the VM have shared memory (share=on)?".into(),
        )),
        ProtocolError::InvalidParam => Err(ServerError::FrontEnd(
            "it sent a message about a queue or a memory region with a value out of range".into(),
        )),
        error => Err(ServerError::FrontEnd(error.to_string())),
    }
}
