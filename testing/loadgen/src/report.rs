//! What is printed.

use std::time::Duration;

use serde::Serialize;

use crate::options::Work;
use crate::process::Spent;
use crate::tally::Tally;

/// One measurement.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was done.
    pub work: Work,
    /// Seconds that were measured.
    pub seconds: f64,
    /// Operations finished in that time; each may be several requests.
    pub operations: u64,
    /// Operations per second.
    pub operations_per_second: f64,
    /// Bytes of READ and WRITE per second; null for other operations.
    pub bytes_per_second: Option<f64>,
    /// Requests, or rounds of system calls, per operation.
    pub requests_per_operation: f64,
    /// Microseconds from an operation's first request to its last reply.
    pub latency_us: Latency,
    /// What the back end spent per operation (`limit`: this process), in microseconds.
    pub cpu_us_per_operation: Cpu,
    /// Context switches of the back end per operation.
    pub switches_per_operation: Switches,
    /// Notifications by the back end per operation; null for `limit`.
    pub notifications_per_operation: Option<f64>,
    /// Kicks by the front end per operation; null for `limit`.
    pub kicks_per_operation: Option<f64>,
    /// System calls of the back end per operation, if they were counted and could be.
    pub system_calls_per_operation: Option<f64>,
    /// CPU time of the generator per operation in microseconds; null for `limit`.
    pub generator_cpu_us_per_operation: Option<f64>,
    /// Threads of the limit; null for `run`.
    pub threads: Option<usize>,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

/// Latency in microseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    /// Half of the operations were faster.
    pub p50: f64,
    /// All but 1 %.
    pub p99: f64,
    /// All but 0.1 %.
    pub p999: f64,
    /// The slowest one.
    pub max: f64,
}

/// CPU time per operation in microseconds.
#[derive(Debug, Serialize)]
pub struct Cpu {
    /// All of it, exactly.
    pub total: f64,
    /// User mode, from the kernel's ticks.
    pub user: f64,
    /// Kernel, from its ticks.
    pub system: f64,
}

/// Context switches per operation.
#[derive(Debug, Serialize)]
pub struct Switches {
    /// A thread waited.
    pub voluntary: f64,
    /// A thread was put aside.
    pub involuntary: f64,
}

impl Report {
    /// Divides what was counted by the operations.
    pub fn new(work: &Work, wall: Duration, tally: &Tally, spent: &Spent) -> Report {
        let operations = tally.latency.len();
        let per = |value: f64| value / operations.max(1) as f64;
        let micros = |time: Duration| per(time.as_secs_f64() * 1e6);
        let quantile = |q| tally.latency.value_at_quantile(q) as f64 / 1e3;
        let rate = operations as f64 / wall.as_secs_f64();
        let moves_data = matches!(work.op, crate::options::Op::Read | crate::options::Op::Write);
        Report {
            work: work.clone(),
            seconds: wall.as_secs_f64(),
            operations,
            operations_per_second: rate,
            bytes_per_second: moves_data.then_some(rate * work.block as f64),
            requests_per_operation: per(tally.requests as f64),
            latency_us: Latency {
                p50: quantile(0.5),
                p99: quantile(0.99),
                p999: quantile(0.999),
                max: tally.latency.max() as f64 / 1e3,
            },
            cpu_us_per_operation: Cpu {
                total: micros(spent.cpu),
                user: micros(spent.user),
                system: micros(spent.system),
            },
            switches_per_operation: Switches {
                voluntary: per(spent.voluntary as f64),
                involuntary: per(spent.involuntary as f64),
            },
            notifications_per_operation: Some(per(tally.notifications as f64)),
            kicks_per_operation: Some(per(tally.kicks as f64)),
            system_calls_per_operation: None,
            generator_cpu_us_per_operation: None,
            threads: None,
            notes: Vec::new(),
        }
    }

    /// Adds the count of system calls, or why there is none.
    pub fn system_calls(&mut self, counted: Option<std::result::Result<f64, String>>) {
        match counted {
            Some(Ok(calls)) => self.system_calls_per_operation = Some(calls),
            Some(Err(why)) => self.notes.push(why),
            None => {}
        }
    }
}
