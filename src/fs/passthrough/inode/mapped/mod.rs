//! Mapped writes: a WRITE that overwrites bytes of a file is copied into a shared mapping of it.
//!
//! pwritev2(2) holds the file's lock in the host's kernel exclusively, so many writers of one file are as fast as one. A
//! copy into a mapping takes no such lock. The rest of what pwritev2(2) does is done here:
//!
//! - **Errors** (no space, no quota, a swap file, a file that became immutable): the page fault fails, and pwritev2(2) is called,
//!   which has the error. Only pages that it has written before are mapped, so that nothing is read from a disk only to be
//!   overwritten. After fsync(2) pages are clean, and have to be written by it again.
//! - **The end of the file.** Bytes past the end are lost, so the size is read *after* the copy; if it is smaller than the end of the
//!   copy, pwritev2(2) does all of it again. So a truncation on the host that was complete before the write began is never overlooked.
//! - **Set-id bits** are in the same answer: if the file has any, pwritev2(2) follows, which clears them.
//! - **Everything else that is checked at a write** (capabilities of the file, `chattr +S`, a mount that became synchronous, a file system that became
//!   read-only, RLIMIT_FSIZE) is checked every [`LEASE`]: then a write goes through pwritev2(2), and only if it succeeds mapped ones follow.
//! - **Times**: see below.
//!
//! ## Times
//!
//! A mapping moves mtime and ctime when a clean page becomes dirty, and not at each write. A mapped write marks the file as *unsettled*
//! before it is acknowledged. Whoever settles it sets mtime and ctime to the present: a thread does that within [`super::settler::TICK`],
//! and requests do that show times or end the use of a file. The mark is in the inode's record too, so that it outlives the process.
//!
//! The protocol: `state` changes under the lock `turn` only. A writer reads it after its copy; unless it is UNSETTLED, the
//! writer takes the lock and sets it, first in the record. Who settles takes the lock, sets SETTLING, sets the times, and
//! sets SETTLED. So a writer that reads UNSETTLED has copied before the clock is read (a fence on either side), and one that
//! does not waits for the lock. Whoever reads times takes the lock unless the state is SETTLED. A request that sets times
//! holds the lock from before it settles until it is done, so that they are not overwritten by those of earlier writes.

mod payoff;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwapOption;
use rustix::fs::{
    AtFlags, IFlags, Mode, StatVfsMountFlags, Statx, StatxAttributes, StatxFlags, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, fstatvfs, statx,
};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use self::payoff::Payoff;
use super::settler::Settler;
use crate::fs::Result;
use crate::limits::GuestFd;
use crate::logging::warn_limited;
use crate::sync::lock;
use crate::sys::clock::monotonic;
use crate::sys::file_flags;
use crate::sys::guest_buffers::GuestReader;
use crate::sys::window::{WINDOW, Window};

/// For how long mapped writes may follow one by pwritev2(2), in nanoseconds.
pub const LEASE: u64 = 100_000_000;
/// Nanoseconds without a write after which a window is given back.
const IDLE: u64 = 10_000_000_000;
/// Windows of one file at most.
const SLOTS: usize = 64;
/// Bytes of a page, or of a part of a larger one.
const PAGE: u64 = 4096;
/// Pages of a window, in words of marks.
const WORDS: usize = (WINDOW / PAGE / 64) as usize;

/// The times are right.
const SETTLED: u8 = 0;
/// Writes were acknowledged since the times were set.
const UNSETTLED: u8 = 1;
/// They are being set.
const SETTLING: u8 = 2;

/// Errors with which times cannot be set later either: somebody on the host has changed the file or its file system.
pub const STAYS: [Errno; 5] = [Errno::PERM, Errno::ACCESS, Errno::ROFS, Errno::STALE, Errno::NOENT];

/// Flags of a file with which it is not mapped: what is written is synchronous, forbidden, or journalled.
const UNMAPPED: IFlags =
    IFlags::SYNC.union(IFlags::IMMUTABLE).union(IFlags::APPEND).union(IFlags::JOURNALING);

/// A file that is written through mappings.
#[derive(Debug)]
pub struct MappedFile {
    windows: [ArcSwapOption<Slot>; SLOTS],
    /// Bytes that the file had when it was last asked.
    size: AtomicU64,
    /// Mapped writes may begin until then.
    lease: AtomicU64,
    state: AtomicU8,
    turn: Mutex<Turn>,
    payoff: Payoff,
    settler: Arc<Settler>,
    /// fsync(2) makes pages clean: the file system has a disk.
    has_disk: bool,
}

