//! READ, WRITE, FSYNC, FLUSH, LSEEK, FALLOCATE and COPY_FILE_RANGE.

use std::io::IoSliceMut;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags, statx};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::growing::Growing;
use super::mapped::{self, Mapping};
use super::replay::{self, begin_append};
use crate::fs::passthrough::caller::set_id::KillPriv;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::Opener;
use crate::fs::passthrough::inode::io_mode::Mode;
use crate::fs::passthrough::inode::range_lock::{RangeGuard, lock_copy};
use crate::fs::{Context, Result};
use crate::metrics::notes;
use crate::state_file::Effects;
use crate::sys::guest_buffers::{GuestReader, GuestWriter};
use fuse_protocol::flags::{FsyncFlags, WriteFlags};
use fuse_protocol::ids::LockOwner;
use fuse_protocol::request::{CopyFileRange, Read, Write};

/// Most bytes that one system call copies. Blocks that the host shares instead are smaller.
const COPY_PIECE: u64 = 64 << 20;

/// READ. In direct mode it waits for writes to the same bytes, so that it never sees a part of one.
pub fn read(opener: Opener<'_>, handle: &Handle, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize> {
    let mode = handle.mode().ok_or(Errno::ISDIR)?;
    let mut file = handle.file().for_request(read.offset, read.size, read.flags, opener)?;
    let mut refused = false;
    let ranges = handle.inode().ranges();
    let _guard = (mode != Mode::Cached).then(|| ranges.read(read.offset, u64::from(read.size)));
    let mut done = 0;
    while !data.is_empty() {
        let at_once = data.fits_one_call();
        let offset = read.offset.saturating_add(done as u64);
        match data.read_from(file, offset, 0) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                let end = offset.saturating_add(count as u64);
                if at_once && !data.is_empty() && is_end(handle, file, end) {
                    break;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::INVAL) if !refused && handle.file().refuse_any_length() => {
                (file, refused) = (handle.file().after_refusal(), true);
            }
            // What was read before an error is valid; the next read meets the error again.
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// What a WRITE depends on, besides the file.
#[derive(Clone, Copy, Debug)]
pub struct Writing<'a> {
    /// Opens files once more.
    pub opener: Opener<'a>,
    /// Files that grow.
    pub growing: &'a Growing,
    /// What it does to set-id bits.
    pub kill_priv: KillPriv<'a>,
    /// The guest writes back its cache.
    pub writeback: bool,
    /// How files are written through mappings; `None` if none is.
    pub mapping: Option<Mapping<'a>>,
}

/// WRITE. Of two overlapping writes, one is complete before the other begins.
pub fn write(
    writing: Writing<'_>,
    ctx: &Context,
    handle: &Handle,
    write: &Write,
    data: &mut GuestReader<'_>,
) -> Result<usize> {
    let Writing { opener, growing, kill_priv, writeback, mapping } = writing;
    let mode = handle.mode().ok_or(Errno::ISDIR)?;
    let from_cache = write.write_flags.contains(WriteFlags::CACHE);
    let appends = !from_cache && appends(handle, write.flags, writeback);
    let append_only = handle.file().is_append_only();
    if append_only && !appends && !from_cache {
        // The host would put it at the end, wherever it belongs.
        return Err(Errno::PERM);
    }
    let file = if from_cache {
        handle.file().buffered(opener)?
    } else if appends && handle.inode().mount().server_appends() {
        handle.file().appender(opener)?
    } else {
        handle.file().for_request(write.offset, write.size, write.flags, opener)?
    };
    let ranges = handle.inode().ranges();
    let guard = if appends || append_only {
        lock_end(handle, write)?
    } else {
        ranges.write(write.offset, u64::from(write.size))
    };
    notes::saw_writers(guard.writers());
    let member = kill_priv.begin(ctx, handle.inode(), kill_priv.bits_after_write(ctx, mode, write))?;
    let flags = sync_flags(write.flags);
    if appends {
        let there = begin_append(ctx.effects, opener, handle, data)?;
        if there > 0 && data.is_empty() {
            return Ok(there);
        }
        append(file, write.offset, flags | libc::RWF_APPEND, data).map(|written| there + written)
    } else if append_only {
        append_pages(file, write.offset, flags, data)
    } else if let Some(mapping) = mapping.filter(|_| mode == Mode::Parallel && flags == 0 && member.is_none())
    {
        mapped::write(mapping, handle, write.offset, data, |data| {
            write_all(handle, file, write.offset, 0, data)
        })
    } else {
        growing.make_room(handle, opener, write.offset.saturating_add(write.size.into()))?;
        write_all(handle, file, write.offset, flags, data)
    }
}

/// Whether a WRITE that does not come from the cache goes to the end of the file on the host.
///
/// The guest's size of the file may be old, so the host's applies; unless the guest writes back its cache: then its
/// size applies, which may include data that it has not sent yet.
pub fn appends(handle: &Handle, flags: u32, writeback: bool) -> bool {
    flags & libc::O_APPEND.cast_unsigned() != 0 && (handle.file().is_append_only() || !writeback)
}

/// FLUSH: one of the guest's descriptors of this open file was closed.
pub fn flush(handle: &Handle, owner: LockOwner) -> Result<()> {
    handle.inode().locks().drop_owner(owner)?;
    handle.inode().settle();
    if !handle.file().is_writable() {
        return Ok(());
    }
    // Closing a duplicate makes network file systems report errors of delayed writes.
    handle.file().all().try_for_each(|file| match rustix::io::fcntl_dupfd_cloexec(file, 0) {
        // The guest's close(2) does not fail for lack of one; fsync(2) reports such errors, too.
        Err(Errno::MFILE | Errno::NFILE) => Ok(()),
        duplicate => crate::sys::close(duplicate?),
    })
}

/// LSEEK, which guests send for SEEK_DATA and SEEK_HOLE alone. The descriptor's own position is not
/// used: all reads and writes have an offset.
///
/// Where the guest writes back its cache, the host knows neither all data nor the size. ENOSYS makes the guest treat all
/// of a file as data, up to its own size.
pub fn lseek(handle: &Handle, offset: u64, whence: u32, writeback: bool) -> Result<u64> {
    if writeback {
        return Err(Errno::NOSYS);
    }
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

/// COPY_FILE_RANGE. It does not say whether O_DIRECT is still set, and may have any length.
pub fn copy_file_range(
    opener: Opener<'_>,
    source: &Handle,
    target: &Handle,
    range: &CopyFileRange,
) -> Result<u64> {
    let files = (source.file().buffered(opener)?, target.file().buffered(opener)?);
    copy(source, target, files, range)
}

/// Whether a read that ended at `end` with room left has met the end of the file.
///
/// On a local disk it has. A network file system, or one in user space, may return fewer bytes than there are, so the size
/// that the host has cached is compared.
pub fn is_end(handle: &Handle, file: BorrowedFd<'_>, end: u64) -> bool {
    // File systems without a block device have devices of major number 0.
    handle.inode().key().device.0 != 0
        || statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::SIZE)
            .is_ok_and(|stat| stat.stx_size <= end)
}

/// Flags of pwritev2(2) for the guest's `O_*` flags: these have `RWF_DSYNC` of the guest's pwritev2(2), and
/// `mount -o sync`, which the flags of the open do not.
pub fn sync_flags(flags: u32) -> i32 {
    let flags = flags.cast_signed();
    if flags & libc::O_SYNC == libc::O_SYNC {
        libc::RWF_SYNC
    } else if flags & libc::O_DSYNC != 0 {
        libc::RWF_DSYNC
    } else {
        0
    }
}

/// Locks all bytes that an append may write: its offset is known only afterwards.
fn lock_end<'a>(handle: &'a Handle, write: &Write) -> Result<RangeGuard<'a>> {
    let ranges = handle.inode().ranges();
    // A write to the page cache is complete before another request has parked.
    let slow = handle.file().is_direct() || write.flags & libc::O_DSYNC.cast_unsigned() != 0;
    if handle.mode() == Some(Mode::Cached) || !slow {
        return Ok(ranges.write_from(0));
    }
    let guard = ranges.write_from(write.offset);
    // While its end is locked the file is not truncated, so it does not become shorter than now.
    if statx(handle.fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::SIZE)?.stx_size >= write.offset {
        return Ok(guard);
    }
    drop(guard);
    Ok(ranges.write_from(0))
}

