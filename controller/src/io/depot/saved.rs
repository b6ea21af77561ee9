//! Checkpoints in the depot: chunks in packs, and the manifests that name them.
//!
//! The order of a commit: packs are durable before they are in the index, a manifest is in the index (so that nothing
//! it names is collected) before it is durable, and only what is durable is acknowledged. Collection forgets a pack
//! first and removes its file then. A crash anywhere leaves files that nothing names, never a name without its file.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::{Digest, Namespace};
use berth_protocol::limits::MANIFEST_BYTES_MAX;
use berth_protocol::manifest::Manifest;
use bytes::Bytes;

use super::bucket::Listed;
use super::cipher::{Cipher, FileKey, Keys, TAG_BYTES};
use super::index::{Index, PackId, Place};
use super::packs::{self, Pack, Span};
use super::{Depot, DepotError};

pub const PACKS: &str = "packs";
pub const MANIFESTS: &str = "checkpoints";

/// Of a pack's end, read at once at the start.
const TABLE_BYTES_FIRST: u64 = 8 * 1024;
/// An upload may take this long from its first question to its manifest without being asked twice.
pub const GRACE: Duration = Duration::from_secs(3600);

pub struct Saved {
    keys: Keys,
    shelves: Mutex<BTreeMap<Namespace, Index>>,
}

impl Saved {
    pub fn of(keys: Keys) -> Self {
        Self { keys, shelves: Mutex::default() }
    }
}

/// What came of a manifest.
#[derive(Debug, PartialEq, Eq)]
pub enum Kept {
    New,
    Known,
    /// These chunks of it are not here.
    Lacking(Vec<ChunkId>),
}

/// Below the namespace's own folder, so that its key is known before anything is read.
fn name(folder: &str, namespace: &Namespace, hex: &str) -> String {
    format!("{folder}/{namespace}/{}/{hex}", &hex[..2])
}

fn manifest_name(namespace: &Namespace, id: &Digest) -> String {
    name(MANIFESTS, namespace, &id.hex())
}

fn pack_name(namespace: &Namespace, id: &PackId) -> String {
    name(PACKS, namespace, &id.hex())
}

/// Whose a file is, and the digits that name it.
fn named(name: &str) -> Option<(Namespace, &str)> {
    let (_, name) = name.split_once('/')?;
    let (namespace, name) = name.split_once('/')?;
    Some((Namespace::parse(namespace).ok()?, name.rsplit_once('/')?.1))
}

fn manifest_piece(cipher: &Cipher, id: &Digest) -> FileKey {
    cipher.file(id.as_bytes())
}

impl Depot {
    fn shelves(&self) -> MutexGuard<'_, BTreeMap<Namespace, Index>> {
        self.saved.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cipher(&self, namespace: &Namespace) -> Cipher {
        self.saved.keys.cipher(namespace)
    }

    /// Learns what packs and manifests are there. A damaged one is told and left alone.
    pub async fn survey(&self) -> Result<(), DepotError> {
        for file in self.bucket.list(PACKS).await? {
            let Some((namespace, hex)) = named(&file.name) else { continue };
            let Ok(id) = ChunkId::parse(hex) else { continue };
            match self.read_table(&namespace, &id, &file).await? {
                Some(spans) => {
                    self.shelves().entry(namespace).or_default().add_pack(id, spans, file.modified)
                }
                None => {
                    tracing::error!(pack = file.name, "a pack of the depot is damaged, or of another store")
                }
            }
        }
        for file in self.bucket.list(MANIFESTS).await? {
            let Some((namespace, hex)) = named(&file.name) else { continue };
            let Ok(id) = Digest::parse(&format!("sha256:{hex}")) else { continue };
            let Some(content) = self.bucket.get(&file.name).await? else { continue };
            let sealed = content.whole().await.map_err(super::bucket::disk("read", file.name.as_ref()))?;
            let opened = manifest_piece(&self.cipher(&namespace), &id).open(0, sealed);
            match opened.map(|bytes| Manifest::parse(&id, &bytes)) {
                Some(Ok(manifest)) if manifest.namespace == namespace => {
                    self.shelves().entry(namespace).or_default().found(id, &manifest, file.modified);
                }
                _ => {
                    tracing::error!(
                        manifest = file.name,
                        "a manifest of the depot is damaged, or of another store"
                    );
                }
            }
        }
        Ok(())
    }

