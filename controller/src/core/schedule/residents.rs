//! Who lives in which room, and where each may go on: what plans of moves are made from. Reads the cluster, decides
//! nothing.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;

use berth_protocol::checkpoint::Needs;
use berth_protocol::ids::PodId;
use berth_protocol::job::{Volume, VolumeSource};
use berth_protocol::message::query::Stays;
use berth_protocol::pod::{Goal, PodPhase};
use berth_protocol::units::Millis;

use super::super::cluster::{Assignment, Job, Node};
use super::super::moves::{foreseen, unsavable};
use super::super::{Controller, Now};
use super::moves::{Tenant, Tenants};
use super::problem::{Shape, Zoning};

/// A pod runs at least so long between two moves.
pub const REST: Millis = Millis(60_000);
/// Bytes a second at which memory goes and comes.
const BYTES_PER_SECOND: u64 = 200 << 20;
/// What a thousandth of a GPU weighs, in thousandths of a core.
const GPU_WEIGHT: u64 = 8;

/// The controller's pods, looked at room by room. Needs every job classified and its rulebook current.
pub struct Residents<'a> {
    controller: &'a Controller,
    now: Now,
    /// Nobody of a higher priority moves.
    priority: i32,
    rooms: Vec<OnceCell<Vec<Tenant>>>,
    pods: RefCell<Vec<PodId>>,
    needs: RefCell<BTreeMap<usize, Needs>>,
}

impl<'a> Residents<'a> {
    pub fn new(controller: &'a Controller, now: Now, priority: i32) -> Self {
        let rooms = controller.scheduler.nodes.iter().map(|_| OnceCell::new()).collect();
        Self {
            controller,
            now,
            priority,
            rooms,
            pods: RefCell::new(Vec::new()),
            needs: RefCell::new(BTreeMap::new()),
        }
    }

    /// The pod that a tenant stands for.
    pub fn pod(&self, tenant: usize) -> Option<PodId> {
        self.pods.borrow().get(tenant).cloned()
    }

    fn look(&self, room: usize) -> Vec<Tenant> {
        let cluster = &self.controller.cluster;
        let Some(node) = cluster.nodes.get(&self.controller.scheduler.nodes[room]) else { return Vec::new() };
        let tenants = node.pods.keys().filter_map(|id| {
            let job = cluster.jobs.get(&id.uid)?;
            let assignment = job.assignment(id.index)?;
            let charge = &assignment.charge;
            let device = |uuid: &str| node.record.inventory.gpus.iter().position(|gpu| gpu.uuid == *uuid);
            let devices: Vec<usize> = charge.gpus.iter().filter_map(|share| device(&share.uuid)).collect();
            let class = job.class.and_then(|class| self.controller.scheduler.classes.get(class));
            let shape = Shape {
                cpu_milli: charge.cpu.0,
                memory_bytes: charge.memory.0,
                disk_bytes: charge.disk.0,
                gpus: charge.gpus.len(),
                gpu_milli: charge.gpus.first().map_or(0, |share| share.milli),
                gpu_memory_bytes: charge.gpu_memory.0,
                models: class.and_then(|class| class.shape.models.clone()),
            };
            let movable = devices.len() == charge.gpus.len()
                && class.is_some()
                && job.file.spec.priority <= self.priority
                && movable(job, id.index, assignment, node, self.now).is_ok();
            let mut pods = self.pods.borrow_mut();
            pods.push(id.clone());
            let (pod, work) = (pods.len() - 1, work(assignment));
            let images = self.controller.scheduler.images_of(&job.file.spec.pod);
            Some(Tenant { pod, shape, images, devices, movable, work })
        });
        tenants.collect()
    }
}

/// Whether the pod may be asked to go on elsewhere: it runs, it loses nothing by it, and nothing holds it where it is.
pub(in crate::core) fn movable(
    job: &Job,
    index: u32,
    assignment: &Assignment,
    node: &Node,
    now: Now,
) -> Result<(), Stays> {
    let spec = &job.file.spec;
    let named = |volume: &Volume| matches!(volume.source, VolumeSource::Named(_));
    let pod = job.pod(index).ok_or(Stays::NotRunning)?;
    let rested = assignment.started_at.is_some_and(|at| now.wall.since(at) >= REST);
    let stays = assignment.goal == Goal::Run && assignment.leaving.is_none();
    let holds = [
        (!stays || assignment.phase != PodPhase::Running, Stays::NotRunning),
        (pod.generation != job.file.generation, Stays::Changed),
        // One that could not be saved a moment ago is left alone until a checkpoint of it succeeds.
        (pod.saved.trouble.is_some(), Stays::FailedToSave),
        (!spec.preemptible, Stays::NotPreemptible),
        (spec.gang, Stays::Gang),
        (spec.pod.volumes.iter().any(named), Stays::NamedVolume),
        (unsavable(spec, &node.record.inventory).is_some(), Stays::CannotBeSaved),
        (!rested, Stays::Young),
    ];
    holds.into_iter().find(|(holds, _)| *holds).map_or(Ok(()), |(_, why)| Err(why))
}

/// What a move costs: what the pod occupies, for the time that its memory takes to go and come.
fn work(assignment: &Assignment) -> u64 {
    let charge = &assignment.charge;
    let gpus: u64 = charge.gpus.iter().map(|share| u64::from(share.milli)).sum();
    let ms = 1000 + charge.memory.0.saturating_mul(2000) / BYTES_PER_SECOND;
    (charge.cpu.0 + GPU_WEIGHT * gpus).saturating_mul(ms) / 1000
}

impl Tenants for Residents<'_> {
    fn of(&self, room: usize) -> &[Tenant] {
        self.rooms.get(room).map_or(&[], |cell| cell.get_or_init(|| self.look(room)))
    }

    fn may(&self, tenant: usize, room: usize) -> bool {
        self.goes(tenant, room).unwrap_or(false)
    }
}

impl Residents<'_> {
    fn goes(&self, tenant: usize, room: usize) -> Option<bool> {
        let Controller { scheduler, cluster, .. } = self.controller;
        if scheduler.holds.is_held(room) {
            return Some(false);
        }
        let id = self.pod(tenant)?;
        let job = cluster.jobs.get(&id.uid)?;
        let assignment = job.assignment(id.index)?;
        let (source, target) =
            (cluster.nodes.get(&assignment.node)?, cluster.nodes.get(&scheduler.nodes[room])?);
        let book = scheduler.books.get(scheduler.classes.get(job.class?)?.book())?;
        let (from, to) = (book.sites().get(scheduler.room(&assignment.node)?)?, book.sites().get(room)?);
        if !to.eligible || to.bonus < from.bonus || target.record.strays.contains_key(&id) {
            return Some(false);
        }
        if book.zoning == Zoning::Apart && from.zone != to.zone && scheduler.zoned(job).contains_key(&to.zone)
        {
            return Some(false);
        }
        let mut needs = self.needs.borrow_mut();
        let needs = needs.entry(tenant).or_insert_with(|| {
            let gpus: Vec<String> = assignment.charge.gpus.iter().map(|share| share.uuid.clone()).collect();
            foreseen(&job.file.spec, &source.record.inventory, &gpus)
        });
        let suits = needs.lacking(&target.record.inventory).is_empty();
        Some(suits && self.controller.bars_but_target(&id, &scheduler.nodes[room]).is_empty())
    }
}
