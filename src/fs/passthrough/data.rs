//! What files hold.

use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::PassthroughFs;
use super::credentials::without_fsetid;
use super::handles::Handle;
use super::io_mode::Mode;
use super::range_lock::lock_copy;
use crate::fs::Result;
use crate::fuse::flags::{FsyncFlags, WriteFlags};
use crate::fuse::ids::LockOwner;
use crate::fuse::request::{CopyFileRange, Read, Write};
use crate::sys::guest_buffers::{GuestReader, GuestWriter};

/// Most bytes that are copied at once. Blocks that the host shares instead of copying are smaller.
const COPY_PIECE: u64 = 64 << 20;

impl PassthroughFs {
    /// READ. In direct mode it waits for writes to the same bytes, so that it sees no half of one.
    pub(super) fn read_data(
        &self,
        handle: &Handle,
        read: &Read,
        data: &mut GuestWriter<'_>,
    ) -> Result<usize> {
        let mode = handle.mode().ok_or(Errno::ISDIR)?;
        let ranges = &handle.inode.ranges;
        let _guard = (mode != Mode::Cached).then(|| ranges.read(read.offset, u64::from(read.size)));
        let mut done = 0;
        while !data.is_empty() {
            match data.read_from(handle.fd(), read.offset.saturating_add(done as u64), 0) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // What was read before an error is valid; the next read meets the error again.
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// WRITE. Of two writes that overlap, one is whole before the other begins.
    pub(super) fn write_data(
        &self,
        handle: &Handle,
        write: &Write,
        data: &mut GuestReader<'_>,
    ) -> Result<usize> {
        if handle.mode().is_none() {
            return Err(Errno::ISDIR);
        }
        let from_cache = write.write_flags.contains(WriteFlags::CACHE);
        let appends = !from_cache && write.flags & libc::O_APPEND.cast_unsigned() != 0;
        let ranges = &handle.inode.ranges;
        // Where an append goes is known when it is done: it excludes all other writes.
        let _guard =
            if appends { ranges.write_from(0) } else { ranges.write(write.offset, u64::from(write.size)) };
        let kill = write.write_flags.contains(WriteFlags::KILL_SUIDGID);
        let _unprivileged = kill.then(without_fsetid).transpose()?;
        self.drop_mapped_capability(&handle.inode)?;
        // The guest's idea of the end of the file may be old; with RWF_APPEND the host's counts.
        let flags = if appends { libc::RWF_APPEND } else { 0 };
        write_all(handle.fd(), write.offset, flags, data)
    }

    /// FLUSH: one of the guest's descriptors of this open file was closed.
    pub(super) fn flush_handle(&self, handle: &Handle, owner: LockOwner) -> Result<()> {
        handle.inode.locks.drop_owner(owner);
        // Closing a duplicate makes network file systems report errors of delayed writes.
        let duplicate = rustix::io::fcntl_dupfd_cloexec(handle.fd(), 0)?;
        crate::sys::close(duplicate)
    }
}

/// Writes all of `data`; fewer bytes only if an error came after the first one.
fn write_all(file: BorrowedFd<'_>, offset: u64, flags: i32, data: &mut GuestReader<'_>) -> Result<usize> {
    let mut done = 0;
    while !data.is_empty() {
        match data.write_to(file, offset.saturating_add(done as u64), flags) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// FSYNC and FSYNCDIR.
pub(super) fn sync(handle: &Handle, flags: FsyncFlags) -> Result<()> {
    if flags.contains(FsyncFlags::FDATASYNC) {
        rustix::fs::fdatasync(handle.fd())
    } else {
        rustix::fs::fsync(handle.fd())
    }
}

/// FALLOCATE. Modes that move data exclude all writes behind the range.
pub(super) fn allocate(handle: &Handle, mode: u32, offset: u64, length: u64) -> Result<()> {
    let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
    let ranges = &handle.inode.ranges;
    let moves = FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE;
    let _guard =
        if mode.intersects(moves) { ranges.write_from(offset) } else { ranges.write(offset, length) };
    rustix::fs::fallocate(handle.fd(), mode, offset, length)
}

/// LSEEK, which guests send for SEEK_DATA and SEEK_HOLE alone. The descriptor's own position means
/// nothing: all reads and writes name their offset.
pub(super) fn seek(handle: &Handle, offset: u64, whence: u32) -> Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| Errno::NXIO)?.cast_unsigned();
    let from = match i32::try_from(whence) {
        Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
        Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
        Ok(libc::SEEK_SET) => SeekFrom::Start(offset),
        Ok(libc::SEEK_END) => SeekFrom::End(offset.cast_signed()),
        _ => return Err(Errno::INVAL),
    };
    if handle.mode().is_none() {
        return Err(Errno::INVAL);
    }
    rustix::fs::seek(handle.fd(), from)
}

/// COPY_FILE_RANGE, piece by piece: others wait for a piece and not for the whole copy. What was copied
/// before an error counts; the next request meets the error again.
pub(super) fn copy(source: &Handle, target: &Handle, copy: &CopyFileRange) -> Result<u64> {
    if copy.flags != 0 {
        return Err(Errno::INVAL);
    }
    let length = copied_within(source, target, copy)?;
    let mut done = 0;
    loop {
        let piece = CopyFileRange {
            offset_in: copy.offset_in.saturating_add(done),
            offset_out: copy.offset_out.saturating_add(done),
            length: (length - done).min(COPY_PIECE),
            ..*copy
        };
        match copy_piece(source, target, &piece) {
            Ok(0) => return Ok(done),
            Ok(count) => done = done.saturating_add(count).min(length),
            Err(_) if done > 0 => return Ok(done),
            Err(errno) => return Err(errno),
        }
        if done == length {
            return Ok(done);
        }
    }
}

/// How many bytes are to be copied. Within one file that ends where the file ended before the first
/// piece, and if the ranges share bytes, nothing is copied: the host would see neither in a piece.
fn copied_within(source: &Handle, target: &Handle, copy: &CopyFileRange) -> Result<u64> {
    let length = copy.length.min(i64::MAX.unsigned_abs());
    let (from, to) = (source.inode.key, target.inode.key);
    if length <= COPY_PIECE || (from.device, from.ino) != (to.device, to.ino) {
        return Ok(length);
    }
    let size = u64::try_from(rustix::fs::fstat(source.fd())?.st_size).unwrap_or(0);
    let length = length.min(size.saturating_sub(copy.offset_in));
    if copy.offset_in.abs_diff(copy.offset_out) < length { Err(Errno::INVAL) } else { Ok(length) }
}

fn copy_piece(source: &Handle, target: &Handle, copy: &CopyFileRange) -> Result<u64> {
    let length = usize::try_from(copy.length).map_err(|_| Errno::INVAL)?;
    let from = (&source.inode.ranges, copy.offset_in);
    let to = (&target.inode.ranges, copy.offset_out);
    let _guards = lock_copy(from, to, copy.length);
    let (mut offset_in, mut offset_out) = (copy.offset_in, copy.offset_out);
    let copied = rustix::fs::copy_file_range(
        source.fd(),
        Some(&mut offset_in),
        target.fd(),
        Some(&mut offset_out),
        length,
    )?;
    Ok(copied as u64)
}