#[derive(Debug, Default)]
struct Turn {
    /// Goes up when a lease is revoked.
    epoch: u32,
    /// The times cannot be set any more.
    is_over: bool,
}

/// A window, and the pages in it that were written by pwritev2(2).
#[derive(Debug)]
struct Slot {
    index: u64,
    window: Window,
    marks: [AtomicU64; WORDS],
    /// When it was last used, in units of 2^30 nanoseconds.
    used: AtomicU32,
}

/// A write that was not mapped, and is to be made by pwritev2(2).
#[derive(Clone, Copy, Debug)]
#[must_use = "the write was not made"]
pub struct Miss {
    started: u64,
    epoch: Option<u32>,
    /// All pages had been written before.
    is_warm: bool,
}

/// The times of an inode.
pub trait Times {
    /// Remembers in the inode's record whether it is unsettled.
    fn note_unsettled(&self, is: bool);

    /// Sets mtime and ctime to the present.
    fn touch(&self) -> Result<()>;
}

impl MappedFile {
    /// The file that `file` has open, for a request. `has_disk` says whether its pages are ever written back. An error if its times
    /// cannot be set, or if it is not to be mapped.
    pub fn new(
        file: BorrowedFd<'_>,
        has_disk: bool,
        times: &dyn Times,
        settler: Arc<Settler>,
    ) -> Result<MappedFile> {
        check(file)?;
        times.touch()?;
        Ok(MappedFile {
            windows: [const { ArcSwapOption::const_empty() }; SLOTS],
            size: AtomicU64::new(0),
            lease: AtomicU64::new(0),
            state: AtomicU8::new(SETTLED),
            turn: Mutex::default(),
            payoff: Payoff::default(),
            settler,
            has_disk,
        })
    }

