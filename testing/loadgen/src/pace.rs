//! `loadgen pace`: how exact rate limits are, and what another share gets beside one whose guest floods it.
//!
//! The guest always has READs in flight, so that the limit alone says when the next one passes. On the ideal schedule they
//! pass at equal distances; its begin is that of the READ that came earliest on it. The deviation of a READ is the time
//! from there to its reply. What comes in the first half second, the burst, is left out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::{Backend, Session, SessionOptions};
use serde::Serialize;

use crate::error::{LoadError, Result};
use crate::options::PaceOptions;

/// What is left out of each measurement, with the burst of the limit.
const WARMUP: Duration = Duration::from_millis(500);

/// How exact the limit is.
#[derive(Debug, Serialize)]
pub struct PaceReport {
    /// READs per second that are allowed, and their bytes.
    rate: u64,
    block: u32,
    /// READs in each whole second.
    per_second: Vec<u64>,
    /// Largest difference of these to the rate, in percent of it.
    largest_error_percent: f64,
    /// From the ideal schedule to the reply, in microseconds.
    deviation_us: Deviation,
    /// CPU time of the daemon per READ, in microseconds.
    cpu_us_per_read: f64,
    /// READs per second of another share.
    other_share: OtherShare,
}

#[derive(Debug, Serialize)]
struct Deviation {
    p50: f64,
    p99: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct OtherShare {
    alone: f64,
    beside_flood: f64,
    beside_limited_flood: f64,
    /// READs per second of the flood beside it.
    flood: f64,
    limited_flood: f64,
}

/// A daemon, a session with it, and a file of the share.
struct Share {
    backend: Backend,
    session: Session,
    file: (u64, u64),
}

impl Share {
    fn start(options: &PaceOptions, limit: Option<String>) -> Result<Share> {
        let backend = Backend::of(&options.backend)
            .args(&options.backend_arg)
            .args(limit.into_iter().collect::<Vec<_>>());
        let backend = backend.start()?;
        let session = backend.connect(SessionOptions::default())?;
        let client = session.client();
        let (entry, open) = client.create(ROOT, "data", libc::O_RDWR, 0o600, 0)?;
        let block = vec![7; options.block as usize];
        client.write(entry.nodeid, open.fh, 0, &block)?;
        let file = (entry.nodeid, open.fh);
        Ok(Share { backend, session, file })
    }

    /// Keeps READs in flight until `time` is over or `stop` is set; when each of them was answered.
    fn flood(&self, options: &PaceOptions, time: Duration, stop: &AtomicBool) -> Result<Vec<Duration>> {
        let (client, queue) = (self.session.client(), self.session.queue(1));
        let send = || client.send(data::read_request(self.file.0, self.file.1, 0, options.block as usize));
        let begin = Instant::now();
        let mut answers = Vec::new();
        for _ in 0..options.depth {
            send()?;
        }
        while let Some(completion) = queue.complete()? {
            answers.push(begin.elapsed());
            lanefsd_frontend::request::Reply::of(&completion)?.success()?;
            if begin.elapsed() < time && !stop.load(Ordering::Relaxed) {
                send()?;
            }
        }
        Ok(answers)
    }

    /// READs per second, one at a time, for `time`.
    fn rate(&self, options: &PaceOptions, time: Duration) -> Result<f64> {
        let client = self.session.client();
        let (begin, mut count) = (Instant::now(), 0u32);
        while begin.elapsed() < time {
            client.read(self.file.0, self.file.1, 0, options.block as usize)?;
            count += 1;
        }
        Ok(f64::from(count) / begin.elapsed().as_secs_f64())
    }
}

/// Measures the limit.
pub fn pace(options: &PaceOptions) -> Result<PaceReport> {
    let limit = || Some(format!("--limit=read-bytes={}", options.rate * u64::from(options.block)));
    let limited = Share::start(options, limit())?;
    let never = AtomicBool::new(false);
    let cpu = limited.backend.cpu_time()?;
    let time = Duration::from_secs(options.time) + WARMUP;
    let mut answers = limited.flood(options, time, &never)?;
    let spent = limited.backend.cpu_time()? - cpu;
    let all = answers.len();
    answers.retain(|answer| *answer >= WARMUP && *answer <= time);
    let per_second: Vec<u64> = (0..options.time)
        .map(|second| {
            let begin = WARMUP + Duration::from_secs(second);
            let within = begin..begin + Duration::from_secs(1);
            answers.iter().filter(|answer| within.contains(*answer)).count() as u64
        })
        .collect();
    let errors = per_second.iter().map(|count| count.abs_diff(options.rate) as f64 / options.rate as f64);
    Ok(PaceReport {
        rate: options.rate,
        block: options.block,
        largest_error_percent: errors.fold(0.0, f64::max) * 100.0,
        per_second,
        deviation_us: deviation(&answers, options.rate)?,
        cpu_us_per_read: spent.as_secs_f64() * 1e6 / all as f64,
        other_share: other_share(options, &limited)?,
    })
}

/// How far the answers are from the ideal schedule.
fn deviation(answers: &[Duration], rate: u64) -> Result<Deviation> {
    let distance = 1e6 / rate as f64;
    let late = answers.iter().enumerate();
    let mut late: Vec<f64> = late.map(|(i, at)| at.as_secs_f64() * 1e6 - i as f64 * distance).collect();
    late.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (late.first(), late.last()) else {
        return Err(LoadError::Options("--time is too short for the rate: there were no reads".into()));
    };
    let at = |part: f64| late[((late.len() - 1) as f64 * part) as usize] - first;
    Ok(Deviation { p50: at(0.5), p99: at(0.99), max: last - first })
}

/// What another share gets alone, beside a flood, and beside a flood that is limited.
fn other_share(options: &PaceOptions, limited: &Share) -> Result<OtherShare> {
    let (other, unlimited) = (Share::start(options, None)?, Share::start(options, None)?);
    let time = Duration::from_secs(options.time);
    let alone = other.rate(options, time)?;
    let beside = |flooded: &Share| -> Result<(f64, f64)> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let flood = scope.spawn(|| flooded.flood(options, Duration::MAX, &stop));
            let rate = other.rate(options, time);
            stop.store(true, Ordering::Relaxed);
            #[allow(clippy::panic, reason = "the thread that floods has panicked")]
            let answers = flood.join().unwrap_or_else(|_| panic!("the thread that floods has panicked"))?;
            Ok((rate?, answers.len() as f64 / time.as_secs_f64()))
        })
    };
    let (beside_flood, flood) = beside(&unlimited)?;
    let (beside_limited_flood, limited_flood) = beside(limited)?;
    Ok(OtherShare { alone, beside_flood, beside_limited_flood, flood, limited_flood })
}
