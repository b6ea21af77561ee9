//! Owns the node's container images: pulling, unpacking into overlayfs layers, and collecting what
//! is no longer used; it knows nothing of pods, and mounts nothing.
//!
//! Two processes share this code. The daemon uses [`ImageStore`]: it reads small records and never parses an
//! image. Whatever comes from outside (registries, archives, tar streams) is read by a short-lived child, the
//! hidden subcommand `image` ([`worker_main`]), so that TLS, decompression and hostile input stay out of the
//! daemon's memory. The two meet only in the store's directory (`disk`) and on a pipe of JSON lines (`worker`).

mod archive;
mod auth;
mod collect;
mod cosign;
mod digest;
mod disk;
mod error;
mod layout;
mod manifest;
mod pull;
mod record;
mod registry;
mod source;
mod store;
mod tar_stream;
mod unpack;
mod worker;

pub use berth_protocol::image::{ImageRef, RegistryName};
pub use collect::Collected;
pub use cosign::{BadKey, CosignKey, Signer};
pub use digest::Digest;
pub use error::ImageError;
pub use record::{ImageConfig, ImageRecord, Progress, RegistryConfig};
pub use store::{ImageStore, StoreConfig};
pub use worker::worker_main;

/// Reads bytes as each of the things that registries and archives send, and keeps nothing. `None`: they are not that.
pub fn inspect(bytes: &[u8]) -> [Option<u64>; 6] {
    let document = manifest::parse(bytes).ok().map(|document| match document {
        manifest::Document::Index(all) => all.len() as u64,
        manifest::Document::Manifest { layers, .. } => layers.len() as u64,
    });
    let configuration = manifest::parse_configuration(bytes).ok().map(|found| found.diff_ids.len() as u64);
    let mut tar = tar_stream::TarStream::new(bytes);
    let mut entries = 0;
    let whole = loop {
        match tar.next_entry() {
            Ok(Some(_)) => entries += 1,
            Ok(None) => break Some(entries),
            Err(_) => break None,
        }
    };
    let credentials = serde_json::from_slice::<auth::AuthFile>(bytes).ok();
    let known = credentials.map(|file| {
        file.credentials("registry.lab:5000", "team/app");
        0
    });
    let signatures = cosign::offers(bytes).ok().map(|offers| offers.len() as u64);
    let signed = cosign::image_of(bytes).ok().map(|_| 0);
    [document, configuration, whole, known, signatures, signed]
}
