//! What the controller knows: jobs, their pods, nodes. Holds state and keeps its indices true; decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{
    BootId, Digest, Epoch, Generation, HardwareId, JobName, JobUid, Namespace, NodeId, PodId, SecretName,
    SessionNonce, Term,
};
use berth_protocol::job::JobSpec;
use berth_protocol::join::InvitationId;
use berth_protocol::message::node::ChunkServer;
use berth_protocol::message::user::{CheckpointStatus, JobPhase, NodeState};
use berth_protocol::pod::PodPhase;
use berth_protocol::resources::{Inventory, Usage};
use berth_protocol::sign::PublicKey;
use berth_protocol::units::{BootMs, Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::checkpoints::{Checkpoint, Saved};
use super::drain::Drain;
pub(super) use super::epoch::{Assignment, Charge, Ending, EpochLog, Output};
use super::given_up::GivenUp;
use super::keys::SigningKey;
use super::members::{Invitation, Members};
use super::requests::Requests;
use super::restored::Restored;
use super::schedule::place::ClassId;
use super::secrets::Secret;
pub(super) use super::session::{Liveness, Outbox};

#[derive(Default)]
pub(super) struct Cluster {
    pub jobs: BTreeMap<JobUid, Job>,
    pub names: BTreeMap<(Namespace, JobName), JobUid>,
    pub nodes: BTreeMap<NodeId, Node>,
    pub checkpoints: BTreeMap<Digest, Checkpoint>,
    /// Pods ahead of which something is brought, and where.
    pub staging: BTreeMap<PodId, NodeId>,
    /// Checkpoints that pods name, or that were imported.
    pub named_checkpoints: Names,
    /// Blobs that pods name as their outputs, jobs as their workspace.
    pub named_blobs: Names,
    pub requests: Requests,
    /// Where the store is one that was restored.
    pub restored: Option<Restored>,
    pub members: Members,
    /// Of what nodes are told, where the root has named it.
    pub signing_key: Option<SigningKey>,
    pub secrets: BTreeMap<(Namespace, SecretName), Secret>,
    pub invitations: BTreeMap<InvitationId, Invitation>,
    /// Statuses `Rejected` out there, and until when.
    pub rejected: BTreeMap<(Namespace, JobName), Timestamp>,
}

/// How many name each thing of the depot: what nobody names may go.
#[derive(Default)]
pub(super) struct Names(BTreeMap<Digest, usize>);

impl Names {
    /// One more does.
    pub fn add(&mut self, id: Digest) {
        *self.0.entry(id).or_default() += 1;
    }

    /// One less does; true: it was the last.
    pub fn remove(&mut self, id: &Digest) -> bool {
        let Some(count) = self.0.get_mut(id) else { return true };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.0.remove(id);
        }
        last
    }
}

/// What was accepted; stored, and rewritten only by a new generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobFile {
    pub spec: JobSpec,
    pub written: Digest,
    pub generation: Generation,
    /// Orders jobs of one priority: the first submitted first.
    pub seq: u64,
    pub submitted_at: Timestamp,
}

