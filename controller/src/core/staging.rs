//! What a pod that is to move will need is brought to its next node before it is asked to leave: its image, and what of
//! its last checkpoint the one that it leaves with will share. So it stands still for its saving and its start alone.
//! A level like all else, in the desired set of the node that brings it. It makes a move begin later at most, and stops
//! none.

use berth_protocol::chunk::GrantRequest;
use berth_protocol::ids::{Digest, Generation, NodeId, PodId, Term};
use berth_protocol::job::CheckpointMode;
use berth_protocol::limits::STAGES_PER_NODE_MAX;
use berth_protocol::message::node::{Stage, StageState, Staged};
use berth_protocol::pod::{Goal, PodPhase};
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::checkpoints::Leaving;
use super::cluster::{Assignment, Liveness, is_zero};
use super::moves::unsavable;
use super::notes::Note;
use super::timers::Timer;
use super::{Controller, Now};

/// What has not come by then, a pod goes without.
const WAIT_MAX: Millis = Millis(60_000);
/// Of the time before a machine goes, one part in so many at most: the rest is for saving.
const DEADLINE_PARTS: u64 = 3;
/// A shorter wait would bring nothing.
const WAIT_MIN: Millis = Millis(1_000);
/// Bytes a second at which the pods of a node that is about to go are taken to be saved.
const SAVED_PER_SECOND: u64 = 200 << 20;
/// A pod that may use less than this stands still for a moment only, whatever is there before it.
const SAVED_FIRST_MIN: u64 = 256 << 20;
/// Of a checkpoint older than this too little is as it was.
const SAVED_FIRST_AGE: Millis = Millis(300_000);
/// A seat is kept so long for a pod that was asked to leave: perhaps it never can.
const SEAT_KEPT: Millis = Millis(600_000);

/// What is brought ahead of a pod, and where; stored with its assignment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Staging {
    pub to: NodeId,
    /// The checkpoint, where the pod has one that is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// The pod takes a checkpoint of this level first, while it runs on: that is what is brought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<u64>,
    /// The pod waits no longer for it.
    pub until: Timestamp,
    /// It is there, or will not be.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub over: bool,
    /// The first desired set of this session that names it.
    #[serde(skip)]
    pub named: Option<(Term, Generation)>,
}

/// How a pod stands ahead of which something is brought.
enum Standing {
    /// It runs on, until then at most.
    Waits(Timestamp),
    /// It is to be asked to leave.
    Due(Leaving),
    /// It is not to leave after all.
    Stays,
    /// It was asked: its seat is kept until then.
    Leaves(Timestamp),
    /// It has left, or no longer goes there.
    Void,
}

impl Controller {
    /// The way in which a pod is sent elsewhere with its work: once what it needs is there, or at once where nothing
    /// lacks or no time is left.
    pub(super) fn send_away(&mut self, now: Now, id: &PodId, why: Leaving) {
        let job = self.cluster.jobs.get(&id.uid);
        let Some(assignment) = job.and_then(|job| job.assignment(id.index)) else { return };
        if assignment.goal != Goal::Run {
            return self.vacate(id, why);
        }
        // What is on its way serves the same order given again, and a drain whatever it was for.
        let serves = why == Leaving::Drain || assignment.leaving.as_ref() == Some(&why);
        if let Some(staging) = assignment.staging.clone().filter(|_| serves) {
            // The node may have less time than when the waiting began.
            let until = staging.until.min(now.wall.plus(self.wait_max(now, &assignment.node)));
            return self.change_assignment(id, |assignment| {
                assignment.leaving = Some(why);
                assignment.staging = Some(Staging { until, ..staging });
            });
        }
        self.forget_staging(id);
        if !matches!(why, Leaving::Move { .. }) {
            self.unreserve(id);
        }
        let Some(staging) = self.staging_for(now, id, &why) else { return self.vacate(id, why) };
        if staging.first.is_some() {
            self.ask_checkpoint(id);
        }
        self.cluster.staging.insert(id.clone(), staging.to.clone());
        self.dirty.desired.insert(staging.to.clone());
        self.change_assignment(id, |assignment| {
            (assignment.leaving, assignment.staging) = (Some(why), Some(staging));
        });
    }

    fn change_assignment(&mut self, id: &PodId, change: impl FnOnce(&mut Assignment)) {
        let job = self.cluster.jobs.get_mut(&id.uid);
        if let Some(assignment) = job.and_then(|job| job.assignment_mut(id.index)) {
            change(assignment);
            self.dirty.pods.insert(id.clone());
            self.dirty.status.insert(id.uid.clone());
        }
    }

