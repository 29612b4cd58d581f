use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use libc::iovec;
use proptest::prelude::*;

use super::payoff::SAMPLES;
use super::*;

const LEN: u64 = 64 << 10;

struct Case {
    host: File,
    mapped: MappedFile,
    times: TimesOf,
}

/// Sets the times of a file, and remembers what it was told.
struct TimesOf {
    file: File,
    notes: Mutex<Vec<bool>>,
    fails: Mutex<Option<Errno>>,
}

impl Times for TimesOf {
    fn note_unsettled(&self, is: bool) {
        self.notes.lock().unwrap().push(is);
    }

    fn touch(&self) -> Result<()> {
        if let Some(errno) = *self.fails.lock().unwrap() {
            return Err(errno);
        }
        rustix::fs::futimens(&self.file, &present())
    }
}

fn case() -> Case {
    let host = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    host.set_len(LEN).unwrap();
    let times = TimesOf { file: host.try_clone().unwrap(), notes: Mutex::default(), fails: Mutex::default() };
    let mapped = MappedFile::new(host.as_fd(), true, &times, Arc::default()).unwrap();
    Case { host, mapped, times }
}

impl Case {
    /// Writes as the daemon does; returns whether the write was mapped.
    fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let (start, rest) = bytes.split_at(bytes.len() / 3);
        let mut iov = [start, rest]
            .map(|part| iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
        // SAFETY: the bytes are there during the call.
        let data = unsafe { GuestReader::new(&mut iov) };
        match self.mapped.write(self.host.as_fd(), offset, &data, &self.times) {
            Ok(()) => true,
            Err(miss) => {
                self.host.write_all_at(bytes, offset).unwrap();
                let open = || Ok(GuestFd::uncounted(OwnedFd::from(self.host.try_clone().unwrap())));
                self.mapped.wrote(self.host.as_fd(), miss, offset, bytes.len(), open);
                false
            }
        }
    }

