//! The command line. Option names are virtiofsd's wherever it has one.

mod attributes;
mod choices;
mod migration;
mod old_form;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, value_parser};
use log::LevelFilter;
use thiserror::Error;

use self::attributes::AttributeOptions;
use self::choices::{Cache, FileHandles, Parallel, SandboxMode, SeccompMode, log_levels};
use self::migration::MigrationOptions;
use self::values::{parse_cpus, parse_id_range, parse_modcaps, parse_store};
use crate::config::{
    CapabilityChanges, Config, DeviceConfig, FsConfig, IdMaps, LEAST_DESCRIPTORS, Listen,
    ParallelDirectWrites, ProcessConfig,
};
use crate::device::backend::MAX_QUEUES;
use crate::device::config_space::TAG_SIZE;
use crate::mapping::ids::IdMapError;
use crate::mapping::xattrs::XattrMapError;

/// Share a host directory with a virtual machine: a vhost-user daemon for virtio-fs.
///
/// The guest mounts the share with `mount -t virtiofs TAG DIRECTORY`. TAG is the mount tag of the VMM's
/// device: `tag=` of QEMU's vhost-user-fs-pci, `<target dir=…>` of libvirt.
#[derive(Clone, Debug, Parser)]
#[command(version, about, long_about, max_term_width = 100, args_override_self = true)]
pub struct Options {
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

    /// Let the guest delay and combine buffered writes; not for shares that change on the host
    #[arg(long, help_heading = "Caching and data")]
    writeback: bool,

    /// Allow shared mappings of files with --cache=never or metadata (Linux 6.9 and later)
    #[arg(long, help_heading = "Caching and data")]
    allow_mmap: bool,

    /// Pass the guest's O_DIRECT on to the host; without it the host may cache the data
    #[arg(long, help_heading = "Caching and data")]
    allow_direct_io: bool,

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

    /// Options in the old form of the C virtiofsd: source=DIRECTORY, cache=, sandbox=, modcaps=, xattrmap=, loglevel=, and
    /// with or without no_: xattr, flock, posix_lock, readdirplus, writeback, allow_direct_io,
    /// announce_submounts, posix_acl, security_label, killpriv_v2
    #[arg(short = 'o', value_name = "LIST", help_heading = "Compatibility")]
    old_form: Vec<String>,

    /// Ignored: the daemon always runs in the foreground
    #[arg(short, help_heading = "Compatibility")]
    foreground: bool,

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
    #[error("--{0} is for --migration-mode=find-paths only")]
    FindPathsOnly(&'static str),
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
}

/// The answer to --print-capabilities, in the form of QEMU's vhost-user.json schema.
pub const CAPABILITIES: &str = r#"{
  "type": "fs",
  "features": [
    "posix-acl-negotiation-mode",
    "security-label-negotiation-mode",
    "separate-options"
  ]
}"#;

/// Parses a command line; the first argument is the program's name. Exits for --help, --version and options that clap
/// rejects.
pub fn parse(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Command, OptionError> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // Callers probe with this option and whatever else they are going to pass.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    let options = Options::parse_from(arguments);
    options.into_config().map(|config| Command::Serve(Box::new(config)))
}