    async fn read_table(
        &self,
        namespace: &Namespace,
        id: &PackId,
        file: &Listed,
    ) -> Result<Option<Vec<Span>>, DepotError> {
        let Listed { name, bytes, .. } = file;
        let mut length = TABLE_BYTES_FIRST.min(*bytes);
        loop {
            let Some(end) = self.bucket.range(name, bytes - length, length).await? else { return Ok(None) };
            let Some(tail) = end.len().checked_sub(packs::TAIL_BYTES) else { return Ok(None) };
            let Ok(table) = packs::table_bytes(&end[tail..]) else { return Ok(None) };
            if table <= end.len() {
                let frames_bytes = bytes - table as u64;
                let table = &end[end.len() - table..];
                return Ok(packs::read_table(&self.cipher(namespace), id, table, frames_bytes).ok());
            }
            if table as u64 > *bytes {
                return Ok(None);
            }
            length = table as u64;
        }
    }

    /// Those of `ids` that are not among the namespace's.
    pub fn lacking(&self, namespace: &Namespace, ids: &[ChunkId]) -> Vec<ChunkId> {
        match self.shelves().get_mut(namespace) {
            Some(index) => index.lacking(ids, SystemTime::now()),
            None => ids.to_vec(),
        }
    }

    /// Keeps the chunks that `frames` are for the namespace, once each is what its id says.
    pub async fn add_chunks(&self, namespace: &Namespace, frames: Bytes) -> Result<(), DepotError> {
        let frames = self.applied(namespace, frames).await?;
        let given = frames.clone();
        let verified = tokio::task::spawn_blocking(move || packs::verify(&given));
        let mut spans = verified.await.map_err(|error| DepotError::Broken(error.to_string()))??;
        let ids: Vec<ChunkId> = spans.iter().map(|span| span.id).collect();
        let mut new: HashSet<ChunkId> = self.lacking(namespace, &ids).into_iter().collect();
        spans.retain(|span| new.remove(&span.id));
        if spans.is_empty() {
            return Ok(());
        }
        self.write_pack(namespace, frames, spans).await
    }

    async fn write_pack(
        &self,
        namespace: &Namespace,
        frames: Bytes,
        spans: Vec<Span>,
    ) -> Result<(), DepotError> {
        let cipher = self.cipher(namespace);
        let sealed = tokio::task::spawn_blocking(move || Pack::seal(&cipher, &frames, &spans));
        let Pack { id, bytes, spans } =
            sealed.await.map_err(|error| DepotError::Broken(error.to_string()))?;
        let half = self.half_made();
        self.bucket.put(&half.0, &pack_name(namespace, &id), bytes).await?;
        self.shelves().entry(namespace.clone()).or_default().add_pack(id, spans, SystemTime::now());
        Ok(())
    }

    /// Commits a checkpoint: all that it names is here, and stays as long as it does.
    pub async fn keep_manifest(
        &self,
        id: Digest,
        bytes: Bytes,
        manifest: &Manifest,
    ) -> Result<Kept, DepotError> {
        let namespace = &manifest.namespace;
        {
            let mut shelves = self.shelves();
            let index = shelves.entry(namespace.clone()).or_default();
            if index.has(&id) {
                return Ok(Kept::Known);
            }
            if let Some(max) = self.quota
                && index.usage(manifest) > max
            {
                return Err(DepotError::Quota { namespace: namespace.clone(), max });
            }
            if let Err(lacking) = index.name(id, manifest, SystemTime::now()) {
                return Ok(Kept::Lacking(lacking));
            }
        }
        let half = self.half_made();
        let name = manifest_name(namespace, &id);
        let mut sealed = Vec::with_capacity(bytes.len() + TAG_BYTES);
        manifest_piece(&self.cipher(namespace), &id).seal(0, &bytes, &mut sealed);
        if let Err(error) = self.bucket.put(&half.0, &name, sealed.into()).await {
            // It may be there all the same, and nobody was told so: then a later survey finds it.
            let removed = self.bucket.delete(&name).await;
            if removed.is_ok()
                && let Some(index) = self.shelves().get_mut(namespace)
            {
                index.unname(&id);
            }
            return Err(error);
        }
        Ok(Kept::New)
    }

    pub async fn manifest(&self, id: &Digest) -> Result<Option<Bytes>, DepotError> {
        let Some(namespace) = self.manifest_namespace(id) else { return Ok(None) };
        let name = manifest_name(&namespace, id);
        let Some(content) = self.bucket.get(&name).await? else { return Ok(None) };
        if content.bytes() > (MANIFEST_BYTES_MAX + TAG_BYTES) as u64 {
            return Ok(None);
        }
        let sealed = content.whole().await.map_err(super::bucket::disk("read", name.as_ref()))?;
        match manifest_piece(&self.cipher(&namespace), id).open(0, sealed) {
            Some(bytes) => Ok(Some(bytes.into())),
            None => Err(DepotError::Altered { name }),
        }
    }

