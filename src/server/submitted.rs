//! A request whose system call an engine makes, from its submission to its reply.

use rustix::io::Errno;

use super::Scratch;
use super::reply::{HeaderRoom, fill_header};
use crate::fs::Result;
use crate::fs::transfer::{Call, Progress, Transfer};
use crate::sys::guest_buffers::Reserved;
use crate::sys::uring::Data;
use fuse_protocol::ids::Unique;
use fuse_protocol::reply::{ReplyBody, Written};

/// Bytes of the reply to WRITE, behind its header.
pub(super) const WRITTEN: usize = 8;

/// A READ or WRITE that has begun, with its data.
pub(super) struct Begun<'a> {
    /// What is done with the data.
    pub transfer: Box<dyn Transfer>,
    /// The data, or the room for it.
    pub data: Data<'a>,
    /// Room for what a WRITE replies.
    pub written: Option<Reserved<'a, WRITTEN>>,
}

/// A request that is submitted, or about to be. It holds its share of the session, and what it has locked.
pub struct Submitted<'a> {
    begun: Begun<'a>,
    header: HeaderRoom<'a>,
    unique: Unique,
    /// What the reply is to say.
    result: Result<usize>,
}

impl<'a> Submitted<'a> {
    pub(super) fn new(begun: Begun<'a>, header: HeaderRoom<'a>, unique: Unique) -> Submitted<'a> {
        Submitted { begun, header, unique, result: Err(Errno::IO) }
    }

    /// What is to be submitted, with which data.
    pub fn call(&self) -> (Call<'_>, &Data<'a>) {
        (self.begun.transfer.call(), &self.begun.data)
    }

    /// What the thread needs that submits; see [`Transfer::preparation`].
    pub fn preparation(&self) -> u8 {
        self.begun.transfer.preparation()
    }

    /// Prepares the calling thread.
    pub fn prepare(&self) -> Result<()> {
        self.begun.transfer.prepare()
    }

    /// What was submitted has ended so. Returns whether all is done; otherwise it is to be submitted again.
    pub fn advance(&mut self, result: Result<usize>) -> bool {
        let Begun { transfer, data, .. } = &mut self.begun;
        if let Ok(count) = result {
            data.advance(count);
        }
        match transfer.advance(result, data.len()) {
            Progress::Again => false,
            Progress::Here => {
                self.finish_here();
                true
            }
            Progress::Over(result) => {
                self.result = result;
                true
            }
        }
    }

    /// It cannot be submitted: the guest gets this error.
    pub fn fail(&mut self, errno: Errno) {
        self.result = Err(errno);
    }

    /// Does all that is left on the calling thread.
    pub fn finish_here(&mut self) {
        loop {
            let Begun { transfer, data, .. } = &mut self.begun;
            let result = transfer.prepare().and_then(|()| {
                let Call { file, offset, flags } = transfer.call();
                data.transfer(file, offset, flags)
            });
            let over = match transfer.advance(result, data.len()) {
                Progress::Again | Progress::Here => continue,
                Progress::Over(result) => result,
            };
            self.result = over;
            return;
        }
    }

    /// Writes the reply; its length. What was locked is unlocked before the guest sees it.
    pub fn reply(self: Box<Self>, scratch: &mut Scratch) -> u32 {
        let Submitted { begun, header, unique, result } = *self;
        let Begun { transfer, written, .. } = begun;
        drop(transfer);
        let result = match (result, written) {
            (Ok(count), Some(room)) => {
                Written(u32::try_from(count).unwrap_or(u32::MAX)).with_bytes(|pieces| {
                    let mut bytes = [0; WRITTEN];
                    let all = pieces.iter().flat_map(|piece| piece.iter());
                    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = *from);
                    room.fill(&bytes);
                    Ok(WRITTEN)
                })
            }
            (result, _) => result,
        };
        fill_header(header, unique, scratch.note(result))
    }
}
