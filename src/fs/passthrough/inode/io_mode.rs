//! The I/O mode of an inode: cached, direct, or parallel direct writes. All of its openers have the same.
//!
//! One opener in cached mode makes every writer of the inode exclusive again, and guests below FUSE 7.40 can crash when
//! parallel direct writes meet writeback of the same inode. So the first opener decides, and later ones follow, until
//! the last one has released the file:
//!
//! | policy | `--cache=never`, `metadata` | `--cache=auto`, `always` |
//! |---|---|---|
//! | `auto` | parallel | parallel if the first opener has O_DIRECT and the guest can map such files, else cached |
//! | `always` | parallel | parallel |
//! | `never` | direct | cached |
//!
//! With writeback nothing is ever opened in parallel mode.
//!
//! Guests before Linux 6.9 cannot map a file with MAP_SHARED that is not in cached mode. With a policy that caches data,
//! one opener with O_DIRECT must not prevent that for all others.

use crate::fs::passthrough::config::{CachePolicy, FsConfig, ParallelDirectWrites};
use crate::sync::{AtomicU32, Ordering};
use fuse_protocol::flags::{InitFlags, OpenReplyFlags};

/// What the first opener's mode depends on; fixed for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoPolicy {
    /// Which files are opened for parallel direct writes.
    pub parallel: ParallelDirectWrites,
    /// Writes that extend a parallel file are parallel as well, in guests that can do that.
    pub extending: bool,
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// WRITEBACK_CACHE was negotiated.
    pub writeback: bool,
    /// DIRECT_IO_ALLOW_MMAP was negotiated: files that bypass the page cache can be mapped shared.
    pub maps_direct: bool,
}

/// How a file is open in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Bypasses the page cache, many writers at once.
    Parallel,
    /// Bypasses the page cache, one writer at a time.
    Direct,
    /// Through the page cache.
    Cached,
}

impl IoPolicy {
    /// The policy of a session with these negotiated `flags`.
    pub fn new(config: &FsConfig, flags: InitFlags) -> IoPolicy {
        IoPolicy {
            parallel: config.parallel_direct_writes,
            extending: config.parallel_extending,
            cache: config.cache,
            writeback: flags.contains(InitFlags::WRITEBACK_CACHE),
            maps_direct: flags.contains(InitFlags::DIRECT_IO_ALLOW_MMAP),
        }
    }

    /// The mode for the first opener of a file.
    fn decide(self, direct_requested: bool) -> Mode {
        let direct = match self.parallel {
            ParallelDirectWrites::Always => true,
            ParallelDirectWrites::Auto => {
                direct_requested && self.maps_direct || self.cache.bypasses_page_cache()
            }
            ParallelDirectWrites::Never => self.cache.bypasses_page_cache(),
        };
        match direct {
            true if self.parallel != ParallelDirectWrites::Never && !self.writeback => Mode::Parallel,
            true if self.cache.bypasses_page_cache() => Mode::Direct,
            _ => Mode::Cached,
        }
    }

    /// The reply's flags for `mode`.
    pub fn reply_flags(self, mode: Mode) -> OpenReplyFlags {
        match mode {
            Mode::Parallel => {
                let mut flags = OpenReplyFlags::DIRECT_IO | OpenReplyFlags::PARALLEL_DIRECT_WRITES;
                flags.set(OpenReplyFlags::PARALLEL_EXTENDING_WRITES, self.extending);
                flags
            }
            Mode::Direct => OpenReplyFlags::DIRECT_IO,
            Mode::Cached if self.cache == CachePolicy::Always => OpenReplyFlags::KEEP_CACHE,
            Mode::Cached => OpenReplyFlags::empty(),
        }
    }
}

/// The openers of one inode: how many there are, and the mode they share.
///
/// Both are in one word, so that a decision and its count are one step.
#[derive(Debug, Default)]
pub struct IoMode(AtomicU32);

/// Bits of the word with the mode; the count is above them.
const MODE_BITS: u32 = 2;
const ONE_OPENER: u32 = 1 << MODE_BITS;

impl IoMode {
    /// Counts one more opener, and returns its mode. `None` if there are more openers than can be counted.
    pub fn open(&self, policy: IoPolicy, direct_requested: bool) -> Option<Mode> {
        let mut mode = Mode::Cached;
        let update = |word: u32| {
            mode = if word < ONE_OPENER { policy.decide(direct_requested) } else { decode(word) };
            (word & !(ONE_OPENER - 1)).checked_add(ONE_OPENER).map(|count| count | encode(mode))
        };
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update).ok().map(|_| mode)
    }

    /// The mode that the openers share, if there are any.
    pub fn current(&self) -> Mode {
        decode(self.0.load(Ordering::SeqCst))
    }

    /// Counts an opener of a file that had this mode.
    pub fn restore(&self, mode: Mode) {
        let update = |word: u32| Some((word & !(ONE_OPENER - 1)).saturating_add(ONE_OPENER) | encode(mode));
        // It never fails: `update` always has a value.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
    }

    /// One opener has closed the file; after the last one the next opener decides. Returns whether it was the last.
    pub fn release(&self) -> bool {
        // It never fails: every release belongs to one open.
        let less = |word: u32| word.checked_sub(ONE_OPENER);
        let before = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        before.is_ok_and(|word| word < 2 * ONE_OPENER)
    }
}

impl Mode {
    /// As a number, for the record of a handle.
    pub fn number(self) -> u8 {
        match self {
            Mode::Parallel => 0,
            Mode::Direct => 1,
            Mode::Cached => 2,
        }
    }

    /// The mode with this number; [`Mode::Cached`], which promises most, for any other.
    pub fn of_number(number: u8) -> Mode {
        decode(number.into())
    }
}

