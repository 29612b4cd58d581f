//! Whether inodes that came with a migration are here, by the listings of their directories.
//!
//! With `--migration-on-error=abort` one that is missing makes the migration fail, so all are looked for while the guest
//! stands still. To open a hundred thousand of them takes half a second. A listing has name, type and number of all that is
//! in a directory, which is what an inode is compared by: what is listed as it should be is here, and is opened later, as
//! with the other policy. Whatever else there is is searched one by one.
//!
//! The time of birth does not count here. A file that took the name and the number of another one after the source was
//! saved is noticed when it is opened.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags, RawDir, RawDirEntry, openat};
use rustix::io::Errno;

use super::shards::BuildIdHasher;
use super::unresolved::{Entry, Set};
use super::{InodeKey, InodeTable};
use crate::fs::Result;
use crate::fs::passthrough::host::stat;
use fuse_protocol::ids::NodeId;

/// Fewer inodes in one directory are searched one by one.
const FEW: usize = 4;
/// A directory is listed up to so many entries for each that is wanted: the guest may know little of a large one.
const MOST: usize = 16;
/// Bytes of a listing that are read at once.
const BUFFER: usize = 32 << 10;

/// Inodes of one directory each, by its id.
type Directories<'a> = HashMap<u64, Vec<&'a Entry>, BuildIdHasher>;

impl InodeTable {
    /// Looks for all inodes that are left, or says which one is not here and why: for one of so many parts. Those that are
    /// here may still be left to open.
    pub fn look_for_part(&self, number: usize, of: usize) -> std::result::Result<(), String> {
        let Some(set) = self.unresolved.set() else { return Ok(()) };
        let (mut directories, mut others) = (Directories::default(), Vec::new());
        for (index, entry) in set.entries().iter().enumerate() {
            let place = entry.place().filter(|_| entry.wanted.handle.is_none());
            let part = place.map_or(index, |(parent, _)| usize::try_from(parent).unwrap_or(0)) % of;
            match place {
                _ if part != number || entry.waiting_record().is_none() => {}
                Some((parent, _)) => directories.entry(parent).or_default().push(entry),
                None => others.push(entry),
            }
        }
        let mut buffer = Vec::with_capacity(BUFFER);
        for (directory, entries) in directories {
            let listing = if entries.len() < FEW { None } else { self.list(&set, NodeId(directory)).ok() };
            match listing {
                Some(listing) => unlisted(&set, &listing, buffer.spare_capacity_mut(), entries, &mut others),
                None => others.extend(entries),
            }
        }
        self.search_each(&set, others.into_iter())
    }

    /// Opens a directory on the share's own mount to list it.
    fn list(&self, set: &Set, directory: NodeId) -> Result<OwnedFd> {
        if let Some(entry) = set.find(directory.0) {
            self.find_with_parents(set, entry)?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let listing = openat(self.directory(set, directory)?, c".", flags, Mode::empty())?;
        let mount = InodeKey::of(&stat(&listing)?).mount;
        if mount == self.root.mount().id() { Ok(listing) } else { Err(Errno::XDEV) }
    }
}

/// Adds those of `entries` to `others` that are not in the listing of their directory as they should be.
fn unlisted<'a>(
    set: &Set,
    listing: &OwnedFd,
    buffer: &mut [MaybeUninit<u8>],
    entries: Vec<&'a Entry>,
    others: &mut Vec<&'a Entry>,
) {
    let mut missing: HashMap<&[u8], &Entry> = HashMap::with_capacity(entries.len());
    let mut left = entries.len().saturating_mul(MOST).saturating_add(BUFFER / MOST);
    for entry in entries {
        let before = entry.place().and_then(|(_, name)| missing.insert(name, entry));
        others.extend(before);
    }
    let mut listing = RawDir::new(listing, buffer);
    while let Some(Ok(listed)) = listing.next() {
        let name = listed.file_name().to_bytes();
        if missing.get(name).is_some_and(|entry| is_listed(set, entry, &listed)) {
            missing.remove(name);
        }
        left = left.saturating_sub(1);
        if missing.is_empty() || left == 0 {
            break;
        }
    }
    others.extend(missing.into_values());
}

/// Whether what is listed is the inode, as far as a listing tells.
fn is_listed(set: &Set, entry: &Entry, listed: &RawDirEntry<'_>) -> bool {
    let Some(wanted) = entry.wanted.identity else { return listed.file_type() != FileType::Unknown };
    let is_number = !set.origin.is_same || listed.ino() == wanted.ino;
    is_number && FileType::from_raw_mode(u32::from(wanted.kind) << 12) == listed.file_type()
}
