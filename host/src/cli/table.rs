//! Plain tables: columns as wide as their cells, colour only if asked, nothing that a terminal would obey.

use std::io::IsTerminal;

/// Whether standard output takes colour: a terminal, unless `NO_COLOR` is set.
pub fn colour() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !unwanted
}

/// Emphasis of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    Plain,
    Good,
    Warn,
    Bad,
    Bold,
}

impl Ink {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Good => "\x1b[32m",
            Self::Warn => "\x1b[33m",
            Self::Bad => "\x1b[31m",
            Self::Bold => "\x1b[1m",
        }
    }

    /// `text` in this ink, if `colour`.
    pub fn paint(self, text: &str, colour: bool) -> String {
        if colour && self != Self::Plain { format!("{}{text}\x1b[0m", self.code()) } else { text.to_owned() }
    }
}

/// A cell.
#[derive(Debug, Clone)]
pub struct Cell {
    text: String,
    ink: Ink,
    right: bool,
}

impl Cell {
    /// Text, to the left; control characters are escaped.
    pub fn text(text: impl AsRef<str>) -> Self {
        Self { text: plain(text.as_ref()), ink: Ink::Plain, right: false }
    }

    /// A number, to the right.
    pub fn number(text: impl std::fmt::Display) -> Self {
        Self { text: text.to_string(), ink: Ink::Plain, right: true }
    }

    /// In another ink.
    pub fn ink(self, ink: Ink) -> Self {
        Self { ink, ..self }
    }
}

/// Rows below a head.
#[derive(Debug)]
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines, each after `indent`.
    pub fn render(&self, indent: &str, colour: bool) -> String {
        let width = |column: usize| {
            let cells =
                self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.chars().count());
            cells.chain(self.head.get(column).map(|head| head.len())).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.head.len()).map(width).collect();
        // A head stands over its column as the cells do.
        let right =
            |column: usize| self.rows.first().and_then(|row| row.get(column)).is_some_and(|cell| cell.right);
        let head = self.head.iter().enumerate();
        let head: Vec<_> = head
            .map(|(column, text)| Cell { text: (*text).into(), ink: Ink::Bold, right: right(column) })
            .collect();
        let mut out = String::new();
        for row in std::iter::once(&head).chain(&self.rows) {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                let blank = " ".repeat(width - cell.text.chars().count());
                let text = cell.ink.paint(&cell.text, colour);
                match (cell.right, column + 1 == widths.len()) {
                    (true, _) => format!("{blank}{text}"),
                    (false, true) => text,
                    (false, false) => format!("{text}{blank}"),
                }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            out.push_str(&format!("{indent}{}\n", line.trim_end()));
        }
        out
    }
}

/// `text` with control characters escaped: what a guest or a path says cannot move the cursor.
pub fn plain(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().flat_map(|c| if hidden(c) { c.escape_default().collect() } else { vec![c] }).collect()
}

/// A count in at most five characters: 999, 1.23k, 45.6M.
pub fn short(count: f64) -> String {
    const UNITS: [&str; 6] = ["", "k", "M", "G", "T", "P"];
    let (mut value, mut unit) = (count.max(0.0), 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 && value.fract() == 0.0 => 0,
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{}", UNITS[unit])
}

/// A counter in the same form.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn short_count(count: u64) -> String {
    short(count as f64)
}

/// Thousandths as a percentage.
pub fn percent(permille: u32) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_three_digits_with_a_unit() {
        let shown: Vec<_> =
            [0, 7, 999, 1000, 1234, 45_600, 999_499, 999_999, 123_456_789].map(short_count).into();
        assert_eq!(shown, ["0", "7", "999", "1.00k", "1.23k", "45.6k", "999k", "1.00M", "123M"]);
        assert_eq!(short(0.5), "0.50");
    }

    #[test]
    fn columns_line_up_and_control_characters_are_escaped() {
        let mut table = Table::new(&["PORT", "IN"]);
        table.row([Cell::text("red\x1b[2J"), Cell::number(5)]);
        table.row([Cell::text("b"), Cell::number(1234)]);
        assert_eq!(
            table.render("  ", false),
            "  PORT            IN\n  red\\u{1b}[2J     5\n  b             1234\n"
        );
    }

    #[test]
    fn colour_does_not_change_the_width() {
        let mut table = Table::new(&["A", "B"]);
        table.row([Cell::text("x").ink(Ink::Bad), Cell::text("y")]);
        assert_eq!(table.render("", true), "\x1b[1mA\x1b[0m  \x1b[1mB\x1b[0m\n\x1b[31mx\x1b[0m  y\n");
    }
}
