//! Room for the descriptors that come with a message.
//!
//! Where a process may open no more, the host's kernel leaves out what came with a message. Then the message
//! seems to make no sense, or is lost, and the front end waits for an answer. So there is a look before.

use std::io::{self, IoSliceMut};
use std::os::unix::net::UnixStream;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;

/// Descriptors that come with one message at most.
const MOST: usize = 32;
/// Bytes of SET_MEM_TABLE without regions, and of a region.
const TABLE: usize = 8;
const REGION: usize = 32;

/// Waits for the next message, and returns whether its descriptors can be had.
pub(super) fn is_there_for_next(stream: &UnixStream) -> bool {
    let mut header = [0; 12];
    // Without a control buffer no descriptors are received.
    let mut none = RecvAncillaryBuffer::default();
    let peeked = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut none, RecvFlags::PEEK);
    // Whatever else there is to say, who reads the message will say it.
    !peeked.is_ok_and(|message| message.bytes == header.len()) || is_there_for(descriptors(&header))
}

/// Whether there is none for the descriptors that some messages have.
pub(super) fn is_short() -> bool {
    !is_there_for(MOST)
}

fn is_there_for(count: usize) -> bool {
    let copies = (0..count.min(MOST)).map(|_| fcntl_dupfd_cloexec(io::stderr(), 0));
    copies.collect::<Result<Vec<_>, _>>().is_ok()
}

/// How many descriptors come with the message that begins like this.
fn descriptors(header: &[u8; 12]) -> usize {
    let [a, b, c, d, _, _, _, _, size @ ..] = *header;
    let size = usize::try_from(u32::from_ne_bytes(size)).unwrap_or(usize::MAX);
    match FrontendReq::try_from(u32::from_ne_bytes([a, b, c, d])) {
        Ok(FrontendReq::SET_MEM_TABLE) => size.saturating_sub(TABLE) / REGION,
        Ok(
            FrontendReq::ADD_MEM_REG
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR,
        ) => 1,
        _ => 0,
    }
}
