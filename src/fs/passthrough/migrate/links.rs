//! Other names of files.
//!
//! The host's kernel tells one name of a descriptor, the one that the file was found by. Where that was removed and the
//! file has others (a program that links a finished file into its place and removes the first name), they stand in
//! directories that the guest most likely knows, since it has made them there. The same is true of a file that was opened
//! again by its handle, after the kernel has forgotten all of its names. So these directories are listed, once for all such
//! files, and only where there are such files.

use std::collections::HashMap;
use std::sync::Arc;

use rustix::fs::{Dir, Mode, OFlags, openat};

use super::locate::{Located, Locator};
use crate::fs::Result;
use crate::fs::passthrough::host::stat;
use crate::fs::passthrough::inode::{Inode, InodeTable};

/// Names of those of these files that have one in a directory that the guest knows, by their indices. `ends` says whether
/// to give up.
pub fn find(
    inodes: &InodeTable,
    locator: &Locator<'_>,
    files: &[Arc<Inode>],
    ends: impl Fn() -> bool,
) -> Vec<(usize, Located)> {
    let number = |(index, inode): (usize, &Arc<Inode>)| {
        inode.path().and_then(|path| stat(&*path)).ok().map(|stat| (stat.stx_ino, index))
    };
    // Files on several mounts may have one number.
    let mut missing: HashMap<u64, Vec<usize>> = HashMap::new();
    for (ino, index) in files.iter().enumerate().filter_map(number) {
        missing.entry(ino).or_default().push(index);
    }
    let mut found = Vec::new();
    if missing.is_empty() {
        return found;
    }
    for directory in inodes.all().iter().filter(|inode| inode.is_directory()) {
        let Ok(entries) = list(directory) else { continue };
        for entry in entries.map_while(std::result::Result::ok) {
            let Some(candidates) = missing.get_mut(&entry.ino()) else { continue };
            let named = |index: &usize| {
                let inode = files.get(*index)?;
                locator.named(inode, directory.node(), entry.file_name().to_bytes()).ok()
            };
            if let Some((at, located)) =
                candidates.iter().enumerate().find_map(|(at, index)| Some((at, named(index)?)))
            {
                found.push((candidates.swap_remove(at), located));
            }
            if candidates.is_empty() {
                missing.remove(&entry.ino());
            }
        }
        if missing.is_empty() || ends() {
            break;
        }
    }
    found
}

fn list(directory: &Inode) -> Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Dir::new(openat(directory.path()?, c".", flags, Mode::empty())?)
}
