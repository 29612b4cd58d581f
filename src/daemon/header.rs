//! The header of a vhost-user message, for those who look at messages before the vhost crate does.

use std::io::IoSliceMut;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;

/// Its bytes: request, flags, and the size of the body, each a 32-bit number of the host's byte order.
pub(super) const HEADER: usize = 12;
/// The version of the protocol, in the flags.
pub(super) const VERSION: u32 = 1;

/// A header, as it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    request: u32,
    /// Version, and the bits of `VhostUserHeaderFlag`.
    pub flags: u32,
    size: u32,
}

impl Header {
    /// That of the next message, which stays where it is; `None` if not all of it is there.
    pub(super) fn peek(stream: &UnixStream, flags: RecvFlags) -> Option<Header> {
        let mut bytes = [0; HEADER];
        // Without a control buffer no descriptors are received.
        let mut none = RecvAncillaryBuffer::default();
        let peeked = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut none, RecvFlags::PEEK | flags);
        peeked.is_ok_and(|message| message.bytes == HEADER).then(|| Header::of(bytes))
    }

    fn of([a, b, c, d, e, f, g, h, i, j, k, l]: [u8; HEADER]) -> Header {
        let [request, flags, size] = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
        Header { request, flags, size }
    }

    /// The request, if it is one of the protocol.
    pub(super) fn request(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.request).ok()
    }

    /// Bytes of the body.
    pub(super) fn size(self) -> usize {
        usize::try_from(self.size).unwrap_or(usize::MAX)
    }
}

/// A message.
pub(super) fn message(request: FrontendReq, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let header = [u32::from(request), VERSION | flags, size].map(u32::to_ne_bytes).concat();
    [&header, body].concat()
}
