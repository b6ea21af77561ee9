//! The form of a pod's log, on the node's disk, in the depot and on the wire: records, numbered from 1 within an
//! epoch. A record is what one read of a container's pipe brought, cut behind a line's end where possible.
//!
//! In files a record is a line `seq ms stream container bytes` and then that many bytes and a line feed, so that
//! a person can read it and a torn end is recognised.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerName, Epoch};
use crate::limits::LOG_RECORD_BYTES_MAX;
use crate::units::{Timestamp, rfc3339};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One record in a file, borrowing its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    pub seq: u64,
    pub at: Timestamp,
    pub stream: Stream,
    pub container: ContainerName,
    pub bytes: &'a [u8],
}

/// A record as agents publish it on `logs/…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogMessage {
    pub epoch: Epoch,
    pub container: ContainerName,
    pub stream: Stream,
    pub seq: u64,
    /// When it was read; agents of before this field do not say.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub at: Option<Timestamp>,
    /// Bytes that are not UTF-8 appear as U+FFFD.
    pub text: String,
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The file ends within the record: it is being written, or was torn by a crash.
    #[error("the record is cut off")]
    Torn,
    #[error("the record's header is not one: `{0}`")]
    Header(String),
}

/// The longest header: five fields.
const HEADER_BYTES_MAX: usize = 20 + 20 + 1 + crate::limits::NAME_BYTES_MAX + 6 + 5;

impl Record<'_> {
    /// Appends the record to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let stream = match self.stream {
            Stream::Stdout => 'o',
            Stream::Stderr => 'e',
        };
        let mut header = String::with_capacity(HEADER_BYTES_MAX);
        // Writing to a String cannot fail.
        let _ =
            writeln!(header, "{} {} {stream} {} {}", self.seq, self.at.0, self.container, self.bytes.len());
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(self.bytes);
        out.push(b'\n');
    }

    pub fn message(&self, epoch: Epoch) -> LogMessage {
        let text = String::from_utf8_lossy(self.bytes).into_owned();
        let (container, at) = (self.container.clone(), Some(self.at));
        LogMessage { epoch, container, stream: self.stream, seq: self.seq, at, text }
    }
}

/// Reads the record that `bytes` begins with; returns it and the length it took.
pub fn read_record(bytes: &[u8]) -> Result<(Record<'_>, usize), RecordError> {
    let head = &bytes[..bytes.len().min(HEADER_BYTES_MAX)];
    let Some(end) = head.iter().position(|b| *b == b'\n') else {
        return Err(if bytes.len() < HEADER_BYTES_MAX {
            RecordError::Torn
        } else {
            RecordError::Header(String::from_utf8_lossy(&head[..32]).into_owned())
        });
    };
    let bad = || RecordError::Header(String::from_utf8_lossy(&head[..end]).into_owned());
    let header = std::str::from_utf8(&head[..end]).map_err(|_| bad())?;
    let fields: Vec<&str> = header.split(' ').collect();
    let [seq, ms, stream, container, length] = fields[..] else { return Err(bad()) };
    let length: usize = length.parse().map_err(|_| bad())?;
    if length > LOG_RECORD_BYTES_MAX {
        return Err(bad());
    }
    let stream = match stream {
        "o" => Stream::Stdout,
        "e" => Stream::Stderr,
        _ => return Err(bad()),
    };
    let record = Record {
        seq: seq.parse().map_err(|_| bad())?,
        at: Timestamp(ms.parse().map_err(|_| bad())?),
        stream,
        container: ContainerName::parse(container).map_err(|_| bad())?,
        bytes: bytes.get(end + 1..end + 1 + length).ok_or(RecordError::Torn)?,
    };
    match bytes.get(end + 1 + length) {
        Some(b'\n') => Ok((record, end + 2 + length)),
        Some(_) => Err(bad()),
        None => Err(RecordError::Torn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_go_to_bytes_and_back_and_a_cut_is_seen(
            seq: u64, at: u64, err: bool, bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0..400usize,
        ) {
            let stream = if err { Stream::Stderr } else { Stream::Stdout };
            let container = ContainerName::parse("main").unwrap();
            let record = Record { seq, at: Timestamp(at), stream, container, bytes: &bytes };
            let mut file = Vec::new();
            record.write(&mut file);
            prop_assert_eq!(read_record(&file), Ok((record, file.len())));
            if cut < file.len() {
                prop_assert_eq!(read_record(&file[..cut]), Err(RecordError::Torn));
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_record(&bytes);
        }
    }
}
