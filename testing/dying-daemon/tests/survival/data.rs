//! Requests on the data of files.

use std::fs;

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::random::Random;

use crate::trial::{Trial, at_each_moment, errno};

/// More than a page, so that a request has many segments.
const LEN: usize = 100_000;

fn content(trial: &Trial) -> Vec<u8> {
    fs::read(trial.path("file")).unwrap()
}

/// A file of [`LEN`] random bytes, and what the scenario does to it; at the end it is released.
fn with_file(args: &[&str], scenario: impl Fn(&Trial, u64, u64, Vec<u8>)) {
    at_each_moment(args, |trial| {
        let data = Random::new(1).bytes(LEN);
        let (node, fh) = trial.file("file", &data);
        scenario(trial, node, fh, data);
        trial.client().release(node, fh).unwrap();
    });
}

/// The same by threads and by io_uring.
fn by_each_engine(scenario: impl Fn(&Trial, u64, u64, Vec<u8>)) {
    for args in [&[][..], &["--io-engine=io-uring"]] {
        with_file(args, &scenario);
    }
}

#[test]
fn read() {
    by_each_engine(|trial, node, fh, data| {
        trial.die("READ");
        assert_eq!(trial.client().read(node, fh, 1000, 50_000).unwrap(), data[1000..51_000]);
    });
}

#[test]
fn read_beyond_the_end() {
    by_each_engine(|trial, node, fh, data| {
        trial.die("READ");
        assert_eq!(trial.client().read(node, fh, 90_000, 50_000).unwrap(), data[90_000..]);
        assert_eq!(trial.client().read(node, fh, LEN as u64, 50_000).unwrap(), []);
    });
}

#[test]
fn write() {
    by_each_engine(|trial, node, fh, mut data| {
        let new = Random::new(2).bytes(30_000);
        trial.die("WRITE");
        assert_eq!(trial.client().write(node, fh, 33_333, &new).unwrap(), new.len());
        data[33_333..63_333].copy_from_slice(&new);
        assert!(content(trial) == data);
    });
}

#[test]
fn write_that_extends() {
    by_each_engine(|trial, node, fh, mut data| {
        let new = Random::new(2).bytes(30_000);
        trial.die("WRITE");
        assert_eq!(trial.client().write(node, fh, 90_000, &new).unwrap(), new.len());
        data.resize(120_000, 0);
        data[90_000..].copy_from_slice(&new);
        assert!(content(trial) == data);
        assert_eq!(trial.client().getattr(node).unwrap().size, 120_000);
    });
}

/// A write through a handle with O_APPEND; the data is there once.
fn append(args: &[&str], new: &[u8]) {
    with_file(args, |trial, node, _, mut data| {
        let client = trial.client();
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let fh = client.open(node, flags).unwrap().fh;
        trial.die("WRITE");
        let written = client.write_with(node, fh, LEN as u64, new, WriteFlags::empty(), flags).unwrap();
        assert_eq!(written, new.len());
        data.extend_from_slice(new);
        assert!(content(trial) == data, "{} bytes instead of {}", content(trial).len(), data.len());
        client.write_with(node, fh, data.len() as u64, b"end", WriteFlags::empty(), flags).unwrap();
        data.extend_from_slice(b"end");
        assert!(content(trial) == data);
        client.release(node, fh).unwrap();
    });
}

#[test]
fn append_once() {
    // More than is compared at once, too.
    for len in [30_000, 200_000] {
        append(&[], &Random::new(2).bytes(len));
    }
}

/// What is appended is what stands at the end before.
#[test]
fn append_of_zeros_behind_zeros() {
    at_each_moment(&[], |trial| {
        let (node, first) = trial.file("file", &[0; 1000]);
        let client = trial.client();
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let fh = client.open(node, flags).unwrap().fh;
        trial.die("WRITE");
        let written = client.write_with(node, fh, 1000, &[0; 1000], WriteFlags::empty(), flags);
        assert_eq!(written.unwrap(), 1000);
        assert_eq!(content(trial), [0; 2000]);
        client.release(node, first).unwrap();
        client.release(node, fh).unwrap();
    });
}

