//! One file, changed and read in every way at random, and compared with what it should hold: fsx(8), which Debian does not have.
//!
//! Writes, reads, truncation, holes, allocation, fsync and new openers come in an order that the seed determines. What the file should hold
//! is kept in memory; each read is compared with it, and now and then the whole file.
#![allow(clippy::indexing_slicing, reason = "a step that fails ends the program")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lanefsd_guest_tools::{Mapping, Rng, open};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

#[derive(Parser)]
#[command(about)]
struct Options {
    /// The file
    file: PathBuf,
    /// Where the order of steps begins
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// The longest that the file gets
    #[arg(long, default_value_t = 256 << 10)]
    length: u64,
    /// The longest write
    #[arg(long, default_value_t = 32 << 10)]
    piece: u64,
    /// Steps between two calls of fsync, on the average; 0 for none
    #[arg(long, default_value_t = 500)]
    fsync: u64,
    /// Read and write through mappings of the guest as well
    #[arg(long)]
    mmap: bool,
}

/// The file, and what it should hold.
struct Checked {
    file: File,
    bytes: Vec<u8>,
    random: Rng,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.length > options.piece && options.piece > 1, "a write has to fit into the file");
    let file = open(&options.file, false, false)?;
    file.set_len(0)?;
    let mut checked = Checked { file, bytes: Vec::new(), random: Rng::new(options.seed) };
    for step in 0..options.steps {
        checked.step(&options, step).with_context(|| format!("seed {}, step {step}", options.seed))?;
    }
    checked.compare()
}

impl Checked {
    fn step(&mut self, options: &Options, step: u64) -> Result<()> {
        let len = 1 + self.random.below(options.piece);
        let offset = self.random.below(options.length - len);
        if options.fsync > 0 && self.random.below(options.fsync) == 0 {
            self.file.sync_all()?;
        }
        match self.random.below(100) {
            // Most are within the file, since most of a program's are.
            0..=59 => {
                let offset = offset.min((self.bytes.len() as u64).saturating_sub(len));
                self.write(offset, len, step)
            }
            60..=69 => self.write(offset, len, step),
            70..=87 => self.read(offset, len),
            88 => self.truncate(offset),
            89..=90 => self.punch(offset, len, FallocateFlags::PUNCH_HOLE),
            91 => self.punch(offset, len, FallocateFlags::ZERO_RANGE),
            92 => self.allocate(offset, len),
            93..=95 if options.mmap => self.write_mapped(step),
            96 => self.open_again(options),
            97 => self.compare(),
            _ => self.read(offset, len),
        }
    }

    fn write(&mut self, offset: u64, len: u64, step: u64) -> Result<()> {
        let data = self.data(len, step)?;
        self.file.write_all_at(&data, offset).with_context(|| format!("write of {len} at {offset}"))?;
        let range = self.range(offset, len)?;
        let end = self.bytes.len().max(range.end);
        self.bytes.resize(end, 0);
        self.bytes[range].copy_from_slice(&data);
        Ok(())
    }

    fn data(&mut self, len: u64, step: u64) -> Result<Vec<u8>> {
        let first = step.wrapping_mul(31).wrapping_add(self.random.below(256));
        let byte = |at: u64| (first.wrapping_add(at / 7) % 251) as u8;
        ensure!(len > 0, "no data");
        Ok((0..len).map(byte).collect())
    }

    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset)?;
        Ok(start..start + usize::try_from(len)?)
    }

    /// What of a range is within the file.
    fn inside(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>> {
        let std::ops::Range { start, end } = self.range(offset, len)?;
        Ok(start.min(self.bytes.len())..end.min(self.bytes.len()))
    }

    fn read(&mut self, offset: u64, len: u64) -> Result<()> {
        let range = self.inside(offset, len)?;
        let mut found = vec![0; range.len()];
        self.file.read_exact_at(&mut found, offset).with_context(|| format!("read of {len} at {offset}"))?;
        same(&found, &self.bytes[range], offset)
    }

    fn truncate(&mut self, len: u64) -> Result<()> {
        self.file.set_len(len).with_context(|| format!("truncation to {len}"))?;
        self.bytes.resize(usize::try_from(len)?, 0);
        Ok(())
    }

    /// Zeros in a range, of which only what is inside the file counts.
    fn punch(&mut self, offset: u64, len: u64, how: FallocateFlags) -> Result<()> {
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            // tmpfs does not know ZERO_RANGE.
            Err(Errno::OPNOTSUPP) => return Ok(()),
            done => done.with_context(|| format!("zeros of {len} at {offset}"))?,
        }
        let range = self.inside(offset, len)?;
        self.bytes[range].fill(0);
        Ok(())
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<()> {
        fallocate(&self.file, FallocateFlags::empty(), offset, len)
            .with_context(|| format!("allocation of {len} at {offset}"))?;
        let end = self.range(offset, len)?.end;
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        Ok(())
    }

    /// Changes a part of a shared mapping, and reads it by a system call.
    fn write_mapped(&mut self, step: u64) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let len = 1 + self.random.below(self.bytes.len().min(8192) as u64);
        let offset = self.random.below(self.bytes.len() as u64 - len + 1);
        let data = self.data(len, step)?;
        let range = self.range(offset, len)?;
        let mapping = Mapping::new(&self.file, self.bytes.len(), true)?;
        same(&mapping.read(range.start, range.len())?, &self.bytes[range.clone()], offset)?;
        mapping.write(range.start, &data)?;
        mapping.sync()?;
        self.bytes[range].copy_from_slice(&data);
        Ok(())
    }

    fn open_again(&mut self, options: &Options) -> Result<()> {
        // The last one is closed first.
        self.file = File::open("/dev/null")?;
        self.file = open(&options.file, false, false)?;
        self.compare()
    }

    fn compare(&mut self) -> Result<()> {
        let len = self.file.metadata()?.len();
        ensure!(len == self.bytes.len() as u64, "the file has {len} bytes, not {}", self.bytes.len());
        self.read(0, len)
    }
}

fn same(found: &[u8], wanted: &[u8], offset: u64) -> Result<()> {
    let odd = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
    match odd {
        None => Ok(()),
        Some(at) => {
            anyhow::bail!("byte {} is {}, not {}", offset + at as u64, found[at], wanted[at])
        }
    }
}
