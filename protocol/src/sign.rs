//! Who says what between the controller and agents: Ed25519 signatures (RFC 8032), and the mandate by which a cluster's
//! root lets a key speak for its controller. No key's secret half can be printed or serialised.
//!
//! A signature covers the cluster, the whole topic and the body as it was sent, each behind its length: what is said to
//! one node, on one topic, in one cluster, is said nowhere else. That it is not old the body says itself, by term and
//! generation, session and seq.

use std::fmt;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::ids::ClusterName;
use crate::topic::Topic;
use crate::units::Timestamp;

/// What else a key may sign can never be taken for these.
const MESSAGE: &[u8] = b"berth message 1";
const MANDATE: &[u8] = b"berth mandate 1";

pub const SEED_BYTES: usize = 32;
const KEY_BYTES: usize = 32;
const SIGNATURE_BYTES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {digits} hexadecimal digits")]
pub struct NotHex {
    what: &'static str,
    digits: usize,
}

fn unhex<const N: usize>(what: &'static str, text: &str) -> Result<[u8; N], NotHex> {
    let bad = NotHex { what, digits: 2 * N };
    let digit = |byte: u8| char::from(byte).to_digit(16).filter(|_| !byte.is_ascii_uppercase());
    if text.len() != 2 * N {
        return Err(bad);
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let (high, low) = (digit(pair[0]).ok_or(bad)?, digit(pair[1]).ok_or(bad)?);
        *byte = (high << 4 | low) as u8;
    }
    Ok(bytes)
}

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// The public half of a key, 64 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; KEY_BYTES]);

impl PublicKey {
    pub fn parse(text: &str) -> Result<Self, NotHex> {
        unhex("a key", text).map(Self)
    }

    /// Of these very bytes, whether or not anybody has the secret half.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// So much of it as tells it from others, for people.
    pub fn short(&self) -> String {
        self.to_string()[..16].to_owned()
    }

    pub(crate) fn has_signed(
        &self,
        cluster: &ClusterName,
        topic: &Topic,
        body: &str,
        sig: &Signature,
    ) -> bool {
        self.verifies(&message(cluster, topic, body), sig)
    }

    fn verifies(&self, text: &[u8], signature: &Signature) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(text, &signature.0).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Self, NotHex> {
        Self::parse(&text)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// 128 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signature([u8; SIGNATURE_BYTES]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl TryFrom<String> for Signature {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Self, NotHex> {
        unhex("a signature", &text).map(Self)
    }
}

impl From<Signature> for String {
    fn from(signature: Signature) -> Self {
        format!("{signature:?}")
    }
}

/// A key with its secret half.
pub struct Key(Ed25519KeyPair);

impl Key {
    /// The key that these random bytes are. They are its secret.
    pub fn from_seed(seed: &[u8; SEED_BYTES]) -> Self {
        match Ed25519KeyPair::from_seed_unchecked(seed) {
            Ok(pair) => Self(pair),
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
        bytes.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(bytes)
    }

    fn sign(&self, text: &[u8]) -> Signature {
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes.copy_from_slice(self.0.sign(text).as_ref());
        Signature(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the secret of {}", self.public())
    }
}

/// Bytes that no other parts give: each behind its length.
fn joined(parts: &[&[u8]]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(parts.iter().map(|part| 8 + part.len()).sum());
    for part in parts {
        joined.extend_from_slice(&(part.len() as u64).to_le_bytes());
        joined.extend_from_slice(part);
    }
    joined
}

fn message(cluster: &ClusterName, topic: &Topic, body: &str) -> Vec<u8> {
    joined(&[MESSAGE, topic.render(cluster).as_bytes(), body.as_bytes()])
}

/// The root's word that a key speaks for the cluster's controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mandate {
    /// Grows with each that the root gives.
    pub serial: u64,
    /// Those below are void from now on.
    pub valid_from: u64,
    pub not_after: Timestamp,
    sig: Signature,
}

/// Why a mandate is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MandateError {
    #[error("it is not this cluster's root that let it speak for the controller")]
    Root,
    #[error("its mandate ended at {0}: give the controller a new one")]
    Ended(Timestamp),
    #[error("its mandate was taken back")]
    Void,
}

impl Mandate {
    /// `root` lets `key` speak.
    pub fn give(
        root: &Key,
        cluster: &ClusterName,
        key: &PublicKey,
        serial: u64,
        valid_from: u64,
        not_after: Timestamp,
    ) -> Self {
        let sig = root.sign(&Self::text(cluster, key, serial, valid_from, not_after));
        Self { serial, valid_from, not_after, sig }
    }

    fn text(
        cluster: &ClusterName,
        key: &PublicKey,
        serial: u64,
        valid_from: u64,
        not_after: Timestamp,
    ) -> Vec<u8> {
        let numbers = [serial, valid_from, not_after.0].map(u64::to_le_bytes);
        joined(&[MANDATE, cluster.as_str().as_bytes(), &key.0, &numbers[0], &numbers[1], &numbers[2]])
    }

    /// May `key` speak by it, now, where mandates below `valid_from` are known to be void?
    pub fn check(
        &self,
        root: &PublicKey,
        cluster: &ClusterName,
        key: &PublicKey,
        valid_from: u64,
        now: Timestamp,
    ) -> Result<(), MandateError> {
        let text = Self::text(cluster, key, self.serial, self.valid_from, self.not_after);
        if !root.verifies(&text, &self.sig) {
            return Err(MandateError::Root);
        }
        if self.serial < valid_from.max(self.valid_from) {
            return Err(MandateError::Void);
        }
        if self.not_after < now { Err(MandateError::Ended(self.not_after)) } else { Ok(()) }
    }
}

