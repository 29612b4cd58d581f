//! Bytes to [`Request`]. Total: whatever a guest sends is a request or a [`DecodeError`].

use std::ffi::CStr;

use rustix::io::Errno;
use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::abi;
use super::extensions::Extensions;
use super::flags::{FsyncFlags, LockFlags, OpenRequestFlags, ReleaseFlags, SetxattrFlags, WriteFlags};
use super::ids::{GuestGid, GuestUid, HandleId, LockOwner, NodeId, Unique};
use super::init::Layout;
use super::name::{LookupName, Name, NameError};
use super::opcode::Opcode;
use super::request::{
    CopyFileRange, Create, Header, Init, Lock, LockKind, Operation, Read, Rename, Request, Setattr, Statx,
    Tmpfile, Write, handle_if,
};

/// Bytes of the header in front of every request.
pub const IN_HEADER_SIZE: usize = size_of::<abi::InHeader>();
/// Bytes of WRITE's arguments; its data follows them.
pub const WRITE_IN_SIZE: usize = size_of::<abi::WriteIn>();
/// Bytes that the arguments of a request other than WRITE may have: the longest are an xattr's
/// value (64 KiB) and a BATCH_FORGET.
pub const MAX_ARGUMENTS: usize = 256 << 10;

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The opcode is none of the protocol's.
    #[error("opcode {0} is unknown")]
    UnknownOpcode(u32),
    /// The header's length and the chain's disagree.
    #[error("the header tells a length of {told} bytes, the chain has {got}")]
    Length {
        /// `len` of the header.
        told: u32,
        /// Readable bytes of the chain.
        got: usize,
    },
    /// The arguments end early.
    #[error("{0:?} ends within its arguments")]
    Truncated(Opcode),
    /// The arguments go on past [`MAX_ARGUMENTS`].
    #[error("{0:?} has {1} bytes of arguments, more than are served")]
    TooLong(Opcode, usize),
    /// A name without its NUL.
    #[error("a name in {0:?} has no end")]
    UnterminatedName(Opcode),
    /// A name that is none.
    #[error("{1} in {0:?}")]
    Name(Opcode, NameError),
    /// A number that no kernel sends: an offset past `i64::MAX`, a lock of an unknown kind.
    #[error("{0:?} has an argument out of range")]
    Range(Opcode),
    /// Extensions that do not add up.
    #[error("the extensions of {0:?} are malformed")]
    Extensions(Opcode),
}

impl DecodeError {
    /// The errno that the guest gets.
    pub fn errno(self) -> Errno {
        match self {
            DecodeError::UnknownOpcode(_) => Errno::NOSYS,
            DecodeError::Name(_, error) => error.errno(),
            _ => Errno::INVAL,
        }
    }
}

type Result<T> = std::result::Result<T, DecodeError>;

/// Bytes of arguments that are to be copied out of the chain for a request whose readable part has
/// `readable` bytes: all but the header, and of a WRITE not its data.
pub fn argument_bytes(header: &abi::InHeader, readable: usize) -> Result<usize> {
    let opcode = Opcode::from_number(header.opcode).ok_or(DecodeError::UnknownOpcode(header.opcode))?;
    let wrong_length = DecodeError::Length { told: header.len, got: readable };
    let told = usize::try_from(header.len).map_err(|_| wrong_length)?;
    if told > readable {
        return Err(wrong_length);
    }
    let arguments = told.checked_sub(IN_HEADER_SIZE).ok_or(wrong_length)?;
    match opcode {
        Opcode::Write => Ok(arguments.min(WRITE_IN_SIZE)),
        _ if arguments > MAX_ARGUMENTS => Err(DecodeError::TooLong(opcode, arguments)),
        _ => Ok(arguments),
    }
}

