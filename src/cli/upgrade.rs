//! The command line of `lanefsd upgrade`.

use std::path::PathBuf;

use clap::{Args, Parser};

use crate::config::Daemon;

/// Let a daemon that runs go on with the program that is installed now, without an interruption for the guest.
///
/// It is the program at the path that the daemon was started from, and it gets the same options. If it cannot go on, the
/// old one does. Prints one sentence; the exit status is 0 after an upgrade, and 1 without one.
#[derive(Clone, Debug, Parser)]
#[command(name = "lanefsd upgrade", bin_name = "lanefsd upgrade", version, max_term_width = 100)]
pub(super) struct UpgradeOptions {
    #[command(flatten)]
    daemon: Which,
}

/// Let a daemon that runs open its shared directory anew, after that was unmounted and mounted again.
///
/// The guest goes on: what it knows and has open is looked for by its path. Locks are lost, and files without a name. Prints
/// one sentence; the exit status is 1 if the directory cannot be opened, and the daemon goes on as it was.
#[derive(Clone, Debug, Parser)]
#[command(name = "lanefsd reopen", bin_name = "lanefsd reopen", version, max_term_width = 100)]
pub(super) struct ReopenOptions {
    #[command(flatten)]
    daemon: Which,
}

#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The daemon's --socket-path
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// The id of the process that was started
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl UpgradeOptions {
    /// The daemon that is meant.
    pub(super) fn daemon(self) -> Daemon {
        self.daemon.daemon()
    }
}

impl ReopenOptions {
    /// The same.
    pub(super) fn daemon(self) -> Daemon {
        self.daemon.daemon()
    }
}

impl Which {
    fn daemon(self) -> Daemon {
        match (self.socket_path, self.pid) {
            (Some(path), _) => Daemon::Socket(path),
            (None, pid) => Daemon::Pid(pid.unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::{Command, parse};

    #[test]
    fn a_daemon_is_named_once() {
        UpgradeOptions::command().debug_assert();
        let upgrade = |words: &[&str]| parse(["lanefsd", "upgrade"].iter().chain(words).map(Into::into));
        for (words, daemon) in
            [(&["--socket-path=/s"][..], Daemon::Socket("/s".into())), (&["--pid", "7"], Daemon::Pid(7))]
        {
            assert!(matches!(upgrade(words), Ok(Command::Upgrade(found)) if found == daemon));
        }
        for wrong in [&[][..], &["--pid=7", "--socket-path=/s"], &["--pid=0"], &["--shared-dir=/d"]] {
            let words = ["lanefsd upgrade"].iter().chain(wrong);
            assert!(UpgradeOptions::try_parse_from(words).is_err(), "{wrong:?}");
        }
    }
}
