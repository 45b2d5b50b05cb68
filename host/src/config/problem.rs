//! What is wrong with a configuration: all of it at once, each with its place.

use std::cell::RefCell;
use std::fmt;

use serde::Serialize;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Line of the file, from 1; none for a request to the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// Dotted path of the key, such as `switch.lab.port.red.mtu`; empty if the text as a whole is meant.
    pub key: String,
    /// What was found and what was expected.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => f.write_str(&self.message),
            key => write!(f, "{key}: {}", self.message),
        }
    }
}

/// A configuration that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file; none for a request to the API.
    pub file: Option<String>,
    /// Everything that is wrong, in the order of the lines; never empty.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            match (&self.file, problem.line) {
                (Some(file), Some(line)) => write!(f, "{file}:{line}: {problem}")?,
                (Some(file), None) => write!(f, "{file}: {problem}")?,
                (None, _) => write!(f, "{problem}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Collects problems while a tree is read.
#[derive(Debug, Default)]
pub(crate) struct Problems(RefCell<Vec<Problem>>);

impl Problems {
    pub fn add(&self, line: Option<usize>, key: impl Into<String>, message: impl Into<String>) {
        self.0.borrow_mut().push(Problem { line, key: key.into(), message: message.into() });
    }

    /// `value`, if nothing was wrong with it.
    pub fn finish<T>(self, file: Option<&str>, value: Option<T>) -> Result<T, ConfigError> {
        let mut problems = self.0.into_inner();
        match value {
            Some(value) if problems.is_empty() => Ok(value),
            _ => {
                problems.sort_by_key(|problem| problem.line);
                Err(ConfigError { file: file.map(str::to_owned), problems })
            }
        }
    }
}

/// ` (did you mean `…`?)` if one of `known` is nearly `found`.
pub(crate) fn suggestion<'k>(found: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    // Nobody misspells a word by more than a third of its letters.
    let limit = (found.chars().count() / 3).clamp(1, 3);
    let near = known.into_iter().map(|word| (distance(found, word), word)).min();
    match near {
        Some((away, word)) if away <= limit => format!(" (did you mean `{word}`?)"),
        _ => String::new(),
    }
}

/// Edits from one word to the other: insert, delete, replace, or swap neighbours (optimal string alignment).
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().take(64).collect(), to.chars().collect());
    let mut rows = vec![(0..=to.len()).collect::<Vec<usize>>()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_word_finds_its_neighbour_and_nothing_else() {
        let known = ["mtu", "mac", "vhost-user"];
        assert_eq!(suggestion("mut", known), " (did you mean `mtu`?)");
        assert_eq!(suggestion("vhostuser", known), " (did you mean `vhost-user`?)");
        assert_eq!(suggestion("colour", known), "");
        assert_eq!(suggestion("", known), "");
    }
}
