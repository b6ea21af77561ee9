//! Saved pods: which there are, when one is asked for, which of them a pod goes on from, and which are let go.
//!
//! A checkpoint is recorded with the event that tells of it, and stays recorded, and so in the depot, as long as a pod
//! names it. What is taken where and how is the agent's.

use std::collections::BTreeSet;

use berth_protocol::checkpoint::CheckpointInfo;
use berth_protocol::ids::{Digest, Epoch, JobUid, NodeId, PodId};
use berth_protocol::job::{Checkpoint as Policy, CheckpointMode, JobSpec};
use berth_protocol::message::user::{CheckpointFailure, CheckpointStatus};
use berth_protocol::pod::{Goal, PodPhase, RESTORE_FAILED};
use berth_protocol::units::{BootMs, Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::cluster::{Job, Pod};
use super::timers::Timer;
use super::{Controller, Effect, Now};

/// Manifests that no pod names are let go once this old: their event may still be on its way.
const ORPHAN_AFTER: Millis = Millis(3_600_000);
/// A pod that is to leave and could not be saved is asked again after this long.
const RETRY: Millis = Millis(30_000);
/// Starts from a checkpoint that may come to nothing before the one before it is tried.
const RESTORE_TRIES_MAX: u32 = 2;

/// A checkpoint that the depot holds; stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Checkpoint {
    pub info: CheckpointInfo,
    pub uid: JobUid,
    pub index: u32,
    pub epoch: Epoch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// The job as it was then: a restore under another name makes a job of it.
    pub spec: JobSpec,
    /// It came from outside, then: it is kept for a while without a pod that names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Timestamp>,
}

/// A checkpoint of another place, that is in the depot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    pub info: CheckpointInfo,
    pub pod: PodId,
    pub epoch: Epoch,
    pub node: Option<NodeId>,
    pub spec: JobSpec,
}

/// What was imported and nothing has begun with is let go after this long.
const IMPORTED_KEPT: Millis = Millis(7 * 24 * 3_600_000);

/// What a pod has of checkpoints; stored with it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Saved {
    /// The newest first: what it would go on from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<Digest>,
    /// Starts from the first of them that came to nothing.
    #[serde(skip_serializing_if = "super::cluster::is_zero")]
    pub failed_tries: u32,
    /// Where: it is tried elsewhere.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub failed_on: BTreeSet<NodeId>,
    /// Nodes that could not run it, for want of something of their own.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub faulty_on: BTreeSet<NodeId>,
    /// Checkpoints of the list that are tried no more.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub unusable: BTreeSet<Digest>,
    /// Where it is to go, as long as that is possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<NodeId>,
    /// The last checkpoint, where that came to nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<CheckpointFailure>,
    /// What went wrong last, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// An earlier epoch's checkpoint, and the records of that epoch's log which it has seen.
pub(super) type Mark = (Epoch, u64);

impl Saved {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// It was started, or another one is to be.
    pub fn forget_failures(&mut self) {
        self.failed_tries = 0;
        self.failed_on.clear();
    }

    /// Whoever says where it is to go has it tried there, again if need be.
    pub fn send_to(&mut self, node: Option<NodeId>) {
        if let Some(node) = &node {
            self.failed_on.remove(node);
            self.faulty_on.remove(node);
        }
        self.target = node;
    }

    pub fn has_failed_on(&self, node: &NodeId) -> bool {
        self.failed_on.contains(node) || self.faulty_on.contains(node)
    }

    /// What the pod goes on from.
    pub fn best(&self) -> Option<Digest> {
        self.checkpoints.iter().find(|id| !self.unusable.contains(id)).copied()
    }
}

/// Why a pod leaves its node, where it does by order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(super) enum Leaving {
    Migrate {
        to: NodeId,
    },
    /// To a seat that is kept for it.
    Move {
        to: NodeId,
        why: String,
    },
    Drain,
    Suspend,
    /// For a job that goes before it.
    Preempt {
        message: String,
    },
    /// Back to a checkpoint.
    Restore,
}

impl Job {
    fn policy(&self) -> &Policy {
        &self.file.spec.pod.checkpoint
    }

    /// Is the pod to leave, and stands still since its checkpoint was taken for that?
    pub(super) fn is_saved_to_leave(&self, index: u32) -> bool {
        let (Some(assignment), Some(pod)) = (self.assignment(index), self.pod(index)) else { return false };
        assignment.goal == Goal::Vacate
            && assignment.asked > 0
            && assignment.asked == assignment.answered
            && pod.saved.trouble.is_none()
    }
}

