//! Pods moved so that others fit: which plan is made for whom, and when. How it is carried out is `core::relocations`'.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, PodId};
use berth_protocol::units::{BootMs, Millis};

use super::super::cluster::Charge;
use super::super::relocations::{Relocation, Step};
use super::super::timers::Timer;
use super::super::{Controller, Now};
use super::Scheduler;
use super::engine::Engine;
use super::hold::{Held, Kind};
use super::moves::{self, Move, Plan};
use super::problem::{Seat, Shape, Zoning};
use super::residents::Residents;

/// Others are moved for a pod that has waited for this long.
pub const MOVE_AFTER: Millis = Millis(60_000);
/// Between two looks at who could be helped by moves.
const LOOK_PAUSE: Millis = Millis(2_000);
/// The same job is looked at again after this long, where no room has changed.
const RETRY: Millis = Millis(30_000);
/// Lines that are planned for in one look.
const TRIED_MAX: usize = 4;
/// Relocations on their way at once.
const RELOCATIONS_MAX: usize = 4;

/// A seat that is kept free for a pod on its way there: charged, like a pod that is there.
#[derive(Debug, Clone)]
pub struct Reserved {
    pub seat: Seat,
    pub shape: Shape,
    pub(in crate::core) charge: Charge,
}

impl Scheduler {
    /// Keeps the seat for the pod, if it is free and nobody else's.
    pub fn reserve(&mut self, pod: &PodId, reserved: Reserved) -> bool {
        let Reserved { seat, shape, .. } = &reserved;
        let Some(room) = self.engine.rooms().get(seat.room) else { return false };
        let fits = room.fit(shape).is_some()
            && !self.holds.is_held(seat.room)
            && seat.devices.iter().all(|device| room.devices.get(*device).is_some_and(|d| d.fits(shape)));
        if fits {
            self.engine.charge(shape, seat);
            self.reserved.insert(pod.clone(), reserved);
        }
        fits
    }

    /// Charges of the seats that are kept free in a room.
    pub(super) fn reserved_in(&self, room: usize) -> impl Iterator<Item = &Charge> {
        self.reserved.values().filter(move |reserved| reserved.seat.room == room).map(|r| &r.charge)
    }
}

impl Controller {
    /// Gives back the seat that is kept for a pod, if there is one.
    pub(in crate::core) fn unreserve(&mut self, pod: &PodId) {
        let Some(reserved) = self.scheduler.reserved.remove(pod) else { return };
        let id = self.scheduler.nodes[reserved.seat.room].clone();
        if let Some(node) = self.cluster.nodes.get(&id)
            && !self.scheduler.release(&id, &node.record.inventory, pod, &reserved.charge)
        {
            self.refresh_room(&id);
        }
    }

    /// For the first lines that have waited long enough: others move, if that makes room.
    pub(super) fn move_for(&mut self, now: Now, lines: &[JobUid]) {
        let most = self.config.moves_max;
        if most == 0 || self.relocations.len() >= RELOCATIONS_MAX {
            return;
        }
        let mut tried = 0;
        for uid in lines {
            let Some(job) = self.cluster.jobs.get(uid) else { continue };
            // Room that came free is not all that may help: pods come to run, and to be saved again.
            let again = job.moves_tried.filter(|(version, _)| *version == self.scheduler.version);
            let again = again.map_or(BootMs(0), |(_, at)| at.plus(RETRY));
            let Some(since) = job.waits_since else { continue };
            if !self.may_be_moved_for(uid) {
                continue;
            }
            let looked_at = self.scheduler.moves_looked_at.plus(LOOK_PAUSE);
            let at = since.plus(MOVE_AFTER).max(looked_at).max(again);
            if at > now.boot {
                self.timers.arm(Timer::Schedule, at);
                continue;
            }
            if tried == TRIED_MAX || self.relocations.len() >= RELOCATIONS_MAX {
                break;
            }
            tried += 1;
            if let Some((plan, pods)) = self.plan_for(now, uid, most) {
                self.relocate(now, uid, plan, &pods);
            }
            let version = self.scheduler.version;
            if let Some(job) = self.cluster.jobs.get_mut(uid) {
                job.moves_tried = Some((version, now.boot));
                self.timers.arm(Timer::Schedule, now.boot.plus(RETRY));
            }
        }
        if tried > 0 {
            self.scheduler.moves_looked_at = now.boot;
        }
    }

    /// A gang is never moved for, and nobody for whom room is being made already; whoever is overdue
    /// keeps its room.
    pub(in crate::core) fn may_be_moved_for(&self, uid: &JobUid) -> bool {
        let alone = |job: &super::super::cluster::Job| !job.file.spec.gang || job.ready().nth(1).is_none();
        let kind = self.scheduler.holds.get(uid).map(|hold| hold.kind);
        self.cluster.jobs.get(uid).is_some_and(alone)
            && !matches!(kind, Some(Kind::Preemption | Kind::Move | Kind::Overdue))
    }

    /// Jobs on nodes that nobody classified since the start, and rulebooks behind their nodes, are brought up to date.
    fn prepare_residents(&mut self) {
        let uids: Vec<JobUid> = self
            .cluster
            .jobs
            .iter()
            .filter(|(_, job)| !job.placed().is_empty())
            .map(|(uid, _)| uid.clone())
            .collect();
        let mut classes = BTreeSet::new();
        for uid in &uids {
            let Some(job) = self.cluster.jobs.get_mut(uid) else { continue };
            classes.extend(self.scheduler.classify(job));
        }
        for class in classes {
            if let Some(book) = self.scheduler.classes.get(class).map(|class| class.book()) {
                self.survey_book(book);
            }
        }
    }