impl<'a> Request<'a> {
    /// Decodes `arguments`, the [`argument_bytes`] behind `header`.
    pub fn decode(raw: &abi::InHeader, arguments: &'a [u8], layout: Layout) -> Result<Request<'a>> {
        let opcode = Opcode::from_number(raw.opcode).ok_or(DecodeError::UnknownOpcode(raw.opcode))?;
        let (arguments, extensions) = split_extensions(opcode, raw, arguments)?;
        let mut extensions = Extensions::parse(opcode, extensions)?;
        let header = Header {
            unique: Unique(raw.unique),
            opcode,
            node: NodeId(raw.nodeid),
            uid: GuestUid(raw.uid),
            gid: GuestGid(raw.gid),
            pid: raw.pid,
            supplementary_group: extensions.group,
        };
        let mut cursor = Cursor { opcode, rest: arguments };
        let operation = match opcode {
            Opcode::Setxattr => cursor.setxattr(layout.long_setxattr)?,
            Opcode::Write => cursor.write(raw)?,
            _ => cursor.operation()?,
        };
        if layout.trailing_labels && opcode.creates() {
            extensions = Extensions::parse(opcode, cursor.rest)?;
        }
        Ok(Request { header, operation, labels: extensions.labels })
    }
}

/// Cuts the extensions off the end of the arguments.
fn split_extensions<'a>(
    opcode: Opcode,
    raw: &abi::InHeader,
    arguments: &'a [u8],
) -> Result<(&'a [u8], &'a [u8])> {
    let extensions = usize::from(raw.total_extlen) * abi::RECORD_ALIGN;
    if extensions > 0 && opcode == Opcode::Write {
        return Err(DecodeError::Extensions(opcode));
    }
    let split = arguments.len().checked_sub(extensions).ok_or(DecodeError::Extensions(opcode))?;
    arguments.split_at_checked(split).ok_or(DecodeError::Extensions(opcode))
}

