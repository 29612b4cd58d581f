//! How one inode stays reachable on the host: by an O_PATH descriptor or, once it was evicted, by its file handle.
//!
//! Only a descriptor keeps the host from reusing an inode's number. Without one, an inode is identified by its handle
//! alone, which has a generation in it: see [`InodeFd::is`].

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::{ArcSwapOption, Guard};
use rustix::io::Errno;

use super::mount::Mount;
use super::records::{Record, Records};
use crate::fs::Result;
use crate::limits::GuestFd;
use crate::sys::file_handles::{FileHandle, name_to_handle, open_by_handle};
use fuse_protocol::ids::NodeId;

/// The descriptor of an inode, which stays open for as long as this lives.
///
/// It is borrowed from the inode, not counted: that takes no atomic change of a line that all workers share.
#[derive(Debug)]
pub struct PathGuard(Guard<Option<Arc<GuestFd>>>);

impl PathGuard {
    fn of(path: Arc<GuestFd>) -> PathGuard {
        PathGuard(Guard::from_inner(Some(path)))
    }
}

impl Deref for PathGuard {
    type Target = GuestFd;

    #[allow(clippy::expect_used, reason = "a guard is made of a descriptor only")]
    fn deref(&self) -> &GuestFd {
        self.0.as_ref().expect("a guard has a descriptor")
    }
}

impl AsFd for PathGuard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

/// The descriptor of one inode, or what opens it again.
#[derive(Debug)]
pub(super) struct InodeFd {
    path: ArcSwapOption<GuestFd>,
    /// Holds the handle, once the inode was evicted for the first time, and the number of the descriptor.
    record: Record,
    /// The reference bit: used since the clock has last tested it.
    used: AtomicBool,
    mount: Arc<Mount>,
}

impl InodeFd {
    /// The inode that `path`, an O_PATH descriptor, refers to; without one, `record` has its handle.
    pub(super) fn new(path: Option<GuestFd>, mount: Arc<Mount>, record: Record) -> InodeFd {
        if path.is_some() && mount.directory().is_some() {
            mount.fd_cache().count_opened();
        }
        InodeFd { path: ArcSwapOption::from_pointee(path), record, used: AtomicBool::new(false), mount }
    }

    /// The inode's record.
    pub(super) fn record(&self) -> Record {
        self.record
    }

    fn records(&self) -> &Records {
        self.mount.fd_cache().records()
    }

    fn has_handle(&self) -> bool {
        self.records().inode(self.record).has_handle()
    }

    /// Whether it has a descriptor just now.
    pub(super) fn has_path(&self) -> bool {
        self.path.load().is_some()
    }

    /// The mount that the inode is on.
    pub(super) fn mount(&self) -> &Arc<Mount> {
        &self.mount
    }

    /// An O_PATH descriptor, which stays open for as long as the caller holds it; ESTALE if the inode had none and has
    /// been deleted on the host. `node` is the inode's.
    pub(super) fn path(&self, node: NodeId) -> Result<PathGuard> {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        let path = self.path.load();
        if path.is_some() { Ok(PathGuard(path)) } else { self.open_again(node) }
    }

    #[cold]
    fn open_again(&self, node: NodeId) -> Result<PathGuard> {
        let handle = self.records().handle(self.record);
        let (handle, directory) = handle.zip(self.mount.directory()).ok_or(Errno::STALE)?;
        let permit = self.mount.fd_cache().quota().acquire();
        let path = open_by_handle(directory.as_fd(), &handle)?;
        // Where the guest has used up its quota, each request opens the inode again.
        let Ok(permit) = permit else { return Ok(PathGuard::of(Arc::new(GuestFd::uncounted(path)))) };
        let path = Arc::new(permit.wrap(path));
        let before = {
            let _lock = self.records().lock(node.0);
            let before = self.path.swap(Some(Arc::clone(&path)));
            self.records().inode(self.record).set_descriptor(Some(path.as_fd().as_raw_fd()));
            before
        };
        if before.is_none() {
            self.mount.fd_cache().count_opened();
            self.enter_clock(node);
        }
        Ok(PathGuard::of(path))
    }

    /// From now on the clock tests the inode.
    pub(super) fn enter_clock(&self, node: NodeId) {
        if self.mount.directory().is_some() {
            self.mount.fd_cache().clock(node.0).push(node);
        }
    }

    /// Whether the next use has to open it.
    pub(super) fn is_evicted(&self) -> bool {
        self.has_handle() && self.path.load().is_none()
    }

    /// Whether the inode is the one that was just met under its number; `handle` is that one's, if it is known. `None`
    /// if only the handle can tell.
    ///
    /// While the inode has a descriptor its number is not reused, so they are the same.
    pub(super) fn is(&self, handle: Option<&FileHandle>) -> Option<bool> {
        // The handle is set before the first eviction. To read it costs less than to read the descriptor, which takes
        // two atomic changes.
        if !self.has_handle() || self.path.load().is_some() {
            return Some(true);
        }
        handle.map(|handle| self.records().handle(self.record).as_ref() == Some(handle))
    }

