//! Remarks about a configuration, which are logged when the start has succeeded.

use std::fmt;

use log::{Level, log};

/// A log message about the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    level: Level,
    text: String,
}

impl Remark {
    /// A likely mistake.
    pub fn warning(text: impl Into<String>) -> Remark {
        Remark { level: Level::Warn, text: text.into() }
    }

    /// A limitation that may be intended.
    pub fn information(text: impl Into<String>) -> Remark {
        Remark { level: Level::Info, text: text.into() }
    }

    /// Logs the remark. Called when the start has succeeded: one that fails prints a single sentence.
    pub fn log(&self) {
        log!(self.level, "{}", self.text);
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}
