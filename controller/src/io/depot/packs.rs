//! The form of a pack: chunks as frames, one behind the other, and at its end a table of them. Verifies what it is
//! given; touches no file.
//!
//! Each frame is encrypted for itself, so that one can be read alone, and the table, which is the frames' headers once
//! more, as the frame behind the last. At the end, in clear, stand their number (u32, little endian) and a magic word.

use berth_protocol::chunk::{self, ChunkError, ChunkId, Encoding, FRAME_HEADER_BYTES, Frame};
use berth_protocol::limits::CHUNK_BYTES_MAX;
use bytes::Bytes;

use super::cipher::{Cipher, TAG_BYTES};

const MAGIC: &[u8; 8] = b"berthpk2";
/// As nodes compress.
const ZSTD_LEVEL: i32 = 1;
/// Number and magic word.
pub const TAIL_BYTES: usize = 4 + MAGIC.len();

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error("at byte {at}: {source}")]
    Frame { at: usize, source: ChunkError },
    #[error("chunk {0} cannot be decompressed")]
    Compressed(ChunkId),
    #[error("chunk {expected} is {found} in truth: it was damaged on its way, send it again")]
    Digest { expected: ChunkId, found: ChunkId },
    #[error("chunk {0} is only said to differ from another")]
    Difference(ChunkId),
    #[error("its table is damaged")]
    Table,
}

/// Where a chunk lies among others: the whole frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub id: ChunkId,
    /// How many frames are before it.
    pub nth: u32,
    /// In clear.
    pub offset: u32,
    /// In clear.
    pub length: u32,
    /// Of the content, decoded.
    pub content_bytes: u32,
}

impl Span {
    /// Where it lies in a pack, encrypted: its first byte, and their number.
    pub fn place(&self) -> (u64, u64) {
        let tag = TAG_BYTES as u64;
        (u64::from(self.offset) + u64::from(self.nth) * tag, u64::from(self.length) + tag)
    }
}

/// The frames that `bytes` are, each held against its id.
pub fn verify(bytes: &[u8]) -> Result<Vec<Span>, PackError> {
    let (mut spans, mut at, mut content) = (Vec::new(), 0, Vec::with_capacity(CHUNK_BYTES_MAX));
    while at < bytes.len() {
        let (frame, length) = Frame::read(&bytes[at..]).map_err(|source| PackError::Frame { at, source })?;
        let found = ChunkId::of(decode(&frame, &mut content)?);
        if found != frame.id {
            return Err(PackError::Digest { expected: frame.id, found });
        }
        spans.push(Span {
            id: frame.id,
            nth: small(spans.len()),
            offset: small(at),
            length: small(length),
            content_bytes: frame.content_bytes,
        });
        at += length;
    }
    Ok(spans)
}

/// A pack is bounded far below 4 GiB.
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// A frame's content; `buffer` is where it lies when it had to be decompressed.
pub fn decode<'a>(frame: &Frame<'a>, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], PackError> {
    match frame.encoding {
        Encoding::Raw => Ok(frame.bytes),
        Encoding::Zstd => {
            buffer.resize(frame.content_bytes as usize, 0);
            let decoded = zstd::bulk::decompress_to_buffer(frame.bytes, buffer);
            match decoded {
                Ok(length) if length == buffer.len() => Ok(buffer),
                _ => Err(PackError::Compressed(frame.id)),
            }
        }
        Encoding::Xor => Err(PackError::Difference(frame.id)),
    }
}

/// The frame of a chunk that `frame` says the difference of, from the chunk that `base` is the frame of.
pub fn apply(frame: &[u8], base: &[u8]) -> Result<Vec<u8>, PackError> {
    let read = |bytes| Frame::read(bytes).map_err(|source| PackError::Frame { at: 0, source });
    let ((frame, _), (base, _)) = (read(frame)?, read(base)?);
    let (_, difference) = frame.difference().ok_or(PackError::Difference(frame.id))?;
    let mut content = Vec::new();
    let packed = Frame { encoding: Encoding::Zstd, bytes: difference, ..frame };
    decode(&packed, &mut content)?;
    chunk::xor(&mut content, decode(&base, &mut Vec::new())?);
    let found = ChunkId::of(&content);
    if found != frame.id {
        return Err(PackError::Digest { expected: frame.id, found });
    }
    let packed = zstd::bulk::compress(&content, ZSTD_LEVEL).ok();
    let packed = packed.filter(|packed| packed.len() < content.len());
    let (encoding, bytes) =
        packed.as_ref().map_or((Encoding::Raw, &content), |packed| (Encoding::Zstd, packed));
    let mut out = Vec::with_capacity(FRAME_HEADER_BYTES + bytes.len());
    Frame { encoding, bytes, ..frame }.write(&mut out);
    Ok(out)
}

