use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::migration::config::{OnError, ShareOptions};
use crate::migration::{
    DeviceState, FileHandle, Handle, Identity, Inode, Location, Lock, Session, Snapshot, Unlinked, Waiting,
};

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1u8..).prop_filter("a slash", |byte| *byte != b'/');
    vec(byte, 1..40).prop_filter("a directory's own name", |name| !matches!(name.as_slice(), b"." | b".."))
}

fn file_handle() -> impl Strategy<Value = FileHandle> {
    let parts = (0..5u64, any::<i32>(), vec(any::<u8>(), 0..128));
    parts.prop_map(|(mount, kind, bytes)| FileHandle { mount, kind, bytes })
}

fn unlinked() -> impl Strategy<Value = Unlinked> {
    (0..=0o7777u32, any::<u32>(), any::<u32>(), vec((0..100u64, vec(any::<u8>(), 0..20)), 0..4)).prop_map(
        |(mode, uid, gid, parts)| {
            let (mut extents, mut size) = (Vec::new(), 0);
            for (gap, bytes) in parts {
                let offset = size + gap;
                size = offset + bytes.len() as u64;
                extents.push((offset, bytes));
            }
            Unlinked { mode, uid, gid, size, extents }
        },
    )
}

fn location() -> impl Strategy<Value = Location> {
    prop_oneof![
        4 => name().prop_map(|name| Location::Child { parent: 0, name }),
        1 => vec(name(), 1..4).prop_map(|names| Location::Path(names.join(&b'/'))),
        1 => file_handle().prop_map(Location::Handle),
        1 => ".{0,20}".prop_map(Location::Lost),
        1 => unlinked().prop_map(|unlinked| Location::Unlinked(Box::new(unlinked))),
    ]
}

fn identity() -> impl Strategy<Value = Identity> {
    (0..16u8, any::<u64>(), option::of(any::<i64>())).prop_map(|(kind, ino, born)| Identity {
        kind,
        ino,
        born,
    })
}

fn inode() -> impl Strategy<Value = Inode> {
    (0..1u64 << 40, location(), option::of(identity()), option::of(file_handle())).prop_map(
        |(lookups, location, identity, handle)| Inode { node: 0, lookups, location, identity, handle },
    )
}

fn session() -> impl Strategy<Value = Session> {
    (option::of(27..46u32), option::of(any::<u64>()), any::<[bool; 4]>()).prop_map(
        |(minor, flags, [a, b, c, d])| Session {
            minor,
            flags,
            writeback: a,
            submounts: b,
            posix_acl: c,
            create_supp_group: d,
        },
    )
}

prop_compose! {
    /// Handles and locks of nodes 1 to `nodes`.
    fn open_files(nodes: u64)(
        handles in vec((1..=nodes, any::<i32>(), option::of(any::<bool>()), option::of(any::<(u8, u8)>())), 0..6),
        locks in vec((0..6usize, option::of(any::<(u64, u32)>()), any::<[u64; 2]>(), any::<bool>()), 0..4),
    ) -> (Vec<Handle>, Vec<Lock>) {
        let handles: Vec<Handle> = (0..).zip(handles).map(|(id, (node, flags, directory, modes))| {
            Handle { id, node, flags, directory, modes }
        }).collect();
        let lock = |(place, owner, ends, exclusive): (usize, _, [u64; 2], _)| {
            let handle = handles.get(place)?;
            let [start, end] = [ends[0].min(ends[1]), ends[0].max(ends[1])];
            Some(Lock { node: handle.node, handle: handle.id, owner, start, end, exclusive })
        };
        let locks = locks.into_iter().filter_map(lock).collect();
        (handles, locks)
    }
}

prop_compose! {
    /// A snapshot that is one: each file is found through one that stands before it.
    pub(super) fn snapshot()(inodes in vec((inode(), any::<prop::sample::Index>()), 0..12))(
        (handles, locks) in open_files(inodes.len() as u64 + 1),
        session in session(),
        mounts in vec(name(), 0..5),
        // The order in which they stand means nothing.
        inodes in Just(inodes).prop_map(number).prop_shuffle(),
    ) -> Snapshot {
        let next_node = inodes.len() as u64 + 10;
        let mounts = (0..).zip(mounts).collect();
        Snapshot { session: Some(session), inodes, handles, locks, next_node, next_handle: 99, mounts }
    }
}

fn queues() -> impl Strategy<Value = Vec<Waiting>> {
    let queue = (any::<[u64; 3]>(), any::<u16>(), any::<u16>(), vec(0..64u16, 0..4)).prop_map(
        |(ring, next_available, used_index, mut heads)| {
            heads.sort_unstable();
            heads.dedup();
            Waiting { queue: 0, ring, size: 64, next_available, used_index, heads }
        },
    );
    vec(queue, 0..3)
        .prop_map(|queues| (0..).zip(queues).map(|(queue, one)| Waiting { queue, ..one }).collect())
}

/// A state that is one.
fn state() -> impl Strategy<Value = DeviceState> {
    (snapshot(), queues()).prop_map(|(share, queues)| DeviceState { share, queues })
}

fn number(inodes: Vec<(Inode, prop::sample::Index)>) -> Vec<Inode> {
    let root = Inode { node: 1, lookups: 2, location: Location::Root, identity: None, handle: None };
    let mut all = vec![root];
    for (mut inode, index) in inodes {
        inode.node = all.len() as u64 + 1;
        if let Location::Child { parent, .. } = &mut inode.location {
            let place = all[index.index(all.len())].clone();
            *parent = if matches!(place.location, Location::Unlinked(_)) { 1 } else { place.node };
        }
        all.push(inode);
    }
    all
}

