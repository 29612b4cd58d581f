//! The daemon: from checked options to a share that is served, and back to an exit status.
//!
//! [`run`](run()) is the whole life of the process. It prepares the process and the sandbox once, makes the [`Share`],
//! and serves the [`frontend`]s that connect to the share's [`socket`], one at a time.

pub mod frontend;
mod remarks;
mod run;
mod share;
pub mod socket;

pub use self::run::{RunError, run};
pub use self::share::{Share, Statistics};
