//! Files of a FUSE server that grow while many write.
//!
//! The host's kernel writes to such a file asynchronously only below its size: what extends the file holds the file's lock
//! until it is done. So the size is set ahead: before a WRITE past the end is submitted, a zero is written to its last
//! byte. That byte is the request's own, which has locked its range and is about to write all of it. (ftruncate(2) was
//! rejected: another host may have made the file longer meanwhile, and would lose what it wrote.) While one zero is
//! under way, further writers gather, and one zero at the last end of all that wait does for them: so many writers take
//! two or three round trips together.
//!
//! The zero goes by a descriptor without O_DIRECT. When a write with O_DIRECT past the end fails, the host's kernel
//! truncates the file to the size that this host has last seen (`fuse_do_truncate` of fs/fuse/file.c), and cuts off what
//! other hosts have written behind it. And a server may refuse a byte with O_DIRECT, as GlusterFS does with
//! `performance.strict-o-direct`. For the same reason a WRITE whose zero fails is not tried: it fails with that error.
//!
//! Until they are written, bytes below the new size read as zeros, here and on other hosts, and stay zeros if the WRITE
//! fails. The size is not taken back: the bytes below it may be another host's by then.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

use crate::fs::Result;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::Opener;
use crate::sync::{block_in_place, lock};
use fuse_protocol::ids::NodeId;

/// Files that grow just now, of one share.
#[derive(Debug, Default)]
pub struct Growing {
    files: Mutex<HashMap<NodeId, Growth>>,
    changed: Condvar,
}

/// Writers that wait until one file is long enough.
#[derive(Debug, Default)]
struct Growth {
    /// Where their WRITEs end. None of these has begun, so each last byte may still become zero.
    ends: Vec<u64>,
    /// One of them sets the size.
    is_busy: bool,
}

impl Growing {
    /// Makes a file long enough for a WRITE that ends at `end`, whose range is locked.
    ///
    /// Only files of a FUSE server that are open with O_DIRECT need that.
    pub fn make_room(&self, handle: &Handle, opener: Opener<'_>, end: u64) -> Result<()> {
        if !handle.inode().mount().is_fuse() || !handle.file().is_direct() || cached_size(handle.fd())? >= end
        {
            return Ok(());
        }
        let file = handle.file().for_growing(opener);
        let node = handle.inode().node();
        block_in_place(|| {
            let mut files = self.files();
            files.try_reserve(1).map_err(|_| Errno::NOMEM)?;
            let ends = &mut files.entry(node).or_default().ends;
            ends.try_reserve(1).map_err(|_| Errno::NOMEM)?;
            ends.push(end);
            let (mut files, result) = self.extend(files, node, file, end);
            leave(&mut files, node, end);
            result
        })
    }

    /// Makes the file as long as `end`, or waits until somebody has.
    fn extend<'a>(
        &'a self,
        mut files: Files<'a>,
        node: NodeId,
        file: BorrowedFd<'_>,
        end: u64,
    ) -> (Files<'a>, Result<()>) {
        loop {
            match cached_size(file) {
                Ok(size) if size < end => {}
                // It was somebody else here, or on another host.
                result => return (files, result.map(drop)),
            }
            let Some(growth) = files.get_mut(&node) else { return (files, Err(Errno::IO)) };
            if growth.is_busy {
                files = self.changed.wait(files).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let last = growth.ends.iter().copied().max().unwrap_or(end);
            growth.is_busy = true;
            drop(files);
            let result = write_zero(file, last);
            files = self.files();
            if let Some(growth) = files.get_mut(&node) {
                growth.is_busy = false;
            }
            self.changed.notify_all();
            return (files, result);
        }
    }

    fn files(&self) -> Files<'_> {
        lock(&self.files)
    }
}

type Files<'a> = MutexGuard<'a, HashMap<NodeId, Growth>>;

/// A WRITE that ends there waits no more.
fn leave(files: &mut Files<'_>, node: NodeId, end: u64) {
    let Some(growth) = files.get_mut(&node) else { return };
    if let Some(place) = growth.ends.iter().position(|other| *other == end) {
        growth.ends.swap_remove(place);
    }
    if growth.ends.is_empty() {
        files.remove(&node);
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
