//! Plans of moves carried out: one pod after another is saved and goes on at the seat that is kept for it. Decides
//! nothing but whether a plan still holds; one that does not is dropped.

use std::collections::{BTreeMap, VecDeque};

use berth_protocol::ids::{Epoch, JobUid, PodId};
use berth_protocol::message::query::{DefragPlan, PlannedMove, QueryError, Served, Stays};
use berth_protocol::units::{BootMs, Millis};

use super::checkpoints::Leaving;
use super::cluster::PodState;
use super::query::{Answer, value};
use super::schedule::hold::Kind;
use super::schedule::moves::MOVES_MAX;
use super::schedule::relocate::Reserved;
use super::schedule::residents::movable;
use super::timers::Timer;
use super::{Controller, Now};

/// Waiting jobs that are planned for when an operator asks, the first ones.
const PLANNED_FOR_MAX: usize = 32;
/// A move that takes longer ends its plan.
const STEP_LIFE: Millis = Millis(600_000);

/// One pod's move.
#[derive(Debug, Clone)]
pub(super) struct Step {
    pub pod: PodId,
    /// That runs when the plan is made.
    pub epoch: Epoch,
    pub reserved: Reserved,
}

/// Moves in their order.
#[derive(Debug)]
pub(super) struct Relocation {
    /// The job that fits once all have moved; none: the fleet is packed better by it.
    pub whom: Option<JobUid>,
    steps: VecDeque<Step>,
    under_way: Option<(Step, BootMs)>,
    /// When the last one had left.
    done_at: Option<BootMs>,
}

impl Relocation {
    pub fn new(whom: Option<JobUid>, steps: Vec<Step>) -> Self {
        Self { whom, steps: steps.into(), under_way: None, done_at: None }
    }

    /// Whether this pod's move is under way.
    pub fn moves(&self, pod: &PodId) -> bool {
        self.under_way.as_ref().is_some_and(|(step, _)| step.pod == *pod)
    }

    /// Moves that are not over.
    pub fn left(&self) -> usize {
        self.steps.len() + usize::from(self.under_way.is_some())
    }
}

/// How a pod that is to move fares.
enum Progress {
    OnItsWay,
    /// It no longer is where it was.
    Left,
    /// It stays.
    Stays,
}

impl Controller {
    /// Takes every plan as far as it goes now; drops those that no longer hold, and seats kept for nobody.
    pub(super) fn tend_relocations(&mut self, now: Now) {
        if self.relocations.is_empty() && self.scheduler.reserved.is_empty() {
            return;
        }
        for mut plan in std::mem::take(&mut self.relocations) {
            if self.advance(now, &mut plan) {
                self.relocations.push(plan);
            } else if let Some(uid) = &plan.whom
                && self.scheduler.holds.get(uid).is_some_and(|hold| hold.kind == Kind::Move)
            {
                self.scheduler.drop_hold(uid);
                self.dirty.status.insert(uid.clone());
            }
        }
        let planned =
            |pod: &PodId| self.relocations.iter().any(|plan| plan.steps.iter().any(|step| step.pod == *pod));
        let idle = |pod: &PodId| !planned(pod) && !self.is_on_its_way(pod);
        let idle: Vec<PodId> = self.scheduler.reserved.keys().filter(|pod| idle(pod)).cloned().collect();
        for pod in idle {
            self.unreserve(&pod);
        }
    }

