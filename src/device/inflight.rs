//! A request in flight: one descriptor chain from its pop to its used entry.
//!
//! A request owns all that it needs on the way: the head of the chain, the header, the segments and the
//! guest memory in which they lie, the buffers of the server. So it can move to another thread, and no
//! part of it is read from the guest twice. Each phase is a type, and each step consumes the one before:
//!
//! ```text
//! Scratch ── pop ──> Popped ── decode ──> InFlight ── complete ──> Completion ── pop_next ──> Popped
//!  no chain           head        ^        header         │         length        │
//!    ^                            └─────── put back ──────┘                    add_used
//!    └────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A READ or WRITE may be submitted to an engine between the last two: it is [`Submitted`] then.
//!
//! Every chain gets exactly one used entry. [`InFlight::complete`] fixes its length, and the next step adds
//! it. A request that is dropped on the way, also by a panic, adds the entry at once: an empty one if it was
//! not completed. Only [`Popped::into_head`] takes a chain out of its request without an entry.
//!
//! All phases share one allocation, which moves from request to request of a worker: a request allocates
//! nothing. A worker whose request has moved away makes a new one.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use fuse_protocol::abi::{self, InHeader};
use fuse_protocol::decode::RawHeader;
use fuse_protocol::ids::Unique;
use fuse_protocol::opcode::Opcode;
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::GuestAddressSpace;
use zerocopy::FromZeros;

use super::chain::{ChainBuffers, ChainError};
use super::charge::Charge;
use super::queue::{Backlog, Origin, PoppedChain, Queue, Used};
use super::{SharedMemory, probes};
use crate::fs::transfer::Load;
use crate::metrics::counts::{Served, Shard};
use crate::metrics::{Phase, notes};
use crate::server::{self, Class, Server};
use crate::state_file::{Effects, Resumed};
use crate::sys::clock::monotonic;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// Bytes of a reply before its data.
#[allow(clippy::cast_possible_truncation, reason = "16")]
const REPLY_HEADER: u32 = size_of::<abi::OutHeader>() as u32;
/// Bytes of a WRITE before its data.
#[allow(clippy::cast_possible_truncation, reason = "80")]
const WRITE_HEADER: u32 = (size_of::<InHeader>() + size_of::<abi::WriteIn>()) as u32;

/// Why a chain is not a request.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    /// The chain cannot be walked.
    #[error("a malformed chain: {0}")]
    Chain(#[from] ChainError),
    /// The readable part is shorter than a header.
    #[error("a request without a header")]
    NoHeader,
    /// The journal has another one for the chain.
    #[error("request {unique} has become another one since a worker died with it")]
    Changed {
        /// The guest's number for the one in the journal.
        unique: u64,
    },
    /// The rate limits were charged with another one.
    #[error("request {unique} has become another one since it was charged to the rate limits")]
    Recharged {
        /// The guest's number for the one that is there now.
        unique: u64,
    },
}

/// Memory for the next request of a worker.
pub(super) struct Scratch(Box<Request>);

/// A chain that was popped. Nothing of it is decoded.
pub(super) struct Popped(Box<Request>);

/// A request that is decoded and not completed.
pub(super) struct InFlight(Box<Request>);

/// A request whose system call an engine makes. Its memory is the kernel's until that has ended.
pub(super) struct Submitted(Box<Request>);

/// A request whose reply is written; the used entry is not added yet.
pub(super) struct Completion(Box<Request>);

/// The one representation of all phases. The types above say which fields are meaningful.
struct Request {
    queue: Arc<Queue>,
    /// What an engine does. Refers to `segments` and `memory`, and is dropped before them.
    submitted: Option<Box<server::Submitted<'static>>>,
    /// There is a chain, and its used entry is not added.
    owes_entry: bool,
    /// The chain, and the bytes of the reply: 0 before [`InFlight::complete`].
    used: Used,
    /// Holds the memory of the segments.
    memory: Option<<SharedMemory as GuestAddressSpace>::T>,
    segments: ChainBuffers,
    header: RawHeader,
    class: Class,
    /// The chain was popped before the queue started.
    resumed: Option<Box<Resumed>>,
    /// What the rate limits were charged with, until the request is decoded.
    charge: Option<Charge>,
    /// As long as it is there, the request is not completed.
    guard: Option<Sender<()>>,
    /// The worker was free for this request: it completed the one before, or woke up. Of the clock of the counters.
    start: u64,
    /// The request was popped; a worker that polls is free for longer.
    popped: u64,
    server: server::Scratch,
    /// What is counted of the request, and where.
    served: Served,
    shard: Shard,
}

