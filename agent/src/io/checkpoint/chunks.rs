//! Files as pieces and back: what is read is hashed, what is written was.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use berth_protocol::chunk::{ChunkId, Encoding, Frame};
use berth_protocol::limits::CHUNK_BYTES_MAX;
use berth_protocol::manifest::{Piece, SavedFile};

/// Fast, and takes most of what there is to take from a heap.
pub const ZSTD_LEVEL: i32 = 1;

/// Threads that hash side by side, at most: whoever else works on this machine goes on.
const THREADS_MAX: usize = 4;
/// Fewer parts than this are not worth a thread.
const PARTS_PER_THREAD_MIN: usize = 8;

/// A part of a file, of one chunk's length at most; without a chunk it is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub offset: u64,
    pub bytes: u32,
    pub chunk: Option<ChunkId>,
}

/// Cuts the file at `path` as `cuts` says; runs of zeros become one piece each.
pub fn pieces(path: &Path, name: &str, cuts: &[u32]) -> io::Result<SavedFile> {
    let mut bytes = 0;
    let asked: Vec<Part> = cuts
        .iter()
        .map(|cut| {
            let offset = bytes;
            bytes += u64::from(*cut);
            Part { offset, bytes: *cut, chunk: None }
        })
        .collect();
    let mut pieces = Vec::<Piece>::new();
    for part in found(&File::open(path)?, &asked)? {
        match (part.chunk, pieces.last_mut()) {
            (Some(id), _) => pieces.push(Piece::Chunk { id, bytes: part.bytes }),
            (None, Some(Piece::Zeros(length))) => *length += u64::from(part.bytes),
            (None, _) => pieces.push(Piece::Zeros(u64::from(part.bytes))),
        }
    }
    Ok(SavedFile { name: name.to_owned(), bytes, pieces })
}

/// What the file holds where `parts` are; they are hashed side by side, since a pod stands still meanwhile.
fn found(file: &File, parts: &[Part]) -> io::Result<Vec<Part>> {
    let look = |parts: &[Part]| -> io::Result<Vec<Part>> {
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        let look = |part: &Part| {
            let content = &mut buffer[..part.bytes as usize];
            file.read_exact_at(content, part.offset)?;
            let chunk = (!is_zero(content)).then(|| ChunkId::of(content));
            Ok(Part { chunk, ..*part })
        };
        parts.iter().map(look).collect()
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let share = parts.len().div_ceil(threads).max(PARTS_PER_THREAD_MIN);
    let (mine, others) = parts.split_at(share.min(parts.len()));
    thread::scope(|scope| {
        let others: Vec<_> = others.chunks(share).map(|parts| scope.spawn(move || look(parts))).collect();
        let mut all = look(mine)?;
        for other in others {
            all.extend(other.join().map_err(|_| io::Error::other("a thread that hashes has panicked"))??);
        }
        Ok(all)
    })
}

/// What the manifest says of a file, part by part.
fn parts(file: &SavedFile) -> Vec<Part> {
    let (mut parts, mut offset) = (Vec::new(), 0);
    for piece in &file.pieces {
        let chunk = match piece {
            Piece::Zeros(_) => None,
            Piece::Chunk { id, .. } => Some(*id),
        };
        let end = offset + piece.bytes();
        while offset < end {
            let bytes = (end - offset).min(CHUNK_BYTES_MAX as u64) as u32;
            parts.push(Part { offset, bytes, chunk });
            offset += u64::from(bytes);
        }
    }
    parts
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
        // Nobody was asked for that.
        Encoding::Xor => return None,
    };
    (content.len() == frame.content_bytes as usize && ChunkId::of(&content) == frame.id).then_some(content)
}

/// Is the file at `path` what `expected` says, byte for byte?
pub fn is_same(path: &Path, expected: &SavedFile) -> bool {
    let check = || -> io::Result<bool> {
        let file = File::open(path)?;
        let parts = parts(expected);
        Ok(file.metadata()?.len() == expected.bytes && found(&file, &parts)? == parts)
    };
    check().unwrap_or(false)
}

/// Makes the file at `path` as long as `expected` and zero where that is; returns the chunks that it still lacks. What
/// was in it counts where it is right.
pub fn begin(path: &Path, expected: &SavedFile) -> io::Result<Vec<Part>> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    let (before, mut parts) = (file.metadata()?.len(), parts(expected));
    file.set_len(expected.bytes)?;
    // What was made just now is zeros, and need not be read.
    if before > 0 {
        let found = found(&file, &parts)?;
        let differs = parts.iter().zip(&found).filter(|(expected, found)| expected != found);
        parts = differs.map(|(expected, _)| *expected).collect();
        for part in parts.iter().filter(|part| part.chunk.is_none()) {
            file.write_all_at(&vec![0; part.bytes as usize], part.offset)?;
        }
    }
    parts.retain(|part| part.chunk.is_some());
    Ok(parts)
}

/// Bytes of chunks that both have at the same place.
pub fn bytes_in_place(one: &SavedFile, other: &SavedFile) -> u64 {
    let there: BTreeSet<(u64, ChunkId)> =
        parts(one).into_iter().filter_map(|part| Some((part.offset, part.chunk?))).collect();
    let same = |part: &Part| part.chunk.is_some_and(|id| there.contains(&(part.offset, id)));
    parts(other).into_iter().filter(same).map(|part| u64::from(part.bytes)).sum()
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

    #[test]
    fn a_file_begins_with_what_is_right_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let chunk = |byte: u8| vec![byte; CHUNK_BYTES_MAX];
        let write =
            |chunks: &[u8]| std::fs::write(&path, chunks.iter().flat_map(|b| chunk(*b)).collect::<Vec<_>>());
        let describe = || {
            let length = std::fs::metadata(&path).unwrap().len();
            pieces(&path, "f", &cuts(length, None)).unwrap()
        };
        // More than one thread's share, so that the order of what they find is seen too.
        let many: Vec<u8> = (1..=40).collect();
        write(&many).unwrap();
        let old = describe();
        let mut other = many.clone();
        (other[3], other[20], other[39]) = (0, 99, 0);
        other.push(7);
        write(&other).unwrap();
        let new = describe();
        assert_eq!(bytes_in_place(&old, &new), 37 * CHUNK_BYTES_MAX as u64);

        write(&many).unwrap();
        let lacking = begin(&path, &new).unwrap();
        assert_eq!(lacking.iter().map(|part| part.offset >> 20).collect::<Vec<_>>(), [20, 40]);
        let file = File::options().write(true).open(&path).unwrap();
        for (part, byte) in lacking.iter().zip([99, 7]) {
            assert_eq!(part.chunk, Some(ChunkId::of(&chunk(byte))));
            file.write_all_at(&chunk(byte), part.offset).unwrap();
        }
        assert!(is_same(&path, &new));
        // A longer one is cut.
        assert!(
            begin(&path, &old).unwrap().len() == 3 && std::fs::metadata(&path).unwrap().len() == old.bytes
        );
        // One that is not there lacks all.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(begin(&path, &new).unwrap().len(), 39);
    }
}
