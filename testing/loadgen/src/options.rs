//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::error::{LoadError, Result};

/// Measures a vhost-user-fs back end, or the host without one.
#[derive(Debug, Parser)]
pub struct Options {
    /// What to measure.
    #[command(subcommand)]
    pub command: Command,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Drive a back end.
    Run(RunOptions),
    /// Do the same system calls with plain threads.
    Limit(LimitOptions),
    /// Have a back end look up many files, and see what memory it needs for them.
    Inodes(InodesOptions),
    /// Kill the worker of a back end again and again, and see how long requests wait.
    Deaths(DeathsOptions),
    /// Limit the rate of a share, and see how exact that is and what another share gets beside it.
    Pace(PaceOptions),
    /// Start a back end, and see how long it takes until it can be connected to.
    Start(StartOptions),
}

/// The work, the same for both.
#[derive(Clone, Debug, Args, Serialize)]
pub struct Work {
    /// The operation.
    #[arg(long, value_enum)]
    pub op: Op,
    /// Request queues, a thread each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub queues: u16,
    /// Operations in flight per queue.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: u16,
    /// Bytes of a READ or WRITE, or of the room for READDIRPLUS.
    #[arg(long, default_value_t = 4096)]
    pub block: usize,
    /// How data lies in guest memory: one piece, or pages that are no neighbours.
    #[arg(long, value_enum, default_value = "contiguous")]
    pub segments: Segments,
    /// Open the data file with O_DIRECT (the back end needs --allow-direct-io for that to matter).
    #[arg(long)]
    pub direct: bool,
    /// User (and group) on whose behalf requests come. For any but 0 a WRITE asks to clear set-id bits, as a Linux
    /// guest does for callers without CAP_FSETID.
    #[arg(long, default_value_t = 0)]
    pub user: u32,
    /// Data files that READ and WRITE are spread over, which have the bytes of --file-size together.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub files: u16,
    /// Bytes of the data file.
    #[arg(long, default_value_t = 64 << 20)]
    pub file_size: u64,
    /// Files in the directory that GETATTR, LOOKUP and READDIRPLUS work on.
    #[arg(long, default_value_t = 1000)]
    pub entries: u32,
    /// Seconds to measure.
    #[arg(long, default_value_t = 2.0)]
    pub time: f64,
    /// Seconds to run before that.
    #[arg(long, default_value_t = 0.3)]
    pub warmup: f64,
    /// Count system calls too, with `perf stat`, in a second run of half a second after the first.
    #[arg(long)]
    pub syscalls: bool,
}

/// Options of `loadgen run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// A back end with virtiofsd's options, to be started on the share.
    #[arg(long, requires = "share", conflicts_with = "socket")]
    pub backend: Option<PathBuf>,
    /// A further option for it, e.g. --backend-arg=--cache=never; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    pub backend_arg: Vec<String>,
    /// The directory to share.
    #[arg(long)]
    pub share: Option<PathBuf>,
    /// The socket of a back end that runs already.
    #[arg(long, requires = "pid")]
    pub socket: Option<PathBuf>,
    /// Its process id, to count its CPU time.
    #[arg(long)]
    pub pid: Option<u32>,
    /// A file of the share whose storage is slow: one more request of the first queue reads it again and again, and
    /// is not counted.
    #[arg(long, value_name = "PATH")]
    pub slow_file: Option<String>,
    /// Have the back end record what it writes into guest memory, as while a guest migrates.
    #[arg(long)]
    pub dirty_log: bool,
    /// The work.
    #[command(flatten)]
    pub work: Work,
}

/// Options of `loadgen limit`.
#[derive(Debug, Args)]
pub struct LimitOptions {
    /// The directory to work in.
    #[arg(long)]
    pub share: PathBuf,
    /// The work.
    #[command(flatten)]
    pub work: Work,
}

/// Options of `loadgen inodes`.
#[derive(Debug, Args)]
pub struct InodesOptions {
    /// A back end with virtiofsd's options.
    #[arg(long)]
    pub backend: PathBuf,
    /// A further option for it; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    pub backend_arg: Vec<String>,
    /// The directory to share; the files are made in it if they are not there.
    #[arg(long)]
    pub share: PathBuf,
    /// Files to look up.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub files: u32,
    /// The back end's --rlimit-nofile.
    #[arg(long, default_value_t = 1024)]
    pub limit: u64,
}

