//! Questions that the CLI asks over `query/{client}/request` and their replies.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{CheckpointInfo, CheckpointKind};
use crate::ids::{Digest, Epoch, JobName, Namespace, NodeId, PodName, RequestId, SecretName};
use crate::message::node::DepotAccess;
use crate::message::user::{JobStatus, PodStatus};
use crate::units::{Bytes, MilliCpu, Millis, Timestamp, rfc3339};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct QueryRequest {
    pub id: RequestId,
    pub query: Query,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Query {
    /// `Page<JobStatus>`; without a namespace: all.
    Jobs { namespace: Option<Namespace>, after: Option<String> },
    /// `JobDetail`
    Job { namespace: Namespace, job: JobName },
    /// `Page<PodRow>` of one job or of all.
    Pods { namespace: Option<Namespace>, job: Option<JobName>, after: Option<String> },
    /// `Page<NodeStatus>`
    Nodes { after: Option<String> },
    /// `NodeStatus`, with its images.
    Node { node: NodeId },
    /// `Explanation`
    Explain { namespace: Namespace, job: JobName },
    /// `LogSources`; with `follow` agents publish on `logs/…` for `FOLLOW_MS` from now, also of pods yet to come.
    /// `from`: the records that the client still wants of an epoch it has read a part of; others from the first.
    Logs {
        namespace: Namespace,
        job: JobName,
        follow: bool,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        from: Vec<LogPosition>,
        /// The `next` of the page before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// `Page<OutputRow>`
    Outputs {
        namespace: Namespace,
        job: JobName,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// `Page<CheckpointRow>`, the newest of a pod first; without a namespace: all.
    Checkpoints { namespace: Option<Namespace>, job: Option<JobName>, after: Option<String> },
    /// `CheckpointDetail`; the id may be a beginning of the digest's digits that names only one.
    Checkpoint { namespace: Option<Namespace>, id: String },
    /// `NodeStatus`: takes no new pods from now on. Asking again changes nothing.
    Cordon { node: NodeId },
    /// `NodeStatus`: takes pods again; ends a drain.
    Uncordon { node: NodeId },
    /// `NodeStatus`: cordons, and moves every pod away; what is still there after `deadline` is stopped unsaved.
    Drain { node: NodeId, deadline: Option<Millis> },
    /// `NodeStatus`: a silent node is lost at once, whatever else is silent; its pods go elsewhere once their leases are over.
    /// `poweredOff`: nothing runs there, so those that were to `continue` go, too.
    #[serde(rename_all = "camelCase")]
    NodeLost { node: NodeId, powered_off: bool },
    /// `DefragPlan`: which of at most `moves` pods that run should go on elsewhere, so that the first waiting job that
    /// this helps fits, or else so that devices are fragmented less; with `execute` they go.
    Defrag { moves: u8, execute: bool },
    /// `DepotAccess`: to bring a workspace, or fetch logs and outputs, of a namespace.
    Depot { namespace: Namespace },
    /// `Page<AuditRow>`, the latest first; without a namespace: of everything, for admins alone.
    Audit { namespace: Option<Namespace>, after: Option<String> },
    /// `ControllerVersion`
    Version,
}

/// A secret, as those who may see its namespace do: never its value. `GET /v1/secrets/{namespace}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRow {
    pub name: SecretName,
    /// From 1; each time it is set one more.
    pub version: u64,
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
    /// Who set it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Somebody has asked for something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditRow {
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
    /// `user:NAME`, or a node's name; none where everybody is let in, or nobody said who.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// From which address, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<IpAddr>,
    /// A verb: `submit`, `cancel`, `drain`, `invite`, …
    pub what: String,
    /// `job NAMESPACE/NAME`, `node NAME`, `user NAME`, …
    pub on: String,
    pub outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    Accepted,
    Refused,
}

/// Moves in the order in which they are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DefragPlan {
    pub moves: Vec<PlannedMove>,
    /// The waiting job that then fits, and where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<Served>,
    /// Thousandths of free devices that the next pod, of the shapes seen of late, could not use: now, and after the
    /// moves. Not told where the moves serve a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fragments_milli: Option<(u64, u64)>,
    /// Where there is nothing to move: how many pods may not be, by the reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stay: BTreeMap<Stays, u32>,
    /// They are being made.
    pub executed: bool,
}

/// Why a pod may not be asked to go on elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stays {
    NotRunning,
    Changed,
    FailedToSave,
    NotPreemptible,
    Gang,
    NamedVolume,
    CannotBeSaved,
    Young,
    /// Of a later version.
    #[serde(other)]
    Other,
}

