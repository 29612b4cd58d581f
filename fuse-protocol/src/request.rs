//! Requests as the rest of the daemon sees them: typed, and checked as far as bytes alone allow.

use std::ffi::CStr;

use zerocopy::FromBytes;

use super::abi;
use super::extensions::Labels;
use super::flags::{
    FsyncFlags, GetattrFlags, InitFlags, IoctlFlags, OpenRequestFlags, ReleaseFlags, SetattrValid,
    SetxattrFlags, WriteFlags,
};
use super::ids::{GuestGid, GuestUid, HandleId, LockOwner, NodeId, Unique};
use super::name::{LookupName, Name};
use super::opcode::Opcode;

/// One request. What a WRITE carries stays in guest memory and is no part of this.
#[derive(Debug)]
pub struct Request<'a> {
    /// Who asks, for which inode.
    pub header: Header,
    /// What is asked for.
    pub operation: Operation<'a>,
    /// Security labels for what is created (SECURITY_CTX).
    pub labels: Labels<'a>,
}

/// The header of a request, and what its extensions say.
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
#[allow(missing_docs, reason = "variants and fields are named like the requests of linux/fuse.h")]
pub enum Operation<'a> {
    Init(Init),
    Destroy,
    Lookup {
        name: LookupName<'a>,
    },
    Forget {
        nlookup: u64,
    },
    BatchForget {
        items: ForgetList<'a>,
    },
    Getattr {
        handle: Option<HandleId>,
    },
    Setattr(Setattr),
    Statx(Statx),
    Readlink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    Mknod {
        name: Name<'a>,
        mode: u32,
        rdev: u32,
        umask: u32,
    },
    Mkdir {
        name: Name<'a>,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    Rmdir {
        name: Name<'a>,
    },
    Rename(Rename<'a>),
    Link {
        from: NodeId,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        open_flags: OpenRequestFlags,
    },
    Create(Create<'a>),
    Tmpfile(Tmpfile),
    Read(Read),
    Write(Write),
    Statfs,
    Release {
        handle: HandleId,
        flags: ReleaseFlags,
        lock_owner: LockOwner,
    },
    Fsync {
        handle: HandleId,
        flags: FsyncFlags,
    },
    Flush {
        handle: HandleId,
        lock_owner: LockOwner,
    },
    Opendir {
        flags: u32,
    },
    Readdir {
        handle: HandleId,
        offset: u64,
        size: u32,
        plus: bool,
    },
    Releasedir {
        handle: HandleId,
    },
    Fsyncdir {
        handle: HandleId,
        flags: FsyncFlags,
    },
    Access {
        mask: u32,
    },
    Interrupt {
        unique: Unique,
    },
    Fallocate {
        handle: HandleId,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        handle: HandleId,
        offset: u64,
        whence: u32,
    },
    CopyFileRange(CopyFileRange),
    Syncfs,
    Setxattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        setxattr_flags: SetxattrFlags,
    },
    Getxattr {
        name: &'a CStr,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
    Getlk(Lock),
    Setlk(Lock),
    Setlkw(Lock),
    Ioctl(Ioctl<'a>),
    /// Known to the protocol, not served here: POLL, BMAP, DAX and notifications.
    Unsupported,
}

/// The items of a BATCH_FORGET.
#[derive(Clone, Copy, Debug)]
pub struct ForgetList<'a>(pub(super) &'a [u8]);

impl ForgetList<'_> {
    /// Each inode and what to take off its lookup count.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> {
        let items = self.0.chunks_exact(size_of::<abi::ForgetOne>());
        items
            .filter_map(|item| abi::ForgetOne::read_from_bytes(item).ok())
            .map(|one| (NodeId(one.nodeid), one.nlookup))
    }
}

/// Arguments of INIT.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    /// Major version; 7.
    pub major: u32,
    /// Minor version of the guest.
    pub minor: u32,
    /// Longest read-ahead of the guest in bytes.
    pub max_readahead: u32,
    /// What the guest can do.
    pub flags: InitFlags,
}

/// A time to set: now, or seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's clock at the call.
    Now,
    /// A given time; seconds may be negative.
    At {
        /// Seconds since 1970.
        seconds: i64,
        /// 0 to 999,999,999.
        nanoseconds: u32,
    },
}

/// Arguments of SETATTR: what is `None` stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct Setattr {
    /// An open handle of the file, if the caller has one.
    pub handle: Option<HandleId>,
    /// Permission bits; the file type in it is ignored.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<GuestUid>,
    /// New group.
    pub gid: Option<GuestGid>,
    /// New size in bytes.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// Clear set-id bits as for an unprivileged caller.
    pub kill_suidgid: bool,
}

/// Arguments of STATX.
#[derive(Clone, Copy, Debug)]
pub struct Statx {
    /// An open handle of the file, if the caller has one.
    pub handle: Option<HandleId>,
    /// `AT_STATX_*` of the caller.
    pub flags: u32,
    /// `STATX_*` fields that are wanted.
    pub mask: u32,
}

/// Arguments of RENAME and RENAME2.
#[derive(Clone, Copy, Debug)]
pub struct Rename<'a> {
    /// The entry to rename, in the directory that the header names.
    pub name: Name<'a>,
    /// The directory it goes to.
    pub new_parent: NodeId,
    /// Its name there.
    pub new_name: Name<'a>,
    /// `RENAME_*` of renameat2(2).
    pub flags: u32,
}

