//! Room for the descriptors that come with a message.
//!
//! Where a process may open no more, the host's kernel leaves out what came with a message. Then the message
//! seems to make no sense, or is lost, and the front end waits for an answer. So there is a look before.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::RecvFlags;
use vhost::vhost_user::message::FrontendReq;

use crate::daemon::header::Header;

/// Descriptors that come with one message at most.
const MOST: usize = 32;
/// Bytes of SET_MEM_TABLE without regions, and of a region.
const TABLE: usize = 8;
const REGION: usize = 32;

/// Waits for the next message, and returns whether its descriptors can be had.
pub(super) fn is_there_for_next(stream: &UnixStream) -> bool {
    is_there_for_copies(stream, RecvFlags::empty(), 1)
}

/// Whether the descriptors of the next message can be had twice: by the process that relays it, and by the one that it
/// is relayed to. True if there is no message yet.
pub(in crate::daemon) fn is_there_for_relay(stream: &UnixStream) -> bool {
    is_there_for_copies(stream, RecvFlags::DONTWAIT, 2)
}

fn is_there_for_copies(stream: &UnixStream, flags: RecvFlags, copies: usize) -> bool {
    // Whatever else there is to say, who reads the message will say it.
    Header::peek(stream, flags).is_none_or(|header| is_there_for(descriptors(header).saturating_mul(copies)))
}

/// Whether there is none for the descriptors that some messages have.
pub(super) fn is_short() -> bool {
    !is_there_for(MOST)
}

fn is_there_for(count: usize) -> bool {
    let copies = (0..count.min(2 * MOST)).map(|_| fcntl_dupfd_cloexec(io::stderr(), 0));
    copies.collect::<Result<Vec<_>, _>>().is_ok()
}

/// How many descriptors come with the message that begins like this.
fn descriptors(header: Header) -> usize {
    match header.request() {
        Some(FrontendReq::SET_MEM_TABLE) => header.size().saturating_sub(TABLE) / REGION,
        Some(
            FrontendReq::ADD_MEM_REG
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_LOG_FD
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_INFLIGHT_FD,
        ) => 1,
        _ => 0,
    }
}
