use std::os::fd::IntoRawFd;

use rustix::io::Errno;

use super::*;
use crate::fs::passthrough::inode::fd_cache::FdCache;
use crate::limits::{FdQuota, GuestFd};
use crate::state_file::{Effects, MountEntry, StateFile};
use crate::sys::inherited::identity;

const MOUNT: u32 = 7;

fn entry(node: u64, ino: u64, descriptor: Option<i32>) -> InodeEntry {
    InodeEntry { node, lookups: 1, ino, device: 1, mount: MOUNT, generation: 0, kind: 8, descriptor }
}

fn key(ino: u64) -> InodeKey {
    InodeKey::of_entry(&entry(0, ino, None))
}

fn open() -> i32 {
    std::fs::File::open("/").unwrap().into_raw_fd()
}

/// A table that an earlier process has left: the root, and these inodes.
fn restored(inodes: impl IntoIterator<Item = InodeEntry>) -> (InodeTable, Arc<FdQuota>) {
    let records = Records::new(&StateFile::create_shared().unwrap());
    let (descriptor, is_of_a_file) = (None, false);
    records.add_mount(&MountEntry { id: MOUNT, descriptor, numbers_alias: false, is_of_a_file });
    let root = InodeEntry { kind: 4, ..entry(1, 1, Some(open())) };
    for entry in [root].into_iter().chain(inodes) {
        let record = records.inodes().take().unwrap();
        records.inode(record).store(&entry, 0);
        records.state().next_node().fetch_max(entry.node + 1, Ordering::Relaxed);
    }
    let quota = Arc::new(FdQuota::new(100_000, 0));
    let cache = FdCache::unlimited(&quota, &Records::new(records.state()));
    (InodeTable::restore(cache).unwrap().0, quota)
}

fn with_key(table: &InodeTable, ino: u64) -> Option<Arc<Inode>> {
    table.key_shard(&key(ino)).get(&key(ino)).map(|entry| Arc::clone(&entry.0))
}

#[test]
fn an_inode_is_made_at_its_first_use() {
    let (table, quota) = restored((2..100).map(|node| entry(node, node * 3, Some(open()))));
    assert_eq!((table.len(), quota.in_use()), (0, 99), "their descriptors are counted");
    let by_node = table.known(NodeId(20)).unwrap();
    assert!(Arc::ptr_eq(&by_node, &with_key(&table, 60).unwrap()));
    let by_key = with_key(&table, 90).unwrap();
    assert!(Arc::ptr_eq(&by_key, &table.known(NodeId(30)).unwrap()));
    assert_eq!((table.len(), quota.in_use()), (2, 99));
    assert!(table.known(NodeId(100)).is_none() && with_key(&table, 61).is_none());
    assert!(table.knows_node(NodeId(40)) && !table.knows_node(NodeId(100)));
    assert_eq!(table.len(), 2, "to ask makes nothing");
    table.make_rest();
    assert_eq!((table.len(), quota.in_use(), table.has_stored()), (98, 99, false));
    assert!(Arc::ptr_eq(&by_node, &table.known(NodeId(20)).unwrap()), "each is made once");
    drop((table, by_node, by_key));
    assert_eq!(quota.in_use(), 0);
}

#[test]
fn of_inodes_with_one_number_the_last_one_has_it() {
    for first in [2, 3] {
        let (table, _) = restored([entry(first, 50, None), entry(5 - first, 50, None)]);
        assert_eq!(with_key(&table, 50).unwrap().node, NodeId(3));
        assert_eq!(table.known(NodeId(2)).unwrap().node, NodeId(2));
    }
}

#[test]
fn what_is_forgotten_is_not_made_again_when_its_record_has_another_inode() {
    let (table, quota) = restored((2..10).map(|node| entry(node, node, Some(open()))));
    let record = table.known(NodeId(5)).unwrap().fd.record();
    table.forget(Effects::NONE, NodeId(5), 1);
    let path = quota.acquire().unwrap().wrap(std::fs::File::open("/").unwrap().into());
    let mount = Arc::clone(table.root().mount());
    let new = table.find_or_insert(Effects::NONE, key(5), FileType::RegularFile, path, mount).unwrap();
    assert_eq!((new.fd.record().get(), new.node), (record.get(), NodeId(10)), "it has the record");
    assert!(table.known(NodeId(5)).is_none());
    assert!(Arc::ptr_eq(&new, &with_key(&table, 5).unwrap()));
    table.make_rest();
    assert!(Arc::ptr_eq(&new, &table.known(NodeId(10)).unwrap()));
    assert_eq!((table.len(), quota.in_use()), (8, 9));
}

/// As when the guest unmounts the share right after the death of a process.
#[test]
fn a_session_that_ends_closes_what_was_not_made() {
    for ends_by_clear in [true, false] {
        let descriptors: Vec<i32> = (2..50).map(|_| open()).collect();
        let pairs = (2..).zip(descriptors.iter());
        let (table, quota) = restored(pairs.map(|(node, fd)| entry(node, node, Some(*fd))));
        let records = Arc::clone(&table.records);
        table.known(NodeId(30)).unwrap();
        if ends_by_clear {
            table.clear();
            assert_eq!((quota.in_use(), records.inodes().used().count()), (1, 1), "the root is left");
            assert!(table.known(NodeId(31)).is_none());
        }
        drop(table);
        assert_eq!((quota.in_use(), records.inodes().used().count()), (0, 0));
    }
}

