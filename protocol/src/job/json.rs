//! JSON as a source of events with positions, since YAML readers differ from JSON in corners: surrogate pairs,
//! tabs, keys beyond 1,024 characters.

use serde::de::IgnoredAny;

use super::document::{Builder, Stop};
use super::report::Mark;

/// RFC 8259, nested at most 128 levels: deeper is left to the other reader to refuse.
pub(super) fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Reads `text`, of which `is_json` holds, so that punctuation needs no second look.
pub(super) fn read(text: &str, to: &mut Builder<'_>) -> Result<(), Stop> {
    let mut at = Mark { line: 1, column: 1 };
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '{' => {
                to.open_map(at)?;
                1
            }
            '[' => {
                to.open_list(at)?;
                1
            }
            '}' | ']' => {
                to.close();
                1
            }
            '"' => {
                let length = string_length(rest);
                match serde_json::from_str(&rest[..length]) {
                    Ok(string) => to.scalar(at, string, false),
                    Err(_) => to.refused(at, "half a surrogate pair is no character".into())?,
                }
                length
            }
            ',' | ':' | ' ' | '\t' | '\n' | '\r' => 1,
            _ => {
                let end = |c: char| matches!(c, ',' | ']' | '}') || c.is_ascii_whitespace();
                let length = rest.find(end).unwrap_or(rest.len());
                to.scalar(at, rest[..length].to_owned(), true);
                length
            }
        };
        let (read, unread) = rest.split_at(length);
        at = match read {
            "\n" => Mark { line: at.line + 1, column: 1 },
            // A carriage return alone ends a line, too; before a line feed it is a part of that end.
            "\r" if !unread.starts_with('\n') => Mark { line: at.line + 1, column: 1 },
            // No token but white space spans lines.
            _ => Mark { line: at.line, column: at.column + read.chars().count() as u32 },
        };
        rest = unread;
    }
    Ok(())
}

/// The length of the string that `text` begins with, quotes included.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    let close = text.bytes().skip(1).position(|b| {
        let ends = b == b'"' && !escaped;
        escaped = b == b'\\' && !escaped;
        ends
    });
    close.map_or(text.len(), |at| at + 2)
}
