//! One FUSE request to one reply.
//!
//! [`Server`] decodes the request, admits it to the session (`session.rs`), hands it to the file system
//! (`dispatch.rs`) and encodes the reply (`reply.rs`). A panic of the file system is an EIO. Of a request that is
//! served again after a crash, `replay.rs` says which errors are none.

mod dispatch;
mod loaded;
mod replay;
mod reply;
mod session;
mod session_lock;
mod submitted;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use log::{debug, trace};
use rustix::io::Errno;
use zerocopy::{FromZeros, IntoBytes};

use self::reply::{BodyWriter, fill_header};
use self::session::Session;
use self::session_lock::Slot;
pub use self::submitted::Submitted;
use crate::fs::transfer::Load;
use crate::fs::{DeviceDescriptors, FileSystem, PUT_BACK, Result, errno};
use crate::logging::warn_limited;
use crate::metrics::Gauges;
use crate::migration::{MigrationError, Snapshot};
use crate::state_file::Effects;
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
    /// Of the last reply.
    errno: u16,
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
    /// The same, or by an engine: it reads or writes data.
    Transfer,
    /// On a thread of its own: it may wait for another request of the same guest.
    Blocking,
}

/// What becomes of a request.
pub enum Served<'a> {
    /// So many bytes of its output are valid.
    Completed(u32),
    /// It did wait, and was put back: nothing has been written, and it is to be served once more.
    PutBack,
    /// An engine is to go on with it. Until then it holds its share of the session, by its [`Scratch`].
    Submitted(Box<Submitted<'a>>),
}

impl Scratch {
    /// A request that was submitted has ended, and is in the session no more.
    pub fn leave_session(&mut self) {
        if let Some(slot) = &mut self.slot {
            slot.release();
        }
    }

    /// The errno of the last reply; 0 for none. Errors that have no reply are none.
    pub fn take_errno(&mut self) -> u16 {
        std::mem::take(&mut self.errno)
    }

    /// Notes the errno of a reply.
    fn note<T>(&mut self, result: Result<T>) -> Result<T> {
        let errno = result.as_ref().err().map_or(0, |errno| errno.raw_os_error());
        self.errno = u16::try_from(errno).unwrap_or(0);
        result
    }
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
    // With the second caller that rate limits are, it would not be inlined.
    #[inline(always)]
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
        match header.opcode() {
            Some(Opcode::Setlkw) => Class::Blocking,
            Some(Opcode::Read | Opcode::Write) => Class::Transfer,
            _ => Class::Inline,
        }
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

    /// The guest may be saved soon.
    pub fn prepare_save(&self) {
        self.fs.prepare_save();
    }

    /// The guest will not be saved after all, or was.
    pub fn cancel_save(&self) {
        self.fs.cancel_save();
    }

    /// All that the guest knows. No request is served meanwhile; those that came wait.
    pub fn save(&self) -> std::result::Result<Snapshot, MigrationError> {
        self.session.exclusive(&*self.fs, || self.fs.save())
    }

    /// Requests will be served, perhaps after the share was saved.
    pub fn resume(&self) {
        self.fs.resume();
    }

    /// Takes over what another daemon has saved, and with it the session. After an error it is as before.
    pub fn load(&self, snapshot: Snapshot) -> std::result::Result<(), MigrationError> {
        self.session.exclusive(&*self.fs, || self.session.load(&*self.fs, snapshot))
    }

    /// Whether a guest has a session.
    pub fn has_session(&self) -> bool {
        self.session.agreement().is_active()
    }

    /// What the guest has, for the counters.
    pub fn gauges(&self) -> Gauges {
        self.fs.gauges()
    }

    /// Whether an engine may have something to do.
    pub fn may_begin(&self) -> bool {
        self.fs.may_begin()
    }

    /// Serves the request with `header`, which stands before `input`, and returns how many bytes of
    /// `output` are valid. Nothing is noted of what it does.
    pub fn serve(
        &self,
        header: &RawHeader,
        input: GuestReader<'_>,
        output: GuestWriter<'_>,
        scratch: &mut Scratch,
    ) -> u32 {
        self.serve_and_wait(header, input, output, scratch, &Effects::NONE).unwrap_or(0)
    }

