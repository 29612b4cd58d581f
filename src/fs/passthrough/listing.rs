//! The listing of an open directory: the host's cursor, and entries that were read behind it.
//!
//! The host's cursor is never moved while a guest lists one piece after the other. What was read and
//! found no room in a reply is kept, and so are the entries of the last reply: a guest whose program had no
//! room for all of them comes back for the rest. So a listing is whole also where offsets cannot be gone
//! to (those of NFS and FUSE may have all 64 bits, and lseek(2) takes 63), or mean something else once an
//! entry was removed (tmpfs before Linux 6.6, many FUSE file systems).

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{RawDir, SeekFrom, seek};
use rustix::io::Errno;

use crate::fs::Result;

/// Most bytes of directory that are read from the host at once.
const BUFFER_SIZE: usize = 16 << 10;
/// Fewest: one entry with the longest name that any file system has takes half of it.
const SMALLEST_READ: usize = 2 << 10;
/// Bytes that all listings together may keep. Beyond, a listing goes on by the host's offsets.
const MOST_KEPT: usize = 64 << 20;

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

/// How far an open directory was listed.
#[derive(Debug)]
pub struct Listing {
    /// Entries of the last reply, and those that come next, one after the other.
    records: Vec<u8>,
    /// Where in `records` the next entry is.
    next: usize,
    /// The host's offset behind the last entry that was given.
    position: u64,
    /// The host's cursor stands behind the last one of `records`. Otherwise it has to be put to `position`.
    is_in_place: bool,
    /// Nothing was read so far.
    is_new: bool,
    /// Some offsets are too large for lseek(2).
    has_large_offsets: bool,
    /// Bytes that all listings keep, and how many of them are counted for this one.
    kept: Arc<AtomicUsize>,
    counted: usize,
}

impl Listing {
    /// At the beginning. `kept` counts the bytes of all listings.
    pub fn new(kept: Arc<AtomicUsize>) -> Listing {
        Listing {
            records: Vec::new(),
            next: 0,
            position: 0,
            is_in_place: true,
            is_new: true,
            has_large_offsets: false,
            kept,
            counted: 0,
        }
    }

    /// Goes to `offset`, which is 0 or what an entry gave as its next offset. EINVAL for an offset that the
    /// host never gave, if it notices.
    pub fn go_to(&mut self, directory: BorrowedFd<'_>, offset: u64) -> Result<()> {
        if offset == 0 {
            return if self.is_new { Ok(()) } else { self.rewind(directory) };
        }
        if offset == self.position && self.is_in_place {
            // The guest has taken all that it was given.
            self.records.drain(..self.next);
            self.next = 0;
            return Ok(());
        }
        if self.find(offset) {
            return Ok(());
        }
        if i64::try_from(offset).is_ok() {
            seek(directory, SeekFrom::Start(offset))?;
            self.start_at(offset);
            return Ok(());
        }
        self.read_up_to(directory, offset)
    }

    /// Goes to an offset that lseek(2) does not take: from the beginning.
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
        // Nothing has been given from here on.
        self.rewind(directory)?;
        Err(Errno::INVAL)
    }

    fn rewind(&mut self, directory: BorrowedFd<'_>) -> Result<()> {
        seek(directory, SeekFrom::Start(0))?;
        self.start_at(0);
        Ok(())
    }

    fn start_at(&mut self, offset: u64) {
        self.records.clear();
        (self.next, self.position, self.is_in_place) = (0, offset, true);
    }

    /// Goes behind the entry whose next offset is this, if it is here.
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

    /// The next entry was given to the guest.
    pub fn given(&mut self) {
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

    /// A reply is done: what is kept until the next one is counted, or given up if it is too much.
    pub fn rest(&mut self) {
        let now = self.records.capacity();
        self.count(now);
        if self.kept.load(Ordering::Relaxed) > MOST_KEPT {
            self.is_in_place &= self.next == self.records.len();
            self.free();
        }
    }

    /// The guest was told that there is nothing more.
    pub fn end(&mut self) {
        self.free();
    }

    fn free(&mut self) {
        (self.records, self.next) = (Vec::new(), 0);
        self.count(0);
    }

    fn count(&mut self, now: usize) {
        if now != self.counted {
            self.kept.fetch_add(now, Ordering::Relaxed);
            self.kept.fetch_sub(self.counted, Ordering::Relaxed);
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
            listing.given();
        }
        listing.rest();
        names
    }

    #[test]
    fn a_listing_goes_on_where_the_guest_wants_it_and_keeps_nothing_afterwards() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for number in 0..500 {
            File::create(folder.path().join(format!("file{number}"))).unwrap();
        }
        let directory = File::open(folder.path()).unwrap();
        let kept = Arc::new(AtomicUsize::new(0));
        let mut listing = Listing::new(Arc::clone(&kept));
        let all = names(&mut listing, &directory, usize::MAX);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 502);
        assert!(kept.load(Ordering::Relaxed) > 0);
        for (index, (offset, _)) in all.iter().enumerate().step_by(37) {
            listing.go_to(directory.as_fd(), *offset).unwrap();
            assert_eq!(
                names(&mut listing, &directory, 40),
                all[index + 1..].iter().take(40).cloned().collect::<Vec<_>>()
            );
        }
        listing.go_to(directory.as_fd(), 0).unwrap();
        assert_eq!(names(&mut listing, &directory, usize::MAX), all);
        assert_eq!(listing.go_to(directory.as_fd(), u64::MAX), Err(Errno::INVAL));
        listing.end();
        assert_eq!(kept.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn listings_that_keep_too_much_go_on_by_offset() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for number in 0..100 {
            File::create(folder.path().join(format!("file{number}"))).unwrap();
        }
        let directory = File::open(folder.path()).unwrap();
        let kept = Arc::new(AtomicUsize::new(MOST_KEPT));
        let mut listing = Listing::new(Arc::clone(&kept));
        let mut seen = BTreeSet::new();
        loop {
            let some = names(&mut listing, &directory, 7);
            let Some((offset, _)) = some.last().cloned() else { break };
            seen.extend(some);
            listing.go_to(directory.as_fd(), offset).unwrap();
        }
        assert_eq!(seen.len(), 102);
        drop(listing);
        assert_eq!(kept.load(Ordering::Relaxed), MOST_KEPT);
    }
}
