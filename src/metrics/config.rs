//! The options for those who look at the daemon.

use std::path::{Path, PathBuf};

/// What operators may look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MonitorConfig {
    /// Where `lanefsctl` connects.
    pub control_socket: Option<PathBuf>,
    /// Where the counters are served over HTTP.
    pub metrics_socket: Option<PathBuf>,
    /// The file into which the counters are written now and then.
    pub metrics_file: Option<PathBuf>,
}

impl MonitorConfig {
    /// Whether anybody looks.
    pub fn is_wanted(&self) -> bool {
        self.paths().next().is_some()
    }

    /// All paths, with their options.
    pub fn paths(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all = [
            ("--control-socket", &self.control_socket),
            ("--metrics-socket", &self.metrics_socket),
            ("--metrics-file", &self.metrics_file),
        ];
        all.into_iter().filter_map(|(option, path)| Some((option, path.as_deref()?)))
    }
}
