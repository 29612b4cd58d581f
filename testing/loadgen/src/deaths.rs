//! `loadgen deaths`: how long requests of a guest wait when the worker of a back end dies, or the back end is upgraded, with
//! many inodes known.
//!
//! One request is in flight at a time. The longest one from a death until the requests flow again is the pause that
//! the guest has seen. The same intervals without a death show what the machine adds by itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use lanefsd_frontend::Client;
use lanefsd_frontend::random::Random;
use serde::Serialize;

use crate::error::Result;
use crate::inodes;
use crate::options::DeathsOptions;

/// How long after a death requests are still watched.
const AFTER: Duration = Duration::from_millis(200);

/// What the guest has seen.
#[derive(Debug, Serialize)]
pub struct DeathsReport {
    /// Inodes that the guest knows.
    inodes: u32,
    deaths: u32,
    /// Longest request after each death, in milliseconds.
    pause_ms: Percentiles,
    /// Longest request in as many intervals without a death.
    quiet_ms: Percentiles,
    /// Requests that were answered on the way.
    requests: u64,
    /// Descriptors after the first lookups, and at the end.
    descriptors_before: usize,
    descriptors_after: usize,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    fn of(mut pauses: Vec<Duration>) -> Percentiles {
        pauses.sort();
        let at = |part: f64| {
            let rank = (pauses.len() as f64 * part).ceil().max(1.0) as usize - 1;
            pauses.get(rank).map_or(f64::NAN, |pause| pause.as_secs_f64() * 1e3)
        };
        Percentiles { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// What the thread that sends requests shares with the one that kills.
#[derive(Debug, Default)]
struct Watched {
    longest_ns: AtomicU64,
    requests: AtomicU64,
    stop: AtomicBool,
}

impl Watched {
    /// Sends one request after the other.
    fn send(&self, client: &Client<'_>, node: u64) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let begin = Instant::now();
            client.getattr(node)?;
            let took = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.longest_ns.fetch_max(took, Ordering::Relaxed);
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The longest request from `act` until some time after it.
    fn longest(&self, act: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.longest_ns.store(0, Ordering::Relaxed);
        act()?;
        let before = self.requests.load(Ordering::Relaxed);
        sleep(AFTER);
        while self.requests.load(Ordering::Relaxed) == before && !self.stop.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(1));
        }
        Ok(Duration::from_nanos(self.longest_ns.load(Ordering::Relaxed)))
    }
}

/// Kills the worker so often.
pub fn deaths(options: &DeathsOptions) -> Result<DeathsReport> {
    let (backend, session, directory) = inodes::begin(&options.inodes)?;
    inodes::look_up_all(&session, directory, options.inodes.files)?;
    let descriptors_before = backend.descriptors()?.len();
    let watched = Watched::default();
    let mut random = Random::new(1);
    let (mut pauses, mut quiet) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let result = watched.send(&session.client(), directory);
            watched.stop.store(true, Ordering::Relaxed);
            result
        });
        let mut kill = || -> Result<()> {
            for _ in 0..options.kills {
                if watched.stop.load(Ordering::Relaxed) {
                    break;
                }
                quiet.push(watched.longest(|| Ok(()))?);
                let wait = options.interval + random.below(options.interval as usize / 10) as u64;
                sleep(Duration::from_millis(wait).saturating_sub(2 * AFTER));
                let replace = || match options.upgrade {
                    true => backend.upgrade(),
                    false => backend.replace_worker(libc::SIGKILL),
                };
                pauses.push(watched.longest(|| Ok(replace()?))?);
            }
            Ok(())
        };
        let killed = kill();
        watched.stop.store(true, Ordering::Relaxed);
        #[allow(clippy::panic, reason = "the thread that sends has panicked")]
        let sent = sender.join().unwrap_or_else(|_| panic!("the thread that sends has panicked"));
        sent.and(killed)
    })?;
    Ok(DeathsReport {
        inodes: options.inodes.files,
        deaths: options.kills,
        pause_ms: Percentiles::of(pauses),
        quiet_ms: Percentiles::of(quiet),
        requests: watched.requests.into_inner(),
        descriptors_before,
        descriptors_after: backend.descriptors()?.len(),
    })
}
