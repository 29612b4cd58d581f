//! Locks of every kind: held until this process is gone, looked for, or taken in turns by many.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Writers, open, wait_for_start};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// The file; each kind of lock has one of its own, with the kind's name at its end
    file: PathBuf,
    /// Processes that count
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// How often each of them takes each kind of lock
    #[arg(long, default_value_t = 50)]
    rounds: u64,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Take all locks, say so, and wait to be killed
    Hold,
    /// Fail unless all locks can be had at once
    Free,
    /// Fail if any lock can be had
    Held,
    /// Many processes add one to the number in the file, under each kind of lock
    Count,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Flock,
    Posix,
    OpenFile,
}

const KINDS: [Kind; 3] = [Kind::Flock, Kind::Posix, Kind::OpenFile];

fn main() -> Result<()> {
    let options = Options::parse();
    match (options.action, options.one) {
        (Action::Hold, _) => hold(&options.file),
        (Action::Free, _) => check(&options.file, true),
        (Action::Held, _) => check(&options.file, false),
        (Action::Count, None) => Writers::spawn(options.writers)?.run(),
        (Action::Count, Some(_)) => count(&options),
    }
}

/// The file of a kind of lock.
fn file_of(file: &Path, kind: Kind) -> Result<File> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!("-{kind:?}").to_lowercase());
    open(Path::new(&name), false, false)
}

/// Takes an exclusive lock of the whole file, or gives it back; returns whether that was possible.
fn lock(file: &File, kind: Kind, take: bool, wait: bool) -> Result<bool> {
    let descriptor = file.as_raw_fd();
    let wanted = if take { libc::F_WRLCK } else { libc::F_UNLCK };
    let done = match kind {
        Kind::Flock => {
            let what = if take { libc::LOCK_EX } else { libc::LOCK_UN };
            // SAFETY: an open descriptor, and no memory.
            unsafe { libc::flock(descriptor, if wait { what } else { what | libc::LOCK_NB }) }
        }
        Kind::Posix | Kind::OpenFile => {
            let command = match (kind, wait) {
                (Kind::Posix, true) => libc::F_SETLKW,
                (Kind::Posix, false) => libc::F_SETLK,
                (_, true) => libc::F_OFD_SETLKW,
                (_, false) => libc::F_OFD_SETLK,
            };
            let whole = libc::flock {
                l_type: libc::c_short::try_from(wanted)?,
                l_whence: libc::c_short::try_from(libc::SEEK_SET)?,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            // SAFETY: an open descriptor, and a structure that lives through the call.
            unsafe { libc::fcntl(descriptor, command, &raw const whole) }
        }
    };
    if done == 0 {
        return Ok(true);
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) if !wait => Ok(false),
        _ => Err(error).with_context(|| format!("locking ({kind:?}) failed")),
    }
}

fn hold(file: &Path) -> Result<()> {
    let mut files = Vec::new();
    for kind in KINDS {
        let file = file_of(file, kind)?;
        ensure!(lock(&file, kind, true, false)?, "{kind:?} is locked by another");
        files.push(file);
    }
    println!("held");
    std::io::stdout().flush()?;
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn check(file: &Path, free: bool) -> Result<()> {
    for kind in KINDS {
        let file = file_of(file, kind)?;
        let got = lock(&file, kind, true, false)?;
        ensure!(got == free, "{kind:?}: locked {}", if got { "by nobody" } else { "by another" });
    }
    Ok(())
}

fn count(options: &Options) -> Result<()> {
    let files = KINDS
        .into_iter()
        .map(|kind| Ok((kind, file_of(&options.file, kind)?)))
        .collect::<Result<Vec<_>>>()?;
    wait_for_start()?;
    for _ in 0..options.rounds {
        for (kind, file) in &files {
            lock(file, *kind, true, true)?;
            let mut number = [0; 8];
            // An empty file counts as 0.
            let there = file.read_at(&mut number, 0)?;
            ensure!(there == 0 || there == number.len(), "{there} bytes of a number");
            file.write_all_at(&(u64::from_le_bytes(number) + 1).to_le_bytes(), 0)?;
            lock(file, *kind, false, true)?;
        }
    }
    Ok(())
}
