//! The job file's schema for editors and other tools, in the terms of JSON Schema 2020-12.

use serde_json::{Map, Value, json};

use super::schema::{JOB, Kind, Shape};

/// The JSON Schema of a job file. It allows all that `parse` accepts; relations between fields are `parse`'s alone.
pub fn json_schema() -> Value {
    let mut schema = object(JOB);
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "berth job file".into();
    schema
}

fn object(shape: Shape) -> Value {
    let mut properties = Map::new();
    for field in shape.fields() {
        let mut schema = kind(&field.kind);
        schema["description"] = field.doc.into();
        if let Ok(example) = serde_json::from_str::<Value>(field.example) {
            schema["examples"] = json!([example]);
        }
        properties.insert(field.name.into(), schema);
    }
    let mut schema = json!({ "type": "object", "properties": properties, "additionalProperties": false });
    let required: Vec<&str> = shape.fields().filter(|field| field.required).map(|field| field.name).collect();
    if !required.is_empty() {
        schema["required"] = required.into();
    }
    match shape.one_of {
        [] => {}
        names => schema["oneOf"] = names.iter().map(|name| json!({ "required": [name] })).collect(),
    }
    schema
}

fn kind(kind: &Kind) -> Value {
    match kind {
        Kind::Text(form) if form.pattern.is_empty() => json!({ "type": "string" }),
        Kind::Text(form) => json!({ "type": "string", "pattern": form.pattern }),
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Whole { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Cpu { .. } => {
            json!({ "type": ["string", "number"], "pattern": r"^[0-9]+(\.[0-9]{1,3}|m)?$" })
        }
        Kind::Size { .. } => {
            let pattern = r"^[0-9]+(\.[0-9]{1,3})?([KMGT]i|[kKMGT]?B|[kMG])?$";
            json!({ "type": ["string", "integer"], "pattern": pattern })
        }
        Kind::Span { .. } => json!({ "type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$" }),
        Kind::Choice(words) => json!({ "enum": words }),
        Kind::Object(shape) => object(*shape),
        Kind::List { of, min, max } => {
            json!({ "type": "array", "items": self::kind(of), "minItems": min, "maxItems": max })
        }
        Kind::Map { keys, max } => json!({
            "type": "object",
            "propertyNames": { "pattern": keys.pattern },
            "additionalProperties": { "type": "string" },
            "maxProperties": max,
        }),
    }
}
