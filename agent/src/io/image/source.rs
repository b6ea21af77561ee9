//! Owns what the three kinds of sources have in common: a plan of the image, then its layers one by one.

use std::fs::{self, File};
use std::io::{self, Seek};
use std::path::Path;

use super::archive::{Archive, Extent};
use super::cosign::Offer;
use super::layout::Layout;
use super::manifest::{Configuration, DOCUMENT_BYTES_MAX, Descriptor, Document, Platform};
use super::registry::Endpoint;
use super::{CosignKey, Digest, ImageConfig, ImageError, archive, cosign, layout, manifest};

/// An index may point to indexes; nobody needs more than this.
const INDEX_DEPTH_MAX: u32 = 3;

pub(super) enum Source<'a> {
    Registry(Endpoint),
    Layout { layout: Layout<'a>, path: &'a Path, tag: Option<&'a str> },
    Archive { archive: Archive, path: &'a Path },
}

/// What an image consists of.
pub(super) struct Plan {
    pub manifest_digest: Digest,
    /// Of what names it: the index that was asked for, if it was one, down to the manifest.
    pub documents: Vec<Digest>,
    pub config: ImageConfig,
    /// Lowest first.
    pub layers: Vec<Layer>,
    pub source_stamp: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub diff_id: Digest,
    /// As the source has it, compressed or not.
    pub bytes: u64,
    blob: Blob,
}

#[derive(Debug, Clone)]
enum Blob {
    Digest(Digest),
    Part(Extent),
}

impl Source<'_> {
    /// Finds out what `image` consists of on `platform`, without its layers.
    ///
    /// `work` is a directory for temporary files.
    pub async fn plan(&self, image: &str, platform: &Platform, work: &Path) -> Result<Plan, ImageError> {
        let stamp = |stamp: io::Result<String>, path: &Path| {
            stamp.map(Some).map_err(|error| layout::open_error(image, path, &error))
        };
        // The stamp is taken first: a source that changes meanwhile is read again next time.
        let (index, source_stamp) = match self {
            Source::Registry(endpoint) => (endpoint.document(None).await?, None),
            Source::Layout { layout, path, tag } => {
                let source_stamp = stamp(layout::stamp(path), path)?;
                let candidates = layout.candidates(*tag)?;
                let chosen = match candidates.as_slice() {
                    [only] => only,
                    several => choose(image, several, platform)?,
                };
                (layout.document(chosen)?, source_stamp)
            }
            Source::Archive { archive, path } => {
                let source_stamp = stamp(archive::stamp(path), path)?;
                let (config, extents) = archive.contents()?;
                let blobs = extents.into_iter().map(|extent| (Blob::Part(extent), extent.bytes));
                return plan(
                    image,
                    platform,
                    vec![Digest::of(&config)],
                    &config,
                    blobs.collect(),
                    source_stamp,
                );
            }
        };
        let (documents, config, layers) = self.manifest(image, platform, index).await?;
        let config = self.configuration(image, &config, work).await?;
        let blobs = layers.into_iter().map(|layer| (Blob::Digest(layer.digest), layer.size));
        plan(image, platform, documents, &config, blobs.collect(), source_stamp)
    }

    /// The manifest for `platform`, starting from a manifest or index; and the digests of all on the way, its own last.
    async fn manifest(
        &self,
        image: &str,
        platform: &Platform,
        mut bytes: Vec<u8>,
    ) -> Result<(Vec<Digest>, Descriptor, Vec<Descriptor>), ImageError> {
        let mut documents = Vec::new();
        for _ in 0..INDEX_DEPTH_MAX {
            documents.push(Digest::of(&bytes));
            match manifest::parse(&bytes).map_err(|why| ImageError::malformed(&image, why))? {
                Document::Manifest { config, layers } => return Ok((documents, config, layers)),
                Document::Index(index) => {
                    let chosen = choose(image, &index, platform)?;
                    bytes = match self {
                        Source::Registry(endpoint) => endpoint.document(Some(&chosen.digest)).await?,
                        Source::Layout { layout, .. } => layout.document(chosen)?,
                        Source::Archive { .. } => break,
                    };
                    let actual = Digest::of(&bytes);
                    if actual != chosen.digest {
                        let (expected, actual) = (chosen.digest.to_string(), actual.to_string());
                        let what = format!("a manifest of {image}");
                        return Err(ImageError::DigestMismatch { what, expected, actual });
                    }
                }
            }
        }
        Err(ImageError::malformed(&image, "its indexes are nested too deeply"))
    }

    /// Which of the keys has signed the image, by one of the digests that name it.
    ///
    /// # Errors
    /// None has; or the registry does not say.
    pub async fn signed_by(
        &self,
        image: &str,
        keys: &[CosignKey],
        documents: &[Digest],
        work: &Path,
    ) -> Result<Digest, ImageError> {
        let unsigned = |why: String| ImageError::Unsigned { image: image.to_owned(), why };
        let Source::Registry(endpoint) = self else {
            return Err(unsigned("it is a file, and has no signature beside it".to_owned()));
        };
        let mut why = "it has no signature in its registry".to_owned();
        for document in documents {
            let Some(found) = endpoint.beside(cosign::tag(document)).await? else { continue };
            let offers = match cosign::offers(&found) {
                Ok(offers) => offers,
                Err(malformed) => {
                    why = format!("its signatures cannot be read: {malformed}");
                    continue;
                }
            };
            for Offer { payload, signature } in offers {
                let payload = small_blob(endpoint, image, &payload, work).await?;
                match cosign::signed_by(keys, documents, &payload, &signature) {
                    Ok(key) => return Ok(key),
                    Err(other) => why = other,
                }
            }
        }
        Err(unsigned(why))
    }

    async fn configuration(
        &self,
        image: &str,
        config: &Descriptor,
        work: &Path,
    ) -> Result<Vec<u8>, ImageError> {
        if config.size > DOCUMENT_BYTES_MAX {
            return Err(ImageError::malformed(&image, "its configuration is larger than 4 MiB"));
        }
        match self {
            Source::Registry(endpoint) => small_blob(endpoint, image, config, work).await,
            Source::Layout { layout, .. } => layout.document(config),
            Source::Archive { .. } => Err(ImageError::malformed(&image, "an archive has no manifest")),
        }
    }

    /// A layer as the source has it, its digest verified where the source names one; `moved` as in
    /// [`Endpoint::blob`].
    pub async fn fetch(
        &self,
        image: &str,
        layer: &Layer,
        work: &Path,
        mut moved: impl FnMut(i64),
    ) -> Result<io::Take<File>, ImageError> {
        let disk = |error: io::Error| ImageError::disk(&image, work, &error);
        match (self, &layer.blob) {
            (Source::Registry(endpoint), Blob::Digest(digest)) => {
                let mut file = nameless_file(work).map_err(disk)?;
                endpoint.blob(digest, layer.bytes, &mut file, moved).await?;
                file.rewind().map_err(disk)?;
                Ok(io::Read::take(file, layer.bytes))
            }
            (Source::Layout { layout, .. }, Blob::Digest(digest)) => {
                let mut file = layout.blob(digest)?;
                file.rewind().map_err(disk)?;
                moved(layer.bytes as i64);
                Ok(io::Read::take(file, layer.bytes))
            }
            (Source::Archive { archive, .. }, Blob::Part(extent)) => {
                moved(layer.bytes as i64);
                archive.part(*extent).map_err(disk)
            }
            _ => Err(ImageError::malformed(&image, "a layer belongs to another source")),
        }
    }
}

