//! The command line. Option names are virtiofsd's wherever it has one.

mod attributes;
mod choices;
mod config_file;
mod migration;
mod monitor;
mod old_form;
mod upgrade;
mod values;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, CommandFactory as _, Parser, value_parser};
use log::LevelFilter;
use thiserror::Error;

use self::attributes::AttributeOptions;
use self::choices::{Cache, Engine, FileHandles, Mapped, Parallel, SandboxMode, SeccompMode, log_levels};
use self::config_file::FileError;
use self::migration::{MigrationOptions, share_options};
use self::monitor::MonitorOptions;
use self::upgrade::{ReopenOptions, UpgradeOptions};
use self::values::{parse_cpus, parse_id_range, parse_modcaps, parse_rates, parse_store};
use crate::config::{
    CapabilityChanges, Config, Daemon, DeviceConfig, FsConfig, IdMaps, LEAST_DESCRIPTORS, Listen,
    MigrationConfig, ParallelDirectWrites, ProcessConfig, Store,
};
use crate::device::backend::MAX_QUEUES;
use crate::device::config_space::TAG_SIZE;
use crate::limits::RateError;
use crate::mapping::ids::IdMapError;
use crate::mapping::xattrs::XattrMapError;

/// Share a host directory with a virtual machine: a vhost-user daemon for virtio-fs.
///
/// The guest mounts the share with `mount -t virtiofs TAG DIRECTORY`. TAG is the mount tag of the VMM's
/// device: `tag=` of QEMU's vhost-user-fs-pci, `<target dir=…>` of libvirt.
#[derive(Clone, Debug, Parser)]
#[command(version, about, long_about, max_term_width = 100, args_override_self = true)]
#[command(
    after_help = "lanefsd upgrade --help tells how a daemon that runs is upgraded, and lanefsd reopen --help how it goes on \
when its directory was mounted anew."
)]
pub struct Options {
    /// Read options from FILE, in TOML: the long names are the keys, as in cache = "never"; what is typed takes
    /// precedence
    #[arg(long, value_name = "FILE", help_heading = "Share")]
    config: Option<PathBuf>,

    /// Directory to share with the guest
    #[arg(long, value_name = "DIRECTORY", help_heading = "Share")]
    shared_dir: Option<PathBuf>,

    /// Export the share read-only
    #[arg(long, help_heading = "Share")]
    readonly: bool,

    /// Support extended attributes
    #[arg(long, help_heading = "Share")]
    xattr: bool,

    /// Apply the guest's POSIX (fcntl) locks on the host, so that they also exclude other guests
    #[arg(long, help_heading = "Share")]
    posix_lock: bool,

    /// Apply the guest's flock(2) locks on the host, so that they also exclude other guests
    #[arg(long, help_heading = "Share")]
    flock: bool,

    /// Report mount points inside the share to the guest (default)
    #[arg(long, overrides_with = "no_announce_submounts", help_heading = "Share")]
    announce_submounts: bool,

    /// Show mount points inside the share as ordinary directories
    #[arg(long, help_heading = "Share")]
    no_announce_submounts: bool,

    #[command(flatten)]
    attributes: AttributeOptions,

    /// Create a vhost-user socket at PATH and listen on it; PATH.pid holds the process id
    #[arg(long, alias = "socket", value_name = "PATH", help_heading = "Connection")]
    socket_path: Option<PathBuf>,

    /// Listen on this inherited file descriptor
    #[arg(long, value_name = "NUMBER", help_heading = "Connection")]
    fd: Option<i32>,

    /// Group that may connect to the socket, besides its owner
    #[arg(long, value_name = "GROUP", requires = "socket_path", help_heading = "Connection")]
    socket_group: Option<String>,

    /// Wait for the next connection when the front end disconnects, instead of exiting
    #[arg(long, help_heading = "Connection")]
    keep_listening: bool,

    /// End when the serving process dies, instead of replacing it so that the guest notices nothing
    #[arg(long, help_heading = "Connection")]
    no_survive: bool,

