//! READDIR and READDIRPLUS.

use std::ffi::CStr;

use rustix::io::Errno;

use super::guest_view::GuestView;
use super::lookup::lookup_at;
use crate::fs::Result;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::inode::InodeTable;
use fuse_protocol::ids::NodeId;
use fuse_protocol::reply::{DirectoryEntry, DirectoryWriter, Full};

/// A record of READDIRPLUS is about so many times as long as the host's, with the usual names.
const PLUS_GROWTH: usize = 5;

/// Lists from `offset` on, which is 0 or the next offset of an earlier entry.
pub fn readdir(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    handle: &Handle,
    offset: u64,
    out: &mut DirectoryWriter<'_>,
) -> Result<()> {
    let mut listing = handle.listing()?;
    listing.seek(handle.fd(), offset)?;
    loop {
        while let Some(entry) = listing.next() {
            let listed = DirectoryEntry {
                ino: view.number(handle.inode(), entry.ino),
                next_offset: entry.next_offset,
                kind: u32::from(entry.kind),
                name: entry.name.to_bytes(),
            };
            if push(inodes, view, handle, &listed, entry.name, out).is_err() {
                listing.park();
                // Too small for even one entry?
                return if out.is_empty() { Err(Errno::INVAL) } else { Ok(()) };
            }
            listing.consume();
        }
        // What finds no room in the reply stays in memory until the next request.
        let wanted = if out.plus() { out.room() / PLUS_GROWTH } else { out.room() };
        match listing.read(handle.fd(), wanted) {
            Ok(true) => {}
            Ok(false) if out.is_empty() => {
                listing.end();
                return Ok(());
            }
            Err(errno) if out.is_empty() => return Err(errno),
            // The reply has what was listed; the error comes with the next request.
            Ok(false) | Err(_) => {
                listing.park();
                return Ok(());
            }
        }
    }
}

/// Adds one entry, with a lookup for READDIRPLUS.
fn push(
    inodes: &InodeTable,
    view: &GuestView<'_>,
    handle: &Handle,
    listed: &DirectoryEntry<'_>,
    name: &CStr,
    out: &mut DirectoryWriter<'_>,
) -> std::result::Result<(), Full> {
    let directory = handle.inode();
    if listed.name == b".." && directory.node() == NodeId::ROOT {
        // The guest does not see the directory above the share.
        return out.push(&DirectoryEntry { ino: directory.key().ino, ..*listed }, None);
    }
    if !out.plus() || listed.name == b"." || listed.name == b".." {
        return out.push(listed, None);
    }
    if !out.fits(listed.name.len()) {
        return Err(Full);
    }
    // An entry that was removed meanwhile, or cannot be looked up, is listed as READDIR would.
    let found = lookup_at(inodes, view, handle.fd(), directory, name).ok();
    let pushed = out.push(listed, found.as_ref());
    if let (Err(Full), Some(entry)) = (pushed, found) {
        inodes.take_back_lookup(view.effects, entry.node);
    }
    pushed
}
