//! A pass: every waiting job is offered seats by its turn; for the first of those that got none, room is held or made.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, PodId};
use berth_protocol::pod::Goal;
use berth_protocol::units::{BootMs, Millis};

use super::super::checkpoints::Leaving;
use super::super::cluster::{Assignment, Job};
use super::super::timers::Timer;
use super::super::{Controller, Now};
use super::Scheduler;
use super::free_up::{Load, fits, free_up};
use super::hold::{Held, Kind};
use super::place::{Class, Offer};
use super::problem::{Shape, Zoning};

/// The first job that waits has room held for it after this long.
pub const HOLD_AFTER: Millis = Millis(30_000);
/// A job that has waited for this long has room held whatever its priority, the longest waiting first.
pub const OVERDUE_AFTER: Millis = Millis(3_600_000);
/// Lines that are looked at when room is to be made, the first ones.
const LINES_MAX: usize = 32;
/// Between two attempts to make room for one job.
const HELP_PAUSE: Millis = Millis(1_000);
/// Rooms in which sets of victims are weighed exactly.
const ROOMS_MAX: usize = 32;
/// Work that a stop and restart costs beside what was not saved: reading and writing so many bytes a second.
const BYTES_PER_SECOND: u64 = 200 << 20;
/// A job evicted so often is left alone: it has lost enough.
const EVICTIONS_MAX: u32 = 8;
/// What a thousandth of a GPU weighs, in thousandths of a core.
const GPU_WEIGHT: u64 = 8;

/// Seats that are counted when every room is taken as empty.
const PODS_PER_GANG: usize = 10_000;

impl Scheduler {
    fn seats_when_empty(&self, class: &Class, most: usize) -> usize {
        let Some(book) = self.books.get(class.book()) else { return 0 };
        let mut zones = BTreeSet::new();
        let mut seats = 0;
        for (empty, site) in self.empty.iter().zip(book.sites()).filter(|(_, site)| site.eligible) {
            let mut room = empty.clone();
            while seats < most
                && (book.zoning != Zoning::Apart || !zones.contains(&site.zone))
                && let Some(devices) = room.fit(&class.shape)
            {
                room.charge(&class.shape, &devices);
                zones.insert(site.zone);
                seats += 1;
            }
        }
        seats
    }
}

impl Controller {
    /// Places what can be placed, each job by its turn.
    pub(super) fn pass(&mut self, now: Now) {
        let version = self.scheduler.version;
        while let Some((uid, alone)) = self.scheduler.next_in_turn(version) {
            let refused = !matches!(self.offer(now, &uid, if alone { usize::MAX } else { 1 }), Offer::Placed);
            if refused && let Some(ticket) = self.scheduler.queue.ticket(&uid).cloned() {
                self.scheduler.queue.refuse(&ticket, version);
            }
        }
        for uid in std::mem::take(&mut self.scheduler.fresh) {
            if self.scheduler.queue.ticket(&uid).is_some()
                && let Some(job) = self.cluster.jobs.get_mut(&uid)
            {
                job.refused_at = Some(version);
                self.dirty.status.insert(uid);
            }
        }
        if self.scheduler.queue.len() > 0 {
            self.make_room(now);
        }
    }

    /// For the first jobs that wait: evictions where their priority allows it, and held room for the very first.
    fn make_room(&mut self, now: Now) {
        let ledger = &self.scheduler.ledger;
        let first: Vec<JobUid> = self.scheduler.queue.heads(LINES_MAX, |namespace| ledger.share(namespace));
        let (mut head, mut fitting) = (None, Vec::new());
        for uid in first {
            if self.may_start(&uid) && self.could_fit(&uid) {
                self.preempt(now, &uid);
                head = head.or(Some(uid.clone()));
                fitting.push(uid);
            }
        }
        self.move_for(now, &fitting);
        let stale = |kind| {
            let holds = self.scheduler.holds.iter();
            let of_kind = holds.filter(move |(_, hold)| hold.kind == kind);
            of_kind.map(|(uid, _)| uid.clone()).collect::<Vec<_>>()
        };
        let (heads, overdue) = (stale(Kind::Head), stale(Kind::Overdue));
        for uid in heads.into_iter().filter(|uid| head.as_ref() != Some(uid)) {
            self.scheduler.drop_hold(&uid);
        }
        // Whoever is overdue keeps its room until it has started.
        let oldest: Vec<_> = self.scheduler.queue.oldest(LINES_MAX).cloned().collect();
        let oldest = oldest.into_iter().find(|(_, uid)| self.may_start(uid) && self.could_fit(uid));
        if overdue.is_empty()
            && let Some((since, uid)) = oldest
        {
            self.hold_after(now, &uid, since.plus(OVERDUE_AFTER), Kind::Overdue);
        }
        if let Some(uid) = head
            && let Some(since) = self.cluster.jobs.get(&uid).and_then(|job| job.waits_since)
        {
            self.hold_after(now, &uid, since.plus(HOLD_AFTER), Kind::Head);
        }
    }