fn encode(mode: Mode) -> u32 {
    match mode {
        Mode::Parallel => 0,
        Mode::Direct => 1,
        Mode::Cached => 2,
    }
}

fn decode(word: u32) -> Mode {
    match word % ONE_OPENER {
        0 => Mode::Parallel,
        1 => Mode::Direct,
        _ => Mode::Cached,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CachePolicy::{Always as CacheAlways, Auto as CacheAuto, Metadata, Never as CacheNever};
    use ParallelDirectWrites::{Always, Auto, Never};

    fn policy(parallel: ParallelDirectWrites, cache: CachePolicy) -> IoPolicy {
        IoPolicy { parallel, extending: true, cache, writeback: false, maps_direct: true }
    }

    #[test]
    fn the_first_opener_decides() {
        // Policy, cache, mode for a first opener without and with O_DIRECT.
        let table = [
            (Auto, CacheNever, Mode::Parallel, Mode::Parallel),
            (Auto, Metadata, Mode::Parallel, Mode::Parallel),
            (Auto, CacheAuto, Mode::Cached, Mode::Parallel),
            (Auto, CacheAlways, Mode::Cached, Mode::Parallel),
            (Always, CacheNever, Mode::Parallel, Mode::Parallel),
            (Always, CacheAuto, Mode::Parallel, Mode::Parallel),
            (Always, CacheAlways, Mode::Parallel, Mode::Parallel),
            (Never, CacheNever, Mode::Direct, Mode::Direct),
            (Never, Metadata, Mode::Direct, Mode::Direct),
            (Never, CacheAuto, Mode::Cached, Mode::Cached),
            (Never, CacheAlways, Mode::Cached, Mode::Cached),
        ];
        for (parallel, cache, without, with) in table {
            let policy = policy(parallel, cache);
            for (direct, first) in [(false, without), (true, with)] {
                let inode = IoMode::default();
                assert_eq!(inode.open(policy, direct), Some(first), "{policy:?} {direct}");
                // Later openers follow, whatever they ask for.
                assert_eq!(inode.open(policy, !direct), Some(first));
                assert!(!inode.release());
                assert_eq!(inode.open(policy, !direct), Some(first));
                assert!(!inode.release());
                assert!(inode.release());
                // After the last one the decision is open again.
                assert_eq!(inode.open(policy, !direct), Some(if direct { without } else { with }));
            }
        }
    }

    #[test]
    fn a_guest_that_cannot_map_direct_files_keeps_them_in_its_cache() {
        // Policy, cache, mode for a first opener with O_DIRECT.
        let table = [
            (Auto, CacheAuto, Mode::Cached),
            (Auto, CacheAlways, Mode::Cached),
            (Auto, CacheNever, Mode::Parallel),
            (Auto, Metadata, Mode::Parallel),
            (Always, CacheAuto, Mode::Parallel),
            (Never, CacheAuto, Mode::Cached),
        ];
        for (parallel, cache, wanted) in table {
            let policy = IoPolicy { maps_direct: false, ..policy(parallel, cache) };
            assert_eq!(policy.decide(true), wanted, "{policy:?}");
        }
    }

    #[test]
    fn writeback_excludes_parallel_writes() {
        for parallel in [Auto, Always, Never] {
            for direct in [false, true] {
                let policy = IoPolicy { writeback: true, ..policy(parallel, CacheAuto) };
                assert_eq!(policy.decide(direct), Mode::Cached);
                let policy = IoPolicy { cache: CacheNever, ..policy };
                assert_eq!(policy.decide(direct), Mode::Direct);
            }
        }
    }

    #[test]
    fn the_parallel_flag_comes_with_direct_io() {
        for cache in [CacheNever, Metadata, CacheAuto, CacheAlways] {
            for mode in [Mode::Parallel, Mode::Direct, Mode::Cached] {
                let flags = policy(Auto, cache).reply_flags(mode);
                let parallel = flags.contains(OpenReplyFlags::PARALLEL_DIRECT_WRITES);
                assert_eq!(parallel, mode == Mode::Parallel);
                assert_eq!(flags.contains(OpenReplyFlags::DIRECT_IO), mode != Mode::Cached);
            }
        }
    }

    #[test]
    fn extending_writes_are_parallel_in_parallel_files_alone_and_unless_turned_off() {
        for mode in [Mode::Parallel, Mode::Direct, Mode::Cached] {
            for extending in [true, false] {
                let flags = IoPolicy { extending, ..policy(Auto, CacheNever) }.reply_flags(mode);
                let parallel = flags.contains(OpenReplyFlags::PARALLEL_EXTENDING_WRITES);
                assert_eq!(parallel, extending && mode == Mode::Parallel, "{mode:?}");
            }
        }
    }

    #[test]
    fn openers_that_race_agree() {
        let inode = IoMode::default();
        let parallel_now = AtomicU32::new(0);
        let cached_now = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (inode, parallel_now, cached_now) = (&inode, &parallel_now, &cached_now);
                scope.spawn(move || {
                    for round in 0..20_000 {
                        let direct = (thread + round) % 3 == 0;
                        let mode = inode.open(policy(Auto, CacheAuto), direct).unwrap();
                        let (mine, other) = match mode {
                            Mode::Parallel => (parallel_now, cached_now),
                            _ => (cached_now, parallel_now),
                        };
                        mine.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(other.load(Ordering::SeqCst), 0);
                        mine.fetch_sub(1, Ordering::SeqCst);
                        inode.release();
                    }
                });
            }
        });
        assert!(inode.0.load(Ordering::SeqCst) < ONE_OPENER);
    }
}
