//! Owns the ways in which an image cannot be had, as users read them.

use std::io;
use std::path::Path;

use berth_protocol::image::ImageRefError;
use serde::{Deserialize, Serialize};

/// How much of a text from outside (a registry's answer, a name in an archive) a message repeats.
const FOREIGN_TEXT_CHARS_MAX: usize = 300;

/// Why an image is not there. It crosses the pipe between worker and daemon, hence plain values only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ImageError {
    #[error(
        "\"{reference}\" is not an image reference: {why}; write registry/name:tag, registry/name@sha256:…, \
         oci:/path[:tag] or docker-archive:/file.tar"
    )]
    ReferenceInvalid { reference: String, why: String },
    #[error("image {image} not found: {why}; check its name and tag")]
    NotFound { image: String, why: String },
    #[error(
        "{registry} refused image {image}: {why}; check the image's name, and the entry for {registry} in the \
         agent's registry auth file"
    )]
    Unauthorized { image: String, registry: String, why: String },
    #[error(
        "{what} has digest {actual} instead of {expected}: it was damaged or tampered with; push or save the \
         image again"
    )]
    DigestMismatch { what: String, expected: String, actual: String },
    #[error(
        "image {image} is not made for {wanted}, only for {offered}; build it for this platform or choose \
         another node by node.arch"
    )]
    PlatformMissing { image: String, wanted: String, offered: String },
    #[error(
        "{registry} cannot be reached for image {image}: {why}; check the network, the registry and its mirrors"
    )]
    Unreachable { image: String, registry: String, why: String },
    #[error("no space left at {path} for image {image}; free space there or give the node a larger disk")]
    DiskFull { image: String, path: String },
    #[error("image {image} is malformed: {why}; build or save it again")]
    Malformed { image: String, why: String },
    #[error("image {image} is too large: {why}; make it smaller")]
    TooLarge { image: String, why: String },
    #[error(
        "image {image} is not signed as this node's policy asks: {why}; sign it (`cosign sign --key …`), or see `signers` in \
         the policy"
    )]
    Unsigned { image: String, why: String },
    #[error("image {image} could not be brought to this node: {why}; see the agent's log")]
    Failed { image: String, why: String },
}

impl From<ImageRefError> for ImageError {
    fn from(error: ImageRefError) -> ImageError {
        ImageError::ReferenceInvalid { reference: error.reference, why: error.why.to_owned() }
    }
}

impl ImageError {
    /// The stable word for pod statuses and metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            ImageError::ReferenceInvalid { .. } => "ImageReferenceInvalid",
            ImageError::NotFound { .. } => "ImageNotFound",
            ImageError::Unauthorized { .. } => "ImageUnauthorized",
            ImageError::DigestMismatch { .. } => "ImageDigestMismatch",
            ImageError::PlatformMissing { .. } => "ImagePlatformMissing",
            ImageError::Unreachable { .. } => "ImageUnreachable",
            ImageError::DiskFull { .. } => "DiskFull",
            ImageError::Malformed { .. } => "ImageMalformed",
            ImageError::TooLarge { .. } => "ImageTooLarge",
            ImageError::Unsigned { .. } => "ImageUnsigned",
            ImageError::Failed { .. } => "ImagePullFailed",
        }
    }

    /// Whether the same request may succeed later with nobody changing the job.
    pub fn retriable(&self) -> bool {
        match self {
            ImageError::Unreachable { .. } | ImageError::DiskFull { .. } | ImageError::Failed { .. } => true,
            ImageError::ReferenceInvalid { .. }
            | ImageError::NotFound { .. }
            | ImageError::Unauthorized { .. }
            | ImageError::DigestMismatch { .. }
            | ImageError::PlatformMissing { .. }
            | ImageError::Malformed { .. }
            | ImageError::Unsigned { .. }
            | ImageError::TooLarge { .. } => false,
        }
    }

    /// Whether another node may do better: its disk, its way to the registry, its files, its architecture, its policy.
    pub fn elsewhere(&self) -> bool {
        match self {
            ImageError::Unreachable { .. }
            | ImageError::DiskFull { .. }
            | ImageError::Failed { .. }
            | ImageError::Unsigned { .. }
            | ImageError::PlatformMissing { .. } => true,
            ImageError::NotFound { image, .. } => {
                image.starts_with("oci:") || image.starts_with("docker-archive:")
            }
            ImageError::ReferenceInvalid { .. }
            | ImageError::Unauthorized { .. }
            | ImageError::DigestMismatch { .. }
            | ImageError::Malformed { .. }
            | ImageError::TooLarge { .. } => false,
        }
    }

    /// An error of this machine's own disk, at `path`.
    pub(super) fn disk(image: &impl ToString, path: &Path, error: &io::Error) -> ImageError {
        let path = path.display().to_string();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ImageError::DiskFull { image: image.to_string(), path }
            }
            _ => ImageError::Failed { image: image.to_string(), why: format!("{path}: {error}") },
        }
    }

    pub(super) fn malformed(image: &impl ToString, why: impl Into<String>) -> ImageError {
        ImageError::Malformed { image: image.to_string(), why: why.into() }
    }
}

/// `text` from outside, fit for one line of a message.
pub(super) fn clip(text: &str) -> String {
    let mut clean: String =
        text.chars().take(FOREIGN_TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(FOREIGN_TEXT_CHARS_MAX).is_some() {
        clean.push('…');
    }
    clean
}
