//! virtiofsd's options for live migration, which is not supported yet. Launchers that pass them for all guests must be
//! able to start this daemon.

use clap::{Args, ValueEnum};

use super::OptionError;
use crate::logging::Remark;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Migration (not supported yet: checked and ignored)")]
pub(super) struct MigrationOptions {
    /// How virtiofsd identifies the guest's files on the destination
    #[arg(long, value_enum, value_name = "HOW")]
    migration_mode: Option<Mode>,

    /// What virtiofsd does on the destination about a missing file
    #[arg(long, value_enum, value_name = "WHAT")]
    migration_on_error: Option<OnError>,

    /// With find-paths: compare file handles on the destination
    #[arg(long)]
    migration_verify_handles: bool,

    /// With find-paths: check the paths once more at the end
    #[arg(long)]
    migration_confirm_paths: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    FindPaths,
    FileHandles,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnError {
    Abort,
    GuestError,
}

impl MigrationOptions {
    /// A warning that they have no effect, if any was given.
    pub(super) fn remarks(&self) -> Result<Vec<Remark>, OptionError> {
        let given = [
            (self.migration_mode.is_some(), "migration-mode"),
            (self.migration_on_error.is_some(), "migration-on-error"),
            (self.migration_verify_handles, "migration-verify-handles"),
            (self.migration_confirm_paths, "migration-confirm-paths"),
        ];
        let mut given = given.into_iter().filter(|(given, _)| *given).map(|(_, name)| name);
        if self.migration_mode == Some(Mode::FileHandles)
            && let Some(name) =
                given.clone().find(|name| name.ends_with("handles") || name.ends_with("paths"))
        {
            return Err(OptionError::FindPathsOnly(name));
        }
        let Some(first) = given.next() else { return Ok(Vec::new()) };
        let names = given.fold(format!("--{first}"), |names, name| format!("{names}, --{name}"));
        Ok(vec![Remark::warning(format!(
            "{names} has no effect: a VM with this share can be neither migrated nor saved"
        ))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::config;

    #[test]
    fn options_of_virtiofsd_are_checked_and_pointed_out() {
        let with = |more: &str| config(&format!("--fd 3 --shared-dir /d {more}"));
        assert!(with("").unwrap().remarks.is_empty());
        for options in [
            "--migration-mode find-paths --migration-on-error=abort",
            "--migration-mode=file-handles --migration-on-error guest-error",
            "--migration-verify-handles --migration-confirm-paths",
            "--migration-mode=find-paths --migration-verify-handles --migration-confirm-paths",
        ] {
            let remarks = with(options).unwrap().remarks;
            assert!(
                matches!(remarks.as_slice(), [one] if one.to_string().starts_with("--migration-")),
                "{remarks:?}"
            );
        }
        for name in ["migration-verify-handles", "migration-confirm-paths"] {
            let error = with(&format!("--migration-mode=file-handles --{name}")).unwrap_err();
            assert_eq!(error, OptionError::FindPathsOnly(name));
        }
    }
}
