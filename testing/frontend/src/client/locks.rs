//! POSIX and flock locks.

use fuse_protocol::abi::{FileLock, LkIn, LkOut};
use fuse_protocol::flags::LockFlags;
use fuse_protocol::opcode::Opcode;

use super::Client;
use crate::error::Result;
use crate::request::Request;

/// A lock to ask for or to set.
#[derive(Clone, Copy, Debug)]
pub struct Lock {
    /// Who holds it; POSIX locks of one owner replace each other.
    pub owner: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: i32,
    /// First byte.
    pub start: u64,
    /// Last byte; `i64::MAX` for all that follows.
    pub end: u64,
    /// A flock(2) lock on the whole file.
    pub flock: bool,
    /// The process that asks.
    pub pid: u32,
}

impl Lock {
    /// A POSIX lock on a range, both ends included.
    pub fn posix(owner: u64, kind: i32, start: u64, end: u64) -> Lock {
        Lock { owner, kind, start, end, flock: false, pid: 0 }
    }

    /// A flock(2) lock.
    pub fn flock(owner: u64, kind: i32) -> Lock {
        Lock { owner, kind, start: 0, end: i64::MAX as u64, flock: true, pid: 0 }
    }

    /// The same, asked for by this process.
    pub fn by(self, pid: u32) -> Lock {
        Lock { pid, ..self }
    }

    fn request<'a>(self, opcode: Opcode, node: u64, fh: u64) -> Request<'a> {
        let flags = if self.flock { LockFlags::FLOCK } else { LockFlags::empty() };
        let lk = FileLock { start: self.start, end: self.end, typ: self.kind.cast_unsigned(), pid: self.pid };
        let arg = LkIn { fh, owner: self.owner, lk, lk_flags: flags.bits(), padding: 0 };
        Request::new(opcode, node).arg(&arg)
    }

    /// A SETLK, for [`Client::send`].
    pub fn set_request<'a>(self, node: u64, fh: u64) -> Request<'a> {
        self.request(Opcode::Setlk, node, fh)
    }

    /// A SETLKW, for [`Client::send`].
    pub fn waiting_request<'a>(self, node: u64, fh: u64) -> Request<'a> {
        self.request(Opcode::Setlkw, node, fh)
    }
}

impl Client<'_> {
    /// GETLK: the lock that is in the way; its type is `F_UNLCK` if none is.
    pub fn getlk(&self, node: u64, fh: u64, lock: Lock) -> Result<FileLock> {
        let request = lock.request(Opcode::Getlk, node, fh).reply::<LkOut>();
        self.call::<LkOut>(request).map(|out| out.lk)
    }

    /// SETLK: fails with EAGAIN where it would have to wait.
    pub fn setlk(&self, node: u64, fh: u64, lock: Lock) -> Result<()> {
        self.call_empty(lock.request(Opcode::Setlk, node, fh))
    }

    /// SETLKW: waits for the lock.
    pub fn setlkw(&self, node: u64, fh: u64, lock: Lock) -> Result<()> {
        self.call_empty(lock.waiting_request(node, fh))
    }
}
