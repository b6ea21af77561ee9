//! A job as the programs hold it: parsed, normalised, every default filled in. `parse` alone makes one from a file.
//!
//! The way of a file: text → `document` (a tree with positions, from `json` or `yaml`) → `read` (held against the
//! `schema`) → `written` (typed, still without defaults) → `build` (defaults and relations) → `JobSpec`. All errors
//! on the way go to one `report`.

mod build;
mod document;
mod form;
mod json;
mod json_schema;
mod parse;
mod read;
mod report;
mod schema;
mod suggest;
mod written;
mod yaml;

#[cfg(test)]
mod tests;

pub use json_schema::json_schema;
pub use parse::{ParsedJob, parse, place, render};
pub use report::show_errors;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerName, Digest, JobName, Namespace, SecretName, VolumeName};
use crate::image::ImageName;
use crate::limits;
use crate::resources::{Limits, Resources};
use crate::units::{Bytes, Millis};

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobSpec {
    pub namespace: Namespace,
    pub name: JobName,
    /// What each pod runs; at least one.
    pub pod: PodTemplate,
    pub placement: Placement,
    /// Pods at once, and pods that must succeed.
    pub parallelism: u32,
    pub completions: u32,
    /// All pods or none.
    pub gang: bool,
    pub suspend: bool,
    /// Running time of the job, not time pending or frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_deadline: Option<Millis>,
    /// How long the record is kept once the job has ended.
    pub ttl: Millis,
    pub priority: i32,
    pub preemptible: bool,
}

/// What a pod is: sent to agents as a spec, addressed by its digest. The same for all pods of a job's generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    pub namespace: Namespace,
    pub job: JobName,
    pub containers: Vec<ContainerSpec>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    pub network: Network,
    pub restart: Restart,
    /// Between the stop signal and SIGKILL.
    pub grace: Millis,
    pub on_disconnect: OnDisconnect,
    pub checkpoint: Checkpoint,
    /// Absolute paths in the first container, kept in the depot when the pod ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// Files that travel with the job (`berth run`), unpacked below the working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Workspace>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerSpec {
    pub name: ContainerName,
    /// `host`, `oci:/path[:tag]`, `docker-archive:/file.tar` or a registry's reference; parsed by the agent.
    pub image: String,
    /// Instead of the image's entrypoint; empty: the image's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// `uid`, `uid:gid` or a name known to the image; none: the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    pub resources: Resources,
    pub limits: Limits,
    #[serde(default)]
    pub read_only_root: bool,
    /// Beyond the default set, as `NET_ADMIN`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub capabilities: BTreeSet<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretMount>,
}

