//! Owns the making of a complete image in the store: one exclusive lock a layer, several layers at once, the record
//! last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::digest::Digester;
use super::disk::{Disk, LayerLock, LayerMeta, WorkDir, now_ms};
use super::manifest::Platform;
use super::source::{Layer, Plan, Source};
use super::unpack::{UnpackError, unpack};
use super::{
    CosignKey, Digest, ImageError, ImageRecord, ImageRef, Progress, RegistryConfig, archive, layout, registry,
};

const LAYERS_AT_ONCE_MAX: usize = 3;
const LOCK_POLL: Duration = Duration::from_millis(50);
const READ_BUFFER_BYTES: usize = 128 << 10;

/// How far a pull is and whether it should go on; shared with the threads that unpack and report.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    layers_total: AtomicU32,
    layers_done: AtomicU32,
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
    unpacked_bytes: AtomicU64,
    stop: AtomicBool,
}

impl Gauge {
    pub fn progress(&self) -> Progress {
        Progress {
            layers_total: self.layers_total.load(Ordering::Relaxed),
            layers_done: self.layers_done.load(Ordering::Relaxed),
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
        }
    }

    /// Makes unpacking end soon, with an error.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn begin(&self, layers: &BTreeMap<Digest, Layer>) {
        self.layers_total.store(layers.len() as u32, Ordering::Relaxed);
        self.layers_done.store(0, Ordering::Relaxed);
        self.bytes_total.store(layers.values().map(|layer| layer.bytes).sum(), Ordering::Relaxed);
        self.bytes_done.store(0, Ordering::Relaxed);
        self.unpacked_bytes.store(0, Ordering::Relaxed);
    }

    /// Two's complement: a download that begins anew takes back what it had added.
    fn moved(&self, bytes: i64) {
        self.bytes_done.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// One image to be brought here.
pub(super) struct Pull<'a> {
    pub reference: &'a ImageRef,
    pub registry: &'a RegistryConfig,
    /// Of the compressed layers together, and again of what they unpack to.
    pub image_bytes_max: u64,
    /// One of which must have signed it; none: it needs no signature.
    pub keys: &'a [CosignKey],
    pub disk: &'a Disk,
    pub work: &'a WorkDir,
    pub gauge: Arc<Gauge>,
}

