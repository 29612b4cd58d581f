//! What is in memory and in the state file before anything is looked for.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode as FileMode, OFlags, openat};
use rustix::io::Errno;
use tempfile::TempDir;

use super::load::load;
use crate::fs::FileSystem;
use crate::fs::passthrough::PassthroughFs;
use crate::fs::passthrough::config::{FsConfig, InodeFileHandles};
use crate::limits::{FdQuota, Limits};
use crate::migration::config::{MigrationConfig, OnError};
use crate::migration::{Identity, Inode, Location, Session, Snapshot};
use crate::state_file::{Effects, StateFile};
use crate::sys::inherited::copy;
use fuse_protocol::ids::NodeId;

/// A directory with so many files, and a snapshot in which the guest knows all of them by names.
fn many(count: u64) -> (TempDir, Snapshot) {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let child = |number: u64| Inode {
        node: number,
        lookups: number,
        location: Location::Child { parent: 1, name: format!("file{number}").into_bytes() },
        identity: None,
        handle: None,
    };
    let root = Inode { node: 1, lookups: 1, location: Location::Root, identity: None, handle: None };
    let inodes = std::iter::once(root).chain((2..2 + count).map(child)).collect();
    let session = Some(Session { minor: Some(45), flags: Some(0), ..Session::default() });
    (folder, Snapshot { session, inodes, ..Snapshot::default() })
}

fn config(on_error: OnError) -> FsConfig {
    let migration = MigrationConfig { on_error, ..MigrationConfig::default() };
    FsConfig { inode_file_handles: InodeFileHandles::Never, migration, ..FsConfig::default() }
}

fn open(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, FileMode::empty()).unwrap()
}

fn share(folder: &Path, limits: &Limits, state: &Arc<StateFile>) -> PassthroughFs {
    share_with(OnError::GuestError, folder, limits, state)
}

fn share_with(on_error: OnError, folder: &Path, limits: &Limits, state: &Arc<StateFile>) -> PassthroughFs {
    let proc = open(Path::new("/proc/self/fd"));
    PassthroughFs::new(open(folder), proc, limits.clone(), config(on_error), state).unwrap()
}

/// The share as a later process finds it in the state file. The one before has died with its descriptors open.
fn after_a_death(before: PassthroughFs, limits: &Limits, state: &Arc<StateFile>) -> PassthroughFs {
    std::mem::forget(before);
    let state = StateFile::open(copy_of(state)).unwrap();
    let (proc, fdinfo) = (open(Path::new("/proc/self/fd")), open(Path::new("/proc/self/fdinfo")));
    let config = config(OnError::GuestError);
    let fs = PassthroughFs::restore(proc, &fdinfo, limits.clone(), config, &state).unwrap();
    fs.background().begin();
    fs
}

fn copy_of(state: &StateFile) -> OwnedFd {
    use std::os::fd::AsRawFd as _;
    copy(state.file().as_fd().as_raw_fd()).unwrap()
}

#[test]
fn a_hundred_thousand_inodes_are_loaded_without_opening_one() {
    let (folder, snapshot) = many(100_000);
    let limits = Limits::new(FdQuota::new(20, 0));
    let state = StateFile::create_shared().unwrap();
    let fs = share(folder.path(), &limits, &state);
    let before = limits.fds.in_use();
    load(&fs, snapshot).unwrap();
    assert_eq!((limits.fds.in_use(), fs.inodes.unresolved_len()), (before, 100_000));
    assert!(fs.agreement.is_active());
    // One is used, and it alone is opened.
    fs::write(folder.path().join("file500"), "").unwrap();
    fs.inodes.get(NodeId(500)).unwrap();
    assert_eq!((limits.fds.in_use(), fs.inodes.unresolved_len()), (before + 1, 99_999));
    assert_eq!(fs.inodes.get(NodeId(501)).unwrap_err(), Errno::STALE);
    fs.inodes.forget(Effects::NONE, NodeId(500), 500);
    assert_eq!(limits.fds.in_use(), before);
    // A session that ends leaves nothing.
    fs.destroy();
    assert_eq!((limits.fds.in_use(), fs.inodes.unresolved_len()), (before, 0));
    assert!(state.unresolved().is_empty());
}

