//! Bytes of a payload to a message and back, with the bounds of `limits`. Nothing else serialises for the wire.
//!
//! What users exchange with the controller is plain JSON, in what they say with a signature around it where they have a key
//! (`request`). What the controller and agents exchange travels in an
//! envelope, `{"v":1,"body":…}`, whose further fields, `key` and `sig`, say whose the body is, and `delegation` why a
//! controller's key may say so. The cores read
//! bodies; signing and verifying is what is done last on the way out and first on the way in.
//!
//! Within a version fields are added, never changed or taken away: what is not known is passed over, what is not there
//! has a default, and an event that is not known changes nothing. `tests/recorded` has each version's messages.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::delegation::Delegation;
use crate::ids::ClusterName;
use crate::limits::{ENVELOPE_BYTES_MAX, MESSAGE_BYTES_MAX, SPEC_BYTES_MAX};
use crate::sign::{PublicKey, Signature, Signer};
use crate::topic::{NodeTopic, Topic};

/// The version of the envelope that this program writes.
pub const ENVELOPE_VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("the message is {bytes} bytes long, at most {max} are allowed")]
    TooLarge { bytes: usize, max: usize },
    #[error("the message is not the JSON expected: {0}")]
    Malformed(serde_json::Error),
    #[error(
        "the message is of version {0} of the protocol between controller and agents, this program speaks version {ENVELOPE_VERSION}: upgrade the older of the two"
    )]
    Version(u32),
    #[error("the message is unsigned")]
    Unsigned,
    #[error("the message's signature is not of this message on this topic")]
    Forged,
    #[error("the message is not text (UTF-8)")]
    NotText,
    #[error("the message cannot be written as JSON: {0}")]
    Unwritable(serde_json::Error),
}

impl CodecError {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            CodecError::TooLarge { .. } => "oversized",
            CodecError::Malformed(_) => "malformed",
            CodecError::Version(_) => "version",
            CodecError::Unsigned => "unsigned",
            CodecError::Forged => "forged",
            CodecError::NotText => "malformed",
            CodecError::Unwritable(_) => "unwritable",
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    v: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<PublicKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sig: Option<Signature>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delegation: Option<Delegation>,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// Who has signed a message, and what that key shows for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub by: PublicKey,
    /// Whether the root has said so is not known yet.
    pub delegation: Option<Delegation>,
}

/// The largest body that may travel on `topic`.
pub(crate) fn bytes_max(topic: &Topic) -> usize {
    match topic {
        Topic::Node { kind: NodeTopic::Spec, .. } => SPEC_BYTES_MAX + ENVELOPE_BYTES_MAX,
        _ => MESSAGE_BYTES_MAX,
    }
}

pub(crate) fn bounded(bytes: usize, max: usize) -> Result<(), CodecError> {
    if bytes > max { Err(CodecError::TooLarge { bytes, max }) } else { Ok(()) }
}

/// Writes `message` for `topic`.
pub fn encode<T: Serialize>(topic: &Topic, message: &T) -> Result<Vec<u8>, CodecError> {
    let body = serde_json::value::to_raw_value(message).map_err(CodecError::Unwritable)?;
    bounded(body.get().len(), bytes_max(topic))?;
    if !matches!(topic, Topic::Node { .. }) {
        return Ok(Box::<str>::from(body).into_string().into_bytes());
    }
    let envelope = Envelope { v: ENVELOPE_VERSION, key: None, sig: None, delegation: None, body: &body };
    serde_json::to_vec(&envelope).map_err(CodecError::Unwritable)
}

/// Reads what came on `topic`.
pub fn decode<T: DeserializeOwned>(topic: &Topic, payload: &[u8]) -> Result<T, CodecError> {
    if !matches!(topic, Topic::Node { .. }) {
        bounded(payload.len(), bytes_max(topic))?;
        return serde_json::from_slice(payload).map_err(CodecError::Malformed);
    }
    serde_json::from_str(opened(topic, payload)?.body.get()).map_err(CodecError::Malformed)
}

fn opened<'a>(topic: &Topic, payload: &'a [u8]) -> Result<Envelope<'a>, CodecError> {
    bounded(payload.len(), bytes_max(topic) + ENVELOPE_BYTES_MAX)?;
    let envelope: Envelope = serde_json::from_slice(payload).map_err(CodecError::Malformed)?;
    if envelope.v != ENVELOPE_VERSION {
        return Err(CodecError::Version(envelope.v));
    }
    bounded(envelope.body.get().len(), bytes_max(topic))?;
    Ok(envelope)
}

/// Signs an encoded message between controller and agents.
pub fn sign(signer: &Signer, topic: &Topic, payload: &[u8]) -> Result<Vec<u8>, CodecError> {
    let plain: Envelope = serde_json::from_slice(payload).map_err(CodecError::Malformed)?;
    let signed = Envelope {
        key: Some(signer.public()),
        sig: Some(signer.sign(topic, plain.body.get())),
        delegation: signer.delegation().cloned(),
        ..plain
    };
    serde_json::to_vec(&signed).map_err(CodecError::Unwritable)
}

/// The key that has signed what came on `topic`, to be asked before it is decoded. Whether that is a key which may say so,
/// others know.
pub fn verify(cluster: &ClusterName, topic: &Topic, payload: &[u8]) -> Result<Signed, CodecError> {
    let Envelope { key: Some(by), sig: Some(sig), delegation, body, .. } = opened(topic, payload)? else {
        return Err(CodecError::Unsigned);
    };
    let signed = Signed { by, delegation };
    if by.has_signed(cluster, topic, body.get(), &sig) { Ok(signed) } else { Err(CodecError::Forged) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ClientId, NodeId};

    fn lease() -> Topic {
        Topic::node(&NodeId::parse("n1").unwrap(), NodeTopic::Lease)
    }

    #[test]
    fn node_messages_travel_in_an_envelope_and_users_read_plain_json() {
        assert_eq!(encode(&lease(), &[1, 2]).unwrap(), br#"{"v":1,"body":[1,2]}"#);
        assert_eq!(decode::<Vec<u32>>(&lease(), br#"{"v":1,"body":[1,2]}"#).unwrap(), [1, 2]);
        let reply = Topic::QueryReply { client: ClientId::parse("c").unwrap() };
        assert_eq!(encode(&reply, &[1, 2]).unwrap(), b"[1,2]");
        assert_eq!(decode::<Vec<u32>>(&reply, b"[1,2]").unwrap(), [1, 2]);
    }

    #[test]
    fn bounds_and_versions() {
        let kind = |payload: &[u8]| decode::<Vec<u32>>(&lease(), payload).unwrap_err().kind();
        assert_eq!(kind(br#"{"v":2,"body":[]}"#), "version");
        assert_eq!(kind(b"{}"), "malformed");
        assert_eq!(kind(b"\xff"), "malformed");
        assert_eq!(kind(&vec![b' '; MESSAGE_BYTES_MAX + ENVELOPE_BYTES_MAX + 1]), "oversized");
        assert_eq!(encode(&lease(), &"x".repeat(MESSAGE_BYTES_MAX)).unwrap_err().kind(), "oversized");
    }
}