fn own() -> MigrationConfig {
    let option = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let share = ShareOptions(vec![option("--cache", "auto"), option("--xattr", "yes")]);
    MigrationConfig { share, ..MigrationConfig::default() }
}

fn of_virtiofsd() -> MigrationConfig {
    let format = StreamFormat::Virtiofsd;
    MigrationConfig {
        format,
        on_error: OnError::GuestError,
        verify_handles: true,
        ..MigrationConfig::default()
    }
}

/// What is left of a snapshot in virtiofsd's stream.
fn through_virtiofsd(mut snapshot: Snapshot) -> Snapshot {
    let is_text = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok();
    for inode in &mut snapshot.inodes {
        inode.identity = None;
        let lost = Location::Lost("virtiofsd did not find it any more".into());
        inode.location = match std::mem::replace(&mut inode.location, Location::Root) {
            Location::Child { name, .. } if !is_text(&name) => lost,
            Location::Path(path) if !is_text(&path) => lost,
            Location::Lost(_) => lost,
            Location::Unlinked(_) => inode.handle.clone().map_or(lost, Location::Handle),
            location => location,
        };
    }
    for handle in &mut snapshot.handles {
        handle.flags &= !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC);
        if handle.directory == Some(true) {
            handle.flags |= libc::O_DIRECTORY;
        }
        handle.directory = Some(handle.flags & libc::O_DIRECTORY != 0);
        handle.modes = None;
    }
    snapshot.locks.clear();
    snapshot.mounts.retain(|(_, path)| is_text(path));
    let session = snapshot.session.as_mut().unwrap();
    (session.minor, session.flags) = (None, None);
    snapshot
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_snapshot_is_the_same_behind_its_stream(state in state()) {
        let stream = write(&state, &own()).unwrap();
        prop_assert_eq!(read(&stream, &own()).unwrap(), state);
    }

    #[test]
    fn a_snapshot_comes_through_the_stream_of_virtiofsd(state in state()) {
        let stream = write(&state, &of_virtiofsd()).unwrap();
        // Whatever the options are, both are read.
        prop_assert_eq!(read(&stream, &own()).unwrap(), DeviceState { share: through_virtiofsd(state.share), queues: Vec::new() });
    }

    #[test]
    fn a_stream_that_was_changed_is_refused(
        state in state(), place in any::<prop::sample::Index>(), change in 1u8.., cut in any::<bool>()
    ) {
        let mut stream = write(&state, &own()).unwrap();
        let place = place.index(stream.len());
        match cut {
            true => stream.truncate(place),
            false => stream[place] ^= change,
        }
        prop_assert!(read(&stream, &own()).is_err());
    }

    /// It has no checksum: what is read is a snapshot that passes all checks, or an error.
    #[test]
    fn a_stream_of_virtiofsd_that_was_changed_is_refused_or_makes_sense(
        state in state(), places in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)
    ) {
        let mut stream = write(&state, &of_virtiofsd()).unwrap();
        for (place, change) in places {
            let place = place.index(stream.len());
            stream[place] ^= change;
        }
        if let Ok(state) = read(&stream, &own()) {
            check::check(&state).unwrap();
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(stream in vec(any::<u8>(), 0..2000), kind in 0..3usize) {
        let begin: &[u8] = [&b"\0"[..], b"\x01", b""][kind];
        let _ = read(&[begin, &stream].concat(), &own());
    }
}

#[test]
fn a_stream_is_short_of_every_byte_it_lacks() {
    let state = super::check::tests::state();
    for config in [own(), of_virtiofsd()] {
        let stream = write(&state, &config).unwrap();
        for length in 0..stream.len() {
            assert!(read(&stream[..length], &own()).is_err(), "{length} of {}", stream.len());
        }
        let error = read(&[&stream[..], b"x"].concat(), &own()).unwrap_err();
        assert!(error.0.contains("bytes behind its"), "{error}");
    }
}

#[test]
fn options_that_contradict_are_named() {
    let stream = write(&DeviceState::default(), &own()).unwrap();
    let mut other = own();
    // One that only this version has.
    other.share.0.insert(0, ("--new".into(), "yes".into()));
    read(&stream, &other).unwrap();
    other.share.0[2].1 = "no".into();
    let error = read(&stream, &other).unwrap_err();
    assert_eq!(
        error.0,
        "the source has --xattr yes and this daemon --xattr no: start it with the options of the source"
    );
}

/// What a length claims is not allocated before it is there.
#[test]
fn lengths_that_lie_cost_nothing() {
    // A varint of 2^63 or so: inodes of virtiofsd's stream.
    let huge = [&[1u8][..], &[0xff; 9], &[1]].concat();
    assert!(read(&huge, &own()).is_err());
    let error = read(&[1, 0xff, 0xff, 0xff, 0x7f], &own()).unwrap_err();
    assert!(error.0.starts_with("virtiofsd's stream is malformed"), "{error}");
}

/// Streams that are in the world: each version has one here, and is read for good.
#[test]
fn streams_of_earlier_versions_are_read() {
    let stream = include_bytes!("testdata/lanefsd-1");
    assert_eq!(read(stream, &own()).unwrap(), super::check::tests::state());
    // As long as it is the one that is written.
    assert_eq!(write(&super::check::tests::state(), &own()).unwrap(), stream);
}

#[test]
#[ignore = "writes the stream of a new version into the sources"]
fn write_the_stream_of_this_version() {
    let stream = write(&super::check::tests::state(), &own()).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/migration/format/testdata/lanefsd-1");
    std::fs::write(path, stream).unwrap();
}
