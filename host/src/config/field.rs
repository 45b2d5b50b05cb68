//! Reading the tree: every getter either returns the value or has told [`Problems`] why not, so a reader goes on and
//! all mistakes are reported at once.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;

use vmq::Mac;

use super::node::{Node, Value, quoted};
use super::problem::{Problems, suggestion};

/// A value with its path.
#[derive(Debug, Clone)]
pub(crate) struct Field<'a> {
    pub path: String,
    pub node: &'a Node,
    pub problems: &'a Problems,
}

/// A table with its path.
#[derive(Debug, Clone)]
pub(crate) struct Section<'a> {
    pub path: String,
    pub line: Option<usize>,
    pub problems: &'a Problems,
    entries: &'a [(String, Node)],
}

impl<'a> Field<'a> {
    /// The whole document.
    pub fn root(node: &'a Node, problems: &'a Problems) -> Self {
        Self { path: String::new(), node, problems }
    }

    /// The value does not do.
    pub fn refuse<T>(&self, message: impl Into<String>) -> Option<T> {
        self.problems.add(self.node.line, self.path.as_str(), message);
        None
    }

    /// The value is of another kind.
    pub fn unexpected<T>(&self, expected: impl Display) -> Option<T> {
        self.refuse(format!("found {}, expected {expected}", self.node.found()))
    }

    pub fn boolean(&self) -> Option<bool> {
        match self.node.value {
            Value::Bool(value) => Some(value),
            _ => self.unexpected("true or false"),
        }
    }

    /// An integer of `range`.
    pub fn integer<T: TryFrom<i128>>(&self, range: RangeInclusive<i128>) -> Option<T> {
        let (low, high) = (range.start(), range.end());
        match self.node.value {
            Value::Integer(value) if range.contains(&value) => T::try_from(value).ok(),
            Value::Integer(value) => {
                self.refuse(format!("{value} is out of range, expected {low} to {high}"))
            }
            _ => self.unexpected(format_args!("an integer from {low} to {high}")),
        }
    }

    /// A text without control characters, which have no place in a name or path.
    pub fn text(&self, expected: &str) -> Option<&'a str> {
        match &self.node.value {
            Value::Text(text) if text.is_empty() => self.unexpected(expected),
            Value::Text(text) if text.chars().any(char::is_control) => {
                self.refuse(format!("{} contains a control character, expected {expected}", quoted(text)))
            }
            Value::Text(text) => Some(text),
            _ => self.unexpected(expected),
        }
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let names: Vec<_> = words.iter().map(|&(name, _)| name).collect();
        let expected = one_of(&names);
        let Value::Text(text) = &self.node.value else { return self.unexpected(expected) };
        match words.iter().find(|(name, _)| name == text) {
            Some(&(_, value)) => Some(value),
            None => self.unexpected(format_args!("{expected}{}", suggestion(text, names))),
        }
    }

    /// A MAC address that a station may have.
    pub fn mac(&self) -> Option<Mac> {
        const EXPECTED: &str = "a MAC address such as \"02:00:5e:10:00:01\"";
        let Value::Text(text) = &self.node.value else { return self.unexpected(EXPECTED) };
        match text.parse::<Mac>() {
            Err(_) => self.unexpected(EXPECTED),
            Ok(mac) if mac.is_multicast() => {
                self.refuse(format!("{mac} is a group address, expected the address of one station"))
            }
            Ok(mac) if !mac.is_station() => {
                self.refuse(format!("{mac} is no address, expected that of a station"))
            }
            Ok(mac) => Some(mac),
        }
    }

    /// Integers of `range` in the order given, repeated as given.
    pub fn sequence<T: TryFrom<i128>>(&self, range: &RangeInclusive<i128>) -> Option<Vec<T>> {
        let expected = format!("a list of integers from {} to {}", range.start(), range.end());
        let items = self.items(&expected)?;
        if items.is_empty() {
            return self.refuse(format!("the list is empty, expected {expected}"));
        }
        let values: Vec<_> = items.iter().map(|item| item.integer(range.clone())).collect();
        values.into_iter().collect()
    }

    /// Different integers of `range`: a list, or a text of numbers and ranges such as `"10-20,30"`.
    pub fn set<T: TryFrom<i128> + Ord + Copy + Display>(
        &self,
        range: &RangeInclusive<i128>,
    ) -> Option<Vec<T>> {
        let (low, high) = (range.start(), range.end());
        let expected = format!("a list of integers from {low} to {high}, or a text such as \"10-20,30\"");
        match &self.node.value {
            Value::List(_) => {
                let mut seen = BTreeSet::new();
                let values: Vec<T> = self.sequence(range)?;
                match values.iter().find(|&&value| !seen.insert(value)) {
                    Some(twice) => self.refuse(format!("{twice} is listed twice, expected {expected}")),
                    None => Some(values),
                }
            }
            Value::Text(text) => match ranges(text, range) {
                Some(values) => values.into_iter().map(|value| T::try_from(value).ok()).collect(),
                None => self.unexpected(expected),
            },
            _ => self.unexpected(expected),
        }
    }

    /// The items of a list.
    pub fn items(&self, expected: &str) -> Option<Vec<Field<'a>>> {
        let Value::List(items) = &self.node.value else { return self.unexpected(expected) };
        let problems = self.problems;
        let field = |(index, node)| Field { path: format!("{}[{index}]", self.path), node, problems };
        Some(items.iter().enumerate().map(field).collect())
    }

    /// A table whose keys are names that the operator chose.
    pub fn entries(&self, expected: &str) -> Option<Section<'a>> {
        match &self.node.value {
            Value::Table(entries) => Some(Section {
                path: self.path.clone(),
                line: self.node.line,
                problems: self.problems,
                entries,
            }),
            _ => self.unexpected(expected),
        }
    }

    /// A table with no other keys than `known`.
    pub fn section(&self, known: &[&str]) -> Option<Section<'a>> {
        let section = self.entries(&format!("a table with the keys {}", listed(known)))?;
        for (key, field) in section.fields().filter(|(key, _)| !known.contains(key)) {
            let near = suggestion(key, known.iter().copied());
            let near = if near.is_empty() { format!(", expected {}", listed(known)) } else { near };
            field.refuse::<()>(format!("unknown key{near}"));
        }
        Some(section)
    }
}

