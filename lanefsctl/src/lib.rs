//! `lanefsctl`, the client of the control socket of lanefsd: status, requests in flight, limits, and a live view.
//!
//! It is a program of its own, so that the daemon contains no code for terminals. The library exists for `xtask`, which
//! makes the manual page and the completions from [`command`], and for the program itself.
//!
//! The protocol is one JSON object on a line for each request and for each answer ([`protocol`]). An answer comes from
//! a daemon that a guest may have taken over: its size and time are limited, and its text reaches a terminal without
//! control characters.

#![forbid(unsafe_code)]

mod cli;
mod client;
mod commands;
mod error;
mod limit;
mod protocol;
mod rates;
mod show;
mod table;
mod top;
mod units;
mod upgrade;

pub use cli::command;
pub use commands::run;