/// A pack as it lies in the bucket.
pub struct Pack {
    /// By what it holds and for whom: who does not know the key learns nothing by it.
    pub id: ChunkId,
    pub bytes: Bytes,
    pub spans: Vec<Span>,
}

impl Pack {
    /// Of those frames of `bytes` that `spans` names.
    pub fn seal(cipher: &Cipher, bytes: &[u8], spans: &[Span]) -> Self {
        let frame = |span: &Span| &bytes[span.offset as usize..][..span.length as usize];
        let id = cipher.name(spans.iter().map(frame));
        let file = cipher.file(id.as_bytes());
        let length: usize =
            spans.iter().map(|span| span.length as usize + TAG_BYTES + FRAME_HEADER_BYTES).sum();
        let mut pack = Vec::with_capacity(length + TAG_BYTES + TAIL_BYTES);
        let (mut placed, mut offset) = (Vec::with_capacity(spans.len()), 0);
        for (nth, span) in (0..).zip(spans) {
            file.seal(nth.into(), frame(span), &mut pack);
            placed.push(Span { nth, offset, ..*span });
            offset += span.length;
        }
        let table: Vec<u8> =
            spans.iter().flat_map(|span| &frame(span)[..FRAME_HEADER_BYTES]).copied().collect();
        file.seal(spans.len() as u64, &table, &mut pack);
        pack.extend_from_slice(&small(spans.len()).to_le_bytes());
        pack.extend_from_slice(MAGIC);
        Self { id, bytes: pack.into(), spans: placed }
    }
}

/// A frame out of the pack `id`; none: it is not what was put there.
pub fn open(cipher: &Cipher, id: &ChunkId, span: &Span, sealed: Vec<u8>) -> Option<Vec<u8>> {
    cipher.file(id.as_bytes()).open(span.nth.into(), sealed)
}

/// How long a pack's table is with its tail, by its last `TAIL_BYTES`.
pub fn table_bytes(tail: &[u8]) -> Result<usize, PackError> {
    Ok(count(tail)? as usize * FRAME_HEADER_BYTES + TAG_BYTES + TAIL_BYTES)
}

fn count(tail: &[u8]) -> Result<u32, PackError> {
    let (count, magic) = tail.split_first_chunk::<4>().ok_or(PackError::Table)?;
    if magic == MAGIC { Ok(u32::from_le_bytes(*count)) } else { Err(PackError::Table) }
}

/// The spans that the table of the pack `id` tells, whose frames take `frames_bytes`.
pub fn read_table(
    cipher: &Cipher,
    id: &ChunkId,
    table: &[u8],
    frames_bytes: u64,
) -> Result<Vec<Span>, PackError> {
    let (sealed, tail) = table.split_last_chunk::<TAIL_BYTES>().ok_or(PackError::Table)?;
    let opened = cipher.file(id.as_bytes()).open(count(tail)?.into(), sealed.to_vec());
    let headers = opened.ok_or(PackError::Table)?;
    let (mut spans, mut offset) = (Vec::new(), 0_u32);
    for (nth, header) in (0..).zip(headers.chunks(FRAME_HEADER_BYTES)) {
        let number = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk::<4>()?));
        let id = ChunkId::from_bytes(*header.first_chunk::<32>().ok_or(PackError::Table)?);
        let (content_bytes, bytes) = number(33).zip(number(37)).ok_or(PackError::Table)?;
        let length = bytes.checked_add(FRAME_HEADER_BYTES as u32).ok_or(PackError::Table)?;
        spans.push(Span { id, nth, offset, length, content_bytes });
        offset = offset.checked_add(length).ok_or(PackError::Table)?;
    }
    let end = spans.last().map_or(0, |last| last.place().0 + last.place().1);
    if end == frames_bytes { Ok(spans) } else { Err(PackError::Table) }
}

#[cfg(test)]
mod tests {
    use super::super::cipher::Keys;
    use super::*;
    use berth_protocol::ids::Namespace;
    use proptest::prelude::*;

    fn cipher() -> Cipher {
        Keys::of(&[1; 32]).cipher(&Namespace::default_namespace())
    }

    fn frames(contents: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        for content in contents {
            let squeezed = zstd::bulk::compress(content, 1).unwrap();
            let raw = squeezed.len() >= content.len();
            let (encoding, bytes) = if raw { (Encoding::Raw, content) } else { (Encoding::Zstd, &squeezed) };
            let content_bytes = u32::try_from(content.len()).unwrap();
            Frame { id: ChunkId::of(content), encoding, content_bytes, bytes }.write(&mut out);
        }
        out
    }

