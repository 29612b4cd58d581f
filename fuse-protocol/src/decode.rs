//! Bytes to [`Request`]. Total: whatever a guest sends is a request or a [`DecodeError`].

mod cursor;

use rustix::io::Errno;
use thiserror::Error;

use self::cursor::Cursor;
use super::abi;
use super::extensions::Extensions;
use super::ids::{GuestGid, GuestUid, NodeId, Unique};
use super::init::Layout;
use super::name::NameError;
use super::opcode::Opcode;
use super::request::{Header, Request};

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
    let got = readable.checked_sub(IN_HEADER_SIZE);
    if let (Opcode::Read | Opcode::Readlink, Some(got)) = (opcode, got) {
        // The Windows driver counts the reply's data in the header's length: the chain's counts.
        return Ok(got.min(READ_IN_SIZE));
    }
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
        let (arguments, extensions) = match layout.extensions && opcode.creates() {
            true => split_extensions(opcode, raw, arguments)?,
            // The header's last word is padding, and guests leave rubbish there.
            false => (arguments, &[][..]),
        };
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
        let mut cursor = Cursor::new(opcode, layout, arguments);
        let operation = cursor.operation(raw)?;
        if layout.trailing_labels && opcode.creates() {
            extensions = Extensions::parse(opcode, cursor.rest())?;
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
    let split = arguments.len().checked_sub(extensions).ok_or(DecodeError::Extensions(opcode))?;
    arguments.split_at_checked(split).ok_or(DecodeError::Extensions(opcode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    /// A session with extensions.
    const EXTENDED: Layout =
        Layout { long_setxattr: false, trailing_labels: false, extensions: true, open_flags: false };

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
        let request = Request::decode(&header, &bytes, EXTENDED).unwrap();
        assert_eq!(request.header.supplementary_group, Some(GuestGid(4711)));
        for wrong in [100, 1] {
            header.total_extlen = wrong;
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
            header.total_extlen = 0x1234;
            let rubbish = Request::decode(&header, &bytes, EXTENDED).map(|request| format!("{request:?}"));
            match opcode.creates() {
                true => assert_eq!(rubbish, Err(DecodeError::Extensions(*opcode))),
                false => assert_eq!(rubbish, plain, "{opcode:?}"),
            }
        }
    }

    #[test]
    fn a_read_is_as_long_as_its_chain() {
        let read = abi::ReadIn { fh: 3, offset: 4096, size: 10, ..Default::default() };
        for told in [80, 40, 50, 1 << 24, 0] {
            let header = header(Opcode::Read as u32, told);
            assert_eq!(argument_bytes(&header, 80), Ok(40));
            let request = Request::decode(&header, read.as_bytes(), Layout::default()).unwrap();
            assert!(format!("{:?}", request.operation).contains("size: 10"));
            assert!(argument_bytes(&header, 39).is_err());
        }
    }

    #[test]
    fn how_to_open_is_said_by_those_who_agreed_on_it() {
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
    fn an_ioctl_brings_as_many_bytes_as_it_says() {
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
        /// Total: no bytes make it panic, and what it takes lies within what it was given.
        #[test]
        fn any_bytes_decode(
            opcode in 0u32..60, bytes in proptest::collection::vec(any::<u8>(), 0..300),
            told in 0usize..400, extensions in 0u16..5, long: bool, extended: bool, open_flags: bool,
        ) {
            let mut header = header(opcode, told);
            header.total_extlen = extensions;
            if let Ok(count) = argument_bytes(&header, IN_HEADER_SIZE + bytes.len()) {
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
