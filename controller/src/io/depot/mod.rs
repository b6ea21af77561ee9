//! Keeps blobs and logs as files below one directory: blobs by their digest, logs by pod and epoch. It alone names
//! those files; who may fetch what, `http` decides.
//!
//! A file appears under its name only when it is whole, checked and on disk: until then it is in `tmp`.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use berth_protocol::ids::{Digest, Epoch, PodId};
use berth_protocol::log::{RecordError, read_record};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, SizeHint};
use sha2::Digest as _;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWriteExt as _, ReadBuf};

/// Read and written at once.
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
    root: PathBuf,
    uploads: AtomicU64,
}

impl Depot {
    /// Opens the depot below `root`, which is made where missing. What an earlier life left half-made goes.
    pub fn open(root: PathBuf) -> Result<Self, DepotError> {
        let tmp = root.join("tmp");
        match std::fs::remove_dir_all(&tmp) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(DepotError::Io { action: "clear", path: tmp, source });
            }
            _ => {}
        }
        for path in [tmp, root.join("blobs"), root.join("logs")] {
            std::fs::create_dir_all(&path).map_err(|source| DepotError::Io {
                action: "make",
                path,
                source,
            })?;
        }
        Ok(Self { root, uploads: AtomicU64::new(0) })
    }

    fn path(&self, item: &Item) -> PathBuf {
        match item {
            Item::Blob(digest) => {
                let hex = digest.hex();
                self.root.join("blobs").join(&hex[..2]).join(hex)
            }
            Item::Log { pod, epoch } => {
                let pod_dir = format!("{}/{}", pod.uid, pod.index);
                self.root.join("logs").join(pod_dir).join(epoch.to_string())
            }
        }
    }

    /// Takes a whole item in: checked while it comes, on disk when this returns. One that is there is replaced.
    pub async fn put<B>(&self, item: &Item, bytes_max: u64, mut body: B) -> Result<u64, DepotError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let n = self.uploads.fetch_add(1, Ordering::Relaxed);
        let half = HalfMade(self.root.join("tmp").join(n.to_string()));
        let path = &half.0;
        let failed = |action| {
            let path = path.clone();
            move |source| DepotError::Io { action, path, source }
        };
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
        self.keep(&half, self.path(item)).await?;
        Ok(bytes)
    }

    /// Gives a whole file its name, durably.
    async fn keep(&self, half: &HalfMade, path: PathBuf) -> Result<(), DepotError> {
        let failed = |action| {
            let path = path.clone();
            move |source| DepotError::Io { action, path, source }
        };
        let Some(dir) = path.parent() else { return Ok(()) };
        tokio::fs::create_dir_all(dir).await.map_err(failed("make the directory of"))?;
        tokio::fs::rename(&half.0, &path).await.map_err(failed("name"))?;
        // Directories that were just made want their own parents synced: three levels at most.
        for dir in dir.ancestors().take_while(|dir| dir.starts_with(&self.root)).take(3) {
            let dir = File::open(dir).await.map_err(failed("sync the directory of"))?;
            dir.sync_all().await.map_err(failed("sync the directory of"))?;
        }
        Ok(())
    }

    /// `None`: it is not there.
    pub async fn get(&self, item: &Item) -> Result<Option<Content>, DepotError> {
        let path = self.path(item);
        let failed = |source| DepotError::Io { action: "read", path: path.clone(), source };
        let file = match File::open(&path).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let bytes = file.metadata().await.map_err(failed)?.len();
        Ok(Some(Content { file, left: bytes }))
    }

    /// Removes an item, if it is there. Blocks.
    pub fn delete(&self, item: &Item) -> Result<(), DepotError> {
        let path = self.path(item);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(DepotError::Io { action: "remove", path, source })
            }
            _ => {
                self.prune(&path);
                Ok(())
            }
        }
    }

    /// Removes the directories that the last item left empty; one that is not, stays.
    fn prune(&self, path: &Path) {
        for dir in path.ancestors().skip(1).take_while(|dir| dir.starts_with(&self.root)).take(2) {
            let kept = dir.parent() == Some(&self.root);
            if kept || std::fs::remove_dir(dir).is_err() {
                return;
            }
        }
    }
}

/// A file in `tmp`; it goes unless it was renamed.
struct HalfMade(PathBuf);

impl Drop for HalfMade {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What must be true of an item's bytes.
enum Check {
    Digest(sha2::Sha256),
    /// Bytes of the record that has not come to its end, and where it began.
    Records {
        rest: Vec<u8>,
        at: u64,
    },
}

impl Check {
    fn of(item: &Item) -> Self {
        match item {
            Item::Blob(_) => Check::Digest(sha2::Sha256::new()),
            Item::Log { .. } => Check::Records { rest: Vec::new(), at: 0 },
        }
    }

    fn update(&mut self, data: &[u8]) -> Result<(), DepotError> {
        match self {
            Check::Digest(hash) => hash.update(data),
            Check::Records { rest, at } => {
                rest.extend_from_slice(data);
                let mut read = 0;
                loop {
                    match read_record(&rest[read..]) {
                        Ok((_, bytes)) => read += bytes,
                        Err(RecordError::Torn) => break,
                        Err(source) => return Err(DepotError::NotALog { at: *at + read as u64, source }),
                    }
                }
                rest.drain(..read);
                *at += read as u64;
            }
        }
        Ok(())
    }

    fn finish(self, item: &Item) -> Result<(), DepotError> {
        match (self, item) {
            (Check::Digest(hash), Item::Blob(expected)) => {
                let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                let found = Digest::parse(&format!("sha256:{hex}"));
                match found {
                    Ok(found) if found != *expected => Err(DepotError::Digest { expected: *expected, found }),
                    _ => Ok(()),
                }
            }
            (Check::Records { rest, at }, _) if !rest.is_empty() => {
                Err(DepotError::NotALog { at, source: RecordError::Torn })
            }
            _ => Ok(()),
        }
    }
}

/// An item's bytes, on their way out.
pub struct Content {
    file: File,
    left: u64,
}

impl Content {
    /// Bytes still to come.
    pub fn bytes(&self) -> u64 {
        self.left
    }
}

impl Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut buffer = ReadBuf::new(&mut chunk);
        std::task::ready!(Pin::new(&mut self.file).poll_read(cx, &mut buffer))?;
        let read = buffer.filled().len();
        if read == 0 {
            return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
        }
        let read = read.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= read as u64;
        chunk.truncate(read);
        Poll::Ready(Some(Ok(Frame::data(chunk.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
