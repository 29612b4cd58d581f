//! A store without I/O, for benchmarks: data is dropped, and each read and write takes a set time.
//!
//! Names, opens and attributes are those of the file system inside. What is written to a file is
//! acknowledged after the latency and dropped; where a write passes the end of the file, the file
//! inside grows by a hole, so that every size that the guest can ask for is the one it expects.
//! What is read is zeros.
//!
//! It also counts how many writes of each file were in flight at once, and says so at the end of
//! the session: the one figure that shows whether the guest sent them in parallel.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use log::info;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Context, FileSystem, Opened, Result};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::flags::{InitFlags, ReleaseFlags, WriteFlags};
use fuse_protocol::ids::{HandleId, LockOwner, NodeId};
use fuse_protocol::reply::{Attributes, Entry};
use fuse_protocol::request::{
    CopyFileRange, Create, Fallocate, Getattr, Open, Read, Release, Setattr, Tmpfile, Write,
};

/// Tables that handles are spread over, so that writers seldom meet at one.
const SHARDS: usize = 16;
/// Files whose counts are kept for the report.
const MAX_REPORTED: usize = 4096;

/// The file system `F` with nothing behind its files.
pub struct NullStore<F> {
    inner: F,
    latency: Duration,
    handles: [RwLock<HashMap<HandleId, OpenFile>>; SHARDS],
    files: Mutex<Files>,
}

/// An open file.
#[derive(Clone, Debug)]
struct OpenFile {
    file: Arc<File>,
    /// Whether it was opened for writing. Reading is not checked: a guest that writes back its
    /// cache reads through any handle.
    writable: bool,
}

/// What all openers of a file share.
#[derive(Debug)]
struct File {
    node: NodeId,
    size: AtomicU64,
    /// Held while the size changes.
    resize: Mutex<()>,
    in_flight: AtomicU32,
    most_in_flight: AtomicU32,
}

#[derive(Debug, Default)]
struct Files {
    open: HashMap<NodeId, Weak<File>>,
    /// The most writes in flight at once, by file.
    most_in_flight: BTreeMap<NodeId, u32>,
}

impl Files {
    fn note(&mut self, file: &File) {
        let most = file.most_in_flight.load(Ordering::Relaxed);
        let known = self.most_in_flight.len() < MAX_REPORTED || self.most_in_flight.contains_key(&file.node);
        if most > 0 && known {
            let noted = self.most_in_flight.entry(file.node).or_default();
            *noted = most.max(*noted);
        }
    }
}

/// Counts a write for as long as it is in flight.
struct InFlight<'a>(&'a File);

impl File {
    fn begin_write(&self) -> InFlight<'_> {
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        self.most_in_flight.fetch_max(now, Ordering::Relaxed);
        InFlight(self)
    }

    fn lock_size(&self) -> MutexGuard<'_, ()> {
        self.resize.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<F: FileSystem> NullStore<F> {
    /// Drops what is written to the files of `inner`. Every read and write takes `latency`; zero
    /// means no wait at all.
    pub fn new(inner: F, latency: Duration) -> NullStore<F> {
        NullStore { inner, latency, handles: Default::default(), files: Mutex::default() }
    }

    fn wait(&self) {
        if !self.latency.is_zero() {
            std::thread::sleep(self.latency);
        }
    }

    /// Whether the guest writes its cache back, so that appends go where it says.
    fn guest_writes_back(&self) -> bool {
        let agreement = self.inner.agreement();
        agreement.is_ok_and(|agreement| agreement.flags().contains(InitFlags::WRITEBACK_CACHE))
    }

    fn shard(&self, handle: HandleId) -> &RwLock<HashMap<HandleId, OpenFile>> {
        let [first, ..] = &self.handles;
        let place = usize::try_from(handle.0 % SHARDS as u64).unwrap_or_default();
        self.handles.get(place).unwrap_or(first)
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open file behind a handle; EBADF if there is none, or not one of `node`.
    fn file(&self, node: NodeId, handle: HandleId) -> Result<OpenFile> {
        let shard = self.shard(handle).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&handle).filter(|open| open.file.node == node).cloned().ok_or(Errno::BADF)
    }

    /// The file of `node` if it is open.
    fn open_file(&self, node: NodeId) -> Option<Arc<File>> {
        self.files().open.get(&node).and_then(Weak::upgrade)
    }

    /// Notes a handle that the file system inside has opened, maybe truncating the file.
    fn add(&self, ctx: &Context, node: NodeId, opened: Opened, flags: u32) -> Result<Opened> {
        let new = || {
            Arc::new(File {
                node,
                size: AtomicU64::new(0),
                resize: Mutex::new(()),
                in_flight: AtomicU32::new(0),
                most_in_flight: AtomicU32::new(0),
            })
        };
        let file = {
            let mut files = self.files();
            let file = files.open.get(&node).and_then(Weak::upgrade).unwrap_or_else(new);
            files.open.insert(node, Arc::downgrade(&file));
            file
        };
        let refreshed = {
            let _resize = file.lock_size();
            self.refresh(ctx, &file)
        };
        if let Err(errno) = refreshed {
            let flags = ReleaseFlags::empty();
            let release = Release { handle: opened.handle, flags, lock_owner: LockOwner(0) };
            let _ = self.inner.release(ctx, node, &release);
            return Err(errno);
        }
        let writable = OFlags::from_bits_retain(flags) & OFlags::RWMODE != OFlags::RDONLY;
        let mut shard = self.shard(opened.handle).write().unwrap_or_else(PoisonError::into_inner);
        shard.insert(opened.handle, OpenFile { file, writable });
        Ok(opened)
    }

    /// Takes the size over from the file system inside; `resize` is held.
    fn refresh(&self, ctx: &Context, file: &File) -> Result<()> {
        let attributes = self.inner.getattr(ctx, file.node, &Getattr { handle: None })?;
        file.size.store(attributes.attr.size, Ordering::Release);
        Ok(())
    }

    /// Runs what may change the size of a file.
    fn resizing<T>(&self, ctx: &Context, node: NodeId, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(file) = self.open_file(node) else { return change() };
        let _resize = file.lock_size();
        let result = change();
        self.refresh(ctx, &file)?;
        result
    }

    /// Lets a file grow as a write to it would; with `append` the write goes to its end.
    fn grow(&self, ctx: &Context, file: &File, write: &Write, append: bool) -> Result<()> {
        let end = |offset: u64| offset.checked_add(u64::from(write.size)).ok_or(Errno::FBIG);
        if !append && end(write.offset)? <= file.size.load(Ordering::Acquire) {
            return Ok(());
        }
        let _resize = file.lock_size();
        let size = file.size.load(Ordering::Acquire);
        let new = end(if append { size } else { write.offset })?;
        if new <= size {
            return Ok(());
        }
        let set = Setattr {
            handle: Some(write.handle),
            size: Some(new),
            kill_suidgid: write.write_flags.contains(WriteFlags::KILL_SUIDGID),
            ..Setattr::default()
        };
        self.inner.setattr(ctx, file.node, &set)?;
        file.size.store(new, Ordering::Release);
        Ok(())
    }
}

