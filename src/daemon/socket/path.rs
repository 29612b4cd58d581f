//! The socket's path as a directory descriptor and a name, without races.
//!
//! The directory may belong to another user, who can replace its entries at any time. So symbolic links are not
//! followed, and a file that was checked is used through the descriptor that was checked.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::fchdir;

use super::ListenError;

/// The longest path of a socket (`sun_path` without the zero at its end).
pub(super) const MAX_LENGTH: usize = 107;

/// Device and inode number.
pub type FileId = (u64, u64);

/// The path of the socket.
#[derive(Debug)]
pub(super) struct SocketPath {
    /// `None` if it is the working directory.
    directory: Option<OwnedFd>,
    name: OsString,
    path: PathBuf,
}

/// A directory entry, held by an O_PATH descriptor.
#[derive(Debug)]
pub(super) struct Node {
    fd: OwnedFd,
    stat: Stat,
}

impl SocketPath {
    /// Looks up the directory of `path`.
    pub(super) fn of(path: &Path) -> Result<SocketPath, ListenError> {
        let shown = || path.display().to_string();
        let length = path.as_os_str().len();
        if length > MAX_LENGTH {
            return Err(ListenError::TooLong { path: shown(), length });
        }
        let name = path.file_name().ok_or_else(|| ListenError::NoName(shown()))?.to_owned();
        let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT => ListenError::NoDirectory(shown()),
            Errno::NOTDIR => ListenError::NotADirectory(shown()),
            Errno::ACCESS => ListenError::NotAllowed(shown()),
            errno => ListenError::Create { path: shown(), source: errno.into() },
        })?;
        Ok(SocketPath { directory: Some(directory), name, path: path.to_owned() })
    }

    /// The path whose directory is the working directory.
    pub(super) fn in_working_directory(path: &Path) -> SocketPath {
        let name = path.file_name().unwrap_or_default().to_owned();
        SocketPath { directory: None, name, path: path.to_owned() }
    }

    /// The directory.
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_ref().map_or(CWD, AsFd::as_fd)
    }

    /// Makes the directory the working directory of the process, and closes its descriptor.
    pub(super) fn enter_directory(&mut self) -> Result<(), Errno> {
        if let Some(directory) = &self.directory {
            fchdir(directory)?;
            self.directory = None;
        }
        Ok(())
    }

    /// The socket's name in it.
    pub(super) fn name(&self) -> &OsStr {
        &self.name
    }

    /// The socket's path, for messages.
    pub(super) fn display(&self) -> String {
        self.path.display().to_string()
    }

    /// The error for a failed creation of the socket.
    pub(super) fn failed(&self, source: io::Error) -> ListenError {
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => ListenError::NotAllowed(self.display()),
            _ => ListenError::Create { path: format!("the socket {}", self.display()), source },
        }
    }

    /// Opens the entry `name`, without following a symbolic link.
    pub(super) fn lookup(&self, name: &OsStr) -> io::Result<Option<Node>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(self.directory(), name, flags, Mode::empty()) {
            Ok(fd) => {
                let stat = fstat(&fd)?;
                Ok(Some(Node { fd, stat }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the entry `name`.
    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        match unlinkat(self.directory(), name, AtFlags::empty()) {
            Err(errno) if errno != Errno::NOENT => Err(errno.into()),
            _ => Ok(()),
        }
    }

    /// Removes `name` if it is this file.
    pub(super) fn remove_if(&self, name: &OsStr, file: FileId) {
        if self.is(name, file) {
            // Another process may be faster.
            let _ = self.remove(name);
        }
    }

    /// Whether `name` is this file.
    pub(super) fn is(&self, name: &OsStr, file: FileId) -> bool {
        statat(self.directory(), name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|now| (now.st_dev, now.st_ino) == file)
    }

    /// The name of a file beside the socket.
    pub(super) fn beside(&self, suffix: &str) -> OsString {
        let mut name = self.name.clone();
        name.push(suffix);
        name
    }

    /// The path of a file beside the socket, for messages.
    pub(super) fn display_beside(&self, suffix: &str) -> String {
        format!("{}{suffix}", String::from_utf8_lossy(self.path.as_os_str().as_bytes()))
    }
}

impl Node {
    /// Device and inode number.
    pub(super) fn id(&self) -> FileId {
        (self.stat.st_dev, self.stat.st_ino)
    }

    pub(super) fn is_socket(&self) -> bool {
        self.kind() == FileType::Socket
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind() == FileType::RegularFile
    }

    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// A path that always names this object.
    pub(super) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// Connects to the socket.
    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.path())
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
