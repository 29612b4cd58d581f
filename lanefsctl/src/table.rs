//! Aligned tables of plain text.

use std::fmt;

use ratatui::text::Line;

/// Spaces between columns.
const GAP: usize = 2;

/// The side on which a column is flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Figures.
    Right,
}

/// A table with a heading.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
    indent: usize,
}

impl Table {
    /// An empty table with these columns.
    pub(crate) fn new(columns: &[(&str, Align)]) -> Table {
        let columns = columns.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect();
        Table { columns, rows: Vec::new(), indent: 0 }
    }

    /// With spaces before each line.
    pub(crate) fn indented(mut self, indent: usize) -> Table {
        self.indent = indent;
        self
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

/// Columns that a text takes on a terminal.
pub(crate) fn width(text: &str) -> usize {
    Line::raw(text).width()
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heading: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&heading).chain(&self.rows).collect();
        let widest = |column: usize| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(widest).collect();
        for line in lines {
            let mut text = " ".repeat(self.indent);
            for (index, ((cell, (_, align)), most)) in line.iter().zip(&self.columns).zip(&widths).enumerate()
            {
                let space = " ".repeat(most.saturating_sub(width(cell)));
                if index > 0 {
                    text.push_str(&" ".repeat(GAP));
                }
                let (before, after) =
                    if *align == Align::Right { (space.as_str(), "") } else { ("", space.as_str()) };
                text.extend([before, cell, after]);
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_what_a_terminal_shows() {
        let mut table =
            Table::new(&[("OP", Align::Left), ("TIME", Align::Right), ("X", Align::Left)]).indented(1);
        table.row(["write".into(), "12 µs".into(), "漢".into()]);
        table.row(["rm".into(), "1 s".into(), String::new()]);
        assert_eq!(table.to_string(), " OP      TIME  X\n write  12 µs  漢\n rm       1 s\n");
    }
}