/// A blob whose size was found to be small.
async fn small_blob(
    endpoint: &Endpoint,
    image: &str,
    blob: &Descriptor,
    work: &Path,
) -> Result<Vec<u8>, ImageError> {
    let disk = |error: io::Error| ImageError::disk(&image, work, &error);
    let mut file = nameless_file(work).map_err(disk)?;
    endpoint.blob(&blob.digest, blob.size, &mut file, |_| {}).await?;
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| io::Read::read_to_end(&mut file, &mut bytes)).map_err(disk)?;
    Ok(bytes)
}

fn choose<'a>(
    image: &str,
    index: &'a [Descriptor],
    platform: &Platform,
) -> Result<&'a Descriptor, ImageError> {
    manifest::choose(index, platform).ok_or_else(|| ImageError::PlatformMissing {
        image: image.to_owned(),
        wanted: platform.to_string(),
        offered: manifest::offered(index),
    })
}

fn plan(
    image: &str,
    platform: &Platform,
    documents: Vec<Digest>,
    configuration: &[u8],
    blobs: Vec<(Blob, u64)>,
    source_stamp: Option<String>,
) -> Result<Plan, ImageError> {
    let configuration: Configuration =
        manifest::parse_configuration(configuration).map_err(|why| ImageError::malformed(&image, why))?;
    if !configuration.runs_on(platform) {
        return Err(ImageError::PlatformMissing {
            image: image.to_owned(),
            wanted: platform.to_string(),
            offered: super::error::clip(&configuration.platform.to_string()),
        });
    }
    if configuration.diff_ids.len() != blobs.len() {
        let why = format!("{} layers, but {} diff ids", blobs.len(), configuration.diff_ids.len());
        return Err(ImageError::malformed(&image, why));
    }
    let layers = configuration.diff_ids.into_iter().zip(blobs);
    let layers = layers.map(|(diff_id, (blob, bytes))| Layer { diff_id, bytes, blob }).collect();
    let Some(manifest_digest) = documents.last().copied() else {
        return Err(ImageError::malformed(&image, "it has no manifest"));
    };
    Ok(Plan { manifest_digest, documents, config: configuration.config, layers, source_stamp })
}

/// A file that is gone as soon as nobody has it open, however this process ends.
fn nameless_file(work: &Path) -> io::Result<File> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let path = work.join(format!("blob-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}
