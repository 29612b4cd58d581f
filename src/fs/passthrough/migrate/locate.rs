//! Where an inode is, for a daemon that has not opened it.
//!
//! The host's kernel tells the path of a descriptor (readlink(2) of `/proc/self/fd/N`), which is only a hint: it is text
//! that anybody's rename may make wrong. Nothing is opened by it. Its directories are looked up one by one among the
//! inodes that the guest knows, and the name counts if it means this inode in the last of them (one statx(2)).

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::AsFd;

use rustix::fs::{Dir, FileType, Mode, OFlags, Statx, openat, readlinkat};
use rustix::io::Errno;

use crate::fs::Result;
use crate::fs::passthrough::host::{PATH, PROC, kind, proc_name, stat, stat_entry};
use crate::fs::passthrough::inode::{Inode, InodeKey, InodeTable, identity, is_same};
use crate::migration::config::{MigrationConfig, Mode as MigrationMode};
use crate::migration::{self, FileHandle, Identity, Location, NO_NAME};
use fuse_protocol::ids::NodeId;

/// What the kernel appends to the path of what has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// Where an inode is, and what it is.
#[derive(Clone, Debug)]
pub struct Located {
    pub location: Location,
    pub identity: Option<Identity>,
    /// Its file handle beside a name.
    pub handle: Option<FileHandle>,
}

impl Located {
    /// Not looked for yet.
    pub fn nowhere() -> Located {
        Located { location: Location::Lost(String::new()), identity: None, handle: None }
    }
}

/// Finds inodes; each thread has its own.
#[derive(Debug)]
pub struct Locator<'a> {
    inodes: &'a InodeTable,
    config: &'a MigrationConfig,
    /// The path of the share as the kernel tells it, without a slash at the end.
    root: Vec<u8>,
    /// Directories below the share that the guest knows, by their paths.
    directories: HashMap<Vec<u8>, NodeId>,
}

