//! Kills the worker of the back end at random moments, and watches what its parent keeps.

use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use lanefsd_frontend::Backend;
use lanefsd_frontend::random::Random;

use crate::{Failure, Run};

/// Kills as often as the options say, or until something has failed. What the parent and the state of the share need
/// must not grow after the first half.
pub fn kill(run: &Run<'_>, backend: &Backend) -> Result<(), Failure> {
    let result = kill_all(run, backend);
    if result.is_err() {
        run.failed.fetch_add(1, Ordering::Relaxed);
    }
    result
}

fn kill_all(run: &Run<'_>, backend: &Backend) -> Result<(), Failure> {
    let options = run.options;
    let mut random = Random::new(options.seed);
    let mut half = None;
    for number in 0..options.kills {
        if number * 2 >= options.kills {
            half.get_or_insert(backend.lasting_kib()?);
        }
        let wait = options.kill_interval + random.below(options.kill_interval as usize / 10) as u64;
        sleep(Duration::from_millis(wait));
        if run.failed.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        // The only signal that ends the first process of a PID namespace, which a worker is.
        backend.replace_worker(libc::SIGKILL)?;
        run.killed.fetch_add(1, Ordering::Relaxed);
        if (number + 1) % 50 == 0 {
            let lasting = backend.lasting_kib()?;
            eprintln!("soak: {} kills, the parent and the state hold {lasting} KiB", number + 1);
        }
    }
    let (half, end) = (half.unwrap_or(0), backend.lasting_kib()?);
    if options.kills > 0 && end > half + options.memory_slack {
        return Err(format!("what outlives workers grew from {half} KiB to {end} KiB").into());
    }
    Ok(())
}
