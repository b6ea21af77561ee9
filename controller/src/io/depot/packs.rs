//! The form of a pack: chunks as frames, one behind the other, and at its end a table of them. Verifies what it is
//! given; touches no file.
//!
//! The table is the headers of the frames once more, their number (u32, little endian) and a magic word.

use berth_protocol::chunk::{ChunkError, ChunkId, Encoding, FRAME_HEADER_BYTES, Frame};
use berth_protocol::limits::CHUNK_BYTES_MAX;
use bytes::Bytes;

const MAGIC: &[u8; 8] = b"berthpk1";
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
    #[error("its table is damaged")]
    Table,
}

/// Where a chunk lies within its pack: the whole frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub id: ChunkId,
    pub offset: u32,
    pub length: u32,
    /// Of the content, decoded.
    pub content_bytes: u32,
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
        spans.push(span(&frame, at, length));
        at += length;
    }
    Ok(spans)
}

fn span(frame: &Frame<'_>, offset: usize, length: usize) -> Span {
    // A pack is bounded far below 4 GiB.
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Span { id: frame.id, offset: small(offset), length: small(length), content_bytes: frame.content_bytes }
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
    }
}

/// A pack of those frames of `bytes` that `spans` names, and where they lie in it.
pub fn seal(bytes: &[u8], spans: &[Span]) -> (Bytes, Vec<Span>) {
    let frames: usize = spans.iter().map(|span| span.length as usize).sum();
    let mut pack = Vec::with_capacity(frames + spans.len() * FRAME_HEADER_BYTES + TAIL_BYTES);
    let mut placed = Vec::with_capacity(spans.len());
    for span in spans {
        let (from, to) = (span.offset as usize, (span.offset + span.length) as usize);
        placed.push(Span { offset: u32::try_from(pack.len()).unwrap_or(u32::MAX), ..*span });
        pack.extend_from_slice(&bytes[from..to]);
    }
    for span in spans {
        let from = span.offset as usize;
        pack.extend_from_slice(&bytes[from..from + FRAME_HEADER_BYTES]);
    }
    pack.extend_from_slice(&u32::try_from(spans.len()).unwrap_or(u32::MAX).to_le_bytes());
    pack.extend_from_slice(MAGIC);
    (pack.into(), placed)
}

/// How long a pack's table is with its tail, by its last `TAIL_BYTES`.
pub fn table_bytes(tail: &[u8]) -> Result<usize, PackError> {
    let (count, magic) = tail.split_first_chunk::<4>().ok_or(PackError::Table)?;
    if magic != MAGIC {
        return Err(PackError::Table);
    }
    Ok(u32::from_le_bytes(*count) as usize * FRAME_HEADER_BYTES + TAIL_BYTES)
}

/// The spans that a table tells, of a pack whose frames are `frames_bytes` long.
pub fn read_table(table: &[u8], frames_bytes: u64) -> Result<Vec<Span>, PackError> {
    let headers = table.len().checked_sub(TAIL_BYTES).ok_or(PackError::Table)?;
    let (mut spans, mut offset) = (Vec::new(), 0_u64);
    for header in table[..headers].chunks(FRAME_HEADER_BYTES) {
        let number = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk::<4>()?));
        let id = header.first_chunk::<32>().ok_or(PackError::Table)?;
        let (content_bytes, bytes) = number(33).zip(number(37)).ok_or(PackError::Table)?;
        let length = u64::from(bytes) + FRAME_HEADER_BYTES as u64;
        let small = |n: u64| u32::try_from(n).map_err(|_| PackError::Table);
        spans.push(Span {
            id: ChunkId::from_bytes(*id),
            offset: small(offset)?,
            length: small(length)?,
            content_bytes,
        });
        offset += length;
    }
    if offset == frames_bytes { Ok(spans) } else { Err(PackError::Table) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
            let (pack, placed) = seal(&bytes, &spans);
            let table = table_bytes(&pack[pack.len() - TAIL_BYTES..]).unwrap();
            let frames_bytes = (pack.len() - table) as u64;
            prop_assert_eq!(&read_table(&pack[pack.len() - table..], frames_bytes).unwrap(), &placed);
            for span in placed {
                let frame = &pack[span.offset as usize..(span.offset + span.length) as usize];
                prop_assert_eq!(verify(frame).unwrap()[0].id, span.id);
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
            let _ = (verify(&bytes), table_bytes(&bytes), read_table(&bytes, frames));
        }
    }
}
