//! Cost of a range lock: alone, and with 16 threads on disjoint ranges and on one range.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark; a failed step ends it")]

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use lanefsd::fs::passthrough::range_lock::RangeLock;

const THREADS: u32 = 16;
const LEN: u64 = 1 << 20;

/// Time for `rounds` locks in all, by 16 threads; `stride` is how far their ranges are apart.
fn together(rounds: u64, stride: u64) -> Duration {
    let lock = RangeLock::default();
    // All threads, and the one that takes the time.
    let start = Barrier::new(17);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (lock, start) = (&lock, &start);
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..rounds.div_ceil(THREADS.into()) {
                        drop(lock.write(black_box(u64::from(thread) * stride), LEN));
                    }
                })
            })
            .collect();
        start.wait();
        let begin = Instant::now();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        begin.elapsed()
    })
}

fn range_lock(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("range_lock");
    group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    let lock = RangeLock::default();
    group.bench_function("write_alone", |bench| bench.iter(|| lock.write(black_box(0), LEN)));
    group.bench_function("read_alone", |bench| bench.iter(|| lock.read(black_box(0), LEN)));
    group.bench_function("16_threads_disjoint", |bench| bench.iter_custom(|n| together(n, LEN)));
    group.bench_function("16_threads_same_range", |bench| bench.iter_custom(|n| together(n, 0)));
    group.finish();
}

criterion_group!(benches, range_lock);
criterion_main!(benches);
