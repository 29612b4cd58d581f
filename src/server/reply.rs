//! The reply to one request, in guest memory.

use rustix::io::Errno;
use zerocopy::transmute;

use super::submitted::Begun;
use crate::fs::transfer::Load;
use crate::sys::guest_buffers::{GuestWriter, Reserved};
use fuse_protocol::errno;
use fuse_protocol::ids::Unique;
use fuse_protocol::reply::{self, OUT_HEADER_SIZE, ReplyBody};

type Result<T> = std::result::Result<T, Errno>;

/// Room for the header of a reply, which is filled in last.
pub(super) type HeaderRoom<'a> = Reserved<'a, OUT_HEADER_SIZE>;

/// Writes what follows the header of a reply.
pub(super) struct BodyWriter<'a> {
    /// Where the rest of the body goes.
    pub room: GuestWriter<'a>,
    /// Bytes of the body so far.
    pub written: usize,
    /// Whether an engine may make the system call of a READ or WRITE.
    pub load: Option<Load>,
    /// One that an engine is to make. The body is empty then.
    pub begun: Option<Begun<'a>>,
}

impl BodyWriter<'_> {
    /// Serves a request and encodes its reply. EINVAL, before anything is changed, without room for the
    /// shortest reply of this kind.
    #[inline]
    pub(super) fn respond<T: ReplyBody>(&mut self, serve: impl FnOnce() -> Result<T>) -> Result<()> {
        self.check_room::<T>()?;
        serve()?.with_bytes(|pieces| self.put(pieces))
    }

    /// EINVAL without room for the shortest reply of this kind.
    #[inline]
    pub(super) fn check_room<T: ReplyBody>(&self) -> Result<()> {
        if self.room.len() < T::MIN_SIZE { Err(Errno::INVAL) } else { Ok(()) }
    }

    /// Appends all of `pieces`, or none of them without room for all.
    #[inline]
    pub(super) fn put(&mut self, pieces: &[&[u8]]) -> Result<()> {
        if self.room.len() < pieces.iter().map(|piece| piece.len()).sum() {
            return Err(Errno::INVAL);
        }
        pieces.iter().for_each(|piece| self.written += self.room.write(piece));
        Ok(())
    }
}

/// Fills in the header of a reply whose body has as many bytes as `result` says, and returns the length of the
/// whole reply.
pub(super) fn fill_header(room: HeaderRoom<'_>, unique: Unique, result: Result<usize>) -> u32 {
    let result =
        result.map_err(|error| errno::Errno::from_raw(error.raw_os_error()).unwrap_or(errno::Errno::IO));
    let header = reply::header(unique, result);
    room.fill(&transmute!(header));
    header.len
}