impl Scratch {
    /// Memory for requests of `queue`.
    pub fn new(queue: &Arc<Queue>) -> Scratch {
        Scratch(Box::new(Request {
            queue: Arc::clone(queue),
            submitted: None,
            owes_entry: false,
            used: Used::default(),
            memory: None,
            segments: ChainBuffers::default(),
            header: RawHeader::from(InHeader::new_zeroed()),
            class: Class::Inline,
            resumed: None,
            charge: None,
            guard: None,
            start: 0,
            popped: 0,
            server: server::Scratch::default(),
            served: Served::default(),
            shard: queue.metrics().shard(),
        }))
    }

    /// Pops a chain, if there is one. Otherwise the guest kicks for the next one.
    #[inline(always)]
    pub fn pop(mut self) -> Result<(Popped, Backlog), Scratch> {
        self.0.start = monotonic();
        let found = self.0.queue.complete_and_pop(None);
        self.0.begin(found)
    }
}

impl Popped {
    /// A chain that was popped from the ring of `queue` before the queue started. `guard` is dropped when it is
    /// completed.
    pub fn resumed(queue: &Arc<Queue>, chain: Resumed, guard: Sender<()>) -> Popped {
        let Scratch(mut request) = Scratch::new(queue);
        request.used.head = chain.head;
        request.owes_entry = true;
        request.resumed = Some(Box::new(chain));
        request.popped = monotonic();
        request.guard = Some(guard);
        Popped(request)
    }

    /// Its first descriptor.
    pub fn head(&self) -> u16 {
        self.0.used.head
    }

    /// The process has died.
    #[cfg(test)]
    pub fn abandon(mut self) {
        self.0.owes_entry = false;
    }

    /// Gives up the chain without a used entry. The caller sees to it that the chain is served later.
    pub fn into_head(mut self) -> u16 {
        self.0.owes_entry = false;
        self.0.used.head
    }

    /// Walks the chain and reads the header. A chain that is not a request is completed without a reply.
    pub fn decode(mut self) -> Result<InFlight, (RequestError, Completion)> {
        match self.0.decode() {
            Ok(()) => Ok(InFlight(self.0)),
            // Nothing is served of a chain that is not the one in the journal, or not the one that was charged.
            Err(error @ (RequestError::Changed { .. } | RequestError::Recharged { .. })) => {
                Err((error, InFlight(self.0).refuse(Errno::IO)))
            }
            Err(error) => {
                self.0.charge = None;
                Err((error, self.give_back_empty()))
            }
        }
    }

    /// Completes the chain without a reply.
    pub fn give_back_empty(self) -> Completion {
        Completion::new(self.0, 0)
    }
}

impl InFlight {
    /// Its first descriptor.
    pub fn head(&self) -> u16 {
        self.0.used.head
    }

    /// How it is served.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// The guest's number for it.
    pub fn unique(&self) -> Unique {
        self.0.header.unique()
    }

    /// Prepares the request for a thread of its own, where it may stay for long.
    pub fn detach(&mut self) {
        // A clone does not occupy one of the few guards that a thread has for short accesses.
        self.0.memory = self.0.memory.clone();
    }

    /// Serves the request on the calling thread.
    pub fn serve(mut self, server: &Server) -> Completion {
        let (header, input, output, scratch, effects) = self.parts();
        let written = server.serve_and_wait(header, input, output, scratch, &effects);
        self.complete(written.unwrap_or(0))
    }

    /// Serves the request, or begins it for an engine with this `load`.
    pub fn serve_or_submit(mut self, server: &Server, load: Load) -> Result<Completion, Submitted> {
        let request = &mut *self.0;
        let is_replay = request.resumed.as_deref().is_some_and(Resumed::is_started);
        let effects = request.queue.journal().effects(request.used.head, is_replay);
        // SAFETY: `decode` took the segments from the memory that the request holds. What is submitted is in
        // the request, too, and taken out of it before either is touched (`Submitted::complete`, and the order of fields).
        let (mut input, output) = unsafe { request.segments.ends_for_long() };
        input.skip(size_of::<InHeader>());
        let served =
            server.serve_or_submit(&request.header, input, output, &mut request.server, &effects, Some(load));
        match served {
            server::Served::Completed(written) => Ok(self.complete(written)),
            // It waits for nothing that could be put back.
            server::Served::PutBack => Ok(self.complete(0)),
            server::Served::Submitted(submitted) => {
                request.submitted = Some(submitted);
                // The clone is nobody's guard; see `detach`.
                request.memory = request.memory.clone();
                request.served.notes = notes::take();
                request.queue.metrics().set_phase(request.used.head, Phase::Submitted);
                Err(Submitted(self.0))
            }
        }
    }

