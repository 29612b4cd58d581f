//! Load for a vhost-user-fs back end at native speed, without a VM.
//!
//! `loadgen run` plays the guest: one thread per request queue, requests that lie ready in guest
//! memory, nothing allocated while it measures. `loadgen limit` does the same work with plain threads
//! and system calls: what the host can do with no protocol in between. `loadgen inodes` asks what inodes
//! cost that a guest keeps, `loadgen deaths` how long requests wait when a worker dies, `loadgen pace` how exact rate limits
//! are, and `loadgen start` how long a start takes. Each prints one JSON object.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]

mod cycles;
mod deaths;
mod error;
mod exchange;
mod forgets;
mod inodes;
mod lane;
mod layout;
mod limit;
mod options;
mod pace;
mod process;
mod report;
mod run;
mod start;
mod syscalls;
mod tally;

use clap::Parser;

use crate::error::Result;
use crate::options::{Command, Options};

fn main() {
    let Options { command } = Options::parse();
    let result = match command {
        Command::Run(options) => run::run(&options).and_then(|report| print(&report)),
        Command::Limit(options) => limit::limit(&options).and_then(|report| print(&report)),
        Command::Inodes(options) => inodes::inodes(&options).and_then(|report| print(&report)),
        Command::Deaths(options) => deaths::deaths(&options).and_then(|report| print(&report)),
        Command::Pace(options) => pace::pace(&options).and_then(|report| print(&report)),
        Command::Start(options) => start::start(&options).and_then(|report| print(&report)),
    };
    if let Err(error) = result {
        eprintln!("loadgen: {error}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        std::process::exit(1);
    }
}

fn print(report: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(report)?);
    Ok(())
}
