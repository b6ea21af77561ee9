//! Which waiting pod goes where: keeps the rooms and the queue, states the problem, and applies what `solve` answers.

pub mod cel;
mod cutting;
pub mod engine;
pub mod explain;
mod index;
pub mod moves;
pub mod policy;
pub mod prices;
pub mod problem;
mod simplex;
pub mod solve;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, NodeId};
use berth_protocol::limits::PODS_PER_NODE_MAX;
use berth_protocol::resources::{GpuShare, Inventory, Resources};

use self::cel::Rules;
use self::engine::Engine;
use self::problem::{Ask, Device, Placement, Room, Seat, Shape, Size, Zoning};
use super::cluster::{Charge, Cluster, Job, Liveness, Node};
use super::{Controller, Now};

/// Jobs whose pods are placed together.
const ASKS_MAX: usize = 256;

/// The rooms in their stable order, and who waits for them.
#[derive(Default)]
pub(super) struct Scheduler {
    pub engine: Engine,
    pub nodes: Vec<NodeId>,
    index: BTreeMap<NodeId, usize>,
    /// Names of device models, by number.
    models: Vec<String>,
    /// Counts what may let a pod fit that did not: room freed, a node changed.
    pub version: u64,
    /// Jobs with waiting pods: priority, then order of submission.
    queue: BTreeSet<(Reverse<i32>, u64, JobUid)>,
    /// Something changed since the last pass.
    pub wanted: bool,
}

impl Scheduler {
    pub fn enqueue(&mut self, uid: &JobUid, job: &mut Job) {
        job.refused_at = None;
        self.queue.insert((Reverse(job.file.spec.priority), job.file.seq, uid.clone()));
        self.wanted = true;
    }

    pub fn dequeue(&mut self, uid: &JobUid, job: &Job) {
        self.queue.remove(&(Reverse(job.file.spec.priority), job.file.seq, uid.clone()));
    }

    pub fn room(&self, node: &NodeId) -> Option<usize> {
        self.index.get(node).copied()
    }

    fn model(&mut self, name: &str) -> usize {
        self.models.iter().position(|model| model == name).unwrap_or_else(|| {
            self.models.push(name.to_owned());
            self.models.len() - 1
        })
    }

    /// Makes the node's room anew from what it has and what its pods take.
    pub fn refresh<'a>(&mut self, id: &NodeId, node: &Node, charges: impl Iterator<Item = &'a Charge>) {
        let has = &node.record.inventory;
        let open = node.liveness == Liveness::Online && node.session.is_some() && !node.record.cordoned;
        let devices = has.gpus.iter().map(|gpu| Device {
            usable: gpu.unhealthy.is_none() && !gpu.mig,
            model: self.model(&gpu.model),
            milli: 1000,
            memory_bytes: gpu.memory.0,
        });
        let mut room = Room {
            open,
            cpu_milli: has.cpu.0,
            memory_bytes: has.memory.0,
            disk_bytes: has.disk.0,
            slots: PODS_PER_NODE_MAX.saturating_sub(node.record.strays.len()),
            devices: devices.collect(),
            size: Size { cpu_milli: has.cpu.0, memory_bytes: has.memory.0 },
        };
        for charge in charges {
            take(&mut room, has, charge);
        }
        let index = *self.index.entry(id.clone()).or_insert(self.nodes.len());
        if index == self.nodes.len() {
            self.nodes.push(id.clone());
        }
        self.engine.refresh(index, room);
        self.version += 1;
        self.wanted = true;
    }

    /// A pod has left the node.
    pub fn release(&mut self, id: &NodeId, has: &Inventory, charge: &Charge) {
        let Some(index) = self.index.get(id).copied() else { return };
        let mut room = self.engine.rooms()[index].clone();
        room.slots += 1;
        room.cpu_milli = (room.cpu_milli + charge.cpu.0).min(has.cpu.0);
        room.memory_bytes = (room.memory_bytes + charge.memory.0).min(has.memory.0);
        for share in &charge.gpus {
            let Some(i) = has.gpus.iter().position(|gpu| gpu.uuid == share.uuid) else { continue };
            let device = &mut room.devices[i];
            device.milli = (device.milli + share.milli).min(1000);
            device.memory_bytes = (device.memory_bytes + charge.gpu_memory.0).min(has.gpus[i].memory.0);
        }
        self.engine.refresh(index, room);
        self.version += 1;
        self.wanted = true;
    }

    /// What the job asks for now; its rules have been brought up to date.
    fn ask<'a>(&self, cluster: &'a Cluster, uid: &JobUid) -> Option<Ask<'a>> {
        let job = cluster.jobs.get(uid)?;
        let rules = job.rules.as_ref()?;
        let mut zoned = BTreeMap::new();
        if rules.zoning != Zoning::Free {
            let rooms = job.placed().iter().filter_map(|i| self.room(&job.assignment(*i)?.node));
            for room in rooms {
                *zoned.entry(rules.sites()[room].zone).or_default() += 1;
            }
        }
        Some(Ask {
            shape: self.shape(&job.file.spec.pod.resources()),
            pods: job.ready().count(),
            gang: job.file.spec.gang,
            zoning: rules.zoning,
            sites: rules.sites(),
            zoned,
        })
    }

    pub fn shape(&self, wants: &Resources) -> Shape {
        let gpu = wants.gpu.as_ref();
        let matching = |wanted: &BTreeSet<String>| {
            let fits = |model: &String| wanted.iter().any(|wanted| model_matches(wanted, model));
            self.models.iter().enumerate().filter(|(_, model)| fits(model)).map(|(i, _)| i).collect()
        };
        Shape {
            cpu_milli: wants.cpu.0,
            memory_bytes: wants.memory.0,
            disk_bytes: 0,
            gpus: gpu.map_or(0, |gpu| gpu.count as usize),
            gpu_milli: gpu.map_or(0, |gpu| gpu.milli),
            gpu_memory_bytes: gpu.and_then(|gpu| gpu.memory).map_or(0, |memory| memory.0),
            models: gpu.filter(|gpu| !gpu.model.is_empty()).map(|gpu| matching(&gpu.model)),
        }
    }
}

