//! Checkpoints in the depot: chunks in packs, and the manifests that name them.
//!
//! The order of a commit: packs are durable before they are in the index, a manifest is in the index (so that nothing
//! it names is collected) before it is durable, and only what is durable is acknowledged. Collection forgets a pack
//! first and removes its file then. A crash anywhere leaves files that nothing names, never a name without its file.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::{Digest, Namespace};
use berth_protocol::limits::MANIFEST_BYTES_MAX;
use berth_protocol::manifest::Manifest;
use bytes::Bytes;

use super::index::{Index, PackId, Place};
use super::packs::{self, Span};
use super::{Depot, DepotError};

/// Of a pack's end, read at once at the start.
const TABLE_BYTES_FIRST: u64 = 8 * 1024;
/// An upload may take this long from its first question to its manifest without being asked twice.
pub const GRACE: Duration = Duration::from_secs(3600);

#[derive(Default)]
pub struct Saved {
    index: Mutex<Index>,
}

/// What came of a manifest.
#[derive(Debug, PartialEq, Eq)]
pub enum Kept {
    New,
    Known,
    /// These chunks of it are not here.
    Lacking(Vec<ChunkId>),
}

fn manifest_name(id: &Digest) -> String {
    let hex = id.hex();
    format!("checkpoints/{}/{hex}", &hex[..2])
}

fn pack_name(id: &PackId) -> String {
    let hex = id.hex();
    format!("packs/{}/{hex}", &hex[..2])
}

fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

impl Depot {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.saved.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns what packs and manifests are there. A damaged one is told and left alone.
    pub async fn survey(&self) -> Result<(), DepotError> {
        for file in self.bucket.list("packs").await? {
            let Ok(id) = ChunkId::parse(last(&file.name)) else { continue };
            match self.read_table(&file.name, file.bytes).await? {
                Some(spans) => self.index().add_pack(id, spans, file.modified),
                None => tracing::error!(pack = file.name, "a pack of the depot is damaged"),
            }
        }
        for file in self.bucket.list("checkpoints").await? {
            let Ok(id) = Digest::parse(&format!("sha256:{}", last(&file.name))) else { continue };
            let Some(content) = self.bucket.get(&file.name).await? else { continue };
            let bytes = content.whole().await.map_err(super::bucket::disk("read", file.name.as_ref()))?;
            match Manifest::parse(&id, &bytes) {
                Ok(manifest) => self.index().found(id, &manifest, file.modified),
                Err(error) => tracing::error!(%error, "a manifest of the depot is damaged"),
            }
        }
        Ok(())
    }

    async fn read_table(&self, name: &str, bytes: u64) -> Result<Option<Vec<Span>>, DepotError> {
        let mut length = TABLE_BYTES_FIRST.min(bytes);
        loop {
            let Some(end) = self.bucket.range(name, bytes - length, length).await? else { return Ok(None) };
            let Some(tail) = end.len().checked_sub(packs::TAIL_BYTES) else { return Ok(None) };
            let Ok(table) = packs::table_bytes(&end[tail..]) else { return Ok(None) };
            if table <= end.len() {
                let frames_bytes = bytes - table as u64;
                return Ok(packs::read_table(&end[end.len() - table..], frames_bytes).ok());
            }
            if table as u64 > bytes {
                return Ok(None);
            }
            length = table as u64;
        }
    }

    /// Those of `ids` that are not here.
    pub fn lacking(&self, ids: &[ChunkId]) -> Vec<ChunkId> {
        self.index().lacking(ids, SystemTime::now())
    }

    /// Keeps the chunks that `frames` are, once each is what its id says.
    pub async fn add_chunks(&self, frames: Bytes) -> Result<(), DepotError> {
        let given = frames.clone();
        let verified = tokio::task::spawn_blocking(move || packs::verify(&given));
        let mut spans = verified.await.map_err(|error| DepotError::Broken(error.to_string()))??;
        let ids: Vec<ChunkId> = spans.iter().map(|span| span.id).collect();
        let mut new: std::collections::HashSet<ChunkId> = self.lacking(&ids).into_iter().collect();
        spans.retain(|span| new.remove(&span.id));
        if spans.is_empty() {
            return Ok(());
        }
        let (pack, placed) = packs::seal(&frames, &spans);
        drop(frames);
        self.write_pack(pack, placed).await
    }

    async fn write_pack(&self, pack: Bytes, spans: Vec<Span>) -> Result<(), DepotError> {
        let id = PackId::of(&pack);
        let half = self.half_made();
        self.bucket.put(&half.0, &pack_name(&id), pack).await?;
        self.index().add_pack(id, spans, SystemTime::now());
        Ok(())
    }

