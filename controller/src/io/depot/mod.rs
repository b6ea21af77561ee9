//! Keeps blobs, logs and checkpoints as files in a `bucket`: blobs by their digest, logs by pod and epoch, checkpoints as
//! manifests and packs, encrypted. It alone names those files; who may fetch what, `http` decides.
//!
//! A file appears under its name only when it is whole, checked and durable: until then it is in `tmp` on the disk.

pub mod bucket;
mod check;
pub mod cipher;
mod differences;
mod index;
pub mod packs;
mod saved;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::{Digest, Epoch, Namespace, PodId};
use berth_protocol::log::RecordError;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

pub use self::bucket::{Bucket, BucketError, Content};
use self::check::Check;
use self::cipher::Keys;
use self::packs::PackError;
pub use self::saved::{GRACE, Kept};
use self::saved::{MANIFESTS, PACKS, Saved};

/// Written at once.
const CHUNK_BYTES: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    #[error("it is longer than {max} bytes, the most allowed here")]
    TooLarge { max: u64 },
    #[error("its digest is {found}, not {expected}: it was damaged on its way, send it again")]
    Digest { expected: Digest, found: Digest },
    #[error("it is no log: {source} (at byte {at})")]
    NotALog { at: u64, source: RecordError },
    #[error("it broke off: {0}")]
    Broken(String),
    #[error("it is no sequence of chunks: {0}")]
    Pack(#[from] PackError),
    #[error("it differs from {} chunks that are not here", .0.len())]
    Bases(Vec<ChunkId>),
    #[error("the checkpoints of namespace {namespace} would take more than {max} bytes, its quota")]
    Quota { namespace: Namespace, max: u64 },
    #[error(
        "{name} is not what this controller put into its depot: it was damaged or changed, or is of another store"
    )]
    Altered { name: String },
    #[error("the depot cannot {action} {name} in its bucket: {source}")]
    Bucket { action: &'static str, name: String, source: object_store::Error },
    #[error(transparent)]
    Url(#[from] BucketError),
    #[error("the depot cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl DepotError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self, DepotError::Io { source, .. } if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// What the depot can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Blob(Digest),
    Log { pod: PodId, epoch: Epoch },
}

pub struct Depot {
    bucket: Bucket,
    tmp: PathBuf,
    uploads: AtomicU64,
    saved: Saved,
    /// Of the checkpoints of one namespace, in bytes.
    quota: Option<u64>,
}

impl Depot {
    /// Opens the depot below `root`, which is made where missing, or in `bucket`, with `root` for what is not whole.
    /// What an earlier life left half-made goes. `secret` is the store's.
    pub fn open(
        root: PathBuf,
        bucket: Option<Bucket>,
        secret: &[u8; 32],
        quota: Option<u64>,
    ) -> Result<Self, DepotError> {
        let tmp = root.join("tmp");
        match std::fs::remove_dir_all(&tmp) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(DepotError::Io { action: "clear", path: tmp, source });
            }
            _ => {}
        }
        let mut made = vec![tmp.clone()];
        if bucket.is_none() {
            made.extend(["blobs", "logs", PACKS, MANIFESTS].map(|folder| root.join(folder)));
        }
        for path in made {
            std::fs::create_dir_all(&path).map_err(|source| DepotError::Io {
                action: "make",
                path,
                source,
            })?;
        }
        let bucket = bucket.unwrap_or(Bucket::Directory(root));
        Ok(Self { bucket, tmp, uploads: AtomicU64::new(0), saved: Saved::of(Keys::of(secret)), quota })
    }

    fn name(item: &Item) -> String {
        match item {
            Item::Blob(digest) => {
                let hex = digest.hex();
                format!("blobs/{}/{hex}", &hex[..2])
            }
            Item::Log { pod, epoch } => format!("logs/{}/{}/{epoch}", pod.uid, pod.index),
        }
    }

    fn half_made(&self) -> HalfMade {
        let n = self.uploads.fetch_add(1, Ordering::Relaxed);
        HalfMade(self.tmp.join(n.to_string()))
    }

    /// Takes a whole item in: checked while it comes, on disk when this returns. One that is there is replaced.
    pub async fn put<B>(&self, item: &Item, bytes_max: u64, mut body: B) -> Result<u64, DepotError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let half = self.half_made();
        let path = &half.0;
        let failed = |action| bucket::disk(action, path);
        let mut file = File::create(path).await.map_err(failed("make"))?;
        file.set_max_buf_size(CHUNK_BYTES);
        let mut check = Check::of(item);
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| DepotError::Broken(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            bytes += data.len() as u64;
            if bytes > bytes_max {
                return Err(DepotError::TooLarge { max: bytes_max });
            }
            check.update(&data)?;
            file.write_all(&data).await.map_err(failed("write"))?;
        }
        check.finish(item)?;
        file.flush().await.map_err(failed("write"))?;
        file.sync_all().await.map_err(failed("write"))?;
        drop(file);
        self.bucket.keep(path, &Self::name(item)).await?;
        Ok(bytes)
    }

    /// `None`: it is not there.
    pub async fn get(&self, item: &Item) -> Result<Option<Content>, DepotError> {
        self.bucket.get(&Self::name(item)).await
    }

    /// Removes an item, if it is there.
    pub async fn delete(&self, item: &Item) -> Result<(), DepotError> {
        self.bucket.delete(&Self::name(item)).await
    }
}

/// A file in `tmp`; it goes unless it was renamed.
struct HalfMade(PathBuf);

impl Drop for HalfMade {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
