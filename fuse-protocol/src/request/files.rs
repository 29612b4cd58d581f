//! Open files and directories.

use crate::abi;
use crate::decode::{Arguments, Cursor, DecodeError, IN_HEADER_SIZE, Result, WRITE_IN_SIZE};
use crate::flags::{FsyncFlags, IoctlFlags, OpenRequestFlags, ReleaseFlags, WriteFlags};
use crate::ids::{HandleId, LockOwner, NodeId};
use crate::opcode::Opcode;

/// Arguments of OPEN.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    /// `O_*` of open(2).
    pub flags: u32,
    /// How to open.
    pub open_flags: OpenRequestFlags,
}

impl<'a> Arguments<'a> for Open {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Open> {
        let raw: abi::OpenIn = cursor.take()?;
        Ok(Open { flags: raw.flags, open_flags: cursor.open_flags(raw.open_flags) })
    }
}

/// Arguments of OPENDIR.
#[derive(Clone, Copy, Debug)]
pub struct Opendir {
    /// `O_*` of open(2).
    pub flags: u32,
}

impl<'a> Arguments<'a> for Opendir {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Opendir> {
        Ok(Opendir { flags: cursor.take::<abi::OpenIn>()?.flags })
    }
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

impl<'a> Arguments<'a> for Read {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Read> {
        let raw: abi::ReadIn = cursor.take()?;
        let offset = cursor.offset(raw.offset)?;
        Ok(Read { handle: HandleId(raw.fh), offset, size: raw.size, flags: raw.flags })
    }
}

/// Arguments of WRITE; the data follows them.
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

impl<'a> Arguments<'a> for Write {
    /// The data's length is the header's less what stands before it, and has to be WRITE's size.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Write> {
        let raw: abi::WriteIn = cursor.take()?;
        let offset = cursor.offset(raw.offset)?;
        let data = u64::from(cursor.declared_length()).checked_sub((IN_HEADER_SIZE + WRITE_IN_SIZE) as u64);
        if data != Some(u64::from(raw.size)) {
            return Err(DecodeError::Range(cursor.opcode()));
        }
        Ok(Write {
            handle: HandleId(raw.fh),
            offset,
            size: raw.size,
            write_flags: WriteFlags::from_bits_truncate(raw.write_flags),
            flags: raw.flags,
        })
    }
}

/// Arguments of RELEASE.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// The file that is closed.
    pub handle: HandleId,
    /// What else to do.
    pub flags: ReleaseFlags,
    /// Whose locks to drop.
    pub lock_owner: LockOwner,
}

impl<'a> Arguments<'a> for Release {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Release> {
        let raw: abi::ReleaseIn = cursor.take()?;
        let flags = ReleaseFlags::from_bits_truncate(raw.release_flags);
        Ok(Release { handle: HandleId(raw.fh), flags, lock_owner: LockOwner(raw.lock_owner) })
    }
}

/// Arguments of RELEASEDIR.
#[derive(Clone, Copy, Debug)]
pub struct Releasedir {
    /// The directory that is closed.
    pub handle: HandleId,
}

impl<'a> Arguments<'a> for Releasedir {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Releasedir> {
        Ok(Releasedir { handle: HandleId(cursor.take::<abi::ReleaseIn>()?.fh) })
    }
}

/// Arguments of FLUSH.
#[derive(Clone, Copy, Debug)]
pub struct Flush {
    /// The open file, one descriptor of which was closed.
    pub handle: HandleId,
    /// Whose POSIX locks to drop.
    pub lock_owner: LockOwner,
}

impl<'a> Arguments<'a> for Flush {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Flush> {
        let raw: abi::FlushIn = cursor.take()?;
        Ok(Flush { handle: HandleId(raw.fh), lock_owner: LockOwner(raw.lock_owner) })
    }
}

/// Arguments of FSYNC and FSYNCDIR.
#[derive(Clone, Copy, Debug)]
pub struct Fsync {
    /// The open file or directory.
    pub handle: HandleId,
    /// Whether fdatasync(2) is enough.
    pub flags: FsyncFlags,
}

impl<'a> Arguments<'a> for Fsync {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Fsync> {
        let raw: abi::FsyncIn = cursor.take()?;
        Ok(Fsync { handle: HandleId(raw.fh), flags: FsyncFlags::from_bits_truncate(raw.fsync_flags) })
    }
}

/// Arguments of READDIR and READDIRPLUS.
#[derive(Clone, Copy, Debug)]
pub struct Readdir {
    /// The open directory.
    pub handle: HandleId,
    /// Where to go on: 0, or the offset of an earlier record.
    pub offset: u64,
    /// Bytes that the reply may have.
    pub size: u32,
    /// READDIRPLUS: each record carries the entry.
    pub plus: bool,
}

impl<'a> Arguments<'a> for Readdir {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Readdir> {
        let raw: abi::ReadIn = cursor.take()?;
        let plus = cursor.opcode() == Opcode::Readdirplus;
        Ok(Readdir { handle: HandleId(raw.fh), offset: raw.offset, size: raw.size, plus })
    }
}

/// Arguments of FALLOCATE.
#[derive(Clone, Copy, Debug)]
pub struct Fallocate {
    /// The open file.
    pub handle: HandleId,
    /// First byte; at most `i64::MAX`.
    pub offset: u64,
    /// Bytes; at most `i64::MAX`.
    pub length: u64,
    /// `FALLOC_FL_*` of fallocate(2).
    pub mode: u32,
}

impl<'a> Arguments<'a> for Fallocate {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Fallocate> {
        let raw: abi::FallocateIn = cursor.take()?;
        let (offset, length) = (cursor.offset(raw.offset)?, cursor.offset(raw.length)?);
        Ok(Fallocate { handle: HandleId(raw.fh), offset, length, mode: raw.mode })
    }
}

/// Arguments of LSEEK.
#[derive(Clone, Copy, Debug)]
pub struct Lseek {
    /// The open file.
    pub handle: HandleId,
    /// Where to seek from, in bytes.
    pub offset: u64,
    /// `SEEK_DATA` or `SEEK_HOLE` of lseek(2).
    pub whence: u32,
}

impl<'a> Arguments<'a> for Lseek {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Lseek> {
        let raw: abi::LseekIn = cursor.take()?;
        Ok(Lseek { handle: HandleId(raw.fh), offset: raw.offset, whence: raw.whence })
    }
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

impl<'a> Arguments<'a> for CopyFileRange {
    fn decode(cursor: &mut Cursor<'a>) -> Result<CopyFileRange> {
        let raw: abi::CopyFileRangeIn = cursor.take()?;
        Ok(CopyFileRange {
            handle_in: HandleId(raw.fh_in),
            offset_in: cursor.offset(raw.off_in)?,
            node_out: NodeId(raw.nodeid_out),
            handle_out: HandleId(raw.fh_out),
            offset_out: cursor.offset(raw.off_out)?,
            length: raw.len,
            flags: raw.flags,
            wide_reply: cursor.opcode() == Opcode::CopyFileRange64,
        })
    }
}

/// Arguments of IOCTL. [`Ioctl::command`] decodes those that concern file flags.
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

impl<'a> Arguments<'a> for Ioctl<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Ioctl<'a>> {
        let raw: abi::IoctlIn = cursor.take()?;
        let data = cursor.bytes(usize::try_from(raw.in_size).unwrap_or(usize::MAX))?;
        Ok(Ioctl {
            handle: HandleId(raw.fh),
            flags: IoctlFlags::from_bits_truncate(raw.flags),
            command: raw.cmd,
            data,
            room: raw.out_size,
        })
    }
}
