//! Messages: one line each, to standard error or the system log. What a guest can cause is limited.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::LevelFilter;
use thiserror::Error;

/// Messages of one kind that are printed at once.
const BURST: u32 = 10;
/// Time after which as many may be printed again.
const PERIOD: Duration = Duration::from_secs(5);

/// The system log is not there.
#[derive(Debug, Error)]
#[error("the system log cannot be reached; leave --syslog out to print messages on standard error")]
pub struct LoggingError(#[source] syslog::Error);

/// Prints messages up to `level` from now on; without one RUST_LOG decides, and without that it is info.
pub fn start(level: Option<LevelFilter>, to_syslog: bool) -> Result<(), LoggingError> {
    if to_syslog {
        let level = level.unwrap_or(LevelFilter::Info);
        return syslog::init_unix(syslog::Facility::LOG_DAEMON, level).map_err(LoggingError);
    }
    let mut builder = env_logger::Builder::new();
    match (level, std::env::var("RUST_LOG")) {
        (None, Ok(filter)) => builder.parse_filters(&filter),
        _ => builder.filter_level(level.unwrap_or(LevelFilter::Info)),
    };
    builder.format(|out, record| writeln!(out, "lanefsd {}: {}", record.level(), record.args()));
    builder.init();
    Ok(())
}

/// How often one place in the code may print a message.
#[derive(Debug)]
pub struct RateLimit(Mutex<Budget>);

#[derive(Debug)]
struct Budget {
    begun: Option<Instant>,
    printed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// A limit of [`BURST`] messages in [`PERIOD`].
    pub const fn new() -> RateLimit {
        RateLimit(Mutex::new(Budget { begun: None, printed: 0, suppressed: 0 }))
    }

    /// Whether a message may be printed now: then, how many were not since the last one.
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if budget.begun.is_none_or(|begun| now.duration_since(begun) >= PERIOD) {
            budget.begun = Some(now);
            budget.printed = 0;
        }
        if budget.printed < BURST {
            budget.printed += 1;
            return Some(std::mem::take(&mut budget.suppressed));
        }
        budget.suppressed += 1;
        None
    }
}

impl Default for RateLimit {
    fn default() -> RateLimit {
        RateLimit::new()
    }
}

/// Prints what a guest caused, at a level of the log crate; a guest cannot flood the log with it.
macro_rules! log_limited {
    ($level:expr, $($arg:tt)*) => {{
        static LIMIT: $crate::logging::RateLimit = $crate::logging::RateLimit::new();
        match LIMIT.allow(std::time::Instant::now()) {
            Some(0) => log::log!($level, $($arg)*),
            Some(suppressed) => {
                log::log!($level, "{} ({suppressed} messages like this were left out)", format_args!($($arg)*))
            }
            None => {}
        }
    }};
}
pub(crate) use log_limited;

/// Warns of what a guest caused.
macro_rules! warn_limited {
    ($($arg:tt)*) => { $crate::logging::log_limited!(log::Level::Warn, $($arg)*) };
}
pub(crate) use warn_limited;

/// Tells of what a guest caused.
macro_rules! info_limited {
    ($($arg:tt)*) => { $crate::logging::log_limited!(log::Level::Info, $($arg)*) };
}
pub(crate) use info_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let printed = (0..1000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(printed, 10);
        assert_eq!(limit.allow(start + Duration::from_secs(4)), None);
        assert_eq!(limit.allow(start + Duration::from_secs(5)), Some(991));
        assert_eq!(limit.allow(start + Duration::from_secs(5)), Some(0));
    }
}
