//! `lanefsctl` against control sockets that answer, refuse, close, say nothing, or talk nonsense.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure ends the test")]

mod commands;
mod fake;
mod faults;
mod terminal;
mod top;
