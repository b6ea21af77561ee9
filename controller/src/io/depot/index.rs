//! What the depot knows of a namespace's checkpoints, in memory: where each chunk lies, and which manifests name it.
//! Rebuilt at the start from packs and manifests; does no IO.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::Digest;
use berth_protocol::manifest::Manifest;

use super::packs::Span;

#[derive(Default)]
pub struct Index {
    chunks: HashMap<ChunkId, Place>,
    /// Where a chunk lies as well: it came twice at once, or its pack is being rewritten.
    twins: HashMap<ChunkId, Vec<Place>>,
    packs: BTreeMap<PackId, Pack>,
    manifests: BTreeMap<Digest, Named>,
    /// How many manifests name a chunk.
    names: HashMap<ChunkId, u32>,
}

/// As `Pack` names it.
pub type PackId = ChunkId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pack: PackId,
    pub span: Span,
}

struct Pack {
    spans: Vec<Span>,
    /// When it came, or when an uploader was told that it need not send a chunk of it.
    touched: SystemTime,
}

struct Named {
    /// Each once, in ascending order.
    chunks: Vec<(ChunkId, u32)>,
    at: SystemTime,
}

impl Named {
    fn of(manifest: &Manifest, at: SystemTime) -> Self {
        let mut seen = HashSet::new();
        let mut chunks: Vec<(ChunkId, u32)> = manifest.chunks().filter(|(id, _)| seen.insert(*id)).collect();
        chunks.sort_unstable();
        Self { chunks, at }
    }
}

impl Index {
    pub fn add_pack(&mut self, id: PackId, spans: Vec<Span>, at: SystemTime) {
        for span in &spans {
            let place = Place { pack: id, span: *span };
            let first = *self.chunks.entry(span.id).or_insert(place);
            if first.pack != id {
                self.twins.entry(span.id).or_default().push(place);
            }
        }
        self.packs.insert(id, Pack { spans, touched: at });
    }

    pub fn place(&self, id: &ChunkId) -> Option<Place> {
        self.chunks.get(id).copied()
    }

    /// Those of `ids` that are not here. What is here will not be collected for a while.
    pub fn lacking(&mut self, ids: &[ChunkId], now: SystemTime) -> Vec<ChunkId> {
        let mut lacking = Vec::new();
        for id in ids {
            match self.chunks.get(id).map(|place| place.pack) {
                Some(pack) => {
                    if let Some(pack) = self.packs.get_mut(&pack) {
                        pack.touched = pack.touched.max(now);
                    }
                }
                None => lacking.push(*id),
            }
        }
        lacking
    }

    /// Lets a manifest name its chunks, or says which of them are not here.
    pub fn name(&mut self, id: Digest, manifest: &Manifest, at: SystemTime) -> Result<(), Vec<ChunkId>> {
        if self.manifests.contains_key(&id) {
            return Ok(());
        }
        let named = Named::of(manifest, at);
        let here = |id: &ChunkId, bytes: u32| {
            self.chunks.get(id).is_some_and(|place| place.span.content_bytes == bytes)
        };
        let lacking: Vec<ChunkId> =
            named.chunks.iter().filter(|(id, bytes)| !here(id, *bytes)).map(|(id, _)| *id).collect();
        if lacking.is_empty() {
            self.insert(id, named)
        } else {
            return Err(lacking);
        }
        Ok(())
    }

    /// A manifest found at the start, whose chunks were here when it was written.
    pub fn found(&mut self, id: Digest, manifest: &Manifest, at: SystemTime) {
        self.insert(id, Named::of(manifest, at));
    }

    fn insert(&mut self, id: Digest, named: Named) {
        for (chunk, _) in &named.chunks {
            *self.names.entry(*chunk).or_default() += 1;
        }
        self.manifests.insert(id, named);
    }

    pub fn unname(&mut self, id: &Digest) {
        let Some(named) = self.manifests.remove(id) else { return };
        for (chunk, _) in &named.chunks {
            if let Some(count) = self.names.get_mut(chunk) {
                *count -= 1;
                if *count == 0 {
                    self.names.remove(chunk);
                }
            }
        }
    }

    pub fn manifests(&self) -> impl Iterator<Item = (Digest, SystemTime)> + '_ {
        self.manifests.iter().map(|(id, named)| (*id, named.at))
    }

    pub fn has(&self, id: &Digest) -> bool {
        self.manifests.contains_key(id)
    }

    pub fn names(&self, manifest: &Digest, chunk: &ChunkId) -> bool {
        self.manifests
            .get(manifest)
            .is_some_and(|named| named.chunks.binary_search_by_key(chunk, |(id, _)| *id).is_ok())
    }

    /// Bytes that the checkpoints hold, each chunk once, `with` among them.
    pub fn usage(&self, with: &Manifest) -> u64 {
        let chunks =
            self.manifests.values().flat_map(|named| named.chunks.iter().copied()).chain(with.chunks());
        chunks.collect::<HashSet<_>>().into_iter().map(|(_, bytes)| u64::from(bytes)).sum()
    }

    /// Bytes of chunks, and the number of manifests.
    pub fn totals(&self) -> (u64, u64) {
        let bytes = self.chunks.values().map(|place| u64::from(place.span.length)).sum();
        (bytes, self.manifests.len() as u64)
    }

    fn is_live(&self, pack: &PackId, span: &Span) -> bool {
        self.names.contains_key(&span.id) && self.chunks.get(&span.id).is_some_and(|p| p.pack == *pack)
    }

    /// Packs of which no manifest names anything, untouched for `grace`; and those of which less than half is named,
    /// with what of them is.
    pub fn idle(&self, grace: Duration, now: SystemTime) -> Vec<(PackId, Vec<Span>)> {
        let mut idle = Vec::new();
        for (id, pack) in &self.packs {
            if now.duration_since(pack.touched).unwrap_or_default() < grace {
                continue;
            }
            let live: Vec<Span> = pack.spans.iter().filter(|span| self.is_live(id, span)).copied().collect();
            let bytes = |spans: &[Span]| spans.iter().map(|span| u64::from(span.length)).sum::<u64>();
            if bytes(&live) * 2 < bytes(&pack.spans) {
                idle.push((*id, live));
            }
        }
        idle
    }

    /// Forgets a pack before its file goes, if nothing of it has come to be named or asked for since; its chunks are
    /// lacking from here on, but those that `moved` holds.
    pub fn forget(&mut self, id: &PackId, moved: &[ChunkId], grace: Duration, now: SystemTime) -> bool {
        let Some(pack) = self.packs.get(id) else { return false };
        let stale = now.duration_since(pack.touched).unwrap_or_default() >= grace;
        let needed = pack.spans.iter().any(|span| self.is_live(id, span) && !moved.contains(&span.id));
        if !stale || needed {
            return false;
        }
        let Some(pack) = self.packs.remove(id) else { return false };
        for span in &pack.spans {
            let twins = self.twins.get_mut(&span.id);
            let mut next = None;
            if let Some(twins) = twins {
                twins.retain(|place| place.pack != *id);
                next = twins.first().copied();
            }
            if self.chunks.get(&span.id).is_some_and(|place| place.pack == *id) {
                match next {
                    Some(place) => drop(self.chunks.insert(span.id, place)),
                    None => drop(self.chunks.remove(&span.id)),
                }
            }
            // The one that took its place is no twin any more.
            let first = self.chunks.get(&span.id).map(|place| place.pack);
            if let Some(twins) = self.twins.get_mut(&span.id) {
                twins.retain(|place| Some(place.pack) != first);
                if twins.is_empty() {
                    self.twins.remove(&span.id);
                }
            }
        }
        true
    }
}
