//! The program `lanefsctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lanefsctl::run(std::env::args_os())
}
