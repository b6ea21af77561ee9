//! Job files on their way to the controller: which job they are, and whether they are sound.

use std::io::Read as _;
use std::path::Path;

use anyhow::Context as _;
use berth_protocol::ids::{JobName, Namespace};
use berth_protocol::job::{json_schema, parse, show_errors};
use berth_protocol::limits::{JOB_FILE_BYTES_MAX, NAME_BYTES_MAX};
use berth_protocol::message::user::FieldError;

use super::command::Format;
use super::config::Settings;
use super::connect::random;
use super::{Usage, print_value};

/// A job file read and found sound.
#[derive(Debug)]
pub struct JobFile {
    pub namespace: Namespace,
    pub job: JobName,
    /// As written.
    pub payload: Vec<u8>,
}

impl JobFile {
    /// With an id of its own, where it has none: should the network bring it once more behind a later one, the job does
    /// not go back. Lines stay where they are, and a file that has no place for it goes as it is.
    pub fn named(self) -> anyhow::Result<Self> {
        let topic = Some((&self.namespace, &self.job));
        let Ok(before) = parse(&self.payload, topic) else { return Ok(self) };
        if before.id.is_some() {
            return Ok(self);
        }
        let id = format!("submit-{:016x}", random()?);
        let text = String::from_utf8_lossy(&self.payload);
        let payload = match text.trim_start().strip_prefix('{') {
            Some(rest) => {
                let head = &text[..text.len() - rest.len()];
                format!("{head}\"id\": \"{id}\", {rest}")
            }
            None => format!("{text}\nid: {id}\n"),
        };
        let fits = payload.len() <= JOB_FILE_BYTES_MAX;
        let same = parse(payload.as_bytes(), topic).is_ok_and(|after| after.written == before.written);
        Ok(if fits && same { Self { payload: payload.into_bytes(), ..self } } else { self })
    }
}

/// Reads `path`, or standard input where it is `-`.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut payload = Vec::new();
    let max = JOB_FILE_BYTES_MAX as u64 + 1;
    match path.as_os_str() == "-" {
        true => std::io::stdin().take(max).read_to_end(&mut payload).context("cannot read standard input")?,
        false => std::fs::File::open(path)
            .and_then(|file| file.take(max).read_to_end(&mut payload))
            .map_err(|e| Usage::new(format!("cannot read {}: {e}", path.display())))?,
    };
    if payload.len() > JOB_FILE_BYTES_MAX {
        let what = format!(
            "{} is larger than {JOB_FILE_BYTES_MAX} bytes, the most a job file may be",
            path.display()
        );
        return Err(Usage::new(what).into());
    }
    Ok(payload)
}

/// Finds out whose file it is and checks it; every error is told with its line.
pub fn check(settings: &Settings, path: &Path, payload: Vec<u8>) -> anyhow::Result<JobFile> {
    let file = if path.as_os_str() == "-" { "standard input".to_owned() } else { path.display().to_string() };
    let written = Written::peek(&payload);
    let Some(job) = written.name.or_else(|| name_from(path)) else {
        // Whatever else is wrong is told with it.
        let errors = parse(&payload, None).err().unwrap_or_default();
        return Err(Usage::new(render_errors(&file, &payload, &errors)).into());
    };
    let namespace = match (settings.namespace_given, written.namespace) {
        (false, Some(namespace)) => namespace,
        _ => settings.namespace.clone(),
    };
    if let Err(errors) = parse(&payload, Some((&namespace, &job))) {
        return Err(Usage::new(render_errors(&file, &payload, &errors)).into());
    }
    Ok(JobFile { namespace, job, payload })
}

/// The names in a file, where it can be read at all and they are names; the parser says what else is wrong.
#[derive(Default)]
struct Written {
    name: Option<JobName>,
    namespace: Option<Namespace>,
}

impl Written {
    fn peek(payload: &[u8]) -> Self {
        let Ok(value) = serde_yaml_ng::from_slice::<serde_yaml_ng::Value>(payload) else {
            return Self::default();
        };
        let text = |key: &str| value.get(key).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
        Self {
            name: JobName::parse(&text("name")).ok(),
            namespace: Namespace::parse(&text("namespace")).ok(),
        }
    }
}

/// `My Job.yaml` is `my-job`.
fn name_from(path: &Path) -> Option<JobName> {
    if path.as_os_str() == "-" {
        return None;
    }
    let stem = path.file_stem()?.to_str()?;
    let dashed: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let short: String = dashed.trim_matches('-').chars().take(NAME_BYTES_MAX).collect();
    JobName::parse(short.trim_end_matches('-')).ok()
}

/// A headline and every error with its line.
pub fn render_errors(file: &str, payload: &[u8], errors: &[FieldError]) -> String {
    let shown = show_errors(file, &String::from_utf8_lossy(payload), errors);
    format!("{file} is not a job file that can run:\n{}", shown.trim_end())
}

pub fn print_schema() -> anyhow::Result<u8> {
    print_value(Format::Json, &json_schema())?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_files() {
        let name = |path: &str| name_from(Path::new(path)).map(|name| name.to_string());
        assert_eq!(name("a/digits.yaml"), Some("digits".into()));
        assert_eq!(name("My Job_2.train.json"), Some("my-job-2-train".into()));
        assert_eq!(name("-"), None);
        assert_eq!(name("___.yaml"), None);
    }
}
