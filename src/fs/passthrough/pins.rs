//! What keeps hold of inodes on the host: an O_PATH descriptor each or, while an inode is seldom
//! used and descriptors are scarce, its file handle.
//!
//! An inode begins with a descriptor, which is the cheapest to use. When more than half of the
//! descriptors that the process may have are taken by inodes, those that were not used lately give
//! theirs up. The next use opens the inode again by its handle, as the same inode or not at all.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use arc_swap::ArcSwapOption;
use log::debug;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::budget::{Budget, Held};
use crate::fs::Result;
use crate::sys::file_handles::{FileHandle, name_to_handle, open_by_handle};

/// The descriptors of all inodes together, and the mounts that handles are opened on.
#[derive(Debug)]
pub struct Descriptors {
    /// Inodes that have a descriptor.
    taken: AtomicUsize,
    /// How many may, before some give theirs up.
    allowed: AtomicUsize,
    /// A descriptor of something on each mount, by mount id.
    mounts: RwLock<HashMap<i32, Arc<OwnedFd>>>,
    /// What inodes share with whatever else the guest holds.
    budget: Arc<Budget>,
}

impl Descriptors {
    /// No limit but the budget's: each inode keeps its descriptor.
    pub fn unlimited(budget: &Arc<Budget>) -> Descriptors {
        Descriptors {
            taken: AtomicUsize::new(0),
            allowed: AtomicUsize::new(usize::MAX),
            mounts: RwLock::default(),
            budget: Arc::clone(budget),
        }
    }

    /// Half of the budget, if inodes can be opened by handle at the share's `root`.
    ///
    /// EPERM without CAP_DAC_READ_SEARCH, EOPNOTSUPP where the file system has no handles.
    pub fn limited(root: &OwnedFd, budget: &Arc<Budget>) -> Result<Descriptors> {
        Descriptors::with_limit(root, budget, budget.most() / 2)
    }

    /// `allowed` descriptors for inodes, as in [`Descriptors::limited`].
    pub fn with_limit(root: &OwnedFd, budget: &Arc<Budget>, allowed: usize) -> Result<Descriptors> {
        let handle = name_to_handle(root.as_fd())?;
        let descriptors = Descriptors::unlimited(budget);
        descriptors.add_mount(handle.mount(), root)?;
        open_by_handle(descriptors.mount(handle.mount())?.as_fd(), &handle)?;
        descriptors.allowed.store(allowed.max(1), Ordering::Relaxed);
        Ok(descriptors)
    }

    /// Whether inodes may have to give up descriptors.
    pub fn are_limited(&self) -> bool {
        self.allowed.load(Ordering::Relaxed) != usize::MAX
    }

    /// Whether inodes should give up descriptors.
    pub fn are_scarce(&self) -> bool {
        self.taken.load(Ordering::Relaxed) > self.allowed.load(Ordering::Relaxed)
    }

    /// Whether enough have done so, so that it will be a while until the next time.
    pub fn are_plenty(&self) -> bool {
        let allowed = self.allowed.load(Ordering::Relaxed);
        self.taken.load(Ordering::Relaxed) <= allowed - allowed / 8
    }

    /// Inodes cannot give up what they have; asking them again and again would be of no use.
    pub fn allow_more(&self) {
        let taken = self.taken.load(Ordering::Relaxed);
        debug!("inodes need {taken} descriptors");
        self.allowed.fetch_max(taken.saturating_add(taken / 4), Ordering::Relaxed);
    }

    /// Descriptors that inodes have now.
    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    fn mount(&self, id: i32) -> Result<Arc<OwnedFd>> {
        let mounts = self.mounts.read().unwrap_or_else(PoisonError::into_inner);
        mounts.get(&id).cloned().ok_or(Errno::STALE)
    }

    /// Makes sure that there is a descriptor for a mount that `inode` is on. Only directories are
    /// opened for that.
    fn add_mount(&self, id: i32, inode: impl AsFd) -> Result<()> {
        if self.mount(id).is_ok() {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(inode, c".", flags, Mode::empty())?;
        self.mounts.write().unwrap_or_else(PoisonError::into_inner).entry(id).or_insert(Arc::new(directory));
        Ok(())
    }
}

/// What keeps hold of one inode.
#[derive(Debug)]
pub struct Pin {
    path: ArcSwapOption<Held>,
    /// Known once the inode has given up a descriptor for the first time.
    handle: OnceLock<FileHandle>,
    /// Used since it was last asked to give up its descriptor.
    used: AtomicBool,
    all: Arc<Descriptors>,
}

impl Pin {
    /// Keeps hold of the inode by its O_PATH descriptor.
    pub fn new(path: Held, all: Arc<Descriptors>) -> Pin {
        all.taken.fetch_add(1, Ordering::Relaxed);
        Pin {
            path: ArcSwapOption::from_pointee(path),
            handle: OnceLock::new(),
            used: AtomicBool::new(false),
            all,
        }
    }

