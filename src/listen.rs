//! The socket at which the front end connects.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Gid, Mode};
use thiserror::Error;

use crate::config::Listen;

/// Why there is nothing to listen on.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ListenError {
    #[error("the socket {0} is in use by another daemon; end that one, or choose another --socket-path")]
    InUse(String),
    #[error("{0} is there and is no socket; remove it, or choose another --socket-path")]
    NoSocket(String),
    #[error("the directory of the socket {0} is not there; make it, or choose another --socket-path")]
    NoDirectory(String),
    #[error("the socket {path} cannot be made")]
    Make { path: String, source: io::Error },
    #[error("--socket-group: there is no group {0}")]
    NoGroup(String),
    #[error("--fd {0} is no listening socket; the caller has to pass one")]
    BadFd(RawFd),
}

/// A listening socket. If the daemon made it, its path is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    made: Option<Made>,
}

/// A path that is ours as long as the file behind it is.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    file: (u64, u64),
}

impl Socket {
    /// Listens as was asked.
    pub fn open(listen: &Listen, group: Option<&str>) -> Result<Socket, ListenError> {
        match listen {
            Listen::Path(path) => make(path, group),
            Listen::Fd(fd) => Ok(Socket { listener: take_over(*fd)?, made: None }),
        }
    }

    /// The socket itself.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Leaves the removal of the path to another process.
    pub fn keep_path(&mut self) {
        std::mem::forget(self.made.take());
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file) {
            // Somebody else may be faster.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn make(path: &Path, group: Option<&str>) -> Result<Socket, ListenError> {
    let name = || path.display().to_string();
    let failed = |source| ListenError::Make { path: name(), source };
    let group = group.map(find_group).transpose()?;
    // A path that the working directory does not matter to: it changes before the removal.
    let path = std::path::absolute(path).map_err(failed)?;
    if path.parent().is_some_and(|directory| !directory.is_dir()) {
        return Err(ListenError::NoDirectory(name()));
    }
    clear_the_way(&path)?;
    // Nobody else may connect before owner and mode are right.
    let umask = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let bound = UnixListener::bind(&path);
    rustix::process::umask(umask);
    let listener = bound.map_err(failed)?;
    let metadata = std::fs::symlink_metadata(&path).map_err(failed)?;
    let made = Some(Made { path: path.clone(), file: (metadata.dev(), metadata.ino()) });
    if let Some(group) = group {
        rustix::fs::chownat(CWD, &path, None, Some(group), rustix::fs::AtFlags::empty())
            .map_err(|errno| failed(errno.into()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    }
    Ok(Socket { listener, made })
}

/// Removes a socket that nobody listens on any more.
fn clear_the_way(path: &Path) -> Result<(), ListenError> {
    let name = || path.display().to_string();
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NoSocket(name()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| ListenError::Make { path: name(), source })
        }
        _ => Err(ListenError::InUse(name())),
    }
}

fn find_group(name: &str) -> Result<Gid, ListenError> {
    let id = std::fs::read_to_string("/etc/group").ok().and_then(|groups| group_id(&groups, name));
    id.map(Gid::from_raw).ok_or_else(|| ListenError::NoGroup(name.to_owned()))
}

/// The id of a group in the form of group(5), given its name or its id.
fn group_id(groups: &str, name: &str) -> Option<u32> {
    let by_name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    by_name.or_else(|| name.parse().ok())
}

fn take_over(fd: RawFd) -> Result<UnixListener, ListenError> {
    // SAFETY: borrowed for two questions only; a descriptor that is not open answers EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    if !rustix::net::sockopt::socket_acceptconn(borrowed).unwrap_or(false) {
        return Err(ListenError::BadFd(fd));
    }
    // A caller may have left it open for the children of the daemon, of which there are none.
    let _ = rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC);
    // SAFETY: the caller passed the descriptor to this process for this use, and the command line
    // names it once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<Socket, ListenError> {
        Socket::open(&Listen::Path(path.to_owned()), None)
    }

    #[test]
    fn a_socket_is_private_and_goes_with_its_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o77, 0);
        assert!(matches!(open(&path), Err(ListenError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let mut socket = open(&path).unwrap();
        socket.keep_path();
        drop(socket);
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "kept").unwrap();
        assert!(matches!(open(&path), Err(ListenError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
        assert!(matches!(open(&path.join("x/y")), Err(ListenError::NoDirectory(_))));
    }

    #[test]
    fn a_path_that_is_somebody_elses_now_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn groups_are_found_by_name_and_number() {
        let groups = "root:x:0:\nkvm:x:104:qemu,me\n";
        assert_eq!(group_id(groups, "kvm"), Some(104));
        assert_eq!(group_id(groups, "12"), Some(12));
        assert_eq!(group_id(groups, "nobody-here"), None);
    }

    #[test]
    fn a_descriptor_that_does_not_listen_is_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        use std::os::fd::AsRawFd;
        assert!(matches!(take_over(one.as_raw_fd()), Err(ListenError::BadFd(_))));
        assert!(matches!(take_over(9999), Err(ListenError::BadFd(9999))));
    }
}