impl Options {
    fn into_config(mut self) -> Result<Config, OptionError> {
        self.take_old_form()?;
        let listen = self.listen()?;
        if self.tag.as_ref().is_some_and(|tag| tag.is_empty() || tag.len() > TAG_SIZE) {
            return Err(OptionError::BadTag);
        }
        if !(1..MAX_QUEUES).contains(&self.request_queues) {
            return Err(OptionError::BadQueues);
        }
        if self.rlimit_nofile.is_some_and(|limit| (1..LEAST_DESCRIPTORS).contains(&limit)) {
            return Err(OptionError::BadLimit);
        }
        let id_maps = self.id_maps()?;
        let fs = self.attributes.add_to(self.fs_config())?;
        if fs.writeback && fs.parallel_direct_writes == ParallelDirectWrites::Always {
            return Err(OptionError::WritebackParallel);
        }
        Ok(Config {
            store: parse_store(&self.store)?,
            process: ProcessConfig {
                rlimit_nofile: self.rlimit_nofile,
                cpus: self.cpus.as_deref().map(parse_cpus).transpose()?,
            },
            shared_dir: self.shared_dir.ok_or(OptionError::NoSharedDir)?,
            listen,
            socket_group: self.socket_group,
            keep_listening: self.keep_listening,
            device: DeviceConfig {
                tag: self.tag,
                request_queues: self.request_queues,
                thread_pool_size: self.thread_pool_size,
                poll_time: Duration::from_micros(self.poll_time),
            },
            fs,
            readonly: self.readonly,
            sandbox: self.sandbox.map(Into::into),
            id_maps,
            seccomp: self.seccomp.into(),
            capabilities: self.modcaps.as_deref().map_or(Ok(CapabilityChanges::NONE), parse_modcaps)?,
            log_level: if self.debug { self.log_level.max(Some(LevelFilter::Debug)) } else { self.log_level },
            syslog: self.syslog,
            remarks: self.migration.remarks()?,
        })
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
            writeback: self.writeback,
            allow_mmap: self.allow_mmap,
            allow_direct_io: self.allow_direct_io,
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
mod tests {
    use super::*;
    use crate::config::{CachePolicy, Sandbox, Seccomp, Store};
    use clap::CommandFactory;
    use std::time::Duration;

    pub(super) fn config(arguments: &str) -> Result<Config, OptionError> {
        let words = ["lanefsd"].into_iter().chain(arguments.split_whitespace());
        Options::try_parse_from(words).unwrap().into_config()
    }

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let config = config("--socket-path /s --shared-dir /d").unwrap();
        assert_eq!(config.listen, Listen::Path("/s".into()));
        assert_eq!(config.fs.cache, CachePolicy::Auto);
        assert_eq!(config.fs.parallel_direct_writes, ParallelDirectWrites::Auto);
        assert_eq!(config.store, Store::Host);
        assert_eq!(
            config.device,
            DeviceConfig {
                tag: None,
                request_queues: 63,
                thread_pool_size: 16,
                poll_time: Duration::from_micros(20)
            }
        );
        assert!(config.fs.readdirplus && config.fs.announce_submounts);
        assert!(!config.fs.xattr && !config.fs.writeback && !config.readonly && !config.keep_listening);
        assert_eq!((config.seccomp, config.capabilities), (Seccomp::Kill, CapabilityChanges::NONE));
        assert_eq!(
            (config.sandbox, config.log_level, config.process),
            (None, None, ProcessConfig::default())
        );
    }

    #[test]
    fn invalid_and_conflicting_options_are_refused() {
        for (arguments, error) in [
            ("--socket-path /s", OptionError::NoSharedDir),
            ("--shared-dir /d", OptionError::NoSocket),
            ("--shared-dir /d --socket-path /s --fd 3", OptionError::TwoSockets),
            ("--shared-dir /d --fd 2", OptionError::BadFd(2)),
            ("--shared-dir /d --fd 3 --tag 1234567890123456789012345678901234567", OptionError::BadTag),
            ("--shared-dir /d --fd 3 --tag=", OptionError::BadTag),
            ("--shared-dir /d --fd 3 --request-queues 0", OptionError::BadQueues),
            ("--shared-dir /d --fd 3 --request-queues 64", OptionError::BadQueues),
            ("--shared-dir /d --fd 3 --rlimit-nofile 5", OptionError::BadLimit),
            (
                "--shared-dir /d --fd 3 --writeback --parallel-direct-writes always",
                OptionError::WritebackParallel,
            ),
            ("--shared-dir /d --fd 3 --store nil", OptionError::BadStore("nil".into())),
            ("--shared-dir /d --fd 3 --store null:", OptionError::BadStore("null:".into())),
            ("--shared-dir /d --fd 3 --store null:2", OptionError::BadStore("null:2".into())),
            ("--shared-dir /d --fd 3 --store null:2h", OptionError::BadStore("null:2h".into())),
            ("--shared-dir /d --fd 3 --cpus 3-1", OptionError::BadCpus("3-1".into())),
            ("--shared-dir /d --fd 3 --modcaps mknod", OptionError::BadCapabilities("mknod".into())),
            ("--shared-dir /d --fd 3 --modcaps +nil", OptionError::BadCapabilities("+nil".into())),
            ("--shared-dir /d --fd 3 --modcaps=", OptionError::BadCapabilities("".into())),
            ("--shared-dir /d --fd 3 --gid-map=:0:1:1: --sandbox none", OptionError::MapNeedsNamespace),
            ("--shared-dir /d --fd 3 --cpus 1,,2", OptionError::BadCpus("1,,2".into())),
        ] {
            assert_eq!(config(arguments).unwrap_err(), error, "{arguments}");
        }
    }

    #[test]
    fn values_are_understood() {
        let base = "--shared-dir /d --fd 3";
        let config = |more: &str| config(&format!("{base} {more}")).unwrap();
        assert_eq!(config("--store null").store, Store::Null { latency: Duration::ZERO });
        assert_eq!(config("--store null:50us").store, Store::Null { latency: Duration::from_micros(50) });
        assert_eq!(config("--store null:2ms").store, Store::Null { latency: Duration::from_millis(2) });
        assert_eq!(config("--cpus 0-2,5").process.cpus, Some(vec![0, 1, 2, 5]));
        assert_eq!(config("--cache none").fs.cache, CachePolicy::Never);
        assert_eq!(config("--sandbox chroot").sandbox, Some(Sandbox::Chroot));
        assert_eq!(config("--seccomp=none").seccomp, Seccomp::None);
        assert_eq!(config("--seccomp log").seccomp, Seccomp::Log);
        assert_eq!(config("--seccomp trap").seccomp, Seccomp::Trap);
        assert_eq!(config("--log-level debug").log_level, Some(LevelFilter::Debug));
        assert!(!config("--no-announce-submounts").fs.announce_submounts);
        assert!(config("--announce-submounts").fs.announce_submounts);
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_asked() {
        let words = ["lanefsd", "--nonsense", "--print-capabilities", "-o", "x"].map(Into::into);
        assert!(matches!(parse(words), Ok(Command::PrintCapabilities)));
        let json: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(json["type"], "fs");
    }
}