    /// An O_PATH descriptor, which stays open for as long as the caller holds it; ESTALE if the
    /// inode had none and has been deleted on the host.
    pub fn path(&self) -> Result<Arc<Held>> {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        match self.path.load_full() {
            Some(path) => Ok(path),
            None => self.open_again(),
        }
    }

    fn open_again(&self) -> Result<Arc<Held>> {
        let handle = self.handle.get().ok_or(Errno::STALE)?;
        let slot = self.all.budget.take();
        let path = open_by_handle(self.all.mount(handle.mount())?.as_fd(), handle)?;
        // Where the guest holds all that it may hold, the inode is found again by each request.
        let Ok(slot) = slot else { return Ok(Arc::new(Held::for_a_request(path))) };
        let path = Arc::new(slot.hold(path));
        if self.path.swap(Some(Arc::clone(&path))).is_none() {
            self.all.taken.fetch_add(1, Ordering::Relaxed);
        }
        Ok(path)
    }

    /// Gives up the descriptor, unless the inode was used since it was last asked to.
    pub fn give_up(&self) {
        if self.used.swap(false, Ordering::Relaxed) {
            return;
        }
        let Some(path) = self.path.load_full() else { return };
        if self.handle.get().is_none() {
            let Ok(handle) = name_to_handle(path.as_fd()) else { return };
            if self.all.add_mount(handle.mount(), &*path).is_err() {
                return;
            }
            // Another thread may have been here first, with the same.
            let _ = self.handle.set(handle);
        }
        if self.path.swap(None).is_some() {
            self.all.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.path.load().is_some() {
            self.all.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::fs::passthrough::lookup;

    fn path_of(path: &std::path::Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(rustix::fs::CWD, path, flags, Mode::empty()).unwrap()
    }

    fn ino(pin: &Pin) -> Result<u64> {
        Ok(lookup::stat(pin.path()?)?.stx_ino)
    }

    /// One descriptor for inodes, before they have to give theirs up, out of `most`.
    fn one_of(root: &std::path::Path, most: usize) -> (Arc<Budget>, Arc<Descriptors>) {
        let budget = Arc::new(Budget::of(most));
        let all = Descriptors::with_limit(&path_of(root), &budget, 1).unwrap();
        (budget, Arc::new(all))
    }

    fn pin(path: &std::path::Path, budget: &Arc<Budget>, all: &Arc<Descriptors>) -> Pin {
        Pin::new(budget.take().unwrap().hold(path_of(path)), Arc::clone(all))
    }

    #[test]
    fn an_inode_is_found_again_when_nothing_more_may_be_held() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, all) = one_of(folder.path(), 1);
        let pin = pin(folder.path(), &budget, &all);
        let wanted = ino(&pin).unwrap();
        pin.give_up();
        pin.give_up();
        assert_eq!(budget.held(), 0);
        let slot = budget.take().unwrap();
        for _ in 0..3 {
            assert_eq!(ino(&pin).unwrap(), wanted);
            assert_eq!((all.taken(), budget.held()), (0, 1), "nothing was kept");
        }
        drop(slot);
        assert_eq!(ino(&pin).unwrap(), wanted);
        assert_eq!((all.taken(), budget.held()), (1, 1));
        drop(pin);
        assert_eq!((all.taken(), budget.held()), (0, 0));
    }

    #[test]
    fn an_inode_without_descriptor_is_found_again_under_any_name() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, all) = one_of(folder.path(), 10);
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        File::create(&file).unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [&file, &link] {
            let pin = pin(path, &budget, &all);
            let before = ino(&pin).unwrap();
            pin.give_up();
            assert_eq!(all.taken(), 1, "it was used just now");
            pin.give_up();
            assert_eq!(all.taken(), 0);
            let renamed = path.with_extension("renamed");
            fs::rename(path, &renamed).unwrap();
            assert_eq!(ino(&pin).unwrap(), before);
            assert_eq!(all.taken(), 1);
            // A descriptor in use survives.
            let held = pin.path().unwrap();
            pin.give_up();
            pin.give_up();
            assert_eq!(lookup::stat(&held).unwrap().stx_ino, before);
            drop(held);
            fs::remove_file(&renamed).unwrap();
            assert_eq!(ino(&pin).unwrap_err(), Errno::STALE);
            drop(pin);
            assert_eq!((all.taken(), budget.held()), (0, 0));
        }
    }

    #[test]
    fn threads_that_use_and_give_up_lose_nothing() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, all) = one_of(folder.path(), 10);
        let pin = pin(folder.path(), &budget, &all);
        let wanted = ino(&pin).unwrap();
        std::thread::scope(|scope| {
            for turn in 0..4 {
                let pin = &pin;
                scope.spawn(move || {
                    for _ in 0..5000 {
                        match turn {
                            0 | 1 => pin.give_up(),
                            _ => assert_eq!(ino(pin).unwrap(), wanted),
                        }
                    }
                });
            }
        });
        pin.path().unwrap();
        assert_eq!(all.taken(), 1);
        drop(pin);
        assert_eq!(all.taken(), 0);
    }
}