/// How the job's generation fares; stored.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct JobRun {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// Set once a verdict stands and no pod is left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// How the job ends, or ended; its pods may still be stopping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    pub suspended: bool,
    pub failures: u32,
    pub evictions: u32,
    pub migrations: u32,
    /// The last one taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointStatus>,
    /// Running time so far, up to the last write.
    pub active: Millis,
    /// No pod of the job starts below: epochs of pods whose records are gone.
    pub epoch_floor: Epoch,
    /// The time to live is over, and the retained status is being cleared.
    pub expired: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Verdict {
    pub phase: JobPhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

pub(super) struct Job {
    pub file: JobFile,
    pub run: JobRun,
    /// Of `file.spec.pod` as sent to agents.
    pub template: Digest,
    /// Created so far: without gaps from 0, but those a shrunk generation left behind.
    pods: BTreeMap<u32, Pod>,
    waiting: BTreeSet<u32>,
    placed: BTreeSet<u32>,
    failed: BTreeSet<u32>,
    succeeded: u32,
    /// No pod is missing below.
    cursor: u32,
    /// Waiting pods whose own checkpoint or target keeps them from a node that would do for the others.
    pub particular: BTreeSet<u32>,
    /// Waiting pods that may not start before a time.
    pub asleep: BTreeMap<u32, BootMs>,
    /// Since when a pod runs, where one does and the job has a deadline.
    pub active_since: Option<BootMs>,
    /// Someone follows the logs until then.
    pub followed_until: Option<BootMs>,
    /// From when it first has pods to place until it ends.
    pub class: Option<ClassId>,
    /// Since when it waits without a pod of it being placed.
    pub waits_since: Option<BootMs>,
    /// When making room for it was last tried.
    pub helped_at: Option<BootMs>,
    /// When moving others for it was last looked into, and the rooms' version then.
    pub moves_tried: Option<(u64, BootMs)>,
    /// The rooms' version at which a pass left pods of it without a node.
    pub refused_at: Option<u64>,
    pub published: Option<BootMs>,
    pub counted: Option<JobPhase>,
    pub counted_pods: BTreeMap<PodPhase, u32>,
}

/// A pod; stored from its first placement on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pod {
    pub generation: Generation,
    pub epoch: Epoch,
    /// Starts after the first, in place or by a new placement, that a failure or `Always` caused.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
    pub state: PodState,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<EpochLog>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
    /// Why the epoch's are not in the depot, where it has ended and is to have some; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_outputs: Option<String>,
    #[serde(default, skip_serializing_if = "Saved::is_empty")]
    pub saved: Saved,
}

