//! A worker process, from the supervisor's side.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};

use super::super::run::RunError;
use super::message::{Message, Reader, Received};
use crate::sandbox::{Entered, Worker, WorkerEnd, Zombie};
use crate::sys::inherited::Shared;

/// A worker and the connection with it.
#[derive(Debug)]
pub(super) struct Link {
    process: Worker,
    stream: Shared<UnixStream>,
    reader: Reader,
}

impl Link {
    /// A worker that has just been made. `stream` is the supervisor's end of the connection.
    pub(super) fn new(process: Worker, mut stream: UnixStream) -> Link {
        // The worker closes what it does not know of, and does not know of this descriptor, which came with it. A worker
        // that cannot be sent anything has ended, which is noticed.
        let _ = stream.write_all(&process.as_fd().as_raw_fd().to_ne_bytes());
        Link { process, stream: Shared::new(stream), reader: Reader::default() }
    }

    /// What the worker says when it is ready.
    pub(super) fn ready(&self) -> Option<Entered> {
        let mut bytes = [0; Entered::SIZE];
        let mut buffer = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        let mut none = rustix::net::RecvAncillaryBuffer::default();
        let received = rustix::net::recvmsg(&*self.stream, &mut buffer, &mut none, flags);
        let is_whole = received.is_ok_and(|message| message.bytes == Entered::SIZE);
        is_whole.then(|| Entered::from_bytes(bytes))
    }

    /// The process id of the worker.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The connection.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// To wait for the end of the worker.
    pub(super) fn end(&self) -> PollFd<'_> {
        PollFd::new(&self.process, PollFlags::IN)
    }

    /// Whether the descriptors are those of the beginning, which the worker may have closed or replaced.
    pub(super) fn is_intact(&self) -> bool {
        self.process.is_intact() && self.stream.is_intact()
    }

    /// The next reply, if it is there.
    pub(super) fn receive(&mut self) -> Option<Message> {
        if !self.stream.is_intact() {
            return None;
        }
        match self.reader.read(&self.stream) {
            Received::Message(message) => Some(message),
            Received::Part | Received::Malformed(_) | Received::End(_) => None,
        }
    }

    /// Ends the connection, so that the worker finishes what it serves, and ends. To close the stream is not enough: the
    /// worker has the same table of descriptors.
    pub(super) fn shut_down(&self, how: Shutdown) {
        // It fails only if the worker has done so.
        let _ = self.stream.shutdown(how);
    }

    /// Asks the worker to finish what it serves, leave everything as it stands, and end.
    pub(super) fn drain(&self) {
        self.process.drain();
    }

    /// Ends the worker at once: one that serves nobody, or cannot be talked to.
    pub(super) fn kill(&self) {
        self.process.kill();
    }

    /// Whether the worker has ended.
    pub(super) fn has_ended(&self) -> Result<bool, RunError> {
        self.process.has_ended().map_err(|errno| RunError::Worker(errno.into()))
    }

    /// How the worker ended. Blocks until it has, and leaves it to [`Link::into_zombie`].
    pub(super) fn ending(&self) -> Result<WorkerEnd, RunError> {
        self.process.end().map_err(|errno| RunError::Worker(errno.into()))
    }

    /// What is left of a worker that has ended.
    pub(super) fn into_zombie(self) -> Zombie {
        self.process.into_zombie()
    }

    /// How the worker ended. Blocks until it has.
    pub(super) fn reap(&self) -> Result<WorkerEnd, RunError> {
        self.process.reap().map_err(|errno| RunError::Worker(errno.into()))
    }
}
