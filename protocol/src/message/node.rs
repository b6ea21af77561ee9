//! The wire between the controller and agents (`nodes/{node}/…`).
//!
//! Nothing here relies on retained messages, sessions or PUBACKs: `Desired` is whole and sent again until a heartbeat
//! reports its generation, events are sent again until a `Lease` acknowledges them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::checkpoint::CheckpointInfo;
use crate::ids::{
    BootId, Digest, Epoch, Generation, HardwareId, LedgerId, PodId, RequestId, Run, SessionNonce, StoreId,
    Term,
};
use crate::pod::{Goal, Outcome};
use crate::resources::{GpuShare, Inventory, Usage};
use crate::rule::{Rule, kept};
use crate::tls::Party;
use crate::units::{BootMs, Bytes, Millis, Timestamp, is_zero};

/// `hello`: the agent's first word in a session, repeated until a lease answers one of its heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hello {
    pub nonce: SessionNonce,
    /// The last session before it in which the controller answered, where the data directory remembers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<SessionNonce>,
    /// Those before that one, oldest first, as many as are remembered: a controller whose store is a backup may have heard
    /// of no later one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<SessionNonce>,
    /// Counts sessions, kept in the data directory.
    pub session: u64,
    pub hardware: HardwareId,
    pub boot: BootId,
    pub ledger: LedgerId,
    /// The store whose orders the agent holds, and the highest order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreId>,
    pub term: Term,
    pub generation: Generation,
    /// The highest term that this session has heard a controller say: the hello is not from before that. None: a version that
    /// does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard: Option<Term>,
    /// Events of this ledger acknowledged to the agent, and the number of its last one. A pod that the scan does not
    /// find counts as gone only once the events up to the last are in: its result may be among them.
    pub events_acked: u64,
    pub events_last: u64,
    /// Every pod found by a scan of berth's cgroups and shims, whatever the ledger says.
    pub pods: Vec<HeldPod>,
    pub inventory: Inventory,
    /// Where it gives other nodes what it keeps of checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<ChunkServer>,
}

/// Where a node serves `POST /v1/checkpoints/{digits}/chunks` as the depot does, for the checkpoints that it keeps; with
/// what tokens for that are made, as long as this session lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChunkServer {
    pub url: String,
    pub secret: [u8; 32],
}

/// A pod that exists on a node, running or not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldPod {
    pub pod: PodId,
    pub epoch: Epoch,
    pub run: Run,
    /// Processes of it may be alive, frozen ones too.
    pub alive: bool,
    /// A grant lets it run as this is said.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub granted: bool,
}

/// `heartbeat`, QoS 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    pub nonce: SessionNonce,
    /// Counts within the session, from 1.
    pub seq: u64,
    /// The agent's CLOCK_BOOTTIME when it made this.
    pub boot_ms: BootMs,
    /// The seq that the last lease received answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_grant: Option<u64>,
    /// Term and generation of the desired set applied.
    pub term: Term,
    pub generation: Generation,
    /// Of the (pod, epoch) pairs that the agent holds and wants a grant for: `held_digest`.
    pub held: Digest,
    /// As in `Hello`: a hello may have been on its way for long.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub events_acked: u64,
    pub usage: Usage,
    /// Pulls under way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pulls: Vec<PullProgress>,
    /// Checkpoints on their way into the depot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saves: Vec<PullProgress>,
    /// Checkpoints on their way out of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restores: Vec<PullProgress>,
    /// How far all is that the applied set names as to be staged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub staged: Vec<Staged>,
    /// The machine is about to go: its pods are to go first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Departure>,
}

impl Heartbeat {
    /// Of a session that never said hello, by which a node sees whether it is heard.
    pub fn probe(nonce: SessionNonce, boot_ms: BootMs) -> Self {
        Self {
            nonce,
            seq: 1,
            boot_ms,
            last_grant: None,
            term: Term(0),
            generation: Generation(0),
            held: held_digest([]),
            events_acked: 0,
            usage: Usage::default(),
            pulls: Vec::new(),
            saves: Vec::new(),
            restores: Vec::new(),
            staged: Vec::new(),
            leaving: None,
        }
    }
}

