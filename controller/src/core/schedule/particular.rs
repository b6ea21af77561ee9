//! Pods that cannot go wherever their job's other pods may: their checkpoint needs what not every node has, could not
//! be started on some, or they are on their way to one. They are seated one by one, behind all others.

use std::collections::BTreeSet;

use berth_protocol::ids::{JobUid, NodeId};

use super::place::Class;
use super::problem::{Seat, Shape};
use crate::core::cluster::Job;
use crate::core::timers::Timer;
use crate::core::{Controller, Now};

/// Pods looked at in one pass.
const PODS_MAX: usize = 1024;

impl Controller {
    pub(in crate::core) fn schedule_particular(&mut self, now: Now) {
        let version = self.scheduler.version;
        if std::mem::replace(&mut self.scheduler.particular_at, version) == version
            && !std::mem::take(&mut self.scheduler.particular_wanted)
        {
            return;
        }
        let jobs = self.cluster.jobs.iter().filter(|(_, job)| !job.particular.is_empty());
        let open = jobs.filter(|(_, job)| job.run.verdict.is_none() && !job.run.suspended);
        let held = |job: &Job| self.hold.as_ref().is_some_and(|hold| hold.holds(job, now).is_some());
        let (held, open): (Vec<_>, Vec<_>) = open.partition(|(_, job)| held(job));
        self.scheduler.particular_wanted = !held.is_empty();
        let pods: Vec<(JobUid, u32)> = open
            .into_iter()
            .flat_map(|(uid, job)| job.ready_particular().map(|i| (uid.clone(), i)))
            .take(PODS_MAX)
            .collect();
        for (uid, index) in pods {
            self.seat_particular(now, &uid, index);
        }
    }

    fn seat_particular(&mut self, now: Now, uid: &JobUid, index: u32) {
        if self.scheduler.reserved.contains_key(&uid.pod(index)) {
            return self.seat_reserved(now, uid, index);
        }
        self.drop_lost_target(uid, index);
        self.survey(uid);
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let shape = self.scheduler.shape(&job.file.spec.pod.resources());
        let fits = self.verdicts(uid).into_iter().filter(|(_, reasons)| reasons.is_empty());
        let rooms: Vec<usize> = fits.map(|(room, _)| room).collect();
        let suits = |room: &usize| self.bars(uid, index, &self.scheduler.nodes[*room]).is_empty();
        let rooms: Vec<usize> = rooms.into_iter().filter(suits).collect();
        let models = match (self.models_saved(uid, index), &shape.models) {
            (Some(saved), Some(own)) => Some(saved.intersection(own).copied().collect()),
            (saved, own) => saved.or_else(|| own.clone()),
        };
        let wanted = Shape { models, ..shape.clone() };
        let fit = |room: usize| {
            let (holds, free) = (&self.scheduler.holds, &self.scheduler.rooms()[room]);
            let own = holds.holder(room).is_none_or(|(holder, _)| holder == uid);
            if own { free.fit(&wanted) } else { holds.reduced(room, free).fit(&wanted) }
        };
        let Some((room, devices)) = rooms.iter().find_map(|room| Some((*room, fit(*room)?))) else {
            self.dirty.status.insert(uid.clone());
            if self.forgive_nodes(&uid.pod(index)) {
                self.scheduler.particular_wanted = true;
                self.timers.arm(Timer::Schedule, now.boot);
            }
            return;
        };
        let seat = Seat { room, devices };
        self.scheduler.charge(uid, &shape, &seat);
        if !self.seat_one(now, uid, index, &shape, &seat) {
            self.scheduler.uncharge(uid, &shape, &seat);
        }
    }

    /// Takes the seat that was kept for the pod, which is charged; where that will not do, any other is looked for.
    fn seat_reserved(&mut self, now: Now, uid: &JobUid, index: u32) {
        self.survey(uid);
        let id = uid.pod(index);
        let Some(reserved) = self.scheduler.reserved.get(&id).cloned() else { return };
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let (shape, room) = (self.scheduler.shape(&job.file.spec.pod.resources()), reserved.seat.room);
        // A version before this one charged no disk.
        let disk_bytes = reserved.shape.disk_bytes;
        let same =
            Shape { models: None, disk_bytes, ..shape.clone() } == Shape { models: None, ..reserved.shape };
        let book = job.class.and_then(|class| self.scheduler.classes.get(class)).map(Class::book);
        let site = book.and_then(|book| self.scheduler.books.get(book)?.sites().get(room));
        let suits = self.scheduler.rooms()[room].open
            && site.is_some_and(|site| site.eligible)
            && self.bars(uid, index, &self.scheduler.nodes[room]).is_empty()
            && self.devices_suit(uid, index, &reserved.seat);
        if same && suits {
            self.scheduler.reserved.remove(&id);
            if !self.seat_one(now, uid, index, &shape, &reserved.seat) {
                self.scheduler.uncharge(uid, &shape, &reserved.seat);
            }
            return;
        }
        self.unreserve(&id);
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            job.particular.remove(&index);
        }
        self.reconcile(now, uid);
        self.timers.arm(Timer::Schedule, now.boot);
    }

    /// A node that a pod was on its way to and that does not take it any more is forgotten.
    fn drop_lost_target(&mut self, uid: &JobUid, index: u32) {
        let pod = self.cluster.jobs.get(uid).and_then(|job| job.pod(index));
        let Some(target) = pod.and_then(|pod| pod.saved.target.clone()) else { return };
        self.survey(uid);
        let against = match self.cluster.nodes.contains_key(&target) {
            true => self.verdict_on(uid, &target),
            false => vec!["it is gone".to_owned()],
        };
        if against.is_empty() {
            return;
        }
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            let text = format!("it could not go on at {target}: {}", against.join("; "));
            job.change(index, |pod| {
                pod.saved.target = None;
                pod.saved.trouble = Some(text);
            });
            self.dirty.pods.insert(uid.pod(index));
            self.dirty.status.insert(uid.clone());
        }
    }

    /// The models of the devices that its saved memory was on, where it was on any.
    fn models_saved(&self, uid: &JobUid, index: u32) -> Option<BTreeSet<usize>> {
        let best = self.cluster.jobs.get(uid)?.pod(index)?.saved.best()?;
        let names = &self.cluster.checkpoints.get(&best)?.info.needs.gpus;
        let known = |name: &String| self.scheduler.models.iter().position(|model| model == name);
        (!names.is_empty()).then(|| names.iter().filter_map(known).collect())
    }

    /// A node may have devices of several models.
    fn devices_suit(&self, uid: &JobUid, index: u32, seat: &Seat) -> bool {
        let room = &self.scheduler.rooms()[seat.room];
        self.models_saved(uid, index).is_none_or(|models| {
            seat.devices.iter().all(|device| models.contains(&room.devices[*device].model))
        })
    }

    /// Whether the pod may go there as any of its job may; where it may not it is seated by itself.
    pub(in crate::core) fn is_general(
        &mut self,
        uid: &JobUid,
        index: u32,
        node: &NodeId,
        seat: &Seat,
    ) -> bool {
        if self.bars(uid, index, node).is_empty() && self.devices_suit(uid, index, seat) {
            return true;
        }
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            job.particular.insert(index);
            self.scheduler.particular_wanted = true;
        }
        false
    }
}
