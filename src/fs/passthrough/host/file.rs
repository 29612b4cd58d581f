//! The host's descriptors of one open file.
//!
//! A program may clear O_DIRECT after the open, as dd(1) does for its last block, and a guest that writes back its
//! page cache uses any handle of the file. Such requests have any length, which the host refuses on a descriptor
//! with O_DIRECT. So the first of them opens a second descriptor without that flag.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{Mode, OFlags, fcntl_setfl};
use rustix::io::Errno;

use super::Host;
use crate::fs::Result;
use crate::limits::{FdQuota, GuestFd};

/// Flags that the second descriptor shares with the first.
const SHARED: OFlags =
    OFlags::RWMODE.union(OFlags::SYNC).union(OFlags::DSYNC).union(OFlags::APPEND).union(OFlags::NOATIME);

/// An open file of the host: one descriptor or two.
#[derive(Debug)]
pub struct HostFile {
    file: GuestFd,
    /// What it was opened with.
    flags: OFlags,
    /// `file` bypasses the host's page cache.
    direct: AtomicBool,
    /// The same file through the host's page cache.
    buffered: OnceLock<GuestFd>,
}

impl HostFile {
    /// A file, or a directory, that was opened with `flags`.
    pub fn new(file: GuestFd, flags: OFlags) -> HostFile {
        let direct = AtomicBool::new(flags.contains(OFlags::DIRECT));
        HostFile { file, flags, direct, buffered: OnceLock::new() }
    }

    /// The descriptor that was opened first.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// All descriptors.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.file).chain(self.buffered.get()).map(AsFd::as_fd)
    }

    /// Whether requests can bypass the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }

    /// Whether it can be read.
    pub fn is_readable(&self) -> bool {
        self.flags & OFlags::RWMODE != OFlags::WRONLY
    }

    /// Whether it can be written.
    pub fn is_writable(&self) -> bool {
        self.flags & OFlags::RWMODE != OFlags::RDONLY
    }

    /// Whether the host lets it be written at its end alone: the file has the append-only attribute
    /// (`chattr +a`), and is never open with O_APPEND otherwise.
    pub fn is_append_only(&self) -> bool {
        self.flags.contains(OFlags::APPEND)
    }

    /// The descriptor for a request whose program has its file open with the `O_*` flags `now`.
    ///
    /// O_DIRECT that is set after the open has no effect on the host.
    pub fn for_flags(&self, now: u32, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        if now & OFlags::DIRECT.bits() != 0 { Ok(self.fd()) } else { self.buffered(open) }
    }

    /// A descriptor that takes requests of any length.
    pub fn buffered(&self, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        if !self.is_direct() {
            return Ok(self.fd());
        }
        if let Some(file) = self.buffered.get() {
            return Ok(file.as_fd());
        }
        match open.again(self.fd(), self.flags & SHARED) {
            Ok(file) => Ok(self.buffered.get_or_init(|| file).as_fd()),
            Err(errno) => self.give_up_direct(errno).map(|()| self.fd()),
        }
    }

    /// Clears O_DIRECT of the first descriptor, where a second one cannot be had: no descriptor is
    /// left, or the daemon may not open the file again, as its mode has changed.
    fn give_up_direct(&self, errno: Errno) -> Result<()> {
        // The kernel refuses to clear O_APPEND of such a file.
        if self.is_append_only() {
            return Err(errno);
        }
        // It clears O_NOATIME as well. O_NONBLOCK means nothing to regular files, and is the one flag
        // that the filter of system calls lets F_SETFL set.
        fcntl_setfl(self.fd(), OFlags::NONBLOCK)?;
        self.direct.store(false, Ordering::Release);
        Ok(())
    }
}

/// Opens a file once more, within the guest's quota of descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Opener<'a> {
    host: &'a Host,
    fds: &'a Arc<FdQuota>,
}

impl<'a> Opener<'a> {
    /// Descriptors are counted by `fds`.
    pub fn new(host: &'a Host, fds: &'a Arc<FdQuota>) -> Opener<'a> {
        Opener { host, fds }
    }

    /// Opens what `file` has open, whatever has become of its name.
    fn again(self, file: BorrowedFd<'_>, flags: OFlags) -> Result<GuestFd> {
        let permit = self.fds.acquire()?;
        Ok(permit.wrap(self.host.open(file, flags, Mode::empty())?))
    }
}