    /// Whose it is; `None`: it is not here.
    pub fn manifest_namespace(&self, id: &Digest) -> Option<Namespace> {
        let shelves = self.shelves();
        shelves.iter().find(|(_, index)| index.has(id)).map(|(namespace, _)| namespace.clone())
    }

    /// Whether the checkpoint is made of all of these.
    pub fn manifest_names(&self, id: &Digest, chunks: &[ChunkId]) -> bool {
        let shelves = self.shelves();
        let mut of = shelves.values().filter(|index| index.has(id));
        of.next().is_some_and(|index| chunks.iter().all(|chunk| index.names(id, chunk)))
    }

    /// A frame of the namespace's chunks; `None`: it is not here.
    pub async fn frame(&self, namespace: &Namespace, id: &ChunkId) -> Result<Option<Bytes>, DepotError> {
        // A pack may be rewritten between the look and the read.
        for _ in 0..2 {
            let place = self.shelves().get(namespace).and_then(|index| index.place(id));
            let Some(Place { pack, span }) = place else { return Ok(None) };
            if let Some(frame) = self.read_frame(namespace, &pack, &span).await? {
                return Ok(Some(frame.into()));
            }
        }
        Ok(None)
    }

    /// `None`: the pack is not there any more.
    async fn read_frame(
        &self,
        namespace: &Namespace,
        pack: &PackId,
        span: &Span,
    ) -> Result<Option<Vec<u8>>, DepotError> {
        let (name, (offset, length)) = (pack_name(namespace, pack), span.place());
        let Some(sealed) = self.bucket.range(&name, offset, length).await? else { return Ok(None) };
        match packs::open(&self.cipher(namespace), pack, span, sealed.into()) {
            Some(frame) => Ok(Some(frame)),
            None => Err(DepotError::Altered { name }),
        }
    }

    /// Lets a checkpoint go. Its chunks stay until they are collected.
    pub async fn delete_manifest(&self, id: &Digest) -> Result<(), DepotError> {
        let Some(namespace) = self.manifest_namespace(id) else { return Ok(()) };
        self.bucket.delete(&manifest_name(&namespace, id)).await?;
        if let Some(index) = self.shelves().get_mut(&namespace) {
            index.unname(id);
        }
        Ok(())
    }

    /// Every manifest that is here, and since when.
    pub fn manifests(&self) -> Vec<(Digest, SystemTime)> {
        self.shelves().values().flat_map(Index::manifests).collect()
    }

    /// Bytes of chunks, and the number of manifests.
    pub fn totals(&self) -> (u64, u64) {
        let shelves = self.shelves();
        let all = shelves.values().map(Index::totals);
        all.fold((0, 0), |(bytes, manifests), (more, others)| (bytes + more, manifests + others))
    }

    /// Removes packs of which nothing is named, and rewrites those of which little is.
    pub async fn collect(&self, grace: Duration) -> Result<u64, DepotError> {
        let now = SystemTime::now();
        let idle = |(namespace, index): (&Namespace, &Index)| (namespace.clone(), index.idle(grace, now));
        let shelves: Vec<_> = self.shelves().iter().map(idle).collect();
        let mut freed = 0;
        for (namespace, idle) in shelves {
            for (id, live) in idle {
                let moved: Vec<ChunkId> = live.iter().map(|span| span.id).collect();
                if !live.is_empty() && !self.rewrite(&namespace, &id, &live).await? {
                    continue;
                }
                let forgotten = self
                    .shelves()
                    .get_mut(&namespace)
                    .is_some_and(|index| index.forget(&id, &moved, grace, SystemTime::now()));
                if forgotten {
                    self.bucket.delete(&pack_name(&namespace, &id)).await?;
                    freed += 1;
                }
            }
        }
        Ok(freed)
    }

    /// Copies the live chunks of a pack into one of their own; false: they cannot all be read.
    async fn rewrite(&self, namespace: &Namespace, id: &PackId, live: &[Span]) -> Result<bool, DepotError> {
        let mut frames = Vec::new();
        for span in live {
            match self.read_frame(namespace, id, span).await {
                Ok(Some(frame)) => frames.extend_from_slice(&frame),
                Ok(None) => return Ok(false),
                Err(error @ DepotError::Altered { .. }) => {
                    tracing::error!(%error, "a pack stays as it is");
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        let Ok(spans) = packs::verify(&frames) else { return Ok(false) };
        self.write_pack(namespace, frames.into(), spans).await?;
        Ok(true)
    }
}
