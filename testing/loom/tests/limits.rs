//! Rate limits under every order of the steps of the threads, or processes, that share them.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::time::Duration;

use lanefsd_loom::pace::{Class, Limit, Pace};
use loom::sync::Arc;
use loom::thread;

const SECOND: u64 = 1_000_000_000;
const NOW: u64 = 100 * SECOND;

/// Runs `model` with at most `preemptions` switches away from a thread that could go on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn with(rates: &[(Limit, u64)]) -> Arc<Pace> {
    let pace = Pace::default();
    pace.set_burst(Duration::ZERO);
    rates.iter().for_each(|(limit, rate)| pace.set_rate(*limit, *rate));
    Arc::new(pace)
}

#[test]
fn of_two_requests_at_once_one_is_admitted() {
    check(4, || {
        let pace = with(&[(Limit::ReadBytes, 10)]);
        let threads = [0, 1].map(|_| {
            let pace = Arc::clone(&pace);
            thread::spawn(move || pace.admit(NOW, Class::Read, 10))
        });
        let results = threads.map(|thread| thread.join().unwrap());
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        let waits: Vec<u64> =
            results.iter().filter_map(|result| result.err()).map(|wait| wait.until).collect();
        assert_eq!(waits, [NOW + SECOND]);
    });
}

/// Whoever is refused by the second limit gives back what the first one was charged.
#[test]
fn a_refused_request_leaves_no_charge() {
    check(3, || {
        let pace = with(&[(Limit::ReadBytes, 10), (Limit::ReadOps, 1)]);
        let threads = [0, 1].map(|_| {
            let pace = Arc::clone(&pace);
            thread::spawn(move || pace.admit(NOW, Class::Read, 10).is_ok())
        });
        let admitted = threads.map(|thread| thread.join().unwrap()).into_iter().filter(|ok| *ok).count();
        assert!(admitted == 1, "{admitted} were admitted");
        // Both are due after a second: nothing of a refused one is left.
        assert!(pace.admit(NOW + SECOND - 1, Class::Read, 10).is_err());
        assert_eq!(pace.admit(NOW + SECOND, Class::Read, 10), Ok(()));
    });
}

/// One process sets a limit while another one lifts it: whichever is later, a rate that is left is in force.
#[test]
fn a_rate_that_is_left_is_in_force() {
    check(4, || {
        let pace = with(&[(Limit::MetaOps, 5)]);
        let threads = [0, 7].map(|rate| {
            let pace = Arc::clone(&pace);
            thread::spawn(move || pace.set_rate(Limit::MetaOps, rate))
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(pace.rate(Limit::MetaOps) == 0 || pace.is_active());
    });
}
