//! Owns the reading and verifying of cosign's signatures by key; pure, contacts nobody.
//!
//! cosign stores a signature as an image of its own, beside the one that is signed, under the tag `sha256-<digest>.sig`. Each
//! of its layers is a payload (containers/image's "simple signing" JSON), whose signature is an annotation of that layer.

use std::collections::BTreeMap;

use berth_protocol::policy::ImagePattern;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use super::auth::base64;
use super::manifest::{self, Descriptor, Document};
use super::{Digest, ImageRef};

/// Signatures of one image that are looked at.
const SIGNATURES_MAX: usize = 16;
/// A payload names one image: some 250 bytes, and what its signer adds.
const PAYLOAD_BYTES_MAX: u64 = 64 << 10;
const SIGNATURE_BYTES_MAX: usize = 1024;
const PAYLOAD_KIND: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const PAYLOAD_TYPE: &str = "cosign container image signature";

/// SubjectPublicKeyInfo (RFC 5280) up to the key's own bytes: of a point of P-256, uncompressed (RFC 5480), and of Ed25519
/// (RFC 8410). Both have one encoding in DER.
const P256_HEAD: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P256_BYTES: usize = 65;
const ED25519_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const ED25519_BYTES: usize = 32;

/// A public key that images may be signed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CosignKey {
    kind: Kind,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Kind {
    P256,
    Ed25519,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    #[error(
        "it is not a public key in PEM: `-----BEGIN PUBLIC KEY-----`, as `cosign generate-key-pair` writes cosign.pub"
    )]
    NotPem,
    #[error("only ECDSA on P-256, as cosign makes them, and Ed25519 are supported")]
    Unsupported,
}

impl CosignKey {
    /// # Errors
    /// It is no public key, or of another kind.
    pub fn from_pem(text: &str) -> Result<Self, BadKey> {
        let body = text.trim().strip_prefix("-----BEGIN PUBLIC KEY-----").ok_or(BadKey::NotPem)?;
        let body = body.strip_suffix("-----END PUBLIC KEY-----").ok_or(BadKey::NotPem)?;
        let der = base64(&body.split_ascii_whitespace().collect::<String>()).ok_or(BadKey::NotPem)?;
        let of = |kind, head: &[u8], bytes| {
            let key = der.strip_prefix(head).filter(|key| key.len() == bytes)?;
            Some(Self { kind, bytes: key.to_vec() })
        };
        let ed25519 = || of(Kind::Ed25519, &ED25519_HEAD, ED25519_BYTES);
        of(Kind::P256, &P256_HEAD, P256_BYTES).or_else(ed25519).ok_or(BadKey::Unsupported)
    }

    /// What records say of whose signature was found.
    pub fn id(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    fn verifies(&self, payload: &[u8], signature: &[u8]) -> bool {
        let verified = match self.kind {
            Kind::P256 => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.bytes).verify(payload, signature)
            }
            Kind::Ed25519 => UnparsedPublicKey::new(&ED25519, &self.bytes).verify(payload, signature),
        };
        verified.is_ok()
    }
}

/// Whose signature images of these names must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    pub images: Vec<ImagePattern>,
    pub key: CosignKey,
}

/// The keys of which one must have signed the image; none: it needs no signature.
pub(super) fn keys_for(signers: &[Signer], image: &ImageRef) -> Vec<CosignKey> {
    let asks = |signer: &&Signer| signer.images.iter().any(|pattern| pattern.matches(image));
    signers.iter().filter(asks).map(|signer| signer.key.clone()).collect()
}

/// Where signatures of the image, or index, with that digest are found.
pub(super) fn tag(image: &Digest) -> String {
    format!("sha256-{}.sig", image.hex())
}

/// A signature that is offered, and not yet believed.
pub(super) struct Offer {
    pub payload: Descriptor,
    pub signature: Vec<u8>,
}

/// What the image under such a tag offers.
///
/// # Errors
/// It is not such an image.
pub(super) fn offers(document: &[u8]) -> Result<Vec<Offer>, String> {
    let Document::Manifest { layers, .. } = manifest::parse(document)? else {
        return Err("its signatures are an index".to_owned());
    };
    let offer = |payload: Descriptor| {
        let annotations: Option<&BTreeMap<String, String>> = payload.annotations.as_ref();
        let signature = annotations?.get(SIGNATURE).filter(|text| text.len() <= 2 * SIGNATURE_BYTES_MAX)?;
        let signature = base64(signature)?;
        let small = payload.size <= PAYLOAD_BYTES_MAX && signature.len() <= SIGNATURE_BYTES_MAX;
        (payload.media_type == PAYLOAD_KIND && small).then_some(Offer { payload, signature })
    };
    Ok(layers.into_iter().filter_map(offer).take(SIGNATURES_MAX).collect())
}