    /// The same for a request that may wait for others, and whose `effects` are noted; `None` if it did wait, and
    /// was put back: then nothing has been written, and it is to be served once more.
    pub fn serve_and_wait(
        &self,
        header: &RawHeader,
        input: GuestReader<'_>,
        output: GuestWriter<'_>,
        scratch: &mut Scratch,
        effects: &Effects<'_>,
    ) -> Option<u32> {
        match self.serve_or_submit(header, input, output, scratch, effects, None) {
            Served::Completed(written) => Some(written),
            Served::PutBack => None,
            // Nothing is submitted without a load; it would be done here.
            Served::Submitted(mut submitted) => {
                submitted.finish_here();
                scratch.leave_session();
                Some(submitted.reply(scratch))
            }
        }
    }

    /// The same for a request that an engine may go on with, whose `load` is this.
    pub fn serve_or_submit<'a>(
        &self,
        header: &RawHeader,
        input: GuestReader<'a>,
        mut output: GuestWriter<'a>,
        scratch: &mut Scratch,
        effects: &Effects<'_>,
        load: Option<Load>,
    ) -> Served<'a> {
        let no_reply = header.opcode().is_some_and(Opcode::has_no_reply);
        let room = output.reserve::<OUT_HEADER_SIZE>();
        // A guest that interrupts a request may leave no room for the answer, which is of no use to it.
        if room.is_none() && !no_reply && header.opcode() != Some(Opcode::Interrupt) {
            warn_limited!("request {} has no room for a reply; dropped", header.unique().0);
            return Served::Completed(0);
        }
        let mut body = BodyWriter { room: output, written: 0, load, begun: None };
        let result =
            catch_unwind(AssertUnwindSafe(|| self.admit(header, input, &mut body, scratch, effects)));
        let mut result = result.unwrap_or_else(|_| {
            let wire = header.wire();
            warn_limited!("request {} of kind {} failed inside the daemon", wire.unique, wire.opcode);
            Err(Errno::IO)
        });
        if result == Err(PUT_BACK) {
            return Served::PutBack;
        }
        if effects.is_replay() {
            result = replay::settle(header.opcode(), result);
        }
        if no_reply {
            return Served::Completed(0);
        }
        let Some(room) = room else { return Served::Completed(0) };
        match body.begun.filter(|_| result.is_ok()) {
            Some(begun) => Served::Submitted(Box::new(Submitted::new(begun, room, header.unique()))),
            None => {
                let result = scratch.note(result);
                Served::Completed(fill_header(room, header.unique(), result.map(|()| body.written)))
            }
        }
    }

    /// Lets a request in among others, or alone if it begins or ends a session.
    fn admit<'a>(
        &self,
        header: &RawHeader,
        input: GuestReader<'a>,
        body: &mut BodyWriter<'a>,
        scratch: &mut Scratch,
        effects: &Effects<'_>,
    ) -> Result<()> {
        let Scratch { slot, buffers, .. } = scratch;
        if let Some(Opcode::Init | Opcode::Destroy) = header.opcode() {
            return self.session.exclusive(&*self.fs, || self.answer(header, input, body, buffers, effects));
        }
        let inside = self.session.enter(slot);
        let result = self.answer(header, input, body, buffers, effects);
        if body.begun.is_some() {
            inside.keep();
        }
        result
    }

    /// Refuses the request with `header`, which is not served. Returns the length of the reply, if it has one.
    pub fn refuse(
        header: &RawHeader,
        mut output: GuestWriter<'_>,
        errno: Errno,
        scratch: &mut Scratch,
    ) -> u32 {
        if header.opcode().is_some_and(Opcode::has_no_reply) {
            return 0;
        }
        let result = scratch.note(Err(errno));
        output.reserve().map_or(0, |room| fill_header(room, header.unique(), result))
    }

    fn answer<'a>(
        &self,
        header: &RawHeader,
        mut input: GuestReader<'a>,
        body: &mut BodyWriter<'a>,
        buffers: &mut Buffers,
        effects: &Effects<'_>,
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
        self.dispatch(&request, input, body, &mut buffers.listing, effects)
    }
}

fn malformed(error: DecodeError) -> Errno {
    debug!("a malformed request: {error}");
    errno(error.errno())
}
