//! What a user says to the controller with a signature around it: who says it, when, on which topic of which cluster.
//!
//! `{"v":1,"at":…,"key":…,"sig":…,"body":"…"}` takes the place of the plain payload, which is its `body`, a string. The
//! signature is Ed25519 over `berth request 1`, the whole topic, `at` in decimal digits (milliseconds since 1970) and the
//! body's bytes, each behind its length in 8 bytes, little-endian. No job file, command or question begins as it does.

use serde::{Deserialize, Serialize};

use crate::codec::{CodecError, bounded, bytes_max};
use crate::ids::{ClusterName, Digest, RequestId};
use crate::limits::ENVELOPE_BYTES_MAX;
use crate::sign::{Key, PublicKey, Signature, framed};
use crate::topic::{JobTopic, Topic};
use crate::units::Timestamp;

/// What a key signs here, it signs for nothing else.
const REQUEST: &[u8] = b"berth request 1";
const BEGIN: &[u8] = br#"{"v":"#;
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    v: u32,
    at: Timestamp,
    key: PublicKey,
    sig: Signature,
    body: String,
}

/// What was signed, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub by: PublicKey,
    pub at: Timestamp,
    /// Another one of each signature.
    pub id: RequestId,
    pub body: Vec<u8>,
}

/// Is this where users speak to the controller?
pub fn is_request(topic: &Topic) -> bool {
    matches!(
        topic,
        Topic::Job { kind: JobTopic::Submit | JobTopic::Command, .. } | Topic::QueryRequest { .. }
    )
}

fn text(cluster: &ClusterName, topic: &Topic, at: Timestamp, body: &str) -> Vec<u8> {
    let (topic, at) = (topic.render(cluster), at.0.to_string());
    framed(&[REQUEST, topic.as_bytes(), at.as_bytes(), body.as_bytes()])
}

/// # Errors
/// It is not text, or too long for a message.
pub fn sign(
    key: &Key,
    cluster: &ClusterName,
    topic: &Topic,
    at: Timestamp,
    body: &[u8],
) -> Result<Vec<u8>, CodecError> {
    let body = std::str::from_utf8(body).map_err(|_| CodecError::NotText)?.to_owned();
    let sig = key.sign(&text(cluster, topic, at, &body));
    let signed = serde_json::to_vec(&Envelope { v: VERSION, at, key: key.public(), sig, body });
    let signed = signed.map_err(CodecError::Unwritable)?;
    bounded(signed.len(), bytes_max(topic) + ENVELOPE_BYTES_MAX)?;
    Ok(signed)
}

/// None: it is plain.
///
/// # Errors
/// It is signed, and not so that it says who says this here.
pub fn open(cluster: &ClusterName, topic: &Topic, payload: &[u8]) -> Result<Option<Signed>, CodecError> {
    if !payload.starts_with(BEGIN) || !is_request(topic) {
        return Ok(None);
    }
    bounded(payload.len(), bytes_max(topic) + ENVELOPE_BYTES_MAX)?;
    let Envelope { v, at, key, sig, body } =
        serde_json::from_slice(payload).map_err(CodecError::Malformed)?;
    if v != VERSION {
        return Err(CodecError::Version(v));
    }
    bounded(body.len(), bytes_max(topic))?;
    if !key.has_signed_text(&text(cluster, topic, at, &body), &sig) {
        return Err(CodecError::Forged);
    }
    let id = format!("sig-{}", &Digest::of(&sig.0).hex()[..32]);
    let id = RequestId::parse(&id).map_err(|_| CodecError::Forged)?;
    Ok(Some(Signed { by: key, at, id, body: body.into_bytes() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ClientId, JobName, Namespace};

    const AT: Timestamp = Timestamp(1_700_000_000_123);
    const FILE: &[u8] = b"kind: Job\nname: \"j\"\n";

    fn cluster(name: &str) -> ClusterName {
        ClusterName::parse(name).unwrap()
    }

    fn submit(namespace: &str) -> Topic {
        let (namespace, job) = (Namespace::parse(namespace).unwrap(), JobName::parse("j").unwrap());
        Topic::job(&namespace, &job, JobTopic::Submit)
    }

    #[test]
    fn a_request_says_who_when_and_where() {
        let key = Key::from_seed(&[1; 32]);
        let signed = sign(&key, &cluster("lab"), &submit("a"), AT, FILE).unwrap();
        let opened = open(&cluster("lab"), &submit("a"), &signed).unwrap().unwrap();
        assert_eq!((opened.by, opened.at, &opened.body[..]), (key.public(), AT, FILE));

        let refused = |cluster: &ClusterName, topic: &Topic, bytes: &[u8]| {
            open(cluster, topic, bytes).unwrap_err().kind()
        };
        assert_eq!(refused(&cluster("other"), &submit("a"), &signed), "forged");
        assert_eq!(refused(&cluster("lab"), &submit("b"), &signed), "forged");
        let text = String::from_utf8(signed).unwrap();
        let changed = |from: &str, to: &str| {
            assert!(text.contains(from), "{from} in {text}");
            refused(&cluster("lab"), &submit("a"), text.replace(from, to).as_bytes())
        };
        assert_eq!(changed("123", "124"), "forged");
        assert_eq!(changed("kind: Job", "kind: job"), "forged");
        let other = Key::from_seed(&[2; 32]).public();
        assert_eq!(changed(&format!("{:?}", key.public()), &format!("{other:?}")), "forged");
        assert_eq!(changed("\"v\":1", "\"v\":2"), "version");
        assert_eq!(changed("\"body\"", "\"body\":\"x\",\"body\""), "malformed");
        // No other than the first is told twice.
        let later = sign(&key, &cluster("lab"), &submit("a"), Timestamp(AT.0 + 1), FILE).unwrap();
        assert_ne!(open(&cluster("lab"), &submit("a"), &later).unwrap().unwrap().id, opened.id);
    }

    #[test]
    fn what_is_not_signed_is_plain() {
        let query = Topic::QueryRequest { client: ClientId::parse("c1").unwrap() };
        for plain in [FILE, br#"{"kind":"Job"}"#, b"", b"\xff"] {
            assert_eq!(open(&cluster("lab"), &submit("a"), plain).unwrap(), None);
            assert_eq!(open(&cluster("lab"), &query, plain).unwrap(), None);
        }
    }
}
