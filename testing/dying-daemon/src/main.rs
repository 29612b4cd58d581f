//! lanefsd that dies on cue: `lanefsd-dying LANEFSD'S OPTIONS`.
//!
//! It is lanefsd with fail points around its file system: before and after each operation, which is before its system
//! calls, and after them and before the journal says that it is done. A fail point is armed by the variable
//! `LANEFSD_DIE`, or by the guest with a LOOKUP of the name `!die:` and the same text, which is answered with ENOENT.
//! The text is `PHASE:OPERATION:WHICH`, for instance `after:MKDIR:1`:
//!
//! - The phase is `before` or `after`; `hang` is after, and the thread hangs there, in place of the death of the process.
//! - The operation is that of the FUSE protocol, without `FUSE_`. READDIR stands for READDIRPLUS, too, RENAME
//!   for RENAME2, and FORGET for each item of a BATCH_FORGET.
//! - A number says at which call from now on the process dies, once. `always` makes it die at each call, and
//!   `name=NAME` at each call with that name.
//!
//! `before:START` and `before:CONTROL` are no operations: the process fails by a panic as its file system begins, or as a
//! message of the front end changes how many descriptors the device has.
//!
//! A LOOKUP of `!table:HOW:NUMBER` lets the worker close or replace a descriptor of the table that it shares with its
//! supervisor ([`table`]).
//!
//! Otherwise it dies by abort(3). The state of the fail point is in memory that all of them share, so
//! that a request that is served again does not meet the same fail point unless it is to.

mod dying;
mod fail_point;
mod table;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail};
use lanefsd::cli::{self, Command};
use lanefsd::daemon;
use lanefsd::fs::FileSystem;

use dying::Dying;
use fail_point::{FailPoint, START};

fn main() -> Result<ExitCode> {
    let config = match cli::parse(std::env::args_os())? {
        Command::Serve(config) => config,
        Command::CheckState(file) => {
            println!("{}", daemon::check_state(file)?);
            return Ok(ExitCode::SUCCESS);
        }
        _ => bail!("this daemon only serves"),
    };
    let fail_point = FailPoint::share()?;
    if let Ok(text) = std::env::var("LANEFSD_DIE") {
        fail_point.arm(&text)?;
    }
    let wrap = |inner| {
        fail_point.pass_with_panic(START);
        Arc::new(Dying { inner, fail_point }) as Arc<dyn FileSystem>
    };
    Ok(daemon::run(*config, wrap)?.into())
}
