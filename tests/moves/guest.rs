//! A guest's view of a share, without a device.

use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuse_protocol::flags::{InitFlags, OpenRequestFlags, ReleaseFlags, WriteFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::init::Negotiated;
use fuse_protocol::name::{LookupName, Name};
use fuse_protocol::reply::DirectoryWriter;
use fuse_protocol::request::{
    Create, Getattr, Lock, LockKind, Lookup, Mkdir, Open, Opendir, Read, Readdir, Release, Rename, Rmdir,
    Unlink, Write,
};
use lanefsd::config::{FsConfig, InodeFileHandles};
use lanefsd::fs::FileSystem;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::limits::{FdQuota, Limits};
use lanefsd::migration::config::{MigrationConfig, Mode as MigrationMode, OnError};
use lanefsd::migration::{MigrationError, Snapshot};
use lanefsd::process;
use lanefsd::state_file::StateFile;
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::context::context;

const READ_WRITE: u32 = libc::O_RDWR.cast_unsigned();

/// Umask and working directory belong to the process, so only one test at a time may run.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    process::prepare_for_requests(&open(Path::new("/proc/self/fd"))).unwrap();
    guard
}

pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

/// Whether inodes can be opened by handle here.
pub fn opens_handles() -> bool {
    let folder = directory();
    let options = Options { handles: InodeFileHandles::Prefer, ..Options::default() };
    Share::new(folder.path(), &options).fs.uses_file_handles()
}

/// All modes and policies.
pub fn ways() -> Vec<(MigrationMode, OnError)> {
    let modes = [MigrationMode::FindPaths, MigrationMode::FileHandles, MigrationMode::Auto];
    let handles = opens_handles();
    let modes = modes.into_iter().filter(|mode| handles || *mode == MigrationMode::FindPaths);
    modes.flat_map(|mode| [(mode, OnError::Abort), (mode, OnError::GuestError)]).collect()
}

fn open(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[derive(Clone, Debug)]
pub struct Options {
    pub mode: MigrationMode,
    pub on_error: OnError,
    pub verify: bool,
    pub confirm: bool,
    pub unlinked_limit: u64,
    pub handles: InodeFileHandles,
    pub fds: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            mode: MigrationMode::FindPaths,
            on_error: OnError::Abort,
            verify: false,
            confirm: false,
            unlinked_limit: 1 << 20,
            handles: InodeFileHandles::Prefer,
            fds: 4000,
        }
    }
}

pub struct Share {
    pub fs: PassthroughFs,
    limits: Limits,
    /// Descriptors without a session.
    pub own_fds: usize,
}

impl Share {
    pub fn new(directory: &Path, options: &Options) -> Share {
        let limits = Limits::new(FdQuota::new(options.fds, 0));
        let migration = MigrationConfig {
            mode: options.mode,
            on_error: options.on_error,
            verify_handles: options.verify,
            confirm_paths: options.confirm,
            unlinked_limit: options.unlinked_limit,
            ..MigrationConfig::default()
        };
        let inode_file_handles = options.handles;
        let config =
            FsConfig { inode_file_handles, migration, posix_lock: true, flock: true, ..FsConfig::default() };
        let proc_self_fd = open(Path::new("/proc/self/fd"));
        let state = StateFile::create_shared().unwrap();
        let fs = PassthroughFs::new(open(directory), proc_self_fd, limits.clone(), config, &state).unwrap();
        let own_fds = limits.fds.in_use();
        Share { fs, limits, own_fds }
    }

    /// INIT.
    pub fn begin(&self) {
        let flags = self.fs.offered_flags() - InitFlags::HANDLE_KILLPRIV_V2;
        let negotiated = Negotiated { minor: 45, flags, max_write: 4096, max_readahead: 0, max_pages: 1 };
        self.fs.agreement().unwrap().begin(&negotiated);
    }