/// Options of `loadgen deaths`.
#[derive(Debug, Args)]
pub struct DeathsOptions {
    /// Back end and files.
    #[command(flatten)]
    pub inodes: InodesOptions,
    /// How often to kill the worker.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub kills: u32,
    /// Upgrade the back end to the program that it was started from, in place of kills.
    #[arg(long)]
    pub upgrade: bool,
    /// Milliseconds between two of them, and a random part of a tenth more. A daemon gives up after too many in a
    /// short time.
    #[arg(long, default_value_t = 2600)]
    pub interval: u64,
}

/// Options of `loadgen pace`.
#[derive(Debug, Args)]
pub struct PaceOptions {
    /// lanefsd.
    #[arg(long)]
    pub backend: PathBuf,
    /// A further option for it; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    pub backend_arg: Vec<String>,
    /// READs per second; the limit is so many times the block.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: u64,
    /// Bytes of a READ.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub block: u32,
    /// READs in flight.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: u16,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub time: u64,
}

/// Options of `loadgen start`.
#[derive(Debug, Args)]
pub struct StartOptions {
    /// A back end with virtiofsd's options.
    #[arg(long)]
    pub backend: PathBuf,
    /// A further option for it; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    pub backend_arg: Vec<String>,
    /// The directory to share.
    #[arg(long)]
    pub share: PathBuf,
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// WRITE over blocks of a file that has them.
    Write,
    /// READ.
    Read,
    /// GETATTR of one of many files.
    Getattr,
    /// LOOKUP of one of many files, all of them known to the back end.
    Lookup,
    /// CREATE, RELEASE, UNLINK and FORGET of one name.
    Create,
    /// A whole listing: OPENDIR, READDIRPLUS to the end, RELEASEDIR.
    List,
    /// A small file's life: CREATE, WRITE, FLUSH, RELEASE, LOOKUP, OPEN, READ, FLUSH, RELEASE,
    /// UNLINK, FORGET.
    Small,
}

impl Op {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Op::Write => "write",
            Op::Read => "read",
            Op::Getattr => "getattr",
            Op::Lookup => "lookup",
            Op::Create => "create",
            Op::List => "list",
            Op::Small => "small",
        }
    }
}

/// How data lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Segments {
    /// One piece.
    Contiguous,
    /// Pages that are no neighbours, each with its own descriptor.
    Pages,
}

impl Work {
    /// Refuses what cannot be measured.
    pub fn check(&self) -> Result<()> {
        let complain = |text: &str| Err(LoadError::Options(text.into()));
        let share = self.bytes_of_file() / self.in_flight().div_ceil(usize::from(self.files)) as u64;
        if self.block == 0 || self.block > 1 << 20 {
            return complain("--block has to be between 1 and 1048576");
        }
        if matches!(self.op, Op::Read | Op::Write) && share < self.block as u64 {
            return complain("--file-size is too small: every slot needs a block of its own");
        }
        if self.direct && !self.block.is_multiple_of(4096) {
            return complain("--block has to be a multiple of 4096 with --direct");
        }
        if self.entries == 0 {
            return complain("--entries has to be at least 1");
        }
        if !(self.time > 0.0 && self.time < 3600.0 && (0.0..3600.0).contains(&self.warmup)) {
            return complain("--time and --warmup are seconds, less than an hour");
        }
        Ok(())
    }

    /// Operations in flight on all queues together.
    pub fn in_flight(&self) -> usize {
        usize::from(self.queues) * usize::from(self.depth)
    }

    /// Bytes of each data file.
    pub fn bytes_of_file(&self) -> u64 {
        self.file_size / u64::from(self.files)
    }

    /// How long to measure.
    pub fn time(&self) -> Duration {
        Duration::from_secs_f64(self.time)
    }

    /// How long to run before.
    pub fn warmup(&self) -> Duration {
        Duration::from_secs_f64(self.warmup)
    }

    /// `O_*` flags of the data file.
    pub fn open_flags(&self) -> i32 {
        libc::O_RDWR | if self.direct { libc::O_DIRECT } else { 0 }
    }
}
