//! The daemon: from checked options to a share that is served, and back to an exit status.
//!
//! [`run`](run()) is the whole life of the process. It prepares the process and the sandbox once, makes the [`Share`],
//! and serves the [`frontend`]s that connect to the share's [`socket`], one at a time.

pub mod frontend;
mod header;
mod monitor;
mod readiness;
mod remarks;
mod report;
mod run;
mod share;
pub mod socket;
mod supervisor;
mod upgrade;

pub use self::monitor::EndpointError;
pub use self::run::{RunError, run};
pub use self::share::{Share, Statistics};
pub use self::supervisor::upgrade::handover::HandoverError;
pub use self::supervisor::upgrade::{check_state, go_back};
pub use self::upgrade::{UpgradeError, reopen, upgrade};
