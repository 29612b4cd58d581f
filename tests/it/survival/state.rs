//! State files of released versions, which an upgrade meets.
//!
//! `tests/it/survival/data/state-VERSION` holds one of each version of the format: the size, and then each line of 64 bytes
//! that is not zero, with its offset, all in hexadecimal digits. Before a release with a new format, make its file:
//! `cargo test --test it -- --ignored keep_the_state_of_this_version`.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use lanefsd::state_file::{
    HandleEntry, HandleRecord, InodeEntry, InodeRecord, Journal, Place, Slab, StateError, StateFile, VERSION,
};

const LINE: usize = 64;
const PLACE: Place = Place { descriptors: 0x1000, available: 0x2000, used: 0x3000, size: 8 };

fn inode() -> InodeEntry {
    InodeEntry {
        node: 2,
        lookups: 3,
        ino: 5,
        device: 8 << 20 | 1,
        mount: 30,
        generation: 4,
        kind: 8,
        descriptor: Some(1000),
    }
}

fn handle() -> HandleEntry {
    HandleEntry { id: 7, node: 2, descriptor: Some(1001), open_flags: 2, mode: 1, inode_mode: 0 }
}

/// A session with an inode, an open file, and two requests in flight, one of which has begun.
fn made() -> Arc<StateFile> {
    let state = StateFile::create_shared().unwrap();
    state.set_session(45, 0x1234);
    let inodes = Slab::<InodeRecord>::new(&state);
    inodes.get(inodes.take().unwrap()).store(&inode(), 0);
    let handles = Slab::<HandleRecord>::new(&state);
    handles.get(handles.take().unwrap()).store(&handle());
    let journal = Journal::new(&state, 1);
    journal.start(PLACE, 0, 0);
    assert!(journal.take(3));
    journal.begin_request(3, 77, 1, 40);
    assert!(journal.take(4));
    state
}

fn path(version: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/survival/data/state-{version}"))
}

/// A file with the bytes of one that was kept.
fn kept(version: u32) -> File {
    let text = fs::read_to_string(path(version)).unwrap();
    let mut lines = text.lines();
    let file = tempfile::tempfile().unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    file.set_len(number(lines.next().unwrap())).unwrap();
    for line in lines {
        let (offset, digits) = line.split_once(' ').unwrap();
        let bytes: Vec<u8> =
            (0..LINE).map(|byte| u8::from_str_radix(&digits[2 * byte..2 * byte + 2], 16).unwrap()).collect();
        file.write_all_at(&bytes, number(offset)).unwrap();
    }
    file
}

#[test]
#[ignore = "makes a file of the project"]
fn keep_the_state_of_this_version() {
    let state = made();
    let file: File = rustix::io::dup(state.file().as_fd()).unwrap().into();
    let size = file.metadata().unwrap().size();
    let mut text = format!("{size:x}\n");
    let mut offset = 0;
    // Only what has memory.
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(offset)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        for line in (data..end).step_by(LINE) {
            let mut bytes = [0; LINE];
            file.read_exact_at(&mut bytes, line).unwrap();
            if bytes != [0; LINE] {
                let digits = bytes.iter().fold(String::new(), |mut text, byte| {
                    write!(text, "{byte:02x}").unwrap();
                    text
                });
                writeln!(text, "{line:x} {digits}").unwrap();
            }
        }
        offset = end;
    }
    fs::create_dir_all(path(VERSION).parent().unwrap()).unwrap();
    fs::write(path(VERSION), text).unwrap();
}

#[test]
fn the_state_of_each_released_version_is_read_or_refused() {
    for version in 1..=VERSION {
        match StateFile::open(kept(version).into()) {
            Ok(state) => {
                assert_eq!(state.session(), (45, 0x1234));
                let inodes = Slab::<InodeRecord>::new(&state);
                let found: Vec<_> = inodes.used().filter_map(|index| inodes.get(index).load()).collect();
                assert_eq!(found, [inode()]);
                let handles = Slab::<HandleRecord>::new(&state);
                let found: Vec<_> = handles.used().filter_map(|index| handles.get(index).load()).collect();
                assert_eq!(found, [handle()]);
                let start = Journal::new(&state, 1).start(PLACE, 0, 0);
                let resumed: Vec<_> = start.resumed.iter().map(|chain| (chain.head, chain.unique)).collect();
                assert_eq!((start.next_available, resumed), (2, vec![(3, 77), (4, 0)]));
            }
            Err(error) => {
                assert!(
                    version != VERSION && matches!(error, StateError::Version { found } if found == version)
                );
            }
        }
    }
}

#[test]
fn the_state_of_a_version_to_come_is_refused() {
    let file = kept(VERSION);
    // Behind the eight bytes that say what it is.
    file.write_all_at(&(VERSION + 1).to_ne_bytes(), 8).unwrap();
    let error = StateFile::open(file.into()).unwrap_err();
    let sentence =
        format!("the state file has version {}, and this lanefsd reads version {VERSION}", VERSION + 1);
    assert_eq!(error.to_string(), sentence);
}