    /// Serves the request, which may wait for others. It comes back if [`Server::put_back`] ended its wait.
    pub fn serve_blocking(mut self, server: &Server) -> Result<Completion, Popped> {
        let (header, input, output, scratch, effects) = self.parts();
        match server.serve_and_wait(header, input, output, scratch, &effects) {
            Some(written) => Ok(self.complete(written)),
            None => Err(self.put_back()),
        }
    }

    /// The process has died.
    #[cfg(test)]
    pub fn abandon(mut self) {
        self.0.owes_entry = false;
    }

    /// The chain of a request that has only waited: whoever serves it next serves it for the first time.
    pub fn put_back(self) -> Popped {
        self.0.queue.journal().put_back(self.0.used.head);
        self.into_popped()
    }

    /// The chain, as it was before it was decoded.
    pub fn into_popped(mut self) -> Popped {
        self.0.memory = None;
        Popped(self.0)
    }

    /// Refuses the request with `errno`.
    pub fn refuse(mut self, errno: Errno) -> Completion {
        let (header, _, output, scratch, _) = self.parts();
        let written = Server::refuse(header, output, errno, scratch);
        self.complete(written)
    }

    /// Completes the request: `written` bytes of the chain's writable part are valid.
    #[inline(always)]
    fn complete(self, written: u32) -> Completion {
        Completion::new(self.0, written)
    }

    /// The header, the readable part of the chain behind it, the writable part, the server's buffers, and the
    /// notes in the journal.
    // Out of line it would cost more than it does: all of it goes through memory.
    #[inline(always)]
    fn parts(&mut self) -> (&RawHeader, GuestReader<'_>, GuestWriter<'_>, &mut server::Scratch, Effects<'_>) {
        let Request { queue, used, resumed, header, segments, server, .. } = &mut *self.0;
        let is_replay = resumed.as_deref().is_some_and(Resumed::is_started);
        let effects = queue.journal().effects(used.head, is_replay);
        // SAFETY: `decode` took the segments from the memory that the request holds. It holds it until it is
        // completed or put back, which takes `self`, and so ends the borrow first.
        let (mut input, output) = unsafe { segments.ends() };
        input.skip(size_of::<InHeader>());
        (header, input, output, server, effects)
    }
}

impl Submitted {
    /// What the engine does.
    pub fn parts(&mut self) -> Option<&mut server::Submitted<'static>> {
        self.0.submitted.as_deref_mut()
    }

    /// Does all that is left on the calling thread, of a request that was not submitted.
    pub fn finish_here(mut self) -> Completion {
        if let Some(submitted) = &mut self.0.submitted {
            submitted.finish_here();
        }
        self.complete()
    }

    /// Completes the request, of which nothing is in flight any more.
    pub fn complete(mut self) -> Completion {
        let submitted = self.0.submitted.take();
        let Request { server, .. } = &mut *self.0;
        let written = submitted.map_or(0, |submitted| submitted.reply(server));
        server.leave_session();
        Completion::new(self.0, written)
    }
}

impl Completion {
    #[inline(always)]
    fn new(mut request: Box<Request>, written: u32) -> Completion {
        request.used.written = written;
        request.note();
        request.queue.journal().done(request.used.head, written);
        request.memory = None;
        Completion(request)
    }

    /// Adds the used entry, and pops the next chain in the same step. The notification of the guest may
    /// be coalesced with later ones.
    pub fn pop_next(mut self) -> Result<(Popped, Backlog), Scratch> {
        let end = monotonic();
        let service_time = Duration::from_nanos(end.saturating_sub(self.0.start));
        self.0.count(end);
        self.0.start = end;
        self.0.owes_entry = false;
        let found = self.0.queue.complete_and_pop(Some((self.0.used, service_time)));
        self.0.begin(found)
    }

    /// The used entry, which the caller adds, and the memory for the next request.
    pub fn into_used(mut self) -> (Used, Scratch) {
        self.0.owes_entry = false;
        self.0.count(monotonic());
        (self.0.used, Scratch(self.0))
    }

    /// The process has died.
    #[cfg(test)]
    pub fn abandon(mut self) {
        self.0.owes_entry = false;
    }

