//! Load for a vhost-user-fs back end at native speed, without a VM.
//!
//! `load run` plays the guest: one thread per request queue, requests that lie ready in guest
//! memory, nothing allocated while it measures. `load limit` does the same work with plain threads
//! and system calls: what the host can do with no protocol in between. Both print one JSON object.

mod cycles;
mod error;
mod exchange;
mod forgets;
mod lane;
mod layout;
mod limit;
mod options;
mod process;
mod report;
mod run;
mod syscalls;
mod tally;

use clap::Parser;

use crate::error::Result;
use crate::options::{Command, Options};

fn main() {
    let Options { command } = Options::parse();
    let result = match command {
        Command::Run(options) => run::run(&options),
        Command::Limit(options) => limit::limit(&options),
    };
    if let Err(error) = result.and_then(|report| print(&report)) {
        eprintln!("load: {error}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        std::process::exit(1);
    }
}

fn print(report: &report::Report) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(report)?);
    Ok(())
}