/// Takes arguments off the front.
struct Cursor<'a> {
    opcode: Opcode,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn operation(&mut self) -> Result<Operation<'a>> {
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
            Opcode::Ioctl
            | Opcode::Poll
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
                let open_flags = OpenRequestFlags::from_bits_truncate(raw.open_flags);
                Operation::Open { flags: raw.flags, open_flags }
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
        Ok(Operation::BatchForget { items: super::request::ForgetList(items) })
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
            open_flags: OpenRequestFlags::from_bits_truncate(raw.open_flags),
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
            open_flags: OpenRequestFlags::from_bits_truncate(raw.open_flags),
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

    fn setxattr(&mut self, long: bool) -> Result<Operation<'a>> {
        let mut raw = abi::SetxattrIn::new_zeroed();
        if long {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(opcode: u32, len: usize) -> abi::InHeader {
        abi::InHeader { len: u32::try_from(len).unwrap(), opcode, unique: 1, nodeid: 1, ..Default::default() }
    }

    /// As a worker does it: the header's length is the chain's.
    fn decode(opcode: Opcode, arguments: &[u8]) -> Result<String> {
        let header = header(opcode as u32, IN_HEADER_SIZE + arguments.len());
        let count = argument_bytes(&header, IN_HEADER_SIZE + arguments.len())?;
        Request::decode(&header, &arguments[..count], Layout::default())
            .map(|request| format!("{:?}", request.operation))
    }

    #[test]
    fn two_names_are_told_apart() {
        let mut bytes = 7u64.to_le_bytes().to_vec();
        bytes.extend(b"old\0new\0");
        let text = decode(Opcode::Rename, &bytes).unwrap();
        assert!(text.contains("\"old\"") && text.contains("NodeId(7)") && text.contains("\"new\""), "{text}");
        bytes.pop();
        assert_eq!(decode(Opcode::Rename, &bytes), Err(DecodeError::UnterminatedName(Opcode::Rename)));
    }

    #[test]
    fn every_name_is_checked() {
        for bad in [&b"\0"[..], b".\0", b"..\0", b"a/b\0"] {
            for opcode in [Opcode::Unlink, Opcode::Rmdir] {
                assert!(matches!(decode(opcode, bad), Err(DecodeError::Name(..))));
            }
            for (opcode, fixed) in
                [(Opcode::Mknod, 16), (Opcode::Mkdir, 8), (Opcode::Link, 8), (Opcode::Create, 16)]
            {
                let bytes = [&vec![0; fixed][..], bad].concat();
                assert!(matches!(decode(opcode, &bytes), Err(DecodeError::Name(..))), "{opcode:?} {bad:?}");
            }
            let rename = [&[0; 8][..], b"good\0", bad].concat();
            assert!(matches!(decode(Opcode::Rename, &rename), Err(DecodeError::Name(..))));
            let rename = [&[0; 8][..], bad, b"good\0"].concat();
            assert!(matches!(decode(Opcode::Rename, &rename), Err(DecodeError::Name(..))));
            assert!(matches!(
                decode(Opcode::Symlink, &[bad, b"target\0"].concat()),
                Err(DecodeError::Name(..))
            ));
        }
        assert!(decode(Opcode::Lookup, b"..\0").is_ok());
        assert!(decode(Opcode::Symlink, b"name\0/any/../target\0").is_ok());
    }

    #[test]
    fn a_write_has_as_much_data_as_it_says() {
        let write = abi::WriteIn { size: 100, ..Default::default() };
        for (len, good) in [(180, true), (179, false), (181, false), (80, false), (60, false)] {
            let header = header(Opcode::Write as u32, len);
            let count = argument_bytes(&header, len).unwrap();
            let decoded = Request::decode(&header, &write.as_bytes()[..count], Layout::default());
            assert_eq!(decoded.is_ok(), good, "{len}");
        }
    }

    #[test]
    fn the_length_of_the_header_counts() {
        assert!(argument_bytes(&header(3, 56), 56).is_ok());
        assert_eq!(argument_bytes(&header(3, 56), 60), Ok(16));
        assert!(argument_bytes(&header(3, 57), 56).is_err());
        assert!(argument_bytes(&header(3, 39), 56).is_err());
        assert!(argument_bytes(&header(3, IN_HEADER_SIZE + MAX_ARGUMENTS + 1), 1 << 30).is_err());
        assert_eq!(argument_bytes(&header(7, 40), 40), Err(DecodeError::UnknownOpcode(7)));
    }

    #[test]
    fn the_group_of_an_extension_is_found() {
        let mut bytes = [0; 8].to_vec();
        bytes.extend(b"directory\0");
        bytes.extend([0; 6]);
        bytes.extend([16u32, 32, 1, 4711].iter().flat_map(|word| word.to_le_bytes()));
        let mut header = header(Opcode::Mkdir as u32, IN_HEADER_SIZE + bytes.len());
        header.total_extlen = 2;
        let request = Request::decode(&header, &bytes, Layout::default()).unwrap();
        assert_eq!(request.header.supplementary_group, Some(GuestGid(4711)));
        header.total_extlen = 100;
        assert!(matches!(
            Request::decode(&header, &bytes, Layout::default()),
            Err(DecodeError::Extensions(_))
        ));
        header.total_extlen = 1;
        assert!(matches!(
            Request::decode(&header, &bytes, Layout::default()),
            Err(DecodeError::Extensions(_))
        ));
    }

    #[test]
    fn init_of_an_old_guest_is_short() {
        let init = abi::InitIn { major: 7, minor: 27, flags: 1, ..Default::default() };
        assert!(decode(Opcode::Init, &init.as_bytes()[..16]).unwrap().contains("minor: 27"));
        assert!(decode(Opcode::Init, &init.as_bytes()[..15]).is_err());
        assert!(decode(Opcode::Init, init.as_bytes()).is_ok());
    }

    proptest! {
        /// Total: no bytes make it panic, and what it takes lies within what it was given.
        #[test]
        fn any_bytes_decode(
            opcode in 0u32..60, bytes in proptest::collection::vec(any::<u8>(), 0..300),
            told in 0usize..400, extensions in 0u16..5, long: bool,
        ) {
            let mut header = header(opcode, told);
            header.total_extlen = extensions;
            if let Ok(count) = argument_bytes(&header, IN_HEADER_SIZE + bytes.len()) {
                prop_assert!(count <= bytes.len());
                let layout = Layout { long_setxattr: long, trailing_labels: !long };
                let _ = Request::decode(&header, &bytes[..count], layout);
            }
        }

        /// Plausible requests of every kind, cut anywhere.
        #[test]
        fn a_cut_request_decodes_or_is_refused(opcode in 0usize..50, name in "[a-z./]{0,8}", cut in 0usize..120) {
            let (opcode, _) = Opcode::ALL[opcode % Opcode::ALL.len()];
            let mut bytes = vec![0; 64];
            bytes.extend(name.as_bytes());
            bytes.extend(b"\0second\0");
            bytes.truncate(cut);
            let _ = decode(opcode, &bytes);
        }
    }
}
