//! The options for those who look at the daemon.

use std::path::{Path, PathBuf, absolute};

use clap::Args;

use super::OptionError;
use crate::config::MonitorConfig;

#[derive(Args, Clone, Debug)]
pub(super) struct MonitorOptions {
    /// Let root and the daemon's user look at the daemon and control it by lanefsctl, which connects to a socket at PATH
    #[arg(long, value_name = "PATH", help_heading = "Monitoring")]
    control_socket: Option<PathBuf>,

    /// Serve counters for Prometheus at /metrics over HTTP on a socket at PATH; --socket-group may connect as well
    #[arg(long, value_name = "PATH", help_heading = "Monitoring")]
    metrics_socket: Option<PathBuf>,

    /// Write the same to FILE every 15 seconds, for node_exporter's textfile collector
    #[arg(long, value_name = "FILE", help_heading = "Monitoring")]
    metrics_file: Option<PathBuf>,
}

impl MonitorOptions {
    /// Another program that goes on has another working directory, so the paths are absolute.
    pub(super) fn config(&self, socket: Option<&Path>) -> Result<MonitorConfig, OptionError> {
        let whole = |path: &Option<PathBuf>| {
            path.as_ref().map(|path| absolute(path).unwrap_or_else(|_| path.clone()))
        };
        let config = MonitorConfig {
            control_socket: whole(&self.control_socket),
            metrics_socket: whole(&self.metrics_socket),
            metrics_file: whole(&self.metrics_file),
        };
        let socket = socket.and_then(|path| absolute(path).ok());
        let all: Vec<_> =
            config.paths().chain(socket.as_deref().map(|path| ("--socket-path", path))).collect();
        for (number, (option, path)) in all.iter().enumerate() {
            if let Some((other, _)) = all.iter().skip(number + 1).find(|(_, other)| other == path) {
                return Err(OptionError::SamePath(option, other));
            }
        }
        Ok(config)
    }
}
