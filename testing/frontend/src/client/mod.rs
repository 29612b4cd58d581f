//! One method per FUSE operation, each waiting for its reply.
//!
//! A [`Client`] is a view of a session: a queue, a caller and a way to cut requests. It is cheap to
//! copy, and any number of them may work at once, also on one queue.

mod attributes;
pub mod data;
mod directories;
mod ioctl;
mod locks;
mod names;
mod xattr;

pub use attributes::Change;
pub use directories::DirEntry;
pub use locks::Lock;

use zerocopy::FromBytes;

use crate::chain::Segmentation;
use crate::error::Result;
use crate::queue::Queue;
use crate::request::{Caller, Reply, Request};
use crate::session::{Pending, Session};

/// The share's root.
pub const ROOT: u64 = fuse_protocol::abi::ROOT_ID;

/// A view of a session that sends typed requests.
#[derive(Clone, Copy, Debug)]
pub struct Client<'s> {
    session: &'s Session,
    queue: usize,
    caller: Caller,
    segmentation: Segmentation,
}

impl<'s> Client<'s> {
    /// A client on the first request queue, as root, that cuts requests as Linux does.
    pub fn new(session: &'s Session) -> Client<'s> {
        Client { session, queue: 1, caller: Caller::default(), segmentation: Segmentation::Linux }
    }

    /// The same on another queue.
    pub fn on(self, queue: usize) -> Client<'s> {
        Client { queue, ..self }
    }

    /// The same as another caller.
    pub fn caller(self, caller: Caller) -> Client<'s> {
        Client { caller, ..self }
    }

    /// The same as another user.
    pub fn user(self, uid: u32, gid: u32) -> Client<'s> {
        self.caller(Caller { uid, gid, ..self.caller })
    }

    /// The same with requests cut in another way.
    pub fn segmentation(self, segmentation: Segmentation) -> Client<'s> {
        Client { segmentation, ..self }
    }

    /// The session.
    pub fn session(&self) -> &'s Session {
        self.session
    }

    /// The queue.
    pub fn queue(&self) -> &'s Queue {
        self.session.queue(self.queue)
    }

    /// Sends a request and does not wait. The request's caller becomes the client's.
    pub fn send(&self, request: Request<'_>) -> Result<Pending> {
        self.session.send(self.queue, &Request { caller: self.caller, ..request }, self.segmentation)
    }

    /// Sends a request and returns the struct in its reply.
    pub fn call<T: FromBytes>(&self, request: Request<'_>) -> Result<T> {
        let completion = self.session.wait(self.send(request)?)?;
        Reply::of(&completion)?.success()?.body()
    }

    /// Sends a request and returns all that follows its reply's header.
    pub fn call_bytes(&self, request: &Request<'_>) -> Result<Vec<u8>> {
        self.session.finish(self.send(request.clone())?)
    }

    /// Sends a request whose reply is a header only.
    pub fn call_empty(&self, request: Request<'_>) -> Result<()> {
        self.call_bytes(&request).map(drop)
    }
}
