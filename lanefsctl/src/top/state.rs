//! The state of the live view, and its keys.

use std::path::PathBuf;
use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::columns::{Sort, sorted};
use super::poller::Update;
use super::share::{Share, apply};
use crate::cli::parse_interval;

/// Intervals in seconds, through which + and - go.
const INTERVALS: [f64; 8] = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
/// Characters that an interval may have.
const MAX_TYPED: usize = 8;

/// The meaning of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Commands.
    Normal,
    /// Help is shown; any key ends it.
    Help,
    /// An interval is typed.
    Interval {
        /// What was typed so far.
        typed: String,
        /// The fault of what was typed before.
        fault: Option<String>,
    },
}

/// What the main loop does after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing more than drawing.
    Draw,
    /// The next interval begins now.
    Restart,
    /// Stops the process until it is continued.
    Suspend,
    /// Ends.
    Quit,
}

/// The live view.
#[derive(Debug)]
pub(crate) struct App {
    shares: Vec<Share>,
    /// The shares as they were when the view was frozen.
    frozen: Option<Vec<Share>>,
    /// The socket of the selected share.
    selected: Option<PathBuf>,
    /// The order of rows.
    pub(crate) sort: Sort,
    /// The time between samples.
    pub(crate) interval: Duration,
    /// The meaning of keys.
    pub(crate) mode: Mode,
}

impl App {
    /// A view of these shares, none of which has been sampled.
    pub(crate) fn new(shares: Vec<Share>, interval: Duration) -> App {
        App { shares, frozen: None, selected: None, sort: Sort::default(), interval, mode: Mode::Normal }
    }

    /// Takes over the outcome of a tick; a frozen view does not show it.
    pub(crate) fn apply(&mut self, update: Update) {
        apply(&mut self.shares, update);
    }

    /// True if the view is frozen.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    /// The shares to show, in order.
    pub(crate) fn shown(&self) -> Vec<&Share> {
        sorted(self.frozen.as_ref().unwrap_or(&self.shares), self.sort)
    }

    /// The index of the selected share among those that are shown.
    pub(crate) fn selected(&self) -> usize {
        let selected = self.selected.as_ref();
        self.shown().iter().position(|share| Some(&share.socket) == selected).unwrap_or(0)
    }

