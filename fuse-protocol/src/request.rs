//! Typed requests, checked as far as bytes alone allow.
//!
//! Each operation has a struct of its own, named as the opcode in `linux/fuse.h`; two operations that differ
//! in nothing but their opcode share one ([`Lock`], [`Fsync`]).

mod attributes;
mod files;
mod locks;
mod namespace;
mod rare;
mod session;

pub use self::attributes::{
    Access, Getattr, Getxattr, Listxattr, Removexattr, SetTime, Setattr, Setxattr, Statx,
};
pub use self::files::{
    CopyFileRange, Fallocate, Flush, Fsync, Ioctl, Lseek, Open, Opendir, Read, Readdir, Release, Releasedir,
    Write,
};
pub use self::locks::{Lock, LockKind};
pub use self::namespace::{Create, Link, Lookup, Mkdir, Mknod, Rename, Rmdir, Symlink, Tmpfile, Unlink};
pub use self::rare::{Bmap, NotifyReply, Poll, RemoveMapping, SetupMapping};
pub use self::session::{BatchForget, Forget, Init, Interrupt};

use crate::extensions::Labels;
use crate::ids::{GuestGid, GuestUid, NodeId, Unique};
use crate::opcode::Opcode;

/// One request. The data of a WRITE stays where it is and is no part of this.
#[derive(Debug)]
pub struct Request<'a> {
    /// The caller and the inode.
    pub header: Header,
    /// The operation and its arguments.
    pub operation: Operation<'a>,
    /// Security labels for what is created (SECURITY_CTX).
    pub labels: Labels<'a>,
}

/// The header of a request with its extensions.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// The guest's number for this request.
    pub unique: Unique,
    /// The kind of request.
    pub opcode: Opcode,
    /// The inode it is about (for names: the directory).
    pub node: NodeId,
    /// The caller's user.
    pub uid: GuestUid,
    /// The caller's group.
    pub gid: GuestGid,
    /// The caller's process in the guest.
    pub pid: u32,
    /// The one supplementary group that matters for a creating call (CREATE_SUPP_GROUP).
    pub supplementary_group: Option<GuestGid>,
}

/// The operation and its arguments.
#[derive(Debug)]
#[allow(missing_docs, reason = "variants are named as the requests of linux/fuse.h")]
pub enum Operation<'a> {
    Init(Init),
    Destroy,
    Lookup(Lookup<'a>),
    Forget(Forget),
    BatchForget(BatchForget<'a>),
    Getattr(Getattr),
    Setattr(Setattr),
    Statx(Statx),
    Readlink,
    Symlink(Symlink<'a>),
    Mknod(Mknod<'a>),
    Mkdir(Mkdir<'a>),
    Unlink(Unlink<'a>),
    Rmdir(Rmdir<'a>),
    /// RENAME or RENAME2.
    Rename(Rename<'a>),
    Link(Link<'a>),
    Open(Open),
    Create(Create<'a>),
    Tmpfile(Tmpfile),
    Read(Read),
    Write(Write),
    Statfs,
    Release(Release),
    Fsync(Fsync),
    Flush(Flush),
    Opendir(Opendir),
    /// READDIR or READDIRPLUS.
    Readdir(Readdir),
    Releasedir(Releasedir),
    Fsyncdir(Fsync),
    Access(Access),
    Interrupt(Interrupt),
    Fallocate(Fallocate),
    Lseek(Lseek),
    /// COPY_FILE_RANGE or COPY_FILE_RANGE_64.
    CopyFileRange(CopyFileRange),
    Syncfs,
    Setxattr(Setxattr<'a>),
    Getxattr(Getxattr<'a>),
    Listxattr(Listxattr),
    Removexattr(Removexattr<'a>),
    Getlk(Lock),
    Setlk(Lock),
    Setlkw(Lock),
    Ioctl(Ioctl<'a>),
    Bmap(Bmap),
    Poll(Poll),
    NotifyReply(NotifyReply<'a>),
    SetupMapping(SetupMapping),
    RemoveMapping(RemoveMapping<'a>),
}
