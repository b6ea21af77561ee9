//! Files as pieces and back: what is read is hashed, what is written was.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_protocol::chunk::{ChunkId, Encoding, Frame};
use berth_protocol::limits::CHUNK_BYTES_MAX;
use berth_protocol::manifest::{Piece, SavedFile};

/// Fast, and takes most of what there is to take from a heap.
const ZSTD_LEVEL: i32 = 1;

/// Cuts the file at `path` as `cuts` says; runs of zeros become one piece each.
pub fn pieces(path: &Path, name: &str, cuts: &[u32]) -> io::Result<SavedFile> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    let (mut pieces, mut bytes) = (Vec::<Piece>::new(), 0);
    for cut in cuts {
        let part = &mut buffer[..*cut as usize];
        file.read_exact(part)?;
        bytes += u64::from(*cut);
        if is_zero(part) {
            match pieces.last_mut() {
                Some(Piece::Zeros(length)) => *length += u64::from(*cut),
                _ => pieces.push(Piece::Zeros(u64::from(*cut))),
            }
        } else {
            pieces.push(Piece::Chunk { id: ChunkId::of(part), bytes: *cut });
        }
    }
    Ok(SavedFile { name: name.to_owned(), bytes, pieces })
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Appends the chunk at `offset` of `file` to `out` as a frame.
pub fn write_frame(file: &File, offset: u64, id: ChunkId, bytes: u32, out: &mut Vec<u8>) -> io::Result<()> {
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, offset)?;
    let packed = zstd::bulk::compress(&content, ZSTD_LEVEL)?;
    // Below a tenth it is not worth the reader's time.
    let (encoding, written) = match packed.len() < content.len() / 10 * 9 {
        true => (Encoding::Zstd, &packed),
        false => (Encoding::Raw, &content),
    };
    Frame { id, encoding, content_bytes: bytes, bytes: written }.write(out);
    Ok(())
}

/// The chunk at `offset` of the file at `path`, if it is what its id says.
pub fn read_chunk(path: &Path, offset: u64, id: ChunkId, bytes: u32) -> Option<Vec<u8>> {
    let mut content = vec![0; bytes as usize];
    File::open(path).and_then(|file| file.read_exact_at(&mut content, offset)).ok()?;
    (ChunkId::of(&content) == id).then_some(content)
}

/// A frame's content, if it is what its id says.
pub fn read_frame(frame: &Frame) -> Option<Vec<u8>> {
    let content = match frame.encoding {
        Encoding::Raw => frame.bytes.to_vec(),
        Encoding::Zstd => zstd::bulk::decompress(frame.bytes, frame.content_bytes as usize).ok()?,
    };
    (content.len() == frame.content_bytes as usize && ChunkId::of(&content) == frame.id).then_some(content)
}

/// Is the file at `path` what `expected` says, byte for byte?
pub fn is_same(path: &Path, expected: &SavedFile) -> bool {
    let check = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() != expected.bytes {
            return Ok(false);
        }
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        for piece in &expected.pieces {
            let mut left = piece.bytes();
            while left > 0 {
                let part = &mut buffer[..left.min(CHUNK_BYTES_MAX as u64) as usize];
                file.read_exact(part)?;
                left -= part.len() as u64;
                let same = match piece {
                    Piece::Zeros(_) => is_zero(part),
                    Piece::Chunk { id, .. } => ChunkId::of(part) == *id,
                };
                if !same {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    };
    check().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::super::pages::cuts;
    use super::*;

    #[test]
    fn a_file_goes_to_pieces_and_every_change_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut content = vec![0_u8; 3 * CHUNK_BYTES_MAX + 10];
        content[CHUNK_BYTES_MAX..][..5].copy_from_slice(b"hello");
        std::fs::write(&path, &content).unwrap();
        let saved = pieces(&path, "f", &cuts(content.len() as u64, None)).unwrap();
        assert_eq!(saved.pieces.len(), 3, "zeros, a chunk, zeros: {:?}", saved.pieces);
        assert!(is_same(&path, &saved));
        let file = File::open(&path).unwrap();
        let mut frames = Vec::new();
        let (id, bytes) = saved.chunks().next().unwrap();
        write_frame(&file, CHUNK_BYTES_MAX as u64, id, bytes, &mut frames).unwrap();
        assert!(frames.len() < CHUNK_BYTES_MAX / 100);
        let (frame, length) = Frame::read(&frames).unwrap();
        assert_eq!((length, read_frame(&frame).unwrap().len()), (frames.len(), CHUNK_BYTES_MAX));
        for at in [0, CHUNK_BYTES_MAX + 2, content.len() - 1] {
            let mut other = content.clone();
            other[at] ^= 1;
            std::fs::write(&path, &other).unwrap();
            assert!(!is_same(&path, &saved), "{at}");
        }
        // Some of zstd's bits mean nothing: what is read is the chunk or refused, never something else.
        for at in 0..length {
            let mut other = frames.clone();
            other[at] ^= 1;
            let read = Frame::read(&other).ok().and_then(|(frame, _)| read_frame(&frame));
            assert!(read.is_none_or(|content| ChunkId::of(&content) == id), "{at}");
        }
    }
}
