//! Bytes to [`Request`]. Total: every byte string is a request or a [`DecodeError`].

mod cursor;

use thiserror::Error;

pub(crate) use self::cursor::{Arguments, Cursor};
use crate::abi;
use crate::errno::Errno;
use crate::extensions::Extensions;
use crate::ids::{GuestGid, GuestUid, NodeId, Unique};
use crate::init::Layout;
use crate::name::NameError;
use crate::opcode::Opcode;
use crate::request::{Header, Operation, Request};

/// Bytes of the header in front of every request.
pub const IN_HEADER_SIZE: usize = size_of::<abi::InHeader>();
/// Bytes of WRITE's arguments; its data follows them.
pub const WRITE_IN_SIZE: usize = size_of::<abi::WriteIn>();
/// Bytes of READ's arguments.
const READ_IN_SIZE: usize = size_of::<abi::ReadIn>();
/// Bytes that the arguments of a request other than WRITE may have: the longest are an xattr's
/// value (64 KiB) and a BATCH_FORGET.
pub const MAX_ARGUMENTS: usize = 256 << 10;

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The opcode is none of the protocol's.
    #[error("opcode {0} is unknown")]
    UnknownOpcode(u32),
    /// The header's length is not that of the request.
    #[error("the header declares {declared} bytes, the request has {actual}")]
    Length {
        /// `len` of the header.
        declared: u32,
        /// Bytes of the request.
        actual: usize,
    },
    /// The arguments end early.
    #[error("{0:?} ends within its arguments")]
    Truncated(Opcode),
    /// The arguments have more than [`MAX_ARGUMENTS`].
    #[error("{0:?} has {1} bytes of arguments, the limit is {MAX_ARGUMENTS}")]
    TooLong(Opcode, usize),
    /// A name without its NUL.
    #[error("a name in {0:?} has no NUL at its end")]
    UnterminatedName(Opcode),
    /// An invalid name.
    #[error("{1} in {0:?}")]
    Name(Opcode, NameError),
    /// A number that no kernel sends: an offset past `i64::MAX`, a lock of an unknown kind.
    #[error("{0:?} has an argument out of range")]
    Range(Opcode),
    /// Malformed extensions.
    #[error("the extensions of {0:?} are malformed")]
    Extensions(Opcode),
}

impl DecodeError {
    /// The error for the reply.
    pub fn errno(self) -> Errno {
        match self {
            DecodeError::UnknownOpcode(_) => Errno::NOSYS,
            DecodeError::Name(_, error) => error.errno(),
            _ => Errno::INVAL,
        }
    }
}

/// A value, or why bytes are no request.
pub(crate) type Result<T> = core::result::Result<T, DecodeError>;

/// The header of a request as it was sent, with its opcode looked up; nothing else is checked.
#[derive(Clone, Copy, Debug)]
pub struct RawHeader {
    wire: abi::InHeader,
    opcode: Option<Opcode>,
}

impl From<abi::InHeader> for RawHeader {
    fn from(wire: abi::InHeader) -> RawHeader {
        RawHeader { wire, opcode: Opcode::from_number(wire.opcode) }
    }
}

impl RawHeader {
    /// The header as it was sent.
    pub fn wire(&self) -> &abi::InHeader {
        &self.wire
    }

    /// The kind of request; `None` for one that is none of the protocol's.
    pub fn opcode(&self) -> Option<Opcode> {
        self.opcode
    }

    /// The guest's number for the request.
    pub fn unique(&self) -> Unique {
        Unique(self.wire.unique)
    }

    fn known_opcode(&self) -> Result<Opcode> {
        self.opcode.ok_or(DecodeError::UnknownOpcode(self.wire.opcode))
    }

    /// Bytes of arguments behind this header, in a request of `actual` bytes: all but the header, and of a
    /// WRITE not its data.
    pub fn argument_bytes(&self, actual: usize) -> Result<usize> {
        let opcode = self.known_opcode()?;
        let behind_header = actual.checked_sub(IN_HEADER_SIZE);
        if let (Opcode::Read | Opcode::Readlink, Some(bytes)) = (opcode, behind_header) {
            // The Windows driver counts the reply's data in the header's length: the request's own counts.
            return Ok(bytes.min(READ_IN_SIZE));
        }
        let wrong_length = DecodeError::Length { declared: self.wire.len, actual };
        let declared = usize::try_from(self.wire.len).map_err(|_| wrong_length)?;
        if declared > actual {
            return Err(wrong_length);
        }
        let arguments = declared.checked_sub(IN_HEADER_SIZE).ok_or(wrong_length)?;
        match opcode {
            Opcode::Write => Ok(arguments.min(WRITE_IN_SIZE)),
            _ if arguments > MAX_ARGUMENTS => Err(DecodeError::TooLong(opcode, arguments)),
            _ => Ok(arguments),
        }
    }
}

