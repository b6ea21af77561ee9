//! What is wrong in a job file: errors with their places, bounded, and how a terminal shows them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::document::printable;
use crate::limits::{JOB_FILE_ERRORS_MAX, MESSAGE_BYTES_MAX};
use crate::message::user::FieldError;

/// What one error may say. Paths and messages quote the file, and all errors must fit into one answer.
const FIELD_CHARS_MAX: usize = 120;
const MESSAGE_CHARS_MAX: usize = 400;
const _: () = assert!(JOB_FILE_ERRORS_MAX * 4 * (FIELD_CHARS_MAX + MESSAGE_CHARS_MAX) < MESSAGE_BYTES_MAX);

/// A place in the text; both count from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    pub line: u32,
    pub column: u32,
}

/// Collects errors, and where each known field was written.
#[derive(Debug, Default)]
pub(super) struct Report {
    errors: Vec<FieldError>,
    overflowed: bool,
    places: BTreeMap<String, Mark>,
}

impl Report {
    /// The value of the field `path` stands at `mark`.
    pub fn place(&mut self, path: &str, mark: Mark) {
        self.places.insert(path.to_owned(), mark);
    }

    pub fn place_of(&self, path: &str) -> Option<Mark> {
        self.places.get(path).copied()
    }

    pub fn is_written(&self, path: &str) -> bool {
        self.places.contains_key(path)
    }

    /// An error on the file as a whole.
    pub fn file_error(&mut self, message: String) {
        self.push("", None, message);
    }

    pub fn error_at(&mut self, path: &str, mark: Mark, message: String) {
        self.push(path, Some(mark), message);
    }

    /// An error on a field, shown where the field, or else what should hold it, is written.
    pub fn error(&mut self, path: &str, message: String) {
        let mut holder = path;
        let mark = loop {
            match (self.places.get(holder), holder.rfind(['.', '['])) {
                (Some(mark), _) => break Some(*mark),
                (None, Some(end)) => holder = &holder[..end],
                (None, None) => break self.places.get("").copied(),
            }
        };
        self.push(path, mark, message);
    }

    fn push(&mut self, path: &str, mark: Option<Mark>, message: String) {
        if self.is_full() {
            self.overflowed = true;
            return;
        }
        let (line, column) = (mark.map(|m| m.line), mark.map(|m| m.column));
        let field = printable(path, FIELD_CHARS_MAX);
        let message = printable(&message, MESSAGE_CHARS_MAX);
        self.errors.push(FieldError { field, line, column, message });
    }

    /// No further error will be shown: looking for the best words is in vain.
    pub fn is_full(&self) -> bool {
        self.errors.len() == JOB_FILE_ERRORS_MAX
    }

    /// Something at, above or below `path` is wrong, so that conclusions from its value would mislead.
    pub fn doubts(&self, path: &str) -> bool {
        let within = |outer: &str, inner: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.overflowed || self.errors.iter().any(|e| within(&e.field, path) || within(path, &e.field))
    }

    pub fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// The errors in the order of the text, those without a place first.
    pub fn into_errors(mut self) -> Vec<FieldError> {
        self.errors.sort_by_key(|e| (e.line, e.column));
        if self.overflowed {
            let message = format!("there are more errors than these {}", JOB_FILE_ERRORS_MAX - 1);
            self.errors.truncate(JOB_FILE_ERRORS_MAX - 1);
            self.errors.push(FieldError { field: String::new(), line: None, column: None, message });
        }
        self.errors
    }
}

/// The errors of `source` as a terminal shows them, each with its line and a caret below it. `name` is the file's.
/// The errors may have come over the network: nothing in them reaches the terminal as a control character.
///
/// ```text
/// digits.yaml:7:3: resources.cpus: unknown field, did you mean `cpu`?
///   7 |   cpus: 2
///     |   ^
/// ```
pub fn show_errors(name: &str, source: &str, errors: &[FieldError]) -> String {
    let source = source.strip_prefix('\u{feff}').unwrap_or(source).replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<&str> = source.split('\n').collect();
    let mut shown = String::new();
    for error in errors {
        shown.push_str(name);
        let place = error.line.map(|line| (line, error.column.unwrap_or(1)));
        // Writing to a String cannot fail.
        let _ = match place {
            Some((line, column)) => write!(shown, ":{line}:{column}: "),
            None => write!(shown, ": "),
        };
        if !error.field.is_empty() {
            let _ = write!(shown, "{}: ", printable(&error.field, FIELD_CHARS_MAX));
        }
        let _ = writeln!(shown, "{}", printable(&error.message, MESSAGE_CHARS_MAX));
        let Some((line, column)) = place else { continue };
        let text = (line as usize).checked_sub(1).and_then(|index| lines.get(index));
        if let Some(text) = text.filter(|text| !text.trim().is_empty()) {
            let (text, indent) = excerpt(text, (column as usize).saturating_sub(1));
            let _ = writeln!(shown, "{line:>3} | {text}\n    | {:indent$}^", "");
        }
    }
    shown
}

/// The part of a line around `column` (from 0) that fits a terminal, and the column within it.
fn excerpt(line: &str, column: usize) -> (String, usize) {
    const BEFORE_CHARS_MAX: usize = 60;
    const SHOWN_CHARS_MAX: usize = 100;
    let skipped = column.saturating_sub(BEFORE_CHARS_MAX);
    let text: String = line.chars().skip(skipped).map(|c| if c == '\t' { ' ' } else { c }).collect();
    (printable(&text, SHOWN_CHARS_MAX), column - skipped)
}
