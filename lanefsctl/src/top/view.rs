//! Drawing of the live view.
//!
//! From above: a line with the state of the view, a row for each share, the operations of the selected share, graphs of
//! its history, and a line with keys. On a wide terminal, the graphs stand beside the operations.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Clear, Paragraph, RenderDirection, Sparkline, Wrap};

use super::columns::{Column, OPS, SHARES, fit, op_cells, padded, row, share_row, sorted_ops};
use super::share::{Point, Share};
use super::state::{App, Mode};
use crate::table::width;
use crate::units::{bytes, duration, percent, short};

/// From this width on, graphs stand beside the operations.
const WIDE: u16 = 120;
/// The width of the operations beside graphs.
const OPS_WIDTH: u16 = 76;
/// Lines of the graphs below the operations, with their title, from this height of the terminal on.
const GRAPHS: [(u16, u16); 3] = [(40, 9), (22, 4), (16, 3)];
/// Columns for the selection.
const MARK: usize = 2;

const HELP: &[(&str, &str)] = &[
    ("q, Ctrl-C", "quit"),
    ("↑ ↓, k j", "select a share"),
    ("Home End, g G", "the first, the last share"),
    ("o, s", "sort by the next column"),
    ("d", "type the interval in seconds"),
    ("+ -", "a longer, a shorter interval"),
    ("space", "freeze and thaw the view"),
    ("Ctrl-Z", "suspend"),
    ("h, ?", "this help"),
    ("", ""),
    ("FLIGHT", "requests taken and not answered"),
    ("WRITERS", "the most at once of one file"),
    ("DEATHS", "worker processes that died"),
    ("BUSY", "requests at once, in the mean"),
    ("LIMITED", "waiting for limits, per second"),
    ("TIME", "part of the time of all requests"),
];

/// Draws the view.
pub(crate) fn draw(frame: &mut Frame, app: &App, is_coloured: bool) {
    let shares = app.shown();
    let area = frame.area();
    let is_wide = area.width >= WIDE;
    let graphs = if is_wide { 0 } else { graph_height(area.height) };
    let rows = u16::try_from(shares.len()).unwrap_or(u16::MAX);
    let most = (area.height / 3).max(2);
    let [top, list, bottom, history, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rows.min(most).saturating_add(1)),
        Constraint::Fill(1),
        Constraint::Length(graphs),
        Constraint::Length(1),
    ])
    .areas(area);
    let theme = Theme { is_coloured };
    frame.render_widget(title(app, &shares, usize::from(top.width)), top);
    draw_shares(frame, list, app, &shares, theme);
    if let Some(share) = shares.get(app.selected()) {
        if is_wide {
            let [left, _, right] = Layout::horizontal([
                Constraint::Length(OPS_WIDTH),
                Constraint::Length(2),
                Constraint::Fill(1),
            ])
            .areas(bottom);
            draw_ops(frame, left, app, share, theme);
            draw_graphs(frame, Layout::vertical([Constraint::Fill(1); 3]).areas(right), share, theme);
        } else {
            draw_ops(frame, bottom, app, share, theme);
            let [ops, _, read, _, written] = Layout::horizontal([
                Constraint::Fill(1),
                Constraint::Length(2),
                Constraint::Fill(1),
                Constraint::Length(2),
                Constraint::Fill(1),
            ])
            .areas(history);
            draw_graphs(frame, [ops, read, written], share, theme);
        }
    }
    frame.render_widget(footer(app, usize::from(keys.width)), keys);
    if app.mode == Mode::Help {
        draw_help(frame, area);
    }
}

/// Colours, unless NO_COLOR is set; everything can be read without them.
#[derive(Clone, Copy, Debug)]
struct Theme {
    is_coloured: bool,
}

impl Theme {
    fn colour(self, colour: Color) -> Style {
        if self.is_coloured { Style::new().fg(colour) } else { Style::new() }
    }
}

fn graph_height(height: u16) -> u16 {
    GRAPHS.iter().find(|(least, _)| height >= *least).map_or(0, |(_, lines)| *lines)
}

/// Texts at both ends of a line; the right one is left out where they do not fit.
fn both_ends<'a>(left: Vec<Span<'a>>, right: Vec<Span<'a>>, room: usize) -> Line<'a> {
    let widths = |spans: &[Span]| spans.iter().map(Span::width).sum::<usize>();
    let space = room.saturating_sub(widths(&left) + widths(&right));
    if space == 0 {
        return Line::from(left);
    }
    let spaces = Span::raw(" ".repeat(space));
    Line::from_iter(left.into_iter().chain([spaces]).chain(right))
}

