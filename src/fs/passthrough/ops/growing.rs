//! Files of a FUSE server that grow while many write.
//!
//! The host's kernel writes to such a file asynchronously only below its size: what extends the file holds the file's lock
//! until it is done. So the size is set ahead: before a WRITE past the end is submitted, a zero is written to its last
//! byte. That byte is the request's own, which has locked its range and is about to write all of it. (ftruncate(2) was
//! rejected: another host may have made the file longer meanwhile, and would lose what it wrote.) While one zero is
//! under way, further writers gather, and one zero at the last end of all of them does for them: so many writers take
//! two or three round trips together.
//!
//! Until they are written, bytes below the new size read as zeros, here and on other hosts. If a WRITE fails, its bytes stay
//! zeros if others have written behind them, as in any file with holes; if not, the file gets the size back that was
//! written, as soon as no WRITE past the old end is under way. Whatever else may have changed the size meanwhile, here
//! or on another host, keeps the size that it finds.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, StatxFlags, ftruncate, statx};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

use crate::fs::Result;
use crate::fs::passthrough::handle_table::Handle;
use crate::sync::blocking::block_in_place;
use fuse_protocol::ids::NodeId;

/// Files that grow just now, of one share.
#[derive(Debug, Default)]
pub struct Growing {
    files: Mutex<HashMap<NodeId, Burst>>,
    changed: Condvar,
}

/// Writes to one file, from the first until none is under way.
#[derive(Debug)]
struct Burst {
    /// The size when it began.
    floor: u64,
    /// Where the last write ended that has succeeded.
    written: u64,
    /// The size that was set ahead.
    set: u64,
    /// The end that writers wait for.
    wanted: u64,
    /// Somebody changes the size.
    is_busy: bool,
    under_way: usize,
    /// A write has failed, and its bytes were never written.
    has_failed: bool,
    /// Something else may have changed the size.
    is_disturbed: bool,
}

impl Burst {
    fn new(floor: u64) -> Burst {
        Burst {
            floor,
            written: 0,
            set: 0,
            wanted: 0,
            is_busy: false,
            under_way: 0,
            has_failed: false,
            is_disturbed: false,
        }
    }

    /// The size that the file should have had; `None` if it has that one.
    fn size_to_restore(&self) -> Option<u64> {
        let real = self.floor.max(self.written);
        (self.has_failed && !self.is_disturbed && real < self.set).then_some(real)
    }
}

/// A change of a file that may make it longer, for as long as it is under way.
#[must_use = "the change has ended when this is dropped"]
pub struct Change {
    growing: Arc<Growing>,
    handle: Arc<Handle>,
    /// Where a WRITE ends; `None` for another change.
    end: Option<u64>,
    /// Where it has ended so far.
    written: u64,
}

impl Growing {
    /// Begins a WRITE that ends at `end`, after the file was made long enough for it.
    pub fn write(self: &Arc<Growing>, handle: &Arc<Handle>, end: u64) -> Result<Option<Change>> {
        let file = handle.fd();
        let is_longer = cached_size(file)? < end;
        let mut files = self.files();
        let node = handle.inode().node();
        if !is_longer && files.get(&node).is_none_or(|burst| end <= burst.floor) {
            return Ok(None);
        }
        let change = self.enter(&mut files, handle, Some(end))?;
        if is_longer {
            block_in_place(|| self.extend(files, node, file, end));
        }
        Ok(Some(change))
    }

    /// Begins something else that may change the size, or write data, also past the end.
    pub fn disturb(self: &Arc<Growing>, handle: &Arc<Handle>) -> Result<Change> {
        let mut files = self.files();
        let change = self.enter(&mut files, handle, None)?;
        if let Some(burst) = files.get_mut(&handle.inode().node()) {
            burst.is_disturbed = true;
        }
        Ok(change)
    }

    /// The size of this file is changed by its name, or without a handle.
    pub fn disturb_node(&self, node: NodeId) {
        if let Some(burst) = self.files().get_mut(&node) {
            burst.is_disturbed = true;
        }
    }