/// Appends `data` in one system call: after a part of it, other requests may have appended.
fn append(file: BorrowedFd<'_>, offset: u64, flags: i32, data: &mut GuestReader<'_>) -> Result<usize> {
    loop {
        match data.write_at_once_to(file, offset, flags) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Writes pages of the guest's cache to an append-only file, if they append: they begin at or before the end, and equal
/// the file up to there.
fn append_pages(file: BorrowedFd<'_>, offset: u64, flags: i32, data: &mut GuestReader<'_>) -> Result<usize> {
    let all = data.len();
    let size = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::SIZE)?.stx_size;
    let mut left = size.checked_sub(offset).ok_or(Errno::PERM)?;
    while left > 0 && !data.is_empty() {
        let (mut guests, mut hosts) = ([0; 4096], [0; 4096]);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(guests.len());
        let count = data.read(guests.get_mut(..len).unwrap_or_default());
        let room = hosts.get_mut(..count).unwrap_or_default();
        let read = preadv2(file, &mut [IoSliceMut::new(room)], size - left, ReadWriteFlags::empty());
        if read != Ok(count) || guests.get(..count) != hosts.get(..count) {
            return Err(Errno::PERM);
        }
        left -= count as u64;
    }
    let old = all - data.len();
    if data.is_empty() { Ok(old) } else { Ok(old + append(file, size, flags | libc::RWF_APPEND, data)?) }
}

/// Writes all of `data`; fewer bytes only if an error came after the first one.
fn write_all(
    handle: &Handle,
    file: BorrowedFd<'_>,
    offset: u64,
    flags: i32,
    data: &mut GuestReader<'_>,
) -> Result<usize> {
    let (mut done, mut file, mut refused) = (0, file, false);
    while !data.is_empty() {
        match data.write_to(file, offset.saturating_add(done as u64), flags) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(Errno::INVAL) if !refused && handle.file().refuse_any_length() => {
                (file, refused) = (handle.file().after_refusal(), true);
            }
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// FSYNC and FSYNCDIR.
pub fn fsync(opener: Opener<'_>, effects: Effects<'_>, handle: &Handle, flags: FsyncFlags) -> Result<()> {
    let sync = |file: BorrowedFd<'_>| {
        if flags.contains(FsyncFlags::FDATASYNC) {
            rustix::fs::fdatasync(file)
        } else {
            rustix::fs::fsync(file)
        }
    };
    handle.inode().settle();
    replay::sync(effects, opener, handle, sync)?;
    handle.inode().synced();
    // A server may keep what was written through each of its open files apart.
    if handle.inode().mount().is_fuse() { handle.file().others().try_for_each(sync) } else { Ok(()) }
}

/// FALLOCATE. Modes that move data exclude all writes behind the range.
pub fn fallocate(handle: &Handle, mode: u32, offset: u64, length: u64) -> Result<()> {
    let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
    let ranges = handle.inode().ranges();
    let moves = FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE;
    let _guard =
        if mode.intersects(moves) { ranges.write_from(offset) } else { ranges.write(offset, length) };
    rustix::fs::fallocate(handle.fd(), mode, offset, length)
}

/// COPY_FILE_RANGE from one descriptor to another, which are those of the handles, piece by piece: others
/// wait for a piece and not for the whole copy. What was copied before an error counts; the next request
/// meets the error again.
fn copy(
    source: &Handle,
    target: &Handle,
    files: (BorrowedFd<'_>, BorrowedFd<'_>),
    copy: &CopyFileRange,
) -> Result<u64> {
    if copy.flags != 0 {
        return Err(Errno::INVAL);
    }
    let length = copied_within(source, target, files.0, copy)?;
    let mut done = 0;
    loop {
        let piece = CopyFileRange {
            offset_in: copy.offset_in.saturating_add(done),
            offset_out: copy.offset_out.saturating_add(done),
            length: (length - done).min(COPY_PIECE),
            ..*copy
        };
        match copy_piece(source, target, files, &piece) {
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
fn copied_within(
    source: &Handle,
    target: &Handle,
    file: BorrowedFd<'_>,
    copy: &CopyFileRange,
) -> Result<u64> {
    let length = copy.length.min(i64::MAX.unsigned_abs());
    let (from, to) = (*source.inode().key(), *target.inode().key());
    if length <= COPY_PIECE || (from.device, from.ino) != (to.device, to.ino) {
        return Ok(length);
    }
    let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
    let length = length.min(size.saturating_sub(copy.offset_in));
    if copy.offset_in.abs_diff(copy.offset_out) < length { Err(Errno::INVAL) } else { Ok(length) }
}

fn copy_piece(
    source: &Handle,
    target: &Handle,
    files: (BorrowedFd<'_>, BorrowedFd<'_>),
    copy: &CopyFileRange,
) -> Result<u64> {
    let length = usize::try_from(copy.length).map_err(|_| Errno::INVAL)?;
    let from = (source.inode().ranges(), copy.offset_in);
    let to = (target.inode().ranges(), copy.offset_out);
    let _guards = lock_copy(from, to, copy.length);
    let (mut offset_in, mut offset_out) = (copy.offset_in, copy.offset_out);
    let copied =
        rustix::fs::copy_file_range(files.0, Some(&mut offset_in), files.1, Some(&mut offset_out), length)?;
    Ok(copied as u64)
}
