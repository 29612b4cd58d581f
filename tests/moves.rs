//! Shares that move from one file system to another: all that the guest knows goes along.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod context;
#[path = "moves/guest.rs"]
mod guest;
#[path = "moves/locks.rs"]
mod locks;
#[path = "moves/names.rs"]
mod names;
#[path = "moves/unlinked.rs"]
mod unlinked;

use std::fs;

use lanefsd::config::InodeFileHandles;
use lanefsd::fs::FileSystem;
use lanefsd::migration::config::{Mode as MigrationMode, OnError};
use lanefsd::migration::{Location, Snapshot};
use rustix::io::Errno;

use guest::{Options, Share, alone, directory};

#[test]
fn nodes_handles_and_data_are_the_same_on_the_other_side() {
    let _alone = alone();
    for (mode, on_error) in guest::ways() {
        let folder = directory();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("a/b/file"), "content").unwrap();
        let options = Options { mode, on_error, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let a = source.look_up(1, b"a").unwrap();
        let b = source.look_up(a, b"b").unwrap();
        let file = source.look_up(b, b"file").unwrap();
        assert_eq!(source.look_up(b, b"file").unwrap(), file);
        let handle = source.open(file).unwrap();
        let listing = source.open_directory(b).unwrap();
        source.write(file, handle, 0, b"written").unwrap();

        let target = source.move_to(folder.path(), &options);
        assert_eq!(target.read(file, handle).unwrap(), b"written");
        target.write(file, handle, 7, b" again").unwrap();
        assert_eq!(fs::read(folder.path().join("a/b/file")).unwrap(), b"written again");
        assert!(target.list(b, listing).unwrap().contains(&b"file".to_vec()));
        // Names lead to the nodes that the guest has for them.
        assert_eq!(target.look_up(1, b"a").unwrap(), a);
        assert_eq!(target.look_up(a, b"b").unwrap(), b);
        assert_eq!(target.look_up(b, b"file").unwrap(), file);
        // What is new has a number of its own.
        fs::write(folder.path().join("a/new"), "").unwrap();
        let new = target.look_up(a, b"new").unwrap();
        assert!(new > file, "{new}");
        // Looked up twice there and once here.
        target.close(file, handle).unwrap();
        target.forget(file, 2);
        target.size(file).unwrap();
        target.forget(file, 1);
        assert_eq!(target.size(file).unwrap_err(), Errno::STALE);
        assert!(target.look_up(b, b"file").unwrap() > new);
    }
}

#[test]
fn a_share_moves_there_and_back_many_times() {
    let _alone = alone();
    for (mode, on_error) in guest::ways() {
        let folder = directory();
        let options = Options { mode, on_error, ..Options::default() };
        let mut share = Share::new(folder.path(), &options);
        share.begin();
        let mut files = Vec::new();
        for round in 0..12u8 {
            let (node, handle) = share.create(1, &[b"file-", [b'a' + round].as_slice()].concat()).unwrap();
            files.push((node, handle));
            // The next move comes while inodes may still be looked for.
            share = share.move_to(folder.path(), &options);
            for (number, (node, handle)) in (0u8..).zip(&files) {
                share.write(*node, *handle, u64::from(round), &[number]).unwrap();
            }
        }
        for (number, (node, handle)) in (0u8..12).zip(&files) {
            let read = share.read(*node, *handle).unwrap();
            assert!(
                read[usize::from(number)..].iter().all(|byte| *byte == number) && read.len() == 12,
                "{read:?}"
            );
            share.close(*node, *handle).unwrap();
            share.forget(*node, 1);
        }
        assert_eq!(share.fds(), share.own_fds, "nothing stays open");
    }
}

#[test]
fn a_share_without_a_session_moves_too() {
    let _alone = alone();
    let folder = directory();
    let source = Share::new(folder.path(), &Options::default());
    assert_eq!(source.fs.save().unwrap(), Snapshot::default());
    let target = source.move_to(folder.path(), &Options::default());
    assert!(!target.fs.agreement().unwrap().is_active());
    target.begin();
    assert_eq!(target.look_up(1, b"nothing").unwrap_err(), Errno::NOENT);
}

