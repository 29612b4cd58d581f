//! The listening socket and its pid file.

mod group;
mod path;
mod pid_file;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use thiserror::Error;

use self::group::Group;
pub use self::path::FileId;
use self::path::{Node, SocketPath};
use self::pid_file::PidFile;
use crate::config::Listen;
use crate::process;

/// Why the daemon cannot listen.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ListenError {
    #[error(
        "the socket {path} is in use by another daemon{holder}; end that one, or choose another --socket-path"
    )]
    InUse { path: String, holder: String },
    #[error("{0} exists and is not a socket; remove it, or choose another --socket-path")]
    NoSocket(String),
    #[error("{0} exists and holds no process id; remove it, or choose another --socket-path")]
    NoPidFile(String),
    #[error("the directory of the socket {0} does not exist; create it, or choose another --socket-path")]
    NoDirectory(String),
    #[error("the directory of the socket {0} is not a directory; choose another --socket-path")]
    NotADirectory(String),
    #[error(
        "this user may not create the socket {0}; choose a --socket-path in a directory of the user, such as $XDG_RUNTIME_DIR"
    )]
    NotAllowed(String),
    #[error("--socket-path {0} does not end with the name of a socket; add one")]
    NoName(String),
    #[error(
        "the socket's path has {length} bytes, and the system allows {} for sockets; choose a shorter --socket-path than {path}",
        path::MAX_LENGTH
    )]
    TooLong { path: String, length: usize },
    #[error("cannot create {path}")]
    Create { path: String, source: io::Error },
    #[error(
        "the socket {0} was replaced while it was created; choose a --socket-path in a directory that no other user can write to"
    )]
    Replaced(String),
    #[error("--socket-group: there is no group {0}")]
    NoGroup(String),
    #[error("--socket-group {0} needs root, or a user who is a member of that group")]
    ForeignGroup(String),
    #[error("--fd {0} is not open; the launcher must pass a listening socket as that descriptor")]
    ClosedFd(RawFd),
    #[error("--fd {0} is not a socket; the launcher must pass a listening socket")]
    NoSocketFd(RawFd),
    #[error(
        "--fd {0} is a socket that does not listen; the launcher must call listen(2), and must not pass a connection"
    )]
    NotListening(RawFd),
}

/// A listening socket. If the daemon created it, its path is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    created: Option<Created>,
}

/// Socket and pid file, by device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Files {
    /// The socket.
    pub socket: (u64, u64),
    /// The pid file.
    pub pid_file: (u64, u64),
}

/// Files that the daemon has created and removes at its end.
#[derive(Debug)]
struct Created {
    place: SocketPath,
    socket: FileId,
    pid_file: PidFile,
    /// Whether this process removes them.
    owned: bool,
}

impl Socket {
    /// Creates or takes over the socket `wanted`.
    pub fn open(wanted: &Listen, group: Option<&str>) -> Result<Socket, ListenError> {
        match wanted {
            Listen::Path(path) => create(path, group),
            Listen::Fd(fd) => Ok(take_over(*fd)?.into()),
        }
    }

    /// The socket itself.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Closes the descriptors of the socket's directory and of the pid file, which processes with the same table of
    /// descriptors could use. The directory becomes the working directory, which is not shared, or `/` where there is
    /// nothing to remove.
    pub fn hide(&mut self) -> Result<(), ListenError> {
        let Some(created) = &mut self.created else {
            process::leave_directory();
            return Ok(());
        };
        created.place.enter_directory().map_err(|errno| created.place.failed(errno.into()))?;
        created.pid_file.hide();
        Ok(())
    }

    /// What another program in this process needs to go on with the socket, besides the listener. With a new descriptor, by
    /// which the pid file stays locked.
    pub fn files(&self) -> Option<(Files, Option<OwnedFd>)> {
        let created = self.created.as_ref()?;
        let files = Files { socket: created.socket, pid_file: created.pid_file.id() };
        Some((files, created.pid_file.open_again(&created.place)))
    }

    /// The socket of another program in this process, whose working directory is that of the socket.
    pub fn go_on(listen: &Listen, listener: OwnedFd, files: Option<(Files, Option<OwnedFd>)>) -> Socket {
        let created = match (listen, files) {
            (Listen::Path(path), Some((files, lock))) => {
                let place = SocketPath::in_working_directory(path);
                let pid_file = PidFile::go_on(&place, files.pid_file, lock);
                Some(Created { place, socket: files.socket, pid_file, owned: true })
            }
            _ => None,
        };
        Socket { created, ..Socket::from(UnixListener::from(listener)) }
    }

