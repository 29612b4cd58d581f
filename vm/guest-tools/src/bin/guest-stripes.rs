//! Many processes write one file, each its own stripes: stripe `s` belongs to writer `s % writers`.
//! Others may watch meanwhile: what a writer has been told is written has to be there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Buffer, Writers, fill, limit_file_size, open, pattern, wait_for_start};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// The file
    file: PathBuf,
    /// Processes that write
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// Bytes of the whole file
    #[arg(long, default_value_t = 64 << 20)]
    size: u64,
    /// Bytes of one write
    #[arg(long, default_value_t = 128 << 10)]
    stripe: u64,
    /// Open with O_DIRECT
    #[arg(long)]
    direct: bool,
    /// Begin with an empty file instead of one of full size
    #[arg(long)]
    extend: bool,
    /// Take the file as it is: another guest writes it as well
    #[arg(long, conflicts_with = "extend")]
    as_is: bool,
    /// Each writer has a file of its own, FILE.NUMBER, which holds its stripes one after the other
    #[arg(long)]
    files: bool,
    /// Processes that read while others write; needs --progress
    #[arg(long, default_value_t = 0)]
    watchers: u64,
    /// Directory in which a file for each writer grows by a byte with each stripe that is written
    #[arg(long)]
    progress: Option<PathBuf>,
    /// A writer ends at its first error and says which one it was; that is no failure
    #[arg(long)]
    tolerate: bool,
    /// Bytes that the first writer may write to a file at most (RLIMIT_FSIZE)
    #[arg(long)]
    limit_first: Option<u64>,
    /// Check only the first stripes of each writer: as many as this list says, from writer 0 on
    #[arg(long, value_delimiter = ',')]
    done: Vec<u64>,
    /// Only these writers write; the others are in another guest
    #[arg(long, value_delimiter = ',')]
    only: Vec<u64>,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Write, and print the time it took
    Write,
    /// Check every byte
    Verify,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.writers > 0 && options.stripe > 0, "--writers and --stripe must not be 0");
    match (options.action, options.one) {
        (Action::Verify, _) => verify(&options),
        (Action::Write, None) => write_all(&options),
        (Action::Write, Some(writer)) if writer < options.writers => write_one(&options, writer),
        (Action::Write, Some(_)) => watch(&options),
    }
}

fn write_all(options: &Options) -> Result<()> {
    let files = if options.files { options.writers } else { 1 };
    for number in 0..files {
        prepare(options, &path(options, number), options.size.div_ceil(files))?;
    }
    if let Some(folder) = &options.progress {
        std::fs::create_dir_all(folder)?;
        for writer in 0..options.writers {
            File::create(folder.join(writer.to_string()))?;
        }
    }
    let writers = Writers::spawn(options.writers + options.watchers)?;
    let start = Instant::now();
    writers.run()?;
    println!("bytes {} seconds {:.6}", options.size, start.elapsed().as_secs_f64());
    Ok(())
}

/// Makes a file empty, or `size` bytes long.
fn prepare(options: &Options, path: &Path, size: u64) -> Result<()> {
    if options.as_is {
        return Ok(());
    }
    let file = open(path, false, false)?;
    if options.extend {
        file.set_len(0)?;
    } else if file.metadata()?.len() != size {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)
            .context("the file cannot be allocated")?;
    }
    Ok(())
}

/// The file that a writer writes.
fn path(options: &Options, writer: u64) -> PathBuf {
    match options.files {
        true => PathBuf::from(format!("{}.{writer}", options.file.display())),
        false => options.file.clone(),
    }
}

