//! Tables of the live view and of the batch mode: columns, cells, and the order of rows.
//!
//! Columns have a fixed width, so that figures stay in their place from one update to the next. The first column is
//! flush left and takes the space that is left; columns that do not fit are left out from the right.

use std::cmp::Ordering;

use super::share::Share;
use crate::rates::{OpRates, Quantile};
use crate::table::width;
use crate::units::{bytes, count, percent, seconds, short};

/// Spaces between columns.
const GAP: usize = 2;
/// Columns of the terminal that the first column has at least.
const NAME: usize = 8;
/// And at most.
const MAX_NAME: usize = 40;

/// The order of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Most requests a second.
    #[default]
    Rate,
    /// Most time.
    Time,
    /// Highest mean latency.
    Mean,
    /// Highest 99th percentile.
    P99,
    /// Most errors a second.
    Errors,
    /// By name.
    Name,
}

impl Sort {
    /// The next order of the cycle.
    pub(crate) fn next(self) -> Sort {
        match self {
            Sort::Rate => Sort::Time,
            Sort::Time => Sort::Mean,
            Sort::Mean => Sort::P99,
            Sort::P99 => Sort::Errors,
            Sort::Errors => Sort::Name,
            Sort::Name => Sort::Rate,
        }
    }

    /// Its name.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Sort::Rate => "op/s",
            Sort::Time => "time",
            Sort::Mean => "mean",
            Sort::P99 => "p99",
            Sort::Errors => "errors",
            Sort::Name => "name",
        }
    }

    /// The figure that counts; none sorts last.
    fn figure(self, rates: Option<&OpRates>) -> f64 {
        let figure = rates.and_then(|rates| match self {
            Sort::Rate => Some(rates.per_second),
            Sort::Time => Some(rates.time),
            Sort::Mean => rates.mean,
            Sort::P99 => rates.p99.map(|quantile| quantile.seconds),
            Sort::Errors => Some(rates.errors),
            Sort::Name => None,
        });
        figure.unwrap_or(-1.0)
    }

    fn order(self, a: (&str, Option<&OpRates>), b: (&str, Option<&OpRates>)) -> Ordering {
        self.figure(b.1).total_cmp(&self.figure(a.1)).then_with(|| a.0.cmp(b.0))
    }
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// Its heading.
    pub(crate) heading: &'static str,
    /// Its width; that of the first one is found by [`fit`].
    pub(crate) width: usize,
    /// The order that it shows.
    pub(crate) sort: Option<Sort>,
}

const fn column(heading: &'static str, width: usize, sort: Option<Sort>) -> Column {
    Column { heading, width, sort }
}

/// Columns of shares, the most important first.
pub(crate) const SHARES: [Column; 12] = [
    column("SHARE", NAME, Some(Sort::Name)),
    column("OP/s", 6, Some(Sort::Rate)),
    column("READ/s", 7, None),
    column("WRITE/s", 7, None),
    column("MEAN", 7, Some(Sort::Mean)),
    column("P99", 8, Some(Sort::P99)),
    column("FLIGHT", 6, None),
    column("WRITERS", 7, None),
    column("DEATHS", 6, None),
    column("ERR/s", 6, Some(Sort::Errors)),
    column("BUSY", 6, Some(Sort::Time)),
    column("LIMITED", 7, None),
];

/// Columns of operations.
pub(crate) const OPS: [Column; 7] = [
    column("OPERATION", NAME, Some(Sort::Name)),
    column("OP/s", 7, Some(Sort::Rate)),
    column("TIME", 6, Some(Sort::Time)),
    column("MEAN", 8, Some(Sort::Mean)),
    column("P50", 8, None),
    column("P99", 8, Some(Sort::P99)),
    column("ERR/s", 6, Some(Sort::Errors)),
];

/// The columns that fit, with the width of the first one.
pub(crate) fn fit(columns: &[Column], room: usize) -> Vec<Column> {
    let mut fitting = Vec::new();
    let mut used = 0;
    for column in columns {
        let more = column.width + if fitting.is_empty() { 0 } else { GAP };
        if !fitting.is_empty() && used + more > room {
            break;
        }
        used += more;
        fitting.push(*column);
    }
    if let Some(first) = fitting.first_mut() {
        first.width = (first.width + room.saturating_sub(used)).min(MAX_NAME);
    }
    fitting
}

/// Text that fits into a width, with an ellipsis if it is cut.
pub(crate) fn cut(text: &str, room: usize) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    let mut found = String::new();
    for char in text.chars() {
        found.push(char);
        if width(&found) >= room {
            found.pop();
            break;
        }
    }
    if room > 0 {
        found.push('…');
    }
    found
}

/// The cell of a column, filled up to its width, and to the gap after the column before.
pub(crate) fn padded(cell: &str, column: &Column, is_first: bool) -> String {
    let cell = cut(cell, column.width);
    let space = " ".repeat(column.width.saturating_sub(width(&cell)));
    if is_first { cell + &space } else { " ".repeat(GAP) + &space + &cell }
}