    /// Deaths of the serving process within ten seconds that end the daemon
    #[arg(long, value_name = "NUMBER", default_value_t = 5, value_parser = value_parser!(u32).range(1..),
        conflicts_with = "no_survive", help_heading = "Connection")]
    max_deaths: u32,

    /// Mount tag in the device's configuration space, and name of the share in log messages; QEMU sets a mount
    /// tag itself, other VMMs need it here
    #[arg(long, value_name = "TAG", help_heading = "Connection")]
    tag: Option<String>,

    /// What the guest may cache
    #[arg(long, value_enum, ignore_case = true, default_value = "auto", help_heading = "Caching and data")]
    cache: Cache,

    /// Files that several writers may write in parallel
    #[arg(long, value_enum, default_value = "auto", value_name = "WHICH", help_heading = "Caching and data")]
    parallel_direct_writes: Parallel,

    /// Let writes that extend a file take turns, also in guests with lanefsd's modules
    #[arg(long, help_heading = "Caching and data")]
    no_parallel_extending: bool,

    /// Files in parallel mode that are written through mappings, past the file's lock on the host
    #[arg(long, value_enum, default_value = "auto", value_name = "WHICH", help_heading = "Caching and data")]
    mapped_writes: Mapped,

    /// Let the guest delay and combine buffered writes; not for shares that change on the host
    #[arg(long, help_heading = "Caching and data")]
    writeback: bool,

    /// Allow shared mappings of files with --cache=never or metadata (Linux 6.9 and later)
    #[arg(long, help_heading = "Caching and data")]
    allow_mmap: bool,

    /// Pass the guest's O_DIRECT on to the host; without it the host may cache the data
    #[arg(long, help_heading = "Caching and data")]
    allow_direct_io: bool,

    /// Who reads and writes data
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        value_name = "ENGINE",
        help_heading = "Caching and data"
    )]
    io_engine: Engine,

    /// Support O_TMPFILE; not for shares that hold the upper directory of an overlay in the guest
    #[arg(long, help_heading = "Caching and data")]
    tmpfile: bool,

    /// Disable READDIRPLUS: directory listings do not carry the attributes of the entries
    #[arg(long, help_heading = "Caching and data")]
    no_readdirplus: bool,

    /// Maximum number of threads per queue; 0 and 1 serve one request at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 16, help_heading = "Resources")]
    thread_pool_size: usize,

    /// Adaptive busy-poll time in microseconds; 0 disables it
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = value_parser!(u64).range(0..=1000),
        help_heading = "Resources")]
    poll_time: u64,

    /// Number of request queues to offer; the guest uses up to one per CPU
    #[arg(long, value_name = "NUMBER", default_value_t = MAX_QUEUES - 1, help_heading = "Resources")]
    request_queues: usize,

    /// Maximum number of open files; 0 keeps the inherited limit [default: what the host allows, up to
    /// 1000000]
    #[arg(long, value_name = "NUMBER", help_heading = "Resources")]
    rlimit_nofile: Option<u64>,

    /// Hold inodes by file handles instead of descriptors when descriptors are scarce
    #[arg(long, value_enum, default_value = "prefer", value_name = "WHETHER", help_heading = "Resources")]
    inode_file_handles: FileHandles,

    /// Rate limits per second: read-bytes, write-bytes, read-ops, write-ops and meta-ops, for example
    /// read-bytes=100M,write-ops=500; burst=TIME is what may come at once after a pause [default: 100ms]; repeatable
    #[arg(long, value_name = "LIST", help_heading = "Resources")]
    limit: Vec<String>,

    /// Share the limits with other daemons that name this file, which is created if it is missing
    #[arg(long, value_name = "FILE", help_heading = "Resources")]
    limit_group: Option<PathBuf>,

    /// CPUs to run on, for example 0-3,6
    #[arg(long, value_name = "LIST", help_heading = "Resources")]
    cpus: Option<String>,

    /// Sandbox [default: the strongest that is available]
    #[arg(long, value_enum, ignore_case = true, help_heading = "Security")]
    sandbox: Option<SandboxMode>,

    /// Map user ids of the sandbox to those of the host: :INSIDE:OUTSIDE:COUNT:, for example :0:1000:1:;
    /// repeatable [default without root: the own user id, unchanged]
    #[arg(long, value_name = "RANGE", help_heading = "Security")]
    uid_map: Vec<String>,

    /// The same for group ids
    #[arg(long, value_name = "RANGE", help_heading = "Security")]
    gid_map: Vec<String>,

    /// Action on a system call outside the allow list
    #[arg(long, value_enum, default_value = "kill", value_name = "ACTION", help_heading = "Security")]
    seccomp: SeccompMode,

    /// Capabilities to keep or to drop, for example +sys_admin:-mknod
    #[arg(long, value_name = "CHANGES", allow_hyphen_values = true, help_heading = "Security")]
    modcaps: Option<String>,

    /// Log level [default: RUST_LOG, or info]
    #[arg(long, value_name = "LEVEL", value_parser = log_levels(), ignore_case = true, help_heading = "Logging")]
    log_level: Option<LevelFilter>,

    /// Same as --log-level=debug
    #[arg(short, help_heading = "Logging")]
    debug: bool,

    /// Log to syslog instead of standard error
    #[arg(long, help_heading = "Logging")]
    syslog: bool,

    /// Print the daemon's capabilities as JSON and exit
    #[arg(long, action = ArgAction::SetTrue, help_heading = "Logging")]
    print_capabilities: bool,

    /// Checks the state file with this number, for a daemon that is to be upgraded to this program
    #[arg(long, value_name = "NUMBER", hide = true)]
    check_state: Option<i32>,

    /// Options in the old form of the C virtiofsd: source=DIRECTORY, cache=, sandbox=, modcaps=, xattrmap=, loglevel=, and
    /// with or without no_: xattr, flock, posix_lock, readdirplus, writeback, allow_direct_io,
    /// announce_submounts, posix_acl, security_label, killpriv_v2
    #[arg(short = 'o', value_name = "LIST", help_heading = "Compatibility")]
    old_form: Vec<String>,

    /// Ignored: the daemon always runs in the foreground
    #[arg(short, help_heading = "Compatibility")]
    foreground: bool,

    #[command(flatten)]
    monitor: MonitorOptions,

    #[command(flatten)]
    migration: MigrationOptions,

    /// Benchmarks only: null or null:LATENCY (2ms, 50us) drops written data
    #[arg(long, value_name = "STORE", default_value = "host", help_heading = "Benchmarks")]
    store: String,
}

