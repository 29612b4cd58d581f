//! Front ends come and go: one is served at a time, until a signal or the last one has left.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::config::DeviceConfig;
use crate::device::backend::Backend;
use crate::service::Service;

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
    #[error("the front end was disconnected after an error: {0}")]
    FrontEnd(String),
}

/// Signals that end the daemon, ready to be waited for.
pub struct Signals(UnixStream);

impl Signals {
    /// Catches SIGTERM and SIGINT from now on.
    pub fn catch() -> Result<Signals, ServerError> {
        let (ours, theirs) = UnixStream::pair().map_err(ServerError::SetUp)?;
        for signal in [SIGTERM, SIGINT] {
            let end = theirs.try_clone().map_err(ServerError::SetUp)?;
            pipe::register(signal, end).map_err(ServerError::SetUp)?;
        }
        Ok(Signals(ours))
    }

    /// Waits for one of them.
    pub fn wait(&self) {
        let mut byte = [0];
        // An error would mean that no signal can be waited for; then none is reported.
        while let Err(Errno::INTR) = rustix::io::read(&self.0, &mut byte) {}
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
    let mut connection: Option<Connection> = None;
    loop {
        let (signal, incoming, done) = wait(listener, signals, connection.as_ref())?;
        if signal {
            info!("a signal ends the daemon");
            return connection.map_or(Ok(()), Connection::end);
        }
        if done && let Some(finished) = connection.take() {
            let result = finished.end();
            if !keep_listening {
                return result;
            }
            if let Err(error) = result {
                error!("{error}");
            }
            info!("waiting for the next front end");
        }
        if incoming {
            let (stream, _) = listener.accept().map_err(ServerError::Listen)?;
            if connection.is_some() {
                warn!("a second front end was turned away; one is served at a time");
            } else {
                connection = Some(Connection::begin(stream, config, service)?);
            }
        }
    }
}

/// Waits for a signal, a front end that connects, or the end of the connection.
fn wait(
    listener: &UnixListener,
    signals: &Signals,
    connection: Option<&Connection>,
) -> Result<(bool, bool, bool), ServerError> {
    // Without a connection, the signals stand in for its end; that is told apart below.
    let done = connection.map_or(signals.0.as_fd(), |connection| connection.done.as_fd());
    let mut fds = [
        PollFd::from_borrowed_fd(signals.0.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(done, PollFlags::IN),
    ];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(ServerError::SetUp(errno.into())),
    }
    let [signal, incoming, done] = fds.map(|fd| !fd.revents().is_empty());
    Ok((signal, incoming, done && connection.is_some()))
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
        error => Err(ServerError::FrontEnd(error.to_string())),
    }
}
