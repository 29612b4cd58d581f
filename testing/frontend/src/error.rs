//! What can go wrong between a front end and its back end.

use std::io;
use std::time::Duration;

use crate::errno::Errno;

/// An error of the front end. [`Error::Refused`] is the only one that a healthy back end may cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The back end answered a FUSE request with an errno.
    #[error("the back end refused {operation}: {errno}")]
    Refused {
        /// The FUSE operation, by name.
        operation: &'static str,
        /// The errno in the reply.
        errno: Errno,
    },
    /// A system call of the front end failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// The host's error.
        source: io::Error,
    },
    /// The back end closed the vhost-user socket.
    #[error("the back end closed the vhost-user socket while the front end waited for the answer to {0}")]
    Closed(&'static str),
    /// The back end answered a vhost-user message with something else than the specification asks for.
    #[error("vhost-user answer to {message}: {problem}")]
    Protocol {
        /// The message that was sent.
        message: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The back end acknowledged a vhost-user message with a failure.
    #[error("the back end rejected the vhost-user message {message} (code {code})")]
    Rejected {
        /// The message that was sent.
        message: &'static str,
        /// The code in the acknowledgement; not 0.
        code: u64,
    },
    /// The used ring holds something that no correct device writes.
    #[error("queue {queue}: the device broke the ring: {problem}")]
    BrokenRing {
        /// Queue number; 0 is the high-priority queue.
        queue: usize,
        /// Which rule was broken.
        problem: String,
    },
    /// No descriptors are left for the chain.
    #[error("the ring has {free} free descriptors, the chain needs {needed}")]
    RingFull {
        /// Free descriptors.
        free: usize,
        /// Descriptors that the chain needs.
        needed: usize,
    },
    /// Nothing came back in time.
    #[error("queue {queue}: nothing came back in {waited:?}, {in_flight} requests are in flight")]
    Timeout {
        /// Queue number; 0 is the high-priority queue.
        queue: usize,
        /// How long the front end waited.
        waited: Duration,
        /// Requests that the device still owns.
        in_flight: usize,
    },
    /// Guest memory has no room for a buffer.
    #[error("guest memory has no room for {0} bytes: give the session more memory or drop completions")]
    OutOfMemory(usize),
    /// A FUSE reply contradicts itself or its request.
    #[error("the reply to {operation} is wrong: {problem}")]
    BadReply {
        /// The FUSE operation, by name.
        operation: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The back end process did not behave.
    #[error("back end {program}: {problem}")]
    Backend {
        /// The program that was started.
        program: String,
        /// What happened; holds the process's stderr where that helps.
        problem: String,
    },
}

impl Error {
    /// Makes a [`Error::System`] from a failed call; for `map_err`.
    pub fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::System { what, source }
    }

    /// The errno of a refused FUSE request; `None` for every other error.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// Result of the front end's calls.
pub type Result<T> = std::result::Result<T, Error>;