/// A row of text.
pub(crate) fn row(cells: &[String], columns: &[Column]) -> String {
    let cells = cells.iter().zip(columns).enumerate();
    cells.map(|(index, (cell, column))| padded(cell, column, index == 0)).collect()
}

/// The headings.
pub(crate) fn headings(columns: &[Column]) -> String {
    let cells: Vec<_> = columns.iter().map(|column| column.heading.to_owned()).collect();
    row(&cells, columns)
}

/// A figure that is not there.
fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn quantile(value: Option<Quantile>) -> String {
    or_dash(value.map(|value| {
        let more = if value.is_above { ">" } else { "" };
        format!("{more}{}", seconds(value.seconds))
    }))
}

/// The cells of a share, in the order of [`SHARES`].
pub(crate) fn share_cells(share: &Share) -> Vec<String> {
    let (rates, sample) = (share.rates.as_ref(), share.sample.as_ref());
    vec![
        share.name.clone(),
        or_dash(rates.map(|rates| short(rates.total.per_second))),
        or_dash(rates.map(|rates| bytes(rates.read))),
        or_dash(rates.map(|rates| bytes(rates.written))),
        or_dash(rates.and_then(|rates| rates.total.mean).map(seconds)),
        quantile(rates.and_then(|rates| rates.total.p99)),
        or_dash(sample.map(|sample| count(sample.in_flight))),
        or_dash(sample.map(|sample| count(sample.most_writers))),
        or_dash(sample.map(|sample| count(sample.deaths))),
        or_dash(rates.map(|rates| short(rates.total.errors))),
        or_dash(rates.map(|rates| short(rates.total.time))),
        or_dash(rates.map(|rates| percent(rates.throttled))),
    ]
}

/// The row of a share; that of one that is gone has the reason in place of figures.
pub(crate) fn share_row(share: &Share, columns: &[Column], room: usize) -> String {
    let Some(reason) = &share.gone else { return row(&share_cells(share), columns) };
    let name = columns.first().map_or_else(String::new, |column| padded(&share.name, column, true));
    cut(&format!("{name}  gone: {reason}"), room)
}

/// The cells of an operation, in the order of [`OPS`].
pub(crate) fn op_cells(op: &OpRates) -> Vec<String> {
    vec![
        crate::units::printable(&op.name),
        short(op.per_second),
        percent(op.time),
        or_dash(op.mean.map(seconds)),
        quantile(op.p50),
        quantile(op.p99),
        short(op.errors),
    ]
}

/// Shares in order.
pub(crate) fn sorted(shares: &[Share], sort: Sort) -> Vec<&Share> {
    let mut sorted: Vec<&Share> = shares.iter().collect();
    let key = |share: &&Share| share.rates.as_ref().map(|rates| rates.total.clone());
    sorted.sort_by(|a, b| sort.order((&a.name, key(a).as_ref()), (&b.name, key(b).as_ref())));
    sorted
}

/// Operations of a share in order.
pub(crate) fn sorted_ops(share: &Share, sort: Sort) -> Vec<&OpRates> {
    let mut sorted: Vec<&OpRates> = share.rates.iter().flat_map(|rates| &rates.ops).collect();
    sorted.sort_by(|a, b| sort.order((&a.name, Some(a)), (&b.name, Some(b))));
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_that_do_not_fit_are_left_out() {
        let headings = |room| {
            let columns = fit(&SHARES, room);
            let text = headings(&columns);
            assert!(width(&text) <= room.max(NAME), "{room}: {text:?}");
            (columns.len(), columns[0].width)
        };
        assert_eq!(headings(80), (9, 10));
        assert_eq!(headings(200), (12, 40));
        assert_eq!(headings(20), (2, 12));
        assert_eq!(headings(3), (1, 8));
        assert_eq!(fit(&OPS, 80).len(), 7);
    }

    #[test]
    fn text_is_cut_by_its_width() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdefg", 6), "abcde…");
        assert_eq!(cut("漢字漢字", 5), "漢字…");
        assert_eq!(cut("ab", 1), "…");
        assert_eq!(cut("ab", 0), "");
    }

    #[test]
    fn the_order_of_rows_cycles_and_names_decide_a_tie() {
        let mut sort = Sort::default();
        for _ in 0..6 {
            sort = sort.next();
        }
        assert_eq!(sort, Sort::Rate);
        let op = |name: &str, per_second, mean| OpRates {
            name: name.to_owned(),
            per_second,
            time: 0.0,
            mean,
            p50: None,
            p99: None,
            errors: 0.0,
        };
        let (a, b) = (op("a", 1.0, None), op("b", 2.0, Some(0.0)));
        let order = |sort: Sort| sort.order(("a", Some(&a)), ("b", Some(&b)));
        assert_eq!([order(Sort::Rate), order(Sort::Mean)], [Ordering::Greater; 2]);
        assert_eq!([order(Sort::Name), order(Sort::Errors)], [Ordering::Less; 2]);
    }
}
