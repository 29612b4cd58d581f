use super::*;
use crate::config::{CachePolicy, MigrationConfig, Sandbox, Seccomp, Store};
use crate::limits::{Limit, RateError, Rates};
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
            poll_time: Duration::from_micros(20),
            rates: Rates::default(),
            group: None,
            descriptors_are_copied: true,
            migration: MigrationConfig {
                share: config.device.migration.share.clone(),
                ..MigrationConfig::default()
            },
        }
    );
    assert!(config.fs.readdirplus && config.fs.announce_submounts);
    assert!(!config.fs.xattr && !config.fs.writeback && !config.readonly && !config.keep_listening);
    assert_eq!((config.seccomp, config.capabilities), (Seccomp::Kill, CapabilityChanges::NONE));
    assert_eq!((config.sandbox, config.log_level, config.process), (None, None, ProcessConfig::default()));
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
        ("--shared-dir /d --fd 3 --limit-group=a/b", OptionError::RelativeGroup("a/b".into())),
        ("--shared-dir /d --fd 3 --limit=", OptionError::BadRate(RateError::Unknown("".into()))),
        (
            "--shared-dir /d --fd 3 --limit write-ops=7 --limit read-ops=0",
            OptionError::BadRate(RateError::Zero { name: "read-ops", value: "0".into() }),
        ),
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
    assert_eq!(config("--limit-group=/run/vm").limit_group, Some("/run/vm".into()));
    let rates = config("--limit=read-bytes=1M,read-ops=5 --limit read-ops=6").device.rates;
    assert_eq!((rates.rate(Limit::ReadBytes), rates.rate(Limit::ReadOps)), (Some(1 << 20), Some(6)));
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