#[test]
fn the_source_goes_on_after_a_save() {
    let _alone = alone();
    let folder = directory();
    let source = Share::new(folder.path(), &Options::default());
    source.begin();
    let (node, handle) = source.create(1, b"file").unwrap();
    source.fs.prepare_save();
    let first = source.fs.save().unwrap();
    source.fs.resume();
    source.write(node, handle, 0, b"on").unwrap();
    source.fs.prepare_save();
    source.fs.cancel_save();
    assert_eq!(source.fs.save().unwrap(), first);
    assert_eq!(source.read(node, handle).unwrap(), b"on");
}

#[test]
fn names_that_change_while_a_move_is_prepared_are_found() {
    let _alone = alone();
    for prepared in [false, true] {
        let folder = directory();
        let options = Options::default();
        let source = Share::new(folder.path(), &options);
        source.begin();
        let nodes: Vec<u64> = (0..200u8)
            .map(|number| source.create_closed(1, format!("file{number}").as_bytes()).unwrap())
            .collect();
        let made = source.make_directory(1, b"directory").unwrap();
        let inner = source.create_closed(made, b"inner").unwrap();
        if prepared {
            source.fs.prepare_save();
        }
        for (number, node) in nodes.iter().enumerate().filter(|(number, _)| number % 3 == 0) {
            let (from, to) = (format!("file{number}"), format!("renamed{number}"));
            let new_parent = if number % 2 == 0 { 1 } else { made };
            source.rename((1, from.as_bytes()), (new_parent, to.as_bytes())).unwrap();
            // A name that is taken by another file.
            assert_ne!(source.create_closed(1, from.as_bytes()).unwrap(), *node);
        }
        source.rename((1, b"directory"), (1, b"elsewhere")).unwrap();
        let target = source.move_to(folder.path(), &options);
        for (number, node) in nodes.iter().enumerate() {
            let (parent, name) = match (number % 3, number % 2) {
                (0, 0) => (1, format!("renamed{number}")),
                (0, _) => (made, format!("renamed{number}")),
                _ => (1, format!("file{number}")),
            };
            assert_eq!(target.look_up(parent, name.as_bytes()).unwrap(), *node, "{name}");
        }
        assert_eq!(target.look_up(1, b"elsewhere").unwrap(), made);
        assert_eq!(target.look_up(made, b"inner").unwrap(), inner);
    }
}

