use super::*;
use crate::migration::{Handle, Identity, Lock, Session};

/// The same, and a queue.
pub fn state() -> DeviceState {
    let queue = Waiting {
        queue: 3,
        ring: [4096, 8192, 1 << 40],
        size: 128,
        next_available: 5,
        used_index: 4,
        heads: vec![9, 127],
    };
    DeviceState { share: snapshot(), queues: vec![queue] }
}

fn node(node: u64, location: Location) -> Inode {
    Inode { node, lookups: node, location, identity: None, handle: None }
}

fn child(parent: u64, name: &[u8]) -> Location {
    Location::Child { parent, name: name.to_vec() }
}

fn file_handle(length: usize) -> FileHandle {
    FileHandle { mount: 7, kind: 1, bytes: vec![3; length] }
}

/// One of each kind.
pub fn snapshot() -> Snapshot {
    let identity = Identity { kind: 8, ino: 4711, born: Some(-5) };
    let unlinked = Unlinked {
        mode: 0o4755,
        uid: 1,
        gid: 2,
        size: 10_000,
        extents: vec![(0, b"ab".to_vec()), (9000, vec![0; 1000])],
    };
    let open = Handle { id: 3, node: 5, flags: libc::O_RDWR, directory: Some(false), modes: Some((2, 1)) };
    let opendir = Handle { id: 4, node: 2, flags: libc::O_DIRECTORY, directory: Some(true), modes: None };
    let posix = Lock { node: 5, handle: 17, owner: Some((0xdead, 100)), start: 0, end: 9, exclusive: true };
    let flock = Lock { node: 5, handle: 3, owner: None, start: 0, end: u64::MAX, exclusive: false };
    Snapshot {
        session: Some(Session {
            minor: Some(45),
            flags: Some(1 << 40 | 3),
            writeback: false,
            submounts: true,
            posix_acl: false,
            create_supp_group: true,
        }),
        inodes: vec![
            // A child may stand before its parent.
            node(3, child(2, b"f\xffle")),
            node(2, child(1, b"directory")),
            node(1, Location::Root),
            Inode {
                identity: Some(identity),
                handle: Some(file_handle(8)),
                ..node(4, Location::Path(b"a/b".to_vec()))
            },
            node(5, Location::Handle(file_handle(128))),
            node(6, Location::Lost("it was removed".into())),
            node(8, Location::Unlinked(Box::new(unlinked))),
        ],
        handles: vec![open, opendir],
        locks: vec![posix, flock],
        next_node: 9,
        next_handle: 5,
        mounts: vec![(7, Vec::new()), (8, b"mnt".to_vec())],
    }
}

/// The words in which a changed snapshot is refused.
fn refused(change: impl FnOnce(&mut Snapshot)) -> String {
    let mut changed = snapshot();
    change(&mut changed);
    check_share(&changed).unwrap_err().0
}

#[test]
fn a_snapshot_that_is_one_passes() {
    check(&state()).unwrap();
    check(&DeviceState::default()).unwrap();
    // No id is the next one: the file system finds it.
    check_share(&Snapshot { next_node: 0, next_handle: 0, ..snapshot() }).unwrap();
}

#[test]
fn ids_are_there_once_and_below_the_next_one() {
    let told = |words: &str, change: fn(&mut Snapshot)| {
        let error = refused(change);
        assert!(error.contains(words), "{error}");
    };
    told("node 2 is there twice", |s| s.inodes[0].node = 2);
    told("node 0 with 3 lookups", |s| s.inodes[0].node = 0);
    told("is none that a guest can have", |s| s.inodes[0].node = u64::MAX);
    told("is none that a guest can have", |s| s.inodes[0].lookups = 1 << 63);
    told("node 8 is there, and 8 is the next one", |s| s.next_node = 8);
    told("is no number for the next node", |s| s.next_node = u64::MAX);
    told("open file 3 is there twice", |s| s.handles[1].id = 3);
    told("open file 4 is there, and 4 is the next one", |s| s.next_handle = 4);
    told("is none that a guest can have", |s| s.handles[0].id = u64::MAX);
    told("is none that a guest can have", |s| s.next_handle = u64::MAX);
    told("mount 7 is there twice", |s| s.mounts[1].0 = 7);
    told("at a path that is none", |s| s.mounts[1].1 = b"a\0b".to_vec());
    told("files and no session", |s| s.session = None);
}

