//! Where a file of a checkpoint is cut. Memory is cut at multiples of 1 MiB in virtual addresses and where mappings
//! end, as CRIU's pagemaps tell, since offsets in the file shift when a mapping appears; everything else at multiples
//! of 1 MiB. Pure but for reading the pagemaps.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use berth_protocol::limits::CHUNK_BYTES_MAX;

use crate::shim::checkpoint::rpc::{Fields, Value};

pub const PAGE: u64 = 4096;
/// `PE_PRESENT`: the pages are in the pages image.
const PRESENT: u64 = 1 << 2;
const MAGIC_BYTES: usize = 8;
const CHUNK: u64 = CHUNK_BYTES_MAX as u64;

/// The mappings of each pages image in a directory, as (address, bytes), in the file's order, by the image's name.
pub fn mappings(images: &Path) -> io::Result<BTreeMap<String, Vec<(u64, u64)>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pagemap-")
            && let Some((id, mappings)) = pagemap(&fs::read(entry.path())?)
        {
            found.insert(format!("pages-{id}.img"), mappings);
        }
    }
    Ok(found)
}

/// The messages of an image, each behind its length; `None` where it is malformed.
pub fn messages(image: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = image.get(MAGIC_BYTES..)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let (message, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        found.push(message);
        rest = behind;
    }
    Some(found)
}

pub fn pagemap(image: &[u8]) -> Option<(u64, Vec<(u64, u64)>)> {
    let messages = messages(image)?;
    let (head, entries) = messages.split_first()?;
    let mut id = None;
    for field in Fields::of(head) {
        if let (1, Value::Number(pages)) = field? {
            id = Some(pages);
        }
    }
    let mut found = Vec::new();
    for entry in entries {
        let (mut address, mut pages, mut more, mut flags) = (0, 0, 0, None);
        for field in Fields::of(entry) {
            match field? {
                (1, Value::Number(at)) => address = at,
                (2, Value::Number(count)) => pages = count,
                (4, Value::Number(bits)) => flags = Some(bits),
                (5, Value::Number(count)) => more = count,
                _ => {}
            }
        }
        // Without flags, as old images are, pages are there.
        if flags.is_none_or(|flags| flags & PRESENT != 0) {
            found.push((address, u64::max(pages, more).checked_mul(PAGE)?));
        }
    }
    Some((id?, found))
}

/// The lengths of the pieces of a file of `bytes`, in order.
pub fn cuts(bytes: u64, mappings: Option<&Vec<(u64, u64)>>) -> Vec<u32> {
    let mut lengths = mappings.into_iter().flatten().map(|(_, length)| *length);
    let known = lengths.try_fold(0_u64, u64::checked_add);
    // Of a pages image that is not as its pagemap says, offsets serve as well.
    let whole = vec![(0, bytes)];
    let mappings = mappings.filter(|_| known == Some(bytes)).unwrap_or(&whole);
    let mut lengths = Vec::new();
    for (address, length) in mappings {
        let (mut at, end) = (*address, address.saturating_add(*length));
        while at < end {
            let next = (at / CHUNK + 1).saturating_mul(CHUNK).min(end);
            lengths.push((next - at) as u32);
            at = next;
        }
    }
    lengths
}

/// Which address of memory each byte of a file is of; of other files, its offset.
pub struct Addresses(Vec<(u64, u64)>);

impl Addresses {
    pub fn of(bytes: u64, mappings: Option<&Vec<(u64, u64)>>) -> Self {
        let mut starts = Vec::new();
        let mut offset = 0_u64;
        for (address, length) in mappings.into_iter().flatten() {
            starts.push((offset, *address));
            offset = offset.saturating_add(*length);
        }
        // As in `cuts`.
        Self(if offset == bytes { starts } else { Vec::new() })
    }

    pub fn at(&self, offset: u64) -> u64 {
        let behind = self.0.partition_point(|(start, _)| *start <= offset);
        match behind.checked_sub(1).map(|last| self.0[last]) {
            Some((start, address)) => address.saturating_add(offset - start),
            None => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::checkpoint::rpc::Message;
    use proptest::prelude::*;

    fn image(messages: &[Message]) -> Vec<u8> {
        let mut image = vec![0; MAGIC_BYTES];
        for message in messages {
            image.extend_from_slice(&(message.as_bytes().len() as u32).to_le_bytes());
            image.extend_from_slice(message.as_bytes());
        }
        image
    }

    #[test]
    fn pagemaps_and_cuts() {
        let mut head = Message::default();
        head.number(1, 7);
        let entry = |address, pages, flags| {
            let mut entry = Message::default();
            entry.number(1, address).number(2, pages).number(4, flags);
            entry
        };
        let image = image(&[
            head,
            entry(0xff000, 2, PRESENT),
            entry(0x500_000, 3, 1),
            entry(0x600_000, 257, PRESENT),
        ]);
        let (id, mappings) = pagemap(&image).unwrap();
        assert_eq!((id, &mappings), (7, &vec![(0xff000, 2 * PAGE), (0x600_000, 257 * PAGE)]));
        assert_eq!(cuts(259 * PAGE, Some(&mappings)), [4096, 4096, 1 << 20, 4096]);
        assert_eq!(cuts(5000, Some(&mappings)), [5000]);
        assert_eq!(cuts((1 << 20) + 1, None), [1 << 20, 1]);
        assert!(cuts(0, None).is_empty());
        let addresses = Addresses::of(259 * PAGE, Some(&mappings));
        assert_eq!(
            [0, PAGE, 2 * PAGE, 258 * PAGE].map(|at| addresses.at(at)),
            [0xff000, 0x100_000, 0x600_000, 0x700_000]
        );
        assert_eq!(Addresses::of(5000, Some(&mappings)).at(4096), 4096);
    }

    proptest! {
        #[test]
        fn cuts_cover_the_file(maps in proptest::collection::vec((0..1_u64 << 40, 1..3000_u64), 0..9)) {
            let maps: Vec<(u64, u64)> = maps.into_iter().map(|(at, pages)| (at * PAGE, pages * PAGE)).collect();
            let bytes: u64 = maps.iter().map(|(_, length)| length).sum();
            let cuts = cuts(bytes, Some(&maps));
            prop_assert_eq!(cuts.iter().map(|cut| u64::from(*cut)).sum::<u64>(), bytes);
            prop_assert!(cuts.iter().all(|cut| *cut > 0 && *cut as usize <= CHUNK_BYTES_MAX));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = pagemap(&bytes);
        }
    }
}
