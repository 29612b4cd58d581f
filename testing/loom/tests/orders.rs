//! Range locks and I/O modes under every order of their threads' steps.
//!
//! loom also fails a run in which a thread sleeps for ever, so each of these tests shows that no
//! wake-up is lost.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use lanefsd_loom::fs::passthrough::config::{CachePolicy, ParallelDirectWrites};
use lanefsd_loom::io_mode::{IoMode, IoPolicy, Mode};
use lanefsd_loom::range_lock::{RangeLock, lock_copy};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

/// Runs `model` with at most `preemptions` switches away from a thread that could go on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Counts who is inside, and fails if a writer is not alone.
#[derive(Default)]
struct Inside(AtomicU32);

impl Inside {
    fn write(&self) {
        assert_eq!(self.0.swap(100, Ordering::SeqCst), 0);
        assert_eq!(self.0.swap(0, Ordering::SeqCst), 100);
    }

    fn read(&self) {
        assert!(self.0.fetch_add(1, Ordering::SeqCst) < 100);
        assert!(self.0.fetch_sub(1, Ordering::SeqCst) < 100);
    }
}

#[test]
fn writers_exclude_each_other_and_readers() {
    check(3, || {
        let shared = Arc::new((RangeLock::default(), Inside::default()));
        let threads = [(0, 10), (5, 10)].map(|(start, len)| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _guard = shared.0.write(start, len);
                shared.1.write();
            })
        });
        {
            let _guard = shared.0.read(8, 1);
            shared.1.read();
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_truncation_between_two_writes_wakes_both() {
    check(3, || {
        let lock = Arc::new(RangeLock::default());
        let truncation = lock.write_from(0);
        let threads = [0, 10].map(|start| {
            let lock = Arc::clone(&lock);
            thread::spawn(move || drop(lock.write(start, 10)))
        });
        drop(truncation);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        lock.trim();
    });
}

#[test]
fn copies_and_a_truncation_do_not_deadlock() {
    check(2, || {
        let files = Arc::new((RangeLock::default(), RangeLock::default()));
        let other = Arc::clone(&files);
        let there = thread::spawn(move || drop(lock_copy((&other.0, 0), (&other.1, 0), 10)));
        let other = Arc::clone(&files);
        let truncation = thread::spawn(move || drop(other.1.write_from(0)));
        drop(lock_copy((&files.1, 5), (&files.0, 5), 10));
        there.join().unwrap();
        truncation.join().unwrap();
    });
}

#[test]
fn openers_never_differ_while_both_have_the_file_open() {
    check(4, || {
        let shared = Arc::new((IoMode::default(), AtomicU32::new(0), AtomicU32::new(0)));
        let open = |direct: bool, shared: &(IoMode, AtomicU32, AtomicU32)| {
            let policy = IoPolicy {
                parallel: ParallelDirectWrites::Auto,
                extending: true,
                cache: CachePolicy::Auto,
                writeback: false,
                maps_direct: true,
            };
            let (inode, parallel, cached) = shared;
            let (mine, other) = match inode.open(policy, direct).unwrap() {
                Mode::Parallel => (parallel, cached),
                Mode::Direct | Mode::Cached => (cached, parallel),
            };
            mine.fetch_add(1, Ordering::SeqCst);
            assert_eq!(other.load(Ordering::SeqCst), 0);
            mine.fetch_sub(1, Ordering::SeqCst);
            inode.release();
        };
        let threads = [true, false].map(|direct| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || open(direct, &shared))
        });
        open(true, &shared);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
