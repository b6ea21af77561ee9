//! How checkpoints lie in the bucket: encrypted, each namespace's with a key of its own that is drawn from the store's
//! secret. Whoever reads the bucket alone reads no memory of a pod, and whoever writes to it is found out.
//!
//! A file has its own key, drawn from what it is named by; within it each piece has a number. As a name belongs to one
//! content, no key and number are used for two: AES-256-GCM wants that.

use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::Namespace;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// What a sealed piece is longer by.
pub const TAG_BYTES: usize = 16;
/// What keys are for, as BLAKE3's derivation wants it said.
const OF_NAMESPACE: &str = "berth 2026-11-30 checkpoints of a namespace";
const OF_NAMES: &str = "berth 2026-11-30 names of packs";
const OF_FILE: &str = "berth 2026-11-30 file of the depot";

/// All namespaces' keys.
pub struct Keys([u8; 32]);

/// One namespace's.
pub struct Cipher([u8; 32]);

/// One file's.
pub struct FileKey(LessSafeKey);

/// A key for `purpose` from another and what tells it from its siblings.
fn derive(purpose: &str, key: &[u8; 32], of: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key(purpose).update(key).update(of).finalize().as_bytes()
}

impl Keys {
    pub fn of(secret: &[u8; 32]) -> Self {
        Self(*secret)
    }

    pub fn cipher(&self, namespace: &Namespace) -> Cipher {
        Cipher(derive(OF_NAMESPACE, &self.0, namespace.to_string().as_bytes()))
    }
}

impl Cipher {
    /// A name for this content: the same for the same, and to be told from the content by nobody without the key.
    pub fn name<'a>(&self, content: impl Iterator<Item = &'a [u8]>) -> ChunkId {
        let mut hasher = blake3::Hasher::new_keyed(&derive(OF_NAMES, &self.0, b""));
        for piece in content {
            hasher.update(piece);
        }
        ChunkId::from_bytes(*hasher.finalize().as_bytes())
    }

    pub fn file(&self, name: &[u8; 32]) -> FileKey {
        match UnboundKey::new(&AES_256_GCM, &derive(OF_FILE, &self.0, name)) {
            Ok(key) => FileKey(LessSafeKey::new(key)),
            // FIPS 197: any 32 bytes are a key, and only their number is checked.
            Err(_) => unreachable!("BLAKE3 gives 32 bytes"),
        }
    }
}

fn nonce(nth: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&nth.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl FileKey {
    /// Writes the file's piece of this number, and its tag, behind `out`.
    pub fn seal(&self, nth: u64, piece: &[u8], out: &mut Vec<u8>) {
        let from = out.len();
        out.extend_from_slice(piece);
        match self.0.seal_in_place_separate_tag(nonce(nth), Aad::empty(), &mut out[from..]) {
            Ok(tag) => out.extend_from_slice(tag.as_ref()),
            // NIST SP 800-38D, 5.2.1.1: up to 64 GiB less 32 bytes.
            Err(_) => unreachable!("no file of the depot is of 64 GiB"),
        }
    }

    /// None: it is not this file's piece of this number, as it was sealed.
    pub fn open(&self, nth: u64, mut sealed: Vec<u8>) -> Option<Vec<u8>> {
        let length = self.0.open_in_place(nonce(nth), Aad::empty(), &mut sealed).ok()?.len();
        sealed.truncate(length);
        Some(sealed)
    }
}
