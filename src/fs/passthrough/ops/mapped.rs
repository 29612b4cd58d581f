//! WRITE through a mapping: which files are mapped, and when ([`MappedFile`] says how).
//!
//! A file is mapped once it was written a few times in parallel mode, if its file system shows in mappings what its page cache
//! has and keeps no write from the other hosts or from a FUSE server: tmpfs, ext4 and XFS. The file's lock in the host's kernel
//! also keeps overlapping writes of several daemons whole. A mapping does not, so it is up to the options whether that is
//! given up.

use std::sync::Arc;

use rustix::fs::OFlags;

use super::xattr::mapped_capability;
use crate::fs::Result;
use crate::fs::passthrough::config::{CachePolicy, FsConfig, MappedWrites, ParallelDirectWrites};
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::passthrough::host::file::Opener;
use crate::fs::passthrough::inode::FileSystemKind;
use crate::fs::passthrough::inode::mapped::MappedFile;
use crate::fs::passthrough::inode::settler::MappedFiles;
use crate::metrics::notes::{self, Mapped};
use crate::sys::guest_buffers::GuestReader;

/// How files of a share are mapped.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// Which ones; not [`MappedWrites::Never`].
    pub policy: MappedWrites,
    /// Nobody else changes the share.
    pub is_alone: bool,
    /// The files.
    pub files: &'a MappedFiles,
    /// Opens files once more.
    pub opener: Opener<'a>,
}

/// Which option lets no file of a share be written through mappings, or what it lacks.
pub fn obstacle(config: &FsConfig) -> Option<&'static str> {
    let is_parallel = config.parallel_direct_writes != ParallelDirectWrites::Never && !config.writeback;
    Some(match config.mapped_writes {
        MappedWrites::Never => "--mapped-writes=never",
        // O_DIRECT on the host does not go together with mappings of the same file.
        _ if config.allow_direct_io => "--allow-direct-io",
        // Capabilities under another name are removed before each write.
        _ if mapped_capability(config).is_some() => "--xattr-map renames file capabilities",
        _ if config.readonly => "--readonly",
        _ if !is_parallel => "no file has parallel direct writes",
        MappedWrites::Auto if config.cache != CachePolicy::Always => {
            "others may write the share (--mapped-writes)"
        }
        MappedWrites::Auto | MappedWrites::Always => return None,
    })
}

impl Mapping<'_> {
    /// Whether files of this kind are mapped; if so, whether they are on a disk.
    fn takes(self, kind: FileSystemKind) -> Option<bool> {
        let has_disk = match kind {
            FileSystemKind::Memory => false,
            FileSystemKind::Disk => true,
            FileSystemKind::Other => return None,
        };
        (self.policy == MappedWrites::Always || self.is_alone).then_some(has_disk)
    }
}

/// Writes all of `data`, whose bytes are locked: through a mapping, or by `plain`.
pub fn write(
    mapping: Mapping<'_>,
    handle: &Handle,
    offset: u64,
    data: &mut GuestReader<'_>,
    plain: impl FnOnce(&mut GuestReader<'_>) -> Result<usize>,
) -> Result<usize> {
    let (inode, fd) = (handle.inode(), handle.fd());
    let is_synchronous = handle.file().flags().intersects(OFlags::SYNC | OFlags::DSYNC);
    // With a handle that is not writable, pwritev2(2) has the error.
    let is_possible = handle.file().is_writable() && !is_synchronous && !data.is_empty();
    let Some(has_disk) = mapping.takes(inode.mount().kind(fd)).filter(|_| is_possible) else {
        return plain(data);
    };
    let mapped = inode.mapped();
    let Some(file) = &*mapped else {
        let done = plain(data)?;
        if handle.count_write() {
            // Without it nothing is lost but speed.
            let _ = map(mapping, handle, has_disk);
        }
        return Ok(done);
    };
    let len = data.len();
    match file.write(fd, offset, data, &**inode) {
        Ok(()) => {
            data.skip(len);
            notes::wrote_mapped(Mapped::Copied);
            if !inode.mapped().as_ref().is_some_and(|now| Arc::ptr_eq(now, file)) {
                // The last opener has closed it meanwhile, and nobody will settle it.
                file.settle_and(&**inode, || ());
            }
            Ok(len)
        }
        Err(miss) => {
            notes::wrote_mapped(Mapped::FellBack);
            let done = plain(data).inspect_err(|_| file.revoke())?;
            file.wrote(fd, miss, offset, done, || mapping.opener.for_mapping(fd));
            Ok(done)
        }
    }
}

/// From now on the file is written through mappings, where that pays.
#[cold]
fn map(mapping: Mapping<'_>, handle: &Handle, has_disk: bool) -> Result<()> {
    let (files, inode) = (mapping.files, handle.inode());
    // It may be that the daemon may not read it.
    drop(mapping.opener.for_mapping(handle.fd())?);
    if let Some(settler) = files.settler(inode) {
        inode.map(MappedFile::new(handle.fd(), has_disk, &**inode, Arc::clone(&settler))?);
        MappedFiles::add(&settler, inode);
    }
    Ok(())
}