/// As one says it of several pods.
impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stays::NotRunning => "starting or leaving",
            Stays::Changed => "of a job that has been changed",
            Stays::FailedToSave => "could not be saved the last time",
            Stays::NotPreemptible => "not preemptible",
            Stays::Gang => "of a gang",
            Stays::NamedVolume => "bound to a named volume",
            Stays::CannotBeSaved => "cannot be saved (no CRIU, or checkpoint mode none)",
            Stays::Young => "running for less than a minute",
            Stays::Other => "for another reason",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Served {
    pub namespace: Namespace,
    pub job: JobName,
    pub node: NodeId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedMove {
    pub namespace: Namespace,
    pub pod: PodName,
    pub from: NodeId,
    pub to: NodeId,
    pub cpu_milli: MilliCpu,
    /// What is saved and loaded, at most.
    pub memory_bytes: Bytes,
    /// Of all its devices.
    pub gpu_milli: u64,
}

/// Where a client's reading of an epoch's log stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogPosition {
    pub pod: PodName,
    pub epoch: Epoch,
    /// The first record that it has not.
    pub seq: u64,
}

/// `result` or `error`, never both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct QueryReply {
    pub id: RequestId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<QueryError>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct QueryError {
    /// `NotFound`, `Invalid`, `Unavailable`.
    pub code: String,
    pub message: String,
}

/// Rows in a stable order; `next` goes into `after` of the next query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Page<T> {
    pub rows: Vec<T>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// What whoever asks should know besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
}

/// A job's status and the file it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobDetail {
    #[serde(flatten)]
    pub status: JobStatus,
    /// As accepted, defaults filled in.
    pub spec: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRow {
    pub namespace: Namespace,
    pub job: JobName,
    #[serde(flatten)]
    pub status: PodStatus,
}

/// Why a job's pods are where they are, or still wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub namespace: Namespace,
    pub job: JobName,
    /// One line for a person.
    pub summary: String,
    /// A CamelCase word, where pods wait: `Unschedulable`, `QuotaExceeded`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Pods without a node.
    #[serde(default)]
    pub waiting: u32,
    /// Jobs that are served before it.
    #[serde(default)]
    pub ahead: u32,
    /// Every reason against a node, and of how many it holds; the most frequent first.
    #[serde(default)]
    pub counts: Vec<ReasonCount>,
    /// Where the least stands against one more pod, if no node fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<NodeVerdict>,
    /// The least that would have to end for the next pod, or the whole gang, to start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeing: Option<Freeing>,
    /// Where room is held for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<NodeId>,
    /// Where its pods are, and why there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seats: Vec<PodSeat>,
    /// The first nodes, at most `QUERY_PAGE_ROWS_MAX`.
    pub nodes: Vec<NodeVerdict>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReasonCount {
    /// Without the node's own figures: `need 4 cores`.
    pub reason: String,
    pub nodes: u32,
}

/// Pods whose end would make room, on which nodes, and what they take together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Freeing {
    pub nodes: Vec<NodeId>,
    /// As `namespace/pod`.
    pub pods: Vec<String>,
    pub cpu_milli: MilliCpu,
    pub memory_bytes: Bytes,
    pub gpu_milli: u64,
}

/// What spoke for a pod's node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSeat {
    pub pod: PodName,
    pub node: NodeId,
    pub why: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeVerdict {
    pub node: NodeId,
    /// One more pod of the job would fit now.
    pub fits: bool,
    /// Every reason against, in words: `needs 4 cores, 1500m are free`.
    pub reasons: Vec<String>,
    /// The job's pods that are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<PodName>,
    /// It holds what a pod of the job would otherwise pull first; none where that is nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_image: Option<bool>,
}

/// A job's logs: one source a pod and epoch, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogSources {
    pub sources: Vec<LogSource>,
    /// Nothing more will come.
    pub finished: bool,
    /// More than one pod: lines want a prefix.
    pub many: bool,
    /// More than one container a pod: the prefix names it too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub containers: bool,
    pub depot: DepotAccess,
    /// There are more sources: what to ask for them by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogSource {
    pub pod: PodName,
    pub epoch: Epoch,
    /// Records in all, once the epoch has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
    /// The path below the depot's URL, once it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutputRow {
    pub pod: PodName,
    pub epoch: Epoch,
    pub digest: Digest,
    pub bytes: Bytes,
    /// Below the depot's URL: a gzipped tar archive.
    pub path: String,
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerVersion {
    pub version: String,
    pub cluster: String,
}

/// What `berth get checkpoints` lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointRow {
    pub id: Digest,
    pub namespace: Namespace,
    pub job: JobName,
    pub pod: PodName,
    pub epoch: Epoch,
    pub kind: CheckpointKind,
    #[serde(with = "rfc3339")]
    pub at: Timestamp,
    pub bytes: Bytes,
    pub new_bytes: Bytes,
    pub frozen_ms: u64,
    /// Where it was taken; an imported one's is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// What its keeping is owed to, such as `the last of pod digits-0`.
    pub kept: String,
}

/// One checkpoint whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointDetail {
    #[serde(flatten)]
    pub row: CheckpointRow,
    pub info: CheckpointInfo,
    /// The job that it is of, as it was then.
    pub spec: Value,
    /// Each node, and what it lacks to start it.
    pub nodes: Vec<NodeVerdict>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depot: Option<DepotAccess>,
}
