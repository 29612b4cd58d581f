//! A file system on the host that injects errors and delays: what a broken disk or a distant server
//! is to the daemon. A FUSE file system with one file in memory, served by the test itself, or by the program
//! of this package for a disk image that takes its time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, KernelConfig, MountOption, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
};
use rustix::mount::{UnmountFlags, unmount};

/// The name of the one file.
pub const FILE: &str = "file";
/// Default file size in bytes.
pub const LENGTH: usize = 1 << 20;
/// Its inode number; the root's is 1.
const FILE_INODE: u64 = 2;
/// `FOPEN_DIRECT_IO`: every read(2) and write(2) comes here.
const DIRECT_IO: u32 = 1;
/// `FUSE_ASYNC_DIO`: who writes asynchronously does not wait for each part.
const ASYNC_DIO: u32 = 1 << 15;
/// How many asynchronous requests the kernel has under way at once.
const MAX_BACKGROUND: u16 = 256;
/// Attributes and names are not cached.
const NO_TIME: Duration = Duration::ZERO;

/// The operations that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Looking a name up.
    Lookup,
    /// Asking for attributes.
    Getattr,
    /// Opening the file.
    Open,
    /// Changing attributes, which are changed also if it fails.
    Setattr,
    /// Reading from it.
    Read,
    /// Writing to it.
    Write,
    /// fsync(2) and fdatasync(2).
    Fsync,
    /// close(2) of any of its descriptors.
    Flush,
}

const CALLS: usize = 8;

#[derive(Debug, Default)]
struct Controls {
    errors: [AtomicI32; CALLS],
    calls: [AtomicU64; CALLS],
    /// Calls that are not answered yet, and the most of them at once.
    under_way: [AtomicU64; CALLS],
    most_under_way: [AtomicU64; CALLS],
    /// The file can grow and shrink.
    is_growing: AtomicBool,
    /// Files are opened for the kernel's page cache.
    is_cached: AtomicBool,
    /// Writes with O_DIRECT have to be of whole blocks.
    takes_blocks: AtomicBool,
    /// Most bytes of a read; 0 for any number.
    longest_read: AtomicU64,
    delay_in_ms: AtomicU64,
    /// What holds calls that begin now.
    gates: [Mutex<Option<Arc<GateState>>>; CALLS],
    /// Permissions of the file.
    mode: AtomicU32,
    /// Writes that say that they append.
    appends: AtomicU64,
}

/// Calls that wait for their gate, as the calls see it.
#[derive(Debug)]
struct GateState {
    is_open: Mutex<bool>,
    opened: Condvar,
    /// Data of this length and longer is held; for calls without data, 0.
    from_length: usize,
}

impl GateState {
    fn wait(&self) {
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open).unwrap_or_else(PoisonError::into_inner));
    }

    fn open(&self) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }
}

/// Holds calls of a store, which get no answer until it is dropped.
#[derive(Debug)]
#[must_use = "a gate holds calls until it is dropped"]
pub struct Gate {
    state: Arc<GateState>,
    controls: Arc<Controls>,
    call: Call,
}

impl Gate {
    /// Calls that begin from now on pass; those that are held stay so.
    pub fn admit(&self) {
        let mut gate = self.controls.gate(self.call);
        // Another gate may have taken its place.
        if gate.as_ref().is_some_and(|gate| Arc::ptr_eq(gate, &self.state)) {
            *gate = None;
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.admit();
        self.state.open();
    }
}

impl Controls {
    fn gate(&self, call: Call) -> std::sync::MutexGuard<'_, Option<Arc<GateState>>> {
        self.gates[call as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, call: Call) {
        let now = self.under_way[call as usize].fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way[call as usize].fetch_max(now, Ordering::SeqCst);
    }

    fn end(&self, call: Call) {
        self.under_way[call as usize].fetch_sub(1, Ordering::SeqCst);
    }

    fn check(&self, call: Call) -> Result<(), i32> {
        self.calls[call as usize].fetch_add(1, Ordering::SeqCst);
        match self.errors[call as usize].load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(errno),
        }
    }
}

/// A mounted store. It is unmounted when it is dropped.
#[derive(Debug)]
pub struct FaultFs {
    path: PathBuf,
    controls: Arc<Controls>,
    contents: Arc<Mutex<Vec<u8>>>,
    session: Option<BackgroundSession>,
}

impl FaultFs {
    /// Mounts it on a directory; takes root.
    pub fn mount(path: &Path) -> std::io::Result<FaultFs> {
        FaultFs::with_length(path, LENGTH)
    }

    /// The same with another length of the file, in bytes.
    pub fn with_length(path: &Path, length: usize) -> std::io::Result<FaultFs> {
        let controls = Arc::new(Controls { mode: AtomicU32::new(0o644), ..Controls::default() });
        let contents = Arc::new(Mutex::new(vec![0; length]));
        let store = Store { controls: Arc::clone(&controls), contents: Arc::clone(&contents) };
        let options = [MountOption::FSName("faultfs".into()), MountOption::DefaultPermissions];
        let session = fuser::spawn_mount2(store, path, &options)?;
        Ok(FaultFs { path: path.to_path_buf(), controls, contents, session: Some(session) })
    }