/// Signs what one program says.
#[derive(Debug)]
pub struct Signer {
    cluster: ClusterName,
    key: Key,
    mandate: Option<Mandate>,
}

impl Signer {
    /// Of an agent, or of a controller that is its own root.
    pub fn new(cluster: ClusterName, key: Key) -> Self {
        Self { cluster, key, mandate: None }
    }

    /// Of a controller that the cluster's root has let speak.
    pub fn mandated(cluster: ClusterName, key: Key, mandate: Mandate) -> Self {
        Self { cluster, key, mandate: Some(mandate) }
    }

    pub fn public(&self) -> PublicKey {
        self.key.public()
    }

    /// For whose topics its signatures are.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    pub(crate) fn mandate(&self) -> Option<&Mandate> {
        self.mandate.as_ref()
    }

    pub(crate) fn sign(&self, topic: &Topic, body: &str) -> Signature {
        self.key.sign(&message(&self.cluster, topic, body))
    }
}

/// Who has signed a message. Whether that is who may say it, others know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    pub key: PublicKey,
    pub mandate: Option<Mandate>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode, sign, verify};
    use crate::ids::NodeId;
    use crate::topic::NodeTopic;

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
        let seed = unhex("", "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap();
        let key = Key::from_seed(&seed);
        let public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";
        assert_eq!(key.public().to_string(), public);
        assert_eq!(PublicKey::parse(public), Ok(key.public()));
        let signature = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                         085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";
        assert_eq!(String::from(key.sign(&[0x72])), signature);
        for bad in ["", "3d40", &public.to_uppercase(), &public.replace('3', "+")] {
            assert!(PublicKey::parse(bad).is_err(), "{bad}");
        }
        assert!(!format!("{key:?}").contains("4ccd08"), "a secret is not printed");
    }

    #[test]
    fn a_message_is_its_authors_at_one_place_alone() {
        let signer = Signer::new(cluster("lab"), key(1));
        let lease = topic("a1", NodeTopic::Lease);
        let plain = encode(&lease, &[1, 2]).unwrap();
        let signed = sign(&signer, &lease, &plain).unwrap();
        assert_eq!(decode::<Vec<u32>>(&lease, &signed).unwrap(), [1, 2]);
        let author = verify(&cluster("lab"), &lease, &signed).unwrap();
        assert_eq!(author, Author { key: key(1).public(), mandate: None });

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
        let other = key(2).public().to_string();
        assert_eq!(
            refused(&cluster("lab"), &lease, &changed(&key(1).public().to_string(), &other)),
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
    fn a_mandate_is_for_one_key_one_cluster_and_a_time() {
        let (root, speaker) = (key(1), key(2).public());
        let mandate = |serial, valid_from| {
            Mandate::give(&root, &cluster("lab"), &speaker, serial, valid_from, Timestamp(1_000))
        };
        let check = |mandate: &Mandate, name: &str, key: &PublicKey, valid_from, now| {
            mandate.check(&root.public(), &cluster(name), key, valid_from, Timestamp(now))
        };
        let first = mandate(3, 2);
        assert_eq!(check(&first, "lab", &speaker, 0, 1_000), Ok(()));
        assert_eq!(check(&first, "lab", &speaker, 3, 1_000), Ok(()));
        assert_eq!(check(&first, "lab", &speaker, 4, 1_000), Err(MandateError::Void));
        assert_eq!(check(&first, "lab", &speaker, 0, 1_001), Err(MandateError::Ended(Timestamp(1_000))));
        assert_eq!(check(&first, "other", &speaker, 0, 0), Err(MandateError::Root));
        assert_eq!(check(&first, "lab", &key(3).public(), 0, 0), Err(MandateError::Root));
        assert_eq!(check(&mandate(3, 4), "lab", &speaker, 0, 0), Err(MandateError::Void));
        for changed in [
            Mandate { serial: 9, ..first.clone() },
            Mandate { valid_from: 0, ..first.clone() },
            Mandate { not_after: Timestamp(9_999), ..first.clone() },
        ] {
            assert_eq!(check(&changed, "lab", &speaker, 0, 0), Err(MandateError::Root));
        }
        let own = Mandate::give(&key(2), &cluster("lab"), &speaker, 9, 0, Timestamp(1_000));
        assert_eq!(check(&own, "lab", &speaker, 0, 0), Err(MandateError::Root));
    }

    #[test]
    fn a_controllers_mandate_travels_with_what_it_says() {
        let mandate =
            Mandate::give(&key(1), &cluster("lab"), &key(2).public(), 7, u64::MAX, Timestamp(u64::MAX));
        let signer = Signer::mandated(cluster("lab"), key(2), mandate.clone());
        let spec = topic("a1", NodeTopic::Spec);
        let plain = encode(&spec, &"x".repeat(crate::limits::SPEC_BYTES_MAX)).unwrap();
        let signed = sign(&signer, &spec, &plain).unwrap();
        let author = verify(&cluster("lab"), &spec, &signed).unwrap();
        assert_eq!(author, Author { key: key(2).public(), mandate: Some(mandate) });
        assert!(signed.len() - plain.len() < crate::limits::ENVELOPE_BYTES_MAX);
        assert!(decode::<String>(&spec, &signed).is_ok());
    }
}
