//! Answers as text for people.

use std::fmt::Write as _;

use crate::limit;
use crate::protocol::{Op, Ops, Slow, SlowOp, Status};
use crate::table::{Align, Table};
use crate::units::{count, duration, percent, printable, seconds, size};

/// The state of a share.
pub(crate) fn status(status: &Status) -> String {
    let mut text = heading(&status.share);
    for (name, value) in facts(status) {
        line(&mut text, &format!("  {name:<12}{}", printable(&value)));
    }
    if !status.queues.is_empty() {
        text.push('\n');
        text.push_str(&queues(status).to_string());
    }
    if !status.remarks.is_empty() {
        line(&mut text, "\n  remarks");
        for remark in &status.remarks {
            line(&mut text, &format!("  - {}", printable(remark)));
        }
    }
    text
}

/// A line that begins the text of a share.
pub(crate) fn heading(share: &str) -> String {
    format!("share {}\n", name(share))
}

/// A share's name, safe for a terminal.
pub(crate) fn name(share: &str) -> String {
    if share.is_empty() { "(no name)".to_owned() } else { printable(share) }
}

fn line(text: &mut String, line: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{line}");
}

fn facts(status: &Status) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    let mut add = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    add("directory", (!status.directory.is_empty()).then(|| status.directory.clone()));
    add("daemon", Some(daemon(status)));
    let front_end = |connected| if connected { "connected" } else { "not connected" }.to_owned();
    add("front end", status.front_end.map(front_end));
    let taken = if status.draining { "none are taken (lanefsctl resume)" } else { "are taken" };
    add("requests", Some(taken.to_owned()));
    add("deaths", Some(format!("{} of worker processes", count(status.deaths))));
    add("upgrades", Some(count(status.upgrades)));
    add("inodes", status.inodes.map(count));
    let handles = status.handles.as_ref();
    add(
        "handles",
        handles.map(|handles| {
            let (plain, parallel) = (count(handles.plain), count(handles.parallel));
            format!("{plain} plain, {parallel} parallel, {} of directories", count(handles.directories))
        }),
    );
    let descriptors = status.descriptors.as_ref();
    add("descriptors", descriptors.map(|found| of_limit(found.used, found.limit)));
    add("mapped", status.mapped_writes.clone());
    add("limits", Some(limit::summary(&status.limits)));
    add("limit group", status.group_limits.as_ref().map(limit::summary));
    add("log level", status.log_level.clone());
    facts
}

