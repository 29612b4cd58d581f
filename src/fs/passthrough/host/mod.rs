//! The host's files.

pub mod file;
