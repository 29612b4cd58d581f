//! What keeps hold of inodes on the host: an O_PATH descriptor each or, while an inode is seldom
//! used and descriptors are scarce, its file handle.
//!
//! An inode begins with a descriptor, which is the cheapest to use. When more than half of the
//! descriptors that the process may have are taken by inodes, those that were not used lately give
//! theirs up (CLOCK, also called second chance). The next use opens the inode again by its handle, as
//! the same inode or not at all.
//!
//! Only a descriptor keeps the host from using an inode's number again. Without one, an inode is known
//! by its handle alone, which has a generation in it: see [`Pin::is`].

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use arc_swap::{ArcSwapOption, Guard};
use log::{debug, info};
use rustix::fs::FileType;
use rustix::io::Errno;

use super::budget::{Budget, Held};
use super::mounts::{self, Mount};
use super::shards::{Apart, Shards};
use crate::fs::Result;
use crate::sys::file_handles::{FileHandle, name_to_handle, open_by_handle};
use fuse_protocol::ids::NodeId;

/// The clock holds numbers of inodes that were forgotten, until it has grown to this or to twice what
/// it last had.
const SMALLEST_CLOCK: usize = 64;

/// The descriptors of all inodes together, and the mounts that these are on.
#[derive(Debug)]
pub struct Descriptors {
    /// Set while inodes should give up descriptors. Each request looks at it; it stands apart from what
    /// each new inode changes.
    scarce: Apart<AtomicBool>,
    /// How many inodes may have one, before some give theirs up.
    allowed: AtomicUsize,
    /// Whether there are handles at all.
    limited: bool,
    /// Inodes that have a descriptor and could do without.
    taken: Apart<AtomicUsize>,
    /// These inodes, in the order in which they are to be asked for it.
    clock: Shards<Mutex<Clock>>,
    mounts: Apart<RwLock<HashMap<u32, Weak<Mount>>>>,
    told_of_mount: AtomicBool,
    /// What inodes share with whatever else the guest holds.
    budget: Arc<Budget>,
}

/// A part of the clock.
#[derive(Debug, Default)]
pub struct Clock {
    nodes: VecDeque<NodeId>,
    /// It is cleared of forgotten inodes at this length.
    clear_at: usize,
}

impl Clock {
    /// The inode that is next to be asked.
    pub fn next(&mut self) -> Option<NodeId> {
        self.nodes.pop_front()
    }

    /// Puts an inode at the end. Without memory for that it keeps its descriptor.
    pub fn push(&mut self, node: NodeId) {
        if self.nodes.try_reserve(1).is_ok() {
            self.nodes.push_back(node);
        }
    }

    /// Takes out what is not `known`, if there may be much of that.
    pub fn clear_of_forgotten(&mut self, known: impl Fn(NodeId) -> bool) {
        if self.nodes.len() >= self.clear_at.max(SMALLEST_CLOCK) {
            self.nodes.retain(|node| known(*node));
            self.clear_at = self.nodes.len().saturating_mul(2);
        }
    }

    /// Takes out everything.
    pub fn clear(&mut self) {
        *self = Clock::default();
    }
}

impl Descriptors {
    /// No limit but the budget's: each inode keeps its descriptor.
    pub fn unlimited(budget: &Arc<Budget>) -> Descriptors {
        Descriptors::of(budget, usize::MAX)
    }

    /// Half of the budget, if inodes can be opened by handle at the share's `root`.
    ///
    /// EPERM without CAP_DAC_READ_SEARCH, EOPNOTSUPP where the file system has no handles that last.
    pub fn limited(root: &OwnedFd, budget: &Arc<Budget>) -> Result<Descriptors> {
        mounts::try_handles(root)?;
        Ok(Descriptors::of(budget, half_of(budget)))
    }

    fn of(budget: &Arc<Budget>, allowed: usize) -> Descriptors {
        Descriptors {
            scarce: Apart::default(),
            allowed: AtomicUsize::new(allowed),
            limited: allowed != usize::MAX,
            taken: Apart::default(),
            clock: Shards::default(),
            mounts: Apart::default(),
            told_of_mount: AtomicBool::new(false),
            budget: Arc::clone(budget),
        }
    }