impl<'a> Request<'a> {
    /// Decodes `arguments`, the [`RawHeader::argument_bytes`] behind `raw`.
    pub fn decode(raw: &RawHeader, arguments: &'a [u8], layout: Layout) -> Result<Request<'a>> {
        let opcode = raw.known_opcode()?;
        let wire = raw.wire();
        let (arguments, extensions) = match layout.extensions && opcode.creates() {
            true => split_extensions(opcode, wire, arguments)?,
            // The header's last word is padding, which guests do not clear.
            false => (arguments, &[][..]),
        };
        let mut extensions = Extensions::parse(opcode, extensions)?;
        let header = Header {
            unique: Unique(wire.unique),
            opcode,
            node: NodeId(wire.nodeid),
            uid: GuestUid(wire.uid),
            gid: GuestGid(wire.gid),
            pid: wire.pid,
            supplementary_group: extensions.group,
        };
        let mut cursor = Cursor::new(opcode, raw, layout, arguments);
        let operation = Operation::decode(&mut cursor)?;
        if layout.trailing_labels && opcode.creates() {
            extensions = Extensions::parse(opcode, cursor.rest())?;
        }
        Ok(Request { header, operation, labels: extensions.labels })
    }
}

impl<'a> Operation<'a> {
    /// One line an opcode.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Operation<'a>> {
        Ok(match cursor.opcode() {
            Opcode::Lookup => Operation::Lookup(cursor.arguments()?),
            Opcode::Forget => Operation::Forget(cursor.arguments()?),
            Opcode::Getattr => Operation::Getattr(cursor.arguments()?),
            Opcode::Setattr => Operation::Setattr(cursor.arguments()?),
            Opcode::Readlink => Operation::Readlink,
            Opcode::Symlink => Operation::Symlink(cursor.arguments()?),
            Opcode::Mknod => Operation::Mknod(cursor.arguments()?),
            Opcode::Mkdir => Operation::Mkdir(cursor.arguments()?),
            Opcode::Unlink => Operation::Unlink(cursor.arguments()?),
            Opcode::Rmdir => Operation::Rmdir(cursor.arguments()?),
            Opcode::Rename | Opcode::Rename2 => Operation::Rename(cursor.arguments()?),
            Opcode::Link => Operation::Link(cursor.arguments()?),
            Opcode::Open => Operation::Open(cursor.arguments()?),
            Opcode::Read => Operation::Read(cursor.arguments()?),
            Opcode::Write => Operation::Write(cursor.arguments()?),
            Opcode::Statfs => Operation::Statfs,
            Opcode::Release => Operation::Release(cursor.arguments()?),
            Opcode::Fsync => Operation::Fsync(cursor.arguments()?),
            Opcode::Setxattr => Operation::Setxattr(cursor.arguments()?),
            Opcode::Getxattr => Operation::Getxattr(cursor.arguments()?),
            Opcode::Listxattr => Operation::Listxattr(cursor.arguments()?),
            Opcode::Removexattr => Operation::Removexattr(cursor.arguments()?),
            Opcode::Flush => Operation::Flush(cursor.arguments()?),
            Opcode::Init => Operation::Init(cursor.arguments()?),
            Opcode::Opendir => Operation::Opendir(cursor.arguments()?),
            Opcode::Readdir | Opcode::Readdirplus => Operation::Readdir(cursor.arguments()?),
            Opcode::Releasedir => Operation::Releasedir(cursor.arguments()?),
            Opcode::Fsyncdir => Operation::Fsyncdir(cursor.arguments()?),
            Opcode::Getlk => Operation::Getlk(cursor.arguments()?),
            Opcode::Setlk => Operation::Setlk(cursor.arguments()?),
            Opcode::Setlkw => Operation::Setlkw(cursor.arguments()?),
            Opcode::Access => Operation::Access(cursor.arguments()?),
            Opcode::Create => Operation::Create(cursor.arguments()?),
            Opcode::Interrupt => Operation::Interrupt(cursor.arguments()?),
            Opcode::Destroy => Operation::Destroy,
            Opcode::Ioctl => Operation::Ioctl(cursor.arguments()?),
            Opcode::BatchForget => Operation::BatchForget(cursor.arguments()?),
            Opcode::Fallocate => Operation::Fallocate(cursor.arguments()?),
            Opcode::Lseek => Operation::Lseek(cursor.arguments()?),
            Opcode::CopyFileRange | Opcode::CopyFileRange64 => Operation::CopyFileRange(cursor.arguments()?),
            Opcode::Syncfs => Operation::Syncfs,
            Opcode::Tmpfile => Operation::Tmpfile(cursor.arguments()?),
            Opcode::Statx => Operation::Statx(cursor.arguments()?),
            Opcode::Bmap => Operation::Bmap(cursor.arguments()?),
            Opcode::Poll => Operation::Poll(cursor.arguments()?),
            Opcode::NotifyReply => Operation::NotifyReply(cursor.arguments()?),
            Opcode::SetupMapping => Operation::SetupMapping(cursor.arguments()?),
            Opcode::RemoveMapping => Operation::RemoveMapping(cursor.arguments()?),
        })
    }
}

