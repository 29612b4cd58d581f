//! A soak test: a million mixed requests over several queues at depth, every answer checked.
//!
//! At the end everything is forgotten, and the back end has to be as small as after INIT: the same
//! number of descriptors, and no more memory than after the first tenth of the run. With `--kills` its worker dies
//! again and again meanwhile, and nobody may notice.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]

mod actor;
mod killer;

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actor::{Actor, SHARED_STRIPE, Stripe};
use clap::Parser;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::random::Random;
use lanefsd_frontend::{Backend, Session, SessionOptions};

type Failure = Box<dyn Error + Send + Sync>;

/// Sends mixed metadata and data requests to a vhost-user-fs back end and checks every answer.
#[derive(Debug, Parser)]
struct Options {
    /// The program to test; it has virtiofsd's options.
    #[arg(long)]
    backend: PathBuf,
    /// A further option for it, e.g. --backend-arg=--cache=never; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    backend_arg: Vec<String>,
    /// Where the shared directory is made; a temporary directory by default.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Requests to send.
    #[arg(long, default_value_t = 1_000_000)]
    requests: u64,
    /// Request queues, one front-end thread each.
    #[arg(long, default_value_t = 4)]
    queues: usize,
    /// Requests in flight per queue.
    #[arg(long, default_value_t = 64)]
    depth: usize,
    /// Descriptors per ring.
    #[arg(long, default_value_t = 1024)]
    ring_size: u16,
    /// Seed of the random choices; a failing run repeats its requests with the same seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Memory that the back end may have gained between the first tenth and the end, in KiB.
    #[arg(long, default_value_t = 4096)]
    memory_slack: usize,
    /// How often to kill the worker of the back end at random moments; the run lasts as long as that takes.
    #[arg(long, default_value_t = 0)]
    kills: u64,
    /// Milliseconds between two of them, and a random part of a tenth more. A daemon gives up after too many in a
    /// short time.
    #[arg(long, default_value_t = 2600)]
    kill_interval: u64,
}

/// What all workers share.
struct Run<'a> {
    session: &'a Session,
    options: &'a Options,
    share: &'a Path,
    sent: AtomicU64,
    failed: AtomicU64,
    killed: AtomicU64,
}

impl Run<'_> {
    /// Whether a queue that has sent so many requests sends further ones.
    fn goes_on(&self, sent: u64, budget: u64) -> bool {
        let kills = self.killed.load(Ordering::Relaxed) < self.options.kills;
        sent < budget || kills && self.failed.load(Ordering::Relaxed) == 0
    }
}

fn main() {
    if let Err(error) = run(&Options::parse()) {
        eprintln!("soak: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        std::process::exit(1);
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let share = tempfile::Builder::new()
        .prefix("soak-")
        .tempdir_in(options.directory.clone().unwrap_or_else(std::env::temp_dir))?;
    let mut backend = Backend::of(&options.backend)
        .args(["--sandbox=none"])
        .args(&options.backend_arg)
        .share(share.path())
        .start()?;
    let session = backend.connect(SessionOptions {
        queues: options.queues,
        ring_size: options.ring_size,
        memory: vec![(0x10_0000, 512 << 20), (1 << 32, 512 << 20)],
        timeout: Duration::from_secs(60),
        ..SessionOptions::default()
    })?;
    let descriptors = backend.descriptors()?;
    let run = Run {
        session: &session,
        options,
        share: share.path(),
        sent: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        killed: AtomicU64::new(0),
    };
    let started = Instant::now();
    let (early, busy, forgotten) = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=options.queues)
            .map(|queue| {
                let run = &run;
                scope.spawn(move || worker(run, queue))
            })
            .collect();
        let killer = scope.spawn(|| killer::kill(&run, &backend));
        let memory = watch(&run, &backend);
        killer.join().map_err(|_| "the killer panicked")??;
        let mut forgotten = Vec::new();
        for worker in workers {
            forgotten.extend(worker.join().map_err(|_| "a worker panicked")??);
        }
        memory.map(|(early, busy)| (early, busy, forgotten))
    })?;
    let elapsed = started.elapsed();
    session.queue(0).drain()?;
    let cpu = backend.cpu_time()?;
    for node in forgotten {
        if session.client().getattr(node).is_ok() {
            return Err(format!("node {node} was forgotten, but the back end still has it").into());
        }
    }
    check_descriptors(&backend, &descriptors)?;
    let end = backend.resident_kib()?;
    if end > early + options.memory_slack {
        return Err(format!("memory grew from {early} KiB in the first tenth to {end} KiB at the end").into());
    }
    let (kicks, calls) = session.queues().iter().fold((0, 0), |(k, c), q| (k + q.kicks(), c + q.calls()));
    let in_flight: usize = session.queues().iter().map(|queue| queue.in_flight()).sum();
    if in_flight != 0 {
        return Err(format!("{in_flight} used entries were lost").into());
    }
    let sent = run.sent.load(Ordering::Relaxed);
    println!(
        "soak: {sent} requests, {} queues, depth {}: {:.1} s, {:.0}/s, {:.2} us CPU each, {kicks} kicks, \
         {calls} notifications, {} descriptors, memory {early} KiB early, {busy} KiB at most, {end} KiB at the end",
        options.queues,
        options.depth,
        elapsed.as_secs_f64(),
        sent as f64 / elapsed.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / sent as f64,
        descriptors.len(),
    );
    drop(session);
    backend.expect_success()?;
    Ok(())
}

