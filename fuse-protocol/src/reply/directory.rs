//! The records of READDIR and READDIRPLUS.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use crate::abi;
use crate::reply::Entry;

/// One entry of a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryEntry<'a> {
    /// Inode number on the host.
    pub ino: u64,
    /// Where the next READDIR goes on after this entry.
    pub next_offset: u64,
    /// `DT_*` type.
    pub kind: u32,
    /// The name; `.` and `..` may be among them.
    pub name: &'a [u8],
}

/// The reply had no room for another record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Collects the records of a READDIR or READDIRPLUS reply.
#[derive(Debug)]
pub struct DirectoryWriter<'a> {
    buffer: &'a mut Vec<u8>,
    limit: usize,
    plus: bool,
}

impl<'a> DirectoryWriter<'a> {
    /// Appends to `buffer`, which is emptied first, up to `limit` bytes. With `plus` every record
    /// carries an [`Entry`].
    pub fn new(buffer: &'a mut Vec<u8>, limit: usize, plus: bool) -> DirectoryWriter<'a> {
        buffer.clear();
        DirectoryWriter { buffer, limit, plus }
    }

    /// Whether READDIRPLUS was asked for.
    pub fn plus(&self) -> bool {
        self.plus
    }

    /// Whether nothing was added so far.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Bytes that are left for records.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.buffer.len())
    }

    /// Whether a record for a name of `name_len` bytes still fits. A caller checks this before a lookup
    /// that a full [`DirectoryWriter::push`] would waste.
    pub fn fits(&self, name_len: usize) -> bool {
        self.buffer.len() + self.record_size(name_len) <= self.limit
    }

    /// Adds a record. `found` is the inode, for READDIRPLUS; without it (and always for `.` and `..`) the
    /// guest sends a LOOKUP when it needs one. READDIR ignores it.
    pub fn push(&mut self, entry: &DirectoryEntry<'_>, found: Option<&Entry>) -> Result<(), Full> {
        if !self.fits(entry.name.len()) {
            return Err(Full);
        }
        let Ok(name_len) = u32::try_from(entry.name.len()) else { return Err(Full) };
        if self.plus {
            let out = found.map(Entry::to_wire).unwrap_or_default();
            self.buffer.extend_from_slice(out.as_bytes());
        }
        let dirent =
            abi::Dirent { ino: entry.ino, off: entry.next_offset, namelen: name_len, typ: entry.kind };
        self.buffer.extend_from_slice(dirent.as_bytes());
        self.buffer.extend_from_slice(entry.name);
        self.buffer.resize(self.buffer.len().next_multiple_of(abi::RECORD_ALIGN), 0);
        Ok(())
    }

    fn record_size(&self, name_len: usize) -> usize {
        let fixed = if self.plus { size_of::<abi::Direntplus>() } else { size_of::<abi::Dirent>() };
        (fixed + name_len).next_multiple_of(abi::RECORD_ALIGN)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;

    use super::*;
    use proptest::prelude::*;

    fn entry(name: &[u8]) -> DirectoryEntry<'_> {
        DirectoryEntry { ino: 7, next_offset: 9, kind: 8, name }
    }

    #[test]
    fn a_full_reply_takes_no_part_of_a_record() {
        let mut buffer = vec![1, 2, 3];
        let mut writer = DirectoryWriter::new(&mut buffer, 24 + 8, false);
        assert!(writer.is_empty());
        assert_eq!(writer.push(&entry(b"eleven_char"), None), Err(Full));
        assert_eq!(writer.push(&entry(b"eight_ch"), None), Ok(()));
        assert_eq!(writer.push(&entry(b""), None), Err(Full));
        assert_eq!(buffer.len(), 32);
        assert_eq!(&buffer[24..], b"eight_ch");
    }

    proptest! {
        #[test]
        fn records_never_pass_the_limit(
            limit in 0usize..2000, plus: bool, names in proptest::collection::vec(0usize..255, 0..40),
        ) {
            let mut buffer = Vec::new();
            let mut writer = DirectoryWriter::new(&mut buffer, limit, plus);
            for len in names {
                let fits = writer.fits(len);
                prop_assert_eq!(writer.push(&entry(&vec![b'x'; len]), None).is_ok(), fits);
            }
            prop_assert!(buffer.len() <= limit);
            prop_assert_eq!(buffer.len() % 8, 0);
        }
    }
}
