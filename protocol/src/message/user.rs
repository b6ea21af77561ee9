//! Commands, answers and statuses: what users send and read with any MQTT client.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, Epoch, Generation, JobName, JobUid, Namespace, NodeId, PodName, RequestId};
use crate::image::Images;
use crate::pod::PodPhase;
use crate::policy::{self, Policy};
use crate::resources::{Gpu, Usage};
use crate::units::{Bytes, MilliCpu, Timestamp, rfc3339};

/// `jobs/{ns}/{job}/command`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobCommand {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<RequestId>,
    pub command: Command,
    /// Where to, of a migration or a restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Which one, of a restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Digest>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Cancel,
    Suspend,
    Resume,
    Checkpoint,
    Restart,
    /// To `node`: save the pod, stop it, go on there.
    Migrate,
    /// Makes the topic's job from `checkpoint`, or sets it back to that one.
    Restore,
}

impl Command {
    /// As it is written.
    pub fn verb(self) -> &'static str {
        match self {
            Command::Cancel => "cancel",
            Command::Suspend => "suspend",
            Command::Resume => "resume",
            Command::Checkpoint => "checkpoint",
            Command::Restart => "restart",
            Command::Migrate => "migrate",
            Command::Restore => "restore",
        }
    }
}

/// `jobs/{ns}/{job}/answer`: exactly one of `accepted` and `rejected` is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<RequestId>,
    /// Of the payload answered: 64 hexadecimal digits.
    pub sha256: String,
    #[serde(flatten)]
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, rename_all_fields = "camelCase")]
pub enum Verdict {
    Accepted { accepted: bool, generation: Generation },
    Rejected { rejected: Rejection },
}

impl Verdict {
    pub fn accepted(generation: Generation) -> Self {
        Verdict::Accepted { accepted: true, generation }
    }
}

impl Answer {
    pub fn new(id: Option<RequestId>, payload: &[u8], verdict: Verdict) -> Self {
        Self { id, sha256: Digest::of(payload).hex(), verdict }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejection {
    /// A CamelCase word: `InvalidJob`, `NoSuchJob`, `JobFinished`, `Overtaken`, `TooLarge`.
    pub code: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

/// One thing wrong in a job file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldError {
    /// The path, such as `resources.cpu` or `volumes[1].mount`; empty: the file itself.
    pub field: String,
    /// From 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JobPhase {
    Pending,
    Running,
    Suspended,
    Succeeded,
    Failed,
    Cancelled,
    Rejected,
}

impl JobPhase {
    pub fn is_final(self) -> bool {
        matches!(self, JobPhase::Succeeded | JobPhase::Failed | JobPhase::Cancelled | JobPhase::Rejected)
    }
}

/// `jobs/{ns}/{job}/status`, retained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobStatus {
    pub namespace: Namespace,
    pub job: JobName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<JobUid>,
    pub generation: Generation,
    pub phase: JobPhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// At most `STATUS_PODS_MAX`, unfinished first.
    pub pods: Vec<PodStatus>,
    /// All of them, by phase.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pod_counts: BTreeMap<PodPhase, u32>,
    pub failures: u32,
    pub evictions: u32,
    pub migrations: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointStatus>,
    #[serde(with = "rfc3339")]
    pub submitted_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub finished_at: Option<Timestamp>,
}

/// A pod's current epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    pub pod: PodName,
    pub epoch: Epoch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    pub phase: PodPhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub finished_at: Option<Timestamp>,
    /// Its last checkpoint, where that came to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_failed: Option<CheckpointFailure>,
    /// Records that this epoch's log holds, known once the pod has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_records: Option<u64>,
}

/// A checkpoint that was asked for and could not be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointFailure {
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
    pub why: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointStatus {
    /// The manifest's digest.
    pub id: Digest,
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
    pub bytes: Bytes,
    pub new_bytes: Bytes,
    pub frozen_ms: u64,
}

/// `state/nodes/{node}`, retained, and what `berth get nodes` lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    pub node: NodeId,
    pub state: NodeState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub capacity: Amounts,
    pub allocated: Amounts,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<String>,
    pub gpus: Vec<Gpu>,
    /// The machine's own name, which several nodes may share.
    #[serde(default)]
    pub hostname: String,
    pub arch: String,
    pub kernel: String,
    pub os: String,
    pub agent_version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<String>,
    /// As `Inventory::saves_gpus`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saves_gpus: bool,
    pub pods: u32,
    /// Told where one node is asked for; on `state` and in lists they would be most of what is sent.
    #[serde(default, skip_serializing_if = "Images::is_empty")]
    pub images: Images,
    /// Likewise; `None`: the node has told nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "policy::understood")]
    pub policy: Option<Box<Policy>>,
    /// Being emptied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub last_heartbeat_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    Online,
    /// Heartbeats are missing, not yet for long enough to count as lost.
    Silent,
    Offline,
    /// Online, and takes no new pods.
    Cordoned,
}

/// A drain under way or done: it lasts until the node is uncordoned, or takes its own notice back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainStatus {
    #[serde(with = "rfc3339")]
    pub since: Timestamp,
    /// What is still there then is stopped without a new checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub deadline: Option<Timestamp>,
    /// Pods still there.
    pub left: u32,
    /// What the node itself has said: it is about to go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amounts {
    pub cpu_milli: MilliCpu,
    pub memory_bytes: Bytes,
    pub gpu_milli: u64,
}