fn write_one(options: &Options, writer: u64) -> Result<()> {
    let file = open(&path(options, writer), options.direct, false)?;
    let mut progress = options.progress.as_ref().map(|folder| append_to(&folder.join(writer.to_string())));
    if let (0, Some(limit)) = (writer, options.limit_first) {
        limit_file_size(limit)?;
    }
    let mut buffer = Buffer::new(usize::try_from(options.stripe)?)?;
    let mut highest = 0;
    wait_for_start()?;
    if !options.only.is_empty() && !options.only.contains(&writer) {
        return Ok(());
    }
    for (offset, len) in stripes(options).filter(|(offset, _)| owner(options, *offset) == writer) {
        let data = buffer.get_mut(..usize::try_from(len)?).context("a stripe is too long")?;
        fill(data, writer, offset);
        let offset = if options.files { own_offset(options, offset) } else { offset };
        if let Err(error) = file.write_all_at(data, offset) {
            ensure!(options.tolerate, "writing {len} bytes at {offset} failed: {error}");
            // In one piece, since others have something to say as well.
            let line = format!("writer {writer} error {}\n", error.raw_os_error().unwrap_or_default());
            std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())?;
            return Ok(());
        }
        if let Some(progress) = &mut progress {
            std::io::Write::write_all(progress.as_mut().map_err(|error| anyhow::anyhow!("{error}"))?, b".")?;
        }
        // The file never ends before what this process has written.
        let size = file.metadata()?.len();
        highest = highest.max(offset + len);
        ensure!(size >= highest, "the file has {size} bytes after a write up to {highest}");
    }
    Ok(())
}

fn append_to(path: &Path) -> std::io::Result<File> {
    File::options().append(true).open(path)
}

/// Reads what writers have finished, until all of it is; the size must never get smaller.
fn watch(options: &Options) -> Result<()> {
    let folder = options.progress.as_ref().context("--watchers needs --progress")?;
    let file = File::open(&options.file)?;
    let total = options.size.div_ceil(options.stripe);
    let mut buffer = vec![0; usize::try_from(options.stripe)?];
    let (mut largest, mut round) = (0, 0_u64);
    wait_for_start()?;
    loop {
        let mut finished = 0;
        for writer in 0..options.writers {
            let done = std::fs::metadata(folder.join(writer.to_string()))?.len();
            finished += done;
            if done == 0 {
                continue;
            }
            round += 1;
            // The latest half of the time, any other one the other half.
            let number = if round.is_multiple_of(2) { done - 1 } else { round * 7919 % done };
            let offset = (number * options.writers + writer) * options.stripe;
            let len = options.stripe.min(options.size - offset);
            let size = file.metadata()?.len();
            ensure!(size >= largest, "the file shrank from {largest} to {size} bytes");
            ensure!(size >= offset + len, "the file has {size} bytes after a write up to {}", offset + len);
            largest = size;
            check(&file, &mut buffer, writer, offset, len)?;
        }
        if finished >= total {
            return Ok(());
        }
    }
}

/// Where a stripe is in its writer's own file.
fn own_offset(options: &Options, offset: u64) -> u64 {
    offset / options.stripe / options.writers * options.stripe
}

/// The writer that a stripe belongs to.
fn owner(options: &Options, offset: u64) -> u64 {
    (offset / options.stripe) % options.writers
}

/// Reads a stripe and compares it with what its writer wrote.
fn check(file: &File, buffer: &mut [u8], writer: u64, offset: u64, len: u64) -> Result<()> {
    let data = buffer.get_mut(..usize::try_from(len)?).context("a stripe is too long")?;
    file.read_exact_at(data, offset).with_context(|| format!("reading {len} bytes at {offset} failed"))?;
    if let Some((at, byte)) = (offset..).zip(data.iter()).find(|(at, byte)| **byte != pattern(writer, *at)) {
        bail!("byte {at} is {byte:#x} instead of {:#x} of writer {writer}", pattern(writer, at));
    }
    Ok(())
}

/// Offset and length of each stripe.
fn stripes(options: &Options) -> impl Iterator<Item = (u64, u64)> {
    let (size, stripe) = (options.size, options.stripe);
    (0..size.div_ceil(stripe)).map(move |number| {
        let offset = number * stripe;
        (offset, stripe.min(size - offset))
    })
}

fn verify(options: &Options) -> Result<()> {
    let file =
        File::open(&options.file).with_context(|| format!("{} cannot be opened", options.file.display()))?;
    let size = file.metadata()?.len();
    let whole = options.done.is_empty();
    ensure!(!whole || size == options.size, "the file has {size} bytes instead of {}", options.size);
    let mut buffer = vec![0; usize::try_from(options.stripe)?];
    let mut checked = 0_u64;
    for (number, (offset, len)) in (0_u64..).zip(stripes(options)) {
        let writer = owner(options, offset);
        let done = options.done.get(usize::try_from(writer)?).copied().unwrap_or_default();
        if whole || number / options.writers < done {
            check(&file, &mut buffer, writer, offset, len)?;
            checked += len;
        }
    }
    println!("verified {checked} bytes");
    Ok(())
}
