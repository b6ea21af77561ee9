//! Who says what between the controller and agents: Ed25519 signatures (RFC 8032). No key's secret half can be printed or
//! serialised.
//!
//! A signature covers the cluster, the whole topic and the body as it was sent, each behind its length: what is said to
//! one node, on one topic, in one cluster, is said nowhere else. That it is not old the body says itself, by term and
//! generation, session and seq.

use std::fmt;
use std::str::FromStr;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::delegation::Delegation;
use crate::hex;
use crate::ids::ClusterName;
use crate::topic::Topic;

/// What else a key may sign can never be taken for a message.
const MESSAGE: &[u8] = b"berth message 1";

pub const SEED_BYTES: usize = 32;
const KEY_BYTES: usize = 32;
const SIGNATURE_BYTES: usize = 64;
const FINGERPRINT_BYTES: usize = 16;

/// The public half of a key, 64 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PublicKey(#[serde(with = "hex::text")] [u8; KEY_BYTES]);

impl PublicKey {
    /// Of these very bytes, whether or not anybody has the secret half.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// So much of it as tells it from others, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..8])
    }

    /// For people to compare.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut bytes = [0; FINGERPRINT_BYTES];
        bytes.copy_from_slice(&self.0[..FINGERPRINT_BYTES]);
        Fingerprint(bytes)
    }

    /// As certificates have it (RFC 8410, 4): a SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> [u8; 44] {
        let mut der = *b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00................................";
        der[44 - KEY_BYTES..].copy_from_slice(&self.0);
        der
    }

    /// The key of a certificate, where it is of this kind.
    pub fn from_spki(der: &[u8]) -> Option<Self> {
        let key = Self(der.get(44 - KEY_BYTES..)?.try_into().ok()?);
        (key.spki() == der).then_some(key)
    }

    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    pub(crate) fn has_signed(
        &self,
        cluster: &ClusterName,
        topic: &Topic,
        body: &str,
        signature: &Signature,
    ) -> bool {
        self.has_signed_text(&signed_text(cluster, topic, body), signature)
    }

    pub(crate) fn has_signed_text(&self, text: &[u8], signature: &Signature) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(text, &signature.0).is_ok()
    }
}

/// So much of a key as people compare, by eye or ear: 128 bits, eight groups of four hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; FINGERPRINT_BYTES]);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no fingerprint: eight groups of four digits or letters from a to f, with `-` between them")]
pub struct FingerprintError;

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.0.as_chunks::<2>().0.iter().map(|group| hex::encode(group));
        f.write_str(&groups.collect::<Vec<_>>().join("-"))
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let read = hex::decode(&text.replace('-', "")).map(Self);
        read.filter(|read| read.to_string() == text).ok_or(FingerprintError)
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;

    fn try_from(text: String) -> Result<Self, FingerprintError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

/// 128 hexadecimal digits as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Signature(#[serde(with = "hex::text")] pub(crate) [u8; SIGNATURE_BYTES]);

/// A key with its secret half.
pub struct Key {
    pair: Ed25519KeyPair,
    seed: [u8; SEED_BYTES],
}

impl Key {
    /// The key that these random bytes are. They are its secret.
    pub fn from_seed(seed: &[u8; SEED_BYTES]) -> Self {
        match Ed25519KeyPair::from_seed_unchecked(seed) {
            Ok(pair) => Self { pair, seed: *seed },
            // RFC 8032, 5.1.5: any 32 bytes are a secret key, and only their number is checked.
            Err(_) => unreachable!("a seed has {SEED_BYTES} bytes"),
        }
    }

    /// The key for one purpose among several that one secret serves.
    pub fn derived(secret: &[u8; SEED_BYTES], purpose: &str) -> Self {
        Self::from_seed(&Sha256::new().chain_update(purpose).chain_update(secret).finalize().into())
    }

    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; KEY_BYTES];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(bytes)
    }

    /// The secret half as PKCS #8 has it (RFC 8410, 7), DER.
    pub fn pkcs8(&self) -> [u8; 48] {
        let mut der = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20................................";
        der[48 - SEED_BYTES..].copy_from_slice(&self.seed);
        der
    }

    pub(crate) fn sign(&self, text: &[u8]) -> Signature {
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes.copy_from_slice(self.pair.sign(text).as_ref());
        Signature(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the secret of {:?}", self.public())
    }
}

fn signed_text(cluster: &ClusterName, topic: &Topic, body: &str) -> Vec<u8> {
    framed(&[MESSAGE, topic.render(cluster).as_bytes(), body.as_bytes()])
}

/// Bytes that no other parts give: each behind its length.
pub(crate) fn framed(parts: &[&[u8]]) -> Vec<u8> {
    let mut text = Vec::with_capacity(parts.iter().map(|part| 8 + part.len()).sum());
    for part in parts {
        text.extend_from_slice(&(part.len() as u64).to_le_bytes());
        text.extend_from_slice(part);
    }
    text
}

/// Signs what one program says.
#[derive(Debug)]
pub struct Signer {
    cluster: ClusterName,
    key: Key,
    delegation: Option<Delegation>,
}

