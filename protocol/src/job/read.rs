//! The tree of a file, held against the schema: every value to its canonical form, or an error in the report.
//!
//! Canonical is the form that `written` deserialises: quantities are plain numbers in their smallest unit, so that
//! two spellings of one amount are the same. `print` is the way back.

use serde_json::{Map, Number, Value as Json};

use super::document::{Entry, Node, Numeral, Value, join, shorten};
use super::report::Report;
use super::schema::{Field, Kind, Shape};
use super::suggest;
use crate::limits::{CPU_MILLI_MAX, DURATION_MS_MAX, MEMORY_BYTES_MAX};
use crate::units::{Bytes, MilliCpu, Millis, UnitError};

/// The whole numbers that a JSON number and a `f64` both hold exactly.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// The canonical form of the mapping `node`. Fields in error are left out.
pub(super) fn root(node: &Node, shape: Shape, report: &mut Report) -> Option<Json> {
    report.place("", node.at);
    match &node.value {
        Value::Map(entries) => Some(object(entries, shape, "", node, report)),
        Value::Refused => None,
        other => {
            let found = describe(other);
            report.file_error(format!("expected the fields of a job, such as `image: host`; found {found}"));
            None
        }
    }
}

fn object(entries: &[Entry], shape: Shape, path: &str, node: &Node, report: &mut Report) -> Json {
    let mut read = Map::new();
    for Entry { at, key, value } in entries {
        let path = join(path, key);
        match shape.field(key) {
            Some(field) => {
                if let Some(json) = value_of(value, field, &path, report) {
                    read.insert(key.clone(), json);
                }
            }
            None if report.is_full() => report.error_at(&path, *at, String::new()),
            None => report.error_at(&path, *at, suggest::unknown_field(key, shape)),
        }
    }
    let written = |name: &str| entries.iter().any(|entry| entry.key == name);
    for field in shape.fields().filter(|field| field.required && !written(field.name)) {
        report.error_at(&join(path, field.name), node.at, format!("required, such as {}", field.example));
    }
    let chosen: Vec<&Entry> =
        entries.iter().filter(|entry| shape.one_of.contains(&entry.key.as_str())).collect();
    match (shape.one_of, chosen.as_slice()) {
        ([], _) | (_, [_]) => {}
        ([name], []) => report.error_at(&join(path, name), node.at, needed(shape, name)),
        (names, []) => report.error_at(path, node.at, format!("one of {} is required", names.join(", "))),
        (_, [first, more @ ..]) => {
            for entry in more {
                let message = format!("cannot be together with `{}`", first.key);
                report.error_at(&join(path, &entry.key), entry.at, message);
            }
        }
    }
    Json::Object(read)
}

fn needed(shape: Shape, name: &str) -> String {
    shape.field(name).map_or_else(String::new, |field| format!("required, such as {}", field.example))
}

fn value_of(node: &Node, field: &Field, path: &str, report: &mut Report) -> Option<Json> {
    value(node, &field.kind, field.example, path, report)
}

/// The canonical form of one value. `example` shows what is wanted.
pub(super) fn value(
    node: &Node,
    kind: &Kind,
    example: &str,
    path: &str,
    report: &mut Report,
) -> Option<Json> {
    report.place(path, node.at);
    match scalar(&node.value, kind) {
        Ok(json) => return Some(json),
        Err(Wrong::Value(message)) => {
            report.error(path, message);
            return None;
        }
        Err(Wrong::Type) => {}
    }
    match (kind, &node.value) {
        (Kind::Object(shape), Value::Map(entries)) => Some(object(entries, *shape, path, node, report)),
        (Kind::List { of, min, max }, Value::List(items)) => {
            if items.len() < *min || items.len() > *max {
                let count = items.len();
                report.error(path, format!("holds {count} entries, {min} to {max} are allowed"));
                return None;
            }
            let item = |(index, node)| value(node, of, "", &format!("{path}[{index}]"), report);
            // All are read, so that all errors are told, before one in error takes the list away.
            let read: Vec<Option<Json>> = items.iter().enumerate().map(item).collect();
            read.into_iter().collect::<Option<Vec<Json>>>().map(Json::Array)
        }
        (Kind::Map { keys, max }, Value::Map(entries)) => {
            if entries.len() > *max {
                report.error(path, format!("holds {} entries, at most {max} are allowed", entries.len()));
                return None;
            }
            let mut read = Map::new();
            for Entry { at, key, value: node } in entries {
                let path = join(path, key);
                if let Err(message) = (keys.check)(key) {
                    report.error_at(&path, *at, message);
                }
                let text = Kind::Text(super::form::TEXT);
                if let Some(json) = value(node, &text, "", &path, report) {
                    read.insert(key.clone(), json);
                }
            }
            Some(Json::Object(read))
        }
        (_, Value::Refused) => None,
        (_, other) => {
            report.error(path, mismatch(other, kind, example));
            None
        }
    }
}

enum Wrong {
    Type,
    Value(String),
}

impl From<UnitError> for Wrong {
    fn from(error: UnitError) -> Self {
        Wrong::Value(error.to_string())
    }
}

