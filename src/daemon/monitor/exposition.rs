//! The counters as text: OpenMetrics, and Prometheus's older form for those who do not know it.
//!
//! Labels are the share, operations, errnos and queues; names of files never appear.

use std::fmt::{Error, Result as FmtResult};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, prometheus_text, text};
use prometheus_client::metrics::MetricType::{self, Counter, Gauge, Histogram};
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::serve::Sources;
use crate::limits::Limit;
use crate::metrics::counts::{WRITER_BUCKETS, bounds};
use crate::metrics::{Gauges, Metrics, Sample, errno_name};

/// No exemplar; its type has to be named.
const NONE: Option<&Exemplar<NoLabelSet, f64>> = None;

/// The form of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus's text format 0.0.4.
    Prometheus,
}

impl Form {
    /// Its media type.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Form::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Form::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The counters now.
pub(super) fn text(form: Form, sources: &Sources<'_>, gauges: Gauges) -> String {
    let throttled = Limit::ALL.map(|limit| (limit.name(), sources.pace.throttled(limit)));
    let label = ("share".into(), sources.subject.share.to_string().into());
    let mut registry = Registry::with_prefix_and_labels("lanefs", std::iter::once(label));
    let counters =
        Counters { metrics: Arc::clone(sources.metrics), gauges, sample: sources.sample(), throttled };
    registry.register_collector(Box::new(counters));
    let mut text = String::new();
    let encoded = match form {
        Form::OpenMetrics => text::encode(&mut text, &registry),
        Form::Prometheus => prometheus_text::encode(&mut text, &registry),
    };
    // Nothing can fail that is written to a string.
    encoded.map_or_else(|Error| String::new(), |()| text)
}

#[derive(Debug)]
struct Counters {
    metrics: Arc<Metrics>,
    gauges: Gauges,
    sample: Sample,
    /// For how long the rate limits held queues.
    throttled: [(&'static str, Duration); 5],
}

impl Collector for Counters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> FmtResult {
        self.requests(&mut encoder)?;
        self.data(&mut encoder)?;
        self.queues(&mut encoder)?;
        self.waits(&mut encoder)?;
        self.share(&mut encoder)
    }
}

/// Nanoseconds in seconds.
#[allow(clippy::cast_precision_loss, reason = "52 bits of nanoseconds are more than a month")]
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// Metrics of one name, each with its labels and its value.
fn family<S: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, kind): (&str, &str, MetricType),
    values: impl IntoIterator<Item = (S, u64)>,
) -> FmtResult {
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in values {
        let mut metric = metric.encode_family(&labels)?;
        match kind {
            Counter => metric.encode_counter(&value, NONE)?,
            _ => metric.encode_gauge(&value)?,
        }
    }
    Ok(())
}

fn single(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, kind): (&str, &str, MetricType),
    value: u64,
) -> FmtResult {
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    match kind {
        Counter => metric.encode_counter(&value, NONE),
        _ => metric.encode_gauge(&value),
    }
}

impl Counters {
    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> FmtResult {
        let ops = &self.sample.ops;
        let requests = ops.iter().map(|op| ([("op", op.name)], op.count));
        family(encoder, ("requests", "FUSE requests that were answered", Counter), requests)?;
        let errors = self.metrics.errors().into_iter();
        let errors = errors
            .map(|(op, errno, count)| (vec![("op", op.to_owned()), ("errno", errno_name(errno))], count));
        family(encoder, ("errors", "FUSE requests that were answered with an error", Counter), errors)?;
        let help = "Time from taking a request to its answer";
        let mut metric = encoder.encode_descriptor("request", help, Some(&Unit::Seconds), Histogram)?;
        for op in ops {
            let bounds = bounds().map(seconds).chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(op.buckets).collect();
            let labels = [("op", op.name)];
            let mut metric = metric.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(seconds(op.nanos), op.count, &buckets, None)?;
        }
        Ok(())
    }

