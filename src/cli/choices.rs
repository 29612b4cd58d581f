//! Values of options that are one of a few words.

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use log::LevelFilter;

use crate::config::{CachePolicy, InodeFileHandles, ParallelDirectWrites, Sandbox, Seccomp};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Cache {
    /// Neither names, nor attributes, nor data
    #[value(alias = "none")]
    Never,
    /// Names and attributes, but no data
    Metadata,
    /// All, checked again after a second and at each open
    Auto,
    /// All, for as long as the guest likes; only for shares that nobody else changes
    Always,
}

impl From<Cache> for CachePolicy {
    fn from(cache: Cache) -> CachePolicy {
        match cache {
            Cache::Never => CachePolicy::Never,
            Cache::Metadata => CachePolicy::Metadata,
            Cache::Auto => CachePolicy::Auto,
            Cache::Always => CachePolicy::Always,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Parallel {
    /// Files that the guest does not cache
    Auto,
    /// Every regular file
    Always,
    /// No file
    Never,
}

impl From<Parallel> for ParallelDirectWrites {
    fn from(parallel: Parallel) -> ParallelDirectWrites {
        match parallel {
            Parallel::Auto => ParallelDirectWrites::Auto,
            Parallel::Always => ParallelDirectWrites::Always,
            Parallel::Never => ParallelDirectWrites::Never,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum FileHandles {
    /// A descriptor for each inode that the guest knows, and an error when there are no more
    Never,
    /// Where the host can do it
    #[value(alias = "fallback")]
    Prefer,
    /// Do not start where the host cannot do it
    Mandatory,
}

impl From<FileHandles> for InodeFileHandles {
    fn from(handles: FileHandles) -> InodeFileHandles {
        match handles {
            FileHandles::Never => InodeFileHandles::Never,
            FileHandles::Prefer => InodeFileHandles::Prefer,
            FileHandles::Mandatory => InodeFileHandles::Mandatory,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum SandboxMode {
    /// Own mount, PID and network namespaces, with the share as the root
    Namespace,
    /// The share as the root directory (needs root)
    Chroot,
    /// None
    None,
}

impl From<SandboxMode> for Sandbox {
    fn from(mode: SandboxMode) -> Sandbox {
        match mode {
            SandboxMode::Namespace => Sandbox::Namespace,
            SandboxMode::Chroot => Sandbox::Chroot,
            SandboxMode::None => Sandbox::None,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum SeccompMode {
    /// It is carried out
    None,
    /// The daemon ends at once
    Kill,
    /// It is carried out, and the kernel's log tells of it
    Log,
    /// The daemon gets the signal SIGSYS, for debuggers
    Trap,
}

impl From<SeccompMode> for Seccomp {
    fn from(mode: SeccompMode) -> Seccomp {
        match mode {
            SeccompMode::None => Seccomp::None,
            SeccompMode::Kill => Seccomp::Kill,
            SeccompMode::Log => Seccomp::Log,
            SeccompMode::Trap => Seccomp::Trap,
        }
    }
}

/// The levels of messages by name, which the log crate understands and does not list.
pub(super) fn log_levels() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|level| level.parse::<LevelFilter>())
}