/// Cuts the extensions off the end of the arguments.
fn split_extensions<'a>(
    opcode: Opcode,
    raw: &abi::InHeader,
    arguments: &'a [u8],
) -> Result<(&'a [u8], &'a [u8])> {
    let extensions = usize::from(raw.total_extlen) * abi::RECORD_ALIGN;
    let split = arguments.len().checked_sub(extensions).ok_or(DecodeError::Extensions(opcode))?;
    arguments.split_at_checked(split).ok_or(DecodeError::Extensions(opcode))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::format;
    use std::string::String;
    use std::vec;

    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    /// A session with extensions.
    const EXTENDED: Layout =
        Layout { long_setxattr: false, trailing_labels: false, extensions: true, open_flags: false };

    fn header(opcode: u32, len: usize) -> RawHeader {
        let len = u32::try_from(len).unwrap();
        abi::InHeader { len, opcode, unique: 1, nodeid: 1, ..Default::default() }.into()
    }

    /// As a server does it: the declared length is the message's.
    fn decode(opcode: Opcode, arguments: &[u8]) -> Result<String> {
        let header = header(opcode as u32, IN_HEADER_SIZE + arguments.len());
        let count = header.argument_bytes(IN_HEADER_SIZE + arguments.len())?;
        Request::decode(&header, &arguments[..count], Layout::default())
            .map(|request| format!("{:?}", request.operation))
    }

    #[test]
    fn a_rename_has_two_names() {
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
    fn a_write_has_as_much_data_as_it_declares() {
        let write = abi::WriteIn { size: 100, ..Default::default() };
        for (len, good) in [(180, true), (179, false), (181, false), (80, false), (60, false)] {
            let header = header(Opcode::Write as u32, len);
            let count = header.argument_bytes(len).unwrap();
            let decoded = Request::decode(&header, &write.as_bytes()[..count], Layout::default());
            assert_eq!(decoded.is_ok(), good, "{len}");
        }
    }

    #[test]
    fn the_declared_length_counts() {
        assert!(header(3, 56).argument_bytes(56).is_ok());
        assert_eq!(header(3, 56).argument_bytes(60), Ok(16));
        assert!(header(3, 57).argument_bytes(56).is_err());
        assert!(header(3, 39).argument_bytes(56).is_err());
        assert!(header(3, IN_HEADER_SIZE + MAX_ARGUMENTS + 1).argument_bytes(1 << 30).is_err());
        assert_eq!(header(7, 40).argument_bytes(40), Err(DecodeError::UnknownOpcode(7)));
    }

    #[test]
    fn the_group_of_an_extension_is_found() {
        let mut bytes = [0; 8].to_vec();
        bytes.extend(b"directory\0");
        bytes.extend([0; 6]);
        bytes.extend([16u32, 32, 1, 4711].iter().flat_map(|word| word.to_le_bytes()));
        let mut header = header(Opcode::Mkdir as u32, IN_HEADER_SIZE + bytes.len());
        header.wire.total_extlen = 2;
        let request = Request::decode(&header, &bytes, EXTENDED).unwrap();
        assert_eq!(request.header.supplementary_group, Some(GuestGid(4711)));
        for wrong in [100, 1] {
            header.wire.total_extlen = wrong;
            assert!(matches!(Request::decode(&header, &bytes, EXTENDED), Err(DecodeError::Extensions(_))));
            // Where none were agreed on the word is padding.
            let request = Request::decode(&header, &bytes, Layout::default()).unwrap();
            assert_eq!(request.header.supplementary_group, None);
        }
    }

    #[test]
    fn extensions_are_of_creating_requests_alone() {
        for (opcode, _) in Opcode::ALL {
            let mut bytes = vec![0; 64];
            bytes.splice(..0, *b"n\0second\0");
            let bytes = if matches!(opcode, Opcode::Write) { vec![0; WRITE_IN_SIZE] } else { bytes };
            let mut header = header(*opcode as u32, IN_HEADER_SIZE + bytes.len());
            let plain = Request::decode(&header, &bytes, EXTENDED).map(|request| format!("{request:?}"));
            header.wire.total_extlen = 0x1234;
            let uncleared = Request::decode(&header, &bytes, EXTENDED).map(|request| format!("{request:?}"));
            match opcode.creates() {
                true => assert_eq!(uncleared, Err(DecodeError::Extensions(*opcode))),
                false => assert_eq!(uncleared, plain, "{opcode:?}"),
            }
        }
    }

    #[test]
    fn a_read_is_as_long_as_its_message() {
        let read = abi::ReadIn { fh: 3, offset: 4096, size: 10, ..Default::default() };
        for declared in [80, 40, 50, 1 << 24, 0] {
            let header = header(Opcode::Read as u32, declared);
            assert_eq!(header.argument_bytes(80), Ok(40));
            let request = Request::decode(&header, read.as_bytes(), Layout::default()).unwrap();
            assert!(format!("{:?}", request.operation).contains("size: 10"));
            assert!(header.argument_bytes(39).is_err());
        }
    }

    #[test]
    fn open_flags_count_where_they_were_negotiated() {
        let open = abi::OpenIn { flags: 0, open_flags: 1 };
        let header = header(Opcode::Open as u32, IN_HEADER_SIZE + 8);
        for (layout, kill) in
            [(Layout::default(), false), (Layout { open_flags: true, ..Layout::default() }, true)]
        {
            let request = Request::decode(&header, open.as_bytes(), layout).unwrap();
            assert_eq!(format!("{:?}", request.operation).contains("KILL_SUIDGID"), kill);
        }
    }

    #[test]
    fn an_ioctl_has_as_many_bytes_as_it_declares() {
        let ioctl = abi::IoctlIn { in_size: 4, ..Default::default() };
        let bytes = [ioctl.as_bytes(), &[1, 2, 3, 4]].concat();
        assert!(decode(Opcode::Ioctl, &bytes).unwrap().contains("data: [1, 2, 3, 4]"));
        assert_eq!(decode(Opcode::Ioctl, &bytes[..35]), Err(DecodeError::Truncated(Opcode::Ioctl)));
        let ioctl = abi::IoctlIn { in_size: u32::MAX, ..Default::default() };
        assert_eq!(decode(Opcode::Ioctl, ioctl.as_bytes()), Err(DecodeError::Truncated(Opcode::Ioctl)));
    }

    #[test]
    fn init_of_an_old_guest_is_short() {
        let init = abi::InitIn { major: 7, minor: 27, flags: 1, ..Default::default() };
        assert!(decode(Opcode::Init, &init.as_bytes()[..16]).unwrap().contains("minor: 27"));
        assert!(decode(Opcode::Init, &init.as_bytes()[..15]).is_err());
        assert!(decode(Opcode::Init, init.as_bytes()).is_ok());
    }

    proptest! {
        /// Total: no bytes make it panic, and the arguments lie within the message.
        #[test]
        fn any_bytes_decode(
            opcode in 0u32..60, bytes in proptest::collection::vec(any::<u8>(), 0..300),
            declared in 0usize..400, extensions in 0u16..5, long: bool, extended: bool, open_flags: bool,
        ) {
            let mut header = header(opcode, declared);
            header.wire.total_extlen = extensions;
            if let Ok(count) = header.argument_bytes(IN_HEADER_SIZE + bytes.len()) {
                prop_assert!(count <= bytes.len());
                let layout =
                    Layout { long_setxattr: long, trailing_labels: !long, extensions: extended, open_flags };
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
