//! The table of inodes as an earlier process has left it in the state file.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::fd_cache::FdCache;
use super::inode_fd::InodeFd;
use super::records::{Record, Records};
use super::shards::BuildIdHasher;
use super::stored::Set;
use super::{Inode, InodeKey, InodeTable, Mount};
use crate::fs::Result;
use crate::state_file::InodeEntry;
use crate::sys::inherited::copy;
use fuse_protocol::ids::NodeId;

/// The type of a directory, as the upper bits of a mode.
const DIRECTORY: u8 = 4;
/// Inodes for which another thread pays.
const PER_THREAD: usize = 4096;
const MAX_THREADS: usize = 8;

/// The descriptor that a record has, which is nobody else's.
#[allow(unsafe_code, reason = "a record names a descriptor by its number")]
pub fn adopt_descriptor(number: RawFd) -> OwnedFd {
    // SAFETY: records name descriptors that are open, each once, and the process that had them has died; close(2) of a
    // number that is none would answer EBADF.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// A copy of the root's descriptor; ESTALE if the state file has no root.
pub fn root_descriptor(records: &Records) -> Result<OwnedFd> {
    let mut roots = records.inodes().used().filter_map(|record| records.inode(record).load());
    let root = roots.find(|entry| entry.node == NodeId::ROOT.0).and_then(|entry| entry.descriptor);
    copy(root.ok_or(Errno::STALE)?)
}

impl InodeTable {
    /// All inodes that the records of `fd_cache` have, and apart from them those that the guest has forgotten and may have
    /// open: the last to be dropped. ESTALE if the root is not among them.
    ///
    /// The guest waits for it: of most inodes it only notes where they are ([`super::stored`]).
    pub fn restore(fd_cache: FdCache) -> Result<(InodeTable, Vec<Arc<Inode>>)> {
        let fd_cache = Arc::new(fd_cache);
        let mut found = Found::default();
        let set = found.look_at_all(&fd_cache);
        let root = match (found.failed, &found.root) {
            (None, Some(root)) => Arc::clone(root),
            (failed, _) => {
                // It is all there still, for the next process: to drop it would close what the guest has.
                std::mem::forget((found, set, fd_cache));
                return Err(failed.unwrap_or(Errno::STALE));
            }
        };
        fd_cache.quota().count(found.counted);
        let Found { made, forgotten, unresolved, mut tops, .. } = found;
        let table = InodeTable::with_root(root, fd_cache);
        for inode in made {
            table.insert_restored(Arc::clone(&inode), &mut table.unmade_key_shard(&inode.key));
        }
        table.stored.begin(set);
        tops.insert(table.root.mount().id(), NodeId::ROOT.0);
        for top in tops.into_values().filter_map(|node| table.restored(NodeId(node))) {
            top.mount().add_top(&top);
        }
        table.restore_unresolved(&unresolved);
        Ok((table, forgotten))
    }

    /// An inode that is there, also if it cannot be opened.
    pub fn restored(&self, node: NodeId) -> Option<Arc<Inode>> {
        if node == NodeId::ROOT { Some(Arc::clone(self.root())) } else { self.known(node) }
    }
}

/// How many threads work on so many inodes: one for each CPU, and no more than pay.
pub fn threads_for(inodes: usize) -> usize {
    let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |cpus| cpus.count());
    usize::try_from(cpus).unwrap_or(1).min(inodes / PER_THREAD).clamp(1, MAX_THREADS)
}

/// Does each of `count` parts of some work on a thread of its own, or on this one where there is no other.
pub fn on_threads<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let part = |number| (number, thread::Builder::new().spawn_scoped(scope, move || work(number)));
        let others: Vec<_> = (1..count).map(part).collect();
        let mut done = vec![work(0)];
        for (number, thread) in others {
            done.push(match thread.map(thread::ScopedJoinHandle::join) {
                Ok(result) => result.unwrap_or_else(|failure| resume_unwind(failure)),
                Err(_) => work(number),
            });
        }
        done
    })
}

