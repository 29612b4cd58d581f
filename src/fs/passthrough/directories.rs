//! Listing directories.

use std::ffi::CStr;

use rustix::io::Errno;

use super::PassthroughFs;
use super::handles::Handle;
use crate::fs::Result;
use fuse_protocol::ids::NodeId;
use fuse_protocol::reply::{DirectoryEntry, DirectoryWriter, Full};

/// A record of READDIRPLUS is about so many times as long as the host's, with the usual names.
const PLUS_GROWTH: usize = 5;

impl PassthroughFs {
    /// Lists from `offset` on, which is 0 or what an earlier entry gave as its next offset.
    pub(super) fn list(&self, handle: &Handle, offset: u64, out: &mut DirectoryWriter<'_>) -> Result<()> {
        let mut listing = handle.listing()?;
        listing.go_to(handle.fd(), offset)?;
        loop {
            while let Some(entry) = listing.next() {
                let listed = DirectoryEntry {
                    ino: self.shown_number(&handle.inode, entry.ino),
                    next_offset: entry.next_offset,
                    kind: u32::from(entry.kind),
                    name: entry.name.to_bytes(),
                };
                if self.list_entry(handle, &listed, entry.name, out).is_err() {
                    listing.rest();
                    // Too small for even one entry?
                    return if out.is_empty() { Err(Errno::INVAL) } else { Ok(()) };
                }
                listing.given();
            }
            // To read much more than finds room would be to keep it until the next call.
            let wanted = if out.plus() { out.room() / PLUS_GROWTH } else { out.room() };
            match listing.read(handle.fd(), wanted) {
                Ok(true) => {}
                Ok(false) if out.is_empty() => {
                    listing.end();
                    return Ok(());
                }
                Err(errno) if out.is_empty() => return Err(errno),
                // What is listed already is given; the error comes with the next call.
                Ok(false) | Err(_) => {
                    listing.rest();
                    return Ok(());
                }
            }
        }
    }

    /// Adds one entry, looked up if the guest wants that.
    fn list_entry(
        &self,
        handle: &Handle,
        listed: &DirectoryEntry<'_>,
        name: &CStr,
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
        let found = self.look_up_at(handle.fd(), directory, name).ok();
        let pushed = out.push(listed, found.as_ref());
        if let (Err(Full), Some(entry)) = (pushed, found) {
            self.inodes.forget(entry.node, 1);
        }
        pushed
    }
}
