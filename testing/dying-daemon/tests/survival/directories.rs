//! Requests on open directories: a listing goes on where it was, and has each entry once.

use std::collections::BTreeSet;
use std::fs;

use lanefsd_frontend::client::{DirEntry, ROOT};

use crate::trial::{Moment, Trial, at_each_moment, errno};

const FILES: usize = 300;

fn make_files(trial: &Trial) {
    for number in 0..FILES {
        fs::write(trial.path(&format!("file-{number}")), "").unwrap();
    }
}

/// A listing under way.
struct Listing {
    fh: u64,
    plus: bool,
    offset: u64,
    names: Vec<Vec<u8>>,
}

impl Listing {
    fn begin(trial: &Trial, plus: bool) -> Listing {
        Listing { fh: trial.client().opendir(ROOT).unwrap().fh, plus, offset: 0, names: Vec::new() }
    }

    /// Reads one piece; returns whether there was one.
    fn go_on(&mut self, trial: &Trial, size: usize) -> bool {
        let entries: Vec<DirEntry> = match self.plus {
            true => trial.client().readdirplus(ROOT, self.fh, self.offset, size).unwrap(),
            false => trial.client().readdir(ROOT, self.fh, self.offset, size).unwrap(),
        };
        for entry in &entries {
            self.offset = entry.offset;
            self.names.push(entry.name.clone());
            if let Some(found) = entry.entry.filter(|found| found.nodeid != 0) {
                trial.saw(found);
            }
        }
        !entries.is_empty()
    }

    /// Reads all the rest, and checks the whole.
    fn end(mut self, trial: &Trial) {
        while self.go_on(trial, 4096) {}
        let different: BTreeSet<&[u8]> = self.names.iter().map(Vec::as_slice).collect();
        assert_eq!(self.names.len(), different.len(), "entries came twice");
        assert_eq!(different.iter().filter(|name| name.starts_with(b"file-")).count(), FILES);
        trial.client().releasedir(ROOT, self.fh).unwrap();
    }
}

#[test]
fn opendir() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        trial.die("OPENDIR");
        Listing::begin(trial, false).end(trial);
    });
}

#[test]
fn readdir() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        let mut listing = Listing::begin(trial, false);
        listing.go_on(trial, 4096);
        trial.die("READDIR");
        listing.end(trial);
    });
}

#[test]
fn readdirplus() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        let mut listing = Listing::begin(trial, true);
        listing.go_on(trial, 4096);
        trial.die("READDIR");
        listing.end(trial);
    });
}

/// In pieces of other sizes, so that the last entry of a piece often finds no room and is taken back.
#[test]
fn readdirplus_in_odd_pieces() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        let mut listing = Listing::begin(trial, true);
        for size in [300, 700, 1100] {
            listing.go_on(trial, size);
        }
        trial.die("READDIR");
        for size in [1900, 333, 12_345] {
            listing.go_on(trial, size);
        }
        listing.end(trial);
    });
}

/// A listing of many entries with attributes in one request.
#[test]
fn readdirplus_of_all_at_once() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        let mut listing = Listing::begin(trial, true);
        trial.die("READDIR");
        listing.go_on(trial, 256 << 10);
        assert!(listing.names.len() >= FILES);
        listing.end(trial);
    });
}

#[test]
fn an_open_directory_goes_on_where_it_was() {
    at_each_moment(&[], |trial| {
        make_files(trial);
        let mut plain = Listing::begin(trial, false);
        let mut plus = Listing::begin(trial, true);
        plain.go_on(trial, 2000);
        plus.go_on(trial, 8000);
        trial.die("GETATTR");
        trial.client().getattr(ROOT).unwrap();
        plain.end(trial);
        plus.end(trial);
    });
}

#[test]
fn releasedir() {
    at_each_moment(&[], |trial| {
        let client = trial.client();
        let fh = client.opendir(ROOT).unwrap().fh;
        trial.die("RELEASEDIR");
        client.releasedir(ROOT, fh).unwrap();
        assert_eq!(errno(client.readdir(ROOT, fh, 0, 4096)), libc::EBADF);
    });
}

#[test]
fn fsyncdir() {
    at_each_moment(&[], |trial| {
        let client = trial.client();
        let fh = client.opendir(ROOT).unwrap().fh;
        trial.die("FSYNCDIR");
        let result = client.fsyncdir(ROOT, fh);
        // As for FSYNC, an error of the disk may have gone with the worker.
        if matches!(trial.moment, Moment::Before | Moment::After) && result.is_err() {
            assert_eq!(errno(result), libc::EIO);
        } else {
            result.unwrap();
        }
        client.fsyncdir(ROOT, fh).unwrap();
        client.releasedir(ROOT, fh).unwrap();
    });
}