    fn data(&self, encoder: &mut DescriptorEncoder<'_>) -> FmtResult {
        let bytes = [("read", self.sample.bytes_read), ("write", self.sample.bytes_written)];
        let bytes = bytes.map(|(direction, bytes)| ([("dir", direction)], bytes));
        family(
            encoder,
            ("bytes", "Bytes of file data that READ and WRITE have transferred", Counter),
            bytes,
        )?;
        let help = "Writers of one file at the moment when a WRITE to it began, itself among them";
        let mut metric = encoder.encode_descriptor("file_writers", help, None, Histogram)?;
        let bounds = (0..WRITER_BUCKETS).map(|bucket| match bucket {
            last if last + 1 == WRITER_BUCKETS => f64::INFINITY,
            bucket => f64::from(1u32 << bucket.min(16)),
        });
        let buckets: Vec<_> = bounds.zip(self.sample.writers).collect();
        let count = self.sample.writers.iter().sum();
        // Nobody knows the sum, which Prometheus wants: the lower end of each bucket.
        let lower = |bound: f64| if bound.is_finite() { (bound / 2.0).floor() + 1.0 } else { 65.0 };
        #[allow(clippy::cast_precision_loss, reason = "it is an estimate")]
        let sum = buckets.iter().map(|(bound, count)| lower(*bound) * *count as f64).sum();
        metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        let help = "Most writers of one file at once in the last 9 to 17 seconds";
        single(encoder, ("most_file_writers", help, Gauge), self.metrics.most_writers())?;
        let [copied, fell_back] = self.sample.mapped;
        let writes = [("copied", copied), ("fallback", fell_back)];
        let writes = writes.map(|(how, count)| ([("how", how)], count));
        let help = "WRITEs to files that are written through mappings: copied, or by a system call";
        family(encoder, ("mapped_writes", help, Counter), writes)
    }

    fn queues(&self, encoder: &mut DescriptorEncoder<'_>) -> FmtResult {
        let queues = &self.sample.queues;
        let label = |index: usize| [("queue", u64::try_from(index).unwrap_or(0))];
        let of = |value: fn(&crate::metrics::QueueSample) -> u64| {
            queues.iter().map(move |queue| (label(queue.index), value(queue)))
        };
        family(
            encoder,
            ("inflight", "Requests that were taken and not answered", Gauge),
            of(|q| q.in_flight),
        )?;
        family(encoder, ("queue_size", "Descriptors of the virtqueue", Gauge), of(|q| q.size.into()))?;
        family(encoder, ("workers", "Threads that serve the virtqueue", Gauge), of(|q| q.workers.into()))?;
        family(encoder, ("notifications", "Interrupts of the guest", Counter), of(|q| q.notifications))?;
        family(encoder, ("wakeups", "Wake-ups of workers, by kicks and others", Counter), of(|q| q.wakeups))?;
        family(encoder, ("polled", "Requests that were found by polling", Counter), of(|q| q.polled))
    }

    fn waits(&self, encoder: &mut DescriptorEncoder<'_>) -> FmtResult {
        let help = "Requests that waited for others: for a range, a lock or a listing";
        single(encoder, ("waits", help, Counter), self.sample.waits)?;
        let help = "Time for which requests waited for others";
        let mut metric = encoder.encode_descriptor("wait", help, Some(&Unit::Seconds), Counter)?;
        metric.encode_counter(&seconds(self.sample.wait_nanos), NONE)?;
        let help = "Time for which a rate limit held a virtqueue";
        let mut metric = encoder.encode_descriptor("throttled", help, Some(&Unit::Seconds), Counter)?;
        for (limit, time) in &self.throttled {
            metric.encode_family(&[("limit", *limit)])?.encode_counter(&time.as_secs_f64(), NONE)?;
        }
        Ok(())
    }

    fn share(&self, encoder: &mut DescriptorEncoder<'_>) -> FmtResult {
        let Gauges { inodes, plain, parallel, directories, descriptors, descriptor_limit } = self.gauges;
        single(encoder, ("inodes", "Inodes that the guest knows", Gauge), inodes)?;
        let handles = [("plain", plain), ("parallel", parallel), ("directory", directories)];
        let handles = handles.map(|(mode, count)| ([("mode", mode)], count));
        family(encoder, ("handles", "Open files and directories of the guest", Gauge), handles)?;
        let descriptors = [("used", descriptors), ("limit", descriptor_limit)];
        let descriptors = descriptors.map(|(state, count)| ([("state", state)], count));
        family(encoder, ("descriptors", "File descriptors for the guest", Gauge), descriptors)?;
        let metrics = &self.metrics;
        single(
            encoder,
            ("restarts", "Worker processes that died and were replaced", Counter),
            metrics.deaths(),
        )?;
        single(encoder, ("upgrades", "Upgrades of the running daemon", Counter), metrics.upgrades())?;
        let connected = u64::from(metrics.has_front_end());
        single(encoder, ("front_end", "Whether a front end is connected", Gauge), connected)?;
        let mut metric = encoder.encode_descriptor("build", "The daemon", None, MetricType::Info)?;
        metric.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
    }
}