    fn contents() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let random = proptest::collection::vec(any::<u8>(), 1..200);
        let dull = (any::<u8>(), 1..5000_usize).prop_map(|(byte, n)| vec![byte; n]);
        proptest::collection::vec(prop_oneof![random, dull], 1..10)
    }

    proptest! {
        #[test]
        fn a_pack_holds_what_it_was_given(contents in contents(), skip: prop::sample::Index) {
            let bytes = frames(&contents);
            let mut spans = verify(&bytes).unwrap();
            prop_assert_eq!(spans.len(), contents.len());
            spans.remove(skip.index(contents.len()));
            let Pack { id, bytes: pack, spans: placed } = Pack::seal(&cipher(), &bytes, &spans);
            let table = table_bytes(&pack[pack.len() - TAIL_BYTES..]).unwrap();
            let (sealed, table) = pack.split_at(pack.len() - table);
            let read = read_table(&cipher(), &id, table, sealed.len() as u64).unwrap();
            prop_assert_eq!(&read, &placed);
            for span in placed {
                let (at, length) = span.place();
                let sealed = sealed[at as usize..][..length as usize].to_vec();
                let frame = open(&cipher(), &id, &span, sealed.clone()).unwrap();
                prop_assert_eq!(verify(&frame).unwrap()[0].id, span.id);
                // Nowhere else, and for nobody else.
                let elsewhere = Span { nth: span.nth + 1, ..span };
                prop_assert_eq!(open(&cipher(), &id, &elsewhere, sealed.clone()), None);
                prop_assert_eq!(open(&cipher(), &span.id, &span, sealed.clone()), None);
                let other = Keys::of(&[1; 32]).cipher(&Namespace::parse("other").unwrap());
                prop_assert_eq!(open(&other, &id, &span, sealed), None);
            }
        }

        #[test]
        fn a_pack_shows_nothing_of_what_it_holds(contents in contents()) {
            let bytes = frames(&contents);
            let spans = verify(&bytes).unwrap();
            let sealed = Pack::seal(&cipher(), &bytes, &spans);
            for content in contents.iter().filter(|content| content.len() >= 8) {
                for shown in [&content[..8], &ChunkId::of(content).as_bytes()[..8]] {
                    prop_assert!(!sealed.bytes.windows(8).any(|window| window == shown));
                }
            }
            prop_assert_ne!(sealed.id, ChunkId::of(&bytes));
            let other = Keys::of(&[2; 32]).cipher(&Namespace::default_namespace());
            prop_assert_ne!(sealed.id, Pack::seal(&other, &bytes, &spans).id);
        }

        #[test]
        fn a_difference_is_made_the_chunk_again_or_refused(
            old in proptest::collection::vec(any::<u8>(), 1..3000),
            new in proptest::collection::vec(any::<u8>(), 1..3000),
            shared in 0..3000_usize,
            at: prop::sample::Index,
        ) {
            let shared = shared.min(old.len()).min(new.len() - 1);
            let new = [&old[..shared], &new[shared..]].concat();
            let mut difference = new.clone();
            chunk::xor(&mut difference, &old);
            let base = ChunkId::of(&old);
            let body = [base.as_bytes(), &zstd::bulk::compress(&difference, 1).unwrap()[..]].concat();
            let frame = Frame {
                id: ChunkId::of(&new),
                encoding: Encoding::Xor,
                content_bytes: new.len() as u32,
                bytes: &body,
            };
            let (mut said, base) = (Vec::new(), frames(&[old]));
            frame.write(&mut said);
            // Where nothing is saved by it, it is no frame: its difference is as long as it is.
            prop_assume!(Frame::read(&said).is_ok());
            let applied = apply(&said, &base).unwrap();
            let spans = verify(&applied).unwrap();
            prop_assert_eq!(spans.iter().map(|span| span.id).collect::<Vec<_>>(), [frame.id]);
            prop_assert!(matches!(verify(&said), Err(PackError::Difference(_))));
            let at = FRAME_HEADER_BYTES + ChunkId::BYTES + at.index(body.len() - ChunkId::BYTES);
            said[at] ^= 1;
            // Some of zstd's bits mean nothing.
            if let Ok(applied) = apply(&said, &base) {
                prop_assert_eq!(verify(&applied).unwrap()[0].id, frame.id);
            }
        }

        #[test]
        fn no_damage_goes_unseen(contents in contents(), at: prop::sample::Index, bit in 0..8_u8) {
            let mut bytes = frames(&contents);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            match verify(&bytes) {
                Err(_) => {}
                // A compressed form may be another of the same content, and nothing else.
                Ok(spans) => {
                    let ids: Vec<ChunkId> = contents.iter().map(|content| ChunkId::of(content)).collect();
                    prop_assert_eq!(spans.iter().map(|span| span.id).collect::<Vec<_>>(), ids);
                }
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), frames in 0..300_u64) {
            let id = ChunkId::of(b"");
            let _ = (verify(&bytes), apply(&bytes, &bytes), table_bytes(&bytes), read_table(&cipher(), &id, &bytes, frames));
        }
    }
}
