//! Many processes write overlapping ranges of one file, and others read: no unit that all writes
//! cover as a whole may ever hold parts of two of them.
//!
//! The file is cut into units. Each write covers two neighbouring units with one number, its own,
//! in every word. Whatever the order, each unit then holds one number only: in the file at the end,
//! and in what a reader gets with one read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Buffer, Writers, open, wait_for_start};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// The file
    file: PathBuf,
    /// Processes that write
    #[arg(long, default_value_t = 8)]
    writers: u64,
    /// Processes that read
    #[arg(long, default_value_t = 2)]
    readers: u64,
    /// Bytes of a unit; a write has two
    #[arg(long, default_value_t = 16 << 10)]
    unit: u64,
    /// Units of the file
    #[arg(long, default_value_t = 6)]
    units: u64,
    /// How long to write, in milliseconds
    #[arg(long, default_value_t = 3000)]
    time: u64,
    /// Number that tells this run's writes from those of another guest
    #[arg(long, default_value_t = 1)]
    guest: u64,
    /// Open with O_DIRECT
    #[arg(long)]
    direct: bool,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Write and read for a time, then check
    Run,
    /// Check the file as it is
    Verify,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(
        options.unit >= 8 && options.unit % 8 == 0 && options.units >= 2,
        "there must be two units of words"
    );
    match (options.action, options.one) {
        (Action::Verify, _) => verify(&options),
        (Action::Run, None) => {
            let file = open(&options.file, false, false)?;
            if file.metadata()?.len() == 0 {
                file.set_len(options.unit * options.units)?;
            }
            Writers::spawn(options.writers + options.readers)?.run()?;
            verify(&options)
        }
        (Action::Run, Some(process)) if process < options.writers => write(&options, process),
        (Action::Run, Some(_)) => read(&options),
    }
}

fn write(options: &Options, process: u64) -> Result<()> {
    let file = open(&options.file, options.direct, false)?;
    let mut buffer = Buffer::new(usize::try_from(2 * options.unit)?)?;
    let mut random = (options.guest << 32 | process).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    wait_for_start()?;
    let end = Instant::now() + Duration::from_millis(options.time);
    let mut count = 0u64;
    while Instant::now() < end {
        count += 1;
        let number = options.guest << 48 | process << 32 | count;
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let first = random % (options.units - 1);
        file.write_all_at(&buffer, first * options.unit).context("a write failed")?;
    }
    ensure!(count > 1, "a writer came to no second write");
    Ok(())
}

fn read(options: &Options) -> Result<()> {
    let file = open(&options.file, options.direct, false)?;
    let mut buffer = Buffer::new(usize::try_from(options.unit)?)?;
    wait_for_start()?;
    let end = Instant::now() + Duration::from_millis(options.time);
    let mut unit = 0;
    while Instant::now() < end {
        check(&file, &mut buffer, unit, options.unit)?;
        unit = (unit + 1) % options.units;
    }
    Ok(())
}

fn verify(options: &Options) -> Result<()> {
    let file = open(&options.file, options.direct, false)?;
    let mut buffer = Buffer::new(usize::try_from(options.unit)?)?;
    for unit in 0..options.units {
        check(&file, &mut buffer, unit, options.unit)?;
    }
    println!("verified {} units of {} bytes", options.units, options.unit);
    Ok(())
}

/// Reads one unit at once and checks that all its words are the same.
fn check(file: &File, buffer: &mut Buffer, unit: u64, size: u64) -> Result<()> {
    let read = file.read_at(buffer, unit * size).context("a read failed")?;
    ensure!(read as u64 == size, "unit {unit} gave {read} bytes");
    let (first, _) = buffer.split_at(8);
    if let Some(place) = buffer.chunks_exact(8).position(|word| word != first) {
        let other = buffer.chunks_exact(8).nth(place).unwrap_or_default();
        anyhow::bail!(
            "unit {unit} holds {first:x?} and, from word {place} on, {other:x?}: a mix of two writes"
        );
    }
    Ok(())
}
