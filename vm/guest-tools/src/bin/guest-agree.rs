//! Direct writes and the page cache of one guest agree: who has written past the cache finds that
//! in the cache and in private mappings afterwards, while others read through the cache.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lanefsd_guest_tools::{Buffer, Mapping, Writers, fill, open, wait_for_start};

const PAGE: usize = 4096;

#[derive(Parser)]
#[command(about)]
struct Options {
    /// The file
    file: PathBuf,
    /// Processes that write past the cache, each its own part of the file
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// Processes that read all of the file through the cache
    #[arg(long, default_value_t = 2)]
    readers: u64,
    /// Pages of each writer
    #[arg(long, default_value_t = 8)]
    pages: usize,
    /// How long, in milliseconds
    #[arg(long, default_value_t = 3000)]
    time: u64,
    /// Check shared mappings as well
    #[arg(long)]
    shared: bool,
    /// One process more writes through a shared mapping to what the first two writers write
    #[arg(long)]
    collide: bool,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

impl Options {
    fn part(&self) -> usize {
        self.pages * PAGE
    }

    fn end(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.time)
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    match options.one {
        None => run(&options),
        Some(writer) if writer < options.writers => write(&options, writer),
        Some(number) if number < options.writers + options.readers => read(&options),
        Some(_) => collide(&options),
    }
}

fn run(options: &Options) -> Result<()> {
    let file = open(&options.file, false, false)?;
    file.set_len(options.writers * u64::try_from(options.part())?)?;
    drop(file);
    Writers::spawn(options.writers + options.readers + u64::from(options.collide))?.run()
}

fn write(options: &Options, writer: u64) -> Result<()> {
    let direct = open(&options.file, true, false)?;
    let cached = File::options().read(true).write(true).open(&options.file)?;
    let start = options.part() * usize::try_from(writer)?;
    let offset = u64::try_from(start)?;
    let private = Mapping::new(&cached, start + options.part(), false)?;
    let shared = options.shared.then(|| Mapping::new(&cached, start + options.part(), true)).transpose()?;
    let mut data = Buffer::new(options.part())?;
    let mut seen = vec![0; options.part()];
    wait_for_start()?;
    let end = options.end();
    let mut version = 0;
    while Instant::now() < end {
        version += 1;
        fill(&mut data, writer, version << 20);
        direct.write_all_at(&data, offset).context("writing failed")?;
        if options.collide && writer < 2 {
            continue;
        }
        cached.read_exact_at(&mut seen, offset)?;
        ensure!(*data == *seen, "writer {writer} reads through the cache what was there before");
        let mapped = private.read(start, options.part())?;
        ensure!(*data == *mapped, "writer {writer} sees in a private mapping what was there before");
        let Some(shared) = &shared else { continue };
        ensure!(
            *data == *shared.read(start, options.part())?,
            "writer {writer} sees something old in a shared mapping"
        );
        version += 1;
        fill(&mut data, writer, version << 20);
        shared.write(start, &data)?;
        direct.read_exact_at(&mut data, offset)?;
        fill(&mut seen, writer, version << 20);
        ensure!(*data == *seen, "writer {writer} reads past the cache what was there before");
    }
    println!("writer {writer}: {version} versions");
    Ok(())
}

fn read(options: &Options) -> Result<()> {
    let file = File::open(&options.file)?;
    let mut data = vec![0; options.part() * usize::try_from(options.writers)?];
    wait_for_start()?;
    let end = options.end();
    while Instant::now() < end {
        file.read_exact_at(&mut data, 0)?;
    }
    Ok(())
}

fn collide(options: &Options) -> Result<()> {
    let file = File::options().read(true).write(true).open(&options.file)?;
    let shared = Mapping::new(&file, 2 * options.part(), true)?;
    let data = vec![7; 2 * options.part()];
    wait_for_start()?;
    let end = options.end();
    while Instant::now() < end {
        shared.write(0, &data)?;
        shared.sync()?;
    }
    Ok(())
}
