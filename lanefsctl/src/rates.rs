//! Rates and latencies from the difference of two samples.
//!
//! Counters only grow while a worker lives. A smaller one means another worker, whose counters began at 0; the
//! interval in which that happens has no rates.

#![expect(clippy::cast_precision_loss, reason = "rates are shown with three digits")]

use crate::protocol::{OpCounters, Sample};

/// A quantile of latencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quantile {
    /// Its value, interpolated within its bucket.
    pub(crate) seconds: f64,
    /// It is above all bounds, of which this is the last.
    pub(crate) is_above: bool,
}

/// Rates of one operation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OpRates {
    /// The operation.
    pub(crate) name: String,
    /// Requests a second.
    pub(crate) per_second: f64,
    /// Its part of the time of all operations, from 0 to 1.
    pub(crate) time: f64,
    /// Mean latency in seconds; none without requests. The same for the quantiles.
    pub(crate) mean: Option<f64>,
    /// The median.
    pub(crate) p50: Option<Quantile>,
    /// The 99th percentile.
    pub(crate) p99: Option<Quantile>,
    /// Failed requests a second.
    pub(crate) errors: f64,
}

/// Rates of a share.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rates {
    /// All operations together; its time is the number of requests that were served at once, in the mean.
    pub(crate) total: OpRates,
    /// Bytes a second that the guest read.
    pub(crate) read: f64,
    /// Bytes a second that the guest wrote.
    pub(crate) written: f64,
    /// Seconds a second that requests waited for a limit.
    pub(crate) throttled: f64,
    /// Each operation that ever occurred.
    pub(crate) ops: Vec<OpRates>,
}

/// The quantile of latencies, for `part` from 0 to 1.
///
/// `bounds` are the upper bounds of `buckets`, the last of which has none.
pub(crate) fn quantile(bounds: &[f64], buckets: &[u64], part: f64) -> Option<Quantile> {
    let total: u64 = buckets.iter().sum();
    if total == 0 || bounds.is_empty() {
        return None;
    }
    let rank = part.clamp(0.0, 1.0) * total as f64;
    let (mut below, mut lower) = (0_u64, 0.0);
    for (bound, bucket) in bounds.iter().zip(buckets) {
        let reached = below.saturating_add(*bucket);
        if *bucket > 0 && reached as f64 >= rank {
            let inside = (rank - below as f64).max(0.0) / *bucket as f64;
            return Some(Quantile { seconds: lower + (bound - lower) * inside, is_above: false });
        }
        (below, lower) = (reached, *bound);
    }
    Some(Quantile { seconds: lower, is_above: true })
}

/// The growth of counters; none if one became smaller.
fn growth(before: &OpCounters, after: &OpCounters) -> Option<OpCounters> {
    let buckets = after.buckets.iter().enumerate();
    let buckets =
        buckets.map(|(index, value)| value.checked_sub(before.buckets.get(index).copied().unwrap_or(0)));
    Some(OpCounters {
        count: after.count.checked_sub(before.count)?,
        seconds: (after.seconds - before.seconds).max(0.0),
        errors: after.errors.checked_sub(before.errors)?,
        buckets: buckets.collect::<Option<_>>()?,
    })
}

fn add(total: &mut OpCounters, more: &OpCounters) {
    total.count = total.count.saturating_add(more.count);
    total.seconds += more.seconds;
    total.errors = total.errors.saturating_add(more.errors);
    total.buckets.resize(total.buckets.len().max(more.buckets.len()), 0);
    for (sum, value) in total.buckets.iter_mut().zip(&more.buckets) {
        *sum = sum.saturating_add(*value);
    }
}

/// Rates from counters that grew in this time.
fn rates(name: &str, grown: &OpCounters, bounds: &[f64], seconds: f64, all_time: f64) -> OpRates {
    OpRates {
        name: name.to_owned(),
        per_second: grown.count as f64 / seconds,
        time: if all_time > 0.0 { grown.seconds / all_time } else { 0.0 },
        mean: (grown.count > 0).then(|| grown.seconds / grown.count as f64),
        p50: quantile(bounds, &grown.buckets, 0.5),
        p99: quantile(bounds, &grown.buckets, 0.99),
        errors: grown.errors as f64 / seconds,
    }
}

