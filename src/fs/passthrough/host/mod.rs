//! System calls that reach an inode of the host, however it is held.
//!
//! No call takes a path that a guest made. A name is one component, looked up in the descriptor of its directory
//! without following links; an inode is reached by its O_PATH descriptor, or by that descriptor's number in
//! `/proc/self/fd` where the system call takes no descriptor.
//!
//! What is opened for the guest has no O_CLOEXEC: an upgrade executes the new program in the process that shares all
//! descriptors, and to clear the flag of each would take longer than the rest of it. Nothing else is ever executed.

pub mod file;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, Timestamps, openat, statx, utimensat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::DecInt;

use crate::fs::Result;

/// What statx(2) is asked for: all that replies need, and the mount.
pub const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);
/// An O_PATH descriptor of an entry itself, whatever it is: nothing is opened or followed.
pub const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW);

/// Attributes of what `fd` refers to.
pub fn stat(fd: impl AsFd) -> Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// Attributes of the entry `name` of a directory.
pub fn stat_entry(directory: impl AsFd, name: &std::ffi::CStr) -> Result<Statx> {
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// The type of an inode.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// The name of an inode below the working directory, which is `/proc/self/fd`: for system calls that take no
/// descriptor. The kernel goes from there straight to the inode, also if it is a symbolic link.
///
/// `path` has to stay open for as long as the name is used.
pub fn proc_name(path: impl AsFd) -> DecInt {
    DecInt::from_fd(path)
}

/// Where [`proc_name`] is looked up.
pub const PROC: BorrowedFd<'static> = CWD;

/// Opens again what a descriptor refers to.
#[derive(Debug)]
pub struct Host {
    /// `/proc/self/fd`.
    proc_self_fd: OwnedFd,
    /// Access times of the share must not change.
    keep_atime: bool,
}

impl Host {
    /// `proc_self_fd` is the directory `/proc/self/fd` of this process.
    pub fn new(proc_self_fd: OwnedFd, keep_atime: bool) -> Host {
        Host { proc_self_fd, keep_atime }
    }

    /// Opens what `fd` refers to with `flags`, whatever has become of its name. `mode` is for O_TMPFILE.
    pub fn open(&self, fd: impl AsFd, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
        openat(&self.proc_self_fd, DecInt::from_fd(fd), flags, mode)
    }

    /// The same for a file or directory that the guest reads; the access time of a read-only share stays.
    pub fn open_for_guest(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
        if self.keep_atime {
            // Only the owner and CAP_FOWNER may.
            match self.open(&fd, flags | OFlags::NOATIME, Mode::empty()) {
                Err(Errno::PERM) => {}
                result => return result,
            }
        }
        self.open(fd, flags, Mode::empty())
    }

    /// An O_PATH descriptor of what `file` has open.
    pub fn path_of(&self, file: &OwnedFd) -> Result<OwnedFd> {
        path_by_tree(file).or_else(|_| self.open(file, OFlags::PATH, Mode::empty()))
    }
}

/// As [`Host::path_of`], without a walk through /proc. It fails on hosts before Linux 5.2, and in containers that
/// forbid the call.
fn path_by_tree(file: &OwnedFd) -> Result<OwnedFd> {
    open_tree(file, c"", OpenTreeFlags::AT_EMPTY_PATH)
}

/// Sets the times of what `path`, which may be an O_PATH descriptor, refers to.
pub fn set_times(path: impl AsFd, times: &Timestamps) -> Result<()> {
    match utimensat(&path, c"", times, AtFlags::EMPTY_PATH) {
        // Hosts before Linux 5.8 do not know the flag here.
        Err(Errno::INVAL | Errno::NOENT) => set_times_by_name(&path, times),
        result => result,
    }
}

fn set_times_by_name(path: impl AsFd, times: &Timestamps) -> Result<()> {
    utimensat(PROC, proc_name(path), times, AtFlags::empty())
}

#[cfg(test)]
mod tests {
    use rustix::fs::Timespec;

    use super::*;

    #[test]
    fn an_open_file_has_a_path_also_without_a_name() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let name = folder.path().join("file");
        let file: OwnedFd = std::fs::File::create(&name).unwrap().into();
        let unnamed = openat(CWD, folder.path(), OFlags::TMPFILE | OFlags::RDWR, Mode::empty()).unwrap();
        std::fs::remove_file(&name).unwrap();
        let identity = |stat: Statx| (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, stat.stx_mnt_id);
        for file in [file, unnamed] {
            let path = path_by_tree(&file).unwrap();
            assert_eq!(identity(stat(&path).unwrap()), identity(stat(&file).unwrap()));
            assert!(rustix::fs::fcntl_getfl(&path).unwrap().contains(OFlags::PATH));
            let flags = rustix::io::fcntl_getfd(&path).unwrap();
            assert!(flags.is_empty(), "an upgrade keeps it");
        }
    }

    #[test]
    fn times_are_set_without_the_flag_of_newer_hosts() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let [file, link, fifo] = ["file", "link", "fifo"].map(|name| folder.path().join(name));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        rustix::fs::mknodat(PROC, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let proc = std::fs::File::open("/proc/self/fd").unwrap();
        for (number, name) in [&link, &fifo, &file].into_iter().enumerate() {
            let path = openat(PROC, name, PATH, Mode::empty()).unwrap();
            let time = Timespec { tv_sec: -7 - i64::try_from(number).unwrap(), tv_nsec: 5 };
            let times = Timestamps { last_access: time, last_modification: time };
            // As `set_times_by_name`, but the working directory of a test is another one.
            utimensat(&proc, proc_name(&path), &times, AtFlags::empty()).unwrap();
            assert_eq!(stat(&path).unwrap().stx_mtime.tv_sec, time.tv_sec);
            assert_eq!(set_times(&path, &times), Ok(()));
        }
        // The link's own, not those of its target.
        assert_eq!(stat(openat(PROC, &link, PATH, Mode::empty()).unwrap()).unwrap().stx_mtime.tv_sec, -7);
    }
}
