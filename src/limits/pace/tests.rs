use std::sync::atomic::AtomicUsize;

use super::*;
use proptest::prelude::*;

const SECOND: u64 = 1_000_000_000;
/// When a test begins, so that nothing depends on a clock near zero.
const BEGIN: u64 = 77 * SECOND;

fn with(limit: Limit, rate: u64, burst: Duration) -> Pace {
    let pace = Pace::default();
    pace.set_rate(limit, rate);
    pace.set_burst(burst);
    pace
}

/// Sends requests one after the other, each as soon as it is admitted, until `end`; with the time of each.
fn flood(pace: &Pace, class: Class, bytes: impl Iterator<Item = u64>, end: u64) -> Vec<(u64, u64)> {
    let mut now = BEGIN;
    let mut admitted = Vec::new();
    for bytes in bytes {
        while let Err(wait) = pace.admit(now, class, bytes) {
            assert!(wait.until > now, "a wait ends in the future");
            now = wait.until;
        }
        if now >= end {
            break;
        }
        admitted.push((now, bytes));
    }
    admitted
}

#[test]
fn zero_memory_has_no_limits() {
    let pace = Pace::default();
    assert!(!pace.is_active() && pace.burst() == Duration::from_millis(100));
    for class in [Class::Read, Class::Write, Class::Meta, Class::Free] {
        assert_eq!(pace.admit(BEGIN, class, u64::MAX), Ok(()));
    }
    assert_eq!(size_of::<Pace>(), 17 * 8);
}

#[test]
fn requests_come_at_the_rate_after_the_burst() {
    let pace = with(Limit::MetaOps, 1000, Duration::from_millis(10));
    let times: Vec<u64> =
        flood(&pace, Class::Meta, std::iter::repeat(0), BEGIN + SECOND).into_iter().map(|it| it.0).collect();
    assert_eq!(times.iter().filter(|time| **time == BEGIN).count(), 11);
    assert!(times[11..].windows(2).all(|pair| pair[1] - pair[0] == SECOND / 1000));
}

#[test]
fn a_request_larger_than_the_burst_leaves_a_debt() {
    let pace = with(Limit::WriteBytes, 1 << 20, Duration::from_millis(1));
    assert_eq!(pace.admit(BEGIN, Class::Write, 1 << 20), Ok(()));
    let until = BEGIN + SECOND - 1_000_000;
    let wait = Wait { until, limit: Some(Limit::WriteBytes) };
    assert_eq!(pace.admit(BEGIN, Class::Write, 1), Err(wait));
    assert_eq!(pace.admit(until - 1, Class::Write, 1 << 20), Err(wait));
    assert_eq!(pace.admit(until, Class::Write, 1 << 20), Ok(()));
}

#[test]
fn each_class_has_its_own_limits() {
    let pace = with(Limit::WriteBytes, 1, Duration::ZERO);
    pace.set_rate(Limit::ReadOps, 1);
    assert_eq!(pace.admit(BEGIN, Class::Write, 10), Ok(()));
    assert_eq!(pace.admit(BEGIN, Class::Read, 10), Ok(()));
    for _ in 0..100 {
        assert!(
            pace.admit(BEGIN + 1, Class::Write, 1).is_err() && pace.admit(BEGIN + 1, Class::Read, 0).is_err()
        );
        assert_eq!(pace.admit(BEGIN + 1, Class::Meta, 10), Ok(()));
        assert_eq!(pace.admit(BEGIN + 1, Class::Free, 10), Ok(()));
    }
}

#[test]
fn a_request_is_charged_to_all_limits_or_to_none() {
    let pace = with(Limit::ReadBytes, 1000, Duration::ZERO);
    pace.set_rate(Limit::ReadOps, 1);
    assert_eq!(pace.admit(BEGIN, Class::Read, 10), Ok(()));
    // The operations refuse; the bytes are as they were.
    let wait = pace.admit(BEGIN + SECOND / 2, Class::Read, 500).unwrap_err();
    assert_eq!(wait, Wait { until: BEGIN + SECOND, limit: Some(Limit::ReadOps) });
    pace.set_rate(Limit::ReadOps, 0);
    assert_eq!(pace.admit(BEGIN + SECOND / 2, Class::Read, 2000), Ok(()));
    pace.set_rate(Limit::ReadOps, 1);
    // The bytes refuse; the operations are as they were.
    let wait = pace.admit(BEGIN + SECOND, Class::Read, 1).unwrap_err();
    assert_eq!(wait, Wait { until: BEGIN + SECOND * 5 / 2, limit: Some(Limit::ReadBytes) });
    pace.set_rate(Limit::ReadBytes, 0);
    assert_eq!(pace.admit(BEGIN + SECOND, Class::Read, 1), Ok(()));
}

#[test]
fn a_pause_admits_nothing_and_changes_no_limit() {
    let pace = with(Limit::MetaOps, 10, Duration::ZERO);
    pace.pause();
    for class in [Class::Read, Class::Write, Class::Meta, Class::Free] {
        assert_eq!(pace.admit(BEGIN, class, 1), Err(Wait { until: u64::MAX, limit: None }));
    }
    pace.set_rate(Limit::MetaOps, 0);
    assert!(pace.is_active() && pace.is_paused());
    pace.resume();
    assert!(!pace.is_active() && !pace.is_paused());
    assert_eq!(pace.admit(BEGIN, Class::Meta, 1), Ok(()));
}

