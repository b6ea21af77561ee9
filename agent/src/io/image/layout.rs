//! Owns the reading of images from directories of the OCI image layout (image specification, "image-layout.md").

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::clip;
use super::manifest::{DOCUMENT_BYTES_MAX, Descriptor, Document};
use super::{Digest, ImageError, manifest};

const TAG_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// What tells whether a layout's tags may have moved: the digest of its index.
pub(super) fn stamp(path: &Path) -> io::Result<String> {
    let index = open_regular(&path.join("index.json"))?;
    Digest::of_reader(index.take(DOCUMENT_BYTES_MAX)).map(|digest| digest.to_string())
}

/// Opens a file for reading unless it is a pipe, a device, or anything else that could block or never end.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

pub(super) struct Layout<'a> {
    image: String,
    path: &'a Path,
}

impl Layout<'_> {
    pub fn new(path: &Path, image: String) -> Layout<'_> {
        Layout { image, path }
    }

    /// The manifests that `tag` may mean: one, or one per platform.
    pub fn candidates(&self, tag: Option<&str>) -> Result<Vec<Descriptor>, ImageError> {
        let path = self.path.join("index.json");
        let bytes = self.read(&path, DOCUMENT_BYTES_MAX)?;
        let document = manifest::parse(&bytes).map_err(|why| ImageError::malformed(&self.image, why))?;
        let Document::Index(index) = document else {
            return Err(ImageError::malformed(&self.image, "its index.json is not an index"));
        };
        let name =
            |entry: &Descriptor| entry.annotations.as_ref().and_then(|all| all.get(TAG_ANNOTATION)).cloned();
        let mut names: Vec<String> = index.iter().filter_map(name).map(|name| clip(&name)).collect();
        names.sort();
        names.dedup();
        let not_found = |why: String| ImageError::NotFound { image: self.image.clone(), why };
        match tag {
            Some(tag) => {
                let tagged: Vec<_> =
                    index.into_iter().filter(|entry| name(entry).as_deref() == Some(tag)).collect();
                if tagged.is_empty() {
                    names.truncate(20);
                    return Err(not_found(format!("the layout has no such tag, only: {}", names.join(", "))));
                }
                Ok(tagged)
            }
            None if index.is_empty() => Err(not_found("the layout holds no image".into())),
            None if names.len() > 1 => {
                names.truncate(20);
                Err(not_found(format!("the layout holds several, name one by its tag: {}", names.join(", "))))
            }
            None => Ok(index),
        }
    }

    pub fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let bytes =
            self.read(&self.blob_path(&descriptor.digest), descriptor.size.min(DOCUMENT_BYTES_MAX))?;
        let actual = Digest::of(&bytes);
        if actual != descriptor.digest {
            return Err(self.mismatch(&descriptor.digest, &actual));
        }
        Ok(bytes)
    }

    /// A layer's blob, its digest verified.
    pub fn blob(&self, digest: &Digest) -> Result<File, ImageError> {
        let path = self.blob_path(digest);
        let file = self.open(&path)?;
        let actual =
            Digest::of_reader(&file).map_err(|error| ImageError::disk(&self.image, &path, &error))?;
        if actual != *digest {
            return Err(self.mismatch(digest, &actual));
        }
        Ok(file)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }

    fn open(&self, path: &Path) -> Result<File, ImageError> {
        open_regular(path).map_err(|error| open_error(&self.image, path, &error))
    }

    fn read(&self, path: &Path, bytes_max: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let read = self.open(path)?.take(bytes_max).read_to_end(&mut bytes);
        read.map_err(|error| ImageError::disk(&self.image, path, &error))?;
        Ok(bytes)
    }

    fn mismatch(&self, expected: &Digest, actual: &Digest) -> ImageError {
        ImageError::DigestMismatch {
            what: format!("a blob of {}", self.image),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }
    }
}

/// Why a file that the image needs cannot be opened.
pub(super) fn open_error(image: &str, path: &Path, error: &io::Error) -> ImageError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ImageError::NotFound {
            image: image.to_owned(),
            why: format!("{} does not exist on this node", path.display()),
        },
        _ => ImageError::Failed { image: image.to_owned(), why: format!("{}: {error}", path.display()) },
    }
}