impl Controller {
    /// The agent says that a checkpoint is in the depot.
    pub(super) fn checkpointed(&mut self, now: Now, id: &PodId, info: CheckpointInfo) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let current = job.file.generation;
        let Some(pod) = job.pod(id.index) else { return };
        let (epoch, stale) = (pod.epoch, pod.generation != current);
        let digest = info.id;
        if stale || !info.needs.is_bounded() || pod.saved.checkpoints.contains(&digest) {
            return;
        }
        let spec = job.file.spec.clone();
        let keep = job.policy().keep.max(1) as usize;
        let Some(assignment) = job.assignment_mut(id.index) else { return };
        assignment.answered = assignment.answered.max(info.level);
        let stands_still = assignment.goal == Goal::Vacate;
        if !stands_still {
            assignment.phase = PodPhase::Running;
        }
        let node = Some(assignment.node.clone());
        if let Some(log) = job.log_mut(id.index, epoch) {
            log.kept = log.kept.max(info.log_records);
        }
        job.run.checkpoint = Some(CheckpointStatus {
            id: digest,
            at: info.at,
            bytes: info.bytes,
            new_bytes: info.new_bytes,
            frozen_ms: info.frozen_ms,
        });
        if let Some(from) =
            node.as_ref().and_then(|node| self.cluster.nodes.get_mut(node)).filter(|_| stands_still)
        {
            // It waits for the acknowledgement alone.
            from.ack = Some(now.boot);
        }
        let record =
            Checkpoint { info, uid: id.uid.clone(), index: id.index, epoch, node, spec, imported: None };
        self.cluster.checkpoints.insert(digest, record);
        self.counters.checkpoints += 1;
        self.dirty.checkpoints.insert(digest);
        self.dirty.runs.insert(id.uid.clone());
        self.dirty.status.insert(id.uid.clone());
        self.change_saved(id, |saved| {
            (saved.trouble, saved.failure) = (None, None);
            saved.checkpoints.insert(0, digest);
            saved.checkpoints.truncate(keep);
        });
        self.arm_interval(now, &id.uid);
    }

    /// The one way in which a pod's list of checkpoints changes: what it names anew is counted before what it names no
    /// more is let go.
    pub(super) fn change_saved(&mut self, id: &PodId, change: impl FnOnce(&mut Saved)) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let lists = job.change(id.index, |pod| {
            let before = pod.saved.checkpoints.clone();
            change(&mut pod.saved);
            (before, pod.saved.checkpoints.clone())
        });
        let Some((before, after)) = lists else { return };
        for new in after.iter().filter(|new| !before.contains(new)) {
            self.cluster.named_checkpoints.add(*new);
        }
        self.dirty.pods.insert(id.clone());
        self.let_go(before.into_iter().filter(|old| !after.contains(old)));
    }

    pub(super) fn imported(&mut self, now: Now, imported: Imported) {
        let Imported { info, pod, epoch, node, spec } = imported;
        let id = info.id;
        if self.cluster.checkpoints.contains_key(&id) || !info.needs.is_bounded() {
            return;
        }
        let (uid, index) = (pod.uid, pod.index);
        let record = Checkpoint { info, uid, index, epoch, node, spec, imported: Some(now.wall) };
        self.cluster.checkpoints.insert(id, record);
        self.cluster.named_checkpoints.add(id);
        self.dirty.checkpoints.insert(id);
    }

    /// Lets go what was imported long ago, as far as nothing has begun with it.
    pub(super) fn let_imported_go(&mut self, now: Now) {
        let old = |found: &Checkpoint| found.imported.is_some_and(|at| now.wall.since(at) >= IMPORTED_KEPT);
        let over = self.cluster.checkpoints.iter_mut().filter(|(_, found)| old(found));
        let over: Vec<Digest> = over
            .map(|(id, found)| {
                found.imported = None;
                *id
            })
            .collect();
        self.dirty.checkpoints.extend(over.iter().copied());
        self.let_go(over);
    }

    pub(super) fn checkpoint_failed(&mut self, now: Now, id: &PodId, level: u64, why: String) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let name = job.file.spec.name.pod(id.index);
        let Some(assignment) = job.assignment_mut(id.index) else { return };
        assignment.answered = assignment.answered.max(level);
        assignment.phase = PodPhase::Running;
        let at = now.wall;
        let mut trouble = format!("the last checkpoint of pod {name}, at {at}, failed: {why}");
        let mut again = false;
        match (&assignment.goal, &assignment.leaving) {
            (Goal::Vacate, Some(Leaving::Migrate { to } | Leaving::Move { to, .. })) => {
                trouble = format!("{trouble}; so it stays here instead of going to {to}");
                (assignment.goal, assignment.leaving) = (Goal::Run, None);
                self.dirty.desired.insert(assignment.node.clone());
            }
            (Goal::Vacate, _) => again = true,
            _ => {}
        }
        let node = assignment.node.clone();
        job.change(id.index, |pod| {
            (pod.saved.trouble, pod.saved.failure) = (Some(trouble), Some(CheckpointFailure { at, why }));
        });
        self.counters.checkpoint_failures += 1;
        self.dirty.pods.insert(id.clone());
        self.dirty.status.insert(id.uid.clone());
        if again {
            self.timers.arm(Timer::Leave(node), now.boot.plus(RETRY));
        }
        self.arm_interval(now, &id.uid);
    }

    /// Asks anew for the checkpoints without which the node's pods cannot leave.
    pub(super) fn ask_leaving(&mut self, node: &NodeId) {
        let Some(held) = self.cluster.nodes.get(node) else { return };
        for pod in held.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(job) = self.cluster.jobs.get_mut(&pod.uid) else { continue };
            if let Some(assignment) = job.assignment(pod.index)
                && assignment.goal == Goal::Vacate
                && assignment.asked == assignment.answered
                && job.pod(pod.index).is_some_and(|pod| pod.saved.trouble.is_some())
            {
                self.ask_checkpoint(&pod);
            }
        }
    }

    /// Orders a checkpoint of a placed pod, unless one is under way, or it stands still behind its last.
    pub(super) fn ask_checkpoint(&mut self, id: &PodId) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid).filter(|job| !job.is_saved_to_leave(id.index))
        else {
            return;
        };
        let Some(assignment) = job.assignment_mut(id.index) else { return };
        if assignment.asked > assignment.answered {
            return;
        }
        assignment.asked = assignment.answered + 1;
        self.dirty.desired.insert(assignment.node.clone());
        self.dirty.pods.insert(id.clone());
        self.dirty.status.insert(id.uid.clone());
    }

    /// A pod of a job lets its checkpoints go.
    pub(super) fn let_go(&mut self, checkpoints: impl IntoIterator<Item = Digest>) {
        for id in checkpoints {
            if self.cluster.named_checkpoints.remove(&id) {
                self.cluster.checkpoints.remove(&id);
                self.dirty.checkpoints.insert(id);
                self.effect(Effect::DeleteCheckpoint(id));
            }
        }
    }

    /// What the depot holds that nothing names goes, unless it is so young that its event may be on its way.
    pub(super) fn depot_listed(&mut self, now: Now, manifests: Vec<(Digest, Timestamp)>) {
        if !self.set_aside.damaged.is_empty() {
            // A record that cannot be read may be that of any of them.
            return;
        }
        for (id, at) in manifests {
            if !self.cluster.checkpoints.contains_key(&id) && now.wall.since(at) >= ORPHAN_AFTER {
                self.effect(Effect::DeleteCheckpoint(id));
            }
        }
    }

    /// The checkpoint could not be started there: another node, or the same once more where it is the only one, then
    /// the checkpoint before, then from the start.
    pub(super) fn restore_failed(&mut self, id: &PodId, node: &NodeId, from: Digest, why: Option<&str>) {
        self.counters.restore_failures += 1;
        let elsewhere = self.has_elsewhere(id, Some(node));
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        job.change(id.index, |pod| {
            let saved = &mut pod.saved;
            saved.failed_tries += 1;
            saved.target = None;
            let why = why.unwrap_or("no reason was given");
            let short = &from.hex()[..12];
            let failed = format!("checkpoint {short} could not be started on {node}: {why}");
            if saved.failed_tries < RESTORE_TRIES_MAX {
                if elsewhere {
                    saved.failed_on.insert(node.clone());
                }
                let place = if elsewhere { "on another node" } else { "once more" };
                saved.trouble = Some(format!("{failed}; it is tried {place}"));
                return;
            }
            saved.forget_failures();
            saved.unusable.insert(from);
            saved.trouble = Some(match saved.best() {
                Some(best) => format!("{failed}; checkpoint {} before it is tried", &best.hex()[..12]),
                None => format!("{failed}; the pod begins from the start"),
            });
        });
        self.dirty.pods.insert(id.clone());
    }

    /// What a node lacks to go on from a checkpoint, in words.
    pub(super) fn unfit_for(&self, checkpoint: &Digest, node: &NodeId) -> Vec<String> {
        match (self.cluster.checkpoints.get(checkpoint), self.cluster.nodes.get(node)) {
            (Some(found), Some(node)) => found.info.needs.lacking(&node.record.inventory),
            _ => Vec::new(),
        }
    }

    /// Why this very pod may not go to a node on which pods of its job may; empty: it may.
    pub(super) fn bars(&self, uid: &JobUid, index: u32, node: &NodeId) -> Vec<String> {
        let Some(pod) = self.cluster.jobs.get(uid).and_then(|job| job.pod(index)) else { return Vec::new() };
        let mut against = self.bars_but_target(&uid.pod(index), node);
        if let Some(target) = pod.saved.target.as_ref().filter(|target| *target != node) {
            against.push(format!("it is on its way to {target}"));
        }
        against
    }

    /// The same, wherever it may be on its way to.
    pub(super) fn bars_but_target(&self, id: &PodId, node: &NodeId) -> Vec<String> {
        let Some(pod) = self.cluster.jobs.get(&id.uid).and_then(|job| job.pod(id.index)) else {
            return Vec::new();
        };
        let mut against = match pod.saved.best() {
            Some(best) => self.unfit_for(&best, node),
            None => Vec::new(),
        };
        if pod.saved.failed_on.contains(node) {
            against.push("its checkpoint could not be started there".to_owned());
        }
        if pod.saved.faulty_on.contains(node) {
            against.push("the pod failed there by the node's own fault".to_owned());
        }
        against
    }

    /// What a pod would go on from now; and, where that is a checkpoint of its own, how far its log stood.
    pub(super) fn departure(&self, uid: &JobUid, index: u32) -> (Option<Digest>, Option<Mark>) {
        let pod = self.cluster.jobs.get(uid).and_then(|job| job.pod(index));
        let Some(best) = pod.and_then(|pod| pod.saved.best()) else { return (None, None) };
        let found = self.cluster.checkpoints.get(&best);
        let own = found.filter(|found| found.uid == *uid && found.index == index);
        (Some(best), own.map(|found| (found.epoch, found.info.log_records)))
    }

    /// Orders the checkpoints that are due by the job's interval, and sees to the next.
    pub(super) fn arm_interval(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let Some(interval) = job.policy().interval else { return };
        if job.run.verdict.is_some() || job.run.suspended || job.policy().mode == CheckpointMode::None {
            return;
        }
        let mut due = Vec::new();
        let mut next: Option<BootMs> = None;
        for index in job.placed() {
            let (Some(assignment), Some(pod)) = (job.assignment(*index), job.pod(*index)) else { continue };
            let Some(started) = assignment.started_at.filter(|_| assignment.phase == PodPhase::Running)
            else {
                continue;
            };
            let taken = pod.saved.checkpoints.first().and_then(|id| self.cluster.checkpoints.get(id));
            let last = taken.map_or(started, |found| found.info.at.max(started));
            let gone = now.wall.since(last);
            let idle = assignment.asked == assignment.answered && assignment.goal == Goal::Run;
            let wait = match interval.saturating_sub(gone) {
                Millis(0) if idle => {
                    due.push(uid.pod(*index));
                    interval
                }
                Millis(0) => RETRY,
                left => left,
            };
            let at = now.boot.plus(wait);
            next = Some(next.map_or(at, |next| next.min(at)));
        }
        if let Some(next) = next {
            self.timers.arm(Timer::Checkpoints(uid.clone()), next);
        }
        for pod in due {
            self.ask_checkpoint(&pod);
        }
    }
}

/// What of a pod's log will be said again by the run that goes on from the mark.
pub(super) fn cut_logs(pod: &mut Pod, mark: Option<Mark>) {
    let Some((epoch, records)) = mark else { return };
    for log in &mut pod.logs {
        let said = match log.epoch.cmp(&epoch) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => records,
            std::cmp::Ordering::Greater => 0,
        };
        log.cut = Some(log.cut.map_or(said, |cut| cut.min(said)));
    }
}

/// Whether an end by eviction was a restore that did not come off.
pub(super) fn is_failed_restore(reason: Option<&str>) -> bool {
    reason == Some(RESTORE_FAILED)
}