#[test]
fn what_the_guest_renames_before_it_is_found_is_found() {
    let _alone = alone();
    let folder = directory();
    let options = Options { on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let directory = source.make_directory(1, b"directory").unwrap();
    let file = source.create_closed(directory, b"file").unwrap();
    let other = source.create_closed(directory, b"other").unwrap();
    let target = source.move_to(folder.path(), &options);
    target.rename((1, b"directory"), (1, b"moved")).unwrap();
    target.rename((directory, b"file"), (1, b"out")).unwrap();
    target.unlink(directory, b"other").unwrap();
    assert_eq!(target.size(file).unwrap(), 0);
    assert_eq!(target.look_up(1, b"out").unwrap(), file);
    assert_eq!(target.size(other).unwrap(), 0, "the guest may have it open");
}

#[test]
fn another_file_under_the_name_is_not_taken_for_the_guests() {
    let _alone = alone();
    let folder = directory();
    let path = |name: &str| folder.path().join(name);
    let make = |options: &Options| {
        for name in ["replaced", "missing", "kind", "kept"] {
            fs::write(path(name), name).unwrap();
        }
        let source = Share::new(folder.path(), options);
        source.begin();
        let nodes =
            ["replaced", "missing", "kind", "kept"].map(|name| source.look_up(1, name.as_bytes()).unwrap());
        (source, nodes)
    };
    let change = || {
        fs::rename(path("replaced"), path("moved-away")).unwrap();
        fs::write(path("replaced"), "another").unwrap();
        fs::rename(path("missing"), path("moved-away-too")).unwrap();
        fs::rename(path("kind"), path("moved-as-well")).unwrap();
        fs::create_dir(path("kind")).unwrap();
    };
    let names_only = InodeFileHandles::Never;
    let options = Options { on_error: OnError::GuestError, handles: names_only, ..Options::default() };
    let (source, [replaced, missing, kind, kept]) = make(&options);
    let snapshot = source.fs.save().unwrap();
    change();
    let target = Share::new(folder.path(), &options);
    target.load(snapshot.clone()).unwrap();
    for node in [replaced, missing, kind] {
        assert_eq!(target.size(node).unwrap_err(), Errno::STALE);
    }
    assert_eq!(target.size(kept).unwrap(), 4);
    // The guest looks the name up again, and gets a new node.
    assert!(target.look_up(1, b"replaced").unwrap() > kept);
    target.forget(replaced, 1);

    // The other policy: nothing is loaded, and the message names the first one.
    let strict = Options { on_error: OnError::Abort, handles: names_only, ..Options::default() };
    let target = Share::new(folder.path(), &strict);
    let error = target.load(snapshot).unwrap_err().to_string();
    assert!(["replaced", "missing", "kind"].iter().any(|name| error.contains(name)), "{error}");
    assert!(!target.fs.agreement().unwrap().is_active());
    assert_eq!(target.fds(), target.own_fds);
}

#[test]
fn with_handles_a_file_that_was_moved_on_the_host_is_found() {
    let _alone = alone();
    if !guest::opens_handles() {
        return;
    }
    let folder = directory();
    fs::write(folder.path().join("file"), "content").unwrap();
    for (mode, verify) in [(MigrationMode::FileHandles, false), (MigrationMode::Auto, true)] {
        let options = Options { mode, verify, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let node = source.look_up(1, b"file").unwrap();
        let snapshot = source.fs.save().unwrap();
        let saved = snapshot.inodes.iter().find(|inode| inode.node == node).unwrap();
        assert!(matches!(saved.location, Location::Handle(_)), "{verify}");
        fs::rename(folder.path().join("file"), folder.path().join("moved")).unwrap();
        fs::write(folder.path().join("file"), "another file").unwrap();
        let target = Share::new(folder.path(), &options);
        target.load(snapshot).unwrap();
        assert_eq!(target.size(node).unwrap(), 7, "{mode:?}");
        assert_eq!(target.look_up(1, b"moved").unwrap(), node);
        fs::rename(folder.path().join("moved"), folder.path().join("file")).unwrap();
    }
}

#[test]
fn without_trust_in_handles_they_are_compared_alone() {
    let _alone = alone();
    let folder = directory();
    fs::write(folder.path().join("file"), "content").unwrap();
    fs::write(folder.path().join("secret"), "secret").unwrap();
    let options = Options { verify: true, on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let node = source.look_up(1, b"file").unwrap();
    let secret = source.look_up(1, b"secret").unwrap();
    let good = source.fs.save().unwrap();
    let handle = |node: u64| good.inodes.iter().find(|inode| inode.node == node).unwrap().handle.clone();
    if handle(node).is_none() {
        return;
    }
    let with = |change: &dyn Fn(&mut lanefsd::migration::Inode)| {
        let mut snapshot = good.clone();
        snapshot.inodes.iter_mut().filter(|inode| inode.node == node).for_each(change);
        let target = Share::new(folder.path(), &options);
        target.load(snapshot).map(|()| target.size(node))
    };
    assert_eq!(with(&|_| {}), Ok(Ok(7)));
    // The same inode number, used again.
    assert_eq!(with(&|inode| inode.handle.as_mut().unwrap().bytes[0] ^= 1), Ok(Err(Errno::STALE)));
    assert_eq!(with(&|inode| inode.handle = handle(secret)), Ok(Err(Errno::STALE)));
    assert_eq!(
        with(&|inode| inode.location = Location::Handle(handle(secret).unwrap())),
        Ok(Err(Errno::STALE))
    );
}

#[test]
fn paths_that_others_change_are_confirmed_at_the_end() {
    let _alone = alone();
    let folder = directory();
    let source = Share::new(folder.path(), &Options { confirm: true, ..Options::default() });
    source.begin();
    let node = source.create_closed(1, b"before").unwrap();
    source.fs.prepare_save();
    source.wait_until_prepared();
    fs::rename(folder.path().join("before"), folder.path().join("after")).unwrap();
    let snapshot = source.fs.save().unwrap();
    let saved = snapshot.inodes.iter().find(|inode| inode.node == node).unwrap();
    assert_eq!(saved.location, Location::Child { parent: 1, name: b"after".to_vec() });
}

#[test]
fn more_inodes_than_descriptors_move() {
    let _alone = alone();
    if !guest::opens_handles() {
        return;
    }
    let folder = directory();
    for directory in 0..30 {
        let path = folder.path().join(format!("directory{directory}"));
        fs::create_dir(&path).unwrap();
        (0..100).for_each(|file| fs::write(path.join(format!("file{file}")), "").unwrap());
    }
    for (mode, on_error) in guest::ways() {
        let options = Options { mode, on_error, fds: 600, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let mut files = Vec::new();
        for directory in 0..30 {
            let parent = source.look_up(1, format!("directory{directory}").as_bytes()).unwrap();
            files.extend(
                (0..100).map(|file| source.look_up(parent, format!("file{file}").as_bytes()).unwrap()),
            );
        }
        let target = source.move_to(folder.path(), &options);
        for node in files {
            assert_eq!(target.size(node).unwrap(), 0, "{mode:?} {on_error:?}");
        }
    }
}

/// For a person who measures: `cargo test --release --test moves -- --ignored --nocapture measure`.
#[test]
#[ignore = "measures"]
fn measure() {
    use std::time::Instant;
    let _alone = alone();
    let folder = directory();
    for directory in 0..1000 {
        let path = folder.path().join(format!("directory{directory}"));
        fs::create_dir(&path).unwrap();
        for file in 0..100 {
            fs::write(path.join(format!("file-with-a-usual-name-{file}")), "").unwrap();
        }
    }
    for (mode, on_error) in guest::ways() {
        let options = Options { mode, on_error, fds: 8_000, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let mut open = 0;
        for directory in 0..1000 {
            let parent = source.look_up(1, format!("directory{directory}").as_bytes()).unwrap();
            for file in 0..100 {
                let node =
                    source.look_up(parent, format!("file-with-a-usual-name-{file}").as_bytes()).unwrap();
                if open < 1000 {
                    source.open(node).unwrap();
                    open += 1;
                }
            }
        }
        let times = |prepare: bool| {
            if prepare {
                source.fs.prepare_save();
                source.wait_until_prepared();
            }
            let begin = Instant::now();
            let snapshot = source.fs.save().unwrap();
            let saved = begin.elapsed();
            let begin = Instant::now();
            let config = lanefsd::migration::config::MigrationConfig::default();
            let state = lanefsd::migration::DeviceState { share: snapshot, queues: Vec::new() };
            let stream = lanefsd::migration::format::write(&state, &config).unwrap();
            let encoded = begin.elapsed();
            drop(state);
            let begin = Instant::now();
            let snapshot = lanefsd::migration::format::read(&stream, &config).unwrap().share;
            let decoded = begin.elapsed();
            let target = Share::new(folder.path(), &options);
            let begin = Instant::now();
            target.load(snapshot).unwrap();
            let loaded = begin.elapsed();
            println!(
                "{mode:?} {on_error:?} prepared {prepare}: save {saved:?}, encode {encoded:?}, decode {decoded:?}, load {loaded:?}"
            );
        };
        times(false);
        times(true);
    }
}