#[test]
fn lookups_of_inodes_that_were_not_found_yet_are_forgotten_one_by_one() {
    let (folder, snapshot) = many(10);
    let limits = Limits::new(FdQuota::new(20, 0));
    let fs = share(folder.path(), &limits, &StateFile::create_shared().unwrap());
    load(&fs, snapshot).unwrap();
    fs.inodes.forget(Effects::NONE, NodeId(9), 4);
    assert_eq!(fs.inodes.unresolved().iter().find(|inode| inode.node == 9).unwrap().lookups, 5);
    fs.inodes.forget(Effects::NONE, NodeId(9), 5);
    assert_eq!(fs.inodes.unresolved_len(), 9);
    fs::write(folder.path().join("file9"), "").unwrap();
    assert_eq!(fs.inodes.get(NodeId(9)).unwrap_err(), Errno::STALE);
    for node in 2..12 {
        fs.inodes.forget(Effects::NONE, NodeId(node), 100);
    }
    assert_eq!(fs.inodes.unresolved_len(), 0);
    assert!(!fs.inodes.has_unresolved());
}

#[test]
fn what_was_not_found_yet_is_there_for_the_next_process() {
    let (folder, mut snapshot) = many(2000);
    // A directory that only others need, and one of these.
    let location = Location::Child { parent: 1, name: b"directory".to_vec() };
    let node = 5000;
    snapshot.inodes.push(Inode { node, lookups: 0, location, identity: None, handle: None });
    let location = Location::Child { parent: node, name: b"inner".to_vec() };
    snapshot.inodes.push(Inode { node: 5001, lookups: 7, location, identity: None, handle: None });
    for number in 2..2002 {
        fs::write(folder.path().join(format!("file{number}")), "").unwrap();
    }
    fs::create_dir(folder.path().join("directory")).unwrap();
    fs::write(folder.path().join("directory/inner"), "").unwrap();
    let limits = Limits::new(FdQuota::new(4000, 0));
    let state = StateFile::create_shared().unwrap();
    let first = share(folder.path(), &limits, &state);
    load(&first, snapshot).unwrap();
    // Some are found, some forgotten.
    for node in 2..200 {
        first.inodes.get(NodeId(node)).unwrap();
    }
    for node in 100..300 {
        first.inodes.forget(Effects::NONE, NodeId(node), node);
    }
    first.inodes.forget(Effects::NONE, NodeId(5001), 2);
    let second = after_a_death(first, &limits, &state);
    assert!(second.agreement.is_active());
    let still = second.inodes.unresolved();
    assert!(still.iter().all(|inode| inode.node >= 100), "those were found before the death");
    for node in (2..100).chain(300..2002).chain([5001]) {
        let inode = second.inodes.get(NodeId(node)).unwrap();
        let lookups = if node == 5001 { 5 } else { node };
        assert_eq!(second.inodes.lookups_of(&inode), lookups, "{node}");
    }
    for node in (100..300).chain([5000]) {
        assert_eq!(second.inodes.get(NodeId(node)).unwrap_err(), Errno::STALE);
    }
    // The thread in the background may have entered the last one, and not counted it yet.
    let end = Instant::now() + Duration::from_secs(10);
    while second.inodes.has_unresolved() || !second.inodes.state().unresolved().is_empty() {
        assert!(Instant::now() < end, "{} are left", second.inodes.unresolved_len());
        std::thread::yield_now();
    }
    // A third one has nothing to look for.
    let third = after_a_death(second, &limits, &state);
    assert!(!third.inodes.has_unresolved());
    third.inodes.make_rest();
    assert_eq!(third.inodes.len(), 98 + 1702 + 1);
    assert!(third.inodes.state().next_node().load(std::sync::atomic::Ordering::Relaxed) > 5001);
}

