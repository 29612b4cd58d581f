//! The listing of an open directory: the position of the host's descriptor, and a buffer of the entries before it.
//!
//! While a guest reads a directory in order, the descriptor is never moved with lseek(2). The buffer keeps the entries of
//! the last reply, since a program without room for all of them asks for the rest again, and those that had no room in
//! the reply. So a listing is complete also where offsets cannot be used (those of NFS and FUSE may have 64 bits, and
//! lseek(2) takes 63), or change when an entry is removed (tmpfs before Linux 6.6, many FUSE file systems).

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::{self, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::fs::Result;
use crate::limits::MemoryQuota;

/// Most bytes of a directory that are read from the host at once.
const BUFFER_SIZE: usize = 16 << 10;
/// Fewest: one entry with the longest name that any file system has takes half of it.
const SMALLEST_READ: usize = 2 << 10;

/// Inode number, offset and length of the name, and its type.
const HEADER: usize = 8 + 8 + 2 + 1;

/// One entry that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    /// Inode number.
    pub ino: u64,
    /// The host's offset behind it.
    pub next_offset: u64,
    /// Its type, as `DT_*`.
    pub kind: u8,
    /// Its name.
    pub name: &'a CStr,
}

/// The state of a listing.
#[derive(Debug)]
pub struct Listing {
    /// Entries of the last reply, and those that come next, one after the other.
    records: Vec<u8>,
    /// Where in `records` the next entry is.
    next: usize,
    /// The host's offset behind the last entry of the reply.
    position: u64,
    /// The descriptor's position is behind the last one of `records`. Otherwise it has to be set to `position`.
    is_in_place: bool,
    /// Nothing was read so far.
    is_new: bool,
    /// Some offset is too large for lseek(2).
    has_large_offsets: bool,
    /// The host may never have read from this descriptor (see [`Listing::prime`]).
    is_unread: bool,
    /// Bytes that all listings keep, and how many of them are counted for this one.
    quota: Arc<MemoryQuota>,
    counted: usize,
}

impl Listing {
    /// At the beginning. `quota` counts the bytes of all listings: beyond it, a listing continues by the host's
    /// offsets.
    pub fn new(quota: Arc<MemoryQuota>) -> Listing {
        Listing {
            records: Vec::new(),
            next: 0,
            position: 0,
            is_in_place: true,
            is_new: true,
            has_large_offsets: false,
            is_unread: false,
            quota,
            counted: 0,
        }
    }

    /// Of a directory that an earlier process had open: its descriptor may be anywhere, and its offsets large.
    pub fn restored(quota: Arc<MemoryQuota>) -> Listing {
        let mut listing = Listing::new(quota);
        (listing.is_in_place, listing.is_new, listing.has_large_offsets) = (false, false, true);
        listing.is_unread = true;
        listing
    }

    /// Continues at `offset`, which is 0 or the next offset of an entry. EINVAL for an offset that no entry has, if the
    /// host finds out.
    pub fn seek(&mut self, directory: BorrowedFd<'_>, offset: u64) -> Result<()> {
        if offset == 0 {
            return if self.is_new { Ok(()) } else { self.rewind(directory) };
        }
        if offset == self.position && self.is_in_place {
            // The guest has used the whole reply.
            self.records.drain(..self.next);
            self.next = 0;
            return Ok(());
        }
        if self.find(offset) {
            return Ok(());
        }
        if i64::try_from(offset).is_ok() {
            self.prime(directory)?;
            fs::seek(directory, SeekFrom::Start(offset))?;
            self.start_at(offset);
            return Ok(());
        }
        self.read_up_to(directory, offset)
    }

    /// Reads once from the beginning of a directory that was opened again, before it continues anywhere else: on ext4 a
    /// descriptor whose first getdents(2) is at the end finds no entry after a later rewind.
    fn prime(&mut self, directory: BorrowedFd<'_>) -> Result<()> {
        if std::mem::take(&mut self.is_unread) {
            self.rewind(directory)?;
            self.read(directory, SMALLEST_READ)?;
            self.records.clear();
        }
        Ok(())
    }

