//! System calls per operation, counted by `perf stat` from outside.
//!
//! The count comes from a run of its own after the measured one: the tracepoint makes every system
//! call of the process slower.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::process::tree;
use crate::tally::Coordinator;

/// How long perf counts.
const SECONDS: f64 = 0.5;

/// System calls of process `pid` and of those below it per operation while the threads go on; or why there is no count.
pub fn per_operation(pid: u32, coordinator: &Coordinator) -> Result<f64, String> {
    let pids: Vec<_> = tree(pid).iter().map(u32::to_string).collect();
    let mut perf = Command::new("perf");
    perf.args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p", &pids.join(","), "--", "sleep"]);
    perf.arg(SECONDS.to_string());
    perf.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let child = perf.spawn().map_err(|error| format!("system calls are not counted: perf: {error}"))?;
    // The rate of operations is taken in the middle of perf's window, as its edges are not known.
    sleep(Duration::from_secs_f64(SECONDS * 0.3));
    let (begin, before) = (Instant::now(), coordinator.operations());
    sleep(Duration::from_secs_f64(SECONDS * 0.5));
    let rate = (coordinator.operations() - before) as f64 / begin.elapsed().as_secs_f64();
    let output =
        child.wait_with_output().map_err(|error| format!("system calls are not counted: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let count =
        text.lines().find(|line| line.contains("raw_syscalls")).and_then(|line| line.split(',').next());
    match count.and_then(|count| count.trim().parse::<f64>().ok()) {
        Some(count) if rate > 0.0 => Ok(count / SECONDS / rate),
        Some(_) => Err("system calls are not counted: no operation ended meanwhile".into()),
        None => Err(format!("system calls are not counted: perf said: {}", text.trim())),
    }
}
