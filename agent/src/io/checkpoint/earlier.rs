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
        let files = kept.files();
        Self(addressed(&kept.dir, files.iter().map(|(path, saved)| (path.as_path(), *saved))).collect())
    }

    /// What stood where these files of the checkpoint in `dir` have chunks now.
    pub fn bases<'a>(
        &self,
        dir: &Path,
        files: impl Iterator<Item = (&'a Path, &'a SavedFile)>,
    ) -> BTreeMap<ChunkId, Base> {
        // Without any the pagemaps need not be read.
        let files = files.filter(|_| !self.0.is_empty());
        let stood = |(at, now): ((PathBuf, u64), Base)| Some((now.id, self.0.get(&at)?.clone()));
        addressed(dir, files).filter_map(stood).collect()
    }
}

/// The chunks of a checkpoint's files, each by its file and the address in memory that it is of, where that is of memory; by
/// its offset else.
fn addressed<'a>(
    dir: &Path,
    files: impl Iterator<Item = (&'a Path, &'a SavedFile)>,
) -> impl Iterator<Item = ((PathBuf, u64), Base)> {
    let mut mappings = BTreeMap::new();
    files.flat_map(move |(path, saved)| {
        let images = path.parent().unwrap_or(dir);
        // Once for all images of a container: it may have hundreds.
        let mappings =
            mappings.entry(images.to_owned()).or_insert_with(|| pages::mappings(images).unwrap_or_default());
        let addresses = pages::Addresses::of(saved.bytes, mappings.get(&saved.name));
        let name = path.strip_prefix(dir).unwrap_or(path);
        let (mut found, mut offset) = (Vec::new(), 0);
        for piece in &saved.pieces {
            if let Piece::Chunk { id, bytes } = piece {
                let place = Place { path: path.to_owned(), offset, bytes: *bytes };
                found.push(((name.to_owned(), addresses.at(offset)), Base { id: *id, place }));
            }
            offset += piece.bytes();
        }
        found
    })
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