impl<F: FileSystem> FileSystem for NullStore<F> {
    fn below(&self) -> Result<&dyn FileSystem> {
        Ok(&self.inner)
    }

    fn destroy(&self) {
        for shard in &self.handles {
            let open = std::mem::take(&mut *shard.write().unwrap_or_else(PoisonError::into_inner));
            let mut files = self.files();
            open.values().for_each(|open| files.note(&open.file));
        }
        let files = std::mem::take(&mut *self.files());
        for (node, most) in files.most_in_flight {
            info!("null store: node {}: {most} writes in flight at most", node.0);
        }
        self.inner.destroy();
    }

    fn open(&self, ctx: &Context, node: NodeId, open: &Open) -> Result<Opened> {
        let opened = self.inner.open(ctx, node, open)?;
        self.add(ctx, node, opened, open.flags)
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.inner.create(ctx, parent, create)?;
        self.add(ctx, entry.node, opened, create.flags)
            .map(|opened| (entry, opened))
            .inspect_err(|_| self.inner.take_back_lookup(ctx, entry.node))
    }

    fn tmpfile(&self, ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.inner.tmpfile(ctx, parent, tmpfile)?;
        self.add(ctx, entry.node, opened, tmpfile.flags)
            .map(|opened| (entry, opened))
            .inspect_err(|_| self.inner.take_back_lookup(ctx, entry.node))
    }

    fn release(&self, ctx: &Context, node: NodeId, release: &Release) -> Result<()> {
        let handle = release.handle;
        if self.file(node, handle).is_ok() {
            let open = self.shard(handle).write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
            let mut files = self.files();
            if let Some(open) = open {
                files.note(&open.file);
            }
            if files.open.get(&node).is_some_and(|file| file.strong_count() == 0) {
                files.open.remove(&node);
            }
        }
        self.inner.release(ctx, node, release)
    }

    fn read(&self, _ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        let open = self.file(node, read.handle)?;
        self.wait();
        let left = open.file.size.load(Ordering::Acquire).saturating_sub(read.offset);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
        Ok(data.write_zeros(count))
    }

    fn write(&self, ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        let open = self.file(node, write.handle)?;
        if !open.writable {
            return Err(Errno::BADF);
        }
        let _in_flight = open.file.begin_write();
        self.wait();
        let cached = write.write_flags.contains(WriteFlags::CACHE);
        let append = !cached && write.flags & OFlags::APPEND.bits() != 0 && !self.guest_writes_back();
        self.grow(ctx, &open.file, write, append)?;
        Ok(data.len())
    }

    fn setattr(&self, ctx: &Context, node: NodeId, set: &Setattr) -> Result<Attributes> {
        match set.size {
            Some(_) => self.resizing(ctx, node, || self.inner.setattr(ctx, node, set)),
            None => self.inner.setattr(ctx, node, set),
        }
    }

    fn fallocate(&self, ctx: &Context, node: NodeId, fallocate: &Fallocate) -> Result<()> {
        self.resizing(ctx, node, || self.inner.fallocate(ctx, node, fallocate))
    }

    fn copy_file_range(&self, ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64> {
        self.resizing(ctx, copy.node_out, || self.inner.copy_file_range(ctx, node, copy))
    }
}
