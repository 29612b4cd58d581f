//! Requests and answers of the control socket.
//!
//! A request and its answer are one JSON object on a line each; several requests may follow each other on a
//! connection. Fields that a daemon of another version lacks have their default, and unknown ones are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Bytes that a request may have, with its newline.
pub(crate) const MAX_REQUEST: usize = 4096;

/// Limits by their name; 0 means none. Bytes or operations a second, except for `burst`.
pub(crate) type Limits = BTreeMap<String, f64>;

/// A request.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub(crate) enum Request {
    /// State of the share: [`Status`].
    Status,
    /// Requests in flight: [`Ops`].
    Ops,
    /// The slowest requests of the last minutes: [`Slow`].
    Slow,
    /// Counters: [`Sample`].
    Sample,
    /// Limits: [`Limited`].
    Limit {
        /// Limits to change, as `--limit` has them; the others stay.
        #[serde(skip_serializing_if = "Option::is_none")]
        set: Option<String>,
    },
    /// The log level: [`LogLevel`].
    LogLevel {
        /// The new one.
        level: String,
    },
    /// Takes no more requests: [`Draining`].
    Drain,
    /// Takes requests again: [`Draining`].
    Resume,
}

/// The state of a share.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Mount tag, or the directory.
    pub(crate) share: String,
    /// The shared directory.
    pub(crate) directory: String,
    /// The daemon's version.
    pub(crate) version: String,
    /// The process that was started.
    pub(crate) pid: Option<u32>,
    /// The process that serves.
    pub(crate) worker_pid: Option<u32>,
    /// Since the start of the daemon.
    pub(crate) uptime_seconds: Option<f64>,
    /// A front end is connected.
    pub(crate) front_end: Option<bool>,
    /// Worker processes that died.
    pub(crate) deaths: u64,
    /// Upgrades since the start.
    pub(crate) upgrades: u64,
    /// Its queues.
    pub(crate) queues: Vec<Queue>,
    /// Inodes that the guest knows.
    pub(crate) inodes: Option<u64>,
    /// Open files and directories.
    pub(crate) handles: Option<Handles>,
    /// File descriptors.
    pub(crate) descriptors: Option<Descriptors>,
    /// Whether files are written through mappings, and why not.
    pub(crate) mapped_writes: Option<String>,
    /// The log level.
    pub(crate) log_level: Option<String>,
    /// No more requests are taken.
    pub(crate) draining: bool,
    /// The limits.
    pub(crate) limits: Limits,
    /// Those of the share's group, if it has one.
    pub(crate) group_limits: Option<Limits>,
    /// Noteworthy facts, each with a remedy.
    pub(crate) remarks: Vec<String>,
}

/// A virtqueue.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Queue {
    /// Its number.
    pub(crate) index: u64,
    /// Entries of the ring.
    pub(crate) size: u64,
    /// Threads that serve it.
    pub(crate) workers: u64,
    /// Requests taken and not answered.
    pub(crate) in_flight: u64,
    /// Requests so far.
    pub(crate) requests: u64,
    /// Notifications sent to the guest.
    pub(crate) notifications: u64,
}

/// Open files by their mode, and open directories.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Handles {
    /// Files without parallel direct writes.
    pub(crate) plain: u64,
    /// Files with them.
    pub(crate) parallel: u64,
    /// Directories.
    pub(crate) directories: u64,
}

/// File descriptors.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Descriptors {
    /// In use.
    pub(crate) used: u64,
    /// At most.
    pub(crate) limit: u64,
}

/// Answer to [`Request::Ops`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Ops {
    /// Requests in flight.
    pub(crate) ops: Vec<Op>,
}

/// A request in flight.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Op {
    /// The operation.
    pub(crate) op: String,
    /// The request's id in its session.
    pub(crate) unique: u64,
    /// The queue that it came from.
    pub(crate) queue: u64,
    /// Since it was taken; none before it is decoded.
    pub(crate) age_seconds: Option<f64>,
    /// decoding, waiting, serving or submitted.
    pub(crate) phase: String,
    /// Bytes to read or write.
    pub(crate) size: u64,
}