#[test]
fn every_inode_is_found_in_finitely_many_steps() {
    let told = |words: &str, change: fn(&mut Snapshot)| {
        let error = refused(change);
        assert!(error.contains(words), "{error}");
    };
    told("the root is missing", |s| drop(s.inodes.remove(2)));
    told("node 1 is the root", |s| s.inodes[2].location = child(2, b"x"));
    told("node 4 is the root", |s| s.inodes[3].location = Location::Root);
    told("node 3 is found through node 99, which is missing", |s| s.inodes[0].location = child(99, b"x"));
    told("is found through itself", |s| s.inodes[0].location = child(3, b"x"));
    told("is found through itself", |s| s.inodes[1].location = child(3, b"x"));
    told("node 3 is found through node 8, which is a file", |s| s.inodes[0].location = child(8, b"x"));
}

/// A long chain of directories is walked once.
#[test]
fn depth_costs_no_more_than_length() {
    let mut deep = snapshot();
    deep.next_node = 0;
    deep.inodes.extend((100..200_000).map(|id| node(id, child(if id == 100 { 2 } else { id - 1 }, b"d"))));
    check_share(&deep).unwrap();
    deep.inodes[1].location = child(199_999, b"loop");
    assert!(check_share(&deep).unwrap_err().0.contains("is found through itself"));
}

#[test]
fn names_are_names() {
    for name in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0", &[b'x'; 256]] {
        let error = refused(|s| s.inodes[0].location = child(2, name));
        assert!(
            error.starts_with("node 3 is named") && error.ends_with("which is no name of a file"),
            "{error}"
        );
    }
    for path in [&b""[..], b"/", b"/a", b"a/", b"a//b", b"a/./b", b"../a", b"a\0b"] {
        let error = refused(|s| s.inodes[3].location = Location::Path(path.to_vec()));
        assert!(error.starts_with("node 4 is named"), "{error}");
    }
    let error = refused(|s| s.inodes[3].location = Location::Path(vec![b'x'; (1 << 20) + 1]));
    assert_eq!(error, "node 4 has a path of 1048577 bytes");
    // The message is cut, too.
    let error = refused(|s| s.inodes[0].location = child(2, &[b'x'; 100_000]));
    assert!(error.len() < 400, "{error}");
}

#[test]
fn what_belongs_to_an_inode_fits() {
    let told = |words: &str, change: fn(&mut Snapshot)| {
        let error = refused(change);
        assert!(error.contains(words), "{error}");
    };
    told("file type 16", |s| s.inodes[3].identity.as_mut().unwrap().kind = 16);
    told("file handle of 129 bytes", |s| s.inodes[3].handle = Some(file_handle(129)));
    told("file handle of 129 bytes", |s| s.inodes[4].location = Location::Handle(file_handle(129)));
    told("open file 3 is of node 99, which is missing", |s| s.handles[0].node = 99);
    told("a lock on node 99, which is missing", |s| s.locks[0].node = 99);
    told("goes from 10 to 9", |s| s.locks[0].start = 10);
    told("through open file 4, which is none of it", |s| s.locks[1].handle = 4);
    // Of a POSIX lock, the file may be closed; of a flock(2) lock, it is open.
    told("through open file 17, which is none of it", |s| s.locks[1].handle = 17);
    told("a reason of", |s| s.inodes[5].location = Location::Lost("x".repeat(1 << 21)));
}

#[test]
fn content_lies_in_order_and_inside_of_its_file() {
    let changed = |change: fn(&mut Unlinked)| {
        refused(|s| match &mut s.inodes[6].location {
            Location::Unlinked(unlinked) => change(unlinked),
            _ => panic!("no unlinked file"),
        })
    };
    let error = changed(|file| file.mode = 0o100644);
    assert!(error.contains("which are no permissions"), "{error}");
    let error = changed(|file| file.size = u64::MAX);
    assert!(error.contains("more than a file can have"), "{error}");
    for change in [
        (|file| file.size = 9999) as fn(&mut Unlinked),
        |file| file.extents[1].0 = 1,
        |file| file.extents[1].0 = u64::MAX,
        |file| file.extents.swap(0, 1),
    ] {
        let error = changed(change);
        assert!(error.contains("out of their order or range"), "{error}");
    }
}

#[test]
fn requests_that_wait_are_in_their_rings() {
    for change in [
        (|queue| queue.queue = 64) as fn(&mut Waiting),
        |queue| queue.size = 100,
        |queue| queue.size = 0,
        |queue| queue.size = 64,
        |queue| queue.heads.push(9),
    ] {
        let mut changed = state();
        change(&mut changed.queues[0]);
        assert!(check(&changed).unwrap_err().0.starts_with("queue "));
    }
    let mut changed = state();
    changed.queues.push(changed.queues[0].clone());
    assert_eq!(check(&changed).unwrap_err().0, "queue 3 is there twice");
}
