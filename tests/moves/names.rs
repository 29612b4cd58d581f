//! Names and directories that are unusual.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use lanefsd::fs::FileSystem;
use lanefsd::migration::config::OnError;
use lanefsd::migration::{Identity, Location};
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::guest::{self, Options, Share, alone, directory};

#[test]
fn names_of_any_bytes_move() {
    let _alone = alone();
    let folder = directory();
    let long = [b'x'; 255];
    let names: [&[u8]; 7] = [b"\xff\xfe", b"a (deleted)", b" ", b"new\nline", b"\\", b"caf\xc3\xa9", &long];
    let options = Options::default();
    let source = Share::new(folder.path(), &options);
    source.begin();
    let nodes = names.map(|name| {
        let made = source.make_directory(1, name).unwrap();
        fs::write(folder.path().join(OsStr::from_bytes(name)).join(OsStr::from_bytes(name)), name).unwrap();
        (made, source.look_up(made, name).unwrap())
    });
    let target = source.move_to(folder.path(), &options);
    for (name, (made, file)) in names.iter().zip(nodes) {
        assert_eq!(target.look_up(1, name).unwrap(), made);
        assert_eq!(target.look_up(made, name).unwrap(), file);
        assert_eq!(target.size(file).unwrap(), name.len() as u64);
    }
}

