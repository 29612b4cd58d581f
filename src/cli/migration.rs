//! Options of migration.

use clap::{Args, ValueEnum};

use super::OptionError;
use crate::config::{
    CachePolicy, FsConfig, MigrationConfig, MigrationMode, OnError as Policy, ShareOptions, StreamFormat,
};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Migration")]
pub(super) struct MigrationOptions {
    /// How the destination finds the guest's files
    #[arg(long, value_enum, value_name = "HOW", default_value = "find-paths")]
    migration_mode: Mode,

    /// Action on a file that the destination does not find
    #[arg(long, value_enum, value_name = "WHAT", default_value = "abort")]
    migration_on_error: OnError,

    /// Compare file handles on the destination: a file that has taken the name of another one is none
    #[arg(long)]
    migration_verify_handles: bool,

    /// Check the names of files once more when the guest is paused
    #[arg(long)]
    migration_confirm_paths: bool,

    /// The stream that is written; both are read
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "lanefsd")]
    migration_format: Format,

    /// Most bytes of open files without a name that are copied; K, M and G stand for 2^10, 2^20 and 2^30
    #[arg(long, value_name = "SIZE", default_value = "16M")]
    migration_unlinked_limit: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// By their names
    FindPaths,
    /// By their file handles: both hosts have the same file system
    FileHandles,
    /// By file handles where the file system keeps them, else by names
    Auto,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnError {
    /// Fail: the guest goes on at the source
    Abort,
    /// Go on: the guest gets an error for this file
    GuestError,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// All that a guest has, with a checksum
    Lanefsd,
    /// That of virtiofsd
    Virtiofsd,
}

impl MigrationOptions {
    /// The same, checked.
    pub(super) fn config(&self) -> Result<MigrationConfig, OptionError> {
        if self.migration_mode == Mode::FileHandles {
            let given = [
                (self.migration_verify_handles, "migration-verify-handles"),
                (self.migration_confirm_paths, "migration-confirm-paths"),
            ];
            if let Some((_, name)) = given.into_iter().find(|(given, _)| *given) {
                return Err(OptionError::FindPathsOnly(name));
            }
        }
        let limit = &self.migration_unlinked_limit;
        Ok(MigrationConfig {
            mode: match self.migration_mode {
                Mode::FindPaths => MigrationMode::FindPaths,
                Mode::FileHandles => MigrationMode::FileHandles,
                // As virtiofsd does by default; it may have no right to open file handles.
                Mode::Auto if matches!(self.migration_format, Format::Virtiofsd) => MigrationMode::FindPaths,
                Mode::Auto => MigrationMode::Auto,
            },
            on_error: match self.migration_on_error {
                OnError::Abort => Policy::Abort,
                OnError::GuestError => Policy::GuestError,
            },
            verify_handles: self.migration_verify_handles,
            confirm_paths: self.migration_confirm_paths,
            format: match self.migration_format {
                Format::Lanefsd => StreamFormat::Lanefsd,
                Format::Virtiofsd => StreamFormat::Virtiofsd,
            },
            unlinked_limit: parse_size(limit).ok_or_else(|| OptionError::BadSize(limit.clone()))?,
            share: ShareOptions::default(),
        })
    }
}

/// A number of bytes, or with a unit.
fn parse_size(text: &str) -> Option<u64> {
    let unit = match text.chars().last()?.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        _ => return text.parse().ok(),
    };
    let number: u64 = text.get(..text.len().checked_sub(1)?)?.parse().ok()?;
    number.checked_mul(1 << unit)
}

/// What both ends of a migration must have. What INIT negotiates is not among it: it is compared as such.
pub(super) fn share_options(
    fs: &FsConfig,
    readonly: bool,
    rules: [(&'static str, &[String]); 3],
) -> ShareOptions {
    let cache = match fs.cache {
        CachePolicy::Never => "never",
        CachePolicy::Metadata => "metadata",
        CachePolicy::Auto => "auto",
        CachePolicy::Always => "always",
    };
    let switch = |on| if on { "on" } else { "off" };
    let plain = [("--cache", cache), ("--readonly", switch(readonly)), ("--xattr", switch(fs.xattr))];
    let plain = plain.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    let rules = rules.into_iter().map(|(name, rules)| {
        let rules = if rules.is_empty() { "unset".to_owned() } else { rules.join(" ") };
        (name.to_owned(), rules)
    });
    ShareOptions(plain.chain(rules).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::config;

    fn with(more: &str) -> Result<MigrationConfig, OptionError> {
        config(&format!("--fd 3 --shared-dir /d {more}")).map(|config| {
            assert_eq!(config.device.migration.share.0.len(), 6);
            config.fs.migration
        })
    }

    #[test]
    fn options_are_understood() {
        assert_eq!(with("").unwrap(), MigrationConfig::default());
        for (option, expected) in [
            ("find-paths", MigrationMode::FindPaths),
            ("file-handles", MigrationMode::FileHandles),
            ("auto", MigrationMode::Auto),
        ] {
            assert_eq!(with(&format!("--migration-mode={option}")).unwrap().mode, expected);
        }
        assert_eq!(with("--migration-on-error abort").unwrap().on_error, Policy::Abort);
        assert_eq!(with("--migration-on-error=guest-error").unwrap().on_error, Policy::GuestError);
        let config = with("--migration-format=virtiofsd").unwrap();
        assert_eq!((config.format, config.mode), (StreamFormat::Virtiofsd, MigrationMode::FindPaths));
        let both = "--migration-verify-handles --migration-confirm-paths";
        for more in [both.to_owned(), format!("--migration-mode=find-paths {both}")] {
            let config = with(&more).unwrap();
            assert!(config.verify_handles && config.confirm_paths);
        }
        for (size, bytes) in [("0", 0), ("4711", 4711), ("3k", 3 << 10), ("64M", 64 << 20), ("2G", 2 << 30)] {
            let config = with(&format!("--migration-unlinked-limit={size}")).unwrap();
            assert_eq!(config.unlinked_limit, bytes);
        }
    }

    #[test]
    fn options_that_contradict_are_refused() {
        for name in ["migration-verify-handles", "migration-confirm-paths"] {
            let error = with(&format!("--migration-mode=file-handles --{name}")).unwrap_err();
            assert_eq!(error, OptionError::FindPathsOnly(name));
        }
        for size in ["", "x", "M", "-1", "1T", "1.5G", "99999999999999999999", "18446744073709551615K", "1é"]
        {
            let error = with(&format!("--migration-unlinked-limit={size}")).unwrap_err();
            assert_eq!(error, OptionError::BadSize(size.into()));
        }
    }

    /// The same options in another form are the same.
    #[test]
    fn a_share_is_compared_by_what_the_guest_relies_on() {
        let share =
            |more: &str| config(&format!("--fd 3 --shared-dir /d {more}")).unwrap().device.migration.share;
        assert_eq!(
            share("--cache=none --posix-acl"),
            share("-o cache=never --xattr --posix-lock --log-level=debug")
        );
        for (one, other, name) in [
            ("", "--cache=always", "--cache"),
            ("", "--readonly", "--readonly"),
            ("--xattr", "", "--xattr"),
            ("--xattrmap=:ok:all:::", "--xattr", "--xattrmap"),
            ("--translate-uid=map:0:1:1", "--translate-uid=map:0:2:1", "--translate-uid"),
            ("--translate-gid=map:0:1:1", "", "--translate-gid"),
        ] {
            let difference = share(one).difference(&share(other)).map(|(name, _, _)| name.to_owned());
            assert_eq!(difference.as_deref(), Some(name));
        }
    }
}