#[test]
fn a_directory_that_is_forgotten_first_still_leads_to_what_is_in_it() {
    let (folder, mut snapshot) = many(0);
    let path = folder.path().join("a/b/c");
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("file"), "").unwrap();
    for (node, name) in [(2, "a"), (3, "b"), (4, "c"), (5, "file")] {
        let location = Location::Child { parent: node - 1, name: name.as_bytes().to_vec() };
        snapshot.inodes.push(Inode { node, lookups: 1, location, identity: None, handle: None });
    }
    let limits = Limits::new(FdQuota::new(20, 0));
    let fs = share(folder.path(), &limits, &StateFile::create_shared().unwrap());
    let before = limits.fds.in_use();
    load(&fs, snapshot).unwrap();
    fs.inodes.get(NodeId(4)).unwrap();
    for node in 2..5 {
        fs.inodes.forget(Effects::NONE, NodeId(node), 1);
    }
    fs.inodes.get(NodeId(5)).unwrap();
    assert_eq!(limits.fds.in_use(), before + 1);
}

#[test]
fn all_that_an_inode_may_be_is_checked_before_it_is_taken() {
    let (folder, mut snapshot) = many(2);
    for name in ["file2", "file3"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    // The numbers of another file system mean nothing, the type does.
    let foreign = |kind| Some(Identity { kind, ino: 1, born: Some(5) });
    for inode in &mut snapshot.inodes {
        inode.identity = foreign(if inode.node == 3 || inode.node == 1 { 4 } else { 8 });
    }
    let limits = Limits::new(FdQuota::new(20, 0));
    let fs = share(folder.path(), &limits, &StateFile::create_shared().unwrap());
    load(&fs, snapshot).unwrap();
    fs.inodes.get(NodeId(2)).unwrap();
    assert_eq!(fs.inodes.get(NodeId(3)).unwrap_err(), Errno::STALE, "it was a directory");
}

/// With `--migration-on-error=abort` all have to be there, and none is opened for that.
#[test]
fn inodes_that_are_listed_are_there() {
    use crate::fs::passthrough::inode::identity;

    let (folder, mut snapshot) = many(500);
    let path = |node: u64| folder.path().join(format!("file{node}"));
    for node in 2..502 {
        fs::write(path(node), "").unwrap();
    }
    for inode in &mut snapshot.inodes {
        let path = if inode.node == 1 { folder.path().to_owned() } else { path(inode.node) };
        inode.identity = Some(identity(&crate::fs::passthrough::host::stat(open_path(&path)).unwrap()));
    }
    let load_again = || {
        let (limits, state) = (Limits::new(FdQuota::new(40, 0)), StateFile::create_shared().unwrap());
        let fs = share_with(OnError::Abort, folder.path(), &limits, &state);
        let before = limits.fds.in_use();
        let loaded = load(&fs, snapshot.clone());
        let (opened, left) = (limits.fds.in_use() - before, fs.inodes.unresolved_len());
        if loaded.is_ok() {
            assert_eq!(fs.inodes.get(NodeId(300)).unwrap().node(), NodeId(300));
        }
        fs.destroy();
        loaded.map(|()| (opened, left)).map_err(|error| error.to_string())
    };
    assert_eq!(load_again(), Ok((0, 500)));
    // A file that is not there, another one in its place, and one of another type.
    fs::rename(path(77), path(1077)).unwrap();
    assert!(load_again().unwrap_err().contains("file77"));
    fs::write(path(77), "").unwrap();
    assert!(load_again().unwrap_err().contains("file77"));
    fs::remove_file(path(77)).unwrap();
    fs::create_dir(path(77)).unwrap();
    assert!(load_again().unwrap_err().contains("file77"));
    fs::remove_dir(path(77)).unwrap();
    fs::rename(path(1077), path(77)).unwrap();
    assert_eq!(load_again(), Ok((0, 500)));
    // Where the guest knows little of a large directory.
    snapshot.inodes.truncate(6);
    let load_few = |missing: u64| {
        let (limits, state) = (Limits::new(FdQuota::new(40, 0)), StateFile::create_shared().unwrap());
        let fs = share_with(OnError::Abort, folder.path(), &limits, &state);
        fs::rename(path(missing), path(2000)).unwrap();
        let loaded = load(&fs, snapshot.clone()).map_err(|error| error.to_string());
        fs::rename(path(2000), path(missing)).unwrap();
        fs.destroy();
        loaded
    };
    for number in 3000..8000 {
        fs::write(path(number), "").unwrap();
    }
    assert_eq!(load_few(9), Ok(()));
    assert!((2..7).all(|node| load_few(node).unwrap_err().contains(&format!("file{node}"))));
}

fn open_path(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, FileMode::empty()).unwrap()
}
