//! IOCTL: the commands that read and change the flags of a file (chattr(1), lsattr(1)).
//!
//! All others are for devices and for file systems' own tools, and get ENOTTY. From Linux 5.13 on the guest's
//! kernel sends these four by itself, with sizes of its own; older ones pass on what a program asks for.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::errno::Errno;
use crate::flags::IoctlFlags;
use crate::request::Ioctl;

/// `FS_IOC_GETFLAGS` as 64-bit programs have it, by the size of a C long. The kernel has always moved an int.
pub const GETFLAGS: u32 = 0x8008_6601;
/// `FS_IOC_SETFLAGS`.
pub const SETFLAGS: u32 = 0x4008_6602;
/// `FS_IOC32_GETFLAGS`, of 32-bit programs.
const GETFLAGS_32: u32 = 0x8004_6601;
/// `FS_IOC32_SETFLAGS`.
const SETFLAGS_32: u32 = 0x4004_6602;
/// `FS_IOC_FSGETXATTR`.
pub const FSGETXATTR: u32 = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`.
pub const FSSETXATTR: u32 = 0x401c_5820;

/// `FS_PROJINHERIT_FL` of [`Command::SetFlags`].
pub const PROJINHERIT_FLAG: u32 = 0x2000_0000;
/// `FS_XFLAG_PROJINHERIT` of [`FileAttributes::xflags`].
pub const PROJINHERIT_XFLAG: u32 = 0x0000_0200;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct FileAttributes {
    /// `FS_XFLAG_*`.
    pub xflags: u32,
    /// Bytes by which the file grows.
    pub extsize: u32,
    /// Extents that it has.
    pub nextents: u32,
    /// The project that its blocks are counted for.
    pub projid: u32,
    /// Bytes by which copies grow.
    pub cowextsize: u32,
    /// Zero.
    pub padding: [u8; 8],
}

/// A command that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// FS_IOC_GETFLAGS.
    GetFlags,
    /// FS_IOC_SETFLAGS: `FS_*_FL`.
    SetFlags(u32),
    /// FS_IOC_FSGETXATTR.
    GetAttributes,
    /// FS_IOC_FSSETXATTR.
    SetAttributes(FileAttributes),
}

/// The result of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing.
    Done,
    /// `FS_*_FL`.
    Flags(u32),
    /// The struct.
    Attributes(FileAttributes),
}

/// Why an IOCTL is no [`Command`].
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum IoctlError {
    /// No command here has its number.
    #[error("ioctl {0:#x} is unknown")]
    Unknown(u32),
    /// The caller hands in, or has room for, another number of bytes than the command takes.
    #[error("ioctl {0:#x} has arguments of a wrong size")]
    Size(u32),
    /// It asks for access to the caller's memory ([`IoctlFlags::UNRESTRICTED`]).
    #[error("ioctl {0:#x} is unrestricted")]
    Unrestricted(u32),
}

impl IoctlError {
    /// The error for the reply.
    pub fn errno(self) -> Errno {
        match self {
            IoctlError::Unknown(_) => Errno::NOTTY,
            IoctlError::Size(_) | IoctlError::Unrestricted(_) => Errno::INVAL,
        }
    }
}

impl Ioctl<'_> {
    /// The command that it is.
    pub fn command(&self) -> Result<Command, IoctlError> {
        let Ioctl { flags, command, data, room, .. } = *self;
        let takes_flags = matches!(room, 4 | 8);
        let takes_attributes = usize::try_from(room).is_ok_and(|room| room == size_of::<FileAttributes>());
        let decoded = match command {
            GETFLAGS | GETFLAGS_32 => takes_flags.then_some(Command::GetFlags),
            SETFLAGS | SETFLAGS_32 => flags_in(data).map(Command::SetFlags),
            FSGETXATTR => takes_attributes.then_some(Command::GetAttributes),
            FSSETXATTR => FileAttributes::read_from_bytes(data).ok().map(Command::SetAttributes),
            _ => return Err(IoctlError::Unknown(command)),
        };
        if flags.contains(IoctlFlags::UNRESTRICTED) {
            return Err(IoctlError::Unrestricted(command));
        }
        decoded.ok_or(IoctlError::Size(command))
    }
}

impl Command {
    /// Whether the file may change.
    pub fn changes(self) -> bool {
        matches!(self, Command::SetFlags(_) | Command::SetAttributes(_))
    }
}

/// An int, or the long in whose first half older kernels send it.
fn flags_in(data: &[u8]) -> Option<u32> {
    let (flags, rest) = u32::read_from_prefix(data).ok()?;
    matches!(rest.len(), 0 | 4).then_some(flags)
}

impl Reply {
    /// The bytes for the caller.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Reply::Done => &[],
            Reply::Flags(flags) => flags.as_bytes(),
            Reply::Attributes(attributes) => attributes.as_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;

    use super::*;
    use crate::ids::HandleId;
    use proptest::prelude::*;

    fn decode(command: u32, data: &[u8], room: u32) -> Result<Command, Errno> {
        let flags = IoctlFlags::empty();
        Ioctl { handle: HandleId(1), flags, command, data, room }.command().map_err(IoctlError::errno)
    }

    #[test]
    fn both_widths_are_known_and_no_other_sizes() {
        for command in [GETFLAGS, GETFLAGS_32] {
            for room in 0..20 {
                let good = room == 4 || room == 8;
                assert_eq!(decode(command, &[], room), good.then_some(Command::GetFlags).ok_or(Errno::INVAL));
            }
        }
        for command in [SETFLAGS, SETFLAGS_32] {
            for len in 0..20 {
                let good = len == 4 || len == 8;
                let expected = good.then_some(Command::SetFlags(0x0303_0303)).ok_or(Errno::INVAL);
                assert_eq!(decode(command, &[3; 20][..len], 0), expected);
            }
        }
        for len in 0..60u32 {
            let data = vec![0; len.try_into().unwrap()];
            assert_eq!(decode(FSSETXATTR, &data, 0).is_ok(), len == 28);
            assert_eq!(decode(FSGETXATTR, &[], len).is_ok(), len == 28);
        }
    }

    #[test]
    fn unrestricted_ioctls_are_refused() {
        let flags = IoctlFlags::UNRESTRICTED;
        let ioctl = Ioctl { handle: HandleId(1), flags, command: GETFLAGS, data: &[], room: 8 };
        assert_eq!(ioctl.command(), Err(IoctlError::Unrestricted(GETFLAGS)));
    }

    proptest! {
        #[test]
        fn other_commands_are_unknown(command: u32, data in proptest::collection::vec(any::<u8>(), 0..40), room: u32) {
            let known = [GETFLAGS, SETFLAGS, GETFLAGS_32, SETFLAGS_32, FSGETXATTR, FSSETXATTR];
            let answer = decode(command, &data, room);
            prop_assert_eq!(answer == Err(Errno::NOTTY), !known.contains(&command));
        }
    }
}
