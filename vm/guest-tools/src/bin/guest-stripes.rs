//! Many processes write one file, each its own stripes: stripe `s` belongs to writer `s % writers`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Buffer, Crowd, fill, open, pattern, wait_for_start};

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
        (Action::Write, Some(writer)) => write_one(&options, writer),
    }
}

fn write_all(options: &Options) -> Result<()> {
    let file = open(&options.file, false, false)?;
    if options.extend {
        file.set_len(0)?;
    } else if file.metadata()?.len() != options.size {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, options.size)
            .context("the file cannot be allocated")?;
    }
    drop(file);
    let crowd = Crowd::gather(options.writers)?;
    let start = Instant::now();
    crowd.run()?;
    println!("bytes {} seconds {:.6}", options.size, start.elapsed().as_secs_f64());
    Ok(())
}

fn write_one(options: &Options, writer: u64) -> Result<()> {
    let file = open(&options.file, options.direct, false)?;
    let mut buffer = Buffer::new(usize::try_from(options.stripe)?)?;
    let mut highest = 0;
    wait_for_start()?;
    for (offset, len) in
        stripes(options).filter(|(offset, _)| (offset / options.stripe) % options.writers == writer)
    {
        let data = buffer.get_mut(..usize::try_from(len)?).context("a stripe is too long")?;
        fill(data, writer, offset);
        file.write_all_at(data, offset).with_context(|| format!("writing {len} bytes at {offset} failed"))?;
        // The file never ends before what this process has written.
        let size = file.metadata()?.len();
        highest = highest.max(offset + len);
        ensure!(size >= highest, "the file has {size} bytes after a write up to {highest}");
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
    let path: &Path = &options.file;
    let file = std::fs::File::open(path).with_context(|| format!("{} cannot be opened", path.display()))?;
    let size = file.metadata()?.len();
    ensure!(size == options.size, "the file has {size} bytes instead of {}", options.size);
    let mut buffer = vec![0; usize::try_from(options.stripe)?];
    for (offset, len) in stripes(options) {
        let writer = (offset / options.stripe) % options.writers;
        let data = buffer.get_mut(..usize::try_from(len)?).context("a stripe is too long")?;
        file.read_exact_at(data, offset)?;
        if let Some((at, byte)) =
            (offset..).zip(data.iter()).find(|(at, byte)| **byte != pattern(writer, *at))
        {
            bail!("byte {at} is {byte:#x} instead of {:#x} of writer {writer}", pattern(writer, at));
        }
    }
    println!("verified {size} bytes");
    Ok(())
}