    /// Copies all of `data` to `offset`, if that is possible and pays; nothing was consumed. The caller has locked the bytes, and has
    /// the file open as `file`.
    pub fn write(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        data: &GuestReader<'_>,
        times: &dyn Times,
    ) -> std::result::Result<(), Miss> {
        let started = monotonic();
        let len = data.len();
        let mut miss = Miss { started, epoch: None, is_warm: false };
        let end = offset.saturating_add(len as u64);
        let place = self.slot(offset / WINDOW).load();
        let Some(slot) = place.as_deref().filter(|slot| slot.is_warm(offset, end)) else { return Err(miss) };
        miss.is_warm = true;
        if end > self.size.load(Ordering::Relaxed) || !self.payoff.is_worth_it(len, started) {
            return Err(miss);
        }
        if started >= self.lease.load(Ordering::Acquire) {
            miss.epoch = Some(self.lock().epoch);
            return Err(miss);
        }
        if slot.window.write(offset % WINDOW, data).is_err() {
            slot.forget(offset, end);
            self.payoff.mapped(len, monotonic().saturating_sub(started), 1, started);
            return Err(Miss { is_warm: false, ..miss });
        }
        if !self.was_inside(file, end) {
            return Err(Miss { is_warm: false, ..miss });
        }
        // Pairs with the fence of who settles: either that one's clock is read after the copy, or it is seen here.
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) != UNSETTLED {
            self.unsettle(times);
        }
        slot.use_at(started);
        if let Some(times) = Payoff::sampled() {
            self.payoff.mapped(len, monotonic().saturating_sub(started), times, started);
        }
        Ok(())
    }

    /// `done` bytes of a write that was not mapped were written by pwritev2(2). `open` opens the file for reading and writing.
    pub fn wrote(
        &self,
        file: BorrowedFd<'_>,
        miss: Miss,
        offset: u64,
        done: usize,
        open: impl FnOnce() -> Result<GuestFd>,
    ) {
        if done == 0 {
            return;
        }
        if miss.is_warm {
            self.payoff.plain(done, monotonic().saturating_sub(miss.started));
        }
        let end = offset.saturating_add(done as u64);
        self.size.fetch_max(end, Ordering::Relaxed);
        if let Some(epoch) = miss.epoch {
            self.renew(file, miss.started, epoch);
        }
        self.mark(offset, end, miss.started, open);
    }

    /// From now on writes go through pwritev2(2) until one of them has succeeded: something that it checks has changed.
    pub fn revoke(&self) {
        let mut turn = self.lock();
        turn.epoch = turn.epoch.wrapping_add(1);
        self.lease.store(0, Ordering::Release);
    }

    /// The file was made durable: its pages are clean.
    pub fn synced(&self) {
        if self.has_disk {
            self.slots().for_each(|slot| slot.marks.iter().for_each(|word| word.store(0, Ordering::Relaxed)));
        }
    }

    /// Whether times may have to be set.
    pub fn is_unsettled(&self) -> bool {
        self.state.load(Ordering::Acquire) != SETTLED
    }

    /// Sets the times if writes were acknowledged since they were set, and then does `and`, before others settle.
    pub fn settle_and<T>(&self, times: &dyn Times, and: impl FnOnce() -> T) -> T {
        let mut turn = self.lock();
        if self.state.load(Ordering::Relaxed) == UNSETTLED {
            self.state.store(SETTLING, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            match times.touch() {
                // Scarce descriptors or memory, an error of the disk: it may work the next time.
                Err(errno) if !STAYS.contains(&errno) => {
                    self.state.store(UNSETTLED, Ordering::Release);
                    self.settler.wake();
                }
                touched => {
                    self.state.store(SETTLED, Ordering::Release);
                    times.note_unsettled(false);
                    if let Err(errno) = touched {
                        warn_limited!("times of a file that was written cannot be set any more: {errno}");
                        turn.is_over = true;
                        self.lease.store(0, Ordering::Release);
                    }
                }
            }
        }
        and()
    }

    /// Gives back all windows.
    pub fn drop_windows(&self) {
        self.windows.iter().for_each(|place| place.store(None));
    }

    /// Gives back all windows, and is not mapped for a while, longer each time.
    pub fn pause(&self, now: u64) {
        if self.windows.iter().any(|place| place.load().is_some()) {
            self.payoff.pause(now);
            self.drop_windows();
        }
    }

    /// Gives back windows that were not used for a while; returns whether any are left.
    pub fn drop_idle(&self, now: u64) -> bool {
        let is_idle =
            |slot: &Arc<Slot>| u64::from(slot.used.load(Ordering::Relaxed)) << 30 < now.saturating_sub(IDLE);
        let mut is_any = false;
        for place in &self.windows {
            match place.load_full() {
                Some(slot) if is_idle(&slot) => drop(place.swap(None)),
                other => is_any |= other.is_some(),
            }
        }
        is_any
    }

    /// Notes that a write was acknowledged since the times were set.
    #[cold]
    fn unsettle(&self, times: &dyn Times) {
        let _turn = self.lock();
        times.note_unsettled(true);
        self.state.store(UNSETTLED, Ordering::Release);
        self.settler.wake();
    }

    /// Whether the file had `end` bytes after they were copied, and nothing that pwritev2(2) has to clear.
    fn was_inside(&self, file: BorrowedFd<'_>, end: u64) -> bool {
        let Ok(stat) = size_and_mode(file) else { return false };
        if stat.stx_size < end {
            self.size.store(stat.stx_size, Ordering::Relaxed);
            return false;
        }
        if has_set_id_bits(stat.stx_mode) {
            // Until pwritev2(2) has cleared them.
            self.lease.store(0, Ordering::Release);
            return false;
        }
        true
    }

    /// A write by pwritev2(2) that began at `started` has succeeded.
    fn renew(&self, file: BorrowedFd<'_>, started: u64, epoch: u32) {
        let checked = check(file);
        let turn = self.lock();
        if turn.epoch != epoch || turn.is_over {
            return;
        }
        if let Ok(size) = checked {
            self.size.store(size, Ordering::Relaxed);
            self.lease.store(started.saturating_add(LEASE), Ordering::Release);
        }
    }

    /// Bytes from `offset` to `end` were written by pwritev2(2): their pages are in the page cache, and have room on the disk.
    fn mark(&self, offset: u64, end: u64, now: u64, open: impl FnOnce() -> Result<GuestFd>) {
        let index = offset / WINDOW;
        let place = self.slot(index);
        let slot = place.load();
        match &*slot {
            Some(slot) if slot.index == index => return slot.mark(offset, end),
            Some(slot) if u64::from(slot.used.load(Ordering::Relaxed)) << 30 >= now.saturating_sub(IDLE) => {
                return;
            }
            _ => {}
        }
        // It is another part of the file, which was not used lately, or none.
        if self.payoff.is_paused(now) {
            return;
        }
        let Ok(window) = open().and_then(|file| Window::new(file, index)) else {
            // There is no descriptor or no room for now.
            return self.payoff.pause(now);
        };
        let new =
            Slot { index, window, marks: [const { AtomicU64::new(0) }; WORDS], used: AtomicU32::new(0) };
        new.use_at(now);
        new.mark(offset, end);
        // If another thread was faster, its window is as good.
        place.compare_and_swap(&slot, Some(Arc::new(new)));
    }

    fn slot(&self, index: u64) -> &ArcSwapOption<Slot> {
        // The remainder is less than the length.
        #[allow(
            clippy::indexing_slicing,
            clippy::cast_possible_truncation,
            reason = "a remainder is in bounds"
        )]
        &self.windows[(index % SLOTS as u64) as usize]
    }

    fn slots(&self) -> impl Iterator<Item = Arc<Slot>> + '_ {
        self.windows.iter().filter_map(ArcSwapOption::load_full)
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        lock(&self.turn)
    }
}

