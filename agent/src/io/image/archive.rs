//! Owns the reading of images from `docker save` archives: one file, read in place, its layers never copied.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Deserialize;

use super::ImageError;
use super::error::clip;
use super::layout::{open_error, open_regular};
use super::manifest::DOCUMENT_BYTES_MAX;
use super::tar_stream::{Kind, TarError, TarStream};

/// An archive has some three members a layer.
const MEMBERS_MAX: usize = 10_000;
const LINKS_FOLLOWED_MAX: u32 = 4;

/// What tells whether an archive may have been replaced.
pub(super) fn stamp(path: &Path) -> io::Result<String> {
    let metadata = open_regular(path)?.metadata()?;
    Ok(format!("{}-{}.{:09}", metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}

/// A part of the archive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub offset: u64,
    pub bytes: u64,
}

enum Member {
    File(Extent),
    Link(String),
}

pub(super) struct Archive {
    image: String,
    file: File,
    members: BTreeMap<String, Member>,
}

impl Archive {
    /// Opens an archive and reads its table of contents.
    pub fn open(path: &Path, image: String) -> Result<Archive, ImageError> {
        let mut file = open_regular(path).map_err(|error| open_error(&image, path, &error))?;
        let members = members(&mut file).map_err(|error| match error {
            TarError::Malformed(why) => {
                ImageError::malformed(&image, format!("{why}; an archive must not be compressed"))
            }
            TarError::Read(error) => ImageError::disk(&image, path, &error),
        })?;
        Ok(Archive { image, file, members })
    }

    /// The configuration, and where each layer lies, lowest first.
    pub fn contents(&self) -> Result<(Vec<u8>, Vec<Extent>), ImageError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Image {
            config: String,
            layers: Option<Vec<String>>,
            repo_tags: Option<Vec<String>>,
        }
        let malformed = |why: String| ImageError::malformed(&self.image, why);
        let index = self.document("manifest.json")?;
        let mut images: Vec<Image> = serde_json::from_slice(&index)
            .map_err(|error| malformed(format!("its manifest.json: {error}")))?;
        let image = match images.len() {
            1 => images.remove(0),
            0 => return Err(malformed("its manifest.json names no image".into())),
            _ => {
                let names: Vec<String> =
                    images.iter().filter_map(|image| image.repo_tags.as_ref()?.first().cloned()).collect();
                return Err(malformed(format!(
                    "it holds several images, save one alone: {}",
                    clip(&names.join(", "))
                )));
            }
        };
        let layers =
            image.layers.unwrap_or_default().iter().map(|name| self.find(name)).collect::<Result<_, _>>()?;
        Ok((self.document(&image.config)?, layers))
    }

    /// A part of the archive, as a reader of its own.
    pub fn part(&self, extent: Extent) -> io::Result<io::Take<File>> {
        // A file opened anew has its own position; layers are read side by side.
        let mut file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file)))?;
        file.seek(SeekFrom::Start(extent.offset))?;
        Ok(file.take(extent.bytes))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let extent = self.find(name)?;
        if extent.bytes > DOCUMENT_BYTES_MAX {
            return Err(ImageError::malformed(
                &self.image,
                format!("its {} is larger than 4 MiB", clip(name)),
            ));
        }
        let mut bytes = Vec::new();
        self.part(extent)
            .and_then(|mut part| part.read_to_end(&mut bytes))
            .map_err(|error| ImageError::Failed { image: self.image.clone(), why: error.to_string() })?;
        Ok(bytes)
    }

    fn find(&self, name: &str) -> Result<Extent, ImageError> {
        let mut at = normal("", name);
        for _ in 0..=LINKS_FOLLOWED_MAX {
            match self.members.get(&at) {
                Some(Member::File(extent)) => return Ok(*extent),
                // docker saved a repeated layer as a link to the first.
                Some(Member::Link(target)) => {
                    at = normal(at.rsplit_once('/').map_or("", |(parent, _)| parent), target)
                }
                None => break,
            }
        }
        Err(ImageError::malformed(
            &self.image,
            format!("it is no docker archive, or a part is missing: {}", clip(name)),
        ))
    }
}

fn members(file: &mut File) -> Result<BTreeMap<String, Member>, TarError> {
    let mut members = BTreeMap::new();
    let mut position = 0;
    loop {
        // A stream from each member on, so that the data between is not read.
        file.seek(SeekFrom::Start(position))?;
        let mut tar = TarStream::new(&mut *file);
        let Some(entry) = tar.next_entry()? else { return Ok(members) };
        let offset = position + tar.position();
        position = offset
            .checked_add(entry.size)
            .and_then(|end| end.checked_next_multiple_of(512))
            .ok_or_else(|| TarError::Malformed("a size is out of range".into()))?;
        let path = normal("", &String::from_utf8_lossy(&entry.path));
        match entry.kind {
            Kind::File => drop(members.insert(path, Member::File(Extent { offset, bytes: entry.size }))),
            Kind::Symlink => {
                drop(members.insert(path, Member::Link(String::from_utf8_lossy(&entry.link).into_owned())));
            }
            _ => {}
        }
        if members.len() > MEMBERS_MAX {
            return Err(TarError::Malformed(format!("it has more than {MEMBERS_MAX} members")));
        }
    }
}

/// `path` as seen from the directory `base`, by its letters alone: these names are keys, no paths of this machine.
fn normal(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
