//! The command line, and the report of an error that ends the daemon.

use std::process::ExitCode;

use anyhow::Result;
use lanefsd::cli::{self, CAPABILITIES, Command};
use lanefsd::daemon;
use lanefsd::logging;

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        // The program that was upgraded to this one, if there is one, goes on.
        daemon::go_back(error.as_ref());
        logging::report_fatal_error(error.as_ref());
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    match cli::parse_or(std::env::args_os(), daemon::go_back)? {
        Command::PrintCapabilities => {
            println!("{CAPABILITIES}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Upgrade(running) => {
            println!("{}", daemon::upgrade(&running)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Reopen(running) => {
            println!("{}", daemon::reopen(&running)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::CheckState(file) => {
            println!("{}", daemon::check_state(file)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Serve(config) => Ok(daemon::run(*config, |fs| fs)?.into()),
    }
}
