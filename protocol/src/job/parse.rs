//! The two ways between a job file and a job.

use serde::Deserialize;
use serde_json::Value;

use super::report::Report;
use super::written::File;
use super::{JobSpec, build, document, read, schema};
use crate::ids::{Digest, Generation, JobName, Namespace, RequestId};
use crate::message::user::FieldError;

/// A job, and what its file said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedJob {
    pub spec: JobSpec,
    /// Of what was written, before defaults: the same for YAML and JSON, any order of keys, any spelling of a
    /// quantity, and with or without the names.
    pub written: Digest,
    /// What the submission is called by whoever sends it.
    pub id: Option<RequestId>,
    /// The generation that it is meant to follow.
    pub replaces: Option<Generation>,
}

/// Reads a job file, YAML or JSON. The names in it may be left out where `topic` gives them, and must agree with it.
///
/// # Errors
/// All that is wrong, in the order of the file, at most `JOB_FILE_ERRORS_MAX`.
pub fn parse(payload: &[u8], topic: Option<(&Namespace, &JobName)>) -> Result<ParsedJob, Vec<FieldError>> {
    let mut report = Report::default();
    match attempt(payload, topic, &mut report) {
        Some(parsed) if report.is_empty() => Ok(parsed),
        _ => Err(report.into_errors()),
    }
}

fn attempt(payload: &[u8], topic: Option<(&Namespace, &JobName)>, report: &mut Report) -> Option<ParsedJob> {
    let tree = document::read(payload, report)?;
    let canonical = read::root(&tree, schema::JOB, report)?;
    // The schema has checked all that the types ask for; a test holds the two together.
    let typed = File::deserialize(canonical).and_then(|file| Ok((file.digest()?, file)));
    match typed {
        Ok((written, file)) => {
            let (id, replaces) = (file.id.clone(), file.replaces);
            build::job(file, topic, report).map(|spec| ParsedJob { spec, written, id, replaces })
        }
        Err(error) => {
            report.file_error(format!("the job file cannot be read: {error}"));
            None
        }
    }
}

/// Line and column, from 1, where the value of the field `path` begins in a job file.
pub fn place(payload: &[u8], path: &str) -> Option<(u32, u32)> {
    let mut report = Report::default();
    let tree = document::read(payload, &mut report)?;
    let _ = read::root(&tree, schema::JOB, &mut report);
    report.place_of(path).map(|mark| (mark.line, mark.column))
}

/// The job file of `job`, in full: `parse` of it yields the same job.
pub fn render(job: &JobSpec) -> Value {
    match serde_json::to_value(File::from(job)) {
        Ok(Value::Object(fields)) => read::print_object(fields, schema::JOB),
        // A struct of texts, numbers and lists is an object.
        _ => Value::Null,
    }
}
