use super::*;
use crate::migration::config::StreamFormat;
use crate::migration::format::check::tests::state;

fn config() -> MigrationConfig {
    MigrationConfig {
        format: StreamFormat::Virtiofsd,
        on_error: OnError::GuestError,
        ..MigrationConfig::default()
    }
}

/// Two files in a directory that the guest has forgotten, one of them open: by the bytes.
const STREAM: &[u8] = &[
    1, 4, // version 2; inodes
    1, 3, 0, 0, // the root: three references, one of them of its child
    2, 2, 1, 1, 1, b'd', 0, // d in 1: the references of its children
    3, 0x85, 1, 1, 2, 1, b'f', 0, // f in 2, looked up 133 times
    9, 1, 1, 2, 1, b'g', 1, 0x96, 1, 1, 3, 7, 8, 9,  // g in 2 has a handle: mount 150, type -1
    10, // the next inode
    1, 0, 3, 0, 0x84, 0x80, 2, // open file 0 is f: O_RDWR | O_DIRECT, in zigzag
    1, // the next handle
    1, 0, 0, 1, // negotiated
    1, 0x96, 1, 1, b'.', // one mount
];

#[test]
fn a_stream_means_what_virtiofsd_wrote() {
    let snapshot = read(STREAM).unwrap();
    let inode =
        |node, lookups, location| migration::Inode { node, lookups, location, identity: None, handle: None };
    let child = |parent, name: &[u8]| Location::Child { parent, name: name.to_vec() };
    let handle = FileHandle { mount: 150, kind: -1, bytes: vec![7, 8, 9] };
    let expected = Snapshot {
        session: Some(migration::Session { writeback: true, create_supp_group: true, ..Default::default() }),
        inodes: vec![
            inode(1, 2, Location::Root),
            inode(2, 0, child(1, b"d")),
            inode(3, 133, child(2, b"f")),
            migration::Inode { handle: Some(handle), ..inode(9, 1, child(2, b"g")) },
        ],
        handles: vec![migration::Handle {
            id: 0,
            node: 3,
            flags: 0x4002,
            directory: Some(false),
            modes: None,
        }],
        locks: Vec::new(),
        next_node: 10,
        next_handle: 1,
        mounts: vec![(150, Vec::new())],
    };
    assert_eq!(snapshot, expected);
    // And back, byte by byte.
    assert_eq!(
        write(
            &DeviceState { share: snapshot, queues: Vec::new() },
            &MigrationConfig { verify_handles: true, ..config() }
        )
        .unwrap(),
        STREAM
    );
    // Version 1 has no mounts.
    let first = [&[0], &STREAM[1..STREAM.len() - 5]].concat();
    assert_eq!(read(&first).unwrap(), Snapshot { mounts: Vec::new(), ..expected });
}

#[test]
fn a_share_that_is_not_mounted_is_empty() {
    let stream = write(&DeviceState::default(), &config()).unwrap();
    assert_eq!(stream, [1, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(&stream).unwrap(), Snapshot { next_node: 2, ..Snapshot::default() });
}

#[test]
fn fewer_references_than_children_are_refused() {
    let mut stream = STREAM.to_vec();
    // Of the directory.
    stream[7] = 1;
    let error = read(&stream).unwrap_err();
    assert_eq!(error.0, "node 2 has 1 references, and 2 files that hold one each");
}

/// A child that is written as lost holds no reference.
#[test]
fn names_that_are_no_text_are_lost() {
    let stream = write(&state(), &config()).unwrap();
    let back = read(&stream).unwrap();
    let inode = |node| back.inodes.iter().find(|inode| inode.node == node).unwrap();
    assert!(matches!(inode(3).location, Location::Lost(_)));
    assert_eq!(inode(2).lookups, 2);
    assert!(matches!(inode(8).location, Location::Lost(_)));
    assert!(back.inodes.iter().all(|inode| inode.handle.is_none()));
}

#[test]
fn locks_are_dropped_only_where_the_options_allow_it() {
    let error = write(&state(), &MigrationConfig { on_error: OnError::Abort, ..config() }).unwrap_err();
    assert!(error.0.starts_with("the guest has 2 locks, which virtiofsd does not take over"), "{error}");
    assert!(read(&write(&state(), &config()).unwrap()).unwrap().locks.is_empty());
}

/// A guest of virtiofsd 1.14.0 with --migration-verify-handles, as `tests/it/migration/peer.rs` has it.
#[test]
fn a_stream_that_virtiofsd_has_written_is_read() {
    let stream = include_bytes!("../testdata/virtiofsd-1.14.0");
    let back = read(stream).unwrap();
    super::super::check::check(&DeviceState { share: back.clone(), queues: Vec::new() }).unwrap();
    let find = |node: u64| back.inodes.iter().find(|inode| inode.node == node).unwrap();
    let child = |parent, name: &str| Location::Child { parent, name: name.as_bytes().to_vec() };
    for (node, lookups, location) in [
        (1, 2, Location::Root),
        (2, 1, child(1, "directory")),
        // Forgotten, and a directory on the way to the next one.
        (8, 0, child(2, "ä")),
        (4, 1, child(8, "deep")),
        (5, 2, child(4, "file")),
        (6, 1, child(1, "link")),
        (7, 1, child(4, "new0")),
    ] {
        let inode = find(node);
        assert_eq!((inode.lookups, &inode.location), (lookups, &location));
        assert_eq!(inode.handle.as_ref().map(|handle| handle.bytes.len()), Some(8));
    }
    let open = |id, node, flags, directory| migration::Handle { id, node, flags, directory, modes: None };
    let directory = libc::O_DIRECTORY;
    assert_eq!(back.handles, [open(0, 5, libc::O_RDWR, Some(false)), open(1, 4, directory, Some(true))]);
    assert_eq!((back.next_node, back.next_handle, back.inodes.len()), (9, 3, 7));
    let session = migration::Session { submounts: true, create_supp_group: true, ..Default::default() };
    assert_eq!(back.session, Some(session));
}
