//! The host's descriptors of one open file.
//!
//! A program may clear O_DIRECT after the open, as dd(1) does for its last block, and a guest that writes back its
//! page cache uses any handle of the file. Such requests have any length, which the host refuses on a descriptor
//! with O_DIRECT. So the first of them opens a second descriptor without that flag.
//!
//! A FUSE server takes any length, and the host's kernel lets one thread at a time write to its file, but many
//! asynchronous requests with O_DIRECT. So a file in parallel mode is open with O_DIRECT there whatever the guest's program
//! said ([`HostFile::for_parallel`]). All requests go by that descriptor: pages that the kernel reads ahead for
//! another one could be older than what is being written.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::Host;
use crate::fs::Result;
use crate::limits::{FdQuota, GuestFd};

/// Requests of whole blocks of this many bytes are taken by all servers that take O_DIRECT.
const BLOCK: u64 = 4096;
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
    /// `file` has bypassed it once.
    given_up: AtomicBool,
    /// The same file through the host's page cache.
    buffered: OnceLock<GuestFd>,
    /// The same file, open with O_APPEND.
    appender: OnceLock<GuestFd>,
}

impl HostFile {
    /// A file, or a directory, that was opened with `flags`.
    pub fn new(file: GuestFd, flags: OFlags) -> HostFile {
        let direct = AtomicBool::new(flags.contains(OFlags::DIRECT));
        HostFile {
            file,
            flags,
            direct,
            given_up: AtomicBool::new(false),
            buffered: OnceLock::new(),
            appender: OnceLock::new(),
        }
    }

    /// The same file with O_DIRECT, for requests of any length, whether or not the guest has asked for O_DIRECT.
    pub fn for_parallel(self, open: Opener<'_>) -> Result<HostFile> {
        if self.is_direct() {
            return Ok(self);
        }
        match open.again(self.fd(), self.flags & SHARED | OFlags::DIRECT) {
            Ok(file) => Ok(HostFile { file, direct: AtomicBool::new(true), ..self }),
            // The server does not want it.
            Err(Errno::INVAL) => Ok(self),
            Err(errno) => Err(errno),
        }
    }

    /// A file that an earlier process has opened with `flags`. It may have given up O_DIRECT since, or be open with it
    /// for many writers.
    pub fn restored(file: GuestFd, flags: OFlags) -> HostFile {
        let now = fcntl_getfl(&file).unwrap_or(OFlags::empty());
        let is_direct = now.contains(OFlags::DIRECT);
        let restored = HostFile::new(file, flags);
        restored.given_up.store(now.contains(OFlags::NONBLOCK), Ordering::Relaxed);
        restored.direct.store(is_direct, Ordering::Release);
        restored
    }

    /// What it was opened with.
    pub fn flags(&self) -> OFlags {
        self.flags
    }

    /// The descriptor that was opened first.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// All descriptors.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.file).chain(self.buffered.get()).chain(self.appender.get()).map(AsFd::as_fd)
    }

    /// The descriptors besides the first that may have been written through.
    pub fn others(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all().skip(1)
    }

    /// A descriptor that is open with O_APPEND.
    ///
    /// For a file system whose server appends: pwritev2(2) with RWF_APPEND sends it an offset, which is the end as this
    /// host has last seen it, and nothing that says that it is an append.
    pub fn appender(&self, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        if self.is_append_only() {
            return Ok(self.fd());
        }
        if let Some(file) = self.appender.get() {
            return Ok(file.as_fd());
        }
        let file = open.again(self.fd(), self.flags & SHARED | OFlags::APPEND)?;
        Ok(self.appender.get_or_init(|| file).as_fd())
    }

    /// Whether requests can bypass the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Acquire)
    }

    /// Whether it bypasses the host's page cache for requests of any length.
    pub fn takes_any_length(&self) -> bool {
        !self.flags.contains(OFlags::DIRECT) && self.is_direct()
    }

    /// Whether O_DIRECT was cleared, and O_NONBLOCK set with it.
    pub fn has_given_up_direct(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// A request was refused for its length or its place. Returns whether it is to be tried again, through the host's page
    /// cache, and so are all that come.
    pub fn refuse_any_length(&self) -> bool {
        if self.flags.contains(OFlags::DIRECT) {
            return false;
        }
        if self.buffered.get().is_some() {
            self.direct.store(false, Ordering::Release);
            return true;
        }
        // Another request may have done so.
        !self.is_direct() || self.give_up_direct(Errno::INVAL).is_ok()
    }

    /// The descriptor for requests after that.
    pub fn after_refusal(&self) -> BorrowedFd<'_> {
        self.buffered.get().unwrap_or(&self.file).as_fd()
    }

    /// A second descriptor, without O_DIRECT.
    fn second(&self, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        if let Some(file) = self.buffered.get() {
            return Ok(file.as_fd());
        }
        let file = open.again(self.fd(), self.flags & SHARED)?;
        Ok(self.buffered.get_or_init(|| file).as_fd())
    }

    /// A descriptor without O_DIRECT, or the first one if it cannot be had.
    pub fn for_growing(&self, open: Opener<'_>) -> BorrowedFd<'_> {
        self.second(open).unwrap_or(self.file.as_fd())
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

    /// The descriptor for a request of these bytes by a program whose file flags are `now`.
    ///
    /// O_DIRECT that is set after the open has no effect on the host. A server may refuse a request for its length or its
    /// place, and clearing O_DIRECT then would not do: GlusterFS goes by the flags of the open. So a second descriptor is
    /// there before.
    pub fn for_request(&self, offset: u64, size: u32, now: u32, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        let is_whole = (offset | u64::from(size)).is_multiple_of(BLOCK);
        if !is_whole && self.takes_any_length() {
            // Without it the server may refuse the request, and others go on past the cache.
            let _ = self.second(open);
        }
        let is_first = now & OFlags::DIRECT.bits() != 0 && self.is_direct();
        if is_first { Ok(self.fd()) } else { self.buffered(open) }
    }

    /// The same, after [`HostFile::for_request`].
    pub fn opened_for(&self, now: u32) -> BorrowedFd<'_> {
        let is_first = now & OFlags::DIRECT.bits() != 0 && self.is_direct() || self.takes_any_length();
        self.buffered.get().filter(|_| !is_first).unwrap_or(&self.file).as_fd()
    }

    /// A descriptor that takes requests of any length.
    pub fn buffered(&self, open: Opener<'_>) -> Result<BorrowedFd<'_>> {
        if self.takes_any_length() || !self.is_direct() && self.buffered.get().is_none() {
            return Ok(self.fd());
        }
        self.second(open).or_else(|errno| self.give_up_direct(errno).map(|()| self.fd()))
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
        self.given_up.store(true, Ordering::Relaxed);
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

    /// A second open file of what `file` has open, which is asked for errors of writeback and for nothing else.
    pub fn witness(self, file: BorrowedFd<'_>) -> Result<GuestFd> {
        self.again(file, OFlags::RDONLY)
    }

    /// A second open file of what `file` has open, for reading and writing, and through the host's page cache.
    pub fn for_mapping(self, file: BorrowedFd<'_>) -> Result<GuestFd> {
        self.again(file, OFlags::RDWR | OFlags::NOATIME).or_else(|_| self.again(file, OFlags::RDWR))
    }

    /// Opens what `file` has open, whatever has become of its name.
    fn again(self, file: BorrowedFd<'_>, flags: OFlags) -> Result<GuestFd> {
        let permit = self.fds.acquire()?;
        Ok(permit.wrap(self.host.open(file, flags, Mode::empty())?))
    }
}