#[test]
fn another_process_finds_what_was_not_made() {
    let descriptors: Vec<i32> = (2..50).map(|_| open()).collect();
    let pairs = (2..).zip(descriptors.iter());
    let (first, _) = restored(pairs.map(|(node, fd)| entry(node, node, Some(*fd))));
    let before: Vec<_> = descriptors.iter().map(|fd| identity(*fd).unwrap()).collect();
    first.known(NodeId(7)).unwrap();
    first.forget(Effects::NONE, NodeId(8), 1);
    let state = Arc::clone(first.state());
    // It dies.
    std::mem::forget(first);
    let quota = Arc::new(FdQuota::new(1000, 0));
    let cache = FdCache::unlimited(&quota, &Records::new(&state));
    let (second, _) = InodeTable::restore(cache).unwrap();
    assert_eq!(quota.in_use(), 48);
    for ((node, fd), before) in (2..).zip(&descriptors).zip(before).filter(|((node, _), _)| *node != 8) {
        let inode = second.known(NodeId(node)).unwrap();
        assert_eq!((inode.key.ino, identity(*fd).unwrap()), (node, before));
    }
    assert!(second.known(NodeId(8)).is_none());
}

#[test]
fn threads_that_meet_a_stored_inode_have_the_same_one() {
    const COUNT: u64 = 2000;
    for round in 0..5 {
        let (table, quota) = restored((2..COUNT).map(|node| entry(node, node * 3, Some(open()))));
        let seen: Vec<Vec<_>> = thread::scope(|scope| {
            let thread = |number: u64| {
                let table = &table;
                scope.spawn(move || {
                    if number == 3 {
                        table.make_rest();
                    }
                    let nodes = (0..COUNT - 2).map(|step| 2 + (step * 7 + number * round) % (COUNT - 2));
                    let found = nodes.map(|node| match number % 2 {
                        0 => (node, table.known(NodeId(node)).unwrap()),
                        _ => (node, with_key(table, node * 3).unwrap()),
                    });
                    let mut found: Vec<_> = found.collect();
                    found.sort_by_key(|(node, _)| *node);
                    found.dedup_by_key(|(node, _)| *node);
                    found
                })
            };
            let threads: Vec<_> = (0..4).map(thread).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let all_same = |(node, inode): &(u64, Arc<Inode>)| {
            Arc::ptr_eq(inode, &table.known(NodeId(*node)).unwrap()) && inode.node.0 == *node
        };
        assert!(seen.iter().flatten().all(all_same));
        assert_eq!((table.len() as u64, quota.in_use() as u64), (COUNT - 2, COUNT - 1));
        drop(seen);
        drop(table);
        assert_eq!(quota.in_use(), 0);
    }
}

/// A guest that looks files up and forgets them while the rest is made.
#[test]
fn a_guest_that_forgets_meanwhile_loses_nothing() {
    const COUNT: u64 = 1000;
    let (table, quota) = restored((2..COUNT).map(|node| entry(node, node, Some(open()))));
    thread::scope(|scope| {
        scope.spawn(|| table.make_rest());
        for number in 0..3u64 {
            let (table, quota) = (&table, &quota);
            scope.spawn(move || {
                for node in (2..COUNT).filter(|node| node % 3 == number) {
                    table.forget(Effects::NONE, NodeId(node), 1);
                    assert!(table.known(NodeId(node)).is_none());
                    let path: GuestFd =
                        quota.acquire().unwrap().wrap(std::fs::File::open("/").unwrap().into());
                    let mount = Arc::clone(table.root().mount());
                    let kind = FileType::RegularFile;
                    let new = table.find_or_insert(Effects::NONE, key(node), kind, path, mount).unwrap();
                    assert!(new.node.0 >= COUNT);
                    assert!(Arc::ptr_eq(&new, &with_key(table, node).unwrap()));
                }
            });
        }
    });
    assert!((2..COUNT).all(|node| table.get(NodeId(node)).unwrap_err() == Errno::STALE));
    assert_eq!((table.len() as u64, quota.in_use() as u64), (COUNT - 2, COUNT - 1));
}

#[test]
fn records_are_found_by_their_numbers_however_many_have_one() {
    for count in [0u32, 1, 5, 1000] {
        let mut index = RecordIndex::with_room(count as usize);
        let number = |record: u32| u64::from(record % 300) << 40 | 7;
        (0..count).for_each(|record| index.add(number(record), Record::new(record)));
        index.sort();
        for wanted in 0..300u32 {
            let found: Vec<u32> = index.get(number(wanted)).map(Record::raw).collect();
            let mut of_number = (0..count).filter(|record| record % 300 == wanted);
            assert!(of_number.all(|record| found.contains(&record)));
        }
        assert!(index.get(1 << 30).next().is_none());
    }
}