    /// Commits a checkpoint: all that it names is here, and stays as long as it does.
    pub async fn keep_manifest(
        &self,
        id: Digest,
        bytes: Bytes,
        manifest: &Manifest,
    ) -> Result<Kept, DepotError> {
        {
            let mut index = self.index();
            if index.namespace(&id).is_some() {
                return Ok(Kept::Known);
            }
            if let Some(max) = self.quota
                && index.usage(&manifest.namespace, manifest) > max
            {
                return Err(DepotError::Quota { namespace: manifest.namespace.clone(), max });
            }
            if let Err(lacking) = index.name(id, manifest, SystemTime::now()) {
                return Ok(Kept::Lacking(lacking));
            }
        }
        let half = self.half_made();
        if let Err(error) = self.bucket.put(&half.0, &manifest_name(&id), bytes).await {
            // It may be there all the same, and nobody was told so: then a later survey finds it.
            let removed = self.bucket.delete(&manifest_name(&id)).await;
            if removed.is_ok() {
                self.index().unname(&id);
            }
            return Err(error);
        }
        Ok(Kept::New)
    }

    pub async fn manifest(&self, id: &Digest) -> Result<Option<Bytes>, DepotError> {
        let name = manifest_name(id);
        let Some(content) = self.bucket.get(&name).await? else { return Ok(None) };
        if content.bytes() > MANIFEST_BYTES_MAX as u64 {
            return Ok(None);
        }
        let bytes = content.whole().await.map_err(super::bucket::disk("read", name.as_ref()))?;
        Ok(Some(bytes.into()))
    }

    /// Whose it is; `None`: it is not here.
    pub fn manifest_namespace(&self, id: &Digest) -> Option<Namespace> {
        self.index().namespace(id).cloned()
    }

    /// Whether the checkpoint is made of all of these.
    pub fn manifest_names(&self, id: &Digest, chunks: &[ChunkId]) -> bool {
        let index = self.index();
        chunks.iter().all(|chunk| index.names(id, chunk))
    }

    /// A chunk's frame; `None`: it is not here.
    pub async fn frame(&self, id: &ChunkId) -> Result<Option<Bytes>, DepotError> {
        // A pack may be rewritten between the look and the read.
        for _ in 0..2 {
            let Some(Place { pack, span }) = self.index().place(id) else { return Ok(None) };
            let (offset, length) = (u64::from(span.offset), u64::from(span.length));
            let read = self.bucket.range(&pack_name(&pack), offset, length).await?;
            if let Some(frame) = read.filter(|frame| frame.len() as u64 == length) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Lets a checkpoint go. Its chunks stay until they are collected.
    pub async fn delete_manifest(&self, id: &Digest) -> Result<(), DepotError> {
        self.bucket.delete(&manifest_name(id)).await?;
        self.index().unname(id);
        Ok(())
    }

    /// Every manifest that is here, and since when.
    pub fn manifests(&self) -> Vec<(Digest, SystemTime)> {
        self.index().manifests().collect()
    }

    /// Bytes of chunks, and the number of manifests.
    pub fn totals(&self) -> (u64, u64) {
        self.index().totals()
    }

    /// Removes packs of which nothing is named, and rewrites those of which little is.
    pub async fn collect(&self, grace: Duration) -> Result<u64, DepotError> {
        let idle = self.index().idle(grace, SystemTime::now());
        let mut freed = 0;
        for (id, live) in idle {
            let moved: Vec<ChunkId> = live.iter().map(|span| span.id).collect();
            if !live.is_empty() && !self.rewrite(&id, &live).await? {
                continue;
            }
            if self.index().forget(&id, &moved, grace, SystemTime::now()) {
                self.bucket.delete(&pack_name(&id)).await?;
                freed += 1;
            }
        }
        Ok(freed)
    }

    /// Copies the live chunks of a pack into one of their own; false: they cannot all be read.
    async fn rewrite(&self, id: &PackId, live: &[Span]) -> Result<bool, DepotError> {
        let mut frames = Vec::new();
        for span in live {
            let (offset, length) = (u64::from(span.offset), u64::from(span.length));
            match self.bucket.range(&pack_name(id), offset, length).await? {
                Some(frame) => frames.extend_from_slice(&frame),
                None => return Ok(false),
            }
        }
        let Ok(spans) = packs::verify(&frames) else { return Ok(false) };
        let (pack, placed) = packs::seal(&frames, &spans);
        self.write_pack(pack, placed).await?;
        Ok(true)
    }
}