/// How far that is which is brought ahead of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Staged {
    pub pod: PodId,
    pub epoch: Epoch,
    pub state: StageState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StageState {
    /// On its way, or waiting for its turn.
    Busy,
    /// All of it is here.
    Ready,
    /// It is not tried again.
    Failed {
        /// A sentence for people.
        why: String,
    },
}

/// Why a machine goes, and how soon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Departure {
    /// For people, such as `it shuts down`; at most `HUMAN_MESSAGE_BYTES_MAX`.
    pub why: String,
    /// Left when the heartbeat was made.
    pub within: Millis,
}

/// How far a transfer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PullProgress {
    pub pod: PodId,
    pub epoch: Epoch,
    pub done: Bytes,
    /// Zero where not yet known.
    pub total: Bytes,
}

/// The digest of a set of (pod, epoch) pairs, in ascending order.
pub fn held_digest<'a>(pairs: impl IntoIterator<Item = (&'a PodId, Epoch)>) -> Digest {
    let mut text = String::new();
    for (pod, epoch) in pairs {
        text.push_str(&format!("{pod}.{epoch}\n"));
    }
    Digest::of(text.as_bytes())
}

/// `lease`, QoS 0: the answer to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    pub store: StoreId,
    pub term: Term,
    pub nonce: SessionNonce,
    /// Of the heartbeat answered. The grant counts from the moment the agent sent that one.
    pub seq: u64,
    pub covers: Covers,
    /// Events of this ledger up to this number are committed, or refused for good.
    pub ledger: LedgerId,
    pub acked: u64,
    /// Access to the depot, sent when the agent's is about to lapse.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depot: Option<DepotAccess>,
    /// The controller has not seen this session's hello, or lost it: say it again.
    #[serde(default)]
    pub hello: bool,
    /// It is no answer: the controller does not take this session's hello. A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// With a refusal: the number of the session that the controller knows of this node, where it is not below that of the
    /// session refused, as where a copy of its disk was in use. That session counts on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u64>,
}

/// What a grant covers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Covers {
    /// All that the heartbeat's digest named.
    All(Digest),
    /// These alone.
    Pairs(Vec<(PodId, Epoch)>),
}

/// Where blobs go, and the word that opens the door until `expires`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DepotAccess {
    /// Such as `http://127.0.0.1:7420`.
    pub url: String,
    pub token: String,
    pub expires: Timestamp,
    /// By what whoever answers there is known, where it speaks TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ServerIdentity>,
    /// A node that has the chunks too: it is asked first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Box<DepotAccess>>,
}

/// Without the token, which is not for logs.
impl fmt::Debug for DepotAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, token: _, expires, tls, peer } = self;
        let mut all = f.debug_struct("DepotAccess");
        all.field("url", url).field("expires", expires).field("tls", tls).field("peer", peer);
        all.finish_non_exhaustive()
    }
}

/// Whom a server must show that it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerIdentity {
    /// Certificate of the CA, PEM.
    pub ca: String,
    /// What its own certificate says.
    pub party: Party,
}

/// `event`: from the agent's outbox, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Events {
    pub nonce: SessionNonce,
    pub ledger: LedgerId,
    pub events: Vec<NumberedEvent>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NumberedEvent {
    /// From 1, without gaps.
    pub n: u64,
    pub at: Timestamp,
    #[serde(deserialize_with = "known_or_not")]
    pub event: NodeEvent,
}

