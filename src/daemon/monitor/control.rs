//! What `lanefsctl` asks: a JSON object on a line, answered by one.
//!
//! | command | answer |
//! |---|---|
//! | `status` | the share, its queues, what the guest has, and what is noteworthy |
//! | `ops` | the requests in flight |
//! | `slow` | the slowest requests of the last five minutes |
//! | `sample` | all counters |
//! | `loglevel` with `level` | how much is logged from now on |
//! | `limit`, perhaps with `set`, as `--limit` has it | the rate limits |
//! | `drain` | no more requests are taken; how many are in flight still |
//! | `resume` | requests are taken again |
//!
//! An answer is `{"ok": …}` or `{"error": "…"}`. Unknown fields are ignored, so that later versions may add some.

use log::LevelFilter;
use serde::Deserialize;
use serde_json::{Value, json};

use super::answers;
use super::connection::{Answer, Answered, MAX_REQUEST};
use super::serve::Sources;
use crate::limits::Rates;

/// A request.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
enum Command {
    Status,
    Ops,
    Slow,
    Sample,
    LogLevel { level: String },
    Limit { set: Option<String> },
    Drain,
    Resume,
}

/// The answer to what has come so far; `None` if more is to come.
pub(super) fn answer(input: &[u8], allowed: bool, sources: &Sources<'_>) -> Answered {
    if !allowed {
        return Some((input.len(), refusal("only root and the user of the daemon may control it")));
    }
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        let is_long = input.len() >= MAX_REQUEST;
        return is_long.then(|| (input.len(), refusal("the request is longer than 4096 bytes")));
    };
    let line = input.get(..end).unwrap_or_default();
    let result = match serde_json::from_slice(line) {
        Ok(command) => perform(command, sources),
        Err(error) => Err(format!("this is no request: {error}")),
    };
    let value = match result {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error }),
    };
    Some((end + 1, Answer { bytes: format!("{value}\n").into_bytes(), is_last: false }))
}

/// The last answer on a connection.
fn refusal(why: &str) -> Answer {
    Answer { bytes: format!("{}\n", json!({ "error": why })).into_bytes(), is_last: true }
}

fn perform(command: Command, sources: &Sources<'_>) -> Result<Value, String> {
    match command {
        Command::Status => Ok(answers::status(sources)),
        Command::Ops => Ok(answers::ops(sources)),
        Command::Slow => Ok(answers::slow(sources)),
        Command::Sample => Ok(answers::sample(sources)),
        Command::Limit { set } => {
            if let Some(set) = set {
                let rates = Rates::parse(&set).map_err(|error| error.to_string())?;
                sources.pace.apply(&rates);
            }
            let (limits, group) = (answers::limits(sources.pace), answers::group_limits(sources));
            Ok(json!({ "limits": limits, "group_limits": group }))
        }
        Command::Drain => {
            sources.pace.pause();
            Ok(json!({ "draining": true, "in_flight": answers::in_flight(&sources.sample()) }))
        }
        Command::Resume => {
            sources.pace.resume();
            Ok(json!({ "draining": false }))
        }
        Command::LogLevel { level } => {
            let level: LevelFilter = level.parse().map_err(|_| {
                format!("{level} is no log level: give off, error, warn, info, debug or trace")
            })?;
            sources.metrics.set_log_level(level);
            // The serving process looks when it is asked, and the supervisor when it is woken.
            sources.gauges();
            sources.wake_supervisor();
            Ok(json!({ "log_level": level.to_string().to_lowercase() }))
        }
    }
}
