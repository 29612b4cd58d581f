//! Options with a fixed set of values.

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use log::LevelFilter;

use crate::config::{
    CachePolicy, InodeFileHandles, IoEngine, MappedWrites, ParallelDirectWrites, Sandbox, Seccomp,
};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Cache {
    /// Nothing
    #[value(alias = "none")]
    Never,
    /// Names and attributes, but no file data
    Metadata,
    /// Everything, revalidated after a second and at each open
    Auto,
    /// Everything, without revalidation; only for shares that do not change on the host
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
    /// Files in direct mode, which the guest does not cache
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
pub(super) enum Mapped {
    /// As "always" with --cache=always, otherwise none
    Auto,
    /// Those of tmpfs, ext4 and XFS, if no other daemon or program on the host writes the same bytes at once
    Always,
    /// No file
    Never,
}

impl From<Mapped> for MappedWrites {
    fn from(mapped: Mapped) -> MappedWrites {
        match mapped {
            Mapped::Auto => MappedWrites::Auto,
            Mapped::Always => MappedWrites::Always,
            Mapped::Never => MappedWrites::Never,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Engine {
    /// io_uring for files that are open with O_DIRECT on the host, and for parallel files on a FUSE host; else threads
    Auto,
    /// Threads
    Threads,
    /// io_uring for all files
    IoUring,
}

impl From<Engine> for IoEngine {
    fn from(engine: Engine) -> IoEngine {
        match engine {
            Engine::Auto => IoEngine::Auto,
            Engine::Threads => IoEngine::Threads,
            Engine::IoUring => IoEngine::IoUring,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum FileHandles {
    /// Never: an error when descriptors run out
    Never,
    /// If the host supports it
    #[value(alias = "fallback")]
    Prefer,
    /// Refuse to start if the host does not support it
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
    /// Own mount, PID and network namespaces, with no mount but the share
    Namespace,
    /// chroot(2) into an empty directory (needs root)
    Chroot,
    /// No sandbox, only name validation
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
    /// Allow: no filter is installed
    None,
    /// Kill the daemon
    Kill,
    /// Allow, and record it in the kernel's log
    Log,
    /// Raise SIGSYS, for debuggers
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

/// Log levels by name: the log crate parses them and does not list them.
pub(super) fn log_levels() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|level| level.parse::<LevelFilter>())
}