/// Takes a pod in that is there already, whether or not the node still has what it takes.
fn take(room: &mut Room, has: &Inventory, charge: &Charge) {
    room.slots = room.slots.saturating_sub(1);
    room.cpu_milli = room.cpu_milli.saturating_sub(charge.cpu.0);
    room.memory_bytes = room.memory_bytes.saturating_sub(charge.memory.0);
    for share in &charge.gpus {
        let Some(i) = has.gpus.iter().position(|gpu| gpu.uuid == share.uuid) else { continue };
        room.devices[i].milli = room.devices[i].milli.saturating_sub(share.milli);
        room.devices[i].memory_bytes = room.devices[i].memory_bytes.saturating_sub(charge.gpu_memory.0);
    }
}

/// `A100` names an `NVIDIA A100-SXM4-80GB`: each of its words is one of the model's.
pub(super) fn model_matches(wanted: &str, model: &str) -> bool {
    let words = |text: &str| -> BTreeSet<String> {
        let word = |w: &str| w.to_ascii_lowercase();
        text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).map(word).collect()
    };
    words(wanted).is_subset(&words(model))
}

impl Controller {
    /// Places what can be placed, each job by its turn.
    pub(super) fn schedule(&mut self, now: Now) {
        if !std::mem::take(&mut self.scheduler.wanted) {
            return;
        }
        let queue: Vec<JobUid> = self.scheduler.queue.iter().map(|(_, _, uid)| uid.clone()).collect();
        let version = self.scheduler.version;
        let mut waiting = queue.into_iter().filter(|uid| {
            self.cluster
                .jobs
                .get(uid)
                .is_some_and(|job| job.refused_at != Some(version) && job.ready().next().is_some())
        });
        let batches: Vec<Vec<JobUid>> =
            std::iter::from_fn(|| Some(waiting.by_ref().take(ASKS_MAX).collect::<Vec<_>>()))
                .take_while(|batch| !batch.is_empty())
                .collect();
        for batch in batches {
            for uid in &batch {
                self.survey(uid);
            }
            let asks: Vec<Ask<'_>> =
                batch.iter().filter_map(|uid| self.scheduler.ask(&self.cluster, uid)).collect();
            if asks.len() != batch.len() {
                continue;
            }
            let placement = solve::solve(&mut self.scheduler.engine, &asks, &Placement::new());
            let shapes: Vec<(Shape, usize)> = asks.into_iter().map(|ask| (ask.shape, ask.pods)).collect();
            for ((uid, (shape, pods)), seats) in batch.iter().zip(shapes).zip(placement) {
                let refused = seats.len() < pods;
                self.seat(now, uid, &shape, seats);
                if refused && let Some(job) = self.cluster.jobs.get_mut(uid) {
                    job.refused_at = Some(version);
                    self.dirty.status.insert(uid.clone());
                }
            }
        }
    }

    /// Brings the job's rules up to date with every node.
    pub(super) fn survey(&mut self, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        // Compiled at the submit; a job stored by a version that knew more conditions fits nowhere.
        let mut rules = match job.rules.take() {
            Some(rules) => rules,
            None => match Rules::compile(&job.file.spec.placement) {
                Ok(rules) => rules,
                Err(_) => return,
            },
        };
        for (room, id) in self.scheduler.nodes.iter().enumerate() {
            if let Some(node) = self.cluster.nodes.get(id) {
                rules.ask(room, node.version, id, &node.record.inventory, &job.file.spec);
            }
        }
        job.rules = Some(rules);
    }

    fn seat(&mut self, now: Now, uid: &JobUid, shape: &Shape, seats: Vec<Seat>) {
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let ready: Vec<u32> = job.ready().take(seats.len()).collect();
        for (index, seat) in ready.into_iter().zip(seats) {
            let id = self.scheduler.nodes[seat.room].clone();
            // A pod whose older epoch is still being stopped there waits for the next pass.
            let free = |node: &&Node| !node.record.strays.contains_key(&uid.pod(index));
            let Some(node) = self.cluster.nodes.get(&id).filter(free) else {
                self.scheduler.engine.release(shape, &seat);
                continue;
            };
            let share = |i: &usize| GpuShare {
                uuid: node.record.inventory.gpus[*i].uuid.clone(),
                milli: shape.gpu_milli,
            };
            let charge = Charge {
                cpu: berth_protocol::units::MilliCpu(shape.cpu_milli),
                memory: berth_protocol::units::Bytes(shape.memory_bytes),
                gpus: seat.devices.iter().map(share).collect(),
                gpu_memory: berth_protocol::units::Bytes(shape.gpu_memory_bytes),
            };
            self.place(now, uid, index, id, charge);
        }
        if let Some(job) = self.cluster.jobs.get(uid)
            && job.waiting().is_empty()
        {
            self.scheduler.dequeue(uid, job);
        }
    }
}