    /// The effect of a key.
    pub(crate) fn key(&mut self, key: KeyEvent) -> Action {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Action::Quit,
                KeyCode::Char('z') => Action::Suspend,
                _ => Action::Draw,
            };
        }
        match &mut self.mode {
            Mode::Normal => self.command(key.code),
            Mode::Help => {
                self.mode = Mode::Normal;
                Action::Draw
            }
            Mode::Interval { .. } => self.type_interval(key.code),
        }
    }

    fn command(&mut self, code: KeyCode) -> Action {
        match code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Up | KeyCode::Char('k') => self.select(|index| index.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(|index| index.saturating_add(1)),
            KeyCode::Home | KeyCode::Char('g') => self.select(|_| 0),
            KeyCode::End | KeyCode::Char('G') => self.select(|_| usize::MAX),
            KeyCode::Char('o' | 's') => self.sort = self.sort.next(),
            KeyCode::Char('h' | '?') | KeyCode::F(1) => self.mode = Mode::Help,
            KeyCode::Char('d') => self.mode = Mode::Interval { typed: String::new(), fault: None },
            KeyCode::Char('+' | '=') => return self.set_interval(self.neighbour(true)),
            KeyCode::Char('-') => return self.set_interval(self.neighbour(false)),
            KeyCode::Char(' ') => {
                self.frozen = if self.is_frozen() { None } else { Some(self.shares.clone()) };
            }
            _ => {}
        }
        Action::Draw
    }

    fn select(&mut self, to: impl Fn(usize) -> usize) {
        let index = {
            let last = self.shown().len().saturating_sub(1);
            to(self.selected()).min(last)
        };
        let socket = self.shown().get(index).map(|share| share.socket.clone());
        self.selected = socket;
    }

    fn set_interval(&mut self, interval: Duration) -> Action {
        self.interval = interval;
        Action::Restart
    }

    /// The next longer or shorter interval.
    fn neighbour(&self, longer: bool) -> Duration {
        let now = self.interval.as_secs_f64();
        let mut steps = INTERVALS.iter().copied();
        let next = if longer { steps.find(|step| *step > now) } else { steps.rev().find(|step| *step < now) };
        next.map_or(self.interval, Duration::from_secs_f64)
    }

    fn type_interval(&mut self, code: KeyCode) -> Action {
        let Mode::Interval { typed, fault } = &mut self.mode else { return Action::Draw };
        match code {
            KeyCode::Char(char) if (char.is_ascii_digit() || char == '.') && typed.len() < MAX_TYPED => {
                typed.push(char);
            }
            KeyCode::Backspace => {
                typed.pop();
            }
            KeyCode::Esc => self.mode = Mode::Normal,
            KeyCode::Enter if typed.is_empty() => self.mode = Mode::Normal,
            KeyCode::Enter => match parse_interval(typed) {
                Ok(interval) => {
                    self.mode = Mode::Normal;
                    return self.set_interval(interval);
                }
                Err(reason) => {
                    typed.clear();
                    *fault = Some(reason);
                }
            },
            _ => {}
        }
        Action::Draw
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Error;
    use crate::protocol::{OpCounters, Sample};

    fn app() -> App {
        let shares = ["/run/a.ctl", "/run/b.ctl"].map(|path| Share::new(Path::new(path)));
        App::new(shares.into(), Duration::from_secs(2))
    }

    fn press(app: &mut App, keys: &str) -> Action {
        let event = |char| KeyEvent::new(KeyCode::Char(char), KeyModifiers::NONE);
        keys.chars().map(|char| app.key(event(char))).last().unwrap()
    }

    fn sampled(app: &mut App, socket: &str, time: f64, count: u64) {
        let ops = [("read".to_owned(), OpCounters { count, ..OpCounters::default() })].into();
        let sample = Sample { share: "x".to_owned(), time_seconds: time, ops, ..Sample::default() };
        app.apply(Update { socket: socket.into(), sample: Ok(sample) });
    }

    fn sockets(app: &App) -> Vec<&str> {
        app.shown().iter().map(|share| share.socket.to_str().unwrap()).collect()
    }

    #[test]
    fn the_selected_share_stays_selected_when_rows_move() {
        let mut app = app();
        assert_eq!(app.selected(), 0);
        press(&mut app, "jjj");
        assert_eq!(app.selected(), 1);
        for (time, count) in [(1.0, 0), (2.0, 100)] {
            sampled(&mut app, "/run/b.ctl", time, count);
        }
        assert_eq!((app.selected(), sockets(&app)), (0, vec!["/run/b.ctl", "/run/a.ctl"]));
        press(&mut app, "k");
        assert_eq!(app.selected(), 0);
    }

    #[test]
    fn a_frozen_view_shows_what_it_showed() {
        let mut app = app();
        press(&mut app, " ");
        sampled(&mut app, "/run/c.ctl", 1.0, 0);
        assert_eq!((app.is_frozen(), app.shown().len()), (true, 2));
        press(&mut app, " ");
        assert_eq!((app.is_frozen(), app.shown().len()), (false, 3));
    }

    #[test]
    fn a_share_that_is_gone_comes_back_without_rates_of_the_gap() {
        let mut app = app();
        sampled(&mut app, "/run/a.ctl", 1.0, 10);
        sampled(&mut app, "/run/a.ctl", 2.0, 20);
        let error = Error::Closed { socket: "/run/a.ctl".into() };
        app.apply(Update { socket: "/run/a.ctl".into(), sample: Err(error) });
        let share = |app: &App| app.shown().into_iter().find(|share| share.name == "x").unwrap().clone();
        assert!(share(&app).gone.is_some() && share(&app).rates.is_none());
        sampled(&mut app, "/run/a.ctl", 9.0, 30);
        assert!(share(&app).gone.is_none() && share(&app).rates.is_none());
        sampled(&mut app, "/run/a.ctl", 10.0, 40);
        assert_eq!(share(&app).rates.unwrap().total.per_second, 10.0);
        assert_eq!(share(&app).history.iter().map(|point| point.ops).collect::<Vec<_>>(), [10.0, 0.0, 10.0]);
    }

    #[test]
    fn the_interval_is_typed_or_changed_by_steps() {
        let mut app = app();
        let enter = KeyEvent::new(KeyCode::Enter, KeyModifiers::NONE);
        assert_eq!((press(&mut app, "+"), app.interval), (Action::Restart, Duration::from_secs(5)));
        press(&mut app, "------------");
        assert_eq!(app.interval, Duration::from_millis(250));
        press(&mut app, "d1.x5");
        assert_eq!((app.key(enter), app.interval), (Action::Restart, Duration::from_millis(1500)));
        press(&mut app, "d0");
        app.key(enter);
        assert!(matches!(&app.mode, Mode::Interval { typed, fault: Some(_) } if typed.is_empty()));
        app.key(enter);
        assert_eq!((&app.mode, app.interval), (&Mode::Normal, Duration::from_millis(1500)));
    }

    #[test]
    fn help_and_the_end() {
        let mut app = app();
        press(&mut app, "h");
        assert_eq!(app.mode, Mode::Help);
        assert_eq!((press(&mut app, "q"), &app.mode), (Action::Draw, &Mode::Normal));
        press(&mut app, "s");
        assert_eq!(app.sort, Sort::Time);
        assert_eq!(press(&mut app, "q"), Action::Quit);
        let control = |char| KeyEvent::new(KeyCode::Char(char), KeyModifiers::CONTROL);
        assert_eq!([app.key(control('c')), app.key(control('z'))], [Action::Quit, Action::Suspend]);
    }
}