    /// Lets a call fail with an errno from now on, or work again with 0.
    pub fn fail(&self, call: Call, errno: i32) {
        self.controls.errors[call as usize].store(errno, Ordering::SeqCst);
    }

    /// How often the host's kernel has asked for this so far.
    pub fn calls(&self, call: Call) -> u64 {
        self.controls.calls[call as usize].load(Ordering::SeqCst)
    }

    /// How many calls of this kind are not answered yet.
    pub fn under_way(&self, call: Call) -> u64 {
        self.controls.under_way[call as usize].load(Ordering::SeqCst)
    }

    /// The most of them at once so far.
    pub fn most_under_way(&self, call: Call) -> u64 {
        self.controls.most_under_way[call as usize].load(Ordering::SeqCst)
    }

    /// Lets the file grow and shrink from now on; until then it has one length.
    pub fn let_grow(&self) {
        self.controls.is_growing.store(true, Ordering::SeqCst);
    }

    /// Lets the kernel have files in its page cache, if they are opened from now on, and not O_DIRECT.
    pub fn let_cache(&self) {
        self.controls.is_cached.store(true, Ordering::SeqCst);
    }

    /// Refuses writes to files that were opened with O_DIRECT and are not of whole blocks of 512 bytes (EINVAL) from now
    /// on.
    pub fn insist_on_blocks(&self) {
        self.controls.takes_blocks.store(true, Ordering::SeqCst);
    }

    /// Writes as another host does, of which this one's kernel learns nothing.
    pub fn write_elsewhere(&self, offset: usize, data: &[u8]) {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset + data.len();
        if end > contents.len() {
            contents.resize(end, 0);
        }
        contents[offset..end].copy_from_slice(data);
    }

    /// What the file holds.
    pub fn contents(&self) -> Vec<u8> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many writes have said that they append.
    pub fn appends(&self) -> u64 {
        self.controls.appends.load(Ordering::SeqCst)
    }

    /// Lets a read give no more than so many bytes from now on, though there are more.
    pub fn shorten_reads(&self, longest: u64) {
        self.controls.longest_read.store(longest, Ordering::SeqCst);
    }