    /// Tests and clears the reference bit.
    pub(super) fn take_reference(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the descriptor; false if the inode has to keep it. `node` is the inode's.
    pub(super) fn evict(&self, node: NodeId) -> bool {
        let Some(path) = self.path.load_full() else { return true };
        if self.mount.directory().is_none() {
            return false;
        }
        let handle = if self.has_handle() { None } else { Some(name_to_handle(path.as_fd())) };
        let lock = self.records().lock(node.0);
        let is_known = match handle {
            None => true,
            Some(Ok(handle)) => self.records().set_handle(self.record, &handle),
            Some(Err(_)) => false,
        };
        if !is_known {
            return false;
        }
        let before = self.path.swap(None);
        self.records().inode(self.record).set_descriptor(None);
        drop(lock);
        if before.is_some() {
            self.mount.fd_cache().count_closed();
        }
        true
    }
}

impl Drop for InodeFd {
    fn drop(&mut self) {
        // Before the descriptor is closed.
        self.records().give_back(self.record);
        if self.mount.directory().is_some() && self.path.load().is_some() {
            self.mount.fd_cache().count_closed();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::OwnedFd;

    use rustix::fs::{FileType, Mode, OFlags, openat};

    use super::super::fd_cache::FdCache;
    use super::super::mount;
    use super::*;
    use crate::fs::passthrough::host::stat;
    use crate::limits::FdQuota;
    use crate::state_file::StateFile;

    fn path_of(path: &std::path::Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(rustix::fs::CWD, path, flags, Mode::empty()).unwrap()
    }

    fn ino(fd: &InodeFd) -> Result<u64> {
        Ok(stat(fd.path(NodeId(2))?)?.stx_ino)
    }

    /// A cache with a limit of one inode, in a quota of `max`.
    fn one_of(root: &std::path::Path, max: usize) -> (Arc<FdQuota>, Arc<Mount>) {
        // One is for the mount.
        let quota = Arc::new(FdQuota::new(max + 1, 0));
        mount::try_handles(path_of(root)).unwrap();
        let records = Records::new(&StateFile::create().unwrap());
        let all = Arc::new(FdCache::with_limit(&quota, &records, 1));
        let mount = all.mount(1, path_of(root), FileType::Directory).unwrap();
        (quota, mount)
    }

    fn inode_fd(path: &std::path::Path, quota: &Arc<FdQuota>, mount: &Arc<Mount>) -> InodeFd {
        let record = mount.fd_cache().records().inodes().take().unwrap();
        InodeFd::new(Some(quota.acquire().unwrap().wrap(path_of(path))), Arc::clone(mount), record)
    }

    /// One test of the clock.
    fn ask(fd: &InodeFd) {
        if !fd.take_reference() {
            assert!(fd.evict(NodeId(2)));
        }
    }

    #[test]
    fn an_evicted_inode_is_opened_again_when_the_quota_is_used_up() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (quota, mount) = one_of(folder.path(), 1);
        let fd = inode_fd(folder.path(), &quota, &mount);
        let wanted = ino(&fd).unwrap();
        ask(&fd);
        ask(&fd);
        assert_eq!(quota.in_use() - 1, 0);
        let permit = quota.acquire().unwrap();
        for _ in 0..3 {
            assert_eq!(ino(&fd).unwrap(), wanted);
            assert_eq!((mount.fd_cache().open(), quota.in_use() - 1), (0, 1), "nothing was kept");
        }
        drop(permit);
        assert_eq!(ino(&fd).unwrap(), wanted);
        assert_eq!((mount.fd_cache().open(), quota.in_use() - 1), (1, 1));
        drop(fd);
        assert_eq!((mount.fd_cache().open(), quota.in_use() - 1), (0, 0));
    }

    #[test]
    fn an_evicted_inode_is_opened_again_under_any_name() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (quota, mount) = one_of(folder.path(), 10);
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        File::create(&file).unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [&file, &link] {
            let fd = inode_fd(path, &quota, &mount);
            let before = ino(&fd).unwrap();
            ask(&fd);
            assert_eq!(mount.fd_cache().open(), 1, "its reference bit was set");
            ask(&fd);
            assert_eq!(mount.fd_cache().open(), 0);
            let renamed = path.with_extension("renamed");
            fs::rename(path, &renamed).unwrap();
            assert_eq!(ino(&fd).unwrap(), before);
            assert_eq!(mount.fd_cache().open(), 1);
            // A descriptor in use survives.
            let held = fd.path(NodeId(2)).unwrap();
            ask(&fd);
            ask(&fd);
            assert_eq!(stat(&held).unwrap().stx_ino, before);
            drop(held);
            fs::remove_file(&renamed).unwrap();
            assert_eq!(ino(&fd).unwrap_err(), Errno::STALE);
            drop(fd);
            assert_eq!((mount.fd_cache().open(), quota.in_use() - 1), (0, 0));
        }
    }

    #[test]
    fn threads_that_use_and_evict_an_inode_lose_nothing() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (quota, mount) = one_of(folder.path(), 10);
        let fd = inode_fd(folder.path(), &quota, &mount);
        let wanted = ino(&fd).unwrap();
        std::thread::scope(|scope| {
            for turn in 0..4 {
                let fd = &fd;
                scope.spawn(move || {
                    for _ in 0..5000 {
                        match turn {
                            0 | 1 => ask(fd),
                            _ => assert_eq!(ino(fd).unwrap(), wanted),
                        }
                    }
                });
            }
        });
        fd.path(NodeId(2)).unwrap();
        assert_eq!(mount.fd_cache().open(), 1);
        drop(fd);
        assert_eq!(mount.fd_cache().open(), 0);
    }
}
