//! Flags and attributes of files that only ioctl(2) reads and changes.

use std::os::fd::BorrowedFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Result;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

/// `struct fsxattr` of linux/fs.h: five 32-bit words (flags, extent size, extents, project, extent size of
/// copies) and padding.
pub type Attributes = [u8; 28];

const FS_IOC_FSGETXATTR: Opcode = opcode::read::<Attributes>(b'X', 31);
const FS_IOC_FSSETXATTR: Opcode = opcode::write::<Attributes>(b'X', 32);

/// The commands of the functions below. Those for flags are named after a long, though they move an int.
pub const COMMANDS: [Opcode; 4] = [
    opcode::read::<libc::c_long>(b'f', 1),
    opcode::write::<libc::c_long>(b'f', 2),
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
];

/// `FS_IOC_GETFLAGS`: `FS_*_FL`.
pub fn flags(file: BorrowedFd<'_>) -> Result<u32> {
    ioctl_getflags(file).map(|flags| flags.bits())
}

/// `FS_IOC_SETFLAGS`.
pub fn set_flags(file: BorrowedFd<'_>, flags: u32) -> Result<()> {
    ioctl_setflags(file, IFlags::from_bits_retain(flags))
}

/// `FS_IOC_FSGETXATTR`.
pub fn attributes(file: BorrowedFd<'_>) -> Result<Attributes> {
    // SAFETY: the command fills a struct fsxattr, which has these bytes and no pointers.
    unsafe { ioctl(file, Getter::<FS_IOC_FSGETXATTR, Attributes>::new()) }
}

/// `FS_IOC_FSSETXATTR`.
pub fn set_attributes(file: BorrowedFd<'_>, attributes: Attributes) -> Result<()> {
    // SAFETY: the command reads a struct fsxattr, which has these bytes and no pointers.
    unsafe { ioctl(file, Setter::<FS_IOC_FSSETXATTR, Attributes>::new(attributes)) }
}
