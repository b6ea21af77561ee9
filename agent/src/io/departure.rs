//! Whether the machine is about to go: a notice in a file or at an address that a cloud gives, and whether systemd is
//! shutting the machine down. Looks and tells; what follows is the core's.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use berth_protocol::units::{Millis, Timestamp};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode};
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::timeout;

use super::{clock, http};
use crate::core::Event;
use crate::core::departure::Leaves;

const LOOK_AT_FILE: Duration = Duration::from_secs(1);
/// What clouds ask for.
const LOOK_AT_URL: Duration = Duration::from_secs(5);
const ANSWER_MAX: Duration = Duration::from_secs(3);
const NOTICE_BYTES_MAX: usize = 16 * 1024;
const NO_ADDRESS: &str = "it is not of the form http://host[:port]/path";

/// Where notices come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is there, or it is not.
    File(PathBuf),
    /// `http://…`: answered with 200 and something to say, or not.
    Url(String),
}

/// The text of a notice: none where it says that there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Until the machine goes, where the notice says so.
    pub within: Option<Millis>,
    pub text: String,
}

/// Reads what a file or an answer holds: a time (RFC 3339), a span such as `90s`, JSON with either as `time`, anything
/// else; `FALSE`, `NONE` and nothing in an answer say that there is no notice.
pub fn read(text: &str, now: Timestamp) -> Notice {
    let text = text.trim();
    let json: Option<Value> = serde_json::from_str(text).ok();
    let time = json.as_ref().and_then(|json| json["time"].as_str()).unwrap_or(text);
    let at = Timestamp::parse(time).ok().map(|at| at.since(now));
    Notice { within: at.or_else(|| Millis::parse(time).ok()), text: text.to_owned() }
}

fn says_no(text: &str) -> bool {
    let text = text.trim();
    text.is_empty() || ["false", "none"].iter().any(|no| text.eq_ignore_ascii_case(no))
}

/// `None`: no notice. An error: it cannot be told.
async fn look(source: &Source) -> Result<Option<Notice>, String> {
    let text = match source {
        Source::File(path) => match read_file(path) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.to_string()),
        },
        Source::Url(url) => {
            let answer = timeout(ANSWER_MAX, get(url)).await.map_err(|_| "no answer in time".to_owned())?;
            answer?.filter(|text| !says_no(text))
        }
    };
    Ok(text.map(|text| read(&text, clock::now().wall)))
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(NOTICE_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The answer's text, where it is one.
async fn get(url: &str) -> Result<Option<String>, String> {
    let (authority, path) = http::split(url).ok_or(NO_ADDRESS)?;
    let mut sender = http::connect(authority).await.map_err(|error| error.to_string())?;
    // Two clouds' servers answer only who says by a header that he is no browser led astray.
    let request = Request::get(path)
        .header("host", authority)
        .header("metadata-flavor", "Google")
        .header("metadata", "true")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND | StatusCode::NO_CONTENT => return Ok(None),
        status => return Err(format!("it answers {status}")),
    }
    let body = Limited::new(answer.into_body(), NOTICE_BYTES_MAX).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    Ok(Some(String::from_utf8_lossy(&body).into_owned()))
}

impl Source {
    /// # Errors
    /// The text is no address that can be asked.
    pub fn url(text: &str) -> Result<Self, &'static str> {
        http::split(text).map(|_| Self::Url(text.to_owned())).ok_or(NO_ADDRESS)
    }

    fn name(&self) -> String {
        match self {
            Source::File(path) => path.display().to_string(),
            Source::Url(url) => url.clone(),
        }
    }
}

/// Looks for as long as the agent lives, and tells what changes; `within` is what a notice without a time means.
pub async fn watch(source: Source, within: Millis, events: UnboundedSender<Event>) {
    let every = if matches!(source, Source::File(_)) { LOOK_AT_FILE } else { LOOK_AT_URL };
    let (mut last, mut warned) = (None, false);
    loop {
        match look(&source).await {
            // The text stays as it is while what is left of the time shrinks.
            Ok(found) if found.as_ref().map(|notice| &notice.text) == last.as_ref() => warned = false,
            Ok(found) => {
                last = found.as_ref().map(|notice| notice.text.clone());
                let leaves = found.map(|notice| Leaves {
                    why: format!("notice in {}", source.name()),
                    at: clock::now().boot.plus(notice.within.unwrap_or(within)),
                });
                if events.send(Event::Leaving(leaves)).is_err() {
                    return;
                }
            }
            Err(why) if !std::mem::replace(&mut warned, true) => {
                tracing::warn!("cannot tell whether there is a notice in {}: {why}", source.name());
            }
            Err(_) => {}
        }
        tokio::time::sleep(every).await;
    }
}

/// Is systemd taking the machine down? Otherwise it is the agent alone that is to end.
pub async fn machine_stops() -> bool {
    let asked = Command::new("systemctl")
        .arg("is-system-running")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let answer = timeout(ANSWER_MAX, asked).await;
    answer.is_ok_and(|output| output.is_ok_and(|output| output.stdout.trim_ascii() == b"stopping"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_as_clouds_write_them() {
        let now = Timestamp::parse("2026-01-01T08:20:00Z").unwrap();
        for (text, within) in [
            ("2026-01-01T08:22:00Z", Some(120_000)),
            (r#"{"action": "terminate", "time": "2026-01-01T08:22:00Z"}"#, Some(120_000)),
            (r#"{"time": "30s"}"#, Some(30_000)),
            ("90s\n", Some(90_000)),
            ("TRUE", None),
            ("", None),
            // Past: at once.
            ("2025-01-01T00:00:00Z", Some(0)),
        ] {
            assert_eq!(read(text, now).within, within.map(Millis), "{text}");
        }
        for text in ["", " FALSE\n", "false", "NONE"] {
            assert!(says_no(text), "{text}");
        }
        assert!(!says_no("TRUE") && !says_no("{}"));
    }
}