impl Slot {
    /// Whether all pages from `offset` to `end` were marked, all of which are in this window.
    fn is_warm(&self, offset: u64, end: u64) -> bool {
        let base = self.index.saturating_mul(WINDOW);
        offset >= base
            && end <= base.saturating_add(WINDOW)
            && pages(offset - base, end - base).all(|(word, mask)| {
                self.marks.get(word).is_some_and(|word| word.load(Ordering::Relaxed) & mask == mask)
            })
    }

    /// Marks those pages from `offset` to `end` that are in this window.
    fn mark(&self, offset: u64, end: u64) {
        let base = self.index.saturating_mul(WINDOW);
        let end = end.min(base.saturating_add(WINDOW));
        for (word, mask) in pages(offset.saturating_sub(base), end.saturating_sub(base)) {
            if let Some(word) =
                self.marks.get(word).filter(|word| word.load(Ordering::Relaxed) & mask != mask)
            {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Takes the marks off.
    fn forget(&self, offset: u64, end: u64) {
        let base = self.index.saturating_mul(WINDOW);
        for (word, mask) in pages(offset.saturating_sub(base), end.saturating_sub(base)) {
            if let Some(word) = self.marks.get(word) {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }

    fn use_at(&self, now: u64) {
        let now = u32::try_from(now >> 30).unwrap_or(u32::MAX);
        if self.used.load(Ordering::Relaxed) != now {
            self.used.store(now, Ordering::Relaxed);
        }
    }
}

/// The pages from byte `start` to `end` of a window: words of marks, and which bits in each.
fn pages(start: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (start / PAGE, end.div_ceil(PAGE).max(start / PAGE));
    (first / 64..last.div_ceil(64)).map(move |word| {
        let low = first.saturating_sub(word * 64);
        let high = (last - word * 64).min(64);
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        (usize::try_from(word).unwrap_or(usize::MAX), mask)
    })
}

/// Whether pwritev2(2) may have to clear set-id bits.
fn has_set_id_bits(mode: u16) -> bool {
    Mode::from_raw_mode(mode.into()).intersects(Mode::SUID | Mode::SGID)
}

/// What the host has in memory of them, and of other attributes.
fn size_and_mode(file: BorrowedFd<'_>) -> Result<Statx> {
    let wanted = StatxFlags::SIZE | StatxFlags::MODE;
    statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted)
}

/// Up to where the file may be written through mappings, if it may: its size, or the limit on the length of files (RLIMIT_FSIZE).
fn check(file: BorrowedFd<'_>) -> Result<u64> {
    let stat = size_and_mode(file)?;
    let forbidden =
        StatxAttributes::IMMUTABLE | StatxAttributes::APPEND | StatxAttributes::VERITY | StatxAttributes::DAX;
    let mount = fstatvfs(file)?.f_flag;
    // Some file systems have none.
    let flags = IFlags::from_bits_retain(file_flags::flags(file).unwrap_or(0));
    if mount.intersects(StatVfsMountFlags::SYNCHRONOUS | StatVfsMountFlags::RDONLY)
        || stat.stx_attributes.intersects(forbidden)
        || flags.intersects(UNMAPPED)
        || has_set_id_bits(stat.stx_mode)
    {
        return Err(Errno::OPNOTSUPP);
    }
    let limit = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
    Ok(stat.stx_size.min(limit))
}

/// The times by which mtime and ctime are set to the present.
pub fn present() -> Timestamps {
    let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    Timestamps { last_access: time(UTIME_OMIT), last_modification: time(UTIME_NOW) }
}

#[cfg(test)]
mod tests;
