//! What happens to a pod: its phases, its goals, how it ended.

use serde::{Deserialize, Serialize};

use crate::units::Timestamp;

/// What the controller wants of a pod on a node. A level: saying it twice changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    Run,
    Pause,
    /// Take a checkpoint of the level that comes with it, then stop. The pod stays frozen until the controller has
    /// acknowledged the checkpoint's event; where none could be taken it goes on running, and says so.
    Vacate,
    Stop,
}

/// Where a pod is, as its job's status tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PodPhase {
    /// No node yet.
    Pending,
    /// A node is chosen; its agent has not said that it began.
    Assigned,
    /// The image is on its way.
    Pulling,
    /// The container is made, or waits for its next start after a failure.
    Starting,
    Running,
    Checkpointing,
    /// Frozen.
    Paused,
    Restoring,
    Succeeded,
    Failed,
    /// Its node fell silent for too long.
    Lost,
}

impl PodPhase {
    pub fn is_final(self) -> bool {
        matches!(self, PodPhase::Succeeded | PodPhase::Failed)
    }
}

/// How a run of a pod ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Of the container that decided: the first that failed, else the last that ended. 128 + signal where one
    /// killed it. None where nothing ever ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    pub cause: Cause,
    /// A CamelCase word: `OOMKilled`, `ImageNotFound`, `CommandNotFound`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// For people: what, why, what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    /// Records that the log holds, all runs of the epoch together.
    pub log_records: u64,
}

/// The reason of an end of `Cause::Eviction` where the pod could not be started from its checkpoint: the controller
/// tries another node, then the checkpoint before, then from the start.
pub const RESTORE_FAILED: &str = "RestoreFailed";

/// The reason of an end of `Cause::Eviction` after the goal `vacate`, with the checkpoint recorded before.
pub const VACATED: &str = "Vacated";

/// The reason of an end of `Cause::Fault` where the node's own policy allows nothing of the kind; the message names its rule.
pub const POLICY_REFUSED: &str = "PolicyRefused";

/// In the message of a pod that has ended: its outputs are not in the depot, and the reason follows.
pub const NO_OUTPUTS: &str = "no outputs in the depot: ";

/// Whose doing an end was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// The program ended with 0.
    Success,
    /// The program's own doing: a code other than 0, a signal, out of memory, a missing command or image.
    Failure,
    /// The node's own: it lacks what the pod needs, or its disk is full. The pod goes elsewhere where there is an
    /// elsewhere; where there is none, it counts as a failure.
    Fault,
    /// berth's doing: a stop it was told, a fence, a dead shim, a reboot. Never counted as a failure.
    Eviction,
}