    fn hold_after(&mut self, now: Now, uid: &JobUid, at: BootMs, kind: Kind) {
        if self.scheduler.holds.get(uid).is_some() {
            return;
        }
        if at > now.boot {
            self.timers.arm(Timer::Schedule, at);
            return;
        }
        // Whatever runs there ends by itself; the shortest wait is where least has to end.
        if let Some(rooms) = self.rooms_for(
            uid,
            |_, _, _| true,
            |_, assignment| 1 + now.wall.since(assignment.started_at.unwrap_or(now.wall)).0 / 60_000,
        ) {
            self.scheduler.holds.add(uid, kind, now.boot, rooms);
            self.dirty.status.insert(uid.clone());
        }
    }

    /// Nothing of its namespace's stands against it: neither the quota nor a secret that is not there.
    pub(in crate::core) fn may_start(&self, uid: &JobUid) -> bool {
        let Some(job) = self.cluster.jobs.get(uid) else { return false };
        if self.missing_secret(&job.file.spec).is_some() {
            return false;
        }
        let pods = if job.file.spec.gang { job.ready().count() } else { 1 };
        let Some(class) = job.class.and_then(|id| self.scheduler.classes.get(id)) else { return false };
        let more = super::quota::Sum::of_pods(class.wants(), pods);
        self.scheduler.ledger.over_quota(&job.file.spec.namespace, more).is_none()
    }

    /// Whether one pod of the job, or the whole gang, would fit if every room were empty.
    pub(in crate::core) fn could_fit(&mut self, uid: &JobUid) -> bool {
        let Some(job) = self.cluster.jobs.get(uid) else { return false };
        let pods = if job.file.spec.gang { job.ready().count() } else { 1 };
        let Some(id) = job.class else { return false };
        let layout = self.scheduler.layout;
        let Some(class) = self.scheduler.classes.get(id) else { return false };
        let seats = match class.seats {
            Some((at, seats)) if at == layout => seats,
            _ => {
                let seats = self.scheduler.seats_when_empty(class, PODS_PER_GANG);
                if let Some(class) = self.scheduler.classes.get_mut(id) {
                    class.seats = Some((layout, seats));
                }
                seats
            }
        };
        seats >= pods
    }

    /// Room for those of the job's pods that have none held: which rooms, and what has to leave them. `may`: who may
    /// be asked to leave; `cost`: what that costs. A gang gets all of it or nothing.
    pub(super) fn rooms_for(
        &self,
        uid: &JobUid,
        may: impl Fn(&Job, &Assignment, &PodId) -> bool,
        cost: impl Fn(&Job, &Assignment) -> u64,
    ) -> Option<BTreeMap<usize, Held>> {
        let job = self.cluster.jobs.get(uid)?;
        let class = self.scheduler.classes.get(job.class?)?;
        let (shape, book) = (&class.shape, self.scheduler.books.get(class.book())?);
        let waiting = job.ready().count().saturating_sub(self.scheduler.holds.pods_of(uid));
        let wanted = if job.file.spec.gang { waiting } else { waiting.min(1) };
        let mut zoned = self.scheduler.zoned(job);
        let mut found: BTreeMap<usize, Held> = BTreeMap::new();
        for _ in 0..wanted {
            let open = |room: &usize| {
                let site = book.sites().get(*room);
                let apart = |zone| book.zoning != Zoning::Apart || !zoned.contains_key(&zone);
                self.scheduler.rooms()[*room].open
                    // What leaves an overfull room frees less than it takes.
                    && !self.scheduler.overfull.contains(room)
                    && !self.scheduler.holds.is_held(*room)
                    && site.is_some_and(|site| site.eligible && apart(site.zone))
            };
            let mut best: Vec<(u64, usize, Vec<PodId>)> = (0..self.scheduler.rooms().len())
                .filter(open)
                .filter_map(|room| {
                    let pods = found.get(&room).map_or(0, |held| held.pods) + 1;
                    let (loads, ids) = self.loads(room, &may, &cost);
                    let (cost, leaving) = free_up(&self.scheduler.rooms()[room], shape, pods, &loads)?;
                    Some((cost, room, leaving.into_iter().map(|i| ids[i].clone()).collect()))
                })
                .collect();
            best.sort_by_key(|(cost, room, leaving)| (*cost, leaving.len(), *room));
            best.truncate(ROOMS_MAX);
            let (_, room, leaving) = best.into_iter().next()?;
            if let Some(site) = book.sites().get(room) {
                *zoned.entry(site.zone).or_default() += 1;
            }
            let pods = found.get(&room).map_or(0, |held| held.pods) + 1;
            let waits_for: BTreeSet<PodId> = leaving.into_iter().collect();
            let spare = self.spare(room, shape, pods, &waits_for)?;
            found.insert(room, Held { pods, waits_for, spare });
        }
        (!found.is_empty()).then_some(found)
    }

