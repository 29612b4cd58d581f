//! A store that drops what is written: the benchmark of parallel direct writes without a disk.
//!
//! Names, opens and attributes are those of the file system below. Only data is missing: a write
//! takes as long as it was told to and is gone, a read gives zeros, and sizes behave as if the data
//! were there. [`NullStore`] also counts how many writes of one file are under way at once, which
//! shows what the guest's locks let through.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use log::info;

use super::{Context, FileSystem, Opened, Result};
use crate::fuse::flags::WriteFlags;
use crate::fuse::ids::{HandleId, NodeId};
use crate::fuse::name::LookupName;
use crate::fuse::reply::{Attributes, Entry, StatxReply};
use crate::fuse::request::{Create, Read, Setattr, Statx, Write};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// Drops the data that is written to the file system below.
pub struct NullStore<F> {
    fs: F,
    latency: Duration,
    files: RwLock<HashMap<NodeId, Arc<File>>>,
}

/// A file that was written to.
#[derive(Debug, Default)]
struct File {
    size: AtomicU64,
    writing: AtomicU32,
    most_writing: AtomicU32,
}

impl<F: FileSystem> NullStore<F> {
    /// Drops data after `latency`.
    pub fn new(fs: F, latency: Duration) -> NullStore<F> {
        NullStore { fs, latency, files: RwLock::default() }
    }

    fn find(&self, node: NodeId) -> Option<Arc<File>> {
        self.files.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// The file of `node`, which begins with the size it has below.
    fn find_or_add(&self, ctx: &Context, node: NodeId) -> Result<Arc<File>> {
        if let Some(file) = self.find(node) {
            return Ok(file);
        }
        let size = self.fs.getattr(ctx, node, None)?.attr.size;
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(File { size: size.into(), ..File::default() });
        Ok(Arc::clone(files.entry(node).or_insert_with(new)))
    }

    fn take_time(&self) {
        if !self.latency.is_zero() {
            thread::sleep(self.latency);
        }
    }

    fn with_size(&self, node: NodeId, mut attributes: Attributes) -> Attributes {
        if let Some(file) = self.find(node) {
            attributes.attr.size = file.size.load(Ordering::Relaxed);
            attributes.attr.blocks = attributes.attr.size.div_ceil(512);
        }
        attributes
    }

    fn entry_with_size(&self, entry: Entry) -> Entry {
        Entry { attributes: self.with_size(entry.node, entry.attributes), ..entry }
    }
}

impl File {
    /// Runs `write` and counts it among those that are under way.
    fn count<T>(&self, write: impl FnOnce() -> T) -> T {
        let writing = self.writing.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_writing.fetch_max(writing, Ordering::Relaxed);
        let result = write();
        self.writing.fetch_sub(1, Ordering::Relaxed);
        result
    }
}

impl<F: FileSystem> FileSystem for NullStore<F> {
    fn below(&self) -> Result<&dyn FileSystem> {
        Ok(&self.fs)
    }

    fn destroy(&self) {
        let files = std::mem::take(&mut *self.files.write().unwrap_or_else(PoisonError::into_inner));
        for (node, file) in files {
            let most = file.most_writing.load(Ordering::Relaxed);
            info!("null store: node {}: {most} writes in flight at most", node.0);
        }
        self.fs.destroy();
    }

    fn lookup(&self, ctx: &Context, parent: NodeId, name: LookupName<'_>) -> Result<Entry> {
        self.fs.lookup(ctx, parent, name).map(|entry| self.entry_with_size(entry))
    }

    fn getattr(&self, ctx: &Context, node: NodeId, handle: Option<HandleId>) -> Result<Attributes> {
        self.fs.getattr(ctx, node, handle).map(|attributes| self.with_size(node, attributes))
    }

    fn statx(&self, ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply> {
        let mut reply = self.fs.statx(ctx, node, statx)?;
        if let Some(file) = self.find(node) {
            reply.statx.size = file.size.load(Ordering::Relaxed);
            reply.statx.blocks = reply.statx.size.div_ceil(512);
        }
        Ok(reply)
    }

    fn setattr(&self, ctx: &Context, node: NodeId, set: &Setattr) -> Result<Attributes> {
        let attributes = self.fs.setattr(ctx, node, set)?;
        if let (Some(size), Some(file)) = (set.size, self.find(node)) {
            file.size.store(size, Ordering::Relaxed);
        }
        Ok(self.with_size(node, attributes))
    }

    fn create(&self, ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)> {
        self.fs.create(ctx, parent, create).map(|(entry, opened)| (self.entry_with_size(entry), opened))
    }

    fn read(&self, ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
        let Some(file) = self.find(node) else { return self.fs.read(ctx, node, read, data) };
        self.take_time();
        let left = file.size.load(Ordering::Relaxed).saturating_sub(read.offset);
        Ok(data.write_zeros(usize::try_from(left).unwrap_or(usize::MAX).min(data.len())))
    }

    fn write(&self, ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize> {
        let file = self.find_or_add(ctx, node)?;
        let written = data.len();
        file.count(|| {
            self.take_time();
            let appends = write.flags & libc::O_APPEND.cast_unsigned() != 0
                && !write.write_flags.contains(WriteFlags::CACHE);
            if appends {
                file.size.fetch_add(written as u64, Ordering::Relaxed);
            } else {
                file.size.fetch_max(write.offset.saturating_add(written as u64), Ordering::Relaxed);
            }
        });
        Ok(written)
    }
}
