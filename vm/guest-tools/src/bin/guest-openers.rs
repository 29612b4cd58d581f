//! Many processes create, open, close and unlink a few files, with and without O_DIRECT, so that
//! openers of one file meet all the time. What each wrote and read has to be right meanwhile.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lanefsd_guest_tools::{Buffer, Rng, Writers, fill, pattern, wait_for_start};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// The directory
    directory: PathBuf,
    /// Processes
    #[arg(long, default_value_t = 8)]
    openers: u64,
    /// Files
    #[arg(long, default_value_t = 3)]
    files: u64,
    /// How long, in milliseconds
    #[arg(long, default_value_t = 3000)]
    time: u64,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

/// Bytes of the block that each process has in each file.
const BLOCK: u64 = 4096;

fn main() -> Result<()> {
    let options = Options::parse();
    match options.one {
        None => Writers::spawn(options.openers)?.run(),
        Some(opener) => open_and_close(&options, opener),
    }
}

fn open_and_close(options: &Options, opener: u64) -> Result<()> {
    let mut buffer = Buffer::new(usize::try_from(BLOCK)?)?;
    let mut rng = Rng::new(opener + 1);
    wait_for_start()?;
    let end = Instant::now() + Duration::from_millis(options.time);
    while Instant::now() < end {
        let path = options.directory.join(rng.below(options.files).to_string());
        if rng.below(8) == 0 {
            ignore(std::fs::remove_file(&path), ErrorKind::NotFound).context("unlinking failed")?;
            continue;
        }
        let how = File::options()
            .read(true)
            .write(true)
            .create(rng.below(2) == 0)
            .custom_flags(if rng.below(2) == 0 { libc::O_DIRECT } else { 0 })
            .open(&path);
        if let Some(file) = ignore(how, ErrorKind::NotFound).context("opening failed")? {
            use_block(&file, &mut buffer, opener)?;
        }
    }
    Ok(())
}

/// Writes this process's block and reads it back.
fn use_block(file: &File, buffer: &mut Buffer, opener: u64) -> Result<()> {
    let offset = opener * BLOCK;
    fill(buffer, opener, offset);
    file.write_all_at(buffer, offset).context("writing failed")?;
    buffer.fill(0);
    file.read_exact_at(buffer, offset).context("reading failed")?;
    let right = buffer.iter().zip(offset..).all(|(byte, at)| *byte == pattern(opener, at));
    ensure!(right, "process {opener} reads something else than it wrote");
    Ok(())
}

/// The value, or nothing after an error of this kind.
fn ignore<T>(result: std::io::Result<T>, kind: ErrorKind) -> std::io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == kind => Ok(None),
        other => other.map(Some),
    }
}
