//! Writers that make each block durable before they count it, and that go on after errors: what was counted has to be
//! there whatever has become of the storage meanwhile.
//!
//! Block `b` of writer `w` stands at `(b * writers + w) * block` of one file, which writers of several guests share. How
//! many blocks of each are durable stands in a file outside of the share, which somebody else can read at any time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{fill, pattern};

/// Between an error and the next attempt.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// The file
    file: PathBuf,
    /// Writers of all guests
    #[arg(long, default_value_t = 8)]
    writers: u64,
    /// The first writer of this guest
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Writers of this guest
    #[arg(long, default_value_t = 4)]
    here: u64,
    /// Bytes of a block
    #[arg(long, default_value_t = 65536)]
    block: u64,
    /// End when this file is there
    #[arg(long, default_value = "/tmp/stop")]
    until: PathBuf,
    /// Where the number of durable blocks of each writer is kept
    #[arg(long, default_value = "/tmp/durable")]
    counts: PathBuf,
    /// For `verify`: how many blocks of each writer are durable
    #[arg(long, value_delimiter = ',')]
    durable: Vec<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Write until told to end; prints for each writer its blocks, the longest time without one, and its errors
    Write,
    /// Print how many blocks are durable so far
    Counts,
    /// Check every byte
    Verify,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.writers > 0 && options.block > 0, "--writers and --block must not be 0");
    match options.action {
        Action::Write => write_all(&options),
        Action::Counts => print_counts(&options),
        Action::Verify => verify(&options),
    }
}

fn write_all(options: &Options) -> Result<()> {
    let counts = File::create(&options.counts)?;
    scope(|scope| {
        let counts = &counts;
        let writer = |number| scope.spawn(move || write(options, options.first + number, number, counts));
        let writers: Vec<_> = (0..options.here).map(writer).collect();
        for writer in writers {
            println!("{}", writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??);
        }
        Ok(())
    })
}

/// What a writer has met.
#[derive(Default)]
struct Met {
    durable: u64,
    longest: Duration,
    errors: u64,
    last: i32,
}

fn write(options: &Options, writer: u64, number: u64, counts: &File) -> Result<String> {
    let (mut met, mut file) = (Met::default(), None);
    let mut since = Instant::now();
    let mut data = vec![0; usize::try_from(options.block)?];
    while !options.until.exists() {
        let offset = offset(options, writer, met.durable)?;
        fill(&mut data, writer, offset);
        match write_one(&options.file, &mut file, &data, offset) {
            Ok(()) => {
                met.durable += 1;
                met.longest = met.longest.max(since.elapsed());
                since = Instant::now();
                counts.write_all_at(&met.durable.to_le_bytes(), number * 8)?;
            }
            Err(error) => {
                (met.errors, met.last) = (met.errors + 1, error.raw_os_error().unwrap_or(-1));
                file = None;
                sleep(PAUSE);
            }
        }
    }
    let Met { durable, longest, errors, last } = met;
    Ok(format!(
        "writer {writer} durable {durable} longest {} errors {errors} last {last}",
        longest.as_millis()
    ))
}

/// Writes one block, and makes it durable. After an error the caller drops the file, as a program does that opens it anew.
fn write_one(path: &Path, file: &mut Option<File>, data: &[u8], offset: u64) -> std::io::Result<()> {
    if file.is_none() {
        *file = Some(File::options().write(true).create(true).truncate(false).open(path)?);
    }
    let Some(file) = file else { return Ok(()) };
    file.write_all_at(data, offset)?;
    file.sync_data()
}

fn offset(options: &Options, writer: u64, block: u64) -> Result<u64> {
    let number = block.checked_mul(options.writers).and_then(|number| number.checked_add(writer));
    number.and_then(|number| number.checked_mul(options.block)).context("the file is too long")
}

fn print_counts(options: &Options) -> Result<()> {
    // None, if the writers have not begun.
    let bytes = match std::fs::read(&options.counts) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes?,
    };
    let word = |chunk: &[u8]| chunk.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let mut counts: Vec<u64> = bytes.chunks(8).map(word).collect();
    counts.resize(usize::try_from(options.here)?, 0);
    println!("{}", counts.iter().map(u64::to_string).collect::<Vec<_>>().join(","));
    Ok(())
}

fn verify(options: &Options) -> Result<()> {
    let file = File::open(&options.file)?;
    let size = file.metadata()?.len();
    let mut data = vec![0; usize::try_from(options.block)?];
    let (mut checked, mut wrong) = (0_u64, Vec::new());
    for number in 0..size.div_ceil(options.block) {
        let (writer, block) = (number % options.writers, number / options.writers);
        let at = number * options.block;
        let len = usize::try_from(options.block.min(size - at))?;
        let bytes = data.get_mut(..len).context("a block is too long")?;
        file.read_exact_at(bytes, at).with_context(|| format!("reading {len} bytes at {at} failed"))?;
        let durable = options.durable.get(usize::try_from(writer)?).copied().unwrap_or_default();
        // What was not acknowledged may be there, wholly or in part, and is nothing else.
        let is_wrong =
            |(at, byte): &(u64, &u8)| **byte != pattern(writer, *at) && (block < durable || **byte != 0);
        let found: Vec<_> = (at..).zip(bytes.iter()).filter(is_wrong).collect();
        if let [(first, byte), ..] = *found {
            let last = found.last().map_or(first, |(last, _)| *last);
            wrong.push(format!(
                "block {block} of writer {writer} with {durable} durable: {} bytes from {first} to {last}, the first is {byte:#x}",
                found.len()
            ));
        }
        checked += u64::from(block < durable);
    }
    ensure!(wrong.is_empty(), "{} wrong blocks in {size} bytes: {}", wrong.len(), wrong.join("; "));
    let all: u64 = options.durable.iter().sum();
    ensure!(checked == all, "{checked} durable blocks are there of {all}; the file has {size} bytes");
    println!("verified {checked} durable blocks");
    Ok(())
}