/// An invalid option, or a conflict between options. Each message is one sentence that says what to do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum OptionError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("--shared-dir is missing: give the directory to share")]
    NoSharedDir,
    #[error("the front end needs a socket: give either --socket-path or --fd")]
    NoSocket,
    #[error("--socket-path and --fd are mutually exclusive")]
    TwoSockets,
    #[error("--fd {0} is invalid: give the number of a descriptor, 3 or more")]
    BadFd(i32),
    #[error("--tag must have 1 to {TAG_SIZE} bytes")]
    BadTag,
    #[error("-o {0} is not a known option, or its value is invalid; --help lists both")]
    OldForm(String),
    #[error("--request-queues must be 1 to {}", MAX_QUEUES - 1)]
    BadQueues,
    #[error("--writeback and --parallel-direct-writes=always are mutually exclusive")]
    WritebackParallel,
    #[error("--store={0} is invalid: give host, null, or null:LATENCY with a latency like 2ms or 50us")]
    BadStore(String),
    #[error("--cpus {0} is not a list of CPUs: give numbers and ranges like 0-3,6")]
    BadCpus(String),
    #[error("--modcaps {0} is invalid: give names like +sys_admin or -mknod, separated by colons")]
    BadCapabilities(String),
    #[error(
        "{option} {text} is invalid: give the first id inside, the first id on the host and the count, like :0:1000:1:"
    )]
    BadIdRange { option: &'static str, text: String },
    #[error("--uid-map and --gid-map need --sandbox=namespace")]
    MapNeedsNamespace,
    #[error("--rlimit-nofile must be at least 64, or 0 for the inherited limit")]
    BadLimit,
    #[error("--translate-{ids} is invalid")]
    BadIdMap { ids: &'static str, source: IdMapError },
    #[error("--limit-group={0} is relative: give an absolute path, since an upgraded daemon opens it anew")]
    RelativeGroup(String),
    #[error("--limit is invalid: {0}")]
    BadRate(#[from] RateError),
    #[error("--{0} is for --migration-mode=find-paths or auto only")]
    FindPathsOnly(&'static str),
    #[error("--migration-unlinked-limit={0} is invalid: give a number of bytes, like 64M or 1G")]
    BadSize(String),
    #[error("{0} and {1} are the same path; give two")]
    SamePath(&'static str, &'static str),
    #[error("--xattrmap is invalid")]
    BadXattrMap(#[source] XattrMapError),
}

/// The command line, parsed.
#[derive(Clone, Debug)]
pub enum Command {
    /// Print [`CAPABILITIES`] and exit with status 0.
    PrintCapabilities,
    /// Serve.
    Serve(Box<Config>),
    /// Upgrade a daemon that runs.
    Upgrade(Daemon),
    /// Let a daemon that runs open its share anew.
    Reopen(Daemon),
    /// Check the state in this file, which a program with the same options would go on with.
    CheckState(RawFd),
}

/// The answer to --print-capabilities, in the form of QEMU's vhost-user.json schema.
pub const CAPABILITIES: &str = r#"{
  "type": "fs",
  "features": [
    "migrate-precopy",
    "posix-acl-negotiation-mode",
    "security-label-negotiation-mode",
    "separate-options"
  ]
}"#;

/// The options of `lanefsd`, `lanefsd upgrade` and `lanefsd reopen`, for manual pages and completions.
pub fn commands() -> [clap::Command; 3] {
    [Options::command(), UpgradeOptions::command(), ReopenOptions::command()]
}

/// Parses a command line; the first argument is the program's name. Exits for --help, --version and options that clap
/// rejects.
pub fn parse(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Command, OptionError> {
    parse_or(arguments, |_| ())
}

/// The same, and calls `before` if the process is to exit because of an option.
pub fn parse_or(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
    before: impl FnOnce(&(dyn std::error::Error + 'static)),
) -> Result<Command, OptionError> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // Callers probe with this option and whatever else they are going to pass.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    if arguments.get(1).is_some_and(|argument| argument == "reopen") {
        return Ok(Command::Reopen(ReopenOptions::parse_from(arguments.into_iter().skip(1)).daemon()));
    }
    if arguments.get(1).is_some_and(|argument| argument == "upgrade") {
        return Ok(Command::Upgrade(UpgradeOptions::parse_from(arguments.into_iter().skip(1)).daemon()));
    }
    let relocatable = config_file::with_absolute_paths(&arguments);
    let arguments = config_file::expand(arguments, &Options::command())?;
    let options = Options::try_parse_from(arguments).unwrap_or_else(|error| {
        before(&error);
        error.exit()
    });
    let check = options.check_state;
    let config = Box::new(Config { arguments: relocatable, ..options.into_config()? });
    Ok(check.map_or(Command::Serve(config), Command::CheckState))
}

impl Options {
    fn into_config(mut self) -> Result<Config, OptionError> {
        self.take_old_form()?;
        let listen = self.listen()?;
        self.check_values()?;
        let id_maps = self.id_maps()?;
        let fs =
            self.attributes.add_to(FsConfig { migration: self.migration.config()?, ..self.fs_config() })?;
        if fs.writeback && fs.parallel_direct_writes == ParallelDirectWrites::Always {
            return Err(OptionError::WritebackParallel);
        }
        let store = parse_store(&self.store)?;
        // A store that keeps no data has nothing to continue with.
        let survive = !self.no_survive && store == Store::Host;
        let rules = [
            ("--xattrmap", self.attributes.xattrmap.as_slice()),
            ("--translate-uid", &self.attributes.translate_uid),
            ("--translate-gid", &self.attributes.translate_gid),
        ];
        let share = share_options(&fs, self.readonly, rules);
        Ok(Config {
            store,
            monitor: self.monitor.config(self.socket_path.as_deref())?,
            process: ProcessConfig {
                rlimit_nofile: self.rlimit_nofile,
                cpus: self.cpus.as_deref().map(parse_cpus).transpose()?,
            },
            shared_dir: self.shared_dir.ok_or(OptionError::NoSharedDir)?,
            listen,
            socket_group: self.socket_group,
            keep_listening: self.keep_listening,
            survive,
            max_deaths: self.max_deaths,
            limit_group: self.limit_group,
            device: DeviceConfig {
                tag: self.tag,
                request_queues: self.request_queues,
                thread_pool_size: self.thread_pool_size,
                poll_time: Duration::from_micros(self.poll_time),
                rates: parse_rates(&self.limit)?,
                group: None,
                descriptors_are_copied: survive,
                migration: MigrationConfig { share, ..fs.migration.clone() },
            },
            fs,
            readonly: self.readonly,
            sandbox: self.sandbox.map(Into::into),
            id_maps,
            seccomp: self.seccomp.into(),
            capabilities: self.modcaps.as_deref().map_or(Ok(CapabilityChanges::NONE), parse_modcaps)?,
            log_level: if self.debug { self.log_level.max(Some(LevelFilter::Debug)) } else { self.log_level },
            syslog: self.syslog,
            arguments: Vec::new(),
            remarks: Vec::new(),
        })
    }

    fn check_values(&self) -> Result<(), OptionError> {
        if self.tag.as_ref().is_some_and(|tag| tag.is_empty() || tag.len() > TAG_SIZE) {
            return Err(OptionError::BadTag);
        }
        if !(1..MAX_QUEUES).contains(&self.request_queues) {
            return Err(OptionError::BadQueues);
        }
        if self.rlimit_nofile.is_some_and(|limit| (1..LEAST_DESCRIPTORS).contains(&limit)) {
            return Err(OptionError::BadLimit);
        }
        if let Some(group) = self.limit_group.as_ref().filter(|path| !path.is_absolute()) {
            return Err(OptionError::RelativeGroup(group.display().to_string()));
        }
        Ok(())
    }

    fn listen(&self) -> Result<Listen, OptionError> {
        match (&self.socket_path, self.fd) {
            (Some(path), None) => Ok(Listen::Path(path.clone())),
            // 0 to 2 are the standard streams.
            (None, Some(fd)) if fd < 3 => Err(OptionError::BadFd(fd)),
            (None, Some(fd)) => Ok(Listen::Fd(fd)),
            (Some(_), Some(_)) => Err(OptionError::TwoSockets),
            (None, None) => Err(OptionError::NoSocket),
        }
    }

    fn id_maps(&self) -> Result<IdMaps, OptionError> {
        let ranges = |option, texts: &[String]| {
            texts.iter().map(|text| parse_id_range(option, text)).collect::<Result<Vec<_>, _>>()
        };
        let maps = IdMaps {
            users: ranges("--uid-map", &self.uid_map)?,
            groups: ranges("--gid-map", &self.gid_map)?,
        };
        match self.sandbox {
            Some(SandboxMode::Chroot | SandboxMode::None) if !maps.is_empty() => {
                Err(OptionError::MapNeedsNamespace)
            }
            _ => Ok(maps),
        }
    }

    fn fs_config(&self) -> FsConfig {
        FsConfig {
            cache: self.cache.into(),
            parallel_direct_writes: self.parallel_direct_writes.into(),
            parallel_extending: !self.no_parallel_extending,
            mapped_writes: self.mapped_writes.into(),
            writeback: self.writeback,
            allow_mmap: self.allow_mmap,
            allow_direct_io: self.allow_direct_io,
            io_engine: self.io_engine.into(),
            tmpfile: self.tmpfile,
            readdirplus: !self.no_readdirplus,
            xattr: self.xattr,
            inode_file_handles: self.inode_file_handles.into(),
            posix_lock: self.posix_lock,
            flock: self.flock,
            announce_submounts: !self.no_announce_submounts,
            ..FsConfig::default()
        }
    }
}

#[cfg(test)]
mod tests;