    /// Lets reads, writes and fsyncs take so long from now on.
    pub fn delay(&self, delay: Duration) {
        self.controls.delay_in_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Holds calls of this kind that begin from now on: [`FaultFs::under_way`] counts them. It replaces the gate that was
    /// there, which goes on holding what it holds. Attributes that are asked for and close(2) are never held.
    pub fn hold(&self, call: Call) -> Gate {
        self.hold_data(call, 0)
    }

    /// The same for reads and writes of this length in bytes and longer.
    pub fn hold_data(&self, call: Call, from_length: usize) -> Gate {
        let state = Arc::new(GateState { is_open: Mutex::new(false), opened: Condvar::new(), from_length });
        *self.controls.gate(call) = Some(Arc::clone(&state));
        Gate { state, controls: Arc::clone(&self.controls), call }
    }

    /// The store is gone for good: whatever is asked of it, now or later, fails.
    pub fn break_down(&self) {
        // It aborts the connection even if it cannot unmount what is in use.
        let _ = unmount(&self.path, UnmountFlags::FORCE);
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        self.break_down();
        // It fails if nothing was in use, and the mount is gone already.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

struct Store {
    controls: Arc<Controls>,
    contents: Arc<Mutex<Vec<u8>>>,
}

impl Store {
    /// Answers a call.
    fn later(&self, call: Call, answer: impl FnOnce(Result<(), i32>) + Send + 'static) {
        self.later_with(call, 0, answer);
    }

    /// Answers a call with data of this length after its gate and the delay, from a thread of its own: others are not held
    /// up.
    fn later_with(&self, call: Call, length: usize, answer: impl FnOnce(Result<(), i32>) + Send + 'static) {
        let controls = Arc::clone(&self.controls);
        let delay = match call {
            Call::Lookup | Call::Open => 0,
            _ => controls.delay_in_ms.load(Ordering::SeqCst),
        };
        let delay = Duration::from_millis(delay);
        let gate = controls.gate(call).clone().filter(|gate| length >= gate.from_length);
        controls.begin(call);
        let is_at_once = gate.is_none() && delay.is_zero();
        let act = move || {
            if let Some(gate) = gate {
                gate.wait();
            }
            std::thread::sleep(delay);
            let result = controls.check(call);
            // Before the answer: who gets that may send the next call.
            controls.end(call);
            answer(result);
        };
        if is_at_once { act() } else { drop(std::thread::spawn(act)) }
    }

    fn length(&self) -> usize {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn attributes(&self, inode: u64) -> FileAttr {
        let time = SystemTime::UNIX_EPOCH;
        let is_file = inode == FILE_INODE;
        FileAttr {
            ino: inode,
            size: if is_file { self.length() as u64 } else { 0 },
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { self.controls.mode.load(Ordering::SeqCst) as u16 } else { 0o755 },
            nlink: if is_file { 1 } else { 2 },
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// The bytes of a request that lie in a file of this length.
fn range(length: usize, offset: i64, len: usize) -> std::ops::Range<usize> {
    let begin = usize::try_from(offset).unwrap_or(0).min(length);
    begin..begin.saturating_add(len).min(length)
}

impl Filesystem for Store {
    fn init(&mut self, _: &Request<'_>, config: &mut KernelConfig) -> Result<(), i32> {
        config.add_capabilities(ASYNC_DIO).map_err(|_| libc::EPROTO)?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| libc::EPROTO)?;
        Ok(())
    }

    fn lookup(&mut self, _: &Request<'_>, _parent: u64, name: &OsStr, reply: ReplyEntry) {
        let (known, attributes) = (name == FILE, self.attributes(FILE_INODE));
        self.later(Call::Lookup, move |result| match result {
            Ok(()) if known => reply.entry(&NO_TIME, &attributes, 0),
            Ok(()) => reply.error(libc::ENOENT),
            Err(errno) => reply.error(errno),
        });
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _handle: Option<u64>, reply: ReplyAttr) {
        match self.controls.check(Call::Getattr) {
            Ok(()) => reply.attr(&NO_TIME, &self.attributes(inode)),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<u64>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<u32>,
        reply: ReplyAttr,
    ) {
        if let Some(mode) = mode.filter(|_| inode == FILE_INODE) {
            self.controls.mode.store(mode & 0o7777, Ordering::SeqCst);
        }
        if let Some(size) = size.filter(|_| self.controls.is_growing.load(Ordering::SeqCst)) {
            let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
            contents.resize(size as usize, 0);
        }
        let attributes = self.attributes(inode);
        self.later(Call::Setattr, move |result| match result {
            Ok(()) => reply.attr(&NO_TIME, &attributes),
            Err(errno) => reply.error(errno),
        });
    }

    fn open(&mut self, _: &Request<'_>, _inode: u64, how: i32, reply: ReplyOpen) {
        let flags = if self.controls.is_cached.load(Ordering::SeqCst) { 0 } else { DIRECT_IO };
        self.later(Call::Open, move |result| match result {
            // As a number, whether it is open with O_DIRECT.
            Ok(()) => reply.opened(u64::from(how & libc::O_DIRECT != 0), flags),
            Err(errno) => reply.error(errno),
        });
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _inode: u64,
        _handle: u64,
        offset: i64,
        size: u32,
        _flags: i32,
        _owner: Option<u64>,
        reply: ReplyData,
    ) {
        let contents = Arc::clone(&self.contents);
        let size = match self.controls.longest_read.load(Ordering::SeqCst) {
            0 => size,
            longest => size.min(longest as u32),
        };
        self.later_with(Call::Read, size as usize, move |result| match result {
            Ok(()) => {
                let contents = contents.lock().unwrap_or_else(PoisonError::into_inner);
                reply.data(&contents[range(contents.len(), offset, size as usize)]);
            }
            Err(errno) => reply.error(errno),
        });
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _inode: u64,
        handle: u64,
        offset: i64,
        data: &[u8],
        _write_flags: u32,
        flags: i32,
        _owner: Option<u64>,
        reply: ReplyWrite,
    ) {
        if flags & libc::O_APPEND != 0 {
            self.controls.appends.fetch_add(1, Ordering::SeqCst);
        }
        let (contents, data) = (Arc::clone(&self.contents), data.to_vec());
        let is_growing = self.controls.is_growing.load(Ordering::SeqCst);
        let is_odd = handle == 1 && !(offset as usize | data.len()).is_multiple_of(512);
        let is_refused = is_odd && self.controls.takes_blocks.load(Ordering::SeqCst);
        self.later_with(Call::Write, data.len(), move |result| match result {
            Ok(()) if is_refused => reply.error(libc::EINVAL),
            Ok(()) => {
                let mut contents = contents.lock().unwrap_or_else(PoisonError::into_inner);
                let end = usize::try_from(offset).unwrap_or(0) + data.len();
                if is_growing && end > contents.len() {
                    contents.resize(end, 0);
                }
                let range = range(contents.len(), offset, data.len());
                let written = range.len();
                contents[range].copy_from_slice(&data[..written]);
                reply.written(written as u32);
            }
            Err(errno) => reply.error(errno),
        });
    }

    fn fsync(&mut self, _: &Request<'_>, _inode: u64, _handle: u64, _data_only: bool, reply: ReplyEmpty) {
        self.later(Call::Fsync, move |result| answer(result, reply));
    }

    fn flush(&mut self, _: &Request<'_>, _inode: u64, _handle: u64, _owner: u64, reply: ReplyEmpty) {
        answer(self.controls.check(Call::Flush), reply);
    }
}

fn answer(result: Result<(), i32>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
