//! What a request costs of the rate limits: read from the next chain before it is popped.
//!
//! The guest may change the request between that and the pop, to pass for less than it is. So the charge goes along with
//! the chain, and the request that is decoded has to be the same. Its arguments are read once more later: of what they say
//! then, no more bytes find room in the chain than were charged ([`Charge::room`]).

use std::mem::offset_of;

use fuse_protocol::abi::{ReadIn, WriteIn};
use fuse_protocol::decode::{IN_HEADER_SIZE, RawHeader};
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::OUT_HEADER_SIZE;

use crate::limits::Class;
use crate::server::Server;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// Where READ and WRITE have the number of bytes.
const SIZE: usize = IN_HEADER_SIZE + offset_of!(ReadIn, size);
const _: () = assert!(offset_of!(ReadIn, size) == offset_of!(WriteIn, size));
/// Where the data of a WRITE begin.
const DATA: usize = IN_HEADER_SIZE + size_of::<WriteIn>();

/// What a chain was charged as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Charge {
    /// No request: nothing.
    Nothing,
    /// A request.
    Request {
        /// Its kind, which need not exist.
        opcode: u32,
        /// Bytes of data of a READ or WRITE.
        bytes: u32,
    },
}

impl Charge {
    /// The charge of a chain with these parts.
    pub fn of_chain(input: &GuestReader<'_>, output: &GuestWriter<'_>) -> Charge {
        Server::read_header(input).map_or(Charge::Nothing, |header| Charge::of(&header, input, output))
    }

    /// The charge of the request with this header, which is still a part of `input`.
    pub fn of(header: &RawHeader, input: &GuestReader<'_>, output: &GuestWriter<'_>) -> Charge {
        let mut size = [0; 4];
        input.peek_at(SIZE, &mut size);
        let size = usize::try_from(u32::from_ne_bytes(size)).unwrap_or(usize::MAX);
        let bytes = match header.opcode() {
            Some(Opcode::Read) => size.min(output.len().saturating_sub(OUT_HEADER_SIZE)),
            // What follows the arguments counts as the header says it: more is not served.
            Some(Opcode::Write) => {
                let declared = usize::try_from(header.wire().len).unwrap_or(usize::MAX);
                size.max(declared.saturating_sub(DATA)).min(input.len().saturating_sub(DATA))
            }
            _ => 0,
        };
        Charge::Request { opcode: header.wire().opcode, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) }
    }

    /// What the request is to the limits.
    pub fn class(self) -> Class {
        use Opcode::{BatchForget, Destroy, Forget, Init, Interrupt, Read, Release, Releasedir, Write};
        let Charge::Request { opcode, .. } = self else { return Class::Free };
        match Opcode::from_number(opcode) {
            Some(Read) => Class::Read,
            Some(Write) => Class::Write,
            // To wait with these would only keep memory and files of the host for longer.
            Some(Forget | BatchForget | Interrupt | Release | Releasedir | Init | Destroy) => Class::Free,
            _ => Class::Meta,
        }
    }

    /// Bytes of data.
    pub fn bytes(self) -> u32 {
        match self {
            Charge::Nothing => 0,
            Charge::Request { bytes, .. } => bytes,
        }
    }

    /// Bytes of the readable and of the writable part of the chain that the request needs at most.
    pub fn room(self) -> (usize, usize) {
        let bytes = usize::try_from(self.bytes()).unwrap_or(usize::MAX);
        match self.class() {
            Class::Read => (usize::MAX, bytes.saturating_add(OUT_HEADER_SIZE)),
            Class::Write => (bytes.saturating_add(DATA), usize::MAX),
            Class::Meta | Class::Free => (usize::MAX, usize::MAX),
        }
    }
}