fn title<'a>(app: &App, shares: &[&Share], room: usize) -> Line<'a> {
    let gone = shares.iter().filter(|share| share.gone.is_some()).count();
    let mut text = format!("  {} share{}", shares.len(), if shares.len() == 1 { "" } else { "s" });
    if gone > 0 {
        text.push_str(&format!(", {gone} gone"));
    }
    let left = vec![Span::styled("lanefsctl top", Modifier::BOLD), Span::raw(text)];
    let mut right = Vec::new();
    if app.is_frozen() {
        right.push(Span::styled(" FROZEN ", Modifier::REVERSED));
    }
    let interval = duration(app.interval.as_secs_f64());
    right.push(Span::raw(format!("  every {interval}, sorted by {}", app.sort.label())));
    both_ends(left, right, room)
}

/// Headings in reverse, that of the order in bold and with an arrow if there is room for it.
fn header<'a>(columns: &[Column], app: &App, room: usize, mark: usize) -> Line<'a> {
    let mut spans = vec![Span::raw(" ".repeat(mark))];
    let mut used = mark;
    for (index, column) in columns.iter().enumerate() {
        let is_order = column.sort == Some(app.sort);
        let heading = match column.heading {
            heading if is_order && width(heading) < column.width => format!("{heading}▾"),
            heading => heading.to_owned(),
        };
        let text = padded(&heading, column, index == 0);
        used += width(&text);
        spans.push(if is_order { Span::styled(text, Modifier::BOLD) } else { Span::raw(text) });
    }
    spans.push(Span::raw(" ".repeat(room.saturating_sub(used))));
    Line::from(spans).style(Modifier::REVERSED)
}

