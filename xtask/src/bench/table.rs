//! Figures in tables: medians, their spread, ratios to peers; as Markdown for people, as JSON for later.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::goal::Goal;
use super::machine;

/// What was measured of one peer, round by round.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Whose it is.
    pub peer: String,
    /// One sample a round.
    pub samples: Vec<f64>,
}

impl Series {
    /// Without samples yet.
    pub fn new(peer: impl Into<String>) -> Self {
        Self { peer: peer.into(), samples: Vec::new() }
    }

    /// "15.2 (14.9–15.4)": the median, the least and the most.
    fn cell(&self) -> String {
        let [low, high] = spread(&self.samples);
        let middle = short(median(&self.samples));
        if self.samples.len() > 1 { format!("{middle} ({}–{})", short(low), short(high)) } else { middle }
    }
}

/// Columns of peers, and what the ratio to each should be at least.
pub type Bounds = [(usize, f64)];

/// One line of a table. All lines of a table have the same peers, ours first.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// In which unit.
    pub unit: &'static str,
    /// Of each peer.
    pub series: Vec<Series>,
}

impl Row {
    /// A line about one thing only, without a peer to relate it to.
    pub fn alone(what: impl Into<String>, unit: &'static str, peer: &str, samples: Vec<f64>) -> Self {
        Self { what: what.into(), unit, series: vec![Series { peer: peer.to_owned(), samples }] }
    }

    /// Median of the first peer over the median of another.
    pub fn ratio(&self, to: usize) -> f64 {
        let of = |index: usize| self.series.get(index).map_or(f64::NAN, |series| median(&series.samples));
        of(0) / of(to)
    }

    fn markdown(&self) -> String {
        let mut line = format!("| {}, {} |", self.what, self.unit);
        for series in &self.series {
            let _ = write!(line, " {} |", series.cell());
        }
        for other in 1..self.series.len() {
            let _ = write!(line, " **{:.2}** |", self.ratio(other));
        }
        line
    }

    fn json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            json!({ "peer": series.peer, "median": median(&series.samples), "samples": series.samples })
        });
        json!({ "what": self.what, "unit": self.unit, "series": series.collect::<Vec<_>>() })
    }
}

/// Lines with the same peers under one title.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Title.
    pub title: String,
    /// Lines.
    pub rows: Vec<Row>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// What is wanted of the lines.
    goals: Vec<Goal>,
}

impl Table {
    /// Without lines yet.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), ..Self::default() }
    }

    /// Adds a line, and says below whether its ratios are as wanted.
    pub fn row(&mut self, row: Row, wanted: &Bounds) {
        for &(peer, bound) in wanted {
            let name = row.series.get(peer).map_or("nobody", |series| &series.peer);
            self.goal(&Goal::at_least(format!("{}, to {name}", row.what), row.ratio(peer), bound));
        }
        self.rows.push(row);
    }

    /// Says below the lines whether one is as wanted.
    pub fn goal(&mut self, goal: &Goal) {
        self.goals.push(goal.clone());
    }

    fn markdown(&self) -> String {
        let peers: Vec<_> =
            self.rows.first().into_iter().flat_map(|row| &row.series).map(|one| &*one.peer).collect();
        let mut text = format!("### {}\n\n| |", self.title);
        for peer in &peers {
            let _ = write!(text, " {peer} |");
        }
        for other in peers.iter().skip(1) {
            let _ = write!(text, " to {other} |");
        }
        text.push_str("\n|---|");
        text.push_str(&"---:|".repeat((2 * peers.len()).saturating_sub(1)));
        text.push('\n');
        for row in &self.rows {
            let _ = writeln!(text, "{}", row.markdown());
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        let goals: Vec<_> = self.goals.iter().map(|goal| format!("{goal}\n")).collect();
        if !goals.is_empty() {
            let _ = write!(text, "\n{}", goals.concat());
        }
        text
    }

    fn json(&self) -> Value {
        let rows: Vec<_> = self.rows.iter().map(Row::json).collect();
        let goals: Vec<_> = self.goals.iter().map(Goal::to_string).collect();
        json!({ "title": self.title, "rows": rows, "notes": self.notes, "goals": goals })
    }
}

/// All that one bench found out.
#[derive(Debug, Clone)]
pub struct Report {
    bench: String,
    how: String,
    machine: Value,
    /// Tables.
    pub tables: Vec<Table>,
    /// What could not be measured.
    pub failed: Option<String>,
}

impl Report {
    /// Of `bench`, measured as `how` says.
    pub fn new(bench: &str, how: String) -> Self {
        Self { bench: bench.to_owned(), how, machine: machine::describe(), tables: Vec::new(), failed: None }
    }

    /// All tables.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "\n## bench {}\n\nMedians (least–most) of {}, after a warm-up; peers took turns.\n\n",
            self.bench, self.how
        );
        for table in &self.tables {
            text.push_str(&table.markdown());
            text.push('\n');
        }
        text
    }

    /// Writes all samples as JSON; the folder is made if it is missing.
    pub fn save(&self, file: &Path) -> Result<()> {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let tables: Vec<_> = self.tables.iter().map(Table::json).collect();
        let json = json!({ "bench": self.bench, "how": self.how, "machine": self.machine, "tables": tables });
        Ok(std::fs::write(file, format!("{json:#}\n"))?)
    }
}

/// The middle sample, or the mean of the two in the middle; not a number if there is none.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match (sorted.get(half), sorted.len() % 2) {
        (None, _) => f64::NAN,
        (Some(&upper), 1) => upper,
        (Some(&upper), _) => (sorted[half - 1] + upper) / 2.0,
    }
}

/// The least and the most.
fn spread(samples: &[f64]) -> [f64; 2] {
    [
        samples.iter().copied().fold(f64::INFINITY, f64::min),
        samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    ]
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn table_relates_every_peer_to_the_first() {
        let series =
            |peer: &str, samples: &[f64]| Series { peer: peer.to_owned(), samples: samples.to_vec() };
        let row = Row {
            what: "64 B".to_owned(),
            unit: "Mpps",
            series: vec![series("yardd", &[15.0, 15.5, 14.0]), series("ovs", &[10.0, 9.0, 11.0])],
        };
        let mut table = Table { rows: vec![row], notes: vec!["n".to_owned()], ..Table::new("t") };
        table.goal(&Goal::at_least("64 B", 1.5, 2.0));
        assert_eq!(
            table.markdown(),
            "### t\n\n| | yardd | ovs | to ovs |\n|---|---:|---:|---:|\n\
             | 64 B, Mpps | 15.0 (14.0–15.5) | 10.0 (9.00–11.0) | **1.50** |\n\nn\n\n- 64 B: 1.50, wanted at least 2: **missed**\n"
        );
    }

    #[test]
    fn line_without_peers_has_no_ratio() {
        let row = Row::alone("memory", "KiB", "yardd", vec![120.0]);
        assert_eq!(row.markdown(), "| memory, KiB | 120 |");
        assert_eq!(row.json()["series"][0]["samples"], json!([120.0]));
    }

    #[test]
    fn digits_shrink_as_values_grow() {
        assert_eq!([0.1234, 1.234, 12.34, 123.4].map(short), ["0.123", "1.23", "12.3", "123"]);
    }
}