    /// Removes the paths, for a process that ends without dropping it.
    pub fn remove_files(&self) {
        self.created.iter().for_each(Created::remove);
    }

    /// Leaves the removal of the paths to the supervisor, and closes their directory.
    pub fn keep_path(&mut self) {
        if let Some(mut created) = self.created.take() {
            created.owned = false;
        }
    }
}

/// A socket that another process has created and removes.
impl From<UnixListener> for Socket {
    fn from(listener: UnixListener) -> Socket {
        // accept(2) must not block when another process that shares the socket was faster.
        let _ = listener.set_nonblocking(true);
        Socket { listener, created: None }
    }
}

impl Created {
    fn remove(&self) {
        if self.owned {
            self.place.remove_if(self.place.name(), self.socket);
            self.pid_file.remove(&self.place);
        }
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        self.remove();
    }
}

fn create(path: &Path, group: Option<&str>) -> Result<Socket, ListenError> {
    let group = group.map(Group::find).transpose()?;
    let place = SocketPath::of(path)?;
    let pid_file = PidFile::create(&place)?;
    let (listener, socket) = match bind_and_check(&place, path) {
        Ok(bound) => bound,
        Err(error) => {
            pid_file.remove(&place);
            return Err(error);
        }
    };
    let created = Created { socket: socket.id(), place, pid_file, owned: true };
    if let Some(group) = group {
        group.may_connect_to(&socket, &created.place)?;
    }
    Ok(Socket { created: Some(created), ..Socket::from(listener) })
}

/// A listening socket without a pid file. It has no descriptor of its directory, which processes with the same table of
/// descriptors could use.
#[derive(Debug)]
pub struct SideSocket {
    listener: UnixListener,
    path: PathBuf,
    file: FileId,
}

impl SideSocket {
    /// Creates the socket at an absolute path, accessible to its owner and to `group`.
    pub fn open(path: &Path, group: Option<&str>) -> Result<SideSocket, ListenError> {
        let group = group.map(Group::find).transpose()?;
        let place = SocketPath::of(path)?;
        let (listener, socket) = bind_and_check(&place, path)?;
        if let Some(group) = group {
            group.may_connect_to(&socket, &place)?;
        }
        SideSocket::new(listener, path, socket.id())
    }

    /// The socket of another program, at the same path.
    pub fn go_on(path: &Path, listener: OwnedFd, file: FileId) -> Result<SideSocket, ListenError> {
        SideSocket::new(listener.into(), path, file)
    }

    fn new(listener: UnixListener, path: &Path, file: FileId) -> Result<SideSocket, ListenError> {
        let failed = |source| ListenError::Create { path: path.display().to_string(), source };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(SideSocket { listener, path: path.to_owned(), file })
    }

    /// The socket itself.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number of its path.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Its path, to be removed by a process that shares no descriptors and may not look it up later.
    pub fn removal(&self) -> Result<Removal, ListenError> {
        Ok(Removal { place: SocketPath::of(&self.path)?, file: self.file })
    }
}

/// The path of a socket that is to be removed.
#[derive(Debug)]
pub struct Removal {
    place: SocketPath,
    file: FileId,
}

impl Removal {
    /// The descriptor of its directory.
    pub fn descriptor(&self) -> RawFd {
        self.place.directory().as_raw_fd()
    }

    /// Removes it, unless it is another one's by now.
    pub fn perform(&self) {
        self.place.remove_if(self.place.name(), self.file);
    }
}

/// Creates the socket, accessible to its owner only.
fn bind_and_check(place: &SocketPath, path: &Path) -> Result<(UnixListener, Node), ListenError> {
    remove_stale_socket(place)?;
    // By the path as it was given, which may be much shorter than the whole one.
    let listener = listen_at(path).map_err(|errno| place.failed(errno.into()))?;
    match place.lookup(place.name()).map_err(|source| place.failed(source))? {
        Some(node) if node.is_socket() => Ok((listener, node)),
        _ => Err(ListenError::Replaced(place.display())),
    }
}

