//! The arguments of a request, taken off the front of its bytes.

use std::ffi::CStr;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, IN_HEADER_SIZE, Result, WRITE_IN_SIZE};
use crate::abi;
use crate::flags::{
    FsyncFlags, IoctlFlags, LockFlags, OpenRequestFlags, ReleaseFlags, SetxattrFlags, WriteFlags,
};
use crate::ids::{HandleId, LockOwner, NodeId, Unique};
use crate::init::Layout;
use crate::name::{LookupName, Name};
use crate::opcode::Opcode;
use crate::request::{
    CopyFileRange, Create, ForgetList, Init, Ioctl, Lock, LockKind, Operation, Read, Rename, Setattr, Statx,
    Tmpfile, Write, handle_if,
};

/// Takes arguments off the front.
pub(super) struct Cursor<'a> {
    opcode: Opcode,
    layout: Layout,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// At the first of `arguments`.
    pub(super) fn new(opcode: Opcode, layout: Layout, arguments: &'a [u8]) -> Cursor<'a> {
        Cursor { opcode, layout, rest: arguments }
    }

    /// What was not taken.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The operation and all of its arguments.
    pub(super) fn operation(&mut self, header: &abi::InHeader) -> Result<Operation<'a>> {
        match self.opcode {
            Opcode::Setxattr => self.setxattr(),
            Opcode::Write => self.write(header),
            _ => self.inode_operation(),
        }
    }

    /// Operations on the session and on inodes.
    fn inode_operation(&mut self) -> Result<Operation<'a>> {
        Ok(match self.opcode {
            Opcode::Init => self.init()?,
            Opcode::Destroy => Operation::Destroy,
            Opcode::Lookup => Operation::Lookup { name: self.lookup_name()? },
            Opcode::Forget => Operation::Forget { nlookup: self.take::<abi::ForgetIn>()?.nlookup },
            Opcode::BatchForget => self.batch_forget()?,
            Opcode::Getattr => {
                let raw: abi::GetattrIn = self.take()?;
                Operation::Getattr { handle: handle_if(raw.getattr_flags, raw.fh) }
            }
            Opcode::Setattr => Operation::Setattr(Setattr::from_wire(&self.take()?)),
            Opcode::Statx => {
                let raw: abi::StatxIn = self.take()?;
                let handle = handle_if(raw.getattr_flags, raw.fh);
                Operation::Statx(Statx { handle, flags: raw.sx_flags, mask: raw.sx_mask })
            }
            Opcode::Readlink => Operation::Readlink,
            Opcode::Statfs => Operation::Statfs,
            Opcode::Access => Operation::Access { mask: self.take::<abi::AccessIn>()?.mask },
            Opcode::Interrupt => {
                Operation::Interrupt { unique: Unique(self.take::<abi::InterruptIn>()?.unique) }
            }
            Opcode::Syncfs => Operation::Syncfs,
            Opcode::Getxattr => {
                let size = self.take::<abi::GetxattrIn>()?.size;
                Operation::Getxattr { name: self.c_str()?, size }
            }
            Opcode::Listxattr => Operation::Listxattr { size: self.take::<abi::GetxattrIn>()?.size },
            Opcode::Removexattr => Operation::Removexattr { name: self.c_str()? },
            Opcode::Getlk => Operation::Getlk(self.lock()?),
            Opcode::Setlk => Operation::Setlk(self.lock()?),
            Opcode::Setlkw => Operation::Setlkw(self.lock()?),
            Opcode::Ioctl => self.ioctl()?,
            Opcode::Poll
            | Opcode::Bmap
            | Opcode::NotifyReply
            | Opcode::SetupMapping
            | Opcode::RemoveMapping => Operation::Unsupported,
            _ => return self.name_operation(),
        })
    }

    /// Operations that change names.
    fn name_operation(&mut self) -> Result<Operation<'a>> {
        Ok(match self.opcode {
            Opcode::Symlink => Operation::Symlink { name: self.name()?, target: self.c_str()? },
            Opcode::Mknod => {
                let raw: abi::MknodIn = self.take()?;
                Operation::Mknod { name: self.name()?, mode: raw.mode, rdev: raw.rdev, umask: raw.umask }
            }
            Opcode::Mkdir => {
                let raw: abi::MkdirIn = self.take()?;
                Operation::Mkdir { name: self.name()?, mode: raw.mode, umask: raw.umask }
            }
            Opcode::Unlink => Operation::Unlink { name: self.name()? },
            Opcode::Rmdir => Operation::Rmdir { name: self.name()? },
            Opcode::Rename => {
                let raw: abi::RenameIn = self.take()?;
                self.rename(raw.newdir, 0)?
            }
            Opcode::Rename2 => {
                let raw: abi::Rename2In = self.take()?;
                self.rename(raw.newdir, raw.flags)?
            }
            Opcode::Link => {
                let raw: abi::LinkIn = self.take()?;
                Operation::Link { from: NodeId(raw.oldnodeid), name: self.name()? }
            }
            Opcode::Create => self.create()?,
            Opcode::Tmpfile => self.tmpfile()?,
            _ => return self.file_operation(),
        })
    }

    /// Operations on open files and directories.
    fn file_operation(&mut self) -> Result<Operation<'a>> {
        Ok(match self.opcode {
            Opcode::Open => {
                let raw: abi::OpenIn = self.take()?;
                Operation::Open { flags: raw.flags, open_flags: self.open_flags(raw.open_flags) }
            }
            Opcode::Opendir => Operation::Opendir { flags: self.take::<abi::OpenIn>()?.flags },
            Opcode::Read => {
                let raw: abi::ReadIn = self.take()?;
                let offset = self.offset(raw.offset)?;
                Operation::Read(Read { handle: HandleId(raw.fh), offset, size: raw.size, flags: raw.flags })
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                let raw: abi::ReadIn = self.take()?;
                let plus = self.opcode == Opcode::Readdirplus;
                Operation::Readdir { handle: HandleId(raw.fh), offset: raw.offset, size: raw.size, plus }
            }
            Opcode::Release => {
                let raw: abi::ReleaseIn = self.take()?;
                let flags = ReleaseFlags::from_bits_truncate(raw.release_flags);
                let lock_owner = LockOwner(raw.lock_owner);
                Operation::Release { handle: HandleId(raw.fh), flags, lock_owner }
            }
            Opcode::Releasedir => {
                Operation::Releasedir { handle: HandleId(self.take::<abi::ReleaseIn>()?.fh) }
            }
            Opcode::Flush => {
                let raw: abi::FlushIn = self.take()?;
                Operation::Flush { handle: HandleId(raw.fh), lock_owner: LockOwner(raw.lock_owner) }
            }
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync()?,
            Opcode::Fallocate => {
                let raw: abi::FallocateIn = self.take()?;
                let (offset, length) = (self.offset(raw.offset)?, self.offset(raw.length)?);
                Operation::Fallocate { handle: HandleId(raw.fh), offset, length, mode: raw.mode }
            }
            Opcode::Lseek => {
                let raw: abi::LseekIn = self.take()?;
                Operation::Lseek { handle: HandleId(raw.fh), offset: raw.offset, whence: raw.whence }
            }
            Opcode::CopyFileRange | Opcode::CopyFileRange64 => self.copy_file_range()?,
            _ => Operation::Unsupported,
        })
    }

    fn init(&mut self) -> Result<Operation<'a>> {
        if self.rest.len() < abi::COMPAT_INIT_IN_SIZE {
            return Err(DecodeError::Truncated(self.opcode));
        }
        Ok(Operation::Init(Init::from_wire(&self.take_padded())))
    }

    fn batch_forget(&mut self) -> Result<Operation<'a>> {
        let count = usize::try_from(self.take::<abi::BatchForgetIn>()?.count);
        let bytes = count.ok().and_then(|n| n.checked_mul(size_of::<abi::ForgetOne>()));
        let items = bytes.and_then(|n| self.rest.get(..n)).ok_or(DecodeError::Truncated(self.opcode))?;
        Ok(Operation::BatchForget { items: ForgetList(items) })
    }

    fn rename(&mut self, new_parent: u64, flags: u32) -> Result<Operation<'a>> {
        let (name, new_name) = (self.name()?, self.name()?);
        Ok(Operation::Rename(Rename { name, new_parent: NodeId(new_parent), new_name, flags }))
    }

    fn create(&mut self) -> Result<Operation<'a>> {
        let raw: abi::CreateIn = self.take()?;
        Ok(Operation::Create(Create {
            name: self.name()?,
            flags: raw.flags,
            mode: raw.mode,
            umask: raw.umask,
            open_flags: self.open_flags(raw.open_flags),
        }))
    }

    /// The name that Linux sends along is that of an unnamed dentry and means nothing.
    fn tmpfile(&mut self) -> Result<Operation<'a>> {
        let raw: abi::CreateIn = self.take()?;
        let _meaningless = self.c_str();
        Ok(Operation::Tmpfile(Tmpfile {
            flags: raw.flags,
            mode: raw.mode,
            umask: raw.umask,
            open_flags: self.open_flags(raw.open_flags),
        }))
    }

    /// The data's length is the header's less what stands before it, and has to be WRITE's size.
    fn write(&mut self, header: &abi::InHeader) -> Result<Operation<'a>> {
        let raw: abi::WriteIn = self.take()?;
        let offset = self.offset(raw.offset)?;
        let told = u64::from(header.len).checked_sub((IN_HEADER_SIZE + WRITE_IN_SIZE) as u64);
        if told != Some(u64::from(raw.size)) {
            return Err(DecodeError::Range(self.opcode));
        }
        Ok(Operation::Write(Write {
            handle: HandleId(raw.fh),
            offset,
            size: raw.size,
            write_flags: WriteFlags::from_bits_truncate(raw.write_flags),
            flags: raw.flags,
        }))
    }

    fn fsync(&mut self) -> Result<Operation<'a>> {
        let raw: abi::FsyncIn = self.take()?;
        let (handle, flags) = (HandleId(raw.fh), FsyncFlags::from_bits_truncate(raw.fsync_flags));
        Ok(match self.opcode {
            Opcode::Fsync => Operation::Fsync { handle, flags },
            _ => Operation::Fsyncdir { handle, flags },
        })
    }

    fn copy_file_range(&mut self) -> Result<Operation<'a>> {
        let raw: abi::CopyFileRangeIn = self.take()?;
        Ok(Operation::CopyFileRange(CopyFileRange {
            handle_in: HandleId(raw.fh_in),
            offset_in: self.offset(raw.off_in)?,
            node_out: NodeId(raw.nodeid_out),
            handle_out: HandleId(raw.fh_out),
            offset_out: self.offset(raw.off_out)?,
            length: raw.len,
            flags: raw.flags,
            wide_reply: self.opcode == Opcode::CopyFileRange64,
        }))
    }

    fn setxattr(&mut self) -> Result<Operation<'a>> {
        let mut raw = abi::SetxattrIn::new_zeroed();
        if self.layout.long_setxattr {
            raw = self.take()?;
        } else {
            let short = self.bytes(abi::COMPAT_SETXATTR_IN_SIZE)?;
            raw.as_mut_bytes().iter_mut().zip(short).for_each(|(to, from)| *to = *from);
        }
        let name = self.c_str()?;
        let value = self.bytes(usize::try_from(raw.size).unwrap_or(usize::MAX))?;
        let setxattr_flags = SetxattrFlags::from_bits_truncate(raw.setxattr_flags);
        Ok(Operation::Setxattr { name, value, flags: raw.flags, setxattr_flags })
    }

    fn lock(&mut self) -> Result<Lock> {
        let raw: abi::LkIn = self.take()?;
        let kind = match i32::try_from(raw.lk.typ) {
            Ok(libc::F_RDLCK) => LockKind::Read,
            Ok(libc::F_WRLCK) => LockKind::Write,
            Ok(libc::F_UNLCK) => LockKind::Unlock,
            _ => return Err(DecodeError::Range(self.opcode)),
        };
        let (start, end) = (self.offset(raw.lk.start)?, self.offset(raw.lk.end)?);
        if start > end {
            return Err(DecodeError::Range(self.opcode));
        }
        Ok(Lock {
            handle: HandleId(raw.fh),
            owner: LockOwner(raw.owner),
            start,
            end,
            kind,
            pid: raw.lk.pid,
            flock: LockFlags::from_bits_truncate(raw.lk_flags).contains(LockFlags::FLOCK),
        })
    }

    /// An IOCTL and the bytes that the caller hands in, as many as it says.
    fn ioctl(&mut self) -> Result<Operation<'a>> {
        let raw: abi::IoctlIn = self.take()?;
        let data = self.bytes(usize::try_from(raw.in_size).unwrap_or(usize::MAX))?;
        Ok(Operation::Ioctl(Ioctl {
            handle: HandleId(raw.fh),
            flags: IoctlFlags::from_bits_truncate(raw.flags),
            command: raw.cmd,
            data,
            room: raw.out_size,
        }))
    }

    /// How to open. Before HANDLE_KILLPRIV_V2 these bytes were padding, and guests leave rubbish there.
    fn open_flags(&self, raw: u32) -> OpenRequestFlags {
        match self.layout.open_flags {
            true => OpenRequestFlags::from_bits_truncate(raw),
            false => OpenRequestFlags::empty(),
        }
    }

    /// A struct at the front.
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let (value, rest) =
            T::read_from_prefix(self.rest).map_err(|_| DecodeError::Truncated(self.opcode))?;
        self.rest = rest;
        Ok(value)
    }

    /// A struct whose end older guests leave out: what is missing is zero.
    fn take_padded<T: FromBytes + IntoBytes>(&mut self) -> T {
        let mut value = T::new_zeroed();
        value.as_mut_bytes().iter_mut().zip(self.rest).for_each(|(to, from)| *to = *from);
        value
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated(self.opcode))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn c_str(&mut self) -> Result<&'a CStr> {
        let name =
            CStr::from_bytes_until_nul(self.rest).map_err(|_| DecodeError::UnterminatedName(self.opcode))?;
        self.bytes(name.count_bytes() + 1)?;
        Ok(name)
    }

    fn name(&mut self) -> Result<Name<'a>> {
        Name::new(self.c_str()?).map_err(|error| DecodeError::Name(self.opcode, error))
    }

    fn lookup_name(&mut self) -> Result<LookupName<'a>> {
        LookupName::new(self.c_str()?).map_err(|error| DecodeError::Name(self.opcode, error))
    }

    /// An offset or length that fits the host's signed ones.
    fn offset(&self, value: u64) -> Result<u64> {
        if i64::try_from(value).is_ok() { Ok(value) } else { Err(DecodeError::Range(self.opcode)) }
    }
}
