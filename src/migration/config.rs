//! Options of migration.

use serde::{Deserialize, Serialize};

/// Bytes of unlinked files that a stream may carry, where nothing else is said.
pub const UNLINKED_LIMIT: u64 = 16 << 20;

/// How a share is saved, and what is asked of one that is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationConfig {
    /// How the destination finds the guest's files (`--migration-mode`).
    pub mode: Mode,
    /// What becomes of a file that is not found (`--migration-on-error`).
    pub on_error: OnError,
    /// Compare file handles on the destination (`--migration-verify-handles`).
    pub verify_handles: bool,
    /// Check paths once more when the share is saved (`--migration-confirm-paths`).
    pub confirm_paths: bool,
    /// The stream that is written (`--migration-format`).
    pub format: StreamFormat,
    /// Content of unlinked files in one stream, in bytes (`--migration-unlinked-limit`).
    pub unlinked_limit: u64,
    /// Options that both ends of a migration must have.
    pub share: ShareOptions,
}

impl Default for MigrationConfig {
    /// What an empty command line asks for.
    fn default() -> MigrationConfig {
        MigrationConfig {
            mode: Mode::FindPaths,
            on_error: OnError::Abort,
            verify_handles: false,
            confirm_paths: false,
            format: StreamFormat::Lanefsd,
            unlinked_limit: UNLINKED_LIMIT,
            share: ShareOptions::default(),
        }
    }
}

/// How the destination finds the guest's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By their names.
    FindPaths,
    /// By their file handles: both ends have the same file system.
    FileHandles,
    /// By file handles where the file system has lasting ones, and by names elsewhere.
    Auto,
}

/// What becomes of a file that the destination does not find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The migration fails, and the guest goes on at the source.
    Abort,
    /// The guest gets an error for this file.
    GuestError,
}

/// The form in which a share is saved. Both are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamFormat {
    /// lanefsd's own.
    Lanefsd,
    /// That of virtiofsd.
    Virtiofsd,
}

/// Options of a share that the guest relies on: both ends of a migration must have them.
///
/// As text, under the names of the command line: it is what the message about a difference needs, and an option that is
/// new in one version means nothing to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareOptions(pub Vec<(String, String)>);

impl ShareOptions {
    /// The first option that both have and in which they differ: its name, its value here and there.
    pub fn difference<'a>(&'a self, other: &'a ShareOptions) -> Option<(&'a str, &'a str, &'a str)> {
        self.0.iter().find_map(|(name, here)| {
            let there = other.0.iter().find(|(other, _)| other == name).map(|(_, value)| value)?;
            (here != there).then_some((name.as_str(), here.as_str(), there.as_str()))
        })
    }
}