    /// Asks of the engine while the rest of the controller is only looked at.
    fn with_engine<T>(&mut self, ask: impl FnOnce(&mut Engine, &Self) -> T) -> T {
        let mut engine = std::mem::take(&mut self.scheduler.engine);
        let answer = ask(&mut engine, self);
        self.scheduler.engine = engine;
        answer
    }

    /// Moves that make room for the job's next pod, and the pods in their order.
    pub(in crate::core) fn plan_for(
        &mut self,
        now: Now,
        uid: &JobUid,
        moves_max: usize,
    ) -> Option<(Plan, Vec<PodId>)> {
        self.survey(uid);
        self.prepare_residents();
        let job = self.cluster.jobs.get(uid)?;
        let (class, priority) = (job.class?, job.file.spec.priority);
        let shape = self.scheduler.shape_of(class)?;
        self.with_engine(|engine, controller| {
            let Self { scheduler, cluster, .. } = controller;
            let book = scheduler.books.get(scheduler.classes.get(class)?.book())?;
            let zoned = scheduler.zoned(cluster.jobs.get(uid)?);
            let holder = |room: usize| scheduler.holds.holder(room).map(|(holder, _)| holder);
            let allowed = |room: usize| {
                if scheduler.overfull.contains(&room) {
                    return false;
                }
                let apart = |zone| book.zoning != Zoning::Apart || !zoned.contains_key(&zone);
                holder(room).is_none_or(|holder| holder == uid)
                    && book.sites().get(room).is_some_and(|site| site.eligible && apart(site.zone))
            };
            let residents = Residents::new(controller, now, priority);
            let plan = moves::plan(engine, &residents, &shape, &allowed, moves_max)?;
            let pods = plan.moves.iter().map(|step| residents.pod(step.pod));
            let pods = pods.collect::<Option<Vec<PodId>>>()?;
            Some((plan, pods)).filter(|(plan, _)| !plan.moves.is_empty())
        })
    }

    /// Moves that leave fewer fragments of devices, with what they leave: thousandths of devices that the next pod
    /// could not use, before and after.
    pub(in crate::core) fn plan_defrag(
        &mut self,
        now: Now,
        moves_max: usize,
    ) -> (Vec<(PodId, Move)>, u64, u64) {
        self.prepare_residents();
        self.with_engine(|engine, controller| {
            let residents = Residents::new(controller, now, i32::MAX);
            let steps = moves::defrag(engine, &residents, moves_max);
            let sum = |engine: &Engine| {
                let all: i64 = (0..engine.rooms().len()).map(|room| engine.fragments(room)).sum();
                (all.max(0) >> super::prices::FINE) as u64
            };
            let before = sum(engine);
            for step in &steps {
                engine.charge(&step.shape, &step.to);
                engine.release(&step.shape, &step.from);
            }
            let after = sum(engine);
            for step in steps.iter().rev() {
                engine.charge(&step.shape, &step.from);
                engine.release(&step.shape, &step.to);
            }
            let steps = steps.into_iter().filter_map(|step| Some((residents.pod(step.pod)?, step)));
            (steps.collect(), before, after)
        })
    }

    /// Begins a plan for a job: its room is held, the seats of those who move are kept. False: it holds no longer.
    pub(in crate::core) fn relocate(&mut self, now: Now, uid: &JobUid, plan: Plan, pods: &[PodId]) -> bool {
        let waits_for: BTreeSet<PodId> = pods.iter().cloned().collect();
        let Some(shape) = self
            .cluster
            .jobs
            .get(uid)
            .and_then(|job| self.scheduler.classes.get(job.class?).map(|class| class.shape.clone()))
        else {
            return false;
        };
        self.scheduler.drop_hold(uid);
        let Some(spare) = self.spare(plan.seat.room, &shape, 1, &waits_for) else { return false };
        let steps: Vec<Step> =
            pods.iter().zip(plan.moves).filter_map(|(pod, step)| self.step_of(pod, step)).collect();
        for step in &steps {
            let reserved = step.reserved.clone();
            if !self.scheduler.reserve(&step.pod, reserved) {
                for step in &steps {
                    self.unreserve(&step.pod);
                }
                return false;
            }
        }
        let held = Held { pods: 1, waits_for, spare };
        self.scheduler.holds.add(uid, Kind::Move, now.boot, BTreeMap::from([(plan.seat.room, held)]));
        self.dirty.status.insert(uid.clone());
        self.relocations.push(Relocation::new(Some(uid.clone()), steps));
        self.tend_relocations(now);
        true
    }

    pub(in crate::core) fn step_of(&self, pod: &PodId, step: Move) -> Option<Step> {
        let job = self.cluster.jobs.get(&pod.uid)?;
        let charge = job.assignment(pod.index)?.charge.clone();
        let node = self.cluster.nodes.get(&self.scheduler.nodes[step.to.room])?;
        let gpus = &node.record.inventory.gpus;
        let share = |device: &usize| {
            let uuid = gpus.get(*device)?.uuid.clone();
            Some(berth_protocol::resources::GpuShare { uuid, milli: step.shape.gpu_milli })
        };
        let gpus = step.to.devices.iter().map(share).collect::<Option<Vec<_>>>()?;
        let charge = Charge { gpus, ..charge };
        let epoch = job.pod(pod.index)?.epoch;
        let reserved = Reserved { seat: step.to, shape: step.shape, charge };
        Some(Step { pod: pod.clone(), epoch, reserved })
    }
}
