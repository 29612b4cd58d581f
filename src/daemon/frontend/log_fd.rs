//! SET_LOG_FD, a message that vhost 0.18 knows and takes for an error (docs/upstream.md).
//!
//! Its descriptor is for news of marks in the dirty log. A device need not send any, and front ends look into the log by
//! themselves: the descriptor is closed.

use std::io::{self, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag as Flag,
};

use crate::daemon::header::{self, HEADER, Header};

/// Takes the next message and answers it, if it is SET_LOG_FD. All of its header has to be there, or it is left to others.
pub(super) fn take(stream: &UnixStream) -> io::Result<bool> {
    let next = Header::peek(stream, RecvFlags::DONTWAIT);
    let is_it =
        |header: &Header| header.request() == Some(FrontendReq::SET_LOG_FD) && header.size() <= MAX_MSG_SIZE;
    let Some(header) = next.filter(is_it) else { return Ok(false) };
    let mut message = [0; HEADER + MAX_MSG_SIZE];
    let mut rest = message.get_mut(..HEADER.saturating_add(header.size())).unwrap_or_default();
    while !rest.is_empty() {
        match receive(stream, rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => rest = rest.get_mut(received..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    if header.flags & Flag::NEED_REPLY.bits() != 0 {
        let reply = header::message(FrontendReq::SET_LOG_FD, Flag::REPLY.bits(), &0u64.to_ne_bytes());
        let mut stream = stream;
        stream.write_all(&reply)?;
    }
    Ok(true)
}

/// One recvmsg(2), whose descriptors are closed.
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    Ok(recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes)
}
