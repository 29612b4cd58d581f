//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::limit;

/// Directory of control sockets if none is named.
pub(crate) const DIRECTORY: &str = "/run/lanefsd";

/// Show and control lanefsd daemons that run.
///
/// A daemon that was started with --control-socket answers to root and to its own user. Without --socket, the shares are
/// those with a socket *.ctl in /run/lanefsd; commands that change something want --socket if there are several.
///
/// The exit status is 0 after success, 1 after an error, and 2 after a wrong command line.
#[derive(Debug, Parser)]
#[command(name = "lanefsctl", version, max_term_width = 100, disable_help_subcommand = true)]
pub(crate) struct Options {
    /// The daemon's --control-socket; may be repeated
    #[arg(short, long = "socket", value_name = "PATH", global = true)]
    pub(crate) sockets: Vec<PathBuf>,

    /// Print the answer as it came, one line of JSON for each share
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the state of the share: queues, handles, descriptors, limits, and remarks with remedies
    Status,
    /// Show the requests in flight, with age and phase
    ///
    /// The phases are: decoding (the request is read from the ring), waiting (for a byte range or a lock), serving (a
    /// system call runs), submitted (io_uring has it).
    Ops,
    /// Show the slowest requests of the last minutes
    Slow,
    /// Show rates and latencies live
    Top(TopOptions),
    /// Show the limits of the share, or set some
    ///
    /// Limits that are not named stay as they are. They end with the daemon; --limit of lanefsd sets them at its start.
    Limit {
        /// A limit as --limit of lanefsd has it: read-bytes, write-bytes, read-ops, write-ops, meta-ops (each a second), like
        /// write-bytes=100M, or burst=100ms; off removes one
        #[arg(value_name = "NAME=VALUE", value_parser = limit::parse)]
        settings: Vec<String>,
    },
    /// Set the log level
    #[command(name = "loglevel")]
    LogLevel {
        /// Messages to print: this level and the more severe ones
        #[arg(value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
        level: String,
    },
    /// Take no more requests, and wait until those in flight are finished
    ///
    /// Requests of the guest stay in the rings until resume; nothing is lost.
    Drain {
        /// Seconds to wait for requests in flight
        #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
        timeout: Duration,
    },
    /// Take requests again
    Resume,
    /// Let the daemon go on with the program that is installed now, without an interruption for the guest
    ///
    /// Runs lanefsd upgrade --pid with the process of the daemon: the lanefsd beside lanefsctl, or the one in PATH. Its
    /// exit status is passed on.
    Upgrade,
}

/// Options of `top`.
#[derive(Clone, Debug, Args)]
pub(crate) struct TopOptions {
    /// Seconds between updates
    #[arg(short = 'd', long, value_name = "SECONDS", default_value = "2", value_parser = parse_interval)]
    pub(crate) interval: Duration,

    /// Print plain text, which needs no terminal
    #[arg(short, long)]
    pub(crate) batch: bool,

    /// End after this number of updates
    #[arg(short = 'n', long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

/// The command line of `lanefsctl`, as manual pages and completions are made from it.
#[must_use]
pub fn command() -> clap::Command {
    Options::command()
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok().filter(|value| (0.0..=86_400.0).contains(value));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, from 0 to 86400".to_owned())
}

/// An interval of `top`, from the command line or typed there.
pub(crate) fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.trim().parse().ok().filter(|value| (0.1..=3600.0).contains(value));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, from 0.1 to 3600".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from(["lanefsctl"].iter().chain(words))
    }

    #[test]
    fn a_socket_is_named_before_or_after_the_command() {
        command().debug_assert();
        for words in [&["-s", "/a", "--socket=/b", "status"][..], &["status", "-s/a", "-s/b"]] {
            assert_eq!(parse(words).unwrap().sockets, [PathBuf::from("/a"), PathBuf::from("/b")]);
        }
    }

    #[test]
    fn a_wrong_command_line_is_refused() {
        let wrong = [
            &[][..],
            &["help"],
            &["loglevel"],
            &["loglevel", "loud"],
            &["limit", "read-opps=1"],
            &["drain", "--timeout=-1"],
            &["drain", "--timeout=nan"],
            &["top", "-d0"],
            &["top", "-dinf"],
            &["top", "-n0"],
        ];
        for words in wrong {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert!(parse(&["top", "-b", "-n", "3", "-d", "0.5"]).is_ok());
    }
}
