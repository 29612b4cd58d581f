//! `lanefsctl top`: rates and latencies of shares, live on a terminal or as plain text.
//!
//! The main thread draws and reads keys. A thread for each share takes samples ([`poller`]).

mod batch;
mod columns;
#[cfg(test)]
mod fixture;
mod poller;
mod share;
mod state;
mod view;
#[cfg(test)]
mod view_tests;

use std::io::{self, IsTerminal as _};
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use self::poller::Pollers;
use self::share::Share;
use self::state::{Action, App};
use crate::cli::TopOptions;
use crate::error::{Error, Result};

/// The first interval, so that rates are there soon.
const FIRST: Duration = Duration::from_millis(300);
/// The longest time without a look at signals and answers.
const PATIENCE: Duration = Duration::from_millis(100);
/// The time to restore the terminal after a signal.
const GRACE: Duration = Duration::from_secs(1);
/// Signals that end a program; the terminal is restored first.
const SIGNALS: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Runs `top` for these sockets, and for those that appear in the directory later.
pub(crate) fn run(
    options: &TopOptions,
    sockets: Vec<PathBuf>,
    directory: Option<PathBuf>,
) -> Result<ExitCode> {
    if options.batch {
        return batch::run(options, sockets, directory);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Error::NoTerminal);
    }
    let end = signals().and_then(|signal| watch(options, sockets, directory, &signal));
    if let End::Signal(signal) = end.map_err(|source| Error::Terminal { source })? {
        // The parent process sees the signal. It returns only if that fails.
        let _ = signal_hook::low_level::emulate_default_handler(signal);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// The reason for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A key, or the number of updates.
    Wanted,
    /// This signal.
    Signal(i32),
}

/// The number of a signal that arrived; 0 before.
///
/// The main thread restores the terminal then. If it is stuck, as in writing to a terminal that takes nothing, a thread
/// ends the process. Relaxed is enough: nothing else is published with the number.
fn signals() -> io::Result<Arc<AtomicI32>> {
    let found = Arc::new(AtomicI32::new(0));
    let (mut signals, seen) = (Signals::new(SIGNALS)?, Arc::clone(&found));
    let wait = move || {
        if let Some(signal) = signals.forever().next() {
            seen.store(signal, Ordering::Relaxed);
            thread::sleep(GRACE);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
    Ok(found)
}

/// Waits for input. A terminal that has gone is an error: crossterm would read its end of file again and again.
fn wait_for_input(timeout: Duration) -> io::Result<()> {
    let stdin = io::stdin();
    let mut descriptors = [PollFd::new(&stdin, PollFlags::IN)];
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match poll(&mut descriptors, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let [input] = descriptors;
    if input.revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has hung up"));
    }
    Ok(())
}

/// The terminal in its state for the view; dropped, it is as before. The hook of [`ratatui::try_init`] does that after a
/// panic.
#[derive(Debug)]
struct Screen {
    /// Its own drop prints an error if the terminal has gone, which panics if standard error was that terminal.
    terminal: ManuallyDrop<DefaultTerminal>,
}

impl Screen {
    fn enter() -> io::Result<Screen> {
        let terminal = ratatui::try_init().inspect_err(|_| {
            let _ = ratatui::try_restore();
        })?;
        Ok(Screen { terminal: ManuallyDrop::new(terminal) })
    }

    /// Gives the terminal back, stops this process, and takes the terminal again when it is continued.
    fn suspend(self) -> io::Result<Screen> {
        drop(self);
        kill_process(getpid(), Signal::TSTP)?;
        Screen::enter()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that has gone needs neither.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// The main loop.
fn watch(
    options: &TopOptions,
    sockets: Vec<PathBuf>,
    directory: Option<PathBuf>,
    signal: &AtomicI32,
) -> io::Result<End> {
    let is_coloured = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut app = App::new(sockets.iter().map(|socket| Share::new(socket)).collect(), options.interval);
    let mut pollers = Pollers::new(sockets, directory);
    let mut screen = Screen::enter()?;
    let mut next = Instant::now();
    let (mut ticks, mut is_stale) = (0_u64, true);
    loop {
        if Instant::now() >= next {
            if options.count.is_some_and(|count| ticks > count) {
                return Ok(End::Wanted);
            }
            pollers.tick();
            next = Instant::now() + if ticks == 0 { FIRST.min(app.interval) } else { app.interval };
            ticks += 1;
        }
        while let Some(update) = pollers.try_next() {
            app.apply(update);
            is_stale = true;
        }
        if std::mem::take(&mut is_stale) {
            screen.terminal.draw(|frame| view::draw(frame, &app, is_coloured))?;
        }
        wait_for_input(next.saturating_duration_since(Instant::now()).min(PATIENCE))?;
        while event::poll(Duration::ZERO)? {
            is_stale = true;
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match app.key(key) {
                    Action::Quit => return Ok(End::Wanted),
                    Action::Restart => next = next.min(Instant::now() + app.interval),
                    Action::Suspend => screen = screen.suspend()?,
                    Action::Draw => {}
                },
                _ => {}
            }
        }
        let signal = signal.load(Ordering::Relaxed);
        if signal != 0 {
            return Ok(End::Signal(signal));
        }
    }
}