    /// Continues at an offset that lseek(2) does not take: reads the directory from the beginning up to it.
    fn read_up_to(&mut self, directory: BorrowedFd<'_>, offset: u64) -> Result<()> {
        if !self.has_large_offsets {
            return Err(Errno::INVAL);
        }
        self.rewind(directory)?;
        while self.read(directory, BUFFER_SIZE)? {
            if self.find(offset) {
                return Ok(());
            }
            self.records.clear();
        }
        // No entry has this offset.
        self.rewind(directory)?;
        Err(Errno::INVAL)
    }

    fn rewind(&mut self, directory: BorrowedFd<'_>) -> Result<()> {
        fs::seek(directory, SeekFrom::Start(0))?;
        self.start_at(0);
        Ok(())
    }

    fn start_at(&mut self, offset: u64) {
        self.records.clear();
        (self.next, self.position, self.is_in_place) = (0, offset, true);
    }

    /// Continues behind the entry whose next offset is this, if it is in the buffer.
    fn find(&mut self, offset: u64) -> bool {
        let mut at = 0;
        while let Some((header, next)) = Header::decode(&self.records, at) {
            at = next;
            if header.next_offset == offset {
                (self.next, self.position) = (next, offset);
                return true;
            }
        }
        false
    }

    /// The next entry of those that were read.
    pub fn next(&self) -> Option<Listed<'_>> {
        let (header, next) = Header::decode(&self.records, self.next)?;
        let name = self.records.get(self.next.saturating_add(HEADER)..next)?;
        let name = CStr::from_bytes_with_nul(name).ok()?;
        Some(Listed { ino: header.ino, next_offset: header.next_offset, kind: header.kind, name })
    }

    /// The next entry is in the reply.
    pub fn consume(&mut self) {
        if let Some((header, next)) = Header::decode(&self.records, self.next) {
            (self.next, self.position) = (next, header.next_offset);
        }
    }

    /// Reads on, about `wanted` bytes; false at the end.
    pub fn read(&mut self, directory: BorrowedFd<'_>, wanted: usize) -> Result<bool> {
        self.is_new = false;
        let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER_SIZE];
        let (part, _) = buffer.split_at_mut(wanted.clamp(SMALLEST_READ, BUFFER_SIZE));
        // What the host gives is no longer in our form.
        self.records.try_reserve(part.len()).map_err(|_| Errno::NOMEM)?;
        let mut stream = RawDir::new(directory, part);
        let mut any = false;
        while let Some(entry) = stream.next() {
            let entry = entry?;
            let listed = Listed {
                ino: entry.ino(),
                next_offset: entry.next_entry_cookie(),
                // The type's bits of a mode; they are four.
                kind: u8::try_from(entry.file_type().as_raw_mode() >> 12).unwrap_or(0),
                name: entry.file_name(),
            };
            self.has_large_offsets |= i64::try_from(listed.next_offset).is_err();
            encode(&listed, &mut self.records);
            any = true;
            if stream.is_buffer_empty() {
                break;
            }
        }
        Ok(any)
    }

    /// A reply is complete: the buffer is counted, or freed if the quota is exceeded.
    pub fn park(&mut self) {
        let now = self.records.capacity();
        self.count(now);
        if self.quota.is_exceeded() {
            self.is_in_place &= self.next == self.records.len();
            self.free();
        }
    }

    /// The guest has got the end of the directory.
    pub fn end(&mut self) {
        self.free();
    }

    fn free(&mut self) {
        (self.records, self.next) = (Vec::new(), 0);
        self.count(0);
    }

    fn count(&mut self, now: usize) {
        if now != self.counted {
            self.quota.replace(self.counted, now);
            self.counted = now;
        }
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.count(0);
    }
}

fn encode(entry: &Listed<'_>, to: &mut Vec<u8>) {
    let name = entry.name.to_bytes_with_nul();
    // No file system has longer ones.
    let Ok(len) = u16::try_from(name.len()) else { return };
    to.extend_from_slice(&entry.ino.to_ne_bytes());
    to.extend_from_slice(&entry.next_offset.to_ne_bytes());
    to.extend_from_slice(&len.to_ne_bytes());
    to.push(entry.kind);
    to.extend_from_slice(name);
}

