//! Options about owners and extended attributes.

use clap::{Args, ValueEnum};

use super::OptionError;
use crate::config::{FeatureMode, FsConfig};
use crate::mapping::ids::{Id, IdMap, IdMapError};

/// Options about owners and extended attributes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Owners and attributes")]
pub(super) struct AttributeOptions {
    /// Map user ids between guest and host: map:GUEST:HOST:COUNT, guest:GUEST:HOST:COUNT,
    /// host:HOST:GUEST:COUNT, squash-guest:GUEST:HOST:COUNT, squash-host:HOST:GUEST:COUNT or
    /// forbid-guest:GUEST:COUNT; repeatable
    #[arg(long, value_name = "RULE")]
    pub(super) translate_uid: Vec<String>,

    /// The same for group ids
    #[arg(long, value_name = "RULE")]
    pub(super) translate_gid: Vec<String>,

    /// Rename extended attributes on the host, for example :map::user.guest.: (implies --xattr)
    #[arg(long, value_name = "RULES")]
    pub(super) xattrmap: Option<String>,

    /// Support POSIX ACLs, which the guest evaluates (implies --xattr); without MODE: always
    #[arg(
        long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true,
        default_value = "never", default_missing_value = "always"
    )]
    pub(super) posix_acl: Mode,

    /// Support security labels (SELinux) of files that the guest creates (implies --xattr); without
    /// MODE: always
    #[arg(
        long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true,
        default_value = "never", default_missing_value = "always"
    )]
    pub(super) security_label: Mode,

    /// Let the host clear set-id bits when a file changes (default)
    #[arg(long, overrides_with = "no_killpriv_v2")]
    killpriv_v2: bool,

    /// Let the guest clear set-id bits, for host file systems that do not (NFS)
    #[arg(long)]
    pub(super) no_killpriv_v2: bool,

    /// Pass the guest's O_NOATIME on to the host, which may refuse it
    #[arg(long)]
    preserve_noatime: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    /// Off
    Never,
    /// On if the guest and the host's file system support it
    Auto,
    /// Refuse to serve without it
    Always,
}

impl From<Mode> for FeatureMode {
    fn from(mode: Mode) -> FeatureMode {
        match mode {
            Mode::Never => FeatureMode::Never,
            Mode::Auto => FeatureMode::Auto,
            Mode::Always => FeatureMode::Always,
        }
    }
}

impl AttributeOptions {
    /// Applies these options to `config`.
    pub(super) fn add_to(&self, config: FsConfig) -> Result<FsConfig, OptionError> {
        Ok(FsConfig {
            uid_map: id_map(&self.translate_uid)
                .map_err(|source| OptionError::BadIdMap { ids: "uid", source })?,
            gid_map: id_map(&self.translate_gid)
                .map_err(|source| OptionError::BadIdMap { ids: "gid", source })?,
            xattr: config.xattr
                || self.xattrmap.is_some()
                || self.posix_acl != Mode::Never
                || self.security_label != Mode::Never,
            security_label: self.security_label.into(),
            killpriv_v2: !self.no_killpriv_v2,
            preserve_noatime: self.preserve_noatime,
            posix_acl: self.posix_acl.into(),
            xattr_map: self
                .xattrmap
                .as_deref()
                .map(|rules| rules.parse().map_err(OptionError::BadXattrMap))
                .transpose()?,
            ..config
        })
    }
}

fn id_map<G: Id, H: Id>(rules: &[String]) -> Result<IdMap<G, H>, IdMapError> {
    let rules: Vec<_> = rules.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?;
    IdMap::new(&rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::config;

    fn fs(more: &str) -> FsConfig {
        config(&format!("--fd 3 --shared-dir /d {more}")).unwrap().fs
    }

    #[test]
    fn an_empty_command_line_asks_for_the_defaults() {
        assert_eq!(fs(""), FsConfig::default());
    }

    #[test]
    fn modes_are_understood() {
        for (option, mode) in [
            ("=never", FeatureMode::Never),
            ("=auto", FeatureMode::Auto),
            ("=always", FeatureMode::Always),
            // Without a mode; the word after it is not taken for one.
            (" --readonly", FeatureMode::Always),
        ] {
            assert_eq!(fs(&format!("--posix-acl{option}")).posix_acl, mode, "{option}");
            assert_eq!(fs(&format!("--security-label{option}")).security_label, mode, "{option}");
        }
    }

    #[test]
    fn attributes_are_served_where_an_option_needs_them() {
        assert!(!fs("--posix-acl=never --security-label=never --translate-uid=map:0:1:1").xattr);
        for option in ["--xattrmap=:ok:all:::", "--posix-acl=auto", "--security-label=auto", "--xattr"] {
            assert!(fs(option).xattr, "{option}");
        }
    }
}