impl<'a> Section<'a> {
    /// The value of `key`, if it is there.
    pub fn get(&self, key: &str) -> Option<Field<'a>> {
        self.fields().find(|&(name, _)| name == key).map(|(_, field)| field)
    }

    /// Every key with its value.
    pub fn fields(&self) -> impl Iterator<Item = (&'a str, Field<'a>)> + use<'a, '_> {
        self.entries.iter().map(|(key, node)| {
            (key.as_str(), Field { path: self.path_of(key), node, problems: self.problems })
        })
    }

    /// The value of `key`; its absence is a mistake.
    pub fn require(&self, key: &str, expected: &str) -> Option<Field<'a>> {
        let field = self.get(key);
        if field.is_none() {
            self.problems.add(self.line, self.path_of(key), format!("is missing, expected {expected}"));
        }
        field
    }

    /// The table as a whole does not do.
    pub fn refuse<T>(&self, message: impl Into<String>) -> Option<T> {
        self.problems.add(self.line, self.path.as_str(), message);
        None
    }

    fn path_of(&self, key: &str) -> String {
        let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        let key = if bare { key.to_owned() } else { quoted(key) };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

/// A range of the switch's, as integers are read.
pub(super) fn wide<T: TryInto<i128> + Copy>(range: RangeInclusive<T>) -> RangeInclusive<i128> {
    let wide = |value: T| value.try_into().unwrap_or(i128::MAX);
    wide(*range.start())..=wide(*range.end())
}

/// `"a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// `a, b, c`.
fn listed(words: &[&str]) -> String {
    words.join(", ")
}

/// The numbers that `10-20,30` names, if all are of `range`.
fn ranges(text: &str, range: &RangeInclusive<i128>) -> Option<BTreeSet<i128>> {
    /// More parts than this repeat themselves; a request must not keep the daemon busy.
    const MAX_PARTS: usize = 4096;
    let mut values = BTreeSet::new();
    for (index, part) in text.split(',').enumerate() {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (i128, i128) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || !range.contains(&first) || !range.contains(&last) || index >= MAX_PARTS {
            return None;
        }
        values.extend(first..=last);
    }
    Some(values)
}
