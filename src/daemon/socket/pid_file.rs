//! The pid file SOCKET.pid: the process id of the supervisor, and a lock that is held while the daemon runs.
//!
//! Name, content and lock (flock(2)) are those of virtiofsd, so that each detects the other.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use log::debug;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use super::ListenError;
use super::path::{FileId, SocketPath};
use crate::sys::held_file::HeldFile;

const SUFFIX: &str = ".pid";
/// More bytes than a process id and a newline.
const MORE_THAN_A_PID: u64 = 32;
/// Attempts while other starts interfere.
const TRIES: usize = 100;

/// The file, locked as long as this is open in any process.
#[derive(Debug)]
pub(super) struct PidFile {
    name: OsString,
    id: FileId,
    lock: Lock,
}

/// What holds the lock.
#[derive(Debug)]
enum Lock {
    Descriptor(File),
    Hidden {
        _held: HeldFile,
    },
    /// The file was removed by somebody else.
    Lost,
}

impl PidFile {
    /// Creates the file, in place of one that a dead daemon has left.
    pub(super) fn create(place: &SocketPath) -> Result<PidFile, ListenError> {
        let name = place.beside(SUFFIX);
        for _ in 0..TRIES {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // Whoever can open it can lock it and so prevent a start.
            match openat(place.directory(), &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(fd) => {
                    if let Some(file) = PidFile::fill(place, &name, fd.into())? {
                        return Ok(file);
                    }
                }
                Err(Errno::EXIST) => remove_stale(place)?,
                Err(errno) => return Err(failed(place, errno)),
            }
        }
        Err(failed(place, Errno::AGAIN))
    }

    /// Takes the lock of a file that is new, unless another start was faster.
    fn fill(place: &SocketPath, name: &OsString, mut file: File) -> Result<Option<PidFile>, ListenError> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(failed(place, errno)),
        }
        let id = identity(&file).map_err(|errno| failed(place, errno))?;
        if !place.is(name, id) {
            return Ok(None);
        }
        match writeln!(file, "{}", std::process::id()) {
            // Another start that was faster meanwhile has removed the file.
            Ok(()) if !share(&file) => Ok(None),
            Ok(()) => Ok(Some(PidFile { name: name.clone(), id, lock: Lock::Descriptor(file) })),
            Err(error) => {
                place.remove_if(name, id);
                Err(failed(place, Errno::from_io_error(&error).unwrap_or(Errno::IO)))
            }
        }
    }

    /// Keeps the lock and closes the descriptor, which processes with the same table could use. Where a file cannot be
    /// mapped, it stays open.
    pub(super) fn hide(&mut self) {
        if let Lock::Descriptor(file) = &self.lock {
            match HeldFile::new(file) {
                Ok(held) => self.lock = Lock::Hidden { _held: held },
                Err(errno) => debug!("the pid file stays open: {errno}"),
            }
        }
    }

    /// The device and inode number.
    pub(super) fn id(&self) -> FileId {
        self.id
    }

    /// The file again, with a lock of its own, for another program in this process. `None` if it is not there any more.
    pub(super) fn open_again(&self, place: &SocketPath) -> Option<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(place.directory(), &self.name, flags, Mode::empty()).map(File::from).ok()?;
        (identity(&file) == Ok(self.id) && share(&file)).then(|| file.into())
    }

    /// The file that another program in this process has opened again.
    pub(super) fn go_on(place: &SocketPath, id: FileId, lock: Option<OwnedFd>) -> PidFile {
        let lock = lock.map_or(Lock::Lost, |file| Lock::Descriptor(file.into()));
        let mut file = PidFile { name: place.beside(SUFFIX), id, lock };
        file.hide();
        file
    }

    /// Removes it, if it still is what it was.
    pub(super) fn remove(&self, place: &SocketPath) {
        place.remove_if(&self.name, self.id);
    }
}

/// Removes the pid file of a dead daemon. An existing file is never written to: it may be a hard link.
fn remove_stale(place: &SocketPath) -> Result<(), ListenError> {
    let name = place.beside(SUFFIX);
    let failed = |errno| failed(place, errno);
    let from_io = |error: std::io::Error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    let Some(node) = place.lookup(&name).map_err(from_io)? else { return Ok(()) };
    if !node.is_file() {
        return Err(ListenError::NoPidFile(place.display_beside(SUFFIX)));
    }
    let file = File::open(node.path()).map_err(from_io)?;
    let mut text = String::new();
    let read = (&file).take(MORE_THAN_A_PID).read_to_string(&mut text);
    let pid = text.trim();
    if read.is_err() || text.len() >= 32 || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ListenError::NoPidFile(place.display_beside(SUFFIX)));
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let holder = if pid.is_empty() { String::new() } else { format!(" (process {pid})") };
            return Err(ListenError::InUse { path: place.display(), holder });
        }
        Err(errno) => return Err(failed(errno)),
    }
    // Other starts replace it only while they hold this lock.
    match place.is(&name, node.id()) {
        true => place.remove(&name).map_err(from_io),
        false => Ok(()),
    }
}

/// Makes a lock a shared one, which other starts respect just as well: so the process can take another one before this
/// one goes. False if another process has taken it meanwhile.
fn share(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockShared).is_ok()
}

fn identity(file: &File) -> Result<FileId, Errno> {
    let metadata = file.metadata().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok((metadata.dev(), metadata.ino()))
}

fn failed(place: &SocketPath, errno: Errno) -> ListenError {
    match errno {
        Errno::ACCESS | Errno::PERM | Errno::ROFS => ListenError::NotAllowed(place.display_beside(SUFFIX)),
        errno => ListenError::Create { path: place.display_beside(SUFFIX), source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn make(directory: &Path) -> Result<PidFile, ListenError> {
        PidFile::create(&SocketPath::of(&directory.join("socket")).unwrap())
    }

    #[test]
    fn it_holds_the_process_id_and_is_locked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket.pid");
        let first = make(directory.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(make(directory.path()), Err(ListenError::InUse { .. })));
        // Dead without a chance to clean up.
        drop(first);
        std::fs::write(&path, "4194999").unwrap();
        let second = make(directory.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        second.remove(&SocketPath::of(&directory.path().join("socket")).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn nothing_else_is_followed_changed_or_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket.pid");
        let victim = directory.path().join("victim");
        let refused = || {
            assert!(matches!(make(directory.path()), Err(ListenError::NoPidFile(_))));
            assert!(std::fs::symlink_metadata(&path).is_ok());
        };
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        refused();
        assert!(!victim.exists());
        std::fs::write(&victim, "precious").unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::hard_link(&victim, &path).unwrap();
        refused();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        // Another name of a file that might be one of ours: the name goes, the file stays.
        std::fs::write(&victim, "1").unwrap();
        let ours = make(directory.path()).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"1");
        drop(ours);
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        refused();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused();
    }

    #[test]
    fn of_many_starts_at_once_one_wins() {
        for _ in 0..50 {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("socket.pid"), "1\n").unwrap();
            let won: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| make(directory.path()))).collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            });
            let winners = won.iter().filter(|start| start.is_ok()).count();
            assert!(winners == 1, "{won:?}");
        }
    }
}