    /// Adds the used entry.
    pub fn add_used(mut self) -> Scratch {
        self.0.owes_entry = false;
        self.0.count(monotonic());
        self.0.queue.complete(self.0.used);
        Scratch(self.0)
    }
}

impl Request {
    /// The next phase, if a chain was `found`.
    #[inline(always)]
    fn begin(mut self: Box<Self>, found: Option<PoppedChain>) -> Result<(Popped, Backlog), Scratch> {
        let Some(PoppedChain { head, backlog, origin }) = found else {
            return Err(Scratch(self));
        };
        self.used = Used { head, written: 0 };
        self.served = Served::default();
        self.popped = self.start;
        if origin != Origin::Ring || self.resumed.is_some() {
            self.set_origin(origin);
        }
        self.owes_entry = true;
        Ok((Popped(self), backlog))
    }

    /// Counts a request whose used entry is about to be added.
    #[inline(always)]
    fn count(&mut self, end: u64) {
        self.served.popped = self.popped;
        self.served.nanos = end.saturating_sub(self.popped);
        self.shard.completed(&self.served);
    }

    /// Notes what is counted of a request that has its reply.
    #[inline(always)]
    fn note(&mut self) {
        let served = &mut self.served;
        served.notes.add(notes::take());
        served.errno = self.server.take_errno();
        if served.errno == 0 {
            served.bytes = match Opcode::from_number(served.opcode) {
                Some(Opcode::Read) => self.used.written.saturating_sub(REPLY_HEADER),
                Some(Opcode::Write) => self.header.wire().len.saturating_sub(WRITE_HEADER),
                _ => 0,
            };
        }
        probes::end(&self.served, self.queue.index());
    }

    #[cold]
    #[inline(never)]
    fn set_origin(&mut self, origin: Origin) {
        let head = self.used.head;
        if origin == Origin::Polled {
            self.popped = monotonic();
        }
        self.resumed = if origin == Origin::Resumed { self.queue.take_resumed(head) } else { None };
        self.charge = if origin == Origin::Charged { self.queue.take_charge(head) } else { None };
    }

    fn decode(&mut self) -> Result<(), RequestError> {
        // As it is after the pop: the chain may lie in memory that was added just before.
        let memory = self.memory.insert(self.queue.memory().memory());
        self.segments.collect(memory, self.queue.layout(), self.used.head)?;
        // SAFETY: the segments were just taken from the memory that the request holds.
        let (input, _) = unsafe { self.segments.ends() };
        self.header = Server::read_header(&input).ok_or(RequestError::NoHeader)?;
        self.class = Server::class(&self.header);
        if self.charge.is_some() {
            self.hold_to_charge()?;
        }
        let wire = self.header.wire();
        (self.served.opcode, self.served.unique) = (wire.opcode, wire.unique);
        self.queue.metrics().begin(self.used.head, self.popped);
        probes::start(&self.served, self.queue.index(), wire.len);
        if self.resumed.is_some() && self.is_replayed()? {
            return Ok(());
        }
        self.queue.journal().begin_request(self.used.head, wire.unique, wire.opcode, wire.len);
        Ok(())
    }

    /// Makes sure that the request is the one that was charged. What the guest changes from here on makes it no larger.
    #[cold]
    #[inline(never)]
    fn hold_to_charge(&mut self) -> Result<(), RequestError> {
        let Some(charge) = self.charge.take() else { return Ok(()) };
        // SAFETY: the segments were taken from the memory that the request holds.
        let (input, output) = unsafe { self.segments.ends() };
        if Charge::of(&self.header, &input, &output) != charge {
            return Err(RequestError::Recharged { unique: self.header.wire().unique });
        }
        let (readable, writable) = charge.room();
        self.segments.truncate(readable, writable);
        Ok(())
    }

    /// Whether what the journal has of the request counts, which has to be the one that was decoded.
    #[cold]
    fn is_replayed(&self) -> Result<bool, RequestError> {
        let wire = self.header.wire();
        match self.resumed.as_deref().filter(|chain| chain.is_started()) {
            Some(chain) if (chain.unique, chain.opcode) != (wire.unique, wire.opcode) => {
                Err(RequestError::Changed { unique: chain.unique })
            }
            chain => Ok(chain.is_some()),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.owes_entry {
            self.count(monotonic());
            self.queue.journal().done(self.used.head, self.used.written);
            self.queue.complete(self.used);
        }
    }
}

#[cfg(test)]
mod tests;