impl Pull<'_> {
    /// Brings the image here. Layers that were completed before an error stay, for the next attempt.
    pub async fn run(&self) -> Result<ImageRecord, ImageError> {
        let image = self.reference.to_string();
        match self.reference {
            ImageRef::Registry(name) => {
                let mut refusals = Vec::new();
                let mut next_is_plain = false;
                for endpoint in registry::endpoints(name, self.registry)? {
                    // An unsafe way to the same registry is for registries that have no safe one.
                    if next_is_plain && !matches!(refusals.last(), Some(ImageError::Unreachable { .. })) {
                        break;
                    }
                    next_is_plain = endpoint.next_is_plain;
                    match self.from(Source::Registry(endpoint)).await {
                        Err(error @ (ImageError::DiskFull { .. } | ImageError::Failed { .. })) => {
                            return Err(error);
                        }
                        Err(error) => refusals.push(error),
                        Ok(record) => return Ok(record),
                    }
                }
                // The registry's own answer comes last, and says most.
                Err(refusals
                    .pop()
                    .unwrap_or(ImageError::NotFound { image, why: "it has no registry".into() }))
            }
            ImageRef::Layout { path, tag } => {
                let layout = layout::Layout::new(path, image);
                self.from(Source::Layout { layout, path, tag: tag.as_deref() }).await
            }
            ImageRef::Archive { path } => {
                let archive = archive::Archive::open(path, image)?;
                self.from(Source::Archive { archive, path }).await
            }
        }
    }

    async fn from(&self, source: Source<'_>) -> Result<ImageRecord, ImageError> {
        let image = self.reference.to_string();
        let plan = source.plan(&image, &Platform::this(), self.work.path()).await?;
        let signed_by = match self.keys {
            [] => None,
            keys => Some(source.signed_by(&image, keys, &plan.documents, self.work.path()).await?),
        };
        // A layer may occur twice; it is brought once.
        let layers: BTreeMap<Digest, Layer> =
            plan.layers.iter().map(|layer| (layer.diff_id, layer.clone())).collect();
        self.check_size(&layers)?;
        self.gauge.begin(&layers);
        let held: Vec<(LayerMeta, LayerLock)> = stream::iter(layers.values())
            .map(|layer| self.bring(&source, layer))
            .buffer_unordered(LAYERS_AT_ONCE_MAX)
            .try_collect()
            .await?;
        let unpacked_bytes = held.iter().map(|(meta, _)| meta.bytes).sum();
        let record = self.record(plan, unpacked_bytes, signed_by);
        // Until here the locks keep the layers from being collected; from here the record does.
        self.disk.write_record(&record, self.work).map_err(|error| self.disk_error(&error))?;
        self.disk.touch(&record, record.pulled_at_ms).map_err(|error| self.disk_error(&error))?;
        drop(held);
        Ok(record)
    }

    fn check_size(&self, layers: &BTreeMap<Digest, Layer>) -> Result<(), ImageError> {
        let total = layers.values().fold(0_u64, |sum, layer| sum.saturating_add(layer.bytes));
        if total > self.image_bytes_max {
            let why = format!("its layers have {total} bytes, {} are allowed", self.image_bytes_max);
            return Err(ImageError::TooLarge { image: self.reference.to_string(), why });
        }
        Ok(())
    }

    fn record(&self, plan: Plan, unpacked_bytes: u64, signed_by: Option<Digest>) -> ImageRecord {
        let pulled_at_ms = now_ms();
        ImageRecord {
            reference: self.reference.clone(),
            manifest_digest: plan.manifest_digest,
            layers: plan.layers.iter().map(|layer| layer.diff_id).collect(),
            config: plan.config,
            unpacked_bytes,
            signed_by,
            pulled_at_ms,
            source_stamp: plan.source_stamp,
            last_used_ms: pulled_at_ms,
        }
    }

    /// Sees to it that a layer is here, and keeps it.
    ///
    /// A lock is never waited for while another is held exclusively, hence no deadlock: what waits here holds
    /// shared locks on complete layers only, and nobody who makes a layer needs those exclusively.
    async fn bring(&self, source: &Source<'_>, layer: &Layer) -> Result<(LayerMeta, LayerLock), ImageError> {
        let disk = |error: io::Error| self.disk_error(&error);
        let mut fetched = false;
        loop {
            let lock = self.lock(&layer.diff_id, false).await?;
            if let Some(meta) = self.disk.layer_meta(&layer.diff_id).map_err(disk)? {
                if !fetched {
                    self.gauge.moved(layer.bytes as i64);
                }
                self.gauge.layers_done.fetch_add(1, Ordering::Relaxed);
                return Ok((meta, lock));
            }
            drop(lock);
            let lock = self.lock(&layer.diff_id, true).await?;
            if self.disk.layer_meta(&layer.diff_id).map_err(disk)?.is_none() {
                self.make(source, layer, lock).await?;
                fetched = true;
            }
        }
    }

    async fn lock(&self, layer: &Digest, exclusive: bool) -> Result<LayerLock, ImageError> {
        loop {
            match self.disk.try_lock(layer, exclusive).map_err(|error| self.disk_error(&error))? {
                Some(lock) => return Ok(lock),
                None => tokio::time::sleep(LOCK_POLL).await,
            }
        }
    }

    async fn make(&self, source: &Source<'_>, layer: &Layer, lock: LayerLock) -> Result<(), ImageError> {
        let image = self.reference.to_string();
        let work = self.work.path();
        let blob = source.fetch(&image, layer, work, |bytes| self.gauge.moved(bytes)).await?;
        let half = work.join(format!("layer-{}", layer.diff_id.hex()));
        let reader = LayerReader {
            inner: Box::new(io::empty()),
            digester: Digester::default(),
            gauge: self.gauge.clone(),
            bytes_max: self.image_bytes_max,
        };
        let (diff_id, disk) = (layer.diff_id, self.disk.clone());
        let make = move || {
            let result = make_layer(&image, &disk, &diff_id, blob, &half, reader, &lock);
            if result.is_err() {
                // Space is given back at once, also where other layers of the image go on.
                let _ = fs::remove_dir_all(&half);
            }
            result
        };
        tokio::task::spawn_blocking(make).await.map_err(|error| ImageError::Failed {
            image: self.reference.to_string(),
            why: format!("unpacking ended: {error}"),
        })?
    }

    fn disk_error(&self, error: &io::Error) -> ImageError {
        ImageError::disk(self.reference, self.disk.root(), error)
    }
}

