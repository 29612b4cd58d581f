//! One FUSE request to one reply.
//!
//! [`Server`] decodes the request, admits it to the session (`session.rs`), hands it to the file system
//! (`dispatch.rs`) and encodes the reply (`reply.rs`). A panic of the file system is an EIO.

mod dispatch;
mod reply;
mod session;
mod session_lock;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use log::{debug, trace};
use rustix::io::Errno;
use zerocopy::{FromZeros, IntoBytes};

use self::reply::{BodyWriter, fill_header};
use self::session::Session;
use self::session_lock::Slot;
use crate::fs::{DeviceDescriptors, FileSystem, PUT_BACK, Result, errno};
use crate::logging::warn_limited;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use crate::sys::memory;
use fuse_protocol::abi;
use fuse_protocol::decode::{DecodeError, IN_HEADER_SIZE, RawHeader};
use fuse_protocol::ids::Unique;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::OUT_HEADER_SIZE;
use fuse_protocol::request::{Operation, Request};

/// What a worker keeps from request to request.
#[derive(Debug, Default)]
pub struct Scratch {
    slot: Option<Slot>,
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct Buffers {
    arguments: Vec<u8>,
    listing: Vec<u8>,
}

/// On which thread a request is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// On the thread of the worker that popped it.
    Inline,
    /// On a thread of its own: it may wait for another request of the same guest.
    Blocking,
}

/// Serves FUSE requests out of a file system.
pub struct Server {
    fs: Arc<dyn FileSystem>,
    session: Session,
}

impl Server {
    /// A server without a session; it begins with INIT.
    pub fn new(fs: Arc<dyn FileSystem>) -> Server {
        let session = Session::new(&*fs);
        Server { fs, session }
    }

    /// The header of the request in `input`, where it stays, or `None` if `input` is shorter than that.
    pub fn read_header(input: &GuestReader<'_>) -> Option<RawHeader> {
        let mut header = abi::InHeader::new_zeroed();
        let bytes = header.as_mut_bytes();
        (input.peek(bytes) == bytes.len()).then(|| RawHeader::from(header))
    }

    /// The device has more descriptors than before, or fewer.
    pub fn keep_back(&self, device: DeviceDescriptors) {
        self.fs.keep_back(device);
    }

    /// On which thread the request is served.
    pub fn class(header: &RawHeader) -> Class {
        if header.opcode() == Some(Opcode::Setlkw) { Class::Blocking } else { Class::Inline }
    }

    /// Ends the wait of request `unique`, if it waits: [`Server::serve_and_wait`] returns `None`.
    pub fn put_back(&self, unique: Unique) {
        self.fs.put_back(unique);
    }

    /// Ends the session without a DESTROY. The guest has to begin a new one with INIT. The caller serves no
    /// request.
    pub fn end_session(&self) {
        self.session.exclusive(&*self.fs, || self.session.destroy(&*self.fs));
    }

    /// Serves the request with `header`, which stands before `input`, and returns how many bytes of
    /// `output` are valid.
    pub fn serve(
        &self,
        header: &RawHeader,
        input: GuestReader<'_>,
        output: GuestWriter<'_>,
        scratch: &mut Scratch,
    ) -> u32 {
        self.serve_and_wait(header, input, output, scratch).unwrap_or(0)
    }

    /// The same for a request that may wait for others; `None` if it did, and was put back: then
    /// nothing has been written, and it is to be served once more.
    pub fn serve_and_wait(
        &self,
        header: &RawHeader,
        input: GuestReader<'_>,
        mut output: GuestWriter<'_>,
        scratch: &mut Scratch,
    ) -> Option<u32> {
        let no_reply = header.opcode().is_some_and(Opcode::has_no_reply);
        let room = output.reserve::<OUT_HEADER_SIZE>();
        // A guest that interrupts a request may leave no room for the answer, which is of no use to it.
        if room.is_none() && !no_reply && header.opcode() != Some(Opcode::Interrupt) {
            warn_limited!("request {} has no room for a reply; dropped", header.unique().0);
            return Some(0);
        }
        let mut body = BodyWriter { room: output, written: 0 };
        let result = catch_unwind(AssertUnwindSafe(|| self.admit(header, input, &mut body, scratch)));
        let result = result.unwrap_or_else(|_| {
            let wire = header.wire();
            warn_limited!("request {} of kind {} failed inside the daemon", wire.unique, wire.opcode);
            Err(Errno::IO)
        });
        if result == Err(PUT_BACK) {
            return None;
        }
        if no_reply {
            return Some(0);
        }
        Some(room.map_or(0, |room| fill_header(room, header.unique(), result.map(|()| body.written))))
    }

    /// Lets a request in among others, or alone if it begins or ends a session.
    fn admit(
        &self,
        header: &RawHeader,
        input: GuestReader<'_>,
        body: &mut BodyWriter<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { slot, buffers } = scratch;
        if let Some(Opcode::Init | Opcode::Destroy) = header.opcode() {
            return self.session.exclusive(&*self.fs, || self.answer(header, input, body, buffers));
        }
        let _inside = self.session.enter(slot);
        self.answer(header, input, body, buffers)
    }

    /// Refuses the request with `header` for want of a thread or a worker.
    pub fn refuse(header: &RawHeader, mut output: GuestWriter<'_>, errno: Errno) -> u32 {
        output.reserve().map_or(0, |room| fill_header(room, header.unique(), Err(errno)))
    }

    fn answer(
        &self,
        header: &RawHeader,
        mut input: GuestReader<'_>,
        body: &mut BodyWriter<'_>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let arguments = header.argument_bytes(input.len() + IN_HEADER_SIZE).map_err(malformed)?;
        let agreement = self.session.agreement();
        if header.opcode().is_some_and(dispatch::is_unsupported) {
            // Whatever its arguments are.
            return Err(if agreement.is_active() { Errno::NOSYS } else { Errno::NOTCONN });
        }
        memory::resize(&mut buffers.arguments, arguments)?;
        input.read(&mut buffers.arguments);
        let request = Request::decode(header, &buffers.arguments, agreement.layout()).map_err(malformed)?;
        trace!("{request:?}");
        if !agreement.is_active() && !matches!(request.operation, Operation::Init(_)) {
            return Err(Errno::NOTCONN);
        }
        self.dispatch(&request, input, body, &mut buffers.listing)
    }
}

fn malformed(error: DecodeError) -> Errno {
    debug!("a malformed request: {error}");
    errno(error.errno())
}
