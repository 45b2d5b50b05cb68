//! Configuration as a tree that knows its lines: what TOML and JSON have in common, so that a port is written, checked
//! and complained about in the same words in the file and over the API.

use toml::de::{DeTable, DeValue};

use super::problem::Problem;

/// A value, and the line of the file on which it (or its key) stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub line: Option<usize>,
    pub value: Value,
}

/// What the grammar tells apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Text(String),
    List(Vec<Node>),
    /// In the order of the lines.
    Table(Vec<(String, Node)>),
    /// A value that no key takes: a float or a date, as written.
    Other(String),
}

impl Node {
    /// The table of a whole TOML file.
    ///
    /// # Errors
    /// The first syntax error: those after it are mostly its consequences.
    pub fn from_toml(text: &str) -> Result<Self, Problem> {
        let lines = Lines::new(text);
        let (table, errors) = DeTable::parse_recoverable(text);
        let start = |error: &toml::de::Error| error.span().map_or(0, |span| span.start);
        if let Some(first) = errors.iter().min_by_key(|error| start(error)) {
            let message = first.message().replace('\n', ", ");
            return Err(Problem { line: Some(lines.of(start(first))), key: String::new(), message });
        }
        Ok(Self { line: Some(1), value: toml_table(table.get_ref(), &lines) })
    }

    /// A JSON document; it has no lines.
    pub fn from_json(json: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(number) => match number.as_i128() {
                Some(value) => Value::Integer(value),
                None => Value::Other(number.to_string()),
            },
            Json::String(text) => Value::Text(text),
            Json::Array(items) => Value::List(items.into_iter().map(Self::from_json).collect()),
            Json::Object(entries) => {
                Value::Table(entries.into_iter().map(|(key, item)| (key, Self::from_json(item))).collect())
            }
        };
        Self { line: None, value }
    }

    /// The JSON document that reads as the same tree.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => serde_json::Number::from_i128(*value).map_or(Json::Null, Json::Number),
            Value::Text(text) | Value::Other(text) => text.as_str().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Table(entries) => {
                Json::Object(entries.iter().map(|(key, item)| (key.clone(), item.to_json())).collect())
            }
        }
    }

    /// The value in a few words, for an error.
    pub fn found(&self) -> String {
        match &self.value {
            Value::Null => "null".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Text(text) => quoted(text),
            Value::List(_) => "a list".to_owned(),
            Value::Table(_) => "a table".to_owned(),
            Value::Other(text) => text.clone(),
        }
    }
}

/// `text` in quotes, control characters escaped and cut where it is no longer of use to a reader.
pub(crate) fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    let cut = if text.chars().count() > SHOWN { "…" } else { "" };
    let shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    format!("\"{shown}{cut}\"")
}

fn toml_table(table: &DeTable<'_>, lines: &Lines) -> Value {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let entries = entries.into_iter().map(|(key, item)| {
        let line = Some(lines.of(key.span().start));
        (key.get_ref().to_string(), Node { line, value: toml_value(item.get_ref(), lines) })
    });
    Value::Table(entries.collect())
}

fn toml_value(value: &DeValue<'_>, lines: &Lines) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(integer) => match i128::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(value) => Value::Integer(value),
            Err(_) => Value::Other(integer.to_string()),
        },
        DeValue::Float(float) => Value::Other(float.to_string()),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Datetime(date) => Value::Other(date.to_string()),
        DeValue::Array(items) => Value::List(
            items
                .iter()
                .map(|item| Node {
                    line: Some(lines.of(item.span().start)),
                    value: toml_value(item.get_ref(), lines),
                })
                .collect(),
        ),
        DeValue::Table(table) => toml_table(table, lines),
    }
}

/// Where the lines of a text begin.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n').map(|(at, _)| at + 1).collect())
    }

    /// The line, from 1, of the byte at `offset`.
    fn of(&self, offset: usize) -> usize {
        1 + self.0.partition_point(|&start| start <= offset)
    }
}