#[test]
fn links_devices_and_fifos_move() {
    let _alone = alone();
    let folder = directory();
    std::os::unix::fs::symlink("nowhere", folder.path().join("link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        folder.path().join("fifo"),
        FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for (mode, on_error) in guest::ways() {
        let options = Options { mode, on_error, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let nodes = [b"link", b"fifo"].map(|name| source.look_up(1, name).unwrap());
        let target = source.move_to(folder.path(), &options);
        assert_eq!(target.size(nodes[0]).unwrap(), 7);
        assert_eq!(target.size(nodes[1]).unwrap(), 0);
        assert_eq!([b"link", b"fifo"].map(|name| target.look_up(1, name).unwrap()), nodes);
    }
}

#[test]
fn a_deep_tree_moves_also_where_its_paths_are_too_long() {
    let _alone = alone();
    for on_error in [OnError::Abort, OnError::GuestError] {
        let folder = directory();
        let options = Options { on_error, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let name = [b'd'; 200];
        let mut nodes = vec![1];
        // Some 60,000 bytes.
        for _ in 0..300 {
            nodes.push(source.make_directory(*nodes.last().unwrap(), &name).unwrap());
        }
        let target = source.move_to(folder.path(), &options);
        // The deepest one first: all above it have to be found.
        target.size(*nodes.last().unwrap()).unwrap();
        for pair in nodes.windows(2) {
            assert_eq!(target.look_up(pair[0], &name).unwrap(), pair[1]);
            assert_eq!(target.look_up_parent(pair[1]).unwrap(), pair[0]);
        }
        for pair in nodes.windows(2).rev() {
            target.remove_directory(pair[0], &name).unwrap();
        }
    }
}

#[test]
fn a_snapshot_without_numbers_and_handle_modes_is_taken_over() {
    let _alone = alone();
    let folder = directory();
    let options = Options { on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let made = source.make_directory(1, b"directory").unwrap();
    let (node, handle) = source.create(made, b"file").unwrap();
    source.write(node, handle, 0, b"content").unwrap();
    fs::hard_link(folder.path().join("directory/file"), folder.path().join("second")).unwrap();
    let open = source.open_directory(made).unwrap();
    let mut snapshot = source.fs.save().unwrap();
    // As virtiofsd writes it, with ids of another order. (The server fills in what INIT negotiated.)
    snapshot.inodes.iter_mut().for_each(|inode| inode.identity = None);
    snapshot.handles.iter_mut().for_each(|handle| (handle.modes, handle.directory) = (None, None));
    let far = u64::MAX / 4;
    for inode in &mut snapshot.inodes {
        inode.node = if inode.node == node { far } else { inode.node };
        if inode.node == made {
            // A directory that only its child needs.
            inode.lookups = 0;
        }
    }
    snapshot.handles.iter_mut().filter(|handle| handle.node == node).for_each(|handle| handle.node = far);
    (snapshot.next_node, snapshot.next_handle) = (0, 0);
    let target = Share::new(folder.path(), &options);
    target.load(snapshot).unwrap();
    assert!(target.fs.agreement().unwrap().is_active());
    assert_eq!(target.read(far, handle).unwrap(), b"content");
    assert_eq!(target.look_up(1, b"second").unwrap(), far, "another name of it");
    assert_eq!(target.size(made).unwrap_err(), Errno::STALE, "the guest has not looked it up");
    assert!(target.list(made, open).unwrap().contains(&b"file".to_vec()));
    let made_again = target.look_up(1, b"directory").unwrap();
    assert!(made_again > far);
    assert_eq!(target.look_up(made_again, b"file").unwrap(), far);
    assert!(target.open(far).unwrap() > handle);
}

#[test]
fn hostile_snapshots_are_refused_or_do_no_harm() {
    let _alone = alone();
    let folder = directory();
    fs::write(folder.path().join("file"), "").unwrap();
    let options = Options { on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let node = source.look_up(1, b"file").unwrap();
    let good = source.fs.save().unwrap();
    let with = |change: &dyn Fn(&mut lanefsd::migration::Inode)| {
        let mut snapshot = good.clone();
        snapshot.inodes.iter_mut().filter(|inode| inode.node == node).for_each(change);
        let target = Share::new(folder.path(), &options);
        target.load(snapshot).map(|()| target.size(node))
    };
    assert_eq!(with(&|_| {}), Ok(Ok(0)));
    let at = |parent, name: &[u8]| Location::Child { parent, name: name.to_vec() };
    for location in [
        at(node, b"file"),
        at(77, b"file"),
        at(1, b"../file"),
        at(1, b".."),
        at(1, b"."),
        at(1, b""),
        at(1, b"file/"),
        at(1, b"a\0b"),
        Location::Path(b"../../etc/passwd".to_vec()),
        Location::Path(Vec::new()),
        Location::Root,
        Location::Lost("gone".to_owned()),
    ] {
        assert_eq!(with(&|inode| inode.location = location.clone()), Ok(Err(Errno::STALE)), "{location:?}");
    }
    assert_eq!(with(&|inode| inode.location = Location::Path(b"file".to_vec())), Ok(Ok(0)));
    let other = Identity { kind: 8, ino: 1, born: None };
    assert_eq!(with(&|inode| inode.identity = Some(other)), Ok(Err(Errno::STALE)));
    assert!(with(&|inode| inode.node = u64::MAX).is_err());
    assert!(with(&|inode| inode.node = 0).is_err());
    assert!(with(&|inode| inode.lookups = u64::MAX).is_ok());
    let mut twice = good.clone();
    let copy = twice.inodes.iter().find(|inode| inode.node == node).unwrap().clone();
    twice.inodes.push(copy);
    let target = Share::new(folder.path(), &options);
    assert!(target.load(twice).is_err());
    assert_eq!(target.fds(), target.own_fds);
}

#[test]
fn what_is_in_a_directory_that_the_guest_has_forgotten_moves_by_its_path() {
    let _alone = alone();
    for on_error in [OnError::Abort, OnError::GuestError] {
        let folder = directory();
        let options = Options { on_error, confirm: true, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let a = source.make_directory(1, b"a").unwrap();
        let b = source.make_directory(a, b"b").unwrap();
        let file = source.create_closed(b, b"file").unwrap();
        source.forget(b, 1);
        source.fs.prepare_save();
        let snapshot = source.fs.save().unwrap();
        let saved = snapshot.inodes.iter().find(|inode| inode.node == file).unwrap();
        assert_eq!(saved.location, Location::Path(b"a/b/file".to_vec()));
        let target = Share::new(folder.path(), &options);
        target.load(snapshot).unwrap();
        // Its path changes before anybody has asked for it.
        target.rename((1, b"a"), (1, b"c")).unwrap();
        assert_eq!(target.size(file).unwrap(), 0);
        let b = target.look_up(a, b"b").unwrap();
        assert_eq!(target.look_up(b, b"file").unwrap(), file);
    }
}

/// A directory that the guest has forgotten leads to a file that nobody has asked for yet.
#[test]
fn what_is_in_a_directory_that_is_renamed_is_found() {
    let _alone = alone();
    let folder = directory();
    let options = Options { on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    // They are looked for first.
    for number in 0..5000 {
        source.create_closed(1, format!("file{number}").as_bytes()).unwrap();
    }
    let made = source.make_directory(1, b"before").unwrap();
    let file = source.create_closed(made, b"file").unwrap();
    let mut snapshot = source.fs.save().unwrap();
    let mut inodes = snapshot.inodes.iter_mut();
    inodes.find(|inode| inode.node == made).unwrap().lookups = 0;
    let target = Share::new(folder.path(), &options);
    target.load(snapshot).unwrap();
    target.rename((1, b"before"), (1, b"after")).unwrap();
    assert_eq!(target.size(file).unwrap(), 0);
}