    fn enter(
        self: &Arc<Growing>,
        files: &mut HashMap<NodeId, Burst>,
        handle: &Arc<Handle>,
        end: Option<u64>,
    ) -> Result<Change> {
        let node = handle.inode().node();
        if !files.contains_key(&node) {
            // Under the lock: nobody has set anything ahead.
            let size = cached_size(handle.fd())?;
            files.try_reserve(1).map_err(|_| Errno::NOMEM)?;
            files.insert(node, Burst::new(size));
        }
        if let Some(burst) = files.get_mut(&node) {
            burst.under_way = burst.under_way.saturating_add(1);
            burst.wanted = burst.wanted.max(end.unwrap_or(0));
        }
        Ok(Change { growing: Arc::clone(self), handle: Arc::clone(handle), end, written: 0 })
    }

    /// Makes the file as long as `end`, or waits until somebody has. Where that fails, the WRITE will say why.
    fn extend<'a>(
        &'a self,
        mut files: MutexGuard<'a, HashMap<NodeId, Burst>>,
        node: NodeId,
        file: BorrowedFd<'_>,
        end: u64,
    ) {
        while let Some(burst) = files.get_mut(&node).filter(|burst| burst.set < end) {
            if burst.is_busy {
                files = self.changed.wait(files).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let target = burst.wanted;
            burst.is_busy = true;
            drop(files);
            let result = write_zero(file, target);
            files = self.files();
            self.changed.notify_all();
            let Some(burst) = files.get_mut(&node) else { return };
            burst.is_busy = false;
            match result {
                Ok(()) => burst.set = burst.set.max(target),
                Err(_) => return,
            }
        }
    }

    /// A change has ended; `written` is where.
    fn leave(&self, handle: &Handle, end: Option<u64>, written: u64) {
        let node = handle.inode().node();
        let mut files = self.files();
        let Some(burst) = files.get_mut(&node) else { return };
        burst.under_way = burst.under_way.saturating_sub(1);
        burst.written = burst.written.max(written);
        burst.has_failed |= end.is_some_and(|end| written < end);
        if burst.under_way > 0 {
            return;
        }
        let Some(size) = burst.size_to_restore() else {
            files.remove(&node);
            return;
        };
        let set = burst.set;
        *burst = Burst { is_busy: true, ..Burst::new(size) };
        drop(files);
        restore(handle.fd(), set, size);
        let mut files = self.files();
        self.changed.notify_all();
        match files.get_mut(&node) {
            Some(burst) if burst.under_way > 0 => burst.is_busy = false,
            _ => drop(files.remove(&node)),
        }
    }

    fn files(&self) -> MutexGuard<'_, HashMap<NodeId, Burst>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Change {
    /// It has written up to here.
    pub fn set_written(&mut self, end: u64) {
        self.written = self.written.max(end);
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        self.growing.leave(&self.handle, self.end, self.written);
    }
}

/// The size by which the host's kernel decides whether a write extends the file, and an asynchronous read is past its end.
pub fn cached_size(file: BorrowedFd<'_>) -> Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(file, c"", flags, StatxFlags::SIZE).map(|stat| stat.stx_size)
}

/// Makes a file as long as `end` by its last byte.
fn write_zero(file: BorrowedFd<'_>, end: u64) -> Result<()> {
    let offset = end.checked_sub(1).ok_or(Errno::INVAL)?;
    loop {
        match pwritev2(file, &[std::io::IoSlice::new(&[0])], offset, ReadWriteFlags::empty()) {
            Ok(1) => return Ok(()),
            Ok(_) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Gives a file its size back, if it still has the one that was set ahead.
fn restore(file: BorrowedFd<'_>, set: u64, size: u64) {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    if statx(file, c"", flags, StatxFlags::SIZE).is_ok_and(|stat| stat.stx_size == set) {
        // The guest was told of the failure already. A size that cannot be restored shows zeros.
        let _ = ftruncate(file, size);
    }
}
