//! What a pod's checkpoint differs by from the one before, which this node keeps: of a MiB that a program wrote to most
//! pages are as they were, and need not travel again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use berth_protocol::chunk::{self, ChunkId, Encoding, Frame};
use berth_protocol::ids::PodId;
use berth_protocol::manifest::{Piece, SavedFile};

use super::chunks::{ZSTD_LEVEL, read_chunk};
use super::fetch::{Kept, Place};
use super::pages;

/// Of the pages of a chunk that many must be as they were: else it is not worth a difference.
const SAME_PAGES_MIN: f32 = 0.25;

/// A chunk as it was, where this node keeps it.
#[derive(Debug, Clone)]
pub struct Base {
    pub id: ChunkId,
    place: Place,
}

/// Chunks of the pod's checkpoint before, by the file and the address that they begin at.
#[derive(Default)]
pub struct Earlier(BTreeMap<(PathBuf, u64), Base>);

impl Earlier {
    /// Nothing where this node keeps none of the pod's.
    pub fn of(cache: &Path, pod: &PodId) -> Self {
        let Some(kept) = Kept::of(cache, pod) else { return Self::default() };
        let mut chunks = BTreeMap::new();
        for (path, saved) in kept.files() {
            let Ok(name) = path.strip_prefix(&kept.dir).map(Path::to_owned) else { continue };
            for (address, id, place) in addressed(&path, saved) {
                chunks.insert((name.clone(), address), Base { id, place });
            }
        }
        Self(chunks)
    }

    /// What stood where the chunks of this file of the checkpoint in `dir` stand now.
    pub fn bases<'a>(
        &'a self,
        dir: &Path,
        path: &Path,
        saved: &SavedFile,
    ) -> impl Iterator<Item = (ChunkId, &'a Base)> {
        let name = path.strip_prefix(dir).unwrap_or(path).to_owned();
        let all = if self.0.is_empty() { Vec::new() } else { addressed(path, saved) };
        all.into_iter().filter_map(move |(address, id, _)| Some((id, self.0.get(&(name.clone(), address))?)))
    }
}

/// A file's chunks, each with the address in memory that it is of, where the file is of memory; with its offset else.
fn addressed(path: &Path, saved: &SavedFile) -> Vec<(u64, ChunkId, Place)> {
    let mappings = path.parent().and_then(|images| pages::mappings(images).ok()).unwrap_or_default();
    let addresses = pages::Addresses::of(saved.bytes, mappings.get(&saved.name));
    let (mut found, mut offset) = (Vec::new(), 0);
    for piece in &saved.pieces {
        if let Piece::Chunk { id, bytes } = piece {
            let place = Place { path: path.to_owned(), offset, bytes: *bytes };
            found.push((addresses.at(offset), *id, place));
        }
        offset += piece.bytes();
    }
    found
}

/// Appends the chunk at `offset` of `file` to `out` as its difference from `base`; false: it is better sent whole.
pub fn write_difference(
    file: &File,
    offset: u64,
    (id, bytes): (ChunkId, u32),
    base: &Base,
    out: &mut Vec<u8>,
) -> io::Result<bool> {
    let Place { path, offset: there, bytes: length } = &base.place;
    let Some(before) = read_chunk(path, *there, base.id, *length) else { return Ok(false) };
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, offset)?;
    let pages = content.chunks(pages::PAGE as usize).zip(before.chunks(pages::PAGE as usize));
    let (same, all) = pages.fold((0_u32, 0_u32), |(same, all), (a, b)| (same + u32::from(a == b), all + 1));
    if (same as f32) < all as f32 * SAME_PAGES_MIN {
        return Ok(false);
    }
    chunk::xor(&mut content, &before);
    let mut body = base.id.as_bytes().to_vec();
    body.extend(zstd::bulk::compress(&content, ZSTD_LEVEL)?);
    let pays = body.len() < content.len() / 2;
    if pays {
        Frame { id, encoding: Encoding::Xor, content_bytes: bytes, bytes: &body }.write(out);
    }
    Ok(pays)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::limits::CHUNK_BYTES_MAX;

    #[test]
    fn a_difference_is_sent_where_it_is_small_and_what_is_kept_is_sound() {
        let dir = tempfile::tempdir().unwrap();
        let (old_path, new_path) = (dir.path().join("old"), dir.path().join("new"));
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let old: Vec<u8> = (0..CHUNK_BYTES_MAX).map(|_| random()).collect();
        let mut new = old.clone();
        new[5000] ^= 1;
        std::fs::write(&old_path, &old).unwrap();
        std::fs::write(&new_path, &new).unwrap();
        let base = |content: &[u8]| Base {
            id: ChunkId::of(content),
            place: Place { path: old_path.clone(), offset: 0, bytes: content.len() as u32 },
        };
        let say = |new: &[u8], base: &Base| {
            std::fs::write(&new_path, new).unwrap();
            let (file, mut out) = (File::open(&new_path).unwrap(), Vec::new());
            let what = (ChunkId::of(new), new.len() as u32);
            write_difference(&file, 0, what, base, &mut out).unwrap().then_some(out)
        };
        let said = say(&new, &base(&old)).unwrap();
        assert!(said.len() < 300, "{}", said.len());
        let (frame, _) = Frame::read(&said).unwrap();
        let (of, difference) = frame.difference().unwrap();
        let mut whole = zstd::bulk::decompress(difference, new.len()).unwrap();
        chunk::xor(&mut whole, &old);
        assert_eq!((of, whole == new), (ChunkId::of(&old), true));
        // It has grown, or shrunk.
        assert!(say(&[&new[..], &[7; 100]].concat()[..CHUNK_BYTES_MAX], &base(&old[..70_000])).is_none());
        assert!(say(&new[..100_000], &base(&old)).is_some());
        // All is new; what is kept is not what it was.
        let other: Vec<u8> = (0..CHUNK_BYTES_MAX).map(|_| random()).collect();
        assert!(say(&other, &base(&old)).is_none());
        assert!(say(&new, &base(&other)).is_none());
    }
}
