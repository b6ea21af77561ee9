//! Where the depot's files lie: below a directory, or in an S3 bucket. It moves bytes under names and knows nothing of
//! what they are. What returns from `keep` and `put` is durable and whole.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use hyper::body::{Body, Frame, SizeHint};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _, ReadBuf};

use super::DepotError;

/// Read and written at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// A directory is removed under a new file's feet once, hardly twice.
const KEEP_TRIES: usize = 10;

pub enum Bucket {
    Directory(PathBuf),
    Objects { store: Arc<dyn ObjectStore>, prefix: String },
}

/// A file as a listing tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub bytes: u64,
    pub modified: SystemTime,
}

/// Why a text does not name a bucket.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    #[error("`{0}` is not a depot: write s3://BUCKET or s3://BUCKET/PREFIX, or leave it out for a directory")]
    Url(String),
    #[error(
        "the depot `{0}` has an empty part in its prefix, which not every store tells from none: leave it out"
    )]
    EmptyPart(String),
    #[error(
        "cannot use the bucket `{url}` (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL say how)"
    )]
    Access { url: String, source: object_store::Error },
}

impl Bucket {
    /// Reads `s3://BUCKET/PREFIX`; who may use it and where it is, the environment says as it does for other tools.
    pub fn parse(url: &str) -> Result<Self, BucketError> {
        Self::with_variables(
            url,
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    /// The same, with the environment's variables given.
    pub fn with_variables(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, BucketError> {
        let rest = url.strip_prefix("s3://").ok_or_else(|| BucketError::Url(url.to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        if bucket.is_empty() {
            return Err(BucketError::Url(url.to_owned()));
        }
        if !prefix.is_empty() && prefix.split('/').any(str::is_empty) {
            return Err(BucketError::EmptyPart(url.to_owned()));
        }
        let mut builder = AmazonS3Builder::new();
        for (name, value) in variables {
            let key: Option<AmazonS3ConfigKey> =
                name.strip_prefix("AWS_").and_then(|_| name.to_ascii_lowercase().parse().ok());
            if let Some(key) = key {
                let plain = key == AmazonS3ConfigKey::Endpoint && value.starts_with("http://");
                builder = builder.with_config(key, value);
                builder = if plain { builder.with_allow_http(true) } else { builder };
            }
        }
        // An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = builder.with_bucket_name(bucket).build();
        let store = store.map_err(|source| BucketError::Access { url: url.to_owned(), source })?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Bucket::Objects { store: Arc::new(store), prefix })
    }

    /// Gives a whole file of the disk its name here.
    pub async fn keep(&self, from: &Path, name: &str) -> Result<(), DepotError> {
        match self {
            Bucket::Directory(root) => {
                let to = root.join(name);
                let failed = |action| disk(action, &to);
                let Some(dir) = to.parent() else { return Ok(()) };
                let mut tries = 1;
                loop {
                    tokio::fs::create_dir_all(dir).await.map_err(failed("make the directory of"))?;
                    match tokio::fs::rename(from, &to).await {
                        // Its directory was empty, and went with the file that was removed from it just now.
                        Err(error) if error.kind() == io::ErrorKind::NotFound && tries < KEEP_TRIES => {
                            tries += 1
                        }
                        named => break named.map_err(failed("name"))?,
                    }
                }
                // Directories that were just made want their own parents synced.
                for dir in dir.ancestors().take_while(|dir| dir.starts_with(root)) {
                    let dir = File::open(dir).await.map_err(failed("sync the directory of"))?;
                    dir.sync_all().await.map_err(failed("sync the directory of"))?;
                }
                Ok(())
            }
            Bucket::Objects { store, prefix } => {
                let key = Key::from(format!("{prefix}{name}"));
                let failed = |source| disk("write", Path::new(name))(source);
                let mut file = File::open(from).await.map_err(disk("read", from))?;
                let mut writer = BufWriter::new(store.clone(), key);
                tokio::io::copy(&mut file, &mut writer).await.map_err(failed)?;
                writer.shutdown().await.map_err(failed)
            }
        }
    }

    /// Writes a small file whole; one that is there is replaced.
    pub async fn put(&self, tmp: &Path, name: &str, bytes: Bytes) -> Result<(), DepotError> {
        match self {
            Bucket::Directory(_) => {
                let mut file = File::create(tmp).await.map_err(disk("make", tmp))?;
                file.write_all(&bytes).await.map_err(disk("write", tmp))?;
                file.flush().await.map_err(disk("write", tmp))?;
                file.sync_all().await.map_err(disk("write", tmp))?;
                self.keep(tmp, name).await
            }
            Bucket::Objects { store, prefix } => {
                let key = Key::from(format!("{prefix}{name}"));
                store.put(&key, bytes.into()).await.map(drop).map_err(objects("write", name))
            }
        }
    }

    /// `None`: it is not there.
    pub async fn get(&self, name: &str) -> Result<Option<Content>, DepotError> {
        match self {
            Bucket::Directory(root) => {
                let Some(file) = open(&root.join(name)).await? else { return Ok(None) };
                let left = file.metadata().await.map_err(disk("read", Path::new(name)))?.len();
                Ok(Some(Content { from: From::File(file), left }))
            }
            Bucket::Objects { store, prefix } => {
                match store.get(&Key::from(format!("{prefix}{name}"))).await {
                    Ok(found) => {
                        let left = found.meta.size;
                        Ok(Some(Content { from: From::Stream(found.into_stream()), left }))
                    }
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(objects("read", name)(error)),
                }
            }
        }
    }

    /// `length` bytes from `offset` on, or what of them is there.
    pub async fn range(&self, name: &str, offset: u64, length: u64) -> Result<Option<Bytes>, DepotError> {
        match self {
            Bucket::Directory(root) => {
                let path = root.join(name);
                let Some(mut file) = open(&path).await? else { return Ok(None) };
                file.seek(io::SeekFrom::Start(offset)).await.map_err(disk("read", &path))?;
                let mut bytes = Vec::new();
                file.take(length).read_to_end(&mut bytes).await.map_err(disk("read", &path))?;
                Ok(Some(bytes.into()))
            }
            Bucket::Objects { store, prefix } => {
                let key = Key::from(format!("{prefix}{name}"));
                match store.get_range(&key, offset..offset + length).await {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(objects("read", name)(error)),
                }
            }
        }
    }

    pub async fn delete(&self, name: &str) -> Result<(), DepotError> {
        match self {
            Bucket::Directory(root) => {
                let path = root.join(name);
                match tokio::fs::remove_file(&path).await {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        Err(disk("remove", &path)(error))
                    }
                    _ => {
                        prune(root, &path).await;
                        Ok(())
                    }
                }
            }
            Bucket::Objects { store, prefix } => {
                match store.delete(&Key::from(format!("{prefix}{name}"))).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(objects("remove", name)(error)),
                }
            }
        }
    }

    /// Every file below `folder`, in no order.
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>, DepotError> {
        match self {
            Bucket::Directory(root) => {
                let dir = root.join(folder);
                let (root, failed) = (root.clone(), disk("list", &dir));
                tokio::task::spawn_blocking(move || list_files(&root, &dir))
                    .await
                    .map_err(io::Error::other)
                    .and_then(|listed| listed)
                    .map_err(failed)
            }
            Bucket::Objects { store, prefix } => {
                let key = Key::from(format!("{prefix}{folder}"));
                let mut listing = store.list(Some(&key));
                let mut all = Vec::new();
                while let Some(next) = listing.next().await {
                    let meta = next.map_err(objects("list", folder))?;
                    if let Some(name) = meta.location.as_ref().strip_prefix(prefix.as_str()) {
                        let (name, modified) = (name.to_owned(), meta.last_modified.into());
                        all.push(Listed { name, bytes: meta.size, modified });
                    }
                }
                Ok(all)
            }
        }
    }
}

fn list_files(root: &Path, dir: &Path) -> io::Result<Vec<Listed>> {
    let mut all = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(all),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let (path, meta) = (entry.path(), entry.metadata()?);
        if meta.is_dir() {
            all.extend(list_files(root, &path)?);
        } else if let Ok(name) = path.strip_prefix(root)
            && let Some(name) = name.to_str()
        {
            all.push(Listed { name: name.to_owned(), bytes: meta.len(), modified: meta.modified()? });
        }
    }
    Ok(all)
}

/// Removes the directories that the last file left empty; one that is not, stays.
async fn prune(root: &Path, path: &Path) {
    for dir in path.ancestors().skip(1).take_while(|dir| dir.starts_with(root)) {
        if dir.parent() == Some(root) || tokio::fs::remove_dir(dir).await.is_err() {
            return;
        }
    }
}

async fn open(path: &Path) -> Result<Option<File>, DepotError> {
    match File::open(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(disk("read", path)),
    }
}

pub(super) fn disk(action: &'static str, path: &Path) -> impl Fn(io::Error) -> DepotError + use<> {
    let path = path.to_owned();
    move |source| DepotError::Io { action, path: path.clone(), source }
}

fn objects(action: &'static str, name: &str) -> impl Fn(object_store::Error) -> DepotError + use<> {
    let name = name.to_owned();
    move |source| DepotError::Bucket { action, name: name.clone(), source }
}

/// A file's bytes, on their way out.
pub struct Content {
    from: From,
    left: u64,
}

enum From {
    File(File),
    Stream(BoxStream<'static, object_store::Result<Bytes>>),
}

impl Content {
    /// Bytes still to come.
    pub fn bytes(&self) -> u64 {
        self.left
    }

