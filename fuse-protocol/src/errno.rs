//! Error numbers as they travel in a reply: those of Linux, whatever the server runs on.

use core::fmt;

/// An error number of Linux (`asm-generic/errno.h`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

impl Errno {
    /// ENOENT: no such entry.
    pub const NOENT: Errno = Errno(2);
    /// EIO: the server failed.
    pub const IO: Errno = Errno(5);
    /// EINVAL: a request that no kernel sends.
    pub const INVAL: Errno = Errno(22);
    /// ENOTTY: an ioctl that is not served.
    pub const NOTTY: Errno = Errno(25);
    /// ENAMETOOLONG.
    pub const NAMETOOLONG: Errno = Errno(36);
    /// ENOSYS: an operation that is not served. The guest's kernel does not send it again.
    pub const NOSYS: Errno = Errno(38);

    /// The error with this number; `None` for one that is not a valid error in a reply, which has to lie
    /// in 1 to 511 (`fuse_dev_do_write` of fs/fuse/dev.c).
    pub fn from_raw(number: i32) -> Option<Errno> {
        u16::try_from(number).ok().filter(|number| (1..512).contains(number)).map(Errno)
    }

    /// The number, greater than 0.
    pub fn raw(self) -> i32 {
        i32::from(self.0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}
