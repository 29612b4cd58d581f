//! `loadgen run`: a back end under load.

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use lanefsd_frontend::backend::Backend;
use lanefsd_frontend::message::feature;
use lanefsd_frontend::migration::Log;
use lanefsd_frontend::session::{Session, SessionOptions};

use crate::cycles::prepare;
use crate::error::{LoadError, Result};
use crate::forgets::Forgets;
use crate::lane::Lane;
use crate::layout;
use crate::options::{RunOptions, Work};
use crate::process::{Spent, Usage};
use crate::report::Report;
use crate::syscalls;
use crate::tally::{Coordinator, Phase, Tally};

/// How long the queues may take to run empty.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts the back end if there is none, and measures it.
pub fn run(options: &RunOptions) -> Result<Report> {
    options.work.check()?;
    let session = session_options(&options.work);
    match (&options.backend, &options.share, &options.socket, options.pid) {
        (Some(program), Some(share), _, _) => {
            let mut backend = Backend::of(program).share(share).args(&options.backend_arg).start()?;
            let session = backend.connect(session)?;
            let report = measure(&session, backend.pid(), options);
            drop(session);
            // By itself, so that the CPU time of its worker counts as its own and not as that of others.
            let _ = backend.wait(PATIENCE);
            report
        }
        (None, _, Some(socket), Some(pid)) => measure(&Session::connect(socket, session)?, pid, options),
        _ => Err(LoadError::Options("give --backend and --share, or --socket and --pid".into())),
    }
}

fn session_options(work: &Work) -> SessionOptions {
    // Scattered pages take twice their room, and buffers are rounded up to a power of two.
    let slot = 4 * work.block.next_power_of_two() + (64 << 10);
    let memory = vec![(0x10_0000, work.in_flight() * slot + (64 << 20))];
    SessionOptions { queues: usize::from(work.queues), memory, ..SessionOptions::default() }
}

fn measure(session: &Session, pid: u32, options: &RunOptions) -> Result<Report> {
    let work = &options.work;
    if session.features() & feature::INDIRECT_DESC == 0 {
        return Err(LoadError::Options("the back end does not offer INDIRECT_DESC".into()));
    }
    let workload = prepare(&session.client(), work)?;
    let forgets = Forgets::new(session)?;
    let log = options.dirty_log.then(|| Log::of(session)).transpose()?;
    if let Some(log) = &log {
        session.begin_logging(log)?;
    }
    let coordinator = Coordinator::default();
    let queues = 0..usize::from(work.queues);
    let lanes = queues.map(|index| Lane::new(session, index, &workload, &forgets, &coordinator));
    let mut lanes = lanes.collect::<Result<Vec<_>>>()?;
    if let (Some(file), Some(lane)) = (&options.slow_file, lanes.first_mut()) {
        lane.add_blocked_read(session, layout::file(&session.client(), file)?)?;
    }
    let count = lanes.len();
    thread::scope(|scope| {
        let (sender, receiver) = channel();
        for lane in lanes {
            let sender = sender.clone();
            // The receiver lives until all lanes have sent.
            scope.spawn(move || drop(sender.send(lane.run())));
        }
        conduct(work, pid, &coordinator, &receiver, count)
    })
}

/// Leads the lanes through the phases and reports.
fn conduct(
    work: &Work,
    pid: u32,
    coordinator: &Coordinator,
    lanes: &Receiver<Result<Tally>>,
    count: usize,
) -> Result<Report> {
    // A lane that ends before its time has failed.
    let pause = |time: Duration| {
        if let Ok(result) = lanes.recv_timeout(time) {
            give_up(result.err());
        }
    };
    pause(work.warmup());
    let own = std::process::id();
    let (before, own_before, begin) = (Usage::of(pid), Usage::of(own), Instant::now());
    coordinator.begin(Phase::Measure);
    pause(work.time());
    coordinator.begin(Phase::After);
    let wall = begin.elapsed();
    let spent = Usage::of(pid).since(&before);
    let own_spent: Spent = Usage::of(own).since(&own_before);
    let calls = work.syscalls.then(|| syscalls::per_operation(pid, coordinator));
    coordinator.begin(Phase::Stop);
    let mut tally = Tally::default();
    for _ in 0..count {
        match lanes.recv_timeout(PATIENCE) {
            Ok(lane) => tally.add(&lane?),
            Err(_) => give_up(Some(LoadError::Stuck(PATIENCE.as_secs()))),
        }
    }
    let mut report = Report::new(work, wall, &tally, &spent);
    report.generator_cpu_us_per_operation = Some(
        generator_cpu(&own_spent, &spent, own, pid).as_secs_f64() * 1e6 / tally.latency.len().max(1) as f64,
    );
    report.system_calls(calls);
    Ok(report)
}

/// CPU time of this process alone: the tree below it holds the back end if it was started here.
fn generator_cpu(own: &Spent, backend: &Spent, own_pid: u32, backend_pid: u32) -> Duration {
    let children = std::fs::read_to_string(format!("/proc/{own_pid}/task/{own_pid}/children"));
    let is_child = children.unwrap_or_default().split_whitespace().any(|pid| pid == backend_pid.to_string());
    if is_child { own.cpu.saturating_sub(backend.cpu) } else { own.cpu }
}

/// Ends the program at once: the other lanes may wait for ever. The back end sees the socket close
/// and ends too.
fn give_up(error: Option<LoadError>) {
    eprintln!("loadgen: a queue has failed");
    let error = error.unwrap_or_else(|| LoadError::Options("a queue ended before its time".into()));
    let mut next: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = next {
        eprintln!("  because: {error}");
        next = error.source();
    }
    std::process::exit(1);
}
