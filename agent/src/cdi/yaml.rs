//! YAML of one document, as a JSON value: what generators of specifications write, without anchors and tags.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

const DEPTH_MAX: usize = 32;

enum Open {
    List(Vec<Value>),
    Map(Map<String, Value>, Option<String>),
}

pub fn read(text: &str) -> Result<Value, String> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str(text) {
        let (event, at) = event.map_err(|e| format!("not YAML: {e}"))?;
        let line = at.start.line();
        let done = match event {
            Event::Scalar(text, style, 0, None) => Some(scalar(&text, style)),
            Event::SequenceStart(0, None) => {
                open.push(Open::List(Vec::new()));
                None
            }
            Event::MappingStart(0, None) => {
                open.push(Open::Map(Map::new(), None));
                None
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(list)) => Some(Value::Array(list)),
                Some(Open::Map(map, _)) => Some(Value::Object(map)),
                None => None,
            },
            Event::DocumentStart(_) if root.is_some() => {
                return Err(format!("line {line}: a second document"));
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => None,
            _ => return Err(format!("line {line}: anchors, aliases and tags are not read")),
        };
        if open.len() > DEPTH_MAX {
            return Err(format!("line {line}: nested deeper than {DEPTH_MAX} levels"));
        }
        let Some(done) = done else { continue };
        match open.last_mut() {
            None => root = Some(done),
            Some(Open::List(list)) => list.push(done),
            Some(Open::Map(map, key)) => match (key.take(), done) {
                (Some(key), value) => {
                    if map.insert(key, value).is_some() {
                        return Err(format!("line {line}: a key stands twice"));
                    }
                }
                (None, Value::Array(_) | Value::Object(_)) => {
                    return Err(format!("line {line}: a key must be text"));
                }
                (None, Value::String(text)) => *key = Some(text),
                (None, other) => *key = Some(other.to_string()),
            },
        }
    }
    root.ok_or_else(|| "empty".to_owned())
}

/// By the core schema: only what is not quoted may be something else than text.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::String(text.to_owned());
    }
    let octal = text.strip_prefix("0o").and_then(|digits| i64::from_str_radix(digits, 8).ok());
    let hex = text.strip_prefix("0x").and_then(|digits| i64::from_str_radix(digits, 16).ok());
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => match octal.or(hex).or_else(|| text.parse().ok()) {
            Some(whole) => Value::Number(whole.into()),
            None => match text.parse::<f64>().ok().and_then(Number::from_f64) {
                Some(number) => Value::Number(number),
                None => Value::String(text.to_owned()),
            },
        },
    }
}