    /// All of them.
    pub async fn whole(mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::with_capacity(usize::try_from(self.left).unwrap_or(0));
        while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut self).poll_frame(cx)).await {
            if let Ok(data) = frame?.into_data() {
                all.extend_from_slice(&data);
            }
        }
        Ok(all)
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
        let data = match &mut self.from {
            From::File(file) => {
                let mut chunk = vec![0; CHUNK_BYTES];
                let mut buffer = ReadBuf::new(&mut chunk);
                std::task::ready!(Pin::new(file).poll_read(cx, &mut buffer))?;
                let read = buffer.filled().len();
                chunk.truncate(read);
                Bytes::from(chunk)
            }
            From::Stream(stream) => match std::task::ready!(stream.poll_next_unpin(cx)) {
                Some(data) => data.map_err(io::Error::other)?,
                None => Bytes::new(),
            },
        };
        if data.is_empty() {
            return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
        }
        let data = data.slice(..data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX)));
        self.left -= data.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for bad in ["", "berth", "s3://", "s3:///x", "file:///x"] {
            assert!(matches!(Bucket::parse(bad), Err(BucketError::Url(_))), "{bad}");
        }
        for empty in ["s3://berth//x", "s3://berth/a//b"] {
            assert!(matches!(Bucket::parse(empty), Err(BucketError::EmptyPart(_))), "{empty}");
        }
        for (url, expect) in [("s3://berth", ""), ("s3://berth/", ""), ("s3://berth/a/b/", "a/b/")] {
            let Ok(Bucket::Objects { prefix, .. }) = Bucket::parse(url) else { panic!("{url}") };
            assert_eq!(prefix, expect);
        }
    }
}
