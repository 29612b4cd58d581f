//! Listing directories.

use std::mem::MaybeUninit;

use rustix::fs::{RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::PassthroughFs;
use super::handles::Handle;
use crate::fs::Result;
use crate::fuse::ids::NodeId;
use crate::fuse::reply::{DirectoryEntry, DirectoryWriter, Full};

/// Most bytes of directory that are read from the host at once.
const BUFFER_SIZE: usize = 16 << 10;
/// Fewest: one entry with the longest name takes 280.
const SMALLEST_READ: usize = 512;
/// A record of READDIRPLUS is about so many times as long as the host's, with the usual names.
const PLUS_GROWTH: usize = 5;

impl PassthroughFs {
    /// Lists from `offset` on, which is 0 or what an earlier entry gave as its next offset. The
    /// host keeps such offsets valid while entries come and go.
    pub(super) fn list(&self, handle: &Handle, offset: u64, out: &mut DirectoryWriter<'_>) -> Result<()> {
        let mut position = handle.position()?;
        if *position != offset {
            seek(handle.fd(), SeekFrom::Start(offset))?;
            *position = offset;
        }
        // The stream stands behind what was read, which is more than what found room: unless all
        // of it did, the next call has to seek.
        let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER_SIZE];
        // To read much more than finds room would be to read it again with the next call.
        let wanted = if out.plus() { out.room() / PLUS_GROWTH } else { out.room() };
        let (part, _) = buffer.split_at_mut(wanted.clamp(SMALLEST_READ, BUFFER_SIZE));
        let mut stream = RawDir::new(handle.fd(), part);
        while let Some(entry) = stream.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What is listed already is given; the error comes with the next call.
                Err(_) if !out.is_empty() => break,
                Err(errno) => return Err(errno),
            };
            let listed = DirectoryEntry {
                ino: entry.ino(),
                next_offset: entry.next_entry_cookie(),
                kind: kind_number(entry.file_type()),
                name: entry.file_name().to_bytes(),
            };
            if self.list_entry(handle, &listed, entry.file_name(), out).is_err() {
                // Too small for even one entry?
                let result = if out.is_empty() { Err(Errno::INVAL) } else { Ok(()) };
                *position = u64::MAX;
                return result;
            }
            *position = listed.next_offset;
        }
        Ok(())
    }

    /// Adds one entry, looked up if the guest wants that.
    fn list_entry(
        &self,
        handle: &Handle,
        listed: &DirectoryEntry<'_>,
        name: &std::ffi::CStr,
        out: &mut DirectoryWriter<'_>,
    ) -> std::result::Result<(), Full> {
        let directory = &handle.inode;
        if listed.name == b".." && directory.node == NodeId::ROOT {
            // What lies above the share is not the guest's business.
            return out.push(&DirectoryEntry { ino: directory.key.ino, ..*listed }, None);
        }
        if !out.plus() || listed.name == b"." || listed.name == b".." {
            return out.push(listed, None);
        }
        if !out.fits(listed.name.len()) {
            return Err(Full);
        }
        // An entry that has gone meanwhile, or cannot be looked up, is listed as READDIR would.
        let found = self.look_up(directory, name).ok();
        let pushed = out.push(listed, found.as_ref());
        if let (Err(Full), Some(entry)) = (pushed, found) {
            self.inodes.forget(entry.node, 1);
        }
        pushed
    }
}

/// A file type as `DT_*`.
fn kind_number(kind: rustix::fs::FileType) -> u32 {
    kind.as_raw_mode() >> 12
}