fn daemon(status: &Status) -> String {
    let mut text = format!("lanefsd {}", status.version);
    if let Some(pid) = status.pid {
        text.push_str(&format!(", process {pid}"));
    }
    if let Some(worker) = status.worker_pid.filter(|worker| Some(*worker) != status.pid) {
        text.push_str(&format!(", worker {worker}"));
    }
    if let Some(uptime) = status.uptime_seconds {
        text.push_str(&format!(", up {}", duration(uptime)));
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn of_limit(used: u64, limit: u64) -> String {
    match limit {
        0 => count(used),
        limit => format!("{} of {} ({})", count(used), count(limit), percent(used as f64 / limit as f64)),
    }
}

fn queues(status: &Status) -> Table {
    let columns = ["QUEUE", "SIZE", "THREADS", "IN FLIGHT", "REQUESTS", "NOTIFICATIONS"];
    let mut table = Table::new(&columns.map(|column| (column, Align::Right))).indented(2);
    for queue in &status.queues {
        let values =
            [queue.index, queue.size, queue.workers, queue.in_flight, queue.requests, queue.notifications];
        table.row(values.map(count));
    }
    table
}

/// Requests in flight, the oldest first.
pub(crate) fn ops(ops: &Ops) -> String {
    if ops.ops.is_empty() {
        return "  no requests in flight\n".to_owned();
    }
    let mut sorted: Vec<&Op> = ops.ops.iter().collect();
    let age = |op: &Op| op.age_seconds.unwrap_or(0.0);
    sorted.sort_by(|a, b| age(b).total_cmp(&age(a)));
    let columns = [
        ("OP", Align::Left),
        ("PHASE", Align::Left),
        ("AGE", Align::Right),
        ("SIZE", Align::Right),
        ("QUEUE", Align::Right),
        ("UNIQUE", Align::Right),
    ];
    let mut table = Table::new(&columns).indented(2);
    for op in sorted {
        table.row([
            printable(&op.op),
            printable(&op.phase),
            op.age_seconds.map_or_else(|| "-".to_owned(), seconds),
            size_or_dash(op.size),
            op.queue.to_string(),
            op.unique.to_string(),
        ]);
    }
    table.to_string()
}

/// Slow requests, the slowest first.
pub(crate) fn slow(slow: &Slow) -> String {
    if slow.slow.is_empty() {
        return "  no requests in the last minutes\n".to_owned();
    }
    let mut sorted: Vec<&SlowOp> = slow.slow.iter().collect();
    sorted.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let columns = [
        ("OP", Align::Left),
        ("TIME", Align::Right),
        ("WAITED", Align::Right),
        ("SIZE", Align::Right),
        ("QUEUE", Align::Right),
        ("UNIQUE", Align::Right),
        ("ENDED", Align::Right),
    ];
    let mut table = Table::new(&columns).indented(2);
    for op in sorted {
        table.row([
            printable(&op.op),
            seconds(op.seconds),
            waiting(op),
            size_or_dash(op.size),
            op.queue.to_string(),
            op.unique.to_string(),
            format!("{} ago", duration(op.ended_seconds_ago.round())),
        ]);
    }
    table.to_string()
}

/// Waiting for ranges or locks.
fn waiting(op: &SlowOp) -> String {
    if op.wait_seconds > 0.0 { seconds(op.wait_seconds) } else { "-".to_owned() }
}

fn size_or_dash(bytes: u64) -> String {
    if bytes == 0 { "-".to_owned() } else { size(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_names_each_fact() {
        let answer = r#"{"share":"web","directory":"/srv/web","version":"0.2.0","pid":812,"worker_pid":815,
            "uptime_seconds":3725,"front_end":true,"deaths":1,"upgrades":1,"inodes":5231,"log_level":"info",
            "mapped_writes":"no: --mapped-writes=never",
            "queues":[{"index":1,"size":128,"workers":2,"in_flight":3,"requests":12345,"notifications":7}],
            "handles":{"plain":1,"parallel":2,"directories":0},"descriptors":{"used":90,"limit":1000},
            "limits":{"write-bytes":104857600},"group_limits":{"read-ops":500,"burst":0.1},
            "remarks":["the ring of queue 1 is small: use queue-size=1024"]}"#;
        let text = status(&serde_json::from_str(answer).unwrap());
        for expected in [
            "share web\n",
            "  directory   /srv/web\n",
            "  daemon      lanefsd 0.2.0, process 812, worker 815, up 1 h 2 min\n",
            "  front end   connected\n",
            "  deaths      1 of worker processes\n",
            "  upgrades    1\n",
            "  handles     1 plain, 2 parallel, 0 of directories\n",
            "  descriptors 90 of 1,000 (9.0 %)\n",
            "  mapped      no: --mapped-writes=never\n",
            "  limits      write-bytes 100 MiB/s\n  limit group read-ops 500/s\n",
            "  QUEUE  SIZE  THREADS  IN FLIGHT  REQUESTS  NOTIFICATIONS\n",
            "      1   128        2          3    12,345              7\n",
            "  - the ring of queue 1 is small: use queue-size=1024\n",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
    }

    #[test]
    fn requests_are_sorted_by_time() {
        let answer = r#"{"ops":[{"op":"read","unique":1,"queue":1,"age_seconds":0.001,"phase":"serving","size":4096},
            {"op":"unknown","unique":0,"queue":2,"age_seconds":null,"phase":"decoding","size":0},
            {"op":"fsync","unique":2,"queue":2,"age_seconds":2,"phase":"waiting","size":0}]}"#;
        assert_eq!(
            ops(&serde_json::from_str(answer).unwrap()),
            "  OP       PHASE         AGE   SIZE  QUEUE  UNIQUE\n\
             \x20 fsync    waiting    2.00 s      -      2       2\n\
             \x20 read     serving   1.00 ms  4 KiB      1       1\n\
             \x20 unknown  decoding        -      -      2       0\n"
        );
        let answer = r#"{"slow":[{"op":"read","seconds":0.5,"ended_seconds_ago":70,"wait_seconds":0},
            {"op":"write","seconds":1.5,"ended_seconds_ago":3.2,"wait_seconds":0.4,"size":1048576}]}"#;
        let text = slow(&serde_json::from_str(answer).unwrap());
        let rows: Vec<&str> = text.lines().skip(1).map(str::trim_start).collect();
        assert!(rows[0].starts_with("write  1.50 s") && rows[0].ends_with("3 s ago"), "{text}");
        assert!(rows[1].starts_with("read") && rows[1].ends_with("1 min 10 s ago"), "{text}");
    }

    #[test]
    fn nothing_to_show_is_said() {
        assert_eq!(ops(&Ops::default()), "  no requests in flight\n");
        assert_eq!(slow(&Slow::default()), "  no requests in the last minutes\n");
        assert!(status(&Status::default()).starts_with("share (no name)\n  daemon      lanefsd \n"));
    }
}
