//! Owns the values that the daemon, the worker and the store's directory exchange; no IO.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Digest, ImageRef};

/// An image that is complete on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageRecord {
    pub reference: ImageRef,
    /// Digest of the manifest for this platform; of the configuration, for a docker-archive, which has no manifest.
    pub manifest_digest: Digest,
    /// Diff ids (digests of the uncompressed layers), lowest first, as they name the layers' directories. One may
    /// occur more than once.
    pub layers: Vec<Digest>,
    pub config: ImageConfig,
    /// Sum of the files' sizes in all layers, in bytes.
    pub unpacked_bytes: u64,
    /// By which of the keys that the policy named then the image is signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<Digest>,
    pub pulled_at_ms: u64,
    /// What the source looked like, for sources that may change under their name: see [`ImageRef`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_stamp: Option<String>,
    /// Unix time of the last use, in ms; kept as the record file's own modification time.
    #[serde(skip)]
    pub last_used_ms: u64,
}

/// What an image says about running it (OCI image specification, `config.config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageConfig {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Empty: the root directory.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// A signal's name or number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Mount points that the image wants outside of its layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
}

/// How far a pull is. Bytes are those of the compressed layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    pub layers_total: u32,
    pub layers_done: u32,
    pub bytes_total: u64,
    pub bytes_done: u64,
}

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// For a registry's host (`docker.io`, `registry.example:5000`), URLs that are asked before it, in order:
    /// `https://mirror.example/prefix`. A mirror's content is trusted as the registry's own.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Hosts that may be spoken to in plain http where https fails. Loopback always may.
    pub insecure: Vec<String>,
    /// Credentials in the form of docker's `config.json`.
    pub auth_file: Option<PathBuf>,
}