    /// Whether inodes may have to give up descriptors.
    pub fn are_limited(&self) -> bool {
        self.limited
    }

    /// Whether inodes should give up descriptors.
    pub fn are_scarce(&self) -> bool {
        self.scarce.load(Ordering::Relaxed)
    }

    /// The budget has become another one: inodes may have half of it.
    pub fn share_budget(&self) {
        if self.limited {
            self.allowed.store(half_of(&self.budget), Ordering::Relaxed);
            let taken = self.taken.load(Ordering::Relaxed);
            self.scarce.store(taken > half_of(&self.budget), Ordering::Relaxed);
        }
    }

    /// What the guest's descriptors are counted by.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The part of the clock that `number` belongs to.
    pub fn clock(&self, number: u64) -> MutexGuard<'_, Clock> {
        self.clock.of(number).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inodes cannot give up what they have; asking them again and again would be of no use.
    pub fn allow_more(&self) {
        let taken = self.taken.load(Ordering::Relaxed);
        debug!("inodes need {taken} descriptors");
        self.allowed.fetch_max(taken.saturating_add(taken / 4), Ordering::Relaxed);
        self.look_whether_plenty(taken);
    }

    /// The process has none left, though inodes may have more: they keep three quarters of what they have.
    pub fn allow_less(&self) {
        let taken = self.taken.load(Ordering::Relaxed);
        self.allowed.fetch_min((taken - taken / 4).max(1), Ordering::Relaxed);
        self.scarce.store(true, Ordering::Relaxed);
    }

    /// Descriptors that inodes have now and could do without.
    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    fn take_one(&self) {
        if self.taken.fetch_add(1, Ordering::Relaxed) >= self.allowed.load(Ordering::Relaxed) {
            self.scarce.store(true, Ordering::Relaxed);
        }
    }

    fn free_one(&self) {
        let before = self.taken.fetch_sub(1, Ordering::Relaxed);
        if self.are_scarce() {
            self.look_whether_plenty(before.saturating_sub(1));
        }
    }

    /// So many are free that it will be a while until the next time.
    fn look_whether_plenty(&self, taken: usize) {
        let allowed = self.allowed.load(Ordering::Relaxed);
        if taken <= allowed - allowed / 8 {
            self.scarce.store(false, Ordering::Relaxed);
        }
    }

    /// Says once that there is a mount where inodes keep their descriptors.
    pub fn tell_of_mount(&self, errno: Errno) {
        if !self.told_of_mount.swap(true, Ordering::Relaxed) {
            info!(
                "a file system below the share has no file handles that last ({errno}): each of its inodes that the guest knows takes a descriptor (see --rlimit-nofile)"
            );
        }
    }

    /// A mount that the guest knows inodes on.
    pub fn known_mount(&self, id: u32) -> Option<Arc<Mount>> {
        self.mounts.read().unwrap_or_else(PoisonError::into_inner).get(&id).and_then(Weak::upgrade)
    }

    /// All of these.
    pub fn known_mounts(&self) -> Vec<Arc<Mount>> {
        let mounts = self.mounts.read().unwrap_or_else(PoisonError::into_inner);
        mounts.values().filter_map(Weak::upgrade).collect()
    }

    /// The mount `id`, which `inode` is on.
    pub fn mount(self: &Arc<Self>, id: u32, inode: impl AsFd, kind: FileType) -> Result<Arc<Mount>> {
        if let Some(mount) = self.known_mount(id) {
            return Ok(mount);
        }
        // Made before the lock is taken, and dropped after it: both make system calls.
        let new = Arc::new(Mount::new(id, inode, kind, self));
        let mut mounts = self.mounts.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = mounts.get(&id).and_then(Weak::upgrade) {
            return Ok(mount);
        }
        mounts.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        mounts.insert(id, Arc::downgrade(&new));
        Ok(new)
    }

    /// A mount has no inodes any more. Meanwhile the id may stand for a new one.
    pub fn forget_mount(&self, id: u32) {
        let mut mounts = self.mounts.write().unwrap_or_else(PoisonError::into_inner);
        if mounts.get(&id).is_some_and(|mount| mount.strong_count() == 0) {
            mounts.remove(&id);
        }
    }
}

