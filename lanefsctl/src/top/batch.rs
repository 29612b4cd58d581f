//! Plain text of `top --batch`, for files, pipes, and terminals that cannot do more.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::columns::{OPS, SHARES, Sort, fit, headings, op_cells, row, share_row, sorted, sorted_ops};
use super::poller::Pollers;
use super::share::{Share, apply};
use crate::cli::TopOptions;
use crate::client::TIMEOUT;
use crate::commands::print;
use crate::error::{Error, Result};

/// Columns of a line.
const WIDTH: usize = 110;
/// Columns of operations.
const OPS_WIDTH: usize = 80;

/// Prints each interval.
pub(super) fn run(
    options: &TopOptions,
    sockets: Vec<PathBuf>,
    directory: Option<PathBuf>,
) -> Result<ExitCode> {
    let mut shares: Vec<Share> = sockets.iter().map(|socket| Share::new(socket)).collect();
    let mut pollers = Pollers::new(sockets, directory);
    let mut next = Instant::now();
    let mut printed = 0_u64;
    let mut has_answered = false;
    // The first samples are only the beginning of the first interval.
    collect(&mut pollers, &mut shares, next + TIMEOUT);
    while options.count.is_none_or(|count| printed < count) {
        next += options.interval;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        collect(&mut pollers, &mut shares, Instant::now() + TIMEOUT + Duration::from_millis(500));
        has_answered |= shares.iter().any(|share| share.sample.is_some());
        print(&text(&shares, clock(SystemTime::now()).as_str(), options.interval))?;
        printed += 1;
        // After a daemon that was slow, the intervals have their length again.
        next = next.max(Instant::now().checked_sub(options.interval).unwrap_or(next));
    }
    let reason = shares.into_iter().find_map(|share| share.gone);
    match reason {
        Some(reason) if !has_answered => Err(Error::NothingShown { reason }),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Takes one sample of each share, but waits for none longer than this.
fn collect(pollers: &mut Pollers, shares: &mut Vec<Share>, deadline: Instant) {
    for _ in 0..pollers.tick() {
        let Some(update) = pollers.next(deadline) else { return };
        apply(shares, update);
    }
}

/// The time of day in UTC.
fn clock(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// The text of one interval.
fn text(shares: &[Share], clock: &str, interval: Duration) -> String {
    let mut text = format!("{clock}, {} s\n", interval.as_secs_f64());
    let mut add = |indent: &str, line: &str| {
        text.push_str(indent);
        text.push_str(line.trim_end());
        text.push('\n');
    };
    let columns = fit(&SHARES, WIDTH);
    add("", &headings(&columns));
    let shares = sorted(shares, Sort::default());
    for share in &shares {
        // A file has room for the whole reason.
        add("", &share_row(share, &columns, usize::MAX));
    }
    let columns = fit(&OPS, OPS_WIDTH);
    for share in shares {
        let ops = sorted_ops(share, Sort::default());
        let active: Vec<_> = ops.into_iter().filter(|op| op.per_second > 0.0).collect();
        if !active.is_empty() {
            add("", &format!("share {}", share.name));
            add("  ", &headings(&columns));
            for op in active {
                add("  ", &row(&op_cells(op), &columns));
            }
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::fixture;

    #[test]
    fn an_interval_has_shares_and_their_operations() {
        let text = text(&fixture::shares(), "12:00:00 UTC", Duration::from_secs(2));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "12:00:00 UTC, 2 s");
        assert!(lines[1].starts_with("SHARE ") && lines[1].contains("WRITE/s"), "{text}");
        assert!(lines[2].starts_with("web "), "{text}");
        assert!(
            lines.iter().any(|line| line.starts_with("database  ") && line.contains("  gone: no answer")),
            "{text}"
        );
        let heading = lines.iter().position(|line| *line == "share web").unwrap();
        assert!(lines[heading + 1].starts_with("  OPERATION"), "{text}");
        assert!(lines[heading + 2].starts_with("  write "), "{text}");
        assert!(!text.contains("statfs"), "idle operations are left out:\n{text}");
        assert!(lines.iter().all(|line| !line.ends_with(' ')));
    }

    #[test]
    fn the_clock_is_utc() {
        let time = UNIX_EPOCH + Duration::from_secs(86_400 * 365 + 3_725);
        assert_eq!(clock(time), "01:02:05 UTC");
    }
}
