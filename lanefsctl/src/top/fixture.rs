//! Shares with samples, for tests of the view.

use std::path::Path;

use super::poller::Update;
use super::share::Share;
use crate::error::Error;
use crate::protocol::{Bytes, Depth, OpCounters, Sample};

/// Operations with their requests in a second, latency in powers of two of a microsecond, and errors.
const OPS: [(&str, u64, usize, u64); 18] = [
    ("write", 8200, 7, 0),
    ("read", 3100, 5, 0),
    ("lookup", 900, 4, 31),
    ("getattr", 700, 3, 0),
    ("open", 120, 5, 0),
    ("release", 120, 4, 0),
    ("create", 40, 6, 0),
    ("unlink", 40, 6, 2),
    ("readdirplus", 30, 8, 0),
    ("fsync", 12, 13, 0),
    ("flush", 110, 2, 0),
    ("setattr", 60, 5, 0),
    ("rename", 9, 6, 0),
    ("mkdir", 5, 6, 0),
    ("getxattr", 50, 3, 50),
    ("setlk", 20, 4, 0),
    ("forget", 30, 1, 0),
    ("statfs", 0, 0, 0),
];

/// The counters of a share after this time, and after this many tenths of a second under full load.
#[expect(clippy::cast_precision_loss, reason = "the values are small")]
pub(crate) fn sample(share: &str, seconds: u64, load: u64) -> Sample {
    let bounds: Vec<f64> = (0..20).map(|power| 1e-6 * f64::from(1_u32 << power)).collect();
    let counters = |(name, rate, power, errors): (&str, u64, usize, u64)| {
        let mut buckets = vec![0; bounds.len() + 1];
        let requests = rate * load / 10;
        buckets[power] = requests * 9 / 10;
        buckets[power + 1] = requests - buckets[power];
        // One that was there before the first interval.
        buckets[0] += 1;
        let count = requests + 1;
        let counters = OpCounters {
            count,
            seconds: count as f64 * bounds[power] * 0.8,
            errors: errors * load / 10,
            buckets,
        };
        (name.to_owned(), counters)
    };
    Sample {
        share: share.to_owned(),
        time_seconds: 100.0 + seconds as f64,
        ops: OPS.map(counters).into(),
        bytes: Bytes { read: 20_300_000 * load, written: 53_700_000 * load },
        in_flight: 37,
        most_writers: 16,
        throttled_seconds: 0.05 * seconds as f64,
        queues: vec![Depth { index: 1, in_flight: 21 }, Depth { index: 2, in_flight: 16 }],
        deaths: 1,
        bounds,
    }
}

/// One that is busy, one that is idle, and one that is gone.
pub(crate) fn shares() -> Vec<Share> {
    let path = |name: &str| Path::new("/run/lanefsd").join(format!("{name}.ctl"));
    let mut shares = ["web", "idle", "database"].map(|name| Share::new(&path(name)));
    let [web, idle, database] = &mut shares;
    let mut load = 0;
    for seconds in 0..90 {
        // It rises and falls, and is full in the last second.
        load += [2, 3, 5, 7, 8, 10, 9, 6, 4][usize::try_from(seconds % 9).unwrap()]
            + u64::from(seconds == 89) * 6;
        let ok = |share: &Share, sample| Update { socket: share.socket.clone(), sample: Ok(sample) };
        web.apply(ok(web, sample("web", seconds, load)));
        idle.apply(ok(idle, sample("idle", seconds, 0)));
    }
    let socket = database.socket.clone();
    let error = Error::Timeout { socket: socket.clone(), timeout: crate::client::TIMEOUT };
    database.apply(Update { socket, sample: Err(error) });
    shares.into()
}
