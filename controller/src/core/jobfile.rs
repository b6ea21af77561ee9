//! Stands in for `berth_protocol::job::parse` until that is there: reads a `JobSpec` as JSON.

use berth_protocol::ids::{Digest, JobName, Namespace};
use berth_protocol::job::JobSpec;
use berth_protocol::message::user::FieldError;

pub struct ParsedJob {
    pub spec: JobSpec,
    pub written: Digest,
}

pub fn parse(payload: &[u8], _topic: Option<(&Namespace, &JobName)>) -> Result<ParsedJob, Vec<FieldError>> {
    let error = |e: serde_json::Error| {
        vec![FieldError { field: String::new(), line: None, column: None, message: e.to_string() }]
    };
    let spec: JobSpec = serde_json::from_slice(payload).map_err(error)?;
    Ok(ParsedJob { spec, written: Digest::of(payload) })
}

pub fn render(spec: &JobSpec) -> serde_json::Value {
    serde_json::to_value(spec).unwrap_or_default()
}
