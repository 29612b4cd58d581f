//! What the guest has looked up stays known, whenever workers die: also the one that takes back what another one has
//! counted, and those that die with FORGET and LOOKUP of one inode in flight.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::{Backend, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};

use super::{IMMORTAL, worker};
use crate::common;

/// How long each test goes on. Longer is better: LANEFSD_TEST_SECONDS.
fn end() -> Instant {
    let seconds = std::env::var("LANEFSD_TEST_SECONDS").ok().and_then(|text| text.parse().ok());
    Instant::now() + Duration::from_secs(seconds.unwrap_or(4))
}

fn start() -> Backend {
    let args = [IMMORTAL, "--inode-file-handles=never", "--log-level=info"];
    let backend = Backend::of(common::program()).args(args).start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    backend
}

/// The process that was made last.
fn youngest(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().last().map(|child| child.parse().unwrap())
}

fn kill(pid: u32) {
    // It may have ended by itself meanwhile.
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
}

/// Kills the worker, and then the next one `after` it was made.
fn kill_two(backend: &Backend, after: Duration) {
    let Some(first) = worker(backend) else { return };
    kill(first);
    let next = loop {
        if let Some(next) = youngest(backend.pid()).filter(|next| *next != first) {
            break next;
        }
    };
    std::thread::sleep(after);
    kill(next);
}

#[test]
fn a_worker_that_dies_while_it_recovers_takes_no_lookup_away() {
    const FILES: usize = 2000;
    let backend = start();
    (0..FILES).for_each(|file| fs::write(backend.path(&format!("{file:05}")), "").unwrap());
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    let mut counts: HashMap<u64, u64> = HashMap::new();
    let mut list = || {
        for entry in client.readdirplus(ROOT, fh, 0, 900_000).unwrap() {
            if let Some(node) = entry.entry.as_ref().map(|entry| entry.nodeid).filter(|node| *node > 0) {
                *counts.entry(node).or_default() += 1;
            }
        }
    };
    let (mut random, end) = (Random::new(7), end());
    list();
    while Instant::now() < end {
        let mut below = |most| Duration::from_micros(u64::try_from(random.below(most)).unwrap());
        let (first, second) = (below(15_000), below(2000));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(first);
                kill_two(&backend, second);
            });
            list();
        });
    }
    for (node, count) in counts.into_iter().filter(|(node, _)| *node != ROOT) {
        client.forget(node, count - 1).unwrap();
        client.getattr(node).unwrap_or_else(|error| panic!("node {node}, looked up {count} times: {error}"));
    }
}

#[test]
fn a_forget_beside_lookups_of_the_same_inode_is_done_once() {
    let backend = start();
    let session = backend.connect(common::queues(2)).unwrap();
    fs::write(backend.path("file"), "").unwrap();
    let (mut random, end) = (Random::new(9), end());
    while Instant::now() < end {
        let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
        for _ in 0..400 {
            session.client().lookup(ROOT, "file").unwrap();
        }
        let stop = AtomicBool::new(false);
        let until_stop = |queue, most: u64, act: &(dyn Fn(usize) + Sync)| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) && count < most {
                act(queue);
                count += 1;
            }
            count
        };
        let look_up = |queue| {
            session.client().on(queue).lookup(ROOT, "file").unwrap();
        };
        let forget = |queue| session.client().on(queue).forget(node, 1).unwrap();
        let (looked, forgot) = std::thread::scope(|scope| {
            let lookups = scope.spawn(|| until_stop(1, u64::MAX, &look_up));
            let forgets = scope.spawn(|| until_stop(2, 300, &forget));
            std::thread::sleep(Duration::from_micros(500 + u64::try_from(random.below(2500)).unwrap()));
            if let Some(worker) = worker(&backend) {
                kill(worker);
            }
            std::thread::sleep(Duration::from_millis(3));
            stop.store(true, Ordering::Relaxed);
            (lookups.join().unwrap(), forgets.join().unwrap())
        });
        let client = session.client().on(2);
        client.forget(node, 401 + looked - forgot - 1).unwrap();
        client.getattr(node).expect("one lookup is left");
        // In doubt a lookup stays.
        client.forget(node, 1000).unwrap();
    }
}