    /// Writes until a write is mapped.
    fn warm(&self, offset: u64, bytes: &[u8]) {
        assert!((0..10_000).any(|_| self.write(offset, bytes)), "no write is mapped");
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.host.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn mtime(&self) -> (i64, i64) {
        let meta = self.host.metadata().unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
        (meta.mtime(), meta.mtime_nsec())
    }
}

#[test]
fn a_write_is_mapped_after_others_of_its_pages() {
    let case = case();
    // Measured, and then one that begins the lease.
    let plain = (0..=u8::MAX).find(|i| case.write(4096, &[*i; 5000])).unwrap();
    assert!((SAMPLES..SAMPLES + 10).contains(&plain.into()), "{plain} by pwritev2(2)");
    assert_eq!(case.read(4096, 5000), [plain; 5000]);
    assert!(!case.write(20_000, &[1; 5000]), "other pages");
    case.warm(20_000, &[2; 5000]);
    assert_eq!(case.read(19_999, 5002), [vec![0], vec![2; 5000], vec![0]].concat());
    case.mapped.synced();
    assert!(!case.write(20_000, &[3; 5000]), "they are clean");
    case.warm(20_000, &[4; 5000]);
}

#[test]
fn the_host_truncates_the_file() {
    let case = case();
    case.warm(LEN - 8192, &[1; 8192]);
    // To the middle of a page that is written, and to one before it.
    for (size, byte) in [(LEN - 5000, 2), (LEN - 20_000, 3), (0, 4)] {
        case.host.set_len(size).unwrap();
        assert!(!case.write(LEN - 8192, &[byte; 8192]));
        assert_eq!(case.host.metadata().unwrap().len(), LEN);
        assert_eq!(case.read(LEN - 8192, 8192), [byte; 8192]);
        case.warm(LEN - 8192, &[byte; 8192]);
    }
    // Away and there again, the file has room.
    case.host.set_len(0).unwrap();
    case.host.set_len(LEN).unwrap();
    case.write(LEN - 8192, &[5; 8192]);
    assert_eq!(case.read(LEN - 9000, 9000), [vec![0; 808], vec![5; 8192]].concat());
    assert!(!case.write(LEN - 10, &[6; 20]), "past the end");
    assert_eq!(case.host.metadata().unwrap().len(), LEN + 10);
}

#[test]
fn set_id_bits_and_what_a_write_checks_end_the_lease() {
    let case = case();
    case.warm(0, &[1; 100]);
    case.mapped.revoke();
    assert!(!case.write(0, &[2; 100]), "the first one afterwards");
    case.warm(0, &[2; 100]);
    case.host.set_permissions(std::fs::Permissions::from_mode(0o4755)).unwrap();
    for _ in 0..3 {
        assert!(!case.write(0, &[3; 100]));
    }
    case.host.set_permissions(std::fs::Permissions::from_mode(0o644)).unwrap();
    case.warm(0, &[4; 100]);
    assert_eq!(case.read(0, 100), [4; 100]);
}

#[test]
fn times_are_set_by_whoever_settles() {
    let case = case();
    case.warm(0, &[1; 100]);
    case.mapped.settle_and(&case.times, || ());
    case.times.notes.lock().unwrap().clear();
    for round in 0..3 {
        let before = case.mtime();
        std::thread::sleep(std::time::Duration::from_millis(12));
        case.warm(0, &[round; 10]);
        assert!(case.mapped.is_unsettled());
        case.mapped.settle_and(&case.times, || assert!(case.mtime() > before));
        assert!(!case.mapped.is_unsettled());
    }
    assert_eq!(*case.times.notes.lock().unwrap(), [true, false].repeat(3));
    // With nothing to settle, they stay.
    let before = case.mtime();
    case.mapped.settle_and(&case.times, || ());
    assert_eq!(case.mtime(), before);
}

#[test]
fn windows_are_given_back() {
    let case = case();
    case.warm(0, &[1; 100]);
    assert!(case.mapped.drop_idle(monotonic()), "it is in use");
    assert!(!case.mapped.drop_idle(monotonic() + 3 * IDLE));
    assert!(!case.write(0, &[2; 100]), "there is no window");
    case.warm(0, &[3; 100]);
}

proptest! {
    /// Marks are those of all pages that a range shares bytes with.
    #[test]
    fn pages_of_ranges(start in 0..WINDOW, len in 0..300_000u64) {
        let end = (start + len).min(WINDOW);
        let mut marked = std::collections::BTreeSet::new();
        for (word, mask) in pages(start, end) {
            prop_assert!(word < WORDS);
            marked.extend((0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit));
        }
        let wanted: std::collections::BTreeSet<u64> =
            if start == end { marked.clone() } else { (start / PAGE..=(end - 1) / PAGE).collect() };
        prop_assert_eq!(marked, wanted);
    }
}

#[test]
fn times_that_cannot_be_set_are_tried_again_unless_that_stays() {
    for (errno, stays) in
        [(Errno::MFILE, false), (Errno::IO, false), (Errno::PERM, true), (Errno::ROFS, true)]
    {
        let case = case();
        case.warm(0, &[1; 4096]);
        case.mapped.settle_and(&case.times, || ());
        case.warm(0, &[2; 4096]);
        case.times.notes.lock().unwrap().clear();
        *case.times.fails.lock().unwrap() = Some(errno);
        case.mapped.settle_and(&case.times, || ());
        assert_eq!(case.mapped.is_unsettled(), !stays, "{errno}");
        assert_eq!(case.times.notes.lock().unwrap().is_empty(), !stays, "{errno}: the record");
        *case.times.fails.lock().unwrap() = None;
        case.mapped.settle_and(&case.times, || ());
        assert!(!case.mapped.is_unsettled());
        assert_eq!(*case.times.notes.lock().unwrap(), [false]);
        // Where times cannot be set, no other write is mapped.
        assert_eq!((0..1000).any(|_| case.write(0, &[3; 4096])), !stays, "{errno}");
    }
}