/// What the records of inodes have.
#[derive(Default)]
struct Found {
    root: Option<Arc<Inode>>,
    /// Inodes of mounts without a record.
    made: Vec<Arc<Inode>>,
    forgotten: Vec<Arc<Inode>>,
    /// Came with a migration, and not found yet.
    unresolved: Vec<Record>,
    /// The uppermost directory of each mount: it was looked up before what is in it.
    tops: HashMap<u32, u64, BuildIdHasher>,
    /// Descriptors of the inodes that are not made yet.
    counted: usize,
    /// Not all could be made.
    failed: Option<Errno>,
}

impl Found {
    /// Looks at each record once. Inodes that can wait are in the set, and all others are made.
    fn look_at_all(&mut self, fd_cache: &Arc<FdCache>) -> Set {
        let records = fd_cache.shared_records();
        let mounts = restore_mounts(fd_cache);
        let all = records.inodes();
        let mut set = Set::with_room(all.used_len(), all.end(), mounts.clone());
        // Nearly all are on the mount of the one before.
        let mut last = None;
        for record in all.used() {
            let Some(entry) = records.inode(record).load() else { continue };
            let is_found = entry.descriptor.is_some() || records.inode(record).has_handle();
            if !is_found && entry.mount == 0 && entry.lookups > 0 {
                self.unresolved.push(record);
                continue;
            }
            if entry.kind == DIRECTORY && entry.lookups > 0 {
                let top = self.tops.entry(entry.mount).or_insert(entry.node);
                *top = entry.node.min(*top);
            }
            if last.is_none_or(|(id, _)| id != entry.mount) {
                last = Some((entry.mount, mounts.get(&entry.mount)));
            }
            let mount = last.and_then(|(_, mount)| mount);
            if mount.is_some() && entry.lookups > 0 && entry.node != NodeId::ROOT.0 {
                set.add(record, &entry);
                self.counted += usize::from(entry.descriptor.is_some());
            } else {
                self.make(record, &entry, mount, fd_cache);
            }
        }
        set.sorted()
    }

    fn make(
        &mut self,
        record: Record,
        entry: &InodeEntry,
        mount: Option<&Arc<Mount>>,
        fd_cache: &Arc<FdCache>,
    ) {
        match inode(record, entry, mount, fd_cache) {
            Ok(Some(inode)) if inode.node == NodeId::ROOT => self.root = Some(inode),
            Ok(Some(inode)) if entry.lookups == 0 => self.forgotten.push(inode),
            Ok(Some(inode)) => self.made.push(inode),
            Ok(None) => fd_cache.records().give_back(record),
            Err(errno) => self.failed = Some(errno),
        }
    }
}

/// The inode of a record; `None` if it cannot be reached any more, and an error if it can, but not now: then its
/// descriptor stays open.
fn inode(
    record: Record,
    entry: &InodeEntry,
    mount: Option<&Arc<Mount>>,
    fd_cache: &Arc<FdCache>,
) -> Result<Option<Arc<Inode>>> {
    let path = entry.descriptor.map(|number| fd_cache.quota().take().wrap(adopt_descriptor(number)));
    let kind = FileType::from_raw_mode(u32::from(entry.kind) << 12);
    let mount = match (mount, &path) {
        (Some(mount), _) => Arc::clone(mount),
        (None, None) => return Ok(None),
        // There was no record for it.
        (None, Some(fd)) => match fd_cache.mount(entry.mount, fd, kind) {
            Ok(mount) => mount,
            Err(errno) => {
                std::mem::forget(path);
                return Err(errno);
            }
        },
    };
    let fd = InodeFd::new(path, mount, record);
    Ok(Some(Arc::new(Inode::new(NodeId(entry.node), InodeKey::of_entry(entry), kind, fd))))
}