    /// To the seat that is kept for it: about to leave, or between two nodes.
    fn is_on_its_way(&self, id: &PodId) -> bool {
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return false };
        match job.pod(id.index).map(|pod| &pod.state) {
            Some(PodState::Placed(assignment)) => match assignment.leaving {
                Some(Leaving::Move { .. }) => true,
                Some(Leaving::Migrate { .. } | Leaving::Drain) => assignment.staging.is_some(),
                _ => false,
            },
            Some(PodState::Waiting { .. }) => job.particular.contains(&id.index),
            _ => false,
        }
    }

    /// False: the plan is over, or holds no longer.
    fn advance(&mut self, now: Now, plan: &mut Relocation) -> bool {
        if let Some(uid) = &plan.whom {
            let held = self.scheduler.holds.get(uid).is_some_and(|hold| hold.kind == Kind::Move);
            if !held || self.scheduler.queue.ticket(uid).is_none() {
                return false;
            }
        }
        loop {
            if let Some((step, since)) = &plan.under_way {
                match self.progress(step) {
                    Progress::Stays => return false,
                    Progress::OnItsWay if now.boot.since(*since) >= STEP_LIFE => return false,
                    Progress::OnItsWay => {
                        self.timers.arm(Timer::Schedule, since.plus(STEP_LIFE));
                        return true;
                    }
                    Progress::Left => plan.under_way = None,
                }
            }
            let Some(step) = plan.steps.pop_front() else {
                // The job is placed by the next pass, in the room that is held for it.
                let done = *plan.done_at.get_or_insert(now.boot);
                self.timers.arm(Timer::Schedule, done.plus(STEP_LIFE));
                return plan.whom.is_some() && now.boot.since(done) < STEP_LIFE;
            };
            match self.progress(&step) {
                // It has ended, or been moved, by itself.
                Progress::Left => self.unreserve(&step.pod),
                Progress::OnItsWay => return false,
                Progress::Stays => {
                    if !self.begin(now, &step, plan.whom.as_ref()) {
                        return false;
                    }
                    plan.under_way = Some((step, now.boot));
                }
            }
        }
    }

    fn progress(&self, step: &Step) -> Progress {
        let pod = self.cluster.jobs.get(&step.pod.uid).and_then(|job| job.pod(step.pod.index));
        match pod.filter(|pod| pod.epoch == step.epoch).map(|pod| &pod.state) {
            Some(PodState::Placed(assignment)) => match assignment.leaving {
                Some(_) => Progress::OnItsWay,
                None => Progress::Stays,
            },
            _ => Progress::Left,
        }
    }

    /// Has the pod saved and stopped; false: it may no longer be moved, or its seat has gone.
    fn begin(&mut self, now: Now, step: &Step, whom: Option<&JobUid>) -> bool {
        let id = &step.pod;
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return false };
        let Some(assignment) = job.assignment(id.index) else { return false };
        let movable = self
            .cluster
            .nodes
            .get(&assignment.node)
            .is_some_and(|node| movable(job, id.index, assignment, node, now).is_ok());
        let kept = self.scheduler.reserved.contains_key(id);
        if !movable || !kept && !self.scheduler.reserve(id, step.reserved.clone()) {
            return false;
        }
        let to = self.scheduler.nodes[step.reserved.seat.room].clone();
        let whom = whom.and_then(|uid| self.cluster.jobs.get(uid)).map(|job| &job.file.spec);
        let why = match whom {
            Some(spec) => format!("made room for job {}/{}", spec.namespace, spec.name),
            None => "moved to pack devices better".to_owned(),
        };
        self.send_away(now, id, Leaving::Move { to, why });
        true
    }

    /// What an operator may have moved, and the moving of it.
    pub(super) fn defrag(&mut self, now: Now, moves: usize, execute: bool) -> Answer {
        if let Some(plan) = self.relocations.iter().find(|plan| plan.whom.is_none()) {
            let message =
                format!("{} moves are on their way already: ask again once they are over", plan.left());
            return Err(QueryError { code: "Unavailable".to_owned(), message });
        }
        let ledger = &self.scheduler.ledger;
        let first = self.scheduler.queue.heads(PLANNED_FOR_MAX, |namespace| ledger.share(namespace));
        for uid in first {
            if !self.may_start(&uid) || !self.could_fit(&uid) || !self.may_be_moved_for(&uid) {
                continue;
            }
            let Some((plan, pods)) = self.plan_for(now, &uid, moves.min(MOVES_MAX)) else { continue };
            let seats: Vec<usize> = plan.moves.iter().map(|step| step.to.room).collect();
            let planned = pods.iter().zip(seats).filter_map(|(pod, room)| self.planned(pod, room)).collect();
            let node = self.scheduler.nodes[plan.seat.room].clone();
            let Some(spec) = self.cluster.jobs.get(&uid).map(|job| &job.file.spec) else { continue };
            let serves = Some(Served { namespace: spec.namespace.clone(), job: spec.name.clone(), node });
            let executed = execute && self.relocate(now, &uid, plan, &pods);
            let (fragments_milli, stay) = (None, BTreeMap::new());
            return value(&DefragPlan { moves: planned, serves, fragments_milli, stay, executed });
        }
        let (steps, before, after) = self.plan_defrag(now, moves);
        let planned: Vec<PlannedMove> =
            steps.iter().filter_map(|(pod, step)| self.planned(pod, step.to.room)).collect();
        let executed = execute && !steps.is_empty();
        if executed {
            let steps = steps.into_iter().filter_map(|(pod, step)| self.step_of(&pod, step)).collect();
            self.relocations.push(Relocation::new(None, steps));
            self.tend_relocations(now);
        }
        let stay = if planned.is_empty() { self.who_stays(now) } else { BTreeMap::new() };
        let fragments_milli = Some((before, after));
        value(&DefragPlan { moves: planned, serves: None, fragments_milli, stay, executed })
    }

    /// The pods that may not be moved, counted by why not.
    fn who_stays(&self, now: Now) -> BTreeMap<Stays, u32> {
        let mut stay = BTreeMap::new();
        for node in self.cluster.nodes.values() {
            for id in node.pods.keys() {
                let Some(job) = self.cluster.jobs.get(&id.uid) else { continue };
                let Some(assignment) = job.assignment(id.index) else { continue };
                if let Err(why) = movable(job, id.index, assignment, node, now) {
                    *stay.entry(why).or_default() += 1;
                }
            }
        }
        stay
    }

    fn planned(&self, id: &PodId, room: usize) -> Option<PlannedMove> {
        let job = self.cluster.jobs.get(&id.uid)?;
        let assignment = job.assignment(id.index)?;
        let charge = &assignment.charge;
        Some(PlannedMove {
            namespace: job.file.spec.namespace.clone(),
            pod: job.file.spec.name.pod(id.index),
            from: assignment.node.clone(),
            to: self.scheduler.nodes[room].clone(),
            cpu_milli: charge.cpu,
            memory_bytes: charge.memory,
            gpu_milli: charge.gpus.iter().map(|share| u64::from(share.milli)).sum(),
        })
    }

    /// A pod that has left for the seat that is kept for it waits for that alone.
    pub(super) fn bound_for_its_seat(&mut self, id: &PodId) {
        if self.scheduler.reserved.contains_key(id)
            && let Some(job) = self.cluster.jobs.get_mut(&id.uid)
        {
            job.particular.insert(id.index);
            self.scheduler.particular_wanted = true;
        }
    }
}