/// Answer to [`Request::Slow`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Slow {
    /// The slowest requests.
    pub(crate) slow: Vec<SlowOp>,
}

/// A slow request.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SlowOp {
    /// The operation.
    pub(crate) op: String,
    /// The request's id in its session.
    pub(crate) unique: u64,
    /// The queue that it came from.
    pub(crate) queue: u64,
    /// From the ring to the reply.
    pub(crate) seconds: f64,
    /// Since the reply.
    pub(crate) ended_seconds_ago: f64,
    /// Of these, waiting for ranges or locks.
    pub(crate) wait_seconds: f64,
    /// Bytes to read or write.
    pub(crate) size: u64,
}

/// Answer to [`Request::Limit`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Limited {
    /// The limits in force.
    pub(crate) limits: Limits,
    /// Those of the share's group, if it has one.
    pub(crate) group_limits: Option<Limits>,
}

/// Answer to [`Request::LogLevel`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct LogLevel {
    /// The level in force.
    pub(crate) log_level: String,
}

/// Answer to [`Request::Drain`] and [`Request::Resume`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Draining {
    /// No more requests are taken.
    pub(crate) draining: bool,
    /// Requests taken and not answered.
    pub(crate) in_flight: u64,
}

/// Counters since the start of the share, and present values.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Sample {
    /// Mount tag, or the directory.
    pub(crate) share: String,
    /// A clock of the daemon.
    pub(crate) time_seconds: f64,
    /// Upper bounds of the buckets of latencies, in seconds, but for the last one, which has none.
    pub(crate) bounds: Vec<f64>,
    /// Counters of each operation.
    pub(crate) ops: BTreeMap<String, OpCounters>,
    /// Bytes so far.
    pub(crate) bytes: Bytes,
    /// Requests in flight now.
    pub(crate) in_flight: u64,
    /// The most writers of one file that were in flight at once.
    pub(crate) most_writers: u64,
    /// Time that requests waited for a limit.
    pub(crate) throttled_seconds: f64,
    /// Requests in flight by queue.
    pub(crate) queues: Vec<Depth>,
    /// Worker processes that died.
    pub(crate) deaths: u64,
}

/// Counters of one operation.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct OpCounters {
    /// Requests.
    pub(crate) count: u64,
    /// Their time together.
    pub(crate) seconds: f64,
    /// Those that failed.
    pub(crate) errors: u64,
    /// Requests by latency; not cumulative.
    pub(crate) buckets: Vec<u64>,
}

/// Bytes of READ and WRITE.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Bytes {
    /// Read by the guest.
    pub(crate) read: u64,
    /// Written by the guest.
    pub(crate) written: u64,
}

/// Requests in flight of one queue.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Depth {
    /// Its number.
    pub(crate) index: u64,
    /// Requests in flight now.
    pub(crate) in_flight: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_documented_form() {
        let text = |request| serde_json::to_string(&request).unwrap();
        assert_eq!(text(Request::Status), r#"{"command":"status"}"#);
        assert_eq!(text(Request::Limit { set: None }), r#"{"command":"limit"}"#);
        let set = Some("read-ops=none,burst=1s".to_owned());
        assert_eq!(text(Request::Limit { set }), r#"{"command":"limit","set":"read-ops=none,burst=1s"}"#);
        let level = Request::LogLevel { level: "debug".to_owned() };
        assert_eq!(text(level), r#"{"command":"loglevel","level":"debug"}"#);
    }

    #[test]
    fn missing_and_unknown_fields_are_tolerated() {
        let status: Status = serde_json::from_str(r#"{"share":"a","news":[1],"queues":[{}]}"#).unwrap();
        assert_eq!((status.share.as_str(), status.pid, status.queues.len()), ("a", None, 1));
        let sample: Sample = serde_json::from_str(r#"{"ops":{"write":{"count":3}}}"#).unwrap();
        assert_eq!(sample.ops["write"].count, 3);
        let limits: Limited = serde_json::from_str(r#"{"limits":{"read-bytes":0,"burst":1.5}}"#).unwrap();
        assert_eq!(limits.limits["burst"], 1.5);
    }
}