fn half_of(budget: &Budget) -> usize {
    (budget.most() / 2).max(1)
}

/// The descriptor of an inode, which stays open for as long as this lives.
///
/// It is borrowed from the inode, not counted: that takes no atomic change of a line that all workers share.
#[derive(Debug)]
pub struct PathGuard(Guard<Option<Arc<Held>>>);

impl PathGuard {
    fn of(path: Arc<Held>) -> PathGuard {
        PathGuard(Guard::from_inner(Some(path)))
    }
}

impl Deref for PathGuard {
    type Target = Held;

    #[allow(clippy::expect_used, reason = "a guard is made of a descriptor only")]
    fn deref(&self) -> &Held {
        self.0.as_ref().expect("a guard has a descriptor")
    }
}

impl AsFd for PathGuard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
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
    mount: Arc<Mount>,
}

impl Pin {
    /// Keeps hold of the inode by its O_PATH descriptor.
    pub fn new(path: Held, mount: Arc<Mount>) -> Pin {
        if mount.directory().is_some() {
            mount.all.take_one();
        }
        Pin {
            path: ArcSwapOption::from_pointee(path),
            handle: OnceLock::new(),
            used: AtomicBool::new(false),
            mount,
        }
    }

    /// The mount that the inode is on.
    pub fn mount(&self) -> &Arc<Mount> {
        &self.mount
    }

    /// An O_PATH descriptor, which stays open for as long as the caller holds it; ESTALE if the
    /// inode had none and has been deleted on the host. `node` is the inode's.
    pub fn path(&self, node: NodeId) -> Result<PathGuard> {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        let path = self.path.load();
        if path.is_some() { Ok(PathGuard(path)) } else { self.open_again(node) }
    }

    #[cold]
    fn open_again(&self, node: NodeId) -> Result<PathGuard> {
        let (handle, directory) = self.handle.get().zip(self.mount.directory()).ok_or(Errno::STALE)?;
        let slot = self.mount.all.budget.take();
        let path = open_by_handle(directory.as_fd(), handle)?;
        // Where the guest holds all that it may hold, the inode is found again by each request.
        let Ok(slot) = slot else { return Ok(PathGuard::of(Arc::new(Held::for_a_request(path)))) };
        let path = Arc::new(slot.hold(path));
        if self.path.swap(Some(Arc::clone(&path))).is_none() {
            self.mount.all.take_one();
            self.enter_clock(node);
        }
        Ok(PathGuard::of(path))
    }

    /// From now on the inode is asked now and then to give up its descriptor.
    pub fn enter_clock(&self, node: NodeId) {
        if self.mount.directory().is_some() {
            self.mount.all.clock(node.0).push(node);
        }
    }

    /// Whether its next use has to open it.
    pub fn lacks_descriptor(&self) -> bool {
        self.handle.get().is_some() && self.path.load().is_none()
    }

    /// Whether the inode is the one that was just met under its number; `handle` is that one's, if it is
    /// known. `None` if only the handle can tell.
    ///
    /// While the inode has a descriptor its number is not used again, so they are the same.
    pub fn is(&self, handle: Option<&FileHandle>) -> Option<bool> {
        // The handle was set before a descriptor was given up for the first time. To look at it costs less than to
        // look at the descriptor, which takes two atomic changes.
        if self.handle.get().is_none() || self.path.load().is_some() {
            return Some(true);
        }
        handle.map(|handle| self.handle.get() == Some(handle))
    }

    /// Remembers the inode's handle, which somebody had to ask for.
    pub fn set_handle(&self, handle: FileHandle) {
        // If it is known already, it is the same.
        let _ = self.handle.set(handle);
    }

