//! How one inode stays reachable on the host: by an O_PATH descriptor or, once it was evicted, by its file handle.
//!
//! Only a descriptor keeps the host from reusing an inode's number. Without one, an inode is identified by its handle
//! alone, which has a generation in it: see [`InodeFd::is`].

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};
use rustix::io::Errno;

use super::mount::Mount;
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
    /// Known once the inode was evicted for the first time.
    handle: OnceLock<FileHandle>,
    /// The reference bit: used since the clock has last tested it.
    used: AtomicBool,
    mount: Arc<Mount>,
}

impl InodeFd {
    /// The inode that `path`, an O_PATH descriptor, refers to.
    pub(super) fn new(path: GuestFd, mount: Arc<Mount>) -> InodeFd {
        if mount.directory().is_some() {
            mount.fd_cache().count_opened();
        }
        InodeFd {
            path: ArcSwapOption::from_pointee(path),
            handle: OnceLock::new(),
            used: AtomicBool::new(false),
            mount,
        }
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
        let (handle, directory) = self.handle.get().zip(self.mount.directory()).ok_or(Errno::STALE)?;
        let permit = self.mount.fd_cache().quota().acquire();
        let path = open_by_handle(directory.as_fd(), handle)?;
        // Where the guest has used up its quota, each request opens the inode again.
        let Ok(permit) = permit else { return Ok(PathGuard::of(Arc::new(GuestFd::uncounted(path)))) };
        let path = Arc::new(permit.wrap(path));
        if self.path.swap(Some(Arc::clone(&path))).is_none() {
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
        self.handle.get().is_some() && self.path.load().is_none()
    }

    /// Whether the inode is the one that was just met under its number; `handle` is that one's, if it is known. `None`
    /// if only the handle can tell.
    ///
    /// While the inode has a descriptor its number is not reused, so they are the same.
    pub(super) fn is(&self, handle: Option<&FileHandle>) -> Option<bool> {
        // The handle is set before the first eviction. To read it costs less than to read the descriptor, which takes
        // two atomic changes.
        if self.handle.get().is_none() || self.path.load().is_some() {
            return Some(true);
        }
        handle.map(|handle| self.handle.get() == Some(handle))
    }

    /// Remembers the inode's handle, which was asked for anyway.
    pub(super) fn set_handle(&self, handle: FileHandle) {
        // If it is known already, it is the same.
        let _ = self.handle.set(handle);
    }

    /// Tests and clears the reference bit.
    pub(super) fn take_reference(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the descriptor; false if the inode has to keep it.
    pub(super) fn evict(&self) -> bool {
        let Some(path) = self.path.load_full() else { return true };
        if self.mount.directory().is_none() {
            return false;
        }
        if self.handle.get().is_none() {
            let Ok(handle) = name_to_handle(path.as_fd()) else { return false };
            self.set_handle(handle);
        }
        if self.path.swap(None).is_some() {
            self.mount.fd_cache().count_closed();
        }
        true
    }
}

impl Drop for InodeFd {
    fn drop(&mut self) {
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
        let all = Arc::new(FdCache::with_limit(&quota, 1));
        let mount = all.mount(1, path_of(root), FileType::Directory).unwrap();
        (quota, mount)
    }

    fn inode_fd(path: &std::path::Path, quota: &Arc<FdQuota>, mount: &Arc<Mount>) -> InodeFd {
        InodeFd::new(quota.acquire().unwrap().wrap(path_of(path)), Arc::clone(mount))
    }

    /// One test of the clock.
    fn ask(fd: &InodeFd) {
        if !fd.take_reference() {
            assert!(fd.evict());
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
