//! Log messages: one line each, to standard error or syslog, with the share and the queue that they are about.
//! Messages that a guest can cause are rate-limited.

mod remark;
mod scope;
mod system_log;

use std::fmt;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, warn};
use time::OffsetDateTime;

pub use self::remark::Remark;
pub use self::scope::{Scope, ScopeGuard};
use self::system_log::SystemLog;
use crate::sys::descriptors;

/// Messages of one kind that are printed at once.
const BURST: u32 = 10;
/// Time after which as many may be printed again.
const PERIOD: Duration = Duration::from_secs(5);

/// Whether messages go to the system log.
static TO_SYSTEM_LOG: AtomicBool = AtomicBool::new(false);

/// Prints messages up to `level` from now on; without one RUST_LOG decides, and without that it is info.
/// If the system log cannot be reached, they go to standard error.
pub fn start(level: Option<LevelFilter>, to_syslog: bool) {
    let unreachable = match to_syslog.then(SystemLog::reach) {
        Some(Ok(log)) => {
            let level = level.or_else(|| std::env::var("RUST_LOG").ok()?.parse().ok());
            log::set_max_level(level.unwrap_or(LevelFilter::Info));
            // It fails only if there is a logger already.
            let _ = log::set_boxed_logger(Box::new(log));
            TO_SYSTEM_LOG.store(true, Ordering::Relaxed);
            return;
        }
        Some(Err(error)) => Some(error),
        None => None,
    };
    let mut builder = env_logger::Builder::new();
    let filter = std::env::var("RUST_LOG").ok().filter(|_| level.is_none());
    let level = level.or_else(|| filter.as_ref()?.parse().ok());
    let is_by_module = filter.is_some() && level.is_none();
    match filter.filter(|_| is_by_module) {
        Some(filter) => builder.parse_filters(&filter),
        // The level decides, which may change later.
        None => builder.filter_level(LevelFilter::Trace),
    };
    let with_time = !is_the_journal();
    builder.format(move |out, record| {
        if with_time {
            write!(out, "{} ", Now)?;
        }
        writeln!(out, "lanefsd {}: {}{}", record.level(), Scope::current(), record.args())
    });
    builder.init();
    if !is_by_module {
        log::set_max_level(level.unwrap_or(LevelFilter::Info));
    }
    if let Some(error) = unreachable {
        warn!("cannot connect to syslog ({error}): logging to standard error");
    }
}

/// The descriptor by which messages go to the system log, if they do.
pub fn descriptor() -> Option<RawFd> {
    system_log::descriptor()
}

/// Reports the error that ends the daemon: on standard error, and in the system log if that is used.
pub fn report_fatal(error: &str) {
    let _ = writeln!(io::stderr(), "lanefsd: {error}");
    if TO_SYSTEM_LOG.load(Ordering::Relaxed) {
        log::error!("{error}");
    }
}

/// The same for an error and its causes.
pub fn report_fatal_error(error: &(dyn std::error::Error + 'static)) {
    report_fatal(&describe(error));
}

/// An error and its causes in one sentence, with the remedy if the process ran out of descriptors.
pub fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = || std::iter::successors(Some(error), |error| error.source());
    let text: Vec<String> = causes().map(ToString::to_string).collect();
    let remedy = if causes().any(descriptors::is_lack) {
        format!("; {}", descriptors::TOO_FEW)
    } else {
        String::new()
    };
    text.join(": ") + &remedy
}

/// Whether standard error is systemd's journal, which adds timestamps itself.
fn is_the_journal() -> bool {
    let here = rustix::fs::fstat(io::stderr()).map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
    std::env::var("JOURNAL_STREAM").is_ok_and(|journal| here == Ok(journal))
}

/// The current time in RFC 3339 format. UTC, since /etc/localtime is out of reach in the sandbox.
struct Now;

impl fmt::Display for Now {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc();
        let (date, (hour, minute, second, ms)) = (now.date(), now.time().as_hms_milli());
        let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
        write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
    }
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
    /// A limit of ten messages in five seconds.
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
                log::log!($level, "{} ({suppressed} messages like this were suppressed)", format_args!($($arg)*))
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

/// Reports what a guest caused.
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
