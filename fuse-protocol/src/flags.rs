//! Flag sets of the protocol. Names and values are those of `linux/fuse.h` without the prefix.

use bitflags::bitflags;

bitflags! {
    /// `FUSE_*` of INIT; the upper half travels in `flags2` (needs [`InitFlags::INIT_EXT`]).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// Reads may be sent before earlier ones are answered.
        const ASYNC_READ = 1 << 0;
        /// POSIX locks are the daemon's.
        const POSIX_LOCKS = 1 << 1;
        /// Unused by Linux.
        const FILE_OPS = 1 << 2;
        /// O_TRUNC comes with OPEN instead of a SETATTR of its own.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// LOOKUP of `.` and `..` works.
        const EXPORT_SUPPORT = 1 << 4;
        /// Writes may be longer than a page.
        const BIG_WRITES = 1 << 5;
        /// The guest leaves the umask to the daemon.
        const DONT_MASK = 1 << 6;
        /// Of /dev/fuse only.
        const SPLICE_WRITE = 1 << 7;
        /// Of /dev/fuse only.
        const SPLICE_MOVE = 1 << 8;
        /// Of /dev/fuse only.
        const SPLICE_READ = 1 << 9;
        /// flock(2) locks are the daemon's.
        const FLOCK_LOCKS = 1 << 10;
        /// IOCTL works on directories.
        const HAS_IOCTL_DIR = 1 << 11;
        /// The guest drops cached pages when it sees a changed mtime or size.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS works.
        const DO_READDIRPLUS = 1 << 13;
        /// The guest chooses between READDIR and READDIRPLUS.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct requests of one call may be sent together.
        const ASYNC_DIO = 1 << 15;
        /// The guest collects buffered writes and keeps size and mtime itself.
        const WRITEBACK_CACHE = 1 << 16;
        /// ENOSYS to OPEN means that opens are not needed; it would end parallel direct writes.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// Lookups and readdirs of one directory may overlap.
        const PARALLEL_DIROPS = 1 << 18;
        /// Superseded by [`InitFlags::HANDLE_KILLPRIV_V2`].
        const HANDLE_KILLPRIV = 1 << 19;
        /// POSIX ACLs are evaluated by the guest and stored as xattrs.
        const POSIX_ACL = 1 << 20;
        /// Of /dev/fuse only.
        const ABORT_ERROR = 1 << 21;
        /// `max_pages` of the reply counts.
        const MAX_PAGES = 1 << 22;
        /// READLINK replies may be cached. Not offered: such a target is cut at the link's st_size (up to
        /// Linux 6.13), which is 0 for links in /proc and /sys.
        const CACHE_SYMLINKS = 1 << 23;
        /// ENOSYS to OPENDIR means that it is not needed.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// Cached pages go only when the daemon says so.
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// DAX windows have an alignment.
        const MAP_ALIGNMENT = 1 << 26;
        /// Attributes may announce a submount.
        const SUBMOUNTS = 1 << 27;
        /// The daemon clears set-id bits where the guest asks for it.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// SETXATTR has the long form.
        const SETXATTR_EXT = 1 << 29;
        /// `flags2` counts.
        const INIT_EXT = 1 << 30;
        /// Creating requests carry a security context.
        const SECURITY_CTX = 1 << 32;
        /// DAX is chosen per inode.
        const HAS_INODE_DAX = 1 << 33;
        /// Creating requests carry the supplementary group that matters.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// Of notifications, which virtio-fs lacks.
        const HAS_EXPIRE_ONLY = 1 << 35;
        /// A file in direct mode may be mapped shared.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// Of /dev/fuse only.
        const PASSTHROUGH = 1 << 37;
        /// Node ids must not outlive their lookups (no NFS export).
        const NO_EXPORT_SUPPORT = 1 << 38;
        /// Of /dev/fuse only.
        const HAS_RESEND = 1 << 39;
        /// The guest may mount with mapped ids.
        const ALLOW_IDMAP = 1 << 40;
        /// Of /dev/fuse only.
        const OVER_IO_URING = 1 << 41;
        /// The guest gives up on requests after a time.
        const REQUEST_TIMEOUT = 1 << 42;
    }

    /// `FATTR_*`: which fields of a SETATTR count.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SetattrValid: u32 {
        /// `mode` counts.
        const MODE = 1 << 0;
        /// `uid` counts.
        const UID = 1 << 1;
        /// `gid` counts.
        const GID = 1 << 2;
        /// `size` counts.
        const SIZE = 1 << 3;
        /// `atime` counts.
        const ATIME = 1 << 4;
        /// `mtime` counts.
        const MTIME = 1 << 5;
        /// `fh` counts.
        const FH = 1 << 6;
        /// Set atime to now.
        const ATIME_NOW = 1 << 7;
        /// Set mtime to now.
        const MTIME_NOW = 1 << 8;
        /// `lock_owner` counts.
        const LOCKOWNER = 1 << 9;
        /// `ctime` counts (the host sets its own).
        const CTIME = 1 << 10;
        /// Clear set-id bits as for an unprivileged caller.
        const KILL_SUIDGID = 1 << 11;
    }

    /// `FOPEN_*`: how the guest is to treat an open file.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct OpenReplyFlags: u32 {
        /// Bypass the guest's page cache.
        const DIRECT_IO = 1 << 0;
        /// Keep what the page cache holds from before.
        const KEEP_CACHE = 1 << 1;
        /// No lseek.
        const NONSEEKABLE = 1 << 2;
        /// Cache the directory's entries.
        const CACHE_DIR = 1 << 3;
        /// A stream, no file position at all.
        const STREAM = 1 << 4;
        /// No FLUSH on close.
        const NOFLUSH = 1 << 5;
        /// Direct writes may run in parallel; counts only with [`OpenReplyFlags::DIRECT_IO`].
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// Of /dev/fuse only.
        const PASSTHROUGH = 1 << 7;
    }

    /// `FUSE_OPEN_*` of OPEN and CREATE.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct OpenRequestFlags: u32 {
        /// Clear set-id bits when the open truncates.
        const KILL_SUIDGID = 1 << 0;
    }

    /// `FUSE_WRITE_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: u32 {
        /// Written back from the guest's page cache; the caller's ids mean nothing.
        const CACHE = 1 << 0;
        /// `lock_owner` counts.
        const LOCKOWNER = 1 << 1;
        /// Clear set-id bits as for an unprivileged caller.
        const KILL_SUIDGID = 1 << 2;
    }

    /// `FUSE_RELEASE_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ReleaseFlags: u32 {
        /// FLUSH comes with the release.
        const FLUSH = 1 << 0;
        /// Drop flock(2) locks of the handle.
        const FLOCK_UNLOCK = 1 << 1;
    }

    /// `FUSE_GETATTR_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct GetattrFlags: u32 {
        /// `fh` counts.
        const FH = 1 << 0;
    }

    /// `FUSE_LK_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct LockFlags: u32 {
        /// A flock(2) lock, not a POSIX one.
        const FLOCK = 1 << 0;
    }

    /// `FUSE_IOCTL_*` of an IOCTL.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct IoctlFlags: u32 {
        /// The caller is a 32-bit program on a 64-bit kernel.
        const COMPAT = 1 << 0;
        /// The server may have the caller's memory read and written as it likes (CUSE only).
        const UNRESTRICTED = 1 << 1;
        /// The guest makes the call again (in replies only).
        const RETRY = 1 << 2;
        /// The caller is a 32-bit program.
        const _32BIT = 1 << 3;
        /// The handle is a directory's.
        const DIR = 1 << 4;
        /// The caller is an x32 program.
        const COMPAT_X32 = 1 << 5;
    }

    /// `FUSE_POLL_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PollFlags: u32 {
        /// The guest waits for a NOTIFY_POLL.
        const SCHEDULE_NOTIFY = 1 << 0;
    }

    /// `FUSE_SETUPMAPPING_FLAG_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SetupMappingFlags: u64 {
        /// The guest writes through the mapping.
        const WRITE = 1 << 0;
        /// The guest reads through the mapping.
        const READ = 1 << 1;
    }

    /// Flags of NOTIFY_INVAL_ENTRY.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct InvalEntryFlags: u32 {
        /// `FUSE_EXPIRE_ONLY`: the entry is looked up again, not dropped.
        const EXPIRE_ONLY = 1 << 0;
    }

    /// `FUSE_FSYNC_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct FsyncFlags: u32 {
        /// fdatasync(2) is enough.
        const FDATASYNC = 1 << 0;
    }

    /// `FUSE_ATTR_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct AttrFlags: u32 {
        /// The directory is the root of another file system.
        const SUBMOUNT = 1 << 0;
        /// Use DAX for this inode.
        const DAX = 1 << 1;
    }

    /// `FUSE_SETXATTR_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SetxattrFlags: u32 {
        /// Setting this ACL clears the set-group-id bit.
        const ACL_KILL_SGID = 1 << 0;
    }
}

impl OpenReplyFlags {
    /// Direct writes may run in parallel also where they extend the file; counts only with
    /// [`OpenReplyFlags::PARALLEL_DIRECT_WRITES`]. Not of Linux: the guest modules of lanefsd know it, and other guests
    /// ignore it.
    pub const PARALLEL_EXTENDING_WRITES: OpenReplyFlags = OpenReplyFlags::from_bits_retain(1 << 30);
}