impl Signer {
    pub fn new(cluster: ClusterName, key: Key) -> Self {
        Self { cluster, key, delegation: None }
    }

    /// Shows beside each signature why its key may sign.
    pub fn delegated(cluster: ClusterName, key: Key, delegation: Delegation) -> Self {
        Self { cluster, key, delegation: Some(delegation) }
    }

    pub fn delegation(&self) -> Option<&Delegation> {
        self.delegation.as_ref()
    }

    pub fn public(&self) -> PublicKey {
        self.key.public()
    }

    /// For whose topics its signatures are.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    pub(crate) fn sign(&self, topic: &Topic, body: &str) -> Signature {
        self.key.sign(&signed_text(&self.cluster, topic, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode, sign, verify};
    use crate::ids::NodeId;
    use crate::topic::NodeTopic;
    use crate::units::{Millis, Timestamp};

    fn cluster(name: &str) -> ClusterName {
        ClusterName::parse(name).unwrap()
    }

    fn topic(node: &str, kind: NodeTopic) -> Topic {
        Topic::node(&NodeId::parse(node).unwrap(), kind)
    }

    fn key(n: u8) -> Key {
        Key::from_seed(&[n; SEED_BYTES])
    }

    /// RFC 8032, 7.1, test 2.
    #[test]
    fn keys_are_those_of_the_rfc() {
        let seed = hex::decode("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap();
        let key = Key::from_seed(&seed);
        let public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";
        assert_eq!(format!("{:?}", key.public()), public);
        let signature = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                         085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";
        assert_eq!(hex::encode(&key.sign(&[0x72]).0), signature);
        let read = |text: &str| serde_json::from_value::<PublicKey>(text.into());
        assert_eq!(read(public).unwrap(), key.public());
        for bad in ["", "3d40", &public.to_uppercase(), &public.replace('3', "+")] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(!format!("{key:?}").contains("4ccd08"), "a secret is not printed");
        let fingerprint = key.public().fingerprint();
        assert_eq!(fingerprint.to_string(), "3d40-17c3-e843-895a-92b7-0aa7-4d1b-7ebc");
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        for bad in ["", "3d40", &public[..32], "3D40-17c3-e843-895a-92b7-0aa7-4d1b-7ebc"] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(FingerprintError), "{bad}");
        }
    }

    #[test]
    fn a_message_is_its_authors_at_one_place_alone() {
        let signer = Signer::new(cluster("lab"), key(1));
        let lease = topic("a1", NodeTopic::Lease);
        let plain = encode(&lease, &[1, 2]).unwrap();
        let signed = sign(&signer, &lease, &plain).unwrap();
        assert_eq!(decode::<Vec<u32>>(&lease, &signed).unwrap(), [1, 2]);
        assert_eq!(verify(&cluster("lab"), &lease, &signed).unwrap().by, key(1).public());

        let refused = |cluster: &ClusterName, topic: &Topic, bytes: &[u8]| {
            verify(cluster, topic, bytes).unwrap_err().kind()
        };
        assert_eq!(refused(&cluster("lab"), &lease, &plain), "unsigned");
        assert_eq!(refused(&cluster("other"), &lease, &signed), "forged");
        assert_eq!(refused(&cluster("lab"), &topic("a2", NodeTopic::Lease), &signed), "forged");
        assert_eq!(refused(&cluster("lab"), &topic("a1", NodeTopic::Desired), &signed), "forged");
        let text = String::from_utf8(signed).unwrap();
        let changed = |from: &str, to: &str| text.replace(from, to).into_bytes();
        assert_eq!(refused(&cluster("lab"), &lease, &changed("[1,2]", "[1,3]")), "forged");
        assert_eq!(refused(&cluster("lab"), &lease, &changed("[1,2]", "[1, 2]")), "forged");
        let other = format!("{:?}", key(2).public());
        assert_eq!(
            refused(&cluster("lab"), &lease, &changed(&format!("{:?}", key(1).public()), &other)),
            "forged"
        );
        assert_eq!(refused(&cluster("lab"), &lease, &changed("\"v\":1", "\"v\":2")), "version");
        // Of two bodies the one that is read is the one that is checked, or none is.
        assert_eq!(
            refused(&cluster("lab"), &lease, &changed("\"body\"", "\"body\":[9],\"body\"")),
            "malformed"
        );
    }

    #[test]
    fn the_envelope_has_room_for_a_signature() {
        let spec = topic("a1", NodeTopic::Spec);
        let plain = encode(&spec, &"x".repeat(crate::limits::SPEC_BYTES_MAX)).unwrap();
        let (lab, of, far) = (cluster("lab"), key(1).public(), Timestamp(u64::MAX / 2));
        let delegation = Delegation::new(&key(2), &lab, of, Some(u64::MAX - 1), far, Millis(1));
        let signer = Signer::delegated(lab.clone(), key(1), delegation.clone());
        let signed = sign(&signer, &spec, &plain).unwrap();
        assert!(signed.len() - plain.len() < crate::limits::ENVELOPE_BYTES_MAX);
        assert_eq!(verify(&lab, &spec, &signed).unwrap().delegation, Some(delegation));
        assert!(decode::<String>(&spec, &signed).is_ok());
    }
}