    /// Whether the pod has so much memory, and no checkpoint that is like it, that it pays to save it twice: the second
    /// time it stands still for what has changed since the first. Where time is short one has to do; what saves itself
    /// ends with it; and what GPUs hold goes through the memory that the pod needs, and changes with every step.
    fn saves_first(&self, now: Now, id: &PodId) -> bool {
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return false };
        let (Some(pod), Some(assignment)) = (job.pod(id.index), job.assignment(id.index)) else {
            return false;
        };
        let policy = &job.file.spec.pod.checkpoint;
        let by_criu = matches!(policy.mode, CheckpointMode::Auto | CheckpointMode::Criu) && !policy.asks();
        let from = self.cluster.nodes.get(&assignment.node);
        let savable = from.is_some_and(|node| {
            let drain = node.record.drain.as_ref();
            drain.is_none_or(|drain| drain.deadline.is_none())
                && unsavable(&job.file.spec, &node.record.inventory).is_none()
        });
        let best = pod.saved.best().and_then(|best| self.cluster.checkpoints.get(&best));
        assignment.phase == PodPhase::Running
            && assignment.charge.gpus.is_empty()
            && assignment.charge.memory.0 >= SAVED_FIRST_MIN
            && by_criu
            && savable
            && best.is_none_or(|best| now.wall.since(best.info.at) >= SAVED_FIRST_AGE)
    }

    /// Where the pod will go on, its seat kept from now, and what lacks there. None: it is to leave at once.
    fn staging_for(&mut self, now: Now, id: &PodId, why: &Leaving) -> Option<Staging> {
        let job = self.cluster.jobs.get(&id.uid)?;
        let assignment = job.assignment(id.index)?;
        let runs = matches!(assignment.phase, PodPhase::Running | PodPhase::Checkpointing | PodPhase::Paused);
        let stays = !job.run.suspended && job.run.verdict.is_none();
        let (wait, next) = (self.wait_max(now, &assignment.node), assignment.answered + 1);
        if !runs || !stays || job.pod(id.index)?.generation != job.file.generation || wait < WAIT_MIN {
            return None;
        }
        let (to, seat) = match why {
            // The plan has kept it.
            Leaving::Move { to, .. } => (to.clone(), None),
            Leaving::Migrate { to } => (to.clone(), Some(self.seat_ahead(id, Some(to))?)),
            Leaving::Drain => {
                let seat = self.seat_ahead(id, None)?;
                (self.scheduler.nodes[seat.seat.room].clone(), Some(seat))
            }
            Leaving::Suspend | Leaving::Preempt { .. } | Leaving::Restore => return None,
        };
        let (first, from, wait) = match self.saves_first(now, id).then_some(next) {
            Some(level) => (Some(level), None, Millis(wait.0 + 2 * self.millis_to_save(id))),
            None => (None, self.lacking_at(id, &to)?, wait),
        };
        if seat.is_some_and(|seat| !self.scheduler.reserve(id, seat)) {
            return None;
        }
        let until = now.wall.plus(wait);
        Some(Staging { to, from, first, until, over: false, named: None })
    }

    /// What the node lacks of what the pod will need: the checkpoint is named where that does. None: nothing, for all
    /// that is known.
    fn lacking_at(&self, id: &PodId, node: &NodeId) -> Option<Option<Digest>> {
        let job = self.cluster.jobs.get(&id.uid)?;
        let (pod, template) = (job.pod(id.index)?, &job.file.spec.pod);
        // A node keeps the last checkpoint that it took of a pod.
        let elsewhere = |best: &Digest| {
            self.cluster.checkpoints.get(best).is_some_and(|found| found.node.as_ref() != Some(node))
        };
        let from = pod.saved.best().filter(elsewhere);
        let images = self.scheduler.has_images(template, node) == Some(false);
        let was_there = || pod.logs.iter().any(|log| log.node.as_ref() == Some(node));
        let files = template.workspace.is_some() && !was_there();
        (from.is_some() || images || files).then_some(from)
    }

    /// How long a pod of that node may wait, without harm to the saving of all that are there.
    fn wait_max(&self, now: Now, node: &NodeId) -> Millis {
        let Some(node) = self.cluster.nodes.get(node) else { return Millis::ZERO };
        let Some(deadline) = node.record.drain.as_ref().and_then(|drain| drain.deadline) else {
            return WAIT_MAX;
        };
        let left = deadline.since(now.wall);
        let saving = Millis(node.pods.keys().map(|pod| self.millis_to_save(pod)).sum());
        WAIT_MAX.min(Millis(left.0 / DEADLINE_PARTS)).min(left.saturating_sub(saving))
    }

    /// For as much as last time, else for all that it may use.
    fn millis_to_save(&self, id: &PodId) -> u64 {
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return 0 };
        let best = job.pod(id.index).and_then(|pod| pod.saved.best());
        let last = best.and_then(|best| self.cluster.checkpoints.get(&best)).map(|found| found.info.bytes.0);
        let bytes = last.or_else(|| Some(job.assignment(id.index)?.charge.memory.0)).unwrap_or(0);
        bytes.saturating_mul(1000) / SAVED_PER_SECOND
    }

    /// What is to be brought to a node, as far as one message names it.
    pub(super) fn stages(&self, node: &NodeId) -> Vec<Stage> {
        let here = self.cluster.staging.iter().filter(|(_, to)| *to == node);
        let stage = |id: &PodId| {
            let job = self.cluster.jobs.get(&id.uid)?;
            let (epoch, assignment) = (job.pod(id.index)?.epoch, job.assignment(id.index)?);
            let staging =
                assignment.staging.as_ref().filter(|staging| !staging.over && staging.first.is_none())?;
            Some(Stage { pod: id.clone(), epoch, spec: assignment.spec, from: staging.from })
        };
        here.filter_map(|(id, _)| stage(id)).take(STAGES_PER_NODE_MAX).collect()
    }

    /// A new desired set names these.
    pub(super) fn stages_named(&mut self, stages: &[Stage], by: (Term, Generation)) {
        for stage in stages {
            let job = self.cluster.jobs.get_mut(&stage.pod.uid);
            let staging = job
                .and_then(|job| job.assignment_mut(stage.pod.index))
                .and_then(|assignment| assignment.staging.as_mut());
            if let Some(staging) = staging {
                staging.named.get_or_insert(by);
            }
        }
    }

    /// Whether the node brings this checkpoint ahead of the pod, and so may load it.
    pub(super) fn is_staged(&self, node: &NodeId, asked: &GrantRequest, checkpoint: Digest) -> bool {
        let job = self.cluster.jobs.get(&asked.pod.uid);
        let pod = job.and_then(|job| Some((job.pod(asked.pod.index)?, job.assignment(asked.pod.index)?)));
        pod.is_some_and(|(pod, assignment)| {
            let brings = |staging: &Staging| staging.to == *node && staging.from == Some(checkpoint);
            pod.epoch == asked.epoch && assignment.staging.as_ref().is_some_and(brings)
        })
    }

    /// What a heartbeat says of what is brought, and which desired set its agent has applied.
    pub(super) fn staged(&mut self, node: &NodeId, applied: (Term, Generation), said: &[Staged]) {
        for id in self.coming_to(node) {
            let Some(job) = self.cluster.jobs.get(&id.uid) else { continue };
            let (Some(pod), Some(assignment)) = (job.pod(id.index), job.assignment(id.index)) else {
                continue;
            };
            let Some(staging) = assignment.staging.clone().filter(|staging| !staging.over) else { continue };
            let state = said.iter().find(|staged| staged.pod == id && staged.epoch == pod.epoch);
            match state.map(|staged| &staged.state) {
                Some(StageState::Busy) => continue,
                Some(StageState::Ready) => {}
                Some(StageState::Failed { why }) => {
                    let (namespace, pod) =
                        (job.file.spec.namespace.clone(), job.file.spec.name.pod(id.index));
                    let (node, why) = (node.clone(), why.clone());
                    self.note(Note::StagingFailed { namespace, pod, node, why });
                }
                None if staging.named.is_none_or(|named| applied < named) => continue,
                // An agent that has the order and says nothing of it is of a version that brings nothing.
                None => {}
            }
            self.dirty.desired.insert(node.clone());
            self.change_assignment(&id, |assignment| {
                assignment.staging = Some(Staging { over: true, ..staging });
            });
        }
    }

    fn coming_to(&self, node: &NodeId) -> Vec<PodId> {
        self.cluster.staging.iter().filter(|(_, to)| *to == node).map(|(id, _)| id.clone()).collect()
    }

    /// A node's session is new: what it is to bring is named anew, and the seats there are kept again.
    pub(super) fn stage_anew(&mut self, node: &NodeId) {
        for id in self.coming_to(node) {
            let job = self.cluster.jobs.get_mut(&id.uid);
            let Some(assignment) = job.and_then(|job| job.assignment_mut(id.index)) else { continue };
            if let Some(staging) = &mut assignment.staging {
                staging.named = None;
            }
            if !self.scheduler.reserved.contains_key(&id)
                && let Some(seat) = self.seat_ahead(&id, Some(node))
            {
                self.scheduler.reserve(&id, seat);
            }
        }
    }

    /// At the controller's start, of what the store says.
    pub(super) fn resume_staging(&mut self) {
        for (uid, job) in &self.cluster.jobs {
            for index in job.placed() {
                let staging = job.assignment(*index).and_then(|assignment| assignment.staging.as_ref());
                let to = staging.map(|staging| staging.to.clone());
                self.cluster.staging.extend(to.map(|to| (uid.pod(*index), to)));
            }
        }
    }

    /// What was to be saved first is, or will not be: that is what is to be brought.
    fn bring_what_was_saved(&mut self) {
        let answered = |id: &PodId| {
            let assignment = self.cluster.jobs.get(&id.uid)?.assignment(id.index)?;
            let first = assignment.staging.as_ref()?.first?;
            (assignment.answered >= first).then_some(())
        };
        let ready = self.cluster.staging.iter().filter(|(id, _)| answered(id).is_some());
        for (id, to) in ready.map(|(id, to)| (id.clone(), to.clone())).collect::<Vec<_>>() {
            let lacking = self.lacking_at(&id, &to);
            self.dirty.desired.insert(to);
            self.change_assignment(&id, |assignment| {
                if let Some(staging) = &mut assignment.staging {
                    (staging.first, staging.over) = (None, lacking.is_none());
                    staging.from = lacking.flatten();
                }
            });
        }
    }

    /// Asks those to leave that have waited long enough, and forgets what is brought for nobody.
    pub(super) fn tend_staging(&mut self, now: Now) {
        self.bring_what_was_saved();
        let mut next: Option<Timestamp> = None;
        let mut ripe = Vec::new();
        for (id, to) in &self.cluster.staging {
            let standing = self.standing(now, id, to);
            if let Standing::Waits(at) | Standing::Leaves(at) = standing {
                next = Some(next.map_or(at, |next| next.min(at)));
            } else {
                ripe.push((id.clone(), standing));
            }
        }
        for (id, standing) in ripe {
            match standing {
                Standing::Due(why) => {
                    self.vacate(&id, why);
                    self.timers.arm(Timer::Staging, now.boot.plus(SEAT_KEPT));
                }
                Standing::Stays => self.call_off(&id),
                _ => self.forget_staging(&id),
            }
        }
        if let Some(at) = next {
            self.timers.arm(Timer::Staging, now.boot.plus(at.since(now.wall)));
        }
    }

    fn standing(&self, now: Now, id: &PodId, to: &NodeId) -> Standing {
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return Standing::Void };
        let (Some(pod), Some(assignment)) = (job.pod(id.index), job.assignment(id.index)) else {
            return Standing::Void;
        };
        let (Some(staging), Some(why)) = (&assignment.staging, &assignment.leaving) else {
            return Standing::Void;
        };
        let there = match why {
            Leaving::Drain => true,
            Leaving::Migrate { to: other } | Leaving::Move { to: other, .. } => other == to,
            Leaving::Suspend | Leaving::Preempt { .. } | Leaving::Restore => false,
        };
        let goes_on = job.run.verdict.is_none() && !job.run.suspended;
        if !there || !goes_on || pod.generation != job.file.generation {
            return Standing::Void;
        }
        if assignment.goal != Goal::Run {
            let kept_until = staging.until.plus(SEAT_KEPT);
            return if now.wall < kept_until { Standing::Leaves(kept_until) } else { Standing::Void };
        }
        let dropped =
            matches!(why, Leaving::Move { .. }) && !self.relocations.iter().any(|plan| plan.moves(id));
        if !dropped && !staging.over && now.wall < staging.until {
            return Standing::Waits(staging.until);
        }
        let takes = self.cluster.nodes.get(to).is_some_and(|node| {
            // Of one not heard since the controller's start nothing is known.
            let unheard = node.session.is_none() && node.liveness != Liveness::Lost;
            !node.record.cordoned && (node.liveness == Liveness::Online || unheard)
        });
        // Nothing has been stopped yet: a pod that was to go to that very node need not leave for another.
        if dropped || !takes && *why != Leaving::Drain { Standing::Stays } else { Standing::Due(why.clone()) }
    }

    fn call_off(&mut self, id: &PodId) {
        let job = self.cluster.jobs.get_mut(&id.uid);
        let why = job.and_then(|job| job.assignment_mut(id.index)?.leaving.take());
        self.forget_staging(id);
        if let Some(Leaving::Migrate { to }) = why
            && let Some(job) = self.cluster.jobs.get_mut(&id.uid)
        {
            let text = format!("it stays here instead of going to {to}, which takes no pods any more");
            job.change(id.index, |pod| pod.saved.trouble = Some(text));
        }
    }

    /// The seat goes with it, unless the pod has left for it.
    pub(super) fn forget_staging(&mut self, id: &PodId) {
        let Some(to) = self.cluster.staging.remove(id) else { return };
        self.dirty.desired.insert(to);
        self.change_assignment(id, |assignment| assignment.staging = None);
    }
}
