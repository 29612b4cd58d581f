use std::thread;

use rustix::io::fcntl_dupfd_cloexec;

use super::*;

#[test]
fn the_parts_of_the_file_do_not_overlap() {
    let metrics = Metrics::create().unwrap();
    assert_eq!(metrics.slow_records().len(), slow::KEPT);
    assert_eq!(metrics.mapping.records::<AtomicU64>(offsets::ERRORS, OPS * ERRNOS).len(), OPS * ERRNOS);
    assert_eq!(metrics.mapping.records::<QueueCounts>(offsets::COUNTS, QUEUES).len(), QUEUES);
    let progress = metrics.mapping.records::<AtomicU64>(offsets::PROGRESS, QUEUES * SLOTS * PROGRESS_STRIDE);
    assert_eq!(progress.len(), QUEUES * SLOTS * PROGRESS_STRIDE);
    assert_eq!(metrics.mapping.records::<ShardCounts>(offsets::SHARDS, SHARDS).len(), SHARDS);
}

#[test]
fn another_process_sees_the_counters() {
    let metrics = Metrics::create().unwrap();
    metrics.count_death();
    metrics.for_queue(3).publish(1, 0, 0);
    let again = Metrics::open(fcntl_dupfd_cloexec(metrics.file(), 3).unwrap()).unwrap().unwrap();
    assert_eq!((again.deaths(), again.sample().queues[3].requests), (1, 1));
}

#[test]
fn counters_of_another_version_are_given_up() {
    let metrics = Metrics::create().unwrap();
    metrics.count_death();
    metrics.header().version.store(VERSION + 1, Ordering::Relaxed);
    assert!(Metrics::open(fcntl_dupfd_cloexec(metrics.file(), 3).unwrap()).unwrap().is_none());
}

#[test]
fn who_asks_gets_gauges_of_now() {
    let metrics = Metrics::create().unwrap();
    let answering = Arc::clone(&metrics);
    let thread = thread::spawn(move || {
        let mut last = answering.last_question();
        for inodes in 1..=2 {
            last = answering.next_question(last);
            answering.answer(last, Gauges { inodes, ..Gauges::default() });
        }
    });
    assert_eq!(metrics.ask(Duration::from_secs(10)).inodes, 1);
    assert_eq!(metrics.ask(Duration::from_secs(10)).inodes, 2);
    thread.join().unwrap();
    // Nobody answers any more.
    assert_eq!(metrics.ask(Duration::from_millis(10)).inodes, 2);
}

#[test]
fn a_request_in_flight_has_a_time_and_a_phase() {
    let metrics = Metrics::create().unwrap();
    let queue = metrics.for_queue(2);
    queue.begin(7, 12345);
    assert_eq!(metrics.progress(2, 7), (12345, Phase::Serving));
    queue.set_phase(7, Phase::Waiting);
    assert_eq!(metrics.progress(2, 7), (12345, Phase::Waiting));
    queue.set_phase(7, Phase::Serving);
    assert_eq!(metrics.progress(2, 7), (12345, Phase::Serving));
}

#[test]
fn the_log_level_is_nobodys_until_it_is_said() {
    let metrics = Metrics::create().unwrap();
    assert_eq!(metrics.log_level(), None);
    for level in LevelFilter::iter() {
        metrics.set_log_level(level);
        assert_eq!(metrics.log_level(), Some(level));
    }
}

#[test]
fn a_process_begins_without_queues() {
    let metrics = Metrics::create().unwrap();
    let mut queue = metrics.for_queue(2);
    queue.start(128);
    queue.publish(1, 0, 0);
    // The one that served it is dead, and the next one may serve a front end that has no such queue.
    metrics.begin_process();
    let queue = metrics.sample().queues[2];
    assert_eq!((queue.size, queue.requests), (0, 1));
}
