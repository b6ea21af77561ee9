//! A job file's text as a tree with positions. It knows nothing of jobs, and nothing else here knows YAML or JSON.
//!
//! Two sources, `json` and `yaml`, feed one `Builder`, so that a JSON document reads the same as its YAML twin and
//! the rules (depth, duplicate keys, no merge keys) stand once.

use std::collections::BTreeMap;

use super::report::{Mark, Report};
use super::{json, yaml};
use crate::limits::{JOB_FILE_BYTES_MAX, JOB_FILE_DEPTH_MAX};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub at: Mark,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Number(Numeral),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// Something that the report has an error on already.
    Refused,
}

/// A number as written, and its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Numeral {
    pub written: String,
    pub value: f64,
    /// Where it is written as an integer that fits.
    pub whole: Option<i64>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub at: Mark,
    pub key: String,
    pub value: Node,
}

/// The text cannot be read any further; the report says why.
#[derive(Debug)]
pub(super) struct Stop;

/// The tree of `payload`, or `None` where the report says why there is none.
pub(super) fn read(payload: &[u8], report: &mut Report) -> Option<Node> {
    if payload.len() > JOB_FILE_BYTES_MAX {
        let bytes = payload.len();
        report.file_error(format!(
            "the job file is {bytes} bytes long, at most {JOB_FILE_BYTES_MAX} are allowed"
        ));
        return None;
    }
    let Ok(text) = std::str::from_utf8(payload) else {
        report.file_error("the job file is not UTF-8 text".into());
        return None;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some((line, bad)) = control_character(text) {
        let message = format!("the control character U+{:04X} is not allowed", u32::from(bad));
        report.error_at("", Mark { line, column: 1 }, message);
        return None;
    }
    let mut builder = Builder { open: Vec::new(), root: None, report };
    let done =
        if json::is_json(text) { json::read(text, &mut builder) } else { yaml::read(text, &mut builder) };
    let Builder { root, .. } = builder;
    done.ok()?;
    if root.is_none() {
        report.file_error("the job file is empty".into());
    }
    root
}

/// The first character that neither YAML nor JSON allows as it is, and its line.
fn control_character(text: &str) -> Option<(u32, char)> {
    let bad = |c: char| c < ' ' && !matches!(c, '\t' | '\n' | '\r');
    (1..).zip(text.split('\n')).find_map(|(line, row)| Some((line, row.chars().find(|c| bad(*c))?)))
}

/// What a source has opened and not yet closed.
struct Open {
    at: Mark,
    inside: Inside,
}

enum Inside {
    List(Vec<Node>),
    Map { entries: Vec<Entry>, key: Option<(Mark, String)> },
}

/// Takes the events of a source, in order, and makes the tree.
pub(super) struct Builder<'r> {
    open: Vec<Open>,
    root: Option<Node>,
    report: &'r mut Report,
}

impl Builder<'_> {
    pub fn open_list(&mut self, at: Mark) -> Result<(), Stop> {
        self.open(at, Inside::List(Vec::new()))
    }

    pub fn open_map(&mut self, at: Mark) -> Result<(), Stop> {
        self.open(at, Inside::Map { entries: Vec::new(), key: None })
    }

    fn open(&mut self, at: Mark, inside: Inside) -> Result<(), Stop> {
        if self.expects_key() {
            return Err(self.stop(at, "a key must be text".into()));
        }
        if self.open.len() == JOB_FILE_DEPTH_MAX {
            return Err(self.stop(at, format!("nested deeper than {JOB_FILE_DEPTH_MAX} levels")));
        }
        self.open.push(Open { at, inside });
        Ok(())
    }

    pub fn close(&mut self) {
        let path = self.path();
        let Some(Open { at, inside }) = self.open.pop() else { return };
        let value = match inside {
            Inside::List(items) => Value::List(items),
            Inside::Map { entries, .. } => Value::Map(self.distinct(&path, entries)),
        };
        self.put(Node { at, value });
    }

    /// A value, or a key where one is due. `plain`: without quotes, so that it may be something else than text.
    pub fn scalar(&mut self, at: Mark, text: String, plain: bool) {
        if let Some(Open { inside: Inside::Map { key: key @ None, .. }, .. }) = self.open.last_mut() {
            *key = Some((at, text));
            return;
        }
        let value = if plain { resolve(text) } else { Value::Text(text) };
        self.put(Node { at, value });
    }

    /// A value that is not allowed.
    pub fn refused(&mut self, at: Mark, message: String) -> Result<(), Stop> {
        if self.expects_key() {
            return Err(self.stop(at, message));
        }
        self.error(at, message);
        self.put(Node { at, value: Value::Refused });
        Ok(())
    }

    /// An error at the place that the tree has grown to.
    pub fn error(&mut self, at: Mark, message: String) {
        let path = self.path();
        self.report.error_at(&path, at, message);
    }

    pub fn stop(&mut self, at: Mark, message: String) -> Stop {
        self.error(at, message);
        Stop
    }

    fn expects_key(&self) -> bool {
        matches!(self.open.last(), Some(Open { inside: Inside::Map { key: None, .. }, .. }))
    }

    fn put(&mut self, node: Node) {
        match self.open.last_mut().map(|open| &mut open.inside) {
            None => self.root = Some(node),
            Some(Inside::List(items)) => items.push(node),
            Some(Inside::Map { entries, key }) => {
                if let Some((at, key)) = key.take() {
                    entries.push(Entry { at, key, value: node });
                }
            }
        }
    }

    /// The entries without second ones and merge keys, which are errors.
    fn distinct(&mut self, path: &str, entries: Vec<Entry>) -> Vec<Entry> {
        let mut first: BTreeMap<&str, u32> = BTreeMap::new();
        let mut keep = Vec::with_capacity(entries.len());
        for entry in &entries {
            let message = match first.get(entry.key.as_str()) {
                Some(line) => Some(format!("written twice; the first is in line {line}")),
                None if entry.key == "<<" => Some("merge keys are not allowed: write the fields out".into()),
                None => None,
            };
            keep.push(message.is_none());
            match message {
                Some(message) => self.report.error_at(&join(path, &entry.key), entry.at, message),
                None => _ = first.insert(&entry.key, entry.at.line),
            }
        }
        entries.into_iter().zip(keep).filter_map(|(entry, keep)| keep.then_some(entry)).collect()
    }

    /// The path of the value that comes next.
    fn path(&self) -> String {
        self.open.iter().fold(String::new(), |path, open| match &open.inside {
            Inside::List(items) => format!("{path}[{}]", items.len()),
            Inside::Map { key: Some((_, key)), .. } => join(&path, key),
            Inside::Map { key: None, .. } => path,
        })
    }
}