    /// Saves it and loads it elsewhere, and ends the source.
    pub fn move_to(self, directory: &Path, options: &Options) -> Share {
        let target = Share::new(directory, options);
        target.load(self.fs.save().unwrap()).unwrap();
        target
    }

    /// Takes over what another daemon has saved, as the server does it.
    pub fn load(&self, snapshot: Snapshot) -> Result<(), MigrationError> {
        self.fs.load(snapshot).inspect_err(|_| self.fs.destroy())
    }

    /// Until the thread that prepares a save has found everything: it sleeps.
    pub fn wait_until_prepared(&self) {
        let sleeps = || {
            let mut threads = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
            threads.any(|thread| {
                let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
                read("comm") == "collect\n" && read("stat").contains(" S ")
            })
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        // It may sleep for a moment while it looks.
        let mut times = 0;
        while times < 5 {
            assert!(Instant::now() < deadline, "the thread does not come to rest");
            times = if sleeps() { times + 1 } else { 0 };
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn fds(&self) -> usize {
        self.limits.fds.in_use()
    }

    pub fn look_up(&self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let name = CString::new(name).unwrap();
        let name = LookupName::Entry(Name::new(&name).unwrap());
        self.fs.lookup(&context(), NodeId(parent), &Lookup { name }).map(|entry| entry.node.0)
    }

    pub fn look_up_parent(&self, node: u64) -> Result<u64, Errno> {
        self.fs
            .lookup(&context(), NodeId(node), &Lookup { name: LookupName::Parent })
            .map(|entry| entry.node.0)
    }

    pub fn forget(&self, node: u64, count: u64) {
        self.fs.forget(&context(), NodeId(node), count);
    }

    pub fn size(&self, node: u64) -> Result<u64, Errno> {
        let getattr = Getattr { handle: None };
        self.fs.getattr(&context(), NodeId(node), &getattr).map(|attributes| attributes.attr.size)
    }

    pub fn links(&self, node: u64) -> Result<u32, Errno> {
        let getattr = Getattr { handle: None };
        self.fs.getattr(&context(), NodeId(node), &getattr).map(|attributes| attributes.attr.nlink)
    }

    pub fn create(&self, parent: u64, name: &[u8]) -> Result<(u64, u64), Errno> {
        let (name, open_flags) = (CString::new(name).unwrap(), OpenRequestFlags::empty());
        let name = Name::new(&name).unwrap();
        let create = Create { name, flags: READ_WRITE, mode: 0o100_644, umask: 0, open_flags };
        let (entry, opened) = self.fs.create(&context(), NodeId(parent), &create)?;
        Ok((entry.node.0, opened.handle.0))
    }

    pub fn create_closed(&self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let (node, handle) = self.create(parent, name)?;
        self.close(node, handle).map(|()| node)
    }

    pub fn make_directory(&self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let name = CString::new(name).unwrap();
        let mkdir = Mkdir { name: Name::new(&name).unwrap(), mode: 0o755, umask: 0 };
        self.fs.mkdir(&context(), NodeId(parent), &mkdir).map(|entry| entry.node.0)
    }

    pub fn unlink(&self, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let name = CString::new(name).unwrap();
        self.fs.unlink(&context(), NodeId(parent), &Unlink { name: Name::new(&name).unwrap() })
    }

    pub fn remove_directory(&self, parent: u64, name: &[u8]) -> Result<(), Errno> {
        let name = CString::new(name).unwrap();
        self.fs.rmdir(&context(), NodeId(parent), &Rmdir { name: Name::new(&name).unwrap() })
    }

    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8])) -> Result<(), Errno> {
        let (name, new_name) = (CString::new(from.1).unwrap(), CString::new(to.1).unwrap());
        let rename = Rename {
            name: Name::new(&name).unwrap(),
            new_parent: NodeId(to.0),
            new_name: Name::new(&new_name).unwrap(),
            flags: 0,
        };
        self.fs.rename(&context(), NodeId(from.0), &rename)
    }

