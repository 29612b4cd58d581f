//! The content of open files that have no name any more.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::fs::Result;
use crate::fs::passthrough::host::{Host, stat};
use crate::fs::passthrough::inode::Inode;
use crate::migration::Unlinked;

/// Bytes of one piece.
const PIECE: usize = 1 << 20;

/// Reads a file that has at most `limit` bytes of data; EFBIG for a larger one.
pub fn read(host: &Host, inode: &Inode, limit: u64) -> Result<Unlinked> {
    let path = inode.path()?;
    let now = stat(&*path)?;
    let file = host.open(&*path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut extents, mut left, mut at) = (Vec::new(), limit, 0);
    while let Some((start, end)) = next_data(&file, at, now.stx_size)? {
        left = left.checked_sub(end.saturating_sub(start)).ok_or(Errno::FBIG)?;
        read_extent(&file, (start, end), &mut extents)?;
        at = end;
    }
    Ok(Unlinked {
        mode: u32::from(now.stx_mode) & 0o7777,
        uid: now.stx_uid,
        gid: now.stx_gid,
        size: now.stx_size,
        extents,
    })
}

/// The next bytes from `at` on that are no hole.
fn next_data(file: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(_) => return Ok(Some((at, size))),
    };
    Ok((start < size).then_some((start, seek(file, SeekFrom::Hole(start))?.min(size))))
}

fn read_extent(file: &OwnedFd, (start, end): (u64, u64), into: &mut Vec<(u64, Vec<u8>)>) -> Result<()> {
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE).min(PIECE);
        let mut bytes = vec![0; wanted];
        let read = preadv2(file, &mut [IoSliceMut::new(&mut bytes)], at, ReadWriteFlags::empty())?;
        if read == 0 {
            // Somebody else has cut it.
            break;
        }
        bytes.truncate(read);
        into.push((at, bytes));
        at = at.saturating_add(read as u64);
    }
    Ok(())
}