/// Prints progress; returns the back end's memory in KiB after a tenth of the run, and at most.
fn watch(run: &Run<'_>, backend: &Backend) -> Result<(usize, usize), Failure> {
    let total = run.options.requests;
    let (mut early, mut most, mut reported) = (None, 0, 0);
    loop {
        let sent = run.sent.load(Ordering::Relaxed);
        // A worker may be dead.
        let memory = match backend.resident_kib() {
            Err(_) if run.options.kills > 0 => most,
            other => other?,
        };
        most = most.max(memory);
        if sent * 10 >= total {
            early.get_or_insert(memory);
        }
        if sent * 10 / total > reported && sent <= total {
            reported = sent * 10 / total;
            eprintln!("soak: {sent} of {total} requests, memory {memory} KiB");
        }
        if sent >= total && !run.goes_on(sent, total) || run.failed.load(Ordering::Relaxed) > 0 {
            return Ok((early.unwrap_or(most), most));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn worker(run: &Run<'_>, queue: usize) -> Result<Vec<u64>, Failure> {
    let result = drive(run, queue);
    if let Err(error) = &result {
        run.failed.fetch_add(1, Ordering::Relaxed);
        eprintln!("soak: queue {queue}: {error}");
    }
    result
}

/// Keeps `depth` actors busy on one queue, each with one request in flight, until the budget is used up.
/// Returns nodes that were forgotten.
fn drive(run: &Run<'_>, queue: usize) -> Result<Vec<u64>, Failure> {
    let session = run.session;
    let client = session.client().on(queue);
    let home = client.mkdir(ROOT, format!("queue-{queue}"), 0o755, 0)?.nodeid;
    let shared = client.create(ROOT, "shared", libc::O_RDWR, 0o644, 0)?;
    let mut actors = Vec::new();
    for slot in 0..run.options.depth {
        let number = (queue - 1) * run.options.depth + slot;
        let stripe = Stripe {
            node: shared.0.nodeid,
            fh: shared.1.fh,
            offset: (number * SHARED_STRIPE) as u64,
            content: vec![0; SHARED_STRIPE],
        };
        // The stripe exists from the start, so that reads are never short.
        client.write(stripe.node, stripe.fh, stripe.offset, &stripe.content)?;
        let random = Random::new(run.options.seed.wrapping_mul(1_000_003).wrapping_add(number as u64));
        let mut actor = Actor::new(home, format!("actor-{slot}"), stripe, random);
        actor.tolerates_lost_fsync = run.options.kills > 0;
        actors.push(actor);
    }
    let budget = run.options.requests / run.options.queues as u64;
    let mut waiting = HashMap::new();
    let (mut idle, mut sent): (Vec<usize>, u64) = ((0..actors.len()).collect(), 0);
    while run.goes_on(sent, budget) || !waiting.is_empty() {
        while run.goes_on(sent, budget)
            && let Some(index) = idle.pop()
        {
            waiting.insert(actors[index].send(&client)?, index);
            sent += 1;
            run.sent.fetch_add(1, Ordering::Relaxed);
        }
        let Some(completion) = session.queue(queue).complete()? else {
            return Err(format!("{} requests are lost: nothing is in flight", waiting.len()).into());
        };
        let index = waiting.remove(&completion.token).ok_or("a chain came back that nobody waits for")?;
        actors[index].receive(&client, &completion)?;
        idle.push(index);
    }
    for actor in &mut actors {
        actor.finish(&client)?;
    }
    client.release(shared.0.nodeid, shared.1.fh)?;
    client.forget_later(shared.0.nodeid, 1)?;
    client.forget_later(home, 1)?;
    actors.iter().try_for_each(|actor| check_on_host(run, queue, actor))?;
    Ok(actors.iter().flat_map(Actor::forgotten).chain([shared.0.nodeid, home]).collect())
}

/// Compares what the actor knows with what the host has.
fn check_on_host(run: &Run<'_>, queue: usize, actor: &Actor) -> Result<(), Failure> {
    let path = run.share.join(format!("queue-{queue}")).join(actor.name());
    match (actor.content(), fs::read(&path)) {
        (Some(want), Ok(found)) if want == found => {}
        (None, Err(e)) if e.kind() == std::io::ErrorKind::NotFound => {}
        _ => return Err(format!("{} on the host is not what was written", path.display()).into()),
    }
    let stripe = actor.stripe();
    let mut found = vec![0; stripe.content.len()];
    fs::File::open(run.share.join("shared"))?.read_exact_at(&mut found, stripe.offset)?;
    if found != stripe.content {
        return Err(format!("the shared file differs in the stripe at {} on the host", stripe.offset).into());
    }
    Ok(())
}

/// Waits until the back end has as many descriptors as after INIT.
fn check_descriptors(backend: &Backend, before: &[String]) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = backend.descriptors()?;
        if now.len() <= before.len() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let mut more = now.clone();
            for known in before {
                if let Some(at) = more.iter().position(|one| one == known) {
                    more.swap_remove(at);
                }
            }
            more.truncate(10);
            return Err(format!(
                "{} descriptors after INIT, {} after everything was forgotten, among them {more:?}",
                before.len(),
                now.len()
            )
            .into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