/// Unpacks a blob, verifies what came out of it, and makes it the store's.
fn make_layer(
    image: &str,
    disk: &Disk,
    diff_id: &Digest,
    blob: io::Take<File>,
    half: &Path,
    mut reader: LayerReader,
    lock: &LayerLock,
) -> Result<(), ImageError> {
    let failed = |error: io::Error| ImageError::disk(&image, disk.root(), &error);
    let tree = half.join("tree");
    fs::create_dir_all(&tree).map_err(failed)?;
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    reader.inner = decompressed(blob).map_err(|error| ImageError::malformed(&image, error.to_string()))?;
    let unpacked = unpack(BufReader::with_capacity(READ_BUFFER_BYTES, &mut reader), &tree);
    let unpacked = unpacked.map_err(|error| unpack_error(image, disk, diff_id, error))?;
    let actual = reader.digester.finish();
    if actual != *diff_id {
        return Err(ImageError::DigestMismatch {
            what: format!("a layer of {image}, uncompressed,"),
            expected: diff_id.to_string(),
            actual: actual.to_string(),
        });
    }
    let meta = LayerMeta { bytes: unpacked.bytes, entries: unpacked.entries };
    disk.commit_layer(diff_id, half, meta, lock).map_err(failed)
}

fn unpack_error(image: &str, disk: &Disk, layer: &Digest, error: UnpackError) -> ImageError {
    let why = format!("layer {layer}: {error}");
    match &error {
        UnpackError::Write { source, .. } => match ImageError::disk(&image, disk.root(), source) {
            full @ ImageError::DiskFull { .. } => full,
            _ => ImageError::Failed { image: image.to_owned(), why },
        },
        UnpackError::Read(cause) if cause.kind() == io::ErrorKind::FileTooLarge => {
            ImageError::TooLarge { image: image.to_owned(), why: cause.to_string() }
        }
        UnpackError::Read(cause) if cause.raw_os_error().is_some() => {
            ImageError::Failed { image: image.to_owned(), why }
        }
        _ => ImageError::malformed(&image, why),
    }
}

/// A blob's tar stream. What it is compressed with is seen from its first bytes: media types are often wrong.
fn decompressed(blob: io::Take<File>) -> io::Result<Box<dyn Read + Send>> {
    let mut blob = BufReader::with_capacity(READ_BUFFER_BYTES, blob);
    let head = blob.fill_buf()?;
    Ok(match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(blob)?),
        [0xfd, b'7', b'z', b'X', b'Z', ..] | [b'B', b'Z', b'h', ..] => {
            return Err(io::Error::other(
                "a layer is compressed by xz or bzip2, only gzip and zstd are supported",
            ));
        }
        _ => Box::new(blob),
    })
}

/// Digests, counts and, when told to stop, ends a layer's tar stream.
struct LayerReader {
    inner: Box<dyn Read + Send>,
    digester: Digester,
    gauge: Arc<Gauge>,
    bytes_max: u64,
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.gauge.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull was stopped"));
        }
        let n = self.inner.read(buffer)?;
        self.digester.update(&buffer[..n]);
        let bytes = self.gauge.unpacked_bytes.fetch_add(n as u64, Ordering::Relaxed).saturating_add(n as u64);
        if bytes > self.bytes_max {
            let why = format!("its layers unpack to more than {} bytes", self.bytes_max);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        Ok(n)
    }
}