/// One that a newer agent tells and this program does not know must not keep back the others of its message.
fn known_or_not<'de, D: Deserializer<'de>>(from: D) -> Result<NodeEvent, D::Error> {
    let value = Value::deserialize(from)?;
    Ok(serde_json::from_value(value).unwrap_or(NodeEvent::Unknown))
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NodeEvent {
    Pod(PodEvent),
    Inventory(Box<Inventory>),
    /// Of a newer version: it is acknowledged, and changes nothing.
    Unknown,
}

/// A transition of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEvent {
    pub pod: PodId,
    pub epoch: Epoch,
    pub run: Run,
    pub change: PodChange,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PodChange {
    Pulling,
    Starting,
    /// Being made from the checkpoint that its order names; `Running` follows, or `Ended` with `RESTORE_FAILED`.
    Restoring,
    Running,
    /// A checkpoint of this level is being taken.
    Checkpointing {
        level: u64,
    },
    /// It is in the depot whole, manifest and all. The pod runs on, or waits frozen where it is to vacate.
    Checkpointed {
        info: Box<CheckpointInfo>,
    },
    /// It could not be taken; the pod runs on as if nothing had been asked. The level is not tried again.
    CheckpointFailed {
        level: u64,
        /// A sentence for people.
        why: String,
    },
    /// The job's resume hook has not done its work, after a checkpoint or where the pod goes on; it runs all the same.
    ResumeFailed {
        /// A sentence for people.
        why: String,
    },
    /// Frozen, by order or for want of a grant.
    Paused,
    /// The run is over, and the agent starts the next one by itself after `backoff`.
    Retrying {
        outcome: Outcome,
        backoff: Millis,
    },
    /// The epoch is over: nothing of it is alive, and nothing will be.
    Ended {
        outcome: Outcome,
    },
    /// The epoch's whole log is in the depot.
    LogStored,
    /// The outputs are in the depot, under this digest; or why they are not.
    OutputsStored {
        digest: Option<Digest>,
        bytes: Bytes,
        error: Option<String>,
    },
}

/// `bye`: the agent's last will, a hint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bye {
    pub nonce: SessionNonce,
}

/// `desired`: everything that a node shall hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Desired {
    pub store: StoreId,
    pub term: Term,
    pub generation: Generation,
    /// The session that it is meant for, whose hello was taken: what another one's agent hears of it, it leaves alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<SessionNonce>,
    /// Ascending by pod; at most `PODS_PER_NODE_MAX`.
    pub pods: Vec<DesiredPod>,
    /// What is to be brought here ahead of pods that still run elsewhere; at most `STAGES_PER_NODE_MAX`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stage: Vec<Stage>,
}

/// A pod that is to come. Its images are pulled, and what of its checkpoint the one that it comes with will share is
/// fetched; it may end up elsewhere all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    pub pod: PodId,
    /// That runs elsewhere.
    pub epoch: Epoch,
    /// Of the pod's template.
    pub spec: Digest,
    /// Its last checkpoint, where that is not here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DesiredPod {
    pub pod: PodId,
    pub epoch: Epoch,
    /// Of the pod's template.
    pub spec: Digest,
    pub goal: Goal,
    /// Take a checkpoint if the last taken, or tried, within this epoch is below this level.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub checkpoint: u64,
    /// The checkpoint to start the epoch's first run from: its manifest's digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// Devices allotted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuShare>,
    /// Failures of the job so far, without those of this epoch.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failures: u64,
    /// How often the pod was begun anew after failures, in its earlier epochs.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u64,
}

/// `spec`: a pod template, whose digest is of these very bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpecMessage {
    pub digest: Digest,
    pub spec: Box<RawValue>,
}

impl SpecMessage {
    /// Are these the bytes that the digest names?
    pub fn is_whole(&self) -> bool {
        Digest::of(self.spec.get().as_bytes()) == self.digest || !kept(Rule::SpecsNameDigests)
    }
}

/// `request`: things that change nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRequest {
    pub id: RequestId,
    /// The session that it is meant for: what was asked once is not asked again by whoever has heard it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<SessionNonce>,
    #[serde(flatten)]
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Publish a pod's log from a record on; with `follow` also what comes later, for `FOLLOW_MS`.
    #[serde(rename_all = "camelCase")]
    Logs { pod: PodId, epoch: Epoch, from_seq: u64, follow: bool },
}
