//! The answers to `lanefsctl`.

use std::time::Duration;

use serde_json::{Value, json};

use super::diagnosis;
use super::serve::Sources;
use crate::limits::{Limit, Pace};
use crate::metrics::counts::bounds;
use crate::metrics::slow::Ended;
use crate::metrics::{Gauges, OpSample, Phase, QueueSample, Sample, op_name};
use crate::state_file::InFlight;
use crate::sys::clock::monotonic;

/// Nanoseconds in seconds.
#[allow(clippy::cast_precision_loss, reason = "52 bits of nanoseconds are more than a month")]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// `status`: all that is to be known at a glance.
pub(super) fn status(sources: &Sources<'_>) -> Value {
    let (subject, metrics) = (sources.subject, sources.metrics);
    let gauges @ Gauges { inodes, plain, parallel, directories, descriptors, descriptor_limit } =
        sources.gauges();
    let sample = sources.sample();
    let running = sample.queues.iter().filter(|queue| queue.size > 0);
    let remarks = subject.remarks.iter().cloned().chain(diagnosis::of(&sample, gauges, sources));
    json!({
        "share": &*subject.share,
        "directory": subject.directory,
        "version": env!("CARGO_PKG_VERSION"),
        "pid": subject.daemon.as_raw_nonzero().get(),
        "worker_pid": metrics.worker(),
        "uptime_seconds": seconds(metrics.uptime()),
        "front_end": metrics.has_front_end(),
        "deaths": metrics.deaths(),
        "upgrades": metrics.upgrades(),
        "queues": running.map(queue).collect::<Vec<_>>(),
        "inodes": inodes,
        "handles": { "plain": plain, "parallel": parallel, "directories": directories },
        "descriptors": { "used": descriptors, "limit": descriptor_limit },
        "mapped_writes": subject.mapped_writes,
        "log_level": metrics.log_level().unwrap_or(subject.log_level).to_string().to_lowercase(),
        "draining": sources.pace.is_paused(),
        "limits": limits(sources.pace),
        "group_limits": group_limits(sources),
        "remarks": remarks.collect::<Vec<_>>(),
    })
}

/// Rate limits per second, 0 for none, and the burst in seconds.
pub(super) fn limits(pace: &Pace) -> Value {
    let rate = |limit: Limit| (limit.name().to_owned(), json!(pace.rate(limit)));
    let mut limits: serde_json::Map<String, Value> = Limit::ALL.into_iter().map(rate).collect();
    limits.insert("burst".into(), json!(pace.burst().as_secs_f64()));
    limits.into()
}

/// The same of the share's group; null without one.
pub(super) fn group_limits(sources: &Sources<'_>) -> Option<Value> {
    sources.subject.group.as_ref().map(|group| limits(group))
}

/// Requests of all request queues that run. The high-priority queue goes on while the share drains.
pub(super) fn in_flight(sample: &Sample) -> u64 {
    sample.queues.iter().skip(1).filter(|queue| queue.size > 0).map(|queue| queue.in_flight).sum()
}

fn queue(queue: &QueueSample) -> Value {
    json!({
        "index": queue.index,
        "size": queue.size,
        "workers": queue.workers,
        "in_flight": queue.in_flight,
        "requests": queue.requests,
        "notifications": queue.notifications,
        "wakeups": queue.wakeups,
        "polled": queue.polled,
    })
}

/// `ops`: the requests in flight, the oldest first.
pub(super) fn ops(sources: &Sources<'_>) -> Value {
    let now = monotonic();
    let with_start = |request: InFlight| {
        let (start, phase) = sources.metrics.progress(request.queue, request.head);
        (start, phase, request)
    };
    let mut all: Vec<_> = sources.state.in_flight().into_iter().map(with_start).collect();
    all.sort_unstable_by_key(|(start, ..)| *start);
    let op = |(start, phase, request): (u64, Phase, InFlight)| {
        let phase = match phase {
            _ if request.opcode == 0 => "decoding",
            Phase::Serving => "serving",
            Phase::Waiting => "waiting",
            Phase::Submitted => "submitted",
        };
        // Before it is decoded, the time is that of an earlier request with the same head.
        let age = (request.opcode != 0).then(|| seconds(now.saturating_sub(start)));
        json!({
            "op": op_name(request.opcode),
            "unique": request.unique,
            "queue": request.queue,
            "age_seconds": age,
            "phase": phase,
            "size": request.len,
            "deaths": request.deaths,
        })
    };
    json!({ "ops": all.into_iter().map(op).collect::<Vec<_>>() })
}

/// `slow`: the slowest requests of the last minutes.
pub(super) fn slow(sources: &Sources<'_>) -> Value {
    let now = monotonic();
    let slow = |ended: Ended| {
        json!({
            "op": op_name(ended.opcode),
            "unique": ended.unique,
            "queue": ended.queue,
            "seconds": seconds(ended.nanos),
            "wait_seconds": seconds(ended.waited),
            "ended_seconds_ago": seconds(now.saturating_sub(ended.at)),
            "size": ended.bytes,
        })
    };
    json!({ "slow": sources.metrics.slowest().into_iter().map(slow).collect::<Vec<_>>() })
}

/// `sample`: all counters, for those who subtract two samples.
pub(super) fn sample(sources: &Sources<'_>) -> Value {
    let sample = sources.sample();
    let op = |op: &OpSample| {
        let counters = json!({
            "count": op.count,
            "seconds": seconds(op.nanos),
            "errors": op.errors,
            "buckets": op.buckets,
        });
        (op.name.to_owned(), counters)
    };
    let ops: serde_json::Map<String, Value> = sample.ops.iter().map(op).collect();
    let running: Vec<&QueueSample> = sample.queues.iter().filter(|queue| queue.size > 0).collect();
    let throttled: Duration = Limit::ALL.into_iter().map(|limit| sources.pace.throttled(limit)).sum();
    json!({
        "share": &*sources.subject.share,
        "time_seconds": seconds(sample.at),
        "bounds": bounds().map(seconds).collect::<Vec<_>>(),
        "ops": ops,
        "bytes": { "read": sample.bytes_read, "written": sample.bytes_written },
        "mapped_writes": { "copied": sample.mapped[0], "fallback": sample.mapped[1] },
        "waits": sample.waits,
        "wait_seconds": seconds(sample.wait_nanos),
        "in_flight": in_flight(&sample),
        "throttled_seconds": throttled.as_secs_f64(),
        "most_writers": sources.metrics.most_writers(),
        "queues": running.into_iter().map(queue).collect::<Vec<_>>(),
        "deaths": sources.metrics.deaths(),
    })
}
