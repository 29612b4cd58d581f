//! The streams in which a share is saved: lanefsd's own, and virtiofsd's.
//!
//! A stream is written in the form that the options name, and recognized by its first bytes when it is read: virtiofsd's
//! begins with 0 or 1. What was read is checked as a whole before a file system sees it ([`check`]): the front end that
//! hands it over has it from another host.

pub mod check;
mod own;
mod virtiofsd;

use super::config::{MigrationConfig, StreamFormat};
use super::{DeviceState, MigrationError};

/// Bytes that a stream may have besides the content of unlinked files. A million inodes take some 50 MB. What is made of a
/// hostile one may take 33 times as much memory.
const LONGEST: u64 = 1 << 28;

/// Bytes that a stream may have with these options.
pub fn longest(config: &MigrationConfig) -> u64 {
    LONGEST.saturating_add(config.unlinked_limit)
}

/// A state as a stream.
pub fn write(state: &DeviceState, config: &MigrationConfig) -> Result<Vec<u8>, MigrationError> {
    match config.format {
        StreamFormat::Lanefsd => own::write(state, &config.share),
        StreamFormat::Virtiofsd => virtiofsd::write(state, config),
    }
}

/// The state in a stream.
pub fn read(stream: &[u8], config: &MigrationConfig) -> Result<DeviceState, MigrationError> {
    let state = match stream.first() {
        None => return Err(MigrationError("the stream is empty".into())),
        _ if own::is_begun_by(stream) => own::read(stream, &config.share)?,
        Some(_) if virtiofsd::is_begun_by(stream) => {
            DeviceState { share: virtiofsd::read(stream)?, queues: Vec::new() }
        }
        Some(_) => {
            return Err(MigrationError("the stream is neither lanefsd's nor virtiofsd's".into()));
        }
    };
    check::check(&state)?;
    Ok(state)
}

#[cfg(test)]
mod tests;
