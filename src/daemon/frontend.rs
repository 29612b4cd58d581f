//! The vhost-user connections of a share: one front end at a time, until a signal or the last disconnection.
//!
//! The calling thread accepts connections and waits for signals; each connection has a control thread (`talk`) that
//! answers the front end's messages. Its end is the end of a socket pair, which the accepting thread polls.

mod acceptor;
mod room;

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use log::{error, info};
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use self::acceptor::{Acceptor, Event};
use super::share::Share;
use crate::config::DeviceConfig;
use crate::device::backend::Backend;
use crate::logging::{Scope, info_limited};
use crate::process::Signals;
use crate::server::Server;
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

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The front end has disconnected.
    Disconnected,
    /// Not one message was valid: this was not a front end.
    NoFrontEnd,
}

/// The connection with one front end, served by a thread of its own.
struct Connection {
    stream: Arc<UnixStream>,
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
            match acceptor.wait(signals.as_fd(), Some(connection.done.as_fd()))? {
                Event::Signal => break true,
                Event::Watched => break false,
                // It waits until the current front end disconnects.
                Event::Pending => {}
            }
        };
        if signalled {
            info!("received a signal, exiting");
            return connection.end().map(drop);
        }
        let ended = connection.end();
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

/// Waits for a front end and begins to serve it; `None` on a signal.
fn next_front_end(
    acceptor: &mut Acceptor<'_>,
    signals: &Signals,
    share: &Share,
) -> Result<Option<Connection>, FrontendError> {
    loop {
        while let Some(stream) = acceptor.next() {
            match Connection::begin(stream, &share.device, &share.server) {
                Ok(connection) => {
                    share.statistics.count_front_end();
                    return Ok(Some(connection));
                }
                // The next attempt may find a free thread and descriptor.
                Err(error) if share.keep_listening => {
                    share.statistics.count_failure();
                    error!("cannot serve a front end: {}", with_cause(&error));
                }
                Err(error) => return Err(error),
            }
        }
        if acceptor.wait(signals.as_fd(), None)? == Event::Signal {
            info!("received a signal, exiting");
            return Ok(None);
        }
    }
}

fn with_cause(error: &FrontendError) -> String {
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
        server: &Arc<Server>,
    ) -> Result<Connection, FrontendError> {
        let backend = Backend::new(config, Arc::clone(server)).map_err(FrontendError::SetUp)?;
        let ours = Arc::new(stream.try_clone().map_err(FrontendError::SetUp)?);
        let theirs = Arc::clone(&ours);
        let (done, guard) = UnixStream::pair().map_err(FrontendError::SetUp)?;
        let scope = Scope::current();
        let run = move || {
            let (_guard, _scope) = (guard, scope.enter());
            talk(stream, theirs, backend)
        };
        let thread = thread::Builder::new().name("lanefsd-control".into()).spawn(run);
        info!("front end connected");
        Ok(Connection { stream: ours, done, thread: thread.map_err(FrontendError::SetUp)? })
    }

    /// Closes the connection, if the front end has not, and waits for all requests in flight.
    fn end(self) -> Result<Ending, FrontendError> {
        // It fails only if the front end has disconnected.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(FrontendError::FrontEnd("the control thread failed".into())))
    }
}

/// Answers the front end's messages until it disconnects, then stops the device.
fn talk(stream: UnixStream, ours: Arc<UnixStream>, backend: Backend) -> Result<Ending, FrontendError> {
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
        info_limited!("closed a connection that is not from a vhost-user front end: {error}");
        return Ok(Ending::NoFrontEnd);
    }
    match error {
        ProtocolError::Disconnected | ProtocolError::PartialMessage | ProtocolError::SocketBroken(_) => {
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