fn draw_shares(frame: &mut Frame, area: Rect, app: &App, shares: &[&Share], theme: Theme) {
    let room = usize::from(area.width);
    let columns = fit(&SHARES, room.saturating_sub(MARK));
    let mut lines = vec![header(&columns, app, room, MARK)];
    let selected = app.selected();
    let visible = usize::from(area.height.saturating_sub(1)).max(1);
    // The selected row is always in the list.
    let first = (selected + 1).saturating_sub(visible);
    for (index, share) in shares.iter().enumerate().skip(first).take(visible) {
        let mark = if index == selected { "▸ " } else { "  " };
        let text = format!("{mark}{}", share_row(share, &columns, room.saturating_sub(MARK)));
        let style = if share.gone.is_some() { theme.colour(Color::Red) } else { Style::new() };
        let style = if index == selected { style.add_modifier(Modifier::BOLD) } else { style };
        lines.push(Line::styled(text, style));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn ruled<'a>(title: String) -> Block<'a> {
    Block::new().borders(Borders::TOP).title(Line::styled(title, Modifier::BOLD))
}

/// The line above the operations: the share, its queues and its limits.
fn about(share: &Share) -> String {
    let mut text = format!(" {} ", share.name);
    if let Some(sample) = &share.sample {
        let depths: Vec<_> =
            sample.queues.iter().map(|queue| format!("{}:{}", queue.index, queue.in_flight)).collect();
        if !depths.is_empty() {
            text.push_str(&format!("─ in flight by queue {} ", depths.join(" ")));
        }
    }
    let throttled = share.rates.as_ref().map_or(0.0, |rates| rates.throttled);
    if throttled > 0.0 {
        text.push_str(&format!("─ waiting for limits {} ", percent(throttled)));
    }
    text
}

fn draw_ops(frame: &mut Frame, area: Rect, app: &App, share: &Share, theme: Theme) {
    let block = ruled(about(share));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    if let Some(reason) = &share.gone {
        let text = format!("gone: {reason}\n\nIt is asked again at each update.");
        frame.render_widget(
            Paragraph::new(text).style(theme.colour(Color::Red)).wrap(Wrap { trim: true }),
            inner,
        );
        return;
    }
    let ops = sorted_ops(share, app.sort);
    if share.rates.is_none() || ops.is_empty() {
        let text = if share.rates.is_none() { "waiting for the second sample" } else { "no requests so far" };
        frame.render_widget(Paragraph::new(text), inner);
        return;
    }
    let room = usize::from(inner.width);
    let columns = fit(&OPS, room);
    let mut lines = vec![header(&columns, app, room, 0)];
    let visible = usize::from(inner.height.saturating_sub(1));
    let hidden = if ops.len() > visible { ops.len().saturating_sub(visible.saturating_sub(1)) } else { 0 };
    for op in ops.iter().take(if hidden > 0 { visible.saturating_sub(1) } else { visible }) {
        let style = match () {
            () if op.errors > 0.0 => theme.colour(Color::Yellow),
            () if op.per_second == 0.0 => Style::new().add_modifier(Modifier::DIM),
            () => Style::new(),
        };
        lines.push(Line::styled(row(&op_cells(op), &columns), style));
    }
    if hidden > 0 {
        lines.push(Line::styled(format!("and {hidden} more"), Modifier::DIM));
    }
    frame.render_widget(Paragraph::new(lines), inner);
}

/// Requests, bytes read and bytes written.
fn draw_graphs(frame: &mut Frame, areas: [Rect; 3], share: &Share, theme: Theme) {
    let [ops, read, written] = areas;
    let point = |point: &Point| point.ops;
    draw_graph(frame, ops, share, ("op/s", short, point), theme.colour(Color::Cyan));
    draw_graph(frame, read, share, ("read/s", bytes, |point| point.read), theme.colour(Color::Green));
    draw_graph(
        frame,
        written,
        share,
        ("written/s", bytes, |point| point.written),
        theme.colour(Color::Magenta),
    );
}

/// A name, the text of a figure, and the figure of a point.
type Graph = (&'static str, fn(f64) -> String, fn(&Point) -> f64);

fn draw_graph(frame: &mut Frame, area: Rect, share: &Share, (name, text, figure): Graph, style: Style) {
    if area.height < 2 {
        return;
    }
    let columns = usize::from(area.width);
    // The newest point is at the right.
    let points: Vec<f64> = share.history.iter().rev().take(columns).map(figure).collect();
    let most = points.iter().copied().fold(0.0, f64::max);
    let title = format!(" {name} ─ peak {} ", text(most));
    let block = ruled(title);
    let graph = Sparkline::default()
        .block(block)
        .data(points.iter().map(|value| height(*value, most)).collect::<Vec<u64>>())
        .max(STEPS)
        .direction(RenderDirection::RightToLeft)
        .style(style);
    frame.render_widget(graph, area);
}

/// Steps of a graph's height, more than a terminal shows.
const STEPS: u64 = 10_000;

/// A figure as steps of the highest one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is between 0 and STEPS"
)]
#[expect(clippy::cast_precision_loss, reason = "STEPS is small")]
fn height(value: f64, most: f64) -> u64 {
    if most > 0.0 { (value / most * STEPS as f64) as u64 } else { 0 }
}

fn footer<'a>(app: &App, room: usize) -> Line<'a> {
    if let Mode::Interval { typed, fault } = &app.mode {
        let fault = fault.as_ref().map_or_else(String::new, |fault| format!("{fault}. "));
        return Line::from(format!("{fault}Seconds between updates: {typed}█  (Enter, Esc)"));
    }
    let keys = [
        ("q", "quit"),
        ("↑↓", "share"),
        ("s", "sort"),
        ("+-", "interval"),
        ("space", "freeze"),
        ("h", "help"),
    ];
    let mut spans = Vec::new();
    let mut used = 0;
    for (key, meaning) in keys {
        used += width(key) + width(meaning) + 3;
        if used <= room + 2 {
            spans.push(Span::styled(key, Modifier::BOLD));
            spans.push(Span::raw(format!(" {meaning}  ")));
        }
    }
    Line::from(spans)
}

fn draw_help(frame: &mut Frame, area: Rect) {
    let lines: Vec<Line> = HELP
        .iter()
        .map(|(key, meaning)| {
            Line::from(vec![Span::styled(format!(" {key:<15}"), Modifier::BOLD), Span::raw(*meaning)])
        })
        .collect();
    let (wide, high) = (52, u16::try_from(lines.len()).unwrap_or(u16::MAX).saturating_add(2));
    let (width, height) = (area.width.min(wide), area.height.min(high));
    let (x, y) = ((area.width - width) / 2, (area.height - height) / 2);
    let popup = Rect::new(x, y, width, height);
    let block = Block::bordered().title(" help ─ any key closes it ");
    frame.render_widget(Clear, popup);
    frame.render_widget(Paragraph::new(lines).block(block), popup);
}