impl Rates {
    /// The rates between two samples of a share; none if its counters began anew, or time does not pass.
    pub(crate) fn between(before: &Sample, after: &Sample) -> Option<Rates> {
        let seconds = after.time_seconds - before.time_seconds;
        if !seconds.is_finite() || seconds <= 0.0 || before.bounds != after.bounds {
            return None;
        }
        if before.ops.keys().any(|name| !after.ops.contains_key(name)) {
            return None;
        }
        let (none, mut total) = (OpCounters::default(), OpCounters::default());
        let mut grown = Vec::with_capacity(after.ops.len());
        for (name, counters) in &after.ops {
            let growth = growth(before.ops.get(name).unwrap_or(&none), counters)?;
            add(&mut total, &growth);
            if counters.count > 0 {
                grown.push((name, growth));
            }
        }
        let bytes = |before: u64, after: u64| Some(after.checked_sub(before)? as f64 / seconds);
        let of = |name: &str, grown: &OpCounters| rates(name, grown, &after.bounds, seconds, total.seconds);
        Some(Rates {
            total: OpRates { time: total.seconds / seconds, ..of("", &total) },
            read: bytes(before.bytes.read, after.bytes.read)?,
            written: bytes(before.bytes.written, after.bytes.written)?,
            throttled: (after.throttled_seconds - before.throttled_seconds).max(0.0) / seconds,
            ops: grown.iter().map(|(name, grown)| of(name, grown)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: [f64; 3] = [1.0, 2.0, 4.0];

    fn sample(time: f64, count: u64, buckets: [u64; 4]) -> Sample {
        let counters =
            OpCounters { count, seconds: count as f64 * 0.5, errors: count / 10, buckets: buckets.to_vec() };
        Sample {
            time_seconds: time,
            bounds: BOUNDS.to_vec(),
            ops: [("write".to_owned(), counters), ("read".to_owned(), OpCounters::default())].into(),
            bytes: crate::protocol::Bytes { read: count * 10, written: count * 100 },
            ..Sample::default()
        }
    }

    #[test]
    fn a_quantile_is_interpolated_within_its_bucket() {
        let of = |buckets: &[u64], part| quantile(&BOUNDS, buckets, part).unwrap();
        assert_eq!(of(&[10, 0, 0, 0], 0.5), Quantile { seconds: 0.5, is_above: false });
        assert_eq!(of(&[0, 10, 0, 0], 0.5), Quantile { seconds: 1.5, is_above: false });
        assert_eq!(of(&[50, 49, 1, 0], 0.99), Quantile { seconds: 2.0, is_above: false });
        assert_eq!(of(&[1, 0, 0, 9], 0.99), Quantile { seconds: 4.0, is_above: true });
        assert_eq!(of(&[0, 0, 7, 0], 0.0), Quantile { seconds: 2.0, is_above: false });
        assert_eq!(quantile(&BOUNDS, &[0; 4], 0.5), None);
        assert_eq!(quantile(&[], &[7], 0.5), None);
    }

    #[test]
    fn rates_are_of_the_interval_and_not_of_all_time() {
        let rates =
            Rates::between(&sample(10.0, 100, [100, 0, 0, 0]), &sample(12.0, 120, [100, 20, 0, 0])).unwrap();
        assert_eq!((rates.total.per_second, rates.total.errors, rates.total.mean), (10.0, 1.0, Some(0.5)));
        assert_eq!((rates.read, rates.written, rates.total.time), (100.0, 1000.0, 5.0));
        let [write] = &rates.ops[..] else { panic!("{:?}", rates.ops) };
        assert_eq!((write.name.as_str(), write.time), ("write", 1.0));
        assert_eq!(write.p50, Some(Quantile { seconds: 1.5, is_above: false }));
    }

    #[test]
    fn an_idle_share_has_rates_of_0_and_no_latency() {
        let rates = Rates::between(&sample(1.0, 5, [5, 0, 0, 0]), &sample(2.0, 5, [5, 0, 0, 0])).unwrap();
        assert_eq!((rates.total.per_second, rates.total.mean, rates.total.p99), (0.0, None, None));
        assert_eq!(rates.ops.len(), 1);
    }

    #[test]
    fn counters_that_began_anew_give_no_rates() {
        let before = sample(10.0, 100, [100, 0, 0, 0]);
        assert_eq!(Rates::between(&before, &sample(12.0, 7, [7, 0, 0, 0])), None);
        assert_eq!(Rates::between(&before, &sample(12.0, 100, [0, 100, 0, 0])), None);
        assert_eq!(Rates::between(&before, &sample(10.0, 120, [120, 0, 0, 0])), None);
        assert_eq!(Rates::between(&before, &Sample { time_seconds: 12.0, ..Sample::default() }), None);
    }
}