    pub fn open(&self, node: u64) -> Result<u64, Errno> {
        let open = Open { flags: READ_WRITE, open_flags: OpenRequestFlags::empty() };
        self.fs.open(&context(), NodeId(node), &open).map(|opened| opened.handle.0)
    }

    pub fn open_directory(&self, node: u64) -> Result<u64, Errno> {
        self.fs.opendir(&context(), NodeId(node), &Opendir { flags: 0 }).map(|opened| opened.handle.0)
    }

    pub fn list(&self, node: u64, handle: u64) -> Result<Vec<Vec<u8>>, Errno> {
        let mut bytes = Vec::new();
        let mut out = DirectoryWriter::new(&mut bytes, 1 << 16, false);
        let readdir = Readdir { handle: HandleId(handle), offset: 0, size: 1 << 16, plus: false };
        self.fs.readdir(&context(), NodeId(node), &readdir, &mut out)?;
        let (mut names, mut rest) = (Vec::new(), bytes.as_slice());
        while rest.len() > 24 {
            let len = usize::try_from(u32::from_ne_bytes(rest[16..20].try_into().unwrap())).unwrap();
            names.push(rest[24..24 + len].to_vec());
            rest = &rest[(24 + len).next_multiple_of(8).min(rest.len())..];
        }
        Ok(names)
    }

    pub fn write(&self, node: u64, handle: u64, offset: u64, text: &[u8]) -> Result<usize, Errno> {
        let mut bytes = text.to_vec();
        let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: `bytes` outlives the reader and is not looked at before that is gone.
        let mut data = unsafe { GuestReader::new(&mut iov) };
        let size = u32::try_from(text.len()).unwrap();
        let write_flags = WriteFlags::empty();
        let write = Write { handle: HandleId(handle), offset, size, write_flags, flags: READ_WRITE };
        self.fs.write(&context(), NodeId(node), &write, &mut data)
    }

    pub fn read(&self, node: u64, handle: u64) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; 100];
        let mut iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: `bytes` outlives the writer and is not looked at before that is gone.
        let mut data = unsafe { GuestWriter::new(&mut iov) };
        let read = Read { handle: HandleId(handle), offset: 0, size: 100, flags: READ_WRITE };
        let count = self.fs.read(&context(), NodeId(node), &read, &mut data)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    pub fn lock(&self, node: u64, handle: u64, owner: u64, (start, end): (u64, u64)) -> Result<(), Errno> {
        let (handle, kind) = (HandleId(handle), LockKind::Write);
        let lock = Lock { handle, owner: LockOwner(owner), start, end, kind, pid: 77, flock: false };
        self.fs.setlk(&context(), NodeId(node), &lock)
    }

    /// Who has the lock that stands in the way.
    pub fn holder(&self, node: u64, handle: u64, owner: u64, (start, end): (u64, u64)) -> Result<u32, Errno> {
        let (handle, kind) = (HandleId(handle), LockKind::Write);
        let lock = Lock { handle, owner: LockOwner(owner), start, end, kind, pid: 78, flock: false };
        self.fs.getlk(&context(), NodeId(node), &lock).map(|found| found.pid)
    }

    pub fn flock(&self, node: u64, handle: u64, kind: LockKind) -> Result<(), Errno> {
        let handle = HandleId(handle);
        let lock = Lock {
            handle,
            owner: LockOwner(9),
            start: 0,
            end: i64::MAX.unsigned_abs(),
            kind,
            pid: 1,
            flock: true,
        };
        self.fs.setlk(&context(), NodeId(node), &lock)
    }

    pub fn close(&self, node: u64, handle: u64) -> Result<(), Errno> {
        let (flags, lock_owner) = (ReleaseFlags::empty(), LockOwner(0));
        let release = Release { handle: HandleId(handle), flags, lock_owner };
        self.fs.release(&context(), NodeId(node), &release)
    }
}
