//! What one epoch of a pod was given, said, and left behind. Holds records; decides nothing.

use berth_protocol::ids::{Digest, Epoch, Generation, NodeId, Run, Term};
use berth_protocol::pod::{Goal, Outcome, PodPhase};
use berth_protocol::resources::GpuShare;
use berth_protocol::units::{Bytes, MilliCpu, Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::Now;
use super::checkpoints::Leaving;
use super::cluster::is_zero;
use super::staging::Staging;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Assignment {
    pub node: NodeId,
    pub spec: Digest,
    pub charge: Charge,
    pub goal: Goal,
    /// Why it is to leave, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
    /// What is brought ahead of it, where it is to go on elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staging: Option<Staging>,
    /// What the epoch starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// Levels of checkpoints within the epoch: ordered, and taken or failed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub asked: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub answered: u64,
    /// As the agent last said.
    pub phase: PodPhase,
    pub run: Run,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// From the spec that was placed: the time without a grant after which the pod no longer runs; none: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Millis>,
    pub lost_after: Millis,
    /// The first desired set that names this epoch.
    pub named: (Term, Generation),
    /// Failures of the job when this epoch was placed.
    pub failures: u64,
    /// Of the pod, when this epoch was placed.
    #[serde(default)]
    pub restarts: u64,
    /// The node held the pod's images when this epoch was placed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub had_images: bool,
    /// The last failure within this epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Box<Ending>>,
    /// Why the resume hook has not done its work, for people; until the next checkpoint begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unresumed: Option<String>,
    /// For people, such as a pull's progress; not kept.
    #[serde(skip)]
    pub progress: Option<String>,
}

/// What a placed pod takes of its node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Charge {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    #[serde(default)]
    pub disk: Bytes,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuShare>,
    /// Of each of the devices.
    #[serde(default)]
    pub gpu_memory: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ending {
    pub succeeded: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

/// The log of one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EpochLog {
    pub epoch: Epoch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Known once the epoch has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
    /// In the depot.
    #[serde(default)]
    pub stored: bool,
    /// Records that came into the depot with a checkpoint.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub kept: u64,
    /// Records behind this are said again by a later epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Output {
    pub epoch: Epoch,
    pub digest: Digest,
    pub bytes: Bytes,
    pub at: Timestamp,
}

/// How an epoch ended, as its agent says.
pub(super) fn ending(was: &Assignment, outcome: &Outcome) -> Ending {
    Ending {
        succeeded: false,
        node: Some(was.node.clone()),
        exit_code: outcome.exit_code,
        reason: outcome.reason.clone(),
        message: outcome.message.clone(),
        started_at: outcome.started_at.or(was.started_at),
        finished_at: outcome.finished_at,
    }
}

/// How one ended of which nothing is alive, and nobody said so.
pub(super) fn vanished(was: &Assignment, now: Now, reason: &str, message: String) -> Ending {
    Ending {
        succeeded: false,
        node: Some(was.node.clone()),
        exit_code: None,
        reason: Some(reason.to_owned()),
        message: Some(message),
        started_at: was.started_at,
        finished_at: now.wall,
    }
}