pub(super) fn is_zero<T: Default + PartialEq>(n: &T) -> bool {
    *n == T::default()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum PodState {
    /// For a node; leaves it by `place`.
    Waiting {
        /// The end of a backoff.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Timestamp>,
        /// How the last epoch ended, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last: Option<Box<Ending>>,
    },
    /// Named in a node's desired set; leaves it when observed gone, or when its lease is over.
    Placed(Box<Assignment>),
    Ended(Box<Ending>),
}

impl Job {
    pub fn new(file: JobFile, run: JobRun, template: Digest) -> Self {
        Self {
            file,
            run,
            template,
            pods: BTreeMap::new(),
            waiting: BTreeSet::new(),
            placed: BTreeSet::new(),
            failed: BTreeSet::new(),
            succeeded: 0,
            cursor: 0,
            particular: BTreeSet::new(),
            asleep: BTreeMap::new(),
            active_since: None,
            followed_until: None,
            class: None,
            waits_since: None,
            helped_at: None,
            moves_tried: None,
            refused_at: None,
            published: None,
            counted: None,
            counted_pods: BTreeMap::new(),
        }
    }

    pub fn is_finished(&self) -> bool {
        self.run.finished_at.is_some()
    }

    pub fn pods(&self) -> &BTreeMap<u32, Pod> {
        &self.pods
    }

    pub fn pod(&self, index: u32) -> Option<&Pod> {
        self.pods.get(&index)
    }

    /// Changes a pod, and the indices with it.
    pub fn change<T>(&mut self, index: u32, change: impl FnOnce(&mut Pod) -> T) -> Option<T> {
        let mut pod = self.take(index)?;
        let answer = change(&mut pod);
        self.put(index, pod);
        Some(answer)
    }

    pub fn put(&mut self, index: u32, pod: Pod) {
        self.take(index);
        match &pod.state {
            PodState::Waiting { .. } => drop(self.waiting.insert(index)),
            PodState::Placed(_) => drop(self.placed.insert(index)),
            PodState::Ended(ending) if ending.succeeded => self.succeeded += 1,
            PodState::Ended(_) => drop(self.failed.insert(index)),
        }
        self.pods.insert(index, pod);
    }

    pub fn take(&mut self, index: u32) -> Option<Pod> {
        let pod = self.pods.remove(&index)?;
        self.cursor = self.cursor.min(index);
        match &pod.state {
            PodState::Ended(ending) if ending.succeeded => self.succeeded -= 1,
            _ => {
                self.waiting.remove(&index);
                self.placed.remove(&index);
                self.failed.remove(&index);
            }
        }
        Some(pod)
    }

    pub fn waiting(&self) -> &BTreeSet<u32> {
        &self.waiting
    }

    pub fn placed(&self) -> &BTreeSet<u32> {
        &self.placed
    }

    pub fn failed(&self) -> &BTreeSet<u32> {
        &self.failed
    }

    pub fn succeeded(&self) -> u32 {
        self.succeeded
    }

    /// The lowest index that has no pod yet; none: all have one.
    pub fn next_index(&mut self) -> Option<u32> {
        while self.pods.contains_key(&self.cursor) {
            self.cursor += 1;
        }
        Some(self.cursor).filter(|index| *index < self.file.spec.completions)
    }

    /// Pods of the generation that no record exists of yet.
    pub fn uncreated(&self) -> u32 {
        let created = self.pods.range(..self.file.spec.completions).count();
        self.file.spec.completions.saturating_sub(u32::try_from(created).unwrap_or(u32::MAX))
    }

    /// Waiting pods that may start now.
    pub fn ready(&self) -> impl Iterator<Item = u32> + '_ {
        let general = |index: &u32| !self.asleep.contains_key(index) && !self.particular.contains(index);
        self.waiting.iter().copied().filter(general)
    }

    /// Those that may start now, but not everywhere.
    pub fn ready_particular(&self) -> impl Iterator<Item = u32> + '_ {
        self.particular.iter().copied().filter(|i| self.waiting.contains(i) && !self.asleep.contains_key(i))
    }

    pub fn assignment(&self, index: u32) -> Option<&Assignment> {
        match &self.pods.get(&index)?.state {
            PodState::Placed(assignment) => Some(assignment),
            _ => None,
        }
    }

    /// Changes a placed pod's assignment, which leaves the indices as they are.
    pub fn assignment_mut(&mut self, index: u32) -> Option<&mut Assignment> {
        match &mut self.pods.get_mut(&index)?.state {
            PodState::Placed(assignment) => Some(assignment),
            _ => None,
        }
    }

    /// What does not touch the state may be changed in place.
    pub fn log_mut(&mut self, index: u32, epoch: Epoch) -> Option<&mut EpochLog> {
        self.pods.get_mut(&index)?.logs.iter_mut().find(|log| log.epoch == epoch)
    }
}

impl Pod {
    pub fn waiting(generation: Generation, epoch: Epoch) -> Self {
        Self {
            generation,
            epoch,
            restarts: 0,
            state: PodState::Waiting { until: None, last: None },
            logs: Vec::new(),
            output: None,
            no_outputs: None,
            saved: Saved::default(),
        }
    }

    /// A pod that was never placed follows from its job alone.
    pub fn is_stored(&self) -> bool {
        !matches!(self.state, PodState::Waiting { .. })
            || !self.logs.is_empty()
            || self.restarts > 0
            || !self.saved.is_empty()
    }
}

/// A machine; stored at hello and when its inventory changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeRecord {
    pub hardware: HardwareId,
    /// That signs what it says; none: not heard since its controller asks for signatures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PublicKey>,
    pub boot: BootId,
    pub nonce: SessionNonce,
    /// The one that this session named as the one before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<SessionNonce>,
    /// The agent has heard the controller in this session: the next names this one, and no other.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub heard_us: bool,
    pub session: u64,
    pub inventory: Inventory,
    #[serde(default)]
    pub cordoned: bool,
    /// Being emptied, or empty: until it is uncordoned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// Pods of known jobs that the node holds at an epoch it should not: told to stop.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub strays: BTreeMap<PodId, Epoch>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<GivenUp>,
    /// Nothing above is known: the stored record is damaged or lost, and the next hello replaces it.
    #[serde(skip)]
    pub unreadable: bool,
}

