//! Many processes append records to one file: every record is there once, and in one piece.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lanefsd_guest_tools::{Buffer, Writers, fill, open, pattern, wait_for_start};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What to do
    #[arg(value_enum)]
    action: Action,
    /// The file
    file: PathBuf,
    /// Processes that append
    #[arg(long, default_value_t = 4)]
    writers: u64,
    /// Records of each
    #[arg(long, default_value_t = 100)]
    records: u64,
    /// Bytes of a record, 16 at least
    #[arg(long, default_value_t = 4096)]
    record: usize,
    /// Open with O_DIRECT
    #[arg(long)]
    direct: bool,
    /// Number of the first writer, where others append in another guest
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Do the part of one process
    #[arg(long, hide = true)]
    one: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Action {
    /// Append
    Run,
    /// Check every record
    Verify,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.record >= 16, "a record has 16 bytes at least");
    match (options.action, options.one) {
        (Action::Verify, _) => verify(&options),
        (Action::Run, None) => Writers::spawn(options.writers)?.run(),
        (Action::Run, Some(writer)) => append(&options, options.first + writer),
    }
}

/// A record: writer and number in its first 16 bytes, a pattern of both behind them.
fn make(data: &mut [u8], writer: u64, number: u64) -> Result<()> {
    let (head, body) = data.split_at_mut_checked(16).context("a record is too short")?;
    head.copy_from_slice(&((u128::from(writer) << 64) | u128::from(number)).to_le_bytes());
    fill(body, writer, number << 20);
    Ok(())
}

fn append(options: &Options, writer: u64) -> Result<()> {
    let mut file = open(&options.file, options.direct, true)?;
    let mut buffer = Buffer::new(options.record)?;
    wait_for_start()?;
    for number in 0..options.records {
        make(&mut buffer, writer, number)?;
        let written = file.write(&buffer).context("appending failed")?;
        ensure!(written == options.record, "{written} bytes of a record were written");
    }
    Ok(())
}

fn verify(options: &Options) -> Result<()> {
    let mut file = File::open(&options.file)?;
    let mut data = vec![0; options.record];
    let mut seen = HashSet::new();
    for place in 0..options.writers * options.records {
        file.read_exact(&mut data).with_context(|| format!("record {place} is missing"))?;
        let (head, body) = data.split_at_checked(16).context("a record is too short")?;
        let head = u128::from_le_bytes(head.try_into()?);
        let (writer, number) = (u64::try_from(head >> 64)?, u64::try_from(head & u128::from(u64::MAX))?);
        ensure!(writer < options.writers && number < options.records, "record {place} is none of ours");
        ensure!(seen.insert((writer, number)), "record {number} of writer {writer} is there twice");
        let whole = body.iter().zip(number << 20..).all(|(byte, at)| *byte == pattern(writer, at));
        ensure!(whole, "record {number} of writer {writer} is mixed with another");
    }
    ensure!(file.read(&mut data)? == 0, "there is more than was written");
    println!("verified {} records", seen.len());
    Ok(())
}