    /// The room once these pods have left and the holder's are there.
    pub(super) fn spare(
        &self,
        room: usize,
        shape: &Shape,
        pods: usize,
        leaving: &BTreeSet<PodId>,
    ) -> Option<super::problem::Room> {
        let mut spare = self.scheduler.rooms()[room].clone();
        let (loads, ids) = self.loads(room, &|_, _, id| leaving.contains(id), &|_, _| 0);
        debug_assert_eq!(ids.len(), leaving.len());
        for load in loads {
            load.leave(&mut spare);
        }
        if !fits(&spare, shape, pods) {
            return None;
        }
        for _ in 0..pods {
            let devices = spare.fit(shape)?;
            spare.charge(shape, &devices);
        }
        Some(spare)
    }

    /// The pods in a room that `may` leave, as loads.
    fn loads(
        &self,
        room: usize,
        may: &impl Fn(&Job, &Assignment, &PodId) -> bool,
        cost: &impl Fn(&Job, &Assignment) -> u64,
    ) -> (Vec<Load>, Vec<PodId>) {
        let Some(node) = self.cluster.nodes.get(&self.scheduler.nodes[room]) else {
            return Default::default();
        };
        let (mut loads, mut ids) = (Vec::new(), Vec::new());
        for pod in node.pods.keys() {
            let Some(job) = self.cluster.jobs.get(&pod.uid) else { continue };
            let Some(assignment) = job.assignment(pod.index).filter(|a| may(job, a, pod)) else { continue };
            let charge = &assignment.charge;
            let device = |uuid: &str| node.record.inventory.gpus.iter().position(|gpu| gpu.uuid == *uuid);
            let devices = charge.gpus.iter();
            let devices = devices.filter_map(|s| Some((device(&s.uuid)?, s.milli, charge.gpu_memory.0)));
            loads.push(Load {
                cpu_milli: charge.cpu.0,
                memory_bytes: charge.memory.0,
                disk_bytes: charge.disk.0,
                devices: devices.collect(),
                cost: cost(job, assignment),
            });
            ids.push(pod.clone());
        }
        (loads, ids)
    }

    /// Evicts the cheapest set of pods of lower priority that makes room for the job's next pod, or for all of a gang.
    fn preempt(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let priority = job.file.spec.priority;
        let covered = self.scheduler.holds.pods_of(uid) >= job.ready().count();
        if covered || self.scheduler.lowest_running().is_none_or(|lowest| lowest >= priority) {
            return;
        }
        if job.helped_at.is_some_and(|at| now.boot.since(at) < HELP_PAUSE) {
            self.timers.arm(Timer::Schedule, now.boot.plus(HELP_PAUSE));
            return;
        }
        job.helped_at = Some(now.boot);
        let by = format!("{}/{}", job.file.spec.namespace, job.file.spec.name);
        loop {
            let may = |victim: &Job, assignment: &Assignment, _: &PodId| {
                let spec = &victim.file.spec;
                let may =
                    spec.preemptible && spec.priority < priority && victim.run.evictions < EVICTIONS_MAX;
                // Who is leaving already costs nothing more.
                may || assignment.goal != Goal::Run
            };
            let cost = |_: &Job, a: &Assignment| if a.goal == Goal::Run { work_lost(now, a) } else { 0 };
            let Some(rooms) = self.rooms_for(uid, may, cost) else { break };
            let victims: Vec<PodId> =
                rooms.values().flat_map(|held| held.waits_for.iter().cloned()).collect();
            self.scheduler.holds.add(uid, Kind::Preemption, now.boot, rooms);
            for pod in &victims {
                let message = format!("made way for job {by}, whose priority of {priority} is higher");
                self.vacate(pod, Leaving::Preempt { message });
            }
        }
        if self.scheduler.holds.get(uid).is_some() {
            self.dirty.status.insert(uid.clone());
        }
    }
}

/// What is lost if the pod stops now and goes on elsewhere: what it did since it was saved last, here since its start,
/// and the time that its memory takes to go and come; both by what it occupies. In core-milliseconds.
fn work_lost(now: Now, assignment: &Assignment) -> u64 {
    let charge = &assignment.charge;
    let gpus: u64 = charge.gpus.iter().map(|share| u64::from(share.milli)).sum();
    let weight = charge.cpu.0 + GPU_WEIGHT * gpus;
    let since_saved = assignment.started_at.map_or(0, |at| now.wall.since(at).0);
    let moving = charge.memory.0.saturating_mul(1000) / BYTES_PER_SECOND;
    // One that has hardly begun still costs its start.
    1 + weight.saturating_mul(since_saved + moving) / 1000
}
