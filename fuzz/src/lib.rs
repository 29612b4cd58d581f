//! What the fuzz targets do with their input. The targets themselves are one line each, so that
//! all of this can be linted and read without libFuzzer.

pub mod buffers;
pub mod chain;
pub mod control;
pub mod decode;
pub mod front_end;
pub mod guarded;
pub mod input;
pub mod requests;
pub mod server;
pub mod share;
