//! What has no name any more.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

use lanefsd::config::InodeFileHandles;
use lanefsd::fs::FileSystem;
use lanefsd::migration::Location;
use lanefsd::migration::config::{Mode as MigrationMode, OnError};
use rustix::io::Errno;

use crate::guest::{self, Options, Share, alone, directory};

#[test]
fn an_unlinked_open_file_is_the_same_one_on_the_same_host() {
    let _alone = alone();
    if !guest::opens_handles() {
        return;
    }
    for mode in [MigrationMode::FileHandles, MigrationMode::Auto] {
        let folder = directory();
        let options = Options { mode, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let (node, handle) = source.create(1, b"file").unwrap();
        source.write(node, handle, 0, b"content").unwrap();
        let before = File::open(folder.path().join("file")).unwrap();
        source.unlink(1, b"file").unwrap();
        let target = source.move_to(folder.path(), &options);
        assert_eq!(target.read(node, handle).unwrap(), b"content");
        target.write(node, handle, 0, b"CON").unwrap();
        let mut bytes = [0; 7];
        before.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"CONtent");
        assert_eq!(target.links(node).unwrap(), 0);
    }
}

#[test]
fn without_handles_its_content_goes_along() {
    let _alone = alone();
    let folder = directory();
    let handles = InodeFileHandles::Never;
    let options = Options { handles, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let (node, handle) = source.create(1, b"file").unwrap();
    source.write(node, handle, 0, b"begin").unwrap();
    source.write(node, handle, 300_000, b"end").unwrap();
    let path = folder.path().join("file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2640)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(5_000_000).unwrap();
    source.unlink(1, b"file").unwrap();
    // A second file under the name is not taken for it.
    let second = source.create_closed(1, b"file").unwrap();

    let target = source.move_to(folder.path(), &options);
    assert_eq!(target.size(node).unwrap(), 5_000_000);
    assert_eq!(target.links(node).unwrap(), 0);
    assert_eq!(&target.read(node, handle).unwrap()[..6], b"begin\0");
    target.write(node, handle, 5, b"!").unwrap();
    assert_eq!(&target.read(node, handle).unwrap()[..6], b"begin!");
    assert_eq!(target.look_up(1, b"file").unwrap(), second);
    assert_eq!(fs::metadata(&path).unwrap().size(), 0);
    // And once more, from there.
    let third = target.move_to(folder.path(), &options);
    assert_eq!(&third.read(node, handle).unwrap()[..6], b"begin!");
    third.close(node, handle).unwrap();
    third.forget(node, 1);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_file_beyond_the_limit_follows_the_policy() {
    let _alone = alone();
    for on_error in [OnError::Abort, OnError::GuestError] {
        let folder = directory();
        let options =
            Options { on_error, unlinked_limit: 10, handles: InodeFileHandles::Never, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let (node, handle) = source.create(1, b"file").unwrap();
        let (other, other_handle) = source.create(1, b"other").unwrap();
        source.write(node, handle, 0, &[1; 100]).unwrap();
        source.unlink(1, b"file").unwrap();
        let snapshot = source.fs.save().unwrap();
        let target = Share::new(folder.path(), &options);
        match (target.load(snapshot), on_error) {
            (Err(error), OnError::Abort) => {
                assert!(error.to_string().contains("--migration-unlinked-limit"), "{error}")
            }
            (Ok(()), OnError::GuestError) => {
                assert_eq!(target.read(node, handle).unwrap_err(), Errno::IO);
                assert_eq!(target.size(node).unwrap_err(), Errno::STALE);
                target.write(other, other_handle, 0, b"as ever").unwrap();
            }
            (result, _) => panic!("{result:?}"),
        }
        source.fs.resume();
        assert_eq!(source.read(node, handle).unwrap(), [1; 100]);
    }
}

#[test]
fn a_removed_directory_is_lost_alone_or_kept_by_its_handle() {
    let _alone = alone();
    let all = [
        (MigrationMode::FindPaths, InodeFileHandles::Never),
        (MigrationMode::Auto, InodeFileHandles::Prefer),
    ];
    for (mode, handles) in all {
        if handles == InodeFileHandles::Prefer && !guest::opens_handles() {
            continue;
        }
        let folder = directory();
        let options = Options { mode, handles, on_error: OnError::GuestError, ..Options::default() };
        let source = Share::new(folder.path(), &options);
        source.begin();
        let made = source.make_directory(1, b"directory").unwrap();
        let open = source.open_directory(made).unwrap();
        let file = source.create_closed(1, b"file").unwrap();
        source.remove_directory(1, b"directory").unwrap();
        let target = source.move_to(folder.path(), &options);
        match handles {
            InodeFileHandles::Never => {
                assert_eq!(target.size(made).unwrap_err(), Errno::STALE);
                assert_eq!(target.list(made, open).unwrap_err(), Errno::IO);
            }
            _ => {
                assert_eq!(target.links(made).unwrap(), 0);
                assert_eq!(target.list(made, open), Err(Errno::NOENT));
                assert_eq!(target.create(made, b"new").unwrap_err(), Errno::NOENT);
            }
        }
        assert_eq!(target.size(file).unwrap(), 0);
    }
}

#[test]
fn a_second_name_of_a_file_is_not_lost_with_the_first() {
    let _alone = alone();
    let folder = directory();
    let options =
        Options { handles: InodeFileHandles::Never, on_error: OnError::GuestError, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let node = source.create_closed(1, b"first").unwrap();
    fs::hard_link(folder.path().join("first"), folder.path().join("second")).unwrap();
    assert_eq!(source.look_up(1, b"second").unwrap(), node);
    let snapshot = source.fs.save().unwrap();
    assert!(
        snapshot
            .inodes
            .iter()
            .any(|inode| inode.node == node && matches!(inode.location, Location::Child { .. }))
    );
    let target = Share::new(folder.path(), &options);
    target.load(snapshot).unwrap();
    assert_eq!(target.look_up(1, b"second").unwrap(), node);
    assert_eq!(target.look_up(1, b"first").unwrap(), node);
}

#[test]
fn what_was_removed_and_is_not_open_makes_no_migration_fail() {
    let _alone = alone();
    let folder = directory();
    let options =
        Options { handles: InodeFileHandles::Never, on_error: OnError::Abort, ..Options::default() };
    let source = Share::new(folder.path(), &options);
    source.begin();
    let file = source.create_closed(1, b"file").unwrap();
    let made = source.make_directory(1, b"directory").unwrap();
    let kept = source.create_closed(1, b"kept").unwrap();
    source.unlink(1, b"file").unwrap();
    source.remove_directory(1, b"directory").unwrap();
    let target = source.move_to(folder.path(), &options);
    for node in [file, made] {
        assert_eq!(target.size(node).unwrap_err(), Errno::STALE);
        target.forget(node, 1);
    }
    assert_eq!(target.size(kept).unwrap(), 0);
}