/// Which of the keys has signed the image with one of these digests by that payload.
///
/// # Errors
/// Why it is no signature of it, to be read behind `it is not signed:`.
pub(super) fn signed_by(
    keys: &[CosignKey],
    images: &[Digest],
    payload: &[u8],
    signature: &[u8],
) -> Result<Digest, String> {
    // Nothing of it is read before it is known whose it is.
    let Some(key) = keys.iter().find(|key| key.verifies(payload, signature)) else {
        return Err("the signature that it has is by none of the keys that the policy names for it, or not of its payload".into());
    };
    let signed = image_of(payload)?;
    match images.contains(&signed) {
        true => Ok(key.id()),
        false => Err(format!("the signature that it has is of another image, {signed}")),
    }
}

/// The image that a payload names.
pub(super) fn image_of(payload: &[u8]) -> Result<Digest, String> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        image: Image,
        #[serde(rename = "type")]
        kind: String,
    }
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "docker-manifest-digest")]
        digest: Digest,
    }
    let Payload { critical } = serde_json::from_slice(payload)
        .map_err(|error| format!("what was signed is no payload of cosign's: {error}"))?;
    match critical.kind == PAYLOAD_TYPE {
        true => Ok(critical.image.digest),
        false => Err("what was signed is not an image".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

    fn pem(der: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in der.chunks(3) {
            let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte))
                << (8 * (3 - three.len()));
            for digit in 0..=three.len() {
                text.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]));
            }
        }
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }

    fn payload(kind: &str, image: &Digest) -> Vec<u8> {
        format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"r"}},"image":{{"docker-manifest-digest":"{image}"}},"type":"{kind}"}},"optional":null}}"#
        )
        .into_bytes()
    }

    #[test]
    fn keys_are_of_two_kinds() {
        let ed25519: Vec<u8> = ED25519_HEAD.into_iter().chain([7; 32]).collect();
        let key = CosignKey::from_pem(&pem(&ed25519)).unwrap();
        assert_eq!((key.kind, key.bytes.len()), (Kind::Ed25519, 32));
        let longer: Vec<u8> = ed25519.iter().copied().chain([0]).collect();
        assert_eq!(CosignKey::from_pem(&pem(&longer)), Err(BadKey::Unsupported));
        assert_eq!(CosignKey::from_pem(&pem(&[])), Err(BadKey::Unsupported));
        for text in ["", "-----BEGIN PUBLIC KEY-----", "-----BEGIN PUBLIC KEY-----!-----END PUBLIC KEY-----"]
        {
            assert_eq!(CosignKey::from_pem(text), Err(BadKey::NotPem), "{text}");
        }
    }

    #[test]
    fn a_signature_is_of_one_image_by_one_key() {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pair.as_ref(), &random).unwrap();
        let der: Vec<u8> = P256_HEAD.into_iter().chain(pair.public_key().as_ref().iter().copied()).collect();
        let key = CosignKey::from_pem(&pem(&der)).unwrap();
        let other = CosignKey { kind: Kind::Ed25519, bytes: vec![7; 32] };
        let (image, index) = (Digest::of(b"image"), Digest::of(b"index"));
        let check = |keys: &[CosignKey], payload: &[u8], flip: bool| {
            let mut signature = pair.sign(&random, payload).unwrap().as_ref().to_vec();
            if flip {
                *signature.last_mut().unwrap() ^= 1;
            }
            signed_by(keys, &[index, image], payload, &signature)
        };
        let (good, keys) = (payload(PAYLOAD_TYPE, &image), [other.clone(), key.clone()]);
        assert_eq!(check(&keys, &good, false), Ok(key.id()));
        for (keys, payload, flip, says) in [
            (&keys[..1], good.clone(), false, "none of the keys"),
            (&[], good.clone(), false, "none of the keys"),
            (&keys, good, true, "none of the keys"),
            (&keys, payload(PAYLOAD_TYPE, &Digest::of(b"other")), false, "of another image"),
            (&keys, payload("atomic container signature", &image), false, "not an image"),
            (&keys, b"[]".to_vec(), false, "no payload"),
        ] {
            let why = check(keys, &payload, flip).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
    }
}
