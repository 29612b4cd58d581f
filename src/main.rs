//! The command line, and the report of an error that ends the daemon.

use std::process::ExitCode;

use anyhow::Result;
use lanefsd::cli::{self, CAPABILITIES, Command};
use lanefsd::daemon;
use lanefsd::logging;
use lanefsd::sys::descriptors;

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
        let lacks = error.chain().any(descriptors::is_lack);
        let remedy = if lacks { format!("; {}", descriptors::TOO_FEW) } else { String::new() };
        logging::report_fatal(&(causes.join(": ") + &remedy));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    match cli::parse(std::env::args_os())? {
        Command::PrintCapabilities => {
            println!("{CAPABILITIES}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Serve(config) => Ok(daemon::run(*config, |fs| fs)?.into()),
    }
}