/// Nobody else may connect before owner and mode are right: on Linux bind(2) gives the path the mode of the socket,
/// less the umask, which belongs to the process and stays as it is.
fn listen_at(path: &Path) -> Result<UnixListener, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RWXU)?;
    bind(&socket, &address)?;
    // As many as the host allows.
    listen(&socket, -1)?;
    Ok(socket.into())
}

/// Removes a socket without a listener.
fn remove_stale_socket(place: &SocketPath) -> Result<(), ListenError> {
    let Some(node) = place.lookup(place.name()).map_err(|source| place.failed(source))? else {
        return Ok(());
    };
    if !node.is_socket() {
        return Err(ListenError::NoSocket(place.display()));
    }
    match node.connect() {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            place.remove(place.name()).map_err(|source| place.failed(source))
        }
        Ok(_) => Err(ListenError::InUse { path: place.display(), holder: String::new() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ListenError::InUse { path: place.display(), holder: String::new() })
        }
        Err(source) => Err(place.failed(source)),
    }
}

fn take_over(fd: RawFd) -> Result<UnixListener, ListenError> {
    // SAFETY: borrowed for two system calls only; a descriptor that is not open answers EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    match rustix::net::sockopt::socket_acceptconn(borrowed) {
        Ok(true) => {}
        Ok(false) => return Err(ListenError::NotListening(fd)),
        Err(Errno::BADF) => return Err(ListenError::ClosedFd(fd)),
        Err(_) => return Err(ListenError::NoSocketFd(fd)),
    }
    // The daemon starts no program that needs it.
    let _ = rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC);
    // SAFETY: the caller passed the descriptor to this process for this use, and the command line
    // names it once.
    Ok(unsafe { OwnedFd::from_raw_fd(borrowed.as_raw_fd()) }.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn open(path: &Path) -> Result<Socket, ListenError> {
        Socket::open(&Listen::Path(path.to_owned()), None)
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_socket_is_private_and_goes_with_its_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = open(&path).unwrap();
        assert_eq!(names(directory.path()), ["socket", "socket.pid"]);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o77, 0);
        let error = open(&path).unwrap_err();
        let own = format!("process {}", std::process::id());
        assert!(matches!(&error, ListenError::InUse { holder, .. } if holder.contains(&own)), "{error}");
        drop(socket);
        assert_eq!(names(directory.path()), [""; 0]);
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
        assert_eq!(names(directory.path()), ["socket", "socket.pid"]);
        // Both are stale now.
        drop(open(&path).unwrap());
        assert_eq!(names(directory.path()), [""; 0]);
        std::fs::write(&path, "kept").unwrap();
        assert!(matches!(open(&path), Err(ListenError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
        assert_eq!(names(directory.path()), ["socket"]);
        assert!(matches!(open(&directory.path().join("x/y")), Err(ListenError::NoDirectory(_))));
        assert!(matches!(open(&path.join("y")), Err(ListenError::NotADirectory(_))));
        assert!(matches!(open(Path::new("/")), Err(ListenError::NoName(_))));
        let long = directory.path().join("x".repeat(120));
        assert!(matches!(open(&long), Err(ListenError::TooLong { .. })));
        assert_eq!(names(directory.path()), ["socket"]);
    }

    #[test]
    fn a_living_daemon_without_a_pid_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(open(&path), Err(ListenError::InUse { .. })));
        assert_eq!(names(directory.path()), ["socket"]);
    }

    #[test]
    fn a_path_that_is_somebody_elses_now_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert_eq!(names(directory.path()), ["socket"]);
    }

    #[test]
    fn what_is_removed_is_in_the_directory_that_was_meant() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        std::fs::create_dir(at("run")).unwrap();
        let socket = open(&at("run/socket")).unwrap();
        std::fs::rename(at("run"), at("moved")).unwrap();
        std::fs::create_dir(at("run")).unwrap();
        std::fs::hard_link(at("moved/socket"), at("run/socket")).unwrap();
        drop(socket);
        assert_eq!(names(&at("run")), ["socket"]);
        assert_eq!(names(&at("moved")), [""; 0]);
    }

    #[test]
    fn a_descriptor_that_does_not_listen_is_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(take_over(one.as_raw_fd()), Err(ListenError::NotListening(_))));
        let file = std::fs::File::open("/").unwrap();
        assert!(matches!(take_over(file.as_raw_fd()), Err(ListenError::NoSocketFd(_))));
        assert!(matches!(take_over(9999), Err(ListenError::ClosedFd(9999))));
    }
}
