//! Reports of upgrades: a memory file of the supervisor, in which others see what has become of a SIGHUP.
//!
//! The file is found by its name among the descriptors of the process. So whoever may see those may read it, and no path
//! or socket is needed. Its form stays the same in all versions:
//!
//! | bytes | what |
//! |---|---|
//! | 0 to 7 | reports so far, a little-endian number, which is written last |
//! | 8 to 4095 | the last report, as JSON, and then zeros |
//! | from 4096 on | output of the program that is checked |

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use serde::{Deserialize, Serialize};

/// The name of the file.
const NAME: &str = "lanefsd-upgrade";
/// Where the report begins, and where the output.
const TEXT: u64 = 8;
const OUTPUT: u64 = 4096;
/// Bytes of a program's output that are read.
const MAX_OUTPUT: usize = 1024;

/// What has become of an upgrade.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// Why it did not happen.
    pub error: Option<String>,
    /// The version before it.
    pub from: String,
    /// The version after it.
    pub to: String,
}

/// The file.
#[derive(Debug)]
pub struct Reports(File);

impl Reports {
    /// A new file, without a report.
    pub fn create() -> rustix::io::Result<Reports> {
        let file = memfd_create(NAME, MemfdFlags::CLOEXEC)?;
        ftruncate(&file, OUTPUT)?;
        Ok(Reports(file.into()))
    }

    /// The reports of a process; `None` if it has none, as every other program, or if the caller may not see it.
    pub fn of_process(pid: u32) -> Option<Reports> {
        let folder = format!("/proc/{pid}/fd");
        let entries = std::fs::read_dir(folder).ok()?.flatten();
        let begin = format!("/memfd:{NAME}");
        let is_it = |path: &std::path::Path| {
            std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with(&begin))
        };
        let path = entries.map(|entry| entry.path()).find(|path| is_it(path))?;
        File::open(path).ok().map(Reports)
    }

    /// How many there were.
    pub fn count(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The last one.
    pub fn last(&self) -> io::Result<Outcome> {
        let mut bytes = vec![0; usize::try_from(OUTPUT - TEXT).unwrap_or(0)];
        self.0.read_exact_at(&mut bytes, TEXT)?;
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let outcome: Outcome = serde_json::from_slice(bytes.get(..len).unwrap_or_default())?;
        // The serving process could write here, too, and the caller prints it.
        let plain = |text: String| text.chars().filter(|letter| !letter.is_control()).collect::<String>();
        Ok(Outcome { error: outcome.error.map(plain), from: plain(outcome.from), to: plain(outcome.to) })
    }

    /// Adds one.
    pub fn add(&self, outcome: &Outcome) -> io::Result<()> {
        let mut text = serde_json::to_vec(outcome)?;
        // A sentence is much shorter.
        text.resize(usize::try_from(OUTPUT - TEXT).unwrap_or(0), 0);
        self.0.write_all_at(&text, TEXT)?;
        self.0.write_all_at(&self.count()?.wrapping_add(1).to_le_bytes(), 0)
    }

    /// Makes room for the output of a program that writes to the file.
    pub fn prepare_output(&self) -> rustix::io::Result<()> {
        ftruncate(&self.0, OUTPUT)?;
        seek(&self.0, SeekFrom::Start(OUTPUT)).map(drop)
    }

    /// The first line of that output that is not empty.
    pub fn output(&self) -> String {
        let mut bytes = [0; MAX_OUTPUT];
        let read = self.0.read_at(&mut bytes, OUTPUT).unwrap_or(0);
        let text = String::from_utf8_lossy(bytes.get(..read).unwrap_or_default());
        let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        line.chars().filter(|letter| !letter.is_control()).collect()
    }
}

impl From<OwnedFd> for Reports {
    fn from(file: OwnedFd) -> Reports {
        Reports(file.into())
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Reports {
    /// The number of its descriptor.
    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_report_is_seen_by_another_process() {
        let reports = Reports::create().unwrap();
        let other = Reports::of_process(std::process::id()).unwrap();
        assert_eq!(other.count().unwrap(), 0);
        for number in 1..4 {
            let outcome = Outcome { error: Some(format!("no {number}")), ..Outcome::default() };
            reports.add(&outcome).unwrap();
            assert_eq!((other.count().unwrap(), other.last().unwrap()), (number, outcome));
        }
        reports.prepare_output().unwrap();
        (&reports.0).write_all(b"\n what\x1b is wrong\nmore").unwrap();
        assert_eq!(reports.output(), "what is wrong");
        reports.prepare_output().unwrap();
        assert_eq!((reports.output(), other.count().unwrap()), (String::new(), 3));
    }
}
