//! File handles as they stand in records.

use std::sync::atomic::{AtomicU32, Ordering};

/// A file handle, as name_to_handle_at(2) gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredHandle {
    /// Its type, of which file systems use the lowest byte.
    pub kind: u8,
    pub(super) len: u8,
    pub(super) bytes: [u8; LONGEST_HANDLE],
}

/// `MAX_HANDLE_SZ`.
pub(super) const LONGEST_HANDLE: usize = 128;

impl StoredHandle {
    /// A handle; `None` if its type or length are such as no file system has.
    pub fn new(kind: i32, bytes: &[u8]) -> Option<StoredHandle> {
        let mut stored =
            StoredHandle { kind: kind.try_into().ok()?, len: bytes.len().try_into().ok()?, bytes: [0; 128] };
        stored.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(stored)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        if let Some(part) = word.get_mut(..chunk.len()) {
            part.copy_from_slice(chunk);
        }
        u32::from_ne_bytes(word)
    })
}

pub(super) fn store(words_of: &[AtomicU32], bytes: &[u8]) {
    for (word, value) in words_of.iter().zip(words(bytes)) {
        word.store(value, Ordering::Relaxed);
    }
}

pub(super) fn load(words: &[AtomicU32], bytes: &mut [u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks_mut(4)) {
        let value = word.load(Ordering::Relaxed).to_ne_bytes();
        chunk.copy_from_slice(value.get(..chunk.len()).unwrap_or_default());
    }
}
