//! The daemon's options as plain, checked types. Each room owns the type of its own options, which are re-exported
//! here.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::device::config::DeviceConfig;
pub use crate::fs::passthrough::config::{
    CachePolicy, FeatureMode, FsConfig, InodeFileHandles, IoEngine, MappedWrites, ParallelDirectWrites,
};
use crate::logging::Remark;
pub use crate::metrics::config::MonitorConfig;
pub use crate::migration::config::{
    MigrationConfig, Mode as MigrationMode, OnError, ShareOptions, StreamFormat,
};
pub use crate::process::{LEAST_DESCRIPTORS, ProcessConfig};
pub use crate::sandbox::config::{CapabilityChanges, IdMaps, IdRange, Sandbox, Seccomp};

/// All options of the daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// The directory that the guest mounts.
    pub shared_dir: PathBuf,
    /// Where front ends connect.
    pub listen: Listen,
    /// Group that may connect to a socket that the daemon creates.
    pub socket_group: Option<String>,
    /// Wait for the next front end after one has disconnected, instead of exiting.
    pub keep_listening: bool,
    /// Replace a worker process that has died, so that its guest notices nothing.
    pub survive: bool,
    /// Deaths of workers within ten seconds that end the daemon.
    pub max_deaths: u32,
    /// The file that holds the rate limits of a group of shares.
    pub limit_group: Option<PathBuf>,
    /// The device.
    pub device: DeviceConfig,
    /// The file system.
    pub fs: FsConfig,
    /// Refuse whatever changes the share.
    pub readonly: bool,
    /// Where file data is stored.
    pub store: Store,
    /// The sandbox; `None` for the strongest that is available.
    pub sandbox: Option<Sandbox>,
    /// The ids of the namespace sandbox.
    pub id_maps: IdMaps,
    /// Action on a system call outside the allow list.
    pub seccomp: Seccomp,
    /// Changes to the capabilities that are kept.
    pub capabilities: CapabilityChanges,
    /// What operators may look at.
    pub monitor: MonitorConfig,
    /// The process.
    pub process: ProcessConfig,
    /// Log level; `None` for that of RUST_LOG.
    pub log_level: Option<log::LevelFilter>,
    /// Log to syslog instead of standard error.
    pub syslog: bool,
    /// What another program is started with that goes on in place of this one, from any working directory.
    pub arguments: Vec<OsString>,
    /// Warnings about these options.
    pub remarks: Vec<Remark>,
}

/// A daemon that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// By the path of its socket.
    Socket(PathBuf),
    /// By the id of the process that was started.
    Pid(i32),
}

/// Where front ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// The daemon creates a listening socket at this path, and removes it at the end.
    Path(PathBuf),
    /// A listening socket that the daemon was started with.
    Fd(RawFd),
}

impl Config {
    /// The options of the file system, with that of the share which it has to know.
    pub fn fs_config(&self) -> FsConfig {
        FsConfig { readonly: self.readonly, ..self.fs.clone() }
    }
}

impl Listen {
    /// The descriptor that the daemon was started with, if it listens on one.
    pub fn inherited(&self) -> Option<RawFd> {
        match self {
            Listen::Fd(fd) => Some(*fd),
            Listen::Path(_) => None,
        }
    }
}

/// Where file data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// The share itself.
    Host,
    /// For benchmarks: names and opens are real, written data is dropped after a delay.
    Null {
        /// How long a read or write takes.
        latency: Duration,
    },
}
