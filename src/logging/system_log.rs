//! A logger for the system log (syslog(3)).

use std::io::{self, Write};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use log::{Level, Log, Metadata, Record};
use syslog::{Facility, Formatter3164, Logger, LoggerBackend};

use super::{Now, Scope};

/// The descriptor of the connection; -1 if there is none.
static SOCKET: AtomicI32 = AtomicI32::new(-1);

/// The descriptor by which messages go to the system log, if they do.
pub(super) fn descriptor() -> Option<RawFd> {
    Some(SOCKET.load(Ordering::Relaxed)).filter(|fd| *fd >= 0)
}

/// A connection to the log daemon, made once: its socket is out of reach in the sandbox. When the log
/// daemon restarts with a new socket, messages go to standard error.
pub(super) struct SystemLog {
    connection: Mutex<Logger<LoggerBackend, Formatter3164>>,
    pid: u32,
}

impl SystemLog {
    pub(super) fn reach() -> Result<SystemLog, String> {
        let pid = std::process::id();
        let formatter =
            Formatter3164 { facility: Facility::LOG_DAEMON, hostname: None, process: "lanefsd".into(), pid };
        let logger = syslog::unix(formatter).map_err(|error| {
            // The outer error has no message of its own.
            std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
        })?;
        if let LoggerBackend::Unix(socket) = &logger.backend {
            SOCKET.store(socket.as_raw_fd(), Ordering::Relaxed);
            // A stalled log daemon must not stall the guest.
            socket.set_nonblocking(true).map_err(|error| error.to_string())?;
        }
        Ok(SystemLog { connection: Mutex::new(logger), pid })
    }
}

impl Log for SystemLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Severities of syslog(3). Without a timestamp, the log daemon adds one.
        let severity = match record.level() {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        let (pid, scope, text) = (self.pid, Scope::current(), record.args());
        let message = format!("<{}>lanefsd[{pid}]: {scope}{text}", Facility::LOG_DAEMON as u32 | severity);
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.backend.write(message.as_bytes()).is_err() {
            // A failure here cannot be reported anywhere.
            let _ = writeln!(io::stderr(), "{Now} lanefsd {}: {scope}{text}", record.level());
        }
    }

    fn flush(&self) {}
}
