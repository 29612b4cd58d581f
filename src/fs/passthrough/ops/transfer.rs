//! READ and WRITE by an engine: the same as in [`data`](super::data), cut where the system call is.
//!
//! An engine pays where many system calls are under way at once and each of them would occupy a thread. So these are left
//! to threads, whose way is shorter: appends, pages of the guest's cache, what one system call does not take, and what
//! the host has in its cache, unless the options ask for an engine in any case.

use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::data::{appends, is_end, sync_flags};
use super::growing::{Growing, cached_size};
use crate::fs::passthrough::caller::credentials::{SetIdBits, set_id_bits};
use crate::fs::passthrough::caller::set_id::KillPriv;
use crate::fs::passthrough::config::IoEngine;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::Opener;
use crate::fs::passthrough::inode::io_mode::Mode;
use crate::fs::passthrough::inode::range_lock::{RangeGuard, Ticket};
use crate::fs::transfer::{Call, Load, Progress, Transfer};
use crate::fs::{Context, Result};
use crate::metrics::notes;
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::request::{Read, Write};

/// A READ or WRITE that has begun.
type Begun = Option<Box<dyn Transfer>>;

/// What it takes to begin one.
#[derive(Clone, Copy, Debug)]
pub struct Engine<'a> {
    /// Which files it serves.
    pub kind: IoEngine,
    /// What else is under way.
    pub load: Load,
    /// Opens files once more.
    pub opener: Opener<'a>,
    /// Files that grow.
    pub growing: &'a Growing,
}

impl Engine<'_> {
    /// Whether a request with these flags is for the engine.
    fn wants(self, handle: &Handle, flags: u32) -> bool {
        let file = handle.file();
        match self.kind {
            IoEngine::Threads => false,
            // A descriptor that has given O_DIRECT up does not block, for io_uring.
            _ if file.has_given_up_direct() => false,
            IoEngine::IoUring => true,
            IoEngine::Auto => {
                let is_direct = file.is_direct() && (file.takes_any_length() || is_direct(flags));
                // The kernel lets one of several threads write to a file of a FUSE server.
                is_direct && (self.load == Load::Shared || handle.inode().mount().is_fuse())
            }
        }
    }
}

fn is_direct(flags: u32) -> bool {
    flags & OFlags::DIRECT.bits() != 0
}

/// A READ or WRITE that is under way.
struct Submitted {
    handle: Arc<Handle>,
    /// `None` for a READ of a cached file, and after the end.
    range: Option<Ticket>,
    /// The flags of the program's open file.
    flags: u32,
    offset: u64,
    done: usize,
    /// The kernel was asked on a thread.
    is_here: bool,
    /// The server has refused it with O_DIRECT.
    is_refused: bool,
    /// What a WRITE does to set-id bits; `None` for a READ.
    bits: Option<SetIdBits>,
}

/// Begins a READ of `handle`, unless a thread is to serve it.
pub fn read(engine: Engine<'_>, handle: Arc<Handle>, read: &Read) -> Result<Begun> {
    let Some(mode) = handle.mode().filter(|_| read.size > 0 && engine.wants(&handle, read.flags)) else {
        return Ok(None);
    };
    // A second descriptor, if it takes one.
    let file = handle.file().for_request(read.offset, read.size, read.flags, engine.opener)?;
    let end = read.offset.saturating_add(read.size.into());
    if handle.inode().mount().is_fuse() && cached_size(file)? < end {
        // Another host may have made the file longer, for which the kernel asks the server only if a thread waits.
        return Ok(None);
    }
    let ranges = handle.inode().ranges();
    let range =
        (mode != Mode::Cached).then(|| ranges.read(read.offset, read.size.into())).map(RangeGuard::keep);
    Ok(Some(Box::new(Submitted {
        handle,
        range,
        flags: read.flags,
        offset: read.offset,
        done: 0,
        is_here: false,
        is_refused: false,
        bits: None,
    })))
}

/// Begins a WRITE, unless a thread is to serve it.
pub fn write(
    engine: Engine<'_>,
    kill_priv: KillPriv<'_>,
    writeback: bool,
    ctx: &Context,
    handle: Arc<Handle>,
    write: &Write,
) -> Result<Begun> {
    let is_ours = |_: &Mode| {
        write.size > 0
            && !write.write_flags.contains(WriteFlags::CACHE)
            && !handle.file().is_append_only()
            && !appends(&handle, write.flags, writeback)
            && engine.wants(&handle, write.flags)
    };
    let Some(mode) = handle.mode().filter(is_ours) else { return Ok(None) };
    let bits = kill_priv.bits_after_write(ctx, mode, write);
    let inode = handle.inode();
    if bits == SetIdBits::Clear && (inode.has_lone_group_bit() || inode.may_have_set_id_bits()) {
        // The caller's group counts, which is a thread's, or bits are to be cleared that the host leaves.
        return Ok(None);
    }
    handle.file().for_request(write.offset, write.size, write.flags, engine.opener)?;
    let range = handle.inode().ranges().write(write.offset, write.size.into());
    notes::saw_writers(range.writers());
    kill_priv.drop_mapped_capability(handle.inode())?;
    if handle.inode().mount().is_fuse() {
        set_id_bits(bits)?;
        let end = write.offset.saturating_add(write.size.into());
        engine.growing.make_room(&handle, engine.opener, end)?;
    }
    let range = Some(range.keep());
    let (flags, offset) = (write.flags, write.offset);
    Ok(Some(Box::new(Submitted {
        handle,
        range,
        flags,
        offset,
        done: 0,
        is_here: false,
        is_refused: false,
        bits: Some(bits),
    })))
}

impl Transfer for Submitted {
    fn call(&self) -> Call<'_> {
        Call {
            file: if self.is_refused {
                self.handle.file().after_refusal()
            } else {
                self.handle.file().opened_for(self.flags)
            },
            offset: self.offset.saturating_add(self.done as u64),
            flags: if self.bits.is_some() { sync_flags(self.flags) } else { 0 },
        }
    }

    fn preparation(&self) -> u8 {
        match self.bits {
            None => 0,
            Some(SetIdBits::Keep) => 1,
            Some(SetIdBits::Clear) => 2,
        }
    }

    fn prepare(&self) -> Result<()> {
        self.bits.map_or(Ok(()), set_id_bits)
    }

    fn advance(&mut self, result: Result<usize>, left: usize) -> Progress {
        match result {
            Ok(0) => Progress::Over(Ok(self.done)),
            Ok(count) => {
                self.done += count;
                let end = self.offset.saturating_add(self.done as u64);
                let is_over = left == 0
                    || self.bits.is_none()
                        && is_end(&self.handle, self.handle.file().opened_for(self.flags), end);
                if is_over { Progress::Over(Ok(self.done)) } else { Progress::Again }
            }
            // The second one is what is left of a request whose thread ends.
            Err(Errno::INTR | Errno::CANCELED) => Progress::Again,
            Err(Errno::AGAIN) if !self.is_here => {
                // If that says so, too, it is the server's answer.
                self.is_here = true;
                Progress::Here
            }
            Err(Errno::INVAL) if !self.is_refused && self.handle.file().refuse_any_length() => {
                self.is_refused = true;
                Progress::Here
            }
            Err(_) if self.done > 0 => Progress::Over(Ok(self.done)),
            Err(errno) => Progress::Over(Err(errno)),
        }
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        if let Some(range) = self.range.take() {
            self.handle.inode().ranges().unlock(range);
        }
    }
}