/// The path of `key` in the mapping at `path`. Keys are shortened: paths are for people.
pub(super) fn join(path: &str, key: &str) -> String {
    let key = shorten(key);
    if path.is_empty() { key } else { format!("{path}.{key}") }
}

/// A user's text, fit for a message.
pub(super) fn shorten(text: &str) -> String {
    printable(text, 60)
}

/// At most `chars_max` characters of a user's text, none of which a terminal acts upon.
pub(super) fn printable(text: &str, chars_max: usize) -> String {
    let safe = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut shown: String = text.chars().take(chars_max).map(safe).collect();
    if text.chars().nth(chars_max).is_some() {
        shown.push('…');
    }
    shown
}

/// The core schema of YAML 1.2.2 (section 10.3.2), of which JSON's literals are a part.
fn resolve(text: String) -> Value {
    match text.as_str() {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => match number(&text) {
            Some((value, whole)) => Value::Number(Numeral { written: text, value, whole }),
            None => Value::Text(text),
        },
    }
}

/// The value of a numeral, the second where it is an integer that fits. What does not fit is a number nonetheless,
/// and no field's bounds admit it.
fn number(text: &str) -> Option<(f64, Option<i64>)> {
    for (prefix, radix) in [("0o", 8), ("0x", 16)] {
        if let Some(digits) = text.strip_prefix(prefix) {
            let numeral = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
            let whole = i64::from_str_radix(digits, radix).ok();
            return numeral.then_some((whole.map_or(f64::INFINITY, |n| n as f64), whole));
        }
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    match unsigned {
        ".inf" | ".Inf" | ".INF" => {
            Some((f64::INFINITY.copysign(if text.starts_with('-') { -1.0 } else { 1.0 }), None))
        }
        ".nan" | ".NaN" | ".NAN" if unsigned == text => Some((f64::NAN, None)),
        _ if is_decimal(unsigned) => Some((text.parse().ok()?, text.parse().ok())),
        _ => None,
    }
}

/// `( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`
fn is_decimal(text: &str) -> bool {
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let exponent_fits = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['-', '+']).unwrap_or(e);
        !e.is_empty() && digits(e)
    });
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    exponent_fits && digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_of_the_core_schema() {
        assert_eq!(resolve("~".into()), Value::Null);
        assert_eq!(resolve("True".into()), Value::Bool(true));
        for (text, value, whole) in [
            ("0", 0.0, Some(0)),
            ("-12", -12.0, Some(-12)),
            ("+12", 12.0, Some(12)),
            ("010", 10.0, Some(10)),
            ("0o17", 15.0, Some(15)),
            ("0xFf", 255.0, Some(255)),
            ("0.5", 0.5, None),
            (".5", 0.5, None),
            ("2.", 2.0, None),
            ("1e3", 1000.0, None),
            ("-.inf", f64::NEG_INFINITY, None),
            ("1e999", f64::INFINITY, None),
            ("99999999999999999999", 1e20, None),
        ] {
            assert_eq!(number(text), Some((value, whole)), "{text}");
        }
        for text in [
            "yes", "no", "on", "off", "y", ".", "-", "+", "1e", "e3", "0x", "0o8", "-0x1", "1_000", "1:30",
            "tRue", "infinity", "nan", "-.nan",
        ] {
            assert_eq!(resolve(text.into()), Value::Text(text.into()));
        }
    }
}