    /// Whether the inode was used since this was last asked.
    pub fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Gives up the descriptor; false if the inode has to keep it.
    pub fn give_up(&self) -> bool {
        let Some(path) = self.path.load_full() else { return true };
        if self.mount.directory().is_none() {
            return false;
        }
        if self.handle.get().is_none() {
            let Ok(handle) = name_to_handle(path.as_fd()) else { return false };
            self.set_handle(handle);
        }
        if self.path.swap(None).is_some() {
            self.mount.all.free_one();
        }
        true
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.mount.directory().is_some() && self.path.load().is_some() {
            self.mount.all.free_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use rustix::fs::{Mode, OFlags, openat};

    use super::*;
    use crate::fs::passthrough::lookup;

    fn path_of(path: &std::path::Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(rustix::fs::CWD, path, flags, Mode::empty()).unwrap()
    }

    fn ino(pin: &Pin) -> Result<u64> {
        Ok(lookup::stat(pin.path(NodeId(2))?)?.stx_ino)
    }

    /// One descriptor for inodes, before they have to give theirs up, out of `most`.
    fn one_of(root: &std::path::Path, most: usize) -> (Arc<Budget>, Arc<Mount>) {
        // One is for the mount.
        let budget = Arc::new(Budget::of(most + 1, 0));
        mounts::try_handles(path_of(root)).unwrap();
        let all = Arc::new(Descriptors::of(&budget, 1));
        let mount = all.mount(1, path_of(root), FileType::Directory).unwrap();
        (budget, mount)
    }

    fn pin(path: &std::path::Path, budget: &Arc<Budget>, mount: &Arc<Mount>) -> Pin {
        Pin::new(budget.take().unwrap().hold(path_of(path)), Arc::clone(mount))
    }

    /// Asked as the clock asks.
    fn ask(pin: &Pin) {
        if !pin.was_used() {
            assert!(pin.give_up());
        }
    }

    #[test]
    fn an_inode_is_found_again_when_nothing_more_may_be_held() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, mount) = one_of(folder.path(), 1);
        let pin = pin(folder.path(), &budget, &mount);
        let wanted = ino(&pin).unwrap();
        ask(&pin);
        ask(&pin);
        assert_eq!(budget.held() - 1, 0);
        let slot = budget.take().unwrap();
        for _ in 0..3 {
            assert_eq!(ino(&pin).unwrap(), wanted);
            assert_eq!((mount.all.taken(), budget.held() - 1), (0, 1), "nothing was kept");
        }
        drop(slot);
        assert_eq!(ino(&pin).unwrap(), wanted);
        assert_eq!((mount.all.taken(), budget.held() - 1), (1, 1));
        drop(pin);
        assert_eq!((mount.all.taken(), budget.held() - 1), (0, 0));
    }

    #[test]
    fn an_inode_without_descriptor_is_found_again_under_any_name() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, mount) = one_of(folder.path(), 10);
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        File::create(&file).unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [&file, &link] {
            let pin = pin(path, &budget, &mount);
            let before = ino(&pin).unwrap();
            ask(&pin);
            assert_eq!(mount.all.taken(), 1, "it was used just now");
            ask(&pin);
            assert_eq!(mount.all.taken(), 0);
            let renamed = path.with_extension("renamed");
            fs::rename(path, &renamed).unwrap();
            assert_eq!(ino(&pin).unwrap(), before);
            assert_eq!(mount.all.taken(), 1);
            // A descriptor in use survives.
            let held = pin.path(NodeId(2)).unwrap();
            ask(&pin);
            ask(&pin);
            assert_eq!(lookup::stat(&held).unwrap().stx_ino, before);
            drop(held);
            fs::remove_file(&renamed).unwrap();
            assert_eq!(ino(&pin).unwrap_err(), Errno::STALE);
            drop(pin);
            assert_eq!((mount.all.taken(), budget.held() - 1), (0, 0));
        }
    }

    #[test]
    fn threads_that_use_and_give_up_lose_nothing() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (budget, mount) = one_of(folder.path(), 10);
        let pin = pin(folder.path(), &budget, &mount);
        let wanted = ino(&pin).unwrap();
        std::thread::scope(|scope| {
            for turn in 0..4 {
                let pin = &pin;
                scope.spawn(move || {
                    for _ in 0..5000 {
                        match turn {
                            0 | 1 => ask(pin),
                            _ => assert_eq!(ino(pin).unwrap(), wanted),
                        }
                    }
                });
            }
        });
        pin.path(NodeId(2)).unwrap();
        assert_eq!(mount.all.taken(), 1);
        drop(pin);
        assert_eq!(mount.all.taken(), 0);
    }
}
