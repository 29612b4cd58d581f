//! Many processes write their own ranges of one file, while another one truncates it, punches
//! holes, allocates, and renames it. Each byte is zero or its writer's at the end, and every write
//! that began after the last disturbance is there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Buffer, Rng, Writers, fill, open, pattern, wait_for_start};
use rustix::fs::{FallocateFlags, fallocate};

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
    /// Bytes of a piece
    #[arg(long, default_value_t = 24_577)]
    piece: u64,
    /// Pieces of each writer
    #[arg(long, default_value_t = 8)]
    pieces: u64,
    /// How long to write, in milliseconds
    #[arg(long, default_value_t = 3000)]
    time: u64,
    /// Unlink the file in the middle: nothing can be checked then but that all goes on
    #[arg(long)]
    unlink: bool,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Write and disturb
    Run,
    /// Check every byte
    Verify,
}

impl Options {
    fn size(&self) -> u64 {
        self.writers * self.pieces * self.piece
    }

    /// Offset of a writer's piece; neighbours are others'.
    fn place(&self, writer: u64, piece: u64) -> u64 {
        (piece * self.writers + writer) * self.piece
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    match (options.action, options.one) {
        (Action::Verify, _) => verify(&options),
        (Action::Run, None) => run(&options),
        (Action::Run, Some(writer)) if writer < options.writers => write(&options, writer),
        (Action::Run, Some(_)) => disturb(&options),
    }
}

fn run(options: &Options) -> Result<()> {
    open(&options.file, false, false)?;
    Writers::spawn(options.writers + 1)?.run()
}

fn write(options: &Options, writer: u64) -> Result<()> {
    let file = open(&options.file, false, false)?;
    let mut buffer = Buffer::new(usize::try_from(options.piece)?)?;
    let mut rng = Rng::new(writer + 1);
    wait_for_start()?;
    // The disturber ends some time before the writers.
    let end = Instant::now() + Duration::from_millis(options.time);
    while Instant::now() < end {
        let offset = options.place(writer, rng.below(options.pieces));
        fill(&mut buffer, writer, offset);
        file.write_all_at(&buffer, offset)?;
    }
    for piece in 0..options.pieces {
        let offset = options.place(writer, piece);
        fill(&mut buffer, writer, offset);
        file.write_all_at(&buffer, offset)?;
    }
    Ok(())
}

fn disturb(options: &Options) -> Result<()> {
    let file = open(&options.file, false, false)?;
    let mut rng = Rng::new(77);
    let size = options.size();
    wait_for_start()?;
    let end = Instant::now() + Duration::from_millis(options.time * 2 / 3);
    while Instant::now() < end {
        let (from, len) = (rng.below(size), 1 + rng.below(size / 4));
        match rng.below(6) {
            0 => file.set_len(rng.below(size)).context("truncating failed")?,
            1 => file.set_len(size + rng.below(size)).context("growing failed")?,
            2 => fallocate(&file, FallocateFlags::empty(), from, len).context("allocating failed")?,
            3 => fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, len)
                .context("punching a hole failed")?,
            4 => drop(File::create(&options.file).context("opening with O_TRUNC failed")?),
            _ => rename_twice(&options.file)?,
        }
    }
    file.set_len(size)?;
    if options.unlink {
        std::fs::remove_file(&options.file).context("unlinking failed")?;
    }
    Ok(())
}

fn rename_twice(path: &Path) -> Result<()> {
    let other = path.with_extension("renamed");
    std::fs::rename(path, &other).context("renaming failed")?;
    std::fs::rename(&other, path).context("renaming back failed")
}

fn verify(options: &Options) -> Result<()> {
    let file = File::open(&options.file)?;
    let size = file.metadata()?.len();
    ensure!(size == options.size(), "the file has {size} bytes instead of {}", options.size());
    let mut data = vec![0; usize::try_from(options.piece)?];
    for piece in 0..options.pieces {
        for writer in 0..options.writers {
            let offset = options.place(writer, piece);
            file.read_exact_at(&mut data, offset)?;
            for (at, byte) in (offset..).zip(&data) {
                ensure!(*byte == pattern(writer, at), "byte {at} of writer {writer} is {byte:#x}");
            }
        }
    }
    println!("verified {size} bytes");
    Ok(())
}