fn restore_mounts(fd_cache: &Arc<FdCache>) -> HashMap<u32, Arc<Mount>> {
    let records = fd_cache.records().mounts();
    let mut mounts = HashMap::new();
    for record in records.used() {
        let Some(entry) = records.get(record).load() else { continue };
        let directory = entry.descriptor.map(|number| fd_cache.quota().take().wrap(adopt_descriptor(number)));
        let mount = Mount::restored(&entry, directory, record, fd_cache);
        if let Ok(mount) = fd_cache.add_mount(mount) {
            mounts.insert(entry.id, mount);
        }
    }
    mounts
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;
    use crate::limits::FdQuota;
    use crate::state_file::{MountEntry, StateFile};

    const COUNT: u64 = 20_000;

    fn store(records: &Records, entry: &InodeEntry) {
        let record = records.inodes().take().unwrap();
        records.inode(record).store(entry, 0);
    }

    fn entry(node: u64) -> InodeEntry {
        let (mount, kind) = (7, 8);
        InodeEntry {
            node,
            lookups: node,
            ino: node * 3,
            device: 1,
            mount,
            generation: 0,
            kind,
            descriptor: None,
        }
    }

    #[test]
    fn all_inodes_are_there_again() {
        let state = StateFile::create_shared().unwrap();
        let records = Records::new(&state);
        let root = std::fs::File::open("/").unwrap().into_raw_fd();
        records.add_mount(&MountEntry { id: 7, descriptor: None, numbers_alias: false, is_of_a_file: false });
        store(&records, &InodeEntry { kind: 4, descriptor: Some(root), ..entry(1) });
        (2..COUNT).for_each(|node| store(&records, &entry(node)));
        // Two that had one number, the newer one first; and one that is forgotten and open.
        store(&records, &InodeEntry { ino: 5, ..entry(COUNT + 1) });
        store(&records, &InodeEntry { ino: 5, ..entry(COUNT) });
        store(&records, &InodeEntry { lookups: 0, ..entry(COUNT + 2) });

        let quota = Arc::new(FdQuota::new(1000, 0));
        let cache = FdCache::unlimited(&quota, &Records::new(&state));
        let (table, forgotten) = InodeTable::restore(cache).unwrap();
        assert_eq!((table.len(), table.root().mount().id()), (0, 7), "none is made before it is used");
        table.make_rest();
        assert_eq!(u64::try_from(table.len()).unwrap(), COUNT);
        assert_eq!((quota.in_use(), table.root().node), (1, NodeId::ROOT));
        for node in 2..COUNT {
            let inode = table.restored(NodeId(node)).unwrap();
            assert_eq!((inode.key.ino, inode.kind, inode.mount().id()), (node * 3, FileType::RegularFile, 7));
            assert_eq!(table.key_shard(&inode.key).get(&inode.key).unwrap().0.node, inode.node);
        }
        let newer = table.restored(NodeId(COUNT + 1)).unwrap();
        assert_eq!(table.key_shard(&newer.key).get(&newer.key).unwrap().0.node, newer.node);
        assert_eq!(forgotten.iter().map(|inode| inode.node.0).collect::<Vec<_>>(), [COUNT + 2]);
        assert!(table.restored(NodeId(COUNT + 2)).is_none());
        drop(forgotten);
        assert_eq!(u64::try_from(records.inodes().used().count()).unwrap(), COUNT + 1, "its record is free");
    }

    #[test]
    fn without_a_root_there_is_no_table() {
        let records = Records::new(&StateFile::create_shared().unwrap());
        let cache = FdCache::unlimited(&Arc::new(FdQuota::new(1000, 0)), &records);
        assert_eq!(InodeTable::restore(cache).unwrap_err(), Errno::STALE);
        assert_eq!(root_descriptor(&records).unwrap_err(), Errno::STALE);
    }

    /// The next process may have more luck.
    #[test]
    fn what_was_made_before_an_error_stays_open() {
        use crate::sys::inherited::identity;

        let records = Records::new(&StateFile::create_shared().unwrap());
        let open = || tempfile::tempfile().unwrap().into_raw_fd();
        let (known, forgotten, directory) = (open(), open(), open());
        let mount =
            MountEntry { id: 7, descriptor: Some(directory), numbers_alias: false, is_of_a_file: false };
        records.add_mount(&mount);
        store(&records, &InodeEntry { descriptor: Some(known), ..entry(2) });
        store(&records, &InodeEntry { descriptor: Some(forgotten), lookups: 0, ..entry(3) });
        let before = [known, forgotten, directory].map(identity);
        for _ in 0..2 {
            let cache = FdCache::unlimited(&Arc::new(FdQuota::new(1000, 0)), &records);
            assert_eq!(InodeTable::restore(cache).unwrap_err(), Errno::STALE, "there is no root");
            assert_eq!([known, forgotten, directory].map(identity), before);
            assert_eq!(records.inodes().used().count(), 2);
            assert_eq!(records.mounts().used().count(), 1);
        }
    }
}