#[test]
fn a_new_rate_forgives_the_debt() {
    let pace = with(Limit::ReadBytes, 1, Duration::ZERO);
    assert_eq!(pace.admit(BEGIN, Class::Read, u32::MAX.into()), Ok(()));
    pace.set_rate(Limit::ReadBytes, 1);
    assert!(pace.admit(BEGIN + SECOND, Class::Read, 1).is_err(), "the same rate is not a new one");
    pace.set_rate(Limit::ReadBytes, 2);
    assert_eq!(pace.admit(BEGIN + SECOND, Class::Read, 1), Ok(()));
}

#[test]
fn a_charge_is_taken_back() {
    let pace = with(Limit::WriteBytes, 1000, Duration::ZERO);
    pace.set_rate(Limit::WriteOps, 10);
    for _ in 0..5 {
        assert_eq!(pace.admit(BEGIN, Class::Write, 5000), Ok(()));
        pace.refund(Class::Write, 5000);
    }
    pace.join_group();
    Limit::ALL.into_iter().for_each(|limit| pace.set_rate(limit, 0));
    assert!(pace.is_active(), "the group may have limits");
}

#[test]
fn throttled_time_adds_up() {
    let pace = Pace::default();
    pace.add_throttled(Limit::WriteOps, 5);
    pace.add_throttled(Limit::WriteOps, 6);
    assert_eq!(pace.throttled(Limit::WriteOps), Duration::from_nanos(11));
    assert_eq!(pace.throttled(Limit::ReadOps), Duration::ZERO);
}

#[test]
fn the_largest_numbers_fit() {
    for (rate, bytes) in [(1, u32::MAX), (u64::MAX, u32::MAX), (u64::MAX, 0), (1, 0)] {
        let pace = with(Limit::ReadBytes, rate, Duration::MAX);
        for now in [0, BEGIN, u64::MAX] {
            let _ = pace.admit(now, Class::Read, bytes.into());
        }
    }
    assert_eq!(cost(u64::MAX, 1), u64::MAX);
    assert_eq!(cost(1, u64::MAX), 1);
}

/// Many threads at once get what the rate and the burst allow, exactly.
#[test]
fn threads_share_one_schedule() {
    let pace = with(Limit::ReadOps, 1000, Duration::from_millis(100));
    pace.set_rate(Limit::ReadBytes, 7 << 20);
    let admitted = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for now in (BEGIN..BEGIN + SECOND).step_by(100_000) {
                    // One at a time sees each moment: nothing but the schedule holds the others up.
                    let passes = pace.admit(now, Class::Read, 4096).is_ok();
                    admitted.fetch_add(passes.into(), Ordering::Relaxed);
                }
            });
        }
    });
    let admitted = admitted.into_inner();
    assert!(admitted <= 1101, "{admitted} were admitted");
    assert!(admitted >= 1000, "{admitted} were admitted");
}

proptest! {
    /// In any time, no more is admitted than the rate, the burst and one request allow, and a guest that always has a
    /// request gets the rate within a hundredth over each second.
    #[test]
    fn a_flood_gets_the_rate(
        rate in 100_000u64..1 << 32,
        burst in 0u64..500,
        sizes in proptest::collection::vec(1u64..1024, 1..20),
    ) {
        let pace = with(Limit::WriteBytes, rate, Duration::from_millis(burst));
        let largest = *sizes.iter().max().unwrap();
        // Requests that are small beside the rate, but for some.
        let unit = (rate / 1_000_000).max(1);
        let sizes = sizes.iter().cycle().map(|size| size * unit).take(100_000);
        let admitted = flood(&pace, Class::Write, sizes, BEGIN + 3 * SECOND);
        let allowed = |time: u64| u128::from(rate) * u128::from(time + burst * 1_000_000) / 1_000_000_000;
        for step in [SECOND / 1000, SECOND / 10, SECOND] {
            let mut first = 0;
            let mut sum = 0u128;
            for (last, (time, bytes)) in admitted.iter().enumerate() {
                sum += u128::from(*bytes);
                while admitted[first].0 + step < *time {
                    sum -= u128::from(admitted[first].1);
                    first += 1;
                }
                let time = admitted[last].0 - admitted[first].0;
                prop_assert!(sum <= allowed(time) + u128::from(largest * unit), "{sum} bytes in {time} ns");
            }
        }
        // The second and the third second, after the burst.
        if admitted.len() < 100_000 {
            for second in [1, 2] {
                let within = BEGIN + second * SECOND..BEGIN + (second + 1) * SECOND;
                let sum: u64 = admitted.iter().filter(|it| within.contains(&it.0)).map(|it| it.1).sum();
                let error = sum.abs_diff(rate);
                prop_assert!(error <= rate / 100 + largest * unit, "{sum} bytes at {rate}");
            }
        }
    }

    /// A request never waits for longer than the debt that those before it have left.
    #[test]
    fn a_wait_is_no_longer_than_the_debt(
        rate in 1u64..1 << 40,
        burst in 0u64..2 * SECOND,
        steps in proptest::collection::vec((0u64..SECOND, 0u64..1 << 32), 1..50),
    ) {
        let pace = with(Limit::ReadBytes, rate, Duration::from_nanos(burst));
        let (mut now, mut spent, mut since) = (BEGIN, 0u128, BEGIN);
        for (step, bytes) in steps {
            now += step;
            match pace.admit(now, Class::Read, bytes) {
                Ok(()) => {
                    // Idle time before counts as the burst only.
                    if u128::from(now) > u128::from(since) + spent {
                        (spent, since) = (0, now);
                    }
                    spent += u128::from(cost(bytes, rate));
                }
                Err(wait) => {
                    prop_assert_eq!(u128::from(wait.until), u128::from(since) + spent - u128::from(burst));
                    prop_assert!(pace.admit(wait.until - 1, Class::Read, 0).is_err());
                }
            }
        }
    }
}
