//! What the fuzz targets do with their input. The targets themselves are one line each, so that
//! all of this can be linted and read without libFuzzer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "a panic is a finding"
)]

pub mod buffers;
pub mod chain;
pub mod control;
pub mod decode;
pub mod front_end;
pub mod guarded;
pub mod input;
pub mod migration;
pub mod requests;
pub mod server;
pub mod share;