impl<'a> Locator<'a> {
    pub fn new(inodes: &'a InodeTable, config: &'a MigrationConfig) -> Locator<'a> {
        let path = inodes.root().path().and_then(|root| link_of(&*root)).unwrap_or_default();
        let root = path.strip_suffix(b"/").unwrap_or(&path).to_vec();
        Locator { inodes, config, root, directories: HashMap::new() }
    }

    /// Where an inode is.
    pub fn locate(&mut self, inode: &Inode) -> Located {
        if inode.node() == NodeId::ROOT {
            return self.located(inode, Location::Root, inode.path().and_then(|path| stat(&*path)).ok());
        }
        if self.prefers_handle(inode)
            && let Ok(handle) = self.handle(inode)
        {
            let identity = Identity { kind: kind_of(inode), ino: inode.key().ino, born: None };
            return Located { location: Location::Handle(handle), identity: Some(identity), handle: None };
        }
        let errno = match self.by_name(inode) {
            Ok((parent, name, stat)) => {
                return self.located(inode, Location::Child { parent: parent.0, name }, Some(stat));
            }
            Err(errno) => errno,
        };
        match self.by_path(inode) {
            Ok((path, stat)) => self.located(inode, Location::Path(path), Some(stat)),
            Err(_) => self.without_name(inode, errno),
        }
    }

    /// Whether a location that was found earlier is still true.
    pub fn confirm(&self, saved: &migration::Inode) -> bool {
        let found = match &saved.location {
            Location::Child { parent, name } => self.entry(NodeId(*parent), name),
            Location::Path(path) => self.inodes.open_below_root(path).and_then(stat),
            _ => return true,
        };
        found.is_ok_and(|now| saved.identity.is_none_or(|was| is_same(&was, &identity(&now))))
    }

    /// Whether an inode that is there may have a name that was not found. Asked of all, and true of few.
    pub fn may_lack_name(&self, location: &Location) -> bool {
        match location {
            Location::Lost(_) => true,
            Location::Handle(handle) => !self.prefers_handles_of(handle.mount),
            _ => false,
        }
    }

    fn prefers_handles_of(&self, mount: u64) -> bool {
        match self.config.mode {
            MigrationMode::FindPaths => false,
            MigrationMode::FileHandles => true,
            MigrationMode::Auto => {
                let mount = u32::try_from(mount).ok().and_then(|id| self.inodes.fd_cache().known_mount(id));
                mount.is_some_and(|mount| mount.opens_handles())
            }
        }
    }

    /// Whether such an inode has one.
    pub fn has_name(&self, inode: &Inode) -> bool {
        !inode.is_directory()
            && !self.prefers_handle(inode)
            && inode.path().and_then(|path| stat(&*path)).is_ok_and(|now| now.stx_nlink > 0)
    }

    /// An inode that may have this name in a directory that the guest knows.
    pub fn named(&self, inode: &Inode, parent: NodeId, name: &[u8]) -> Result<Located> {
        let stat = self.entry(parent, name)?;
        if !self.is(inode, &stat)? {
            return Err(Errno::STALE);
        }
        Ok(self.located(inode, Location::Child { parent: parent.0, name: name.to_vec() }, Some(stat)))
    }

    fn prefers_handle(&self, inode: &Inode) -> bool {
        match self.config.mode {
            MigrationMode::FindPaths => false,
            MigrationMode::FileHandles => true,
            MigrationMode::Auto => inode.mount().opens_handles(),
        }
    }

    /// A file handle of an inode, for another daemon.
    pub fn handle(&self, inode: &Inode) -> Result<FileHandle> {
        let handle = self.inodes.handle_of(inode)?;
        let mount = u64::from(inode.mount().id());
        Ok(FileHandle { mount, kind: handle.kind(), bytes: handle.bytes().to_vec() })
    }

    fn located(&self, inode: &Inode, location: Location, stat: Option<Statx>) -> Located {
        let handle = self.config.verify_handles.then(|| self.handle(inode).ok()).flatten();
        Located { location, identity: stat.as_ref().map(identity), handle }
    }

    /// What has no name, or none that can be found.
    fn without_name(&self, inode: &Inode, errno: Errno) -> Located {
        let now = inode.path().and_then(|path| stat(&*path));
        // One that cannot be opened again by its handle has gone, too.
        let is_gone = now.map_or_else(|errno| errno == Errno::STALE, |now| now.stx_nlink == 0);
        let identity = now.as_ref().ok().map(identity);
        let handle = inode.mount().opens_handles().then(|| self.handle(inode).ok()).flatten();
        // Also for a destination that takes no handles, what was removed is nothing that it lacks.
        if is_gone {
            return Located { location: Location::Lost(NO_NAME.to_owned()), identity, handle };
        }
        let location = match handle {
            Some(handle) => Location::Handle(handle),
            None => Location::Lost(format!("its name cannot be found: {errno}")),
        };
        Located { location, identity, handle: None }
    }

    /// Directory and name of an inode, and its attributes.
    fn by_name(&mut self, inode: &Inode) -> Result<(NodeId, Vec<u8>, Statx)> {
        let path = inode.path()?;
        let link = match link_of(&*path) {
            Err(Errno::NAMETOOLONG) => return self.by_listing(inode),
            link => link?,
        };
        let below = link.strip_prefix(self.root.as_slice()).and_then(|rest| rest.strip_prefix(b"/"));
        let below = below.ok_or(Errno::XDEV)?;
        let (directory, name) = split(below);
        let found = self.directory(directory).and_then(|parent| {
            let stat = self.entry(parent, name)?;
            self.is(inode, &stat)?.then(|| (parent, name.to_vec(), stat)).ok_or(Errno::STALE)
        });
        if found.is_err() && link.ends_with(DELETED) { Err(Errno::NOENT) } else { found }
    }

    /// The path of an inode in a directory that the guest does not know.
    fn by_path(&self, inode: &Inode) -> Result<(Vec<u8>, Statx)> {
        let path = self.path_below(inode).ok_or(Errno::XDEV)?;
        let stat = stat(self.inodes.open_below_root(&path)?)?;
        if self.is(inode, &stat)? { Ok((path, stat)) } else { Err(Errno::STALE) }
    }

    /// The same for a directory whose path is too long for the kernel to tell: the directory above it is listed.
    fn by_listing(&self, inode: &Inode) -> Result<(NodeId, Vec<u8>, Statx)> {
        if !inode.is_directory() {
            return Err(Errno::NAMETOOLONG);
        }
        let above = openat(inode.path()?, c"..", PATH | OFlags::DIRECTORY, Mode::empty())?;
        let parent = self.inodes.known_as(&stat(&above)?).ok_or(Errno::STALE)?;
        let open = openat(&above, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for entry in Dir::new(open)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"."
                && name != b".."
                && matches!(entry.file_type(), FileType::Directory | FileType::Unknown)
                && let Ok(found) = stat_entry(&above, entry.file_name())
                && self.is(inode, &found)?
            {
                return Ok((parent.node(), name.to_vec(), found));
            }
        }
        Err(Errno::NOENT)
    }

    /// The attributes of an entry of a directory that the guest knows.
    fn entry(&self, parent: NodeId, name: &[u8]) -> Result<Statx> {
        let parent = self.inodes.restored(parent).ok_or(Errno::STALE)?;
        stat_entry(parent.path()?, &CString::new(name).map_err(|_| Errno::INVAL)?)
    }

    /// Whether what was seen by name is this inode, which has a descriptor just now.
    fn is(&self, inode: &Inode, seen: &Statx) -> Result<bool> {
        if inode.mount().numbers_alias() {
            return Ok(is_same(&identity(seen), &identity(&stat(&*inode.path()?)?)));
        }
        Ok(InodeKey::of(seen) == *inode.key() && kind(seen) == inode.kind())
    }

    /// The directory with this path below the share.
    fn directory(&mut self, path: &[u8]) -> Result<NodeId> {
        if path.is_empty() {
            return Ok(NodeId::ROOT);
        }
        if let Some(known) = self.directories.get(path) {
            return Ok(*known);
        }
        // The longest part that is known, and from there downwards.
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let ends: Vec<usize> = ends.chain([path.len()]).collect();
        let part = |end: &usize| path.get(..*end).unwrap_or_default();
        let known = ends.iter().rev().find_map(|end| Some((*end, *self.directories.get(part(end))?)));
        let (done, mut node) = known.unwrap_or((0, NodeId::ROOT));
        for end in ends.iter().filter(|end| **end > done) {
            let (_, name) = split(part(end));
            let found = self.entry(node, name)?;
            node = self.inodes.known_as(&found).ok_or(Errno::STALE)?.node();
            self.directories.insert(part(end).to_vec(), node);
        }
        Ok(node)
    }

    /// The path of an inode below the share, for the list of mounts.
    pub fn path_below(&self, inode: &Inode) -> Option<Vec<u8>> {
        self.path_of(inode.path().ok()?)
    }

    /// The path of what is open.
    pub fn path_of(&self, fd: impl AsFd) -> Option<Vec<u8>> {
        let link = link_of(fd).ok()?;
        Some(link.strip_prefix(self.root.as_slice())?.strip_prefix(b"/")?.to_vec())
    }

    /// Paths may mean something else by now.
    pub fn forget_paths(&mut self) {
        self.directories.clear();
    }
}

/// The upper four bits of a mode.
pub fn kind_of(inode: &Inode) -> u8 {
    u8::try_from(inode.kind().as_raw_mode() >> 12).unwrap_or(0)
}

/// The path of a descriptor, as the kernel tells it.
fn link_of(fd: impl AsFd) -> Result<Vec<u8>> {
    let link = readlinkat(PROC, proc_name(&fd), Vec::with_capacity(512))?;
    Ok(link.into_bytes())
}

/// The path of the directory, and the name in it.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => {
            (path.get(..at).unwrap_or_default(), path.get(at.saturating_add(1)..).unwrap_or_default())
        }
        None => (b"", path),
    }
}