/// Kinds that are neither lists nor mappings.
fn scalar(value: &Value, kind: &Kind) -> Result<Json, Wrong> {
    match (kind, value) {
        (Kind::Text(form), Value::Text(text)) => match (form.check)(text) {
            Ok(()) => Ok(text.as_str().into()),
            Err(message) => Err(Wrong::Value(message)),
        },
        (Kind::Choice(words), Value::Text(text)) => {
            if words.contains(&text.as_str()) {
                Ok(text.as_str().into())
            } else {
                Err(no_choice(text, words))
            }
        }
        (Kind::Flag, Value::Bool(flag)) => Ok((*flag).into()),
        (Kind::Whole { min, max }, Value::Number(number)) => {
            let whole = whole(number)
                .ok_or_else(|| Wrong::Value(format!("expected a whole number, found {}", describe(value))))?;
            if (*min..=*max).contains(&whole) {
                Ok(whole.into())
            } else {
                Err(Wrong::Value(format!("{whole} is out of bounds: {min} to {max} are allowed")))
            }
        }
        (Kind::Cpu { min }, Value::Text(_) | Value::Number(_)) => {
            let cpu = MilliCpu::parse(&spelled(value))?;
            least(cpu.0, min.0, || format!("{cpu} is less than the least amount, {min}"))
        }
        (Kind::Size { min }, Value::Text(_) | Value::Number(_)) => {
            let size = Bytes::parse(&spelled(value))?;
            least(size.0, min.0, || format!("{size} is less than the least size, {min}"))
        }
        (Kind::Span { min }, Value::Text(text)) => {
            let span = Millis::parse(text)?;
            least(span.0, min.0, || format!("{span} is shorter than the least duration, {min}"))
        }
        (Kind::Span { .. }, Value::Number(_)) => Err(UnitError::NotDuration(shorten(&spelled(value))).into()),
        _ => Err(Wrong::Type),
    }
}

fn least(amount: u64, min: u64, message: impl Fn() -> String) -> Result<Json, Wrong> {
    if amount >= min { Ok(amount.into()) } else { Err(Wrong::Value(message())) }
}

/// A number without a fraction; `1.0` is one, as in JSON Schema.
fn whole(number: &Numeral) -> Option<i64> {
    let exact = number.value.fract() == 0.0 && number.value.abs() < EXACT_MAX;
    number.whole.or_else(|| exact.then_some(number.value as i64))
}

/// A quantity as its parser takes it: a number without exponent and radix.
fn spelled(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        Value::Number(number) => {
            number.whole.map_or_else(|| number.value.to_string(), |whole| whole.to_string())
        }
        _ => String::new(),
    }
}

fn no_choice(text: &str, words: &[&str]) -> Wrong {
    /// More words than these are too many to read.
    const LISTED_MAX: usize = 16;
    let mut message = format!("`{}` is not a choice here", shorten(text));
    // `CAP_NET_ADMIN` and `USR1` are what other tools call `NET_ADMIN` and `SIGUSR1`.
    let bare = text.strip_prefix("CAP_").unwrap_or(text);
    let signal = format!("SIG{bare}");
    let near = words.iter().find(|word| **word == signal).copied();
    if let Some(near) = near.or_else(|| suggest::nearest(bare, words.iter().copied())) {
        message.push_str(&format!(", did you mean `{near}`?"));
    } else if words.len() <= LISTED_MAX {
        message.push_str(&format!("; write one of {}", words.join(", ")));
    }
    Wrong::Value(message)
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(flag) => format!("the boolean {flag}"),
        Value::Number(number) => format!("the number {}", shorten(&number.written)),
        Value::Text(text) => format!("the text `{}`", shorten(text)),
        Value::List(_) => "a list".into(),
        Value::Map(_) => "a mapping".into(),
        Value::Refused => "something refused".into(),
    }
}

fn mismatch(found: &Value, kind: &Kind, example: &str) -> String {
    let wanted = match kind {
        Kind::Text(_) => "text",
        Kind::Flag => "true or false",
        Kind::Whole { .. } => "a whole number",
        Kind::Cpu { .. } => "a number of cores",
        Kind::Size { .. } => "a size",
        Kind::Span { .. } => "a duration",
        Kind::Choice(_) => "a word",
        Kind::Object(_) | Kind::Map { .. } => "a mapping",
        Kind::List { .. } => "a list",
    };
    let found_words = describe(found);
    let advice = match (kind, found) {
        (Kind::Text(_) | Kind::Choice(_), Value::Bool(flag)) => format!("; put it in quotes: \"{flag}\""),
        (Kind::Text(_) | Kind::Choice(_), Value::Number(number)) => {
            format!("; put it in quotes: \"{}\"", shorten(&number.written))
        }
        (_, Value::Null) => "; write a value, or leave the field out".into(),
        _ if !example.is_empty() => format!("; write for example {example}"),
        _ => String::new(),
    };
    format!("expected {wanted}, found {found_words}{advice}")
}

/// The way back: a canonical value as people write it.
pub(super) fn print(canonical: Json, kind: &Kind) -> Json {
    match (kind, canonical) {
        (Kind::Cpu { .. }, Json::Number(n)) => quantity(&n, CPU_MILLI_MAX, |n| MilliCpu(n).to_string()),
        (Kind::Size { .. }, Json::Number(n)) => quantity(&n, MEMORY_BYTES_MAX, |n| Bytes(n).to_string()),
        (Kind::Span { .. }, Json::Number(n)) => quantity(&n, DURATION_MS_MAX, |n| Millis(n).to_string()),
        (Kind::List { of, .. }, Json::Array(items)) => {
            Json::Array(items.into_iter().map(|item| print(item, of)).collect())
        }
        (Kind::Object(shape), Json::Object(fields)) => print_object(fields, *shape),
        (_, other) => other,
    }
}

pub(super) fn print_object(fields: Map<String, Json>, shape: Shape) -> Json {
    let printed = fields.into_iter().map(|(name, json)| match shape.field(&name) {
        Some(field) => (name, print(json, &field.kind)),
        None => (name, json),
    });
    Json::Object(printed.collect())
}

fn quantity(n: &Number, max: u64, text: impl Fn(u64) -> String) -> Json {
    Json::String(text(n.as_u64().unwrap_or(max)))
}
