//! The view as a terminal shows it.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::fixture;
use super::share::Share;
use super::state::App;
use super::view::draw;

fn app(shares: Vec<Share>) -> App {
    App::new(shares, Duration::from_secs(2))
}

fn press(app: &mut App, keys: &str) {
    for char in keys.chars() {
        app.key(KeyEvent::new(KeyCode::Char(char), KeyModifiers::NONE));
    }
}

/// The lines of the screen.
fn screen(app: &App, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app, true)).unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(line).map(|line| line.trim_end().to_owned()).collect()
}

/// The first line with this text.
fn find<'a>(lines: &'a [String], text: &str) -> &'a str {
    lines
        .iter()
        .find(|line| line.contains(text))
        .unwrap_or_else(|| panic!("no {text:?} in\n{}", lines.join("\n")))
}

#[test]
fn a_terminal_of_80_by_24_shows_everything() {
    let lines = screen(&app(fixture::shares()), 80, 24);
    println!("{}", lines.join("\n"));
    assert!(
        lines[0].starts_with("lanefsctl top  3 shares, 1 gone")
            && lines[0].ends_with("every 2 s, sorted by op/s")
    );
    assert!(lines[1].starts_with("  SHARE") && lines[1].ends_with("DEATHS"), "{}", lines[1]);
    assert!(lines[2].starts_with("▸ web"), "{}", lines[2]);
    for figure in ["13.5k", "203 MB", "537 MB", "37", "16"] {
        assert!(lines[2].contains(figure), "{figure} in {}", lines[2]);
    }
    assert!(find(&lines, "idle").contains("0 B"));
    assert!(find(&lines, "database").contains("gone: no answer from /run/lanefsd/database.ctl"));
    assert!(find(&lines, " web ─").contains("in flight by queue 1:21 2:16 ─ waiting for limits 5.0 %"));
    let write = find(&lines, "write  ");
    assert!(["8.20k", "102 µs", "µs"].iter().all(|figure| write.contains(figure)), "{write}");
    find(&lines, " more");
    find(&lines, " op/s ─ peak 13.5k ─");
    find(&lines, " written/s ─ peak 537 MB");
    assert!(lines.iter().any(|line| line.contains('█')), "a graph");
    assert!(lines[23].starts_with("q quit"), "{}", lines[23]);
}

#[test]
fn a_terminal_of_200_by_50_has_graphs_beside_the_operations() {
    let lines = screen(&app(fixture::shares()), 200, 50);
    println!("{}", lines.join("\n"));
    assert!(lines[1].ends_with("LIMITED"), "{}", lines[1]);
    assert!(find(&lines, "OPERATION").len() > 60);
    let rule = find(&lines, " web ─");
    assert!(rule.contains(" op/s ─ peak"), "{rule}");
    find(&lines, "statfs");
    assert!(!lines.iter().any(|line| line.starts_with("and ")));
}

#[test]
fn a_share_that_is_gone_has_the_whole_reason() {
    let mut app = app(fixture::shares());
    press(&mut app, "G");
    let lines = screen(&app, 80, 24);
    find(&lines, "▸ database");
    let all = lines.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(all.contains("within 5 s: the daemon is stopped or overloaded"), "{all}");
    assert!(all.contains("It is asked again at each update."), "{all}");
}

#[test]
fn help_the_interval_and_a_frozen_view_are_shown() {
    let mut app = app(fixture::shares());
    press(&mut app, " h");
    let lines = screen(&app, 80, 24);
    assert!(lines[0].contains(" FROZEN "), "{}", lines[0]);
    assert!(find(&lines, "space  ").contains("freeze and thaw"));
    press(&mut app, "xd1.5");
    let lines = screen(&app, 80, 24);
    assert!(lines[23].starts_with("Seconds between updates: 1.5█"), "{}", lines[23]);
}

#[test]
fn the_selected_share_is_in_the_list_however_many_there_are() {
    let path = |number| format!("/run/lanefsd/share-{number:02}.ctl");
    let shares: Vec<_> = (0..40).map(|number| Share::new(path(number).as_ref())).collect();
    let mut app = app(shares);
    press(&mut app, &"j".repeat(30));
    find(&screen(&app, 80, 24), "▸ share-30");
}

#[test]
fn no_size_of_a_terminal_is_an_error() {
    let mut app = app(fixture::shares());
    for mode in ["", "h", "xd"] {
        press(&mut app, mode);
        for (width, height) in [(1, 1), (3, 2), (20, 5), (79, 7), (119, 16), (120, 10), (500, 200)] {
            screen(&app, width, height);
        }
    }
    screen(&self::app(Vec::new()), 80, 24);
}
