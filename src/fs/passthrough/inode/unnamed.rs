//! Files without a name that came with their content.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, chmodat, chownat, ftruncate, openat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

use crate::fs::Result;
use crate::fs::passthrough::host::{PROC, proc_name};
use crate::migration::Unlinked;

/// Makes such a file on the file system of a directory; an O_PATH descriptor of it.
pub(super) fn make(directory: impl AsFd, content: &Unlinked) -> Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(PROC, proc_name(&directory), flags, Mode::RUSR | Mode::WUSR)?;
    ftruncate(&file, content.size)?;
    for (offset, bytes) in &content.extents {
        let (mut offset, mut rest) = (*offset, bytes.as_slice());
        while !rest.is_empty() {
            let written = pwritev2(&file, &[IoSlice::new(rest)], offset, ReadWriteFlags::empty())?;
            rest = rest.get(written..).filter(|_| written > 0).ok_or(Errno::IO)?;
            offset = offset.saturating_add(written as u64);
        }
    }
    let (uid, gid) = (Uid::from_raw(content.uid), Gid::from_raw(content.gid));
    chownat(&file, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    chmodat(PROC, proc_name(&file), Mode::from_raw_mode(content.mode & 0o7777), AtFlags::empty())?;
    openat(PROC, proc_name(&file), OFlags::PATH, Mode::empty())
}