impl NodeRecord {
    /// Is what this key signs not the node's?
    pub fn has_other_key(&self, by: Option<PublicKey>) -> bool {
        self.key.is_some() && self.key != by
    }

    /// In the place of one that cannot be read: pods are known to be there, and nothing else.
    pub fn unreadable() -> Self {
        Self {
            hardware: HardwareId::unknown(),
            key: None,
            boot: BootId::unknown(),
            nonce: SessionNonce::unknown(),
            previous: None,
            heard_us: false,
            session: 0,
            inventory: Inventory::unknown(),
            cordoned: false,
            drain: None,
            strays: BTreeMap::new(),
            given_up: None,
            unreadable: true,
        }
    }
}

pub(super) struct Node {
    pub record: NodeRecord,
    pub outbox: Option<Outbox>,
    pub liveness: Liveness,
    /// None: since the controller started, no hello.
    pub session: Option<Session>,
    /// The last sign of life, or when silence began to count anew.
    pub heard: BootMs,
    /// The last grant that may have gone out; a restarted controller assumes one at its start.
    pub granted: BootMs,
    pub last_heartbeat_at: Option<Timestamp>,
    pub usage: Option<Usage>,
    /// Pods placed here.
    pub pods: BTreeMap<PodId, Epoch>,
    /// Of `pods`, what a heartbeat names when it holds just them.
    pub held: Option<Digest>,
    /// Pods the store does not know, which the agent keeps frozen.
    pub unknown: BTreeSet<PodId>,
    /// The desired set's number within this term.
    pub generation: Generation,
    pub reported: (Term, Generation),
    /// When `desired` goes out again, and after how long the next time.
    pub resend: Option<(BootMs, Millis)>,
    /// When another machine last said that it is this node.
    pub clone_heard: Option<BootMs>,
    /// When a new `desired` went out last.
    pub desired_at: Option<BootMs>,
    /// When an acknowledgement of events is due.
    pub ack: Option<BootMs>,
    /// Specs this session was sent, of pods in the desired set.
    pub specs: BTreeSet<Digest>,
    /// Counts changes of what decides where pods may go.
    pub version: u64,
    pub published: Option<BootMs>,
    /// As what the counters have it.
    pub counted: Option<NodeState>,
}

/// One run of the node's agent.
pub(super) struct Session {
    pub nonce: SessionNonce,
    /// Of the last heartbeat taken.
    pub seq: u64,
    /// When that heartbeat came: every grant that answers it has run out on the agent's side before a lease from here.
    pub beat_at: BootMs,
    /// The first heartbeat that was answered with more than a question.
    pub answered: Option<u64>,
    /// What that heartbeat held.
    pub held: Option<Digest>,
    /// The last grant that the agent said it received, and when it said so first.
    pub confirmed: (Option<u64>, BootMs),
    /// The controller's clock minus the agent's, the least seen, forgiving of drift.
    pub offset: Option<(i128, BootMs)>,
    /// The agent's clock when it was found to have stood still, and the longest lease of its pods since.
    pub stalled: Option<(BootMs, Millis)>,
    /// Of the depot token sent last, and the seq of the lease that carried it.
    pub depot: Option<(Timestamp, u64)>,
    /// Assigned here and not found by the scan: gone once the outbox is in up to the number.
    pub absent: BTreeMap<PodId, Epoch>,
    pub absent_after: u64,
    /// And not before, where the session does not follow the one that held them: what it says of its machine may not be
    /// true of theirs. None: never.
    pub absent_at: Option<BootMs>,
    /// Placed here before the store was restored, and not running by a grant: they may have gone on elsewhere.
    pub doubtful: BTreeSet<PodId>,
    /// Where it gives other nodes what it keeps of checkpoints.
    pub chunks: Option<ChunkServer>,
    /// Why grants are withheld, where they are.
    pub withheld: Option<&'static str>,
}
