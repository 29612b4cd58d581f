//! A share as the live view shows it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::poller::Update;
use crate::protocol::Sample;
use crate::rates::Rates;
use crate::show;

/// Points of the graphs that are kept; more than a terminal has columns.
const HISTORY: usize = 512;

/// One point of the graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Point {
    /// Requests a second.
    pub(crate) ops: f64,
    /// Bytes a second that the guest read.
    pub(crate) read: f64,
    /// Bytes a second that the guest wrote.
    pub(crate) written: f64,
}

/// A share.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    /// Its control socket.
    pub(crate) socket: PathBuf,
    /// Its name, safe for a terminal.
    pub(crate) name: String,
    /// The newest sample; none while the daemon is gone.
    pub(crate) sample: Option<Sample>,
    /// Rates of the last interval; none before the second sample.
    pub(crate) rates: Option<Rates>,
    /// The error of a daemon that is gone.
    pub(crate) gone: Option<String>,
    /// Points of the graphs, the newest last.
    pub(crate) history: VecDeque<Point>,
}

impl Share {
    /// A share without samples, named by its socket.
    pub(crate) fn new(socket: &Path) -> Share {
        let name = socket.file_stem().unwrap_or(socket.as_os_str()).to_string_lossy();
        Share {
            socket: socket.to_owned(),
            name: show::name(&name),
            sample: None,
            rates: None,
            gone: None,
            history: VecDeque::new(),
        }
    }

    /// Takes over the outcome of a tick.
    pub(crate) fn apply(&mut self, update: Update) {
        match update.sample {
            Ok(sample) => {
                self.rates = self.sample.as_ref().and_then(|before| Rates::between(before, &sample));
                if !sample.share.is_empty() {
                    self.name = show::name(&sample.share);
                }
                (self.sample, self.gone) = (Some(sample), None);
                if let Some(rates) = &self.rates {
                    let point =
                        Point { ops: rates.total.per_second, read: rates.read, written: rates.written };
                    self.remember(point);
                }
            }
            Err(error) => {
                (self.sample, self.rates, self.gone) = (None, None, Some(error.to_string()));
                // A gap in the graph.
                self.remember(Point::default());
            }
        }
    }

    fn remember(&mut self, point: Point) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(point);
    }
}

/// Gives an update to its share, which is made if there is none.
pub(crate) fn apply(shares: &mut Vec<Share>, update: Update) {
    let index = shares.iter().position(|share| share.socket == update.socket).unwrap_or_else(|| {
        shares.push(Share::new(&update.socket));
        shares.len().saturating_sub(1)
    });
    if let Some(share) = shares.get_mut(index) {
        share.apply(update);
    }
}
