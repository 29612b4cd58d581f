//! Bytes that say where inodes are which came with a migration and were not found yet, and which locks the guest has that
//! were let go when the share was saved.
//!
//! Their records have the lookups, and a descriptor as soon as they are found. A process that goes on finds here what the
//! others are found by. What the bytes mean is the file system's business; it writes them once, before the records.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::{InodeRecord, StateFile, UNRESOLVED, offsets};

const WORD: usize = size_of::<u64>();
/// Bytes of the guest's locks, behind those of inodes.
const LOCKS: usize = 32 << 20;

/// A part of the file: its first byte, and how many there are. A number of bytes stands in it, and behind that these.
#[derive(Clone, Copy)]
struct Area(usize, usize);

const INODES: Area = Area(offsets::UNRESOLVED_BYTES, UNRESOLVED - LOCKS);
const SAVED_LOCKS: Area = Area(offsets::UNRESOLVED_BYTES + UNRESOLVED - LOCKS, LOCKS);

impl StateFile {
    /// Keeps these bytes; false if there are too many.
    pub fn set_unresolved(&self, bytes: &[u8]) -> bool {
        self.set_bytes(INODES, bytes)
    }

    /// The bytes; none if all inodes are found.
    pub fn unresolved(&self) -> Vec<u8> {
        self.bytes(INODES)
    }

    /// All inodes are found: the memory is given back.
    pub fn clear_unresolved(&self) {
        self.clear_bytes(INODES);
    }

    /// Keeps the guest's locks, which the host has not any more because the share was saved; false if there are too many.
    pub fn set_saved_locks(&self, bytes: &[u8]) -> bool {
        self.set_bytes(SAVED_LOCKS, bytes)
    }

    /// The locks; none if the host has all of them.
    pub fn saved_locks(&self) -> Vec<u8> {
        self.bytes(SAVED_LOCKS)
    }

    /// The host has the guest's locks.
    pub fn clear_saved_locks(&self) {
        self.clear_bytes(SAVED_LOCKS);
    }

    fn set_bytes(&self, area: Area, bytes: &[u8]) -> bool {
        let Some((length, words)) = self.words(area).split_first() else { return false };
        if bytes.len() > words.len() * WORD {
            return false;
        }
        length.store(0, Ordering::Release);
        for (word, chunk) in words.iter().zip(bytes.chunks(WORD)) {
            let mut value = [0; WORD];
            if let Some(part) = value.get_mut(..chunk.len()) {
                part.copy_from_slice(chunk);
            }
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        length.store(bytes.len() as u64, Ordering::Release);
        true
    }

    fn bytes(&self, area: Area) -> Vec<u8> {
        let Some((length, words)) = self.words(area).split_first() else { return Vec::new() };
        let length = usize::try_from(length.load(Ordering::Acquire)).unwrap_or(usize::MAX);
        if length > words.len() * WORD {
            return Vec::new();
        }
        let used = words.iter().take(length.div_ceil(WORD));
        let mut bytes: Vec<u8> = used.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        bytes.truncate(length);
        bytes
    }

    fn clear_bytes(&self, area: Area) {
        let Some(length) = self.words(area).first() else { return };
        if length.swap(0, Ordering::AcqRel) != 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Without it the memory stays in use until the session ends.
            let _ = fallocate(self.file(), flags, area.0 as u64, area.1 as u64);
        }
    }

    fn words(&self, area: Area) -> &[AtomicU64] {
        self.mapping.records(area.0, area.1 / WORD)
    }
}

impl InodeRecord {
    /// Sets the count of lookups, which no request changes just now.
    pub fn set_lookups(&self, lookups: u64) {
        self.change_lookups(0, |_| lookups);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_any_length_are_there_until_they_are_cleared() {
        let state = StateFile::create_shared().unwrap();
        assert!(state.unresolved().is_empty());
        for length in [1, 7, 8, 9, 100_001, 3] {
            let bytes: Vec<u8> = (0..length).map(|byte: u32| byte.to_le_bytes()[0]).collect();
            assert!(state.set_unresolved(&bytes));
            assert_eq!(state.unresolved(), bytes);
        }
        state.clear_unresolved();
        assert!(state.unresolved().is_empty());
        assert!(!state.set_unresolved(&vec![1; UNRESOLVED - LOCKS]));
        assert!(state.unresolved().is_empty());
        let (most, locks) = (vec![1; UNRESOLVED - LOCKS - WORD], vec![2; LOCKS - WORD]);
        assert!(state.set_unresolved(&most) && state.set_saved_locks(&locks));
        assert!(state.unresolved() == most && state.saved_locks() == locks);
        state.clear_unresolved();
        assert!(state.unresolved().is_empty() && state.saved_locks() == locks);
        state.clear_saved_locks();
        assert!(state.saved_locks().is_empty());
    }
}