/// Arguments of CREATE.
#[derive(Clone, Copy, Debug)]
pub struct Create<'a> {
    /// The entry to create.
    pub name: Name<'a>,
    /// `O_*` of open(2).
    pub flags: u32,
    /// Type and permission bits; the guest applied the umask unless DONT_MASK was agreed on.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// How to open.
    pub open_flags: OpenRequestFlags,
}

/// Arguments of TMPFILE (a file without a name).
#[derive(Clone, Copy, Debug)]
pub struct Tmpfile {
    /// `O_*` of open(2).
    pub flags: u32,
    /// Type and permission bits.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// How to open.
    pub open_flags: OpenRequestFlags,
}

/// Arguments of READ.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    /// The open file.
    pub handle: HandleId,
    /// Where to start, in bytes; at most `i64::MAX`.
    pub offset: u64,
    /// Bytes wanted.
    pub size: u32,
    /// `O_*` flags the guest's file has at this moment.
    pub flags: u32,
}

/// Arguments of WRITE; the data follows in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// The open file.
    pub handle: HandleId,
    /// Where to start, in bytes; at most `i64::MAX`.
    pub offset: u64,
    /// Bytes to write.
    pub size: u32,
    /// How to write.
    pub write_flags: WriteFlags,
    /// `O_*` flags the guest's file has at this moment.
    pub flags: u32,
}

/// Arguments of COPY_FILE_RANGE and COPY_FILE_RANGE_64.
#[derive(Clone, Copy, Debug)]
pub struct CopyFileRange {
    /// Open source; the header names its inode.
    pub handle_in: HandleId,
    /// Offset in the source in bytes.
    pub offset_in: u64,
    /// Inode of the destination.
    pub node_out: NodeId,
    /// Open destination.
    pub handle_out: HandleId,
    /// Offset in the destination in bytes.
    pub offset_out: u64,
    /// Bytes to copy.
    pub length: u64,
    /// Flags of copy_file_range(2).
    pub flags: u64,
    /// The reply has 64 bits for the length (COPY_FILE_RANGE_64).
    pub wide_reply: bool,
}

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None: unlock.
    Unlock,
}

/// Arguments of GETLK, SETLK and SETLKW.
#[derive(Clone, Copy, Debug)]
pub struct Lock {
    /// The open file.
    pub handle: HandleId,
    /// Who holds or wants the lock.
    pub owner: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `i64::MAX` for "to the end of the file".
    pub end: u64,
    /// What is wanted.
    pub kind: LockKind,
    /// The process in the guest.
    pub pid: u32,
    /// A flock(2) lock on the handle, not a POSIX one.
    pub flock: bool,
}

/// Arguments of IOCTL. [`Ioctl::decode`](super::ioctl) says which command it is.
#[derive(Clone, Copy, Debug)]
pub struct Ioctl<'a> {
    /// The open file or directory.
    pub handle: HandleId,
    /// How the caller calls.
    pub flags: IoctlFlags,
    /// The command's number.
    pub command: u32,
    /// What the caller hands in.
    pub data: &'a [u8],
    /// Bytes that the caller takes.
    pub room: u32,
}

impl Setattr {
    /// Sorts out which fields of `raw` count.
    pub(super) fn from_wire(raw: &abi::SetattrIn) -> Setattr {
        let valid = SetattrValid::from_bits_truncate(raw.valid);
        let time = |set, now, seconds: u64, nanoseconds| {
            if valid.contains(now) {
                Some(SetTime::Now)
            } else {
                valid.contains(set).then_some(SetTime::At { seconds: seconds.cast_signed(), nanoseconds })
            }
        };
        Setattr {
            handle: valid.contains(SetattrValid::FH).then_some(HandleId(raw.fh)),
            mode: valid.contains(SetattrValid::MODE).then_some(raw.mode),
            uid: valid.contains(SetattrValid::UID).then_some(GuestUid(raw.uid)),
            gid: valid.contains(SetattrValid::GID).then_some(GuestGid(raw.gid)),
            size: valid.contains(SetattrValid::SIZE).then_some(raw.size),
            atime: time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, raw.atime, raw.atimensec),
            mtime: time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, raw.mtime, raw.mtimensec),
            kill_suidgid: valid.contains(SetattrValid::KILL_SUIDGID),
        }
    }
}

impl Init {
    /// Puts both halves of the flags together.
    pub(super) fn from_wire(raw: &abi::InitIn) -> Init {
        let low = InitFlags::from_bits_truncate(u64::from(raw.flags));
        let high = if low.contains(InitFlags::INIT_EXT) { u64::from(raw.flags2) << 32 } else { 0 };
        Init {
            major: raw.major,
            minor: raw.minor,
            max_readahead: raw.max_readahead,
            flags: low | InitFlags::from_bits_truncate(high),
        }
    }
}

/// The handle of a GETATTR or STATX, if its flags say that there is one.
pub(super) fn handle_if(getattr_flags: u32, fh: u64) -> Option<HandleId> {
    GetattrFlags::from_bits_truncate(getattr_flags).contains(GetattrFlags::FH).then_some(HandleId(fh))
}