impl ContainerSpec {
    /// The image to be on the node before it starts; none where it runs on the node's own files, or that is no name of
    /// an image.
    pub fn image_name(&self) -> Option<ImageName> {
        if self.image == "host" { None } else { ImageName::parse(&self.image).ok() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretMount {
    pub name: SecretName,
    pub mount: String,
}

/// A mount in every container of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Absolute, in the container.
    pub mount: String,
    pub source: VolumeSource,
    #[serde(default)]
    pub read_only: bool,
    /// A named one: it goes along with the pod's checkpoints, and is set back by them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub save: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum VolumeSource {
    /// A path of the node's, where its configuration allows it.
    Host(String),
    /// Empty at the pod's start, gone at its end, at most this large.
    Scratch(Bytes),
    /// Kept between the pods of the job on one node.
    Named(VolumeName),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A network of the pod's own with outgoing access.
    #[default]
    Bridge,
    Host,
    /// A network of the pod's own with loopback only.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restart {
    pub policy: RestartPolicy,
    /// Failures of the whole job that are forgiven.
    pub backoff_limit: u32,
    pub retry_min: Millis,
    pub retry_max: Millis,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    #[default]
    Never,
    OnFailure,
    Always,
}

/// What a pod does without a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OnDisconnect {
    pub after: Millis,
    #[serde(rename = "do")]
    pub action: DisconnectAction,
    pub lost_after: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DisconnectAction {
    Pause,
    Continue,
    Stop,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    pub mode: CheckpointMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Millis>,
    /// Cooperative: asks the program to save itself. A signal's name, such as `SIGUSR1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    pub grace: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quiesce: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resume: Vec<String>,
    pub tcp: TcpPolicy,
    pub keep: u32,
}

impl Checkpoint {
    /// Is the program asked to save itself before anything else is tried?
    pub fn asks(&self) -> bool {
        let can = self.signal.is_some() || self.ready.is_some();
        match self.mode {
            CheckpointMode::Auto | CheckpointMode::Cooperative => can,
            CheckpointMode::Criu | CheckpointMode::None => false,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointMode {
    #[default]
    Auto,
    Criu,
    Cooperative,
    None,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcpPolicy {
    #[default]
    Close,
    Keep,
}

/// A tar archive (gzip) in the depot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    pub digest: Digest,
    pub bytes: Bytes,
    /// Where it is unpacked, absolute, in each container.
    pub path: String,
}

/// Where pods may and would rather go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// CEL over `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefer: Vec<Preference>,
    /// A label, as `node.labels.rack`, over whose values the pods are spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tolerations: BTreeSet<String>,
    /// `job`, or a label whose values no two of the pods may share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anti_affinity: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preference {
    pub when: String,
    pub weight: i32,
}

impl PodTemplate {
    /// What the pod asks of a node: the sum of its containers, and room for its scratch volumes. The parser has refused
    /// what does not add up.
    pub fn resources(&self) -> Resources {
        let mut sum = Resources::sum(self.containers.iter().map(|c| &c.resources)).unwrap_or_default();
        for volume in &self.volumes {
            if let VolumeSource::Scratch(size) = volume.source
                && size.0 > limits::SCRATCH_MEMORY_BYTES_MAX
            {
                sum.disk = Bytes(sum.disk.0.saturating_add(size.0));
            }
        }
        sum
    }
}

impl Restart {
    /// The pause before the start that follows `failures` failures: doubling from `retry_min` to `retry_max`, less up
    /// to a tenth that `name` decides, so that a crowd does not come back at once. The same for the same name and count.
    pub fn backoff(&self, name: &impl std::fmt::Display, failures: u32) -> Millis {
        let doubled = self.retry_min.0.saturating_mul(1 << failures.saturating_sub(1).min(32));
        let whole = doubled.min(self.retry_max.0);
        let digest = Digest::of(format!("{name}/{failures}").as_bytes()).hex();
        let share = u64::from_str_radix(&digest[..4], 16).unwrap_or(0);
        Millis(whole - (whole / 10).saturating_mul(share) / 0xffff)
    }
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            policy: RestartPolicy::Never,
            backoff_limit: 6,
            retry_min: Millis::from_secs(10),
            retry_max: Millis::from_secs(300),
        }
    }
}

impl Default for OnDisconnect {
    fn default() -> Self {
        Self {
            after: Millis(limits::DISCONNECT_AFTER_MS),
            action: DisconnectAction::Pause,
            lost_after: Millis(limits::LOST_AFTER_MS),
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            mode: CheckpointMode::Auto,
            interval: None,
            signal: None,
            grace: Millis::from_secs(30),
            ready: None,
            quiesce: Vec::new(),
            resume: Vec::new(),
            tcp: TcpPolicy::Close,
            keep: 3,
        }
    }
}

impl OnDisconnect {
    /// From the last grant's send to the point where the pod no longer runs; `None`: it goes on for ever.
    /// `grace` is the pod's.
    pub fn lease(&self, grace: Millis) -> Option<Millis> {
        match self.action {
            DisconnectAction::Pause => Some(self.after.saturating_add(Millis(limits::FREEZE_CONFIRM_MS))),
            DisconnectAction::Stop => Some(self.after.saturating_add(grace)),
            DisconnectAction::Continue => None,
        }
    }
}