#[test]
fn append_to_an_empty_file() {
    at_each_moment(&[], |trial| {
        let (node, first) = trial.file("file", b"");
        let client = trial.client();
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let fh = client.open(node, flags).unwrap().fh;
        trial.die("WRITE");
        assert_eq!(client.write_with(node, fh, 0, b"x", WriteFlags::empty(), flags).unwrap(), 1);
        assert_eq!(content(trial), b"x");
        client.release(node, first).unwrap();
        client.release(node, fh).unwrap();
    });
}

#[test]
fn write_through_the_page_cache_of_the_guest() {
    with_file(&["--writeback", "--cache=auto"], |trial, node, fh, mut data| {
        trial.die("WRITE");
        let flags = WriteFlags::CACHE;
        let written = trial.client().write_with(node, fh, 4096, &[1; 4096], flags, libc::O_RDWR).unwrap();
        assert_eq!(written, 4096);
        data[4096..8192].fill(1);
        assert!(content(trial) == data);
    });
}

#[test]
fn fallocate_that_extends() {
    with_file(&[], |trial, node, fh, mut data| {
        trial.die("FALLOCATE");
        trial.client().fallocate(node, fh, 0, 90_000, 50_000).unwrap();
        data.resize(140_000, 0);
        assert!(content(trial) == data);
    });
}

#[test]
fn fallocate_that_keeps_the_size() {
    with_file(&[], |trial, node, fh, data| {
        trial.die("FALLOCATE");
        trial.client().fallocate(node, fh, libc::FALLOC_FL_KEEP_SIZE, 90_000, 50_000).unwrap();
        assert!(content(trial) == data);
    });
}

#[test]
fn fallocate_that_punches_a_hole() {
    with_file(&[], |trial, node, fh, mut data| {
        trial.die("FALLOCATE");
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        trial.client().fallocate(node, fh, mode, 8192, 40_000).unwrap();
        data[8192..48_192].fill(0);
        assert!(content(trial) == data);
    });
}

#[test]
fn fallocate_that_zeroes() {
    with_file(&[], |trial, node, fh, mut data| {
        let supported = trial.client().fallocate(node, fh, libc::FALLOC_FL_ZERO_RANGE, 0, 1).is_ok();
        data[0] = if supported { 0 } else { data[0] };
        trial.die("FALLOCATE");
        let result = trial.client().fallocate(node, fh, libc::FALLOC_FL_ZERO_RANGE, 8192, 40_000);
        if !supported {
            return assert_eq!(errno(result), libc::EOPNOTSUPP);
        }
        result.unwrap();
        data[8192..48_192].fill(0);
        assert!(content(trial) == data);
    });
}

#[test]
fn copy_file_range() {
    with_file(&[], |trial, node, fh, data| {
        let client = trial.client();
        let (to, to_fh) = trial.file("to", b"");
        trial.die("COPY_FILE_RANGE");
        assert_eq!(client.copy_file_range((node, fh, 1000), (to, to_fh, 10), 50_000).unwrap(), 50_000);
        let copied = fs::read(trial.path("to")).unwrap();
        assert!(copied[..10] == [0; 10] && copied[10..] == data[1000..51_000]);
        client.release(to, to_fh).unwrap();
    });
}

/// Parts of one file: a second copy of what was copied would be another one.
#[test]
fn copy_file_range_within_a_file() {
    with_file(&[], |trial, node, fh, mut data| {
        trial.die("COPY_FILE_RANGE");
        let copied = trial.client().copy_file_range((node, fh, 0), (node, fh, 60_000), 40_000).unwrap();
        data.copy_within(..copied, 60_000);
        assert!(copied > 0 && content(trial) == data);
    });
}

#[test]
fn lseek() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"begin");
        let client = trial.client();
        client.write(node, fh, 1 << 20, b"end").unwrap();
        trial.die("LSEEK");
        assert_eq!(client.lseek(node, fh, 8192, libc::SEEK_DATA).unwrap(), 1 << 20);
        assert_eq!(client.lseek(node, fh, 1 << 20, libc::SEEK_HOLE).unwrap(), (1 << 20) + 3);
        client.release(node, fh).unwrap();
    });
}

#[test]
fn syncfs() {
    at_each_moment(&[], |trial| {
        trial.die("SYNCFS");
        trial.client().syncfs(lanefsd_frontend::client::ROOT).unwrap();
    });
}
