//! Chunks: what checkpoints are made of, named by the BLAKE3 digest of their content; and frames, the form in which
//! they travel between agents and the depot and lie in its packs.
//!
//! The depot's part of it over HTTP, below its URL, with `Authorization: Bearer TOKEN`. The agent exchanges its own
//! token for one that is good for one pod's saving or restoring alone, and hands only that to whoever transfers:
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /v1/grants` (the node's token) | `GrantRequest`, JSON | 200 `DepotAccess`, JSON; 403 where the pod is not that node's |
//! | `POST /v1/chunks/lacking` (to save) | ids, 32 bytes each, at most `CHUNKS_ASKED_MAX` | 200 those of them that the depot lacks, likewise |
//! | `POST /v1/chunks` (to save) | frames, at most `PACK_BYTES_MAX`, also with every difference applied | 201 once they are on disk; 400 where one is not what its id says, 409 where the depot lacks what one differs from: none is kept |
//! | `PUT /v1/checkpoints/{64 hex digits}` (to save) | the manifest's bytes | 201, or 200 where it was there; 409 where chunks lack: their ids, 32 bytes each |
//! | `GET /v1/checkpoints/{64 hex digits}` (to load) | | 200 the manifest's bytes |
//! | `POST /v1/checkpoints/{64 hex digits}/chunks` (to load) | ids, at most `CHUNKS_FETCHED_MAX` | 200 frames in the order asked; 404 where one is not the checkpoint's |
//!
//! A node that serves what it keeps (`ChunkServer`) knows the last of them alone, for checkpoints whose chunks it has.
//!
//! 401: the token has lapsed or is another's; ask for a new grant. 429 and 503: later. 507: the namespace's quota is
//! full, or the disk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, Epoch, PodId};
use crate::limits::CHUNK_BYTES_MAX;

/// The BLAKE3 digest of a chunk's content, uncompressed; printed as 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChunkId([u8; 32]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    #[error("`{0}` is not a chunk's digest: expected 64 hexadecimal digits")]
    NotAnId(String),
    #[error("{0} bytes are no list of digests, which take 32 bytes each")]
    NotIds(usize),
    #[error("the frame is cut off")]
    Torn,
    #[error("the frame's header is not one: {0}")]
    Header(&'static str),
}

impl ChunkId {
    pub const BYTES: usize = 32;

    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    pub fn from_bytes(blake3: [u8; 32]) -> Self {
        Self(blake3)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn parse(text: &str) -> Result<Self, ChunkError> {
        let bad = || ChunkError::NotAnId(text.chars().take(80).collect());
        // One spelling only: lowercase.
        if text.len() != 64 || text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        blake3::Hash::from_hex(text).map(|hash| Self(*hash.as_bytes())).map_err(|_| bad())
    }

    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.hex())
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl TryFrom<String> for ChunkId {
    type Error = ChunkError;
    fn try_from(text: String) -> Result<Self, ChunkError> {
        Self::parse(&text)
    }
}

impl From<ChunkId> for String {
    fn from(id: ChunkId) -> String {
        id.hex()
    }
}

/// Ids one behind the other.
pub fn write_ids<'a>(ids: impl IntoIterator<Item = &'a ChunkId>) -> Vec<u8> {
    ids.into_iter().flat_map(|id| id.0).collect()
}

pub fn read_ids(bytes: &[u8]) -> Result<Vec<ChunkId>, ChunkError> {
    let (ids, rest) = bytes.as_chunks::<32>();
    if rest.is_empty() {
        Ok(ids.iter().map(|id| ChunkId(*id)).collect())
    } else {
        Err(ChunkError::NotIds(bytes.len()))
    }
}

/// How a frame's bytes are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    Raw,
    /// One zstd frame.
    Zstd,
    /// What it differs by from another chunk, whose id comes first: the exclusive or of the two, the other cut or filled with
    /// zeros to its length, as one zstd frame. To the depot alone.
    Xor,
}

/// A chunk as it travels and lies: its id, the encoding, both lengths, the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    pub id: ChunkId,
    pub encoding: Encoding,
    /// Of the content, once decoded: at most `CHUNK_BYTES_MAX`.
    pub content_bytes: u32,
    /// As they come: encoded.
    pub bytes: &'a [u8],
}

/// id, encoding, length of the content, length of the bytes, both little endian.
pub const FRAME_HEADER_BYTES: usize = 32 + 1 + 4 + 4;

impl<'a> Frame<'a> {
    pub fn header(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut header = [0; FRAME_HEADER_BYTES];
        header[..32].copy_from_slice(&self.id.0);
        header[32] = match self.encoding {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
            Encoding::Xor => 2,
        };
        header[33..37].copy_from_slice(&self.content_bytes.to_le_bytes());
        // A frame that exists is within its bounds.
        header[37..].copy_from_slice(&u32::try_from(self.bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        header
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.header());
        out.extend_from_slice(self.bytes);
    }

    /// Reads the frame that `bytes` begins with; returns it and the length it took. The content is not looked at:
    /// whoever decodes it compares its digest with the id.
    pub fn read(bytes: &'a [u8]) -> Result<(Self, usize), ChunkError> {
        let (header, rest) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>().ok_or(ChunkError::Torn)?;
        let number =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut id = [0; 32];
        id.copy_from_slice(&header[..32]);
        let encoding = match header[32] {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            2 => Encoding::Xor,
            _ => return Err(ChunkError::Header("an unknown encoding")),
        };
        let (content_bytes, length) = (number(33), number(37) as usize);
        if content_bytes == 0 || content_bytes as usize > CHUNK_BYTES_MAX {
            return Err(ChunkError::Header("a chunk is of 1 byte to 1 MiB"));
        }
        // Encoding that does not pay is not used.
        let fits = match encoding {
            Encoding::Raw => length == content_bytes as usize,
            Encoding::Zstd => length < content_bytes as usize,
            Encoding::Xor => (ChunkId::BYTES..ChunkId::BYTES + content_bytes as usize).contains(&length),
        };
        if !fits {
            return Err(ChunkError::Header("its lengths do not fit each other"));
        }
        let bytes = rest.get(..length).ok_or(ChunkError::Torn)?;
        Ok((Self { id: ChunkId(id), encoding, content_bytes, bytes }, FRAME_HEADER_BYTES + length))
    }
}

impl Frame<'_> {
    /// What an `Xor` frame differs from, and by what.
    pub fn difference(&self) -> Option<(ChunkId, &[u8])> {
        let (base, difference) = self.bytes.split_first_chunk::<32>()?;
        (self.encoding == Encoding::Xor).then_some((ChunkId(*base), difference))
    }
}

/// `content`, or its difference from `base` made content again: the same both ways.
pub fn xor(content: &mut [u8], base: &[u8]) {
    for (byte, other) in content.iter_mut().zip(base) {
        *byte ^= other;
    }
}

/// What an agent asks for, with its node's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrantRequest {
    pub pod: PodId,
    pub epoch: Epoch,
    #[serde(flatten)]
    pub what: GrantFor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum GrantFor {
    /// Chunks, and one manifest of this pod and epoch.
    Save,
    /// This checkpoint, which the pod's order names in `from`.
    Load { checkpoint: Digest },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_match_the_paper() {
        // The reference vectors' empty input.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(ChunkId::of(b"").hex(), empty);
        assert_eq!(ChunkId::parse(empty), Ok(ChunkId::of(b"")));
        for bad in ["", "af13", &empty.to_uppercase(), &"g".repeat(64)] {
            assert!(ChunkId::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn grants_have_a_form() {
        let pod = crate::ids::PodId::parse("abc-0").unwrap();
        let checkpoint = Digest::of(b"");
        let load = GrantRequest { pod: pod.clone(), epoch: Epoch(2), what: GrantFor::Load { checkpoint } };
        let text = format!(r#"{{"pod":"abc-0","epoch":2,"what":"load","checkpoint":"{checkpoint}"}}"#);
        assert_eq!(serde_json::to_string(&load).unwrap(), text);
        assert_eq!(serde_json::from_str::<GrantRequest>(&text).unwrap(), load);
        let save = GrantRequest { pod, epoch: Epoch(2), what: GrantFor::Save };
        let text = r#"{"pod":"abc-0","epoch":2,"what":"save"}"#;
        assert_eq!(serde_json::to_string(&save).unwrap(), text);
        assert_eq!(serde_json::from_str::<GrantRequest>(text).unwrap(), save);
    }

    proptest! {
        #[test]
        fn frames_go_to_bytes_and_back_and_a_cut_is_seen(
            content in proptest::collection::vec(any::<u8>(), 1..300), zstd: bool, more in 1..300u32, cut in 0..400usize,
        ) {
            let encoding = if zstd { Encoding::Zstd } else { Encoding::Raw };
            let difference = [ChunkId::of(b"base").as_bytes(), &content[..]].concat();
            let differs = Frame {
                id: ChunkId::of(&content),
                encoding: Encoding::Xor,
                content_bytes: content.len() as u32 + more,
                bytes: &difference,
            };
            let mut bytes = Vec::new();
            differs.write(&mut bytes);
            prop_assert_eq!(Frame::read(&bytes), Ok((differs, bytes.len())));
            prop_assert_eq!(differs.difference(), Some((ChunkId::of(b"base"), &content[..])));
            let content_bytes = content.len() as u32 + if zstd { more } else { 0 };
            let frame = Frame { id: ChunkId::of(&content), encoding, content_bytes, bytes: &content };
            let mut bytes = Vec::new();
            frame.write(&mut bytes);
            prop_assert_eq!(Frame::read(&bytes), Ok((frame, bytes.len())));
            prop_assert_eq!(frame.difference(), None);
            if cut < bytes.len() {
                prop_assert_eq!(Frame::read(&bytes[..cut]), Err(ChunkError::Torn));
            }
        }

        #[test]
        fn ids_go_to_bytes_and_back(ids: Vec<[u8; 32]>, cut in 1..32usize) {
            let ids: Vec<ChunkId> = ids.into_iter().map(ChunkId::from_bytes).collect();
            let mut bytes = write_ids(&ids);
            prop_assert_eq!(read_ids(&bytes), Ok(ids.clone()));
            for id in &ids {
                prop_assert_eq!(ChunkId::parse(&id.hex()), Ok(*id));
            }
            bytes.extend(vec![0; cut]);
            prop_assert_eq!(read_ids(&bytes), Err(ChunkError::NotIds(bytes.len())));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::read(&bytes);
        }
    }
}