/// What stands before a name.
struct Header {
    ino: u64,
    next_offset: u64,
    kind: u8,
}

impl Header {
    /// The header that begins at `at`, and where the next one does.
    fn decode(records: &[u8], at: usize) -> Option<(Header, usize)> {
        let (ino, rest) = records.get(at..)?.split_first_chunk()?;
        let (next_offset, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let kind = *rest.first()?;
        let header =
            Header { ino: u64::from_ne_bytes(*ino), next_offset: u64::from_ne_bytes(*next_offset), kind };
        let len = usize::from(u16::from_ne_bytes(*len));
        Some((header, at.saturating_add(HEADER).saturating_add(len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn names(listing: &mut Listing, directory: &File, most: usize) -> Vec<(u64, String)> {
        let mut names = Vec::new();
        while names.len() < most {
            if listing.next().is_none() && !listing.read(directory.as_fd(), 0).unwrap() {
                break;
            }
            let entry = listing.next().unwrap();
            names.push((entry.next_offset, entry.name.to_string_lossy().into_owned()));
            listing.consume();
        }
        listing.park();
        names
    }

    #[test]
    fn a_listing_continues_at_any_offset_and_frees_its_buffer_at_the_end() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for number in 0..500 {
            File::create(folder.path().join(format!("file{number}"))).unwrap();
        }
        let directory = File::open(folder.path()).unwrap();
        let quota = Arc::new(MemoryQuota::default());
        let mut listing = Listing::new(Arc::clone(&quota));
        let all = names(&mut listing, &directory, usize::MAX);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 502);
        assert!(quota.in_use() > 0);
        for (index, (offset, _)) in all.iter().enumerate().step_by(37) {
            listing.seek(directory.as_fd(), *offset).unwrap();
            assert_eq!(
                names(&mut listing, &directory, 40),
                all[index + 1..].iter().take(40).cloned().collect::<Vec<_>>()
            );
        }
        listing.seek(directory.as_fd(), 0).unwrap();
        assert_eq!(names(&mut listing, &directory, usize::MAX), all);
        assert_eq!(listing.seek(directory.as_fd(), u64::MAX), Err(Errno::INVAL));
        listing.end();
        assert_eq!(quota.in_use(), 0);
    }

    #[test]
    fn a_directory_that_is_opened_again_at_its_end_can_be_read_from_the_beginning() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for number in 0..20 {
            File::create(folder.path().join(format!("file{number}"))).unwrap();
        }
        let quota = Arc::new(MemoryQuota::default());
        let directory = File::open(folder.path()).unwrap();
        let mut listing = Listing::new(Arc::clone(&quota));
        let all = names(&mut listing, &directory, usize::MAX);
        let (end, _) = all.last().cloned().unwrap();
        let again = File::open(folder.path()).unwrap();
        let mut listing = Listing::restored(quota);
        listing.seek(again.as_fd(), end).unwrap();
        assert_eq!(names(&mut listing, &again, usize::MAX), []);
        listing.seek(again.as_fd(), 0).unwrap();
        assert_eq!(names(&mut listing, &again, usize::MAX), all);
    }

    #[test]
    fn listings_beyond_the_quota_continue_by_offset() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for number in 0..100 {
            File::create(folder.path().join(format!("file{number}"))).unwrap();
        }
        let directory = File::open(folder.path()).unwrap();
        let quota = Arc::new(MemoryQuota::new(0));
        let mut listing = Listing::new(Arc::clone(&quota));
        let mut seen = BTreeSet::new();
        loop {
            let some = names(&mut listing, &directory, 7);
            let Some((offset, _)) = some.last().cloned() else { break };
            seen.extend(some);
            listing.seek(directory.as_fd(), offset).unwrap();
        }
        assert_eq!(seen.len(), 102);
        drop(listing);
        assert_eq!(quota.in_use(), 0);
    }
}
