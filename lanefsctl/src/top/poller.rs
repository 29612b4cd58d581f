//! Threads that take samples, one for each share.
//!
//! A daemon that is stopped must not hold up the view of the others. The main thread sends a tick to each thread at
//! each interval, and a thread answers each tick that it takes with one update. A thread that is still busy with the
//! last tick misses the next one.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Instant;

use crate::client::Client;
use crate::commands::discover;
use crate::error::{Error, Result};
use crate::protocol::{Request, Sample};

/// The outcome of one tick.
#[derive(Debug)]
pub(crate) struct Update {
    /// The share's control socket.
    pub(crate) socket: PathBuf,
    /// Its counters.
    pub(crate) sample: Result<Sample>,
}

/// All threads.
#[derive(Debug)]
pub(crate) struct Pollers {
    /// Where new sockets may appear.
    directory: Option<PathBuf>,
    ticks: Vec<(PathBuf, SyncSender<()>)>,
    sender: Sender<Update>,
    updates: Receiver<Update>,
}

impl Pollers {
    /// Threads for these sockets, and for those that appear in the directory later.
    pub(crate) fn new(sockets: Vec<PathBuf>, directory: Option<PathBuf>) -> Pollers {
        let (sender, updates) = channel();
        let mut pollers = Pollers { directory, ticks: Vec::new(), sender, updates };
        for socket in sockets {
            pollers.add(socket);
        }
        pollers
    }

    fn add(&mut self, socket: PathBuf) {
        if self.ticks.iter().any(|(known, _)| *known == socket) {
            return;
        }
        let (tick, ticks) = sync_channel(1);
        let (updates, path) = (self.sender.clone(), socket.clone());
        // A share without a thread is tried again at the next tick.
        let thread = thread::Builder::new().name("poller".to_owned());
        if thread.spawn(move || poll(&path, &ticks, &updates)).is_ok() {
            self.ticks.push((socket, tick));
        }
    }

    /// Asks for one sample of each share, and returns the number of those that are asked.
    pub(crate) fn tick(&mut self) -> usize {
        let found = self.directory.as_deref().and_then(|directory| discover(directory).ok());
        for socket in found.unwrap_or_default() {
            self.add(socket);
        }
        self.ticks.iter().filter(|(_, tick)| tick.try_send(()).is_ok()).count()
    }

    /// An update that is there.
    pub(crate) fn try_next(&self) -> Option<Update> {
        self.updates.try_recv().ok()
    }

    /// The next update, if it comes in time.
    pub(crate) fn next(&self, deadline: Instant) -> Option<Update> {
        self.updates.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

/// A thread's life: one update for each tick.
fn poll(socket: &Path, ticks: &Receiver<()>, updates: &Sender<Update>) {
    let mut client = None;
    while ticks.recv().is_ok() {
        let sample = sample(&mut client, socket);
        if updates.send(Update { socket: socket.to_owned(), sample }).is_err() {
            return;
        }
    }
}

/// One sample. A connection that broke since the last one, as by an upgrade, is made anew.
fn sample(client: &mut Option<Client>, socket: &Path) -> Result<Sample> {
    if let Some(mut open) = client.take() {
        match open.get(&Request::Sample) {
            Ok(sample) => {
                *client = Some(open);
                return Ok(sample);
            }
            Err(Error::Closed { .. } | Error::Talk { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let mut fresh = Client::connect(socket)?;
    let sample = fresh.get(&Request::Sample)?;
    *client = Some(fresh);
    Ok(sample)
}
