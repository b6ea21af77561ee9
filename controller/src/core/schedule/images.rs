//! Images that nodes hold, for the engine to choose between equals by: names as numbers, and a bit for each image and
//! slot. Knows no pods and no scores.

use std::collections::BTreeMap;

use berth_protocol::image::ImageName;

use super::index::BLOCK;

/// An image's number, its as long as some node holds it.
pub type ImageId = usize;

/// Numbers of the images that some node holds.
#[derive(Default)]
pub struct Catalogue {
    ids: BTreeMap<ImageName, ImageId>,
    /// By number: the name, and how many nodes hold it.
    entries: Vec<(ImageName, usize)>,
    /// Numbers that nobody has.
    free: Vec<ImageId>,
}

impl Catalogue {
    /// None: no node holds it.
    pub fn id(&self, name: &ImageName) -> Option<ImageId> {
        self.ids.get(name).copied()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// One more node holds it.
    pub fn take(&mut self, name: &ImageName) -> ImageId {
        if let Some(id) = self.id(name) {
            self.entries[id].1 += 1;
            return id;
        }
        let entry = (name.clone(), 1);
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                self.entries.len() - 1
            }
        };
        self.ids.insert(name.clone(), id);
        id
    }

    /// One node less does.
    pub fn give_back(&mut self, id: ImageId) {
        let (name, nodes) = &mut self.entries[id];
        *nodes -= 1;
        if *nodes == 0 {
            self.ids.remove(name);
            self.free.push(id);
        }
    }
}

/// Which slots hold which images. What an image takes grows with the nodes that hold it, not with the fleet.
#[derive(Default)]
pub struct Holders {
    /// By image: blocks with such slots, ascending, and a bit for each of theirs.
    blocks: Vec<Vec<(u32, u64)>>,
}

impl Holders {
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    pub fn set(&mut self, image: ImageId, slot: usize) {
        if self.blocks.len() <= image {
            self.blocks.resize_with(image + 1, Vec::new);
        }
        let (block, bit) = place(slot);
        let blocks = &mut self.blocks[image];
        match blocks.binary_search_by_key(&block, |(block, _)| *block) {
            Ok(at) => blocks[at].1 |= bit,
            Err(at) => blocks.insert(at, (block, bit)),
        }
    }

    pub fn unset(&mut self, image: ImageId, slot: usize) {
        let (block, bit) = place(slot);
        let Some(blocks) = self.blocks.get_mut(image) else { return };
        if let Ok(at) = blocks.binary_search_by_key(&block, |(block, _)| *block) {
            blocks[at].1 &= !bit;
            if blocks[at].1 == 0 {
                blocks.remove(at);
            }
        }
    }

    /// Blocks with slots that hold all of `images`, ascending, and which of theirs do.
    pub fn of<'a>(&'a self, images: &'a [ImageId]) -> impl Iterator<Item = (usize, u64)> + 'a {
        let blocks = images.first().and_then(|image| self.blocks.get(*image)).map_or(&[][..], Vec::as_slice);
        let others = images.get(1..).unwrap_or_default();
        blocks.iter().filter_map(|(block, bits)| {
            let bits = others.iter().fold(*bits, |bits, image| bits & self.bits(*image, *block));
            (bits != 0).then_some((*block as usize, bits))
        })
    }

    fn bits(&self, image: ImageId, block: u32) -> u64 {
        let Some(blocks) = self.blocks.get(image) else { return 0 };
        blocks.binary_search_by_key(&block, |(block, _)| *block).map_or(0, |at| blocks[at].1)
    }
}

/// The slot's block, and its bit there.
fn place(slot: usize) -> (u32, u64) {
    const { assert!(BLOCK == u64::BITS as usize) };
    ((slot / BLOCK) as u32, 1 << (slot % BLOCK))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_are_what_was_set(
            steps in proptest::collection::vec((any::<bool>(), 0..3usize, 0..200usize), 0..200),
            asked in proptest::collection::vec(0..4usize, 0..4),
        ) {
            let (mut holders, mut model) = (Holders::default(), BTreeSet::new());
            for (set, image, slot) in steps {
                if set {
                    holders.set(image, slot);
                    model.insert((image, slot));
                } else {
                    holders.unset(image, slot);
                    model.remove(&(image, slot));
                }
            }
            let of = |(block, bits): (usize, u64)| {
                (0..BLOCK).filter(move |i| bits >> i & 1 == 1).map(move |i| block * BLOCK + i)
            };
            let found: Vec<usize> = holders.of(&asked).flat_map(of).collect();
            let all = |slot: &usize| !asked.is_empty() && asked.iter().all(|image| model.contains(&(*image, *slot)));
            prop_assert_eq!(found, (0..200).filter(all).collect::<Vec<_>>());
        }

        /// A number is one image's as long as some node holds that one, and there are no more than have been held at once.
        #[test]
        fn numbers_are_of_what_is_held(
            steps in proptest::collection::vec(proptest::collection::btree_set(0..9usize, 0..5), 0..60),
        ) {
            let name = |number: usize| ImageName::parse(&format!("a:{number}")).unwrap();
            let (mut catalogue, mut nodes, mut most) = (Catalogue::default(), vec![Vec::new(); 3], 0);
            for (at, images) in steps.into_iter().enumerate() {
                let ids: Vec<ImageId> = images.iter().map(|number| catalogue.take(&name(*number))).collect();
                for id in std::mem::replace(&mut nodes[at % 3], ids) {
                    catalogue.give_back(id);
                }
                let held: BTreeSet<ImageId> = nodes.iter().flatten().copied().collect();
                most = most.max(held.len() + 5);
                prop_assert!(catalogue.entries.len() <= most);
                prop_assert_eq!(catalogue.ids.values().copied().collect::<BTreeSet<_>>(), held.clone());
                prop_assert_eq!(catalogue.is_empty(), held.is_empty());
                for id in held {
                    prop_assert_eq!(catalogue.id(&catalogue.entries[id].0), Some(id));
                }
            }
        }
    }
}
