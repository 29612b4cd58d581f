//! Attributes of inodes and of the file system.

use fuse_protocol::abi::{
    AccessIn, Attr, AttrOut, GetattrIn, InterruptIn, Kstatfs, SetattrIn, StatfsOut, Statx, StatxIn, StatxOut,
    SyncfsIn,
};
use fuse_protocol::flags::{GetattrFlags, SetattrValid};
use fuse_protocol::opcode::Opcode;

use super::Client;
use crate::error::Result;
use crate::request::Request;
use crate::session::Pending;

/// The fields of a SETATTR and which of them count.
#[derive(Clone, Copy, Debug)]
pub struct Change(pub SetattrIn);

impl Default for Change {
    fn default() -> Self {
        Change::none()
    }
}

impl Change {
    /// Changes nothing.
    pub fn none() -> Change {
        Change(SetattrIn::default())
    }

    fn set(mut self, valid: SetattrValid, field: impl FnOnce(&mut SetattrIn)) -> Change {
        self.0.valid |= valid.bits();
        field(&mut self.0);
        self
    }

    /// Permission bits.
    pub fn mode(self, mode: u32) -> Change {
        self.set(SetattrValid::MODE, |arg| arg.mode = mode)
    }

    /// Owner.
    pub fn uid(self, uid: u32) -> Change {
        self.set(SetattrValid::UID, |arg| arg.uid = uid)
    }

    /// Group.
    pub fn gid(self, gid: u32) -> Change {
        self.set(SetattrValid::GID, |arg| arg.gid = gid)
    }

    /// Size in bytes.
    pub fn size(self, size: u64) -> Change {
        self.set(SetattrValid::SIZE, |arg| arg.size = size)
    }

    /// Access and modification time, in seconds and nanoseconds.
    pub fn times(self, access: (u64, u32), modification: (u64, u32)) -> Change {
        self.set(SetattrValid::ATIME | SetattrValid::MTIME, |arg| {
            (arg.atime, arg.atimensec) = access;
            (arg.mtime, arg.mtimensec) = modification;
        })
    }

    /// Access and modification time become now.
    pub fn times_now(self) -> Change {
        let now = SetattrValid::ATIME_NOW | SetattrValid::MTIME_NOW;
        self.set(now | SetattrValid::ATIME | SetattrValid::MTIME, |_| {})
    }

    /// Through an open file.
    pub fn handle(self, fh: u64) -> Change {
        self.set(SetattrValid::FH, |arg| arg.fh = fh)
    }

    /// Set-id bits are to be cleared as for an unprivileged caller.
    pub fn kill_suidgid(self) -> Change {
        self.set(SetattrValid::KILL_SUIDGID, |_| {})
    }

    /// The SETATTR, for [`Client::send`].
    pub fn request<'a>(self, node: u64) -> Request<'a> {
        Request::new(Opcode::Setattr, node).arg(&self.0).reply::<AttrOut>()
    }
}

impl Client<'_> {
    /// GETATTR.
    pub fn getattr(&self, node: u64) -> Result<Attr> {
        self.getattr_reply(node, None).map(|out| out.attr)
    }

    /// GETATTR, through an open file if there is one, with the time that the answer is valid.
    pub fn getattr_reply(&self, node: u64, fh: Option<u64>) -> Result<AttrOut> {
        let flags = if fh.is_some() { GetattrFlags::FH } else { GetattrFlags::empty() };
        let arg = GetattrIn { getattr_flags: flags.bits(), dummy: 0, fh: fh.unwrap_or(0) };
        self.call(Request::new(Opcode::Getattr, node).arg(&arg).reply::<AttrOut>())
    }

    /// SETATTR.
    pub fn setattr(&self, node: u64, change: Change) -> Result<Attr> {
        self.setattr_reply(node, change).map(|out| out.attr)
    }

    /// SETATTR, with the time that the answer is valid.
    pub fn setattr_reply(&self, node: u64, change: Change) -> Result<AttrOut> {
        self.call(change.request(node))
    }

    /// STATX with a mask of `STATX_*` bits.
    pub fn statx(&self, node: u64, mask: u32) -> Result<Statx> {
        self.statx_reply(node, mask).map(|out| out.stat)
    }

    /// STATX, with the time that the answer is valid.
    pub fn statx_reply(&self, node: u64, mask: u32) -> Result<StatxOut> {
        let arg = StatxIn { sx_mask: mask, ..StatxIn::default() };
        self.call(Request::new(Opcode::Statx, node).arg(&arg).reply::<StatxOut>())
    }

    /// ACCESS with the mask of access(2).
    pub fn access(&self, node: u64, mask: i32) -> Result<()> {
        let arg = AccessIn { mask: mask.cast_unsigned(), padding: 0 };
        self.call_empty(Request::new(Opcode::Access, node).arg(&arg))
    }

    /// STATFS.
    pub fn statfs(&self, node: u64) -> Result<Kstatfs> {
        let request = Request::new(Opcode::Statfs, node).reply::<StatfsOut>();
        self.call::<StatfsOut>(request).map(|out| out.st)
    }

    /// SYNCFS.
    pub fn syncfs(&self, node: u64) -> Result<()> {
        self.call_empty(Request::new(Opcode::Syncfs, node).arg(&SyncfsIn::default()))
    }

    /// DESTROY, the last request of a session.
    pub fn destroy(&self) -> Result<()> {
        self.call_empty(Request::new(Opcode::Destroy, 0))
    }

    /// INTERRUPT of a request under way, on the high-priority queue; EAGAIN if it does not wait.
    pub fn interrupt(&self, sent: Pending) -> Result<()> {
        let arg = InterruptIn { unique: sent.unique };
        self.on(0).call_empty(Request::new(Opcode::Interrupt, 0).arg(&arg))
    }
}
