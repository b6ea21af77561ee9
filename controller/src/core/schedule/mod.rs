//! Which waiting pod goes where: keeps the rooms and the queue, states the problem, and applies what `solve` answers.

mod ahead;
mod cutting;
pub mod engine;
pub mod explain;
mod free_up;
pub mod hold;
pub mod images;
mod index;
pub mod market;
pub mod moves;
mod particular;
pub mod place;
pub mod policy;
pub mod prices;
pub mod problem;
mod queue;
pub mod quota;
pub mod relocate;
pub mod residents;
pub mod rulebook;
mod simplex;
pub mod solve;
#[cfg(test)]
mod tests;
pub mod turn;
mod typed;
mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use berth_protocol::ids::{JobUid, Namespace, NodeId, PodId};
use berth_protocol::image::{ImageName, Images};
use berth_protocol::job::{ContainerSpec, JobSpec, PodTemplate, Volume, VolumeSource};
use berth_protocol::limits::PODS_PER_NODE_MAX;
use berth_protocol::resources::{Inventory, Resources};
use berth_protocol::units::BootMs;

use self::engine::Engine;
use self::hold::Holds;
use self::images::{Catalogue, ImageId};
use self::market::Market;
use self::place::Classes;
use self::problem::{Device, Room, Seat, Shape, Size};
use self::queue::{Line, Queue, Ticket};
use self::quota::{Allowance, Ledger, Sum};
use self::relocate::Reserved;
use self::rulebook::{BookId, Rulebooks};
use super::cluster::{Charge, Job, Liveness, Node};
use super::{Controller, Now};

/// Passes that one event may lead to: room that is no longer held may be another's at once.
const PASSES_MAX: usize = 4;

/// The rooms in their stable order, and who waits for them.
#[derive(Default)]
pub(super) struct Scheduler {
    engine: Engine,
    /// Its rooms, empty; shared with whoever makes prices from them.
    empty: Arc<Vec<Room>>,
    pub market: Market,
    pub nodes: Vec<NodeId>,
    index: BTreeMap<NodeId, usize>,
    pub books: Rulebooks,
    pub classes: Classes,
    pub ledger: Ledger,
    pub holds: Holds,
    pub queue: Queue,
    /// Jobs that joined the queue since the last pass.
    fresh: Vec<JobUid>,
    /// Placed pods by priority.
    running: BTreeMap<i32, usize>,
    /// By room, the version of its node's inventory.
    versions: Vec<u64>,
    /// Counts changes of inventories.
    inventories: u64,
    /// Counts changes of what rooms are when empty.
    layout: u64,
    /// Names of device models, by number.
    models: Vec<String>,
    images: Catalogue,
    /// Counts what may let a pod fit that did not: room freed, a node changed.
    pub version: u64,
    /// Something changed since the last pass.
    pub wanted: bool,
    /// Jobs are to be classed anew before the next.
    reclass: bool,
    /// The version at which particular pods were last looked at, and whether there are new ones.
    particular_at: u64,
    pub particular_wanted: bool,
    /// Rooms whose pods take more than the node says it has now: what one of them gives back is not free.
    overfull: BTreeSet<usize>,
    /// Seats kept free for pods on their way to them.
    pub reserved: BTreeMap<PodId, Reserved>,
    /// When it was last looked whom moves could help.
    moves_looked_at: BootMs,
}

impl Scheduler {
    pub fn new(allowances: BTreeMap<Namespace, Allowance>) -> Self {
        Self { ledger: Ledger::new(allowances), ..Self::default() }
    }

    /// The job has pods that are ready for a node.
    pub fn enqueue(&mut self, now: Now, uid: &JobUid, job: &mut Job) {
        let Some(class) = self.classify(job) else {
            job.refused_at = Some(self.version);
            return;
        };
        let since = *job.waits_since.get_or_insert(now.boot);
        let spec = &job.file.spec;
        let named = |volume: &Volume| matches!(volume.source, VolumeSource::Named(_));
        let secret = spec.pod.containers.iter().any(|container| !container.secrets.is_empty());
        // What waits for something of its own holds nobody up that asks for the same amounts.
        let own = spec.placement.anti_affinity.is_some() || secret || spec.pod.volumes.iter().any(named);
        let gang = spec.gang.then(|| job.ready().count());
        let line = Line { class, gang, own: own.then(|| uid.clone()) };
        let ticket = Ticket {
            priority: spec.priority,
            namespace: spec.namespace.clone(),
            line,
            seq: job.file.seq,
            since,
        };
        if self.queue.ticket(uid) == Some(&ticket) {
            return;
        }
        job.refused_at = None;
        self.queue.insert(uid, ticket);
        self.market.stir();
        self.fresh.push(uid.clone());
        self.wanted = true;
    }

    /// The job has no pods ready for a node.
    pub fn dequeue(&mut self, uid: &JobUid, job: &mut Job) {
        self.queue.remove(uid);
        self.drop_hold(uid);
        job.waits_since = None;
        job.refused_at = None;
    }

    pub fn drop_hold(&mut self, uid: &JobUid) {
        if self.holds.drop(uid) {
            self.version += 1;
            self.wanted = true;
        }
    }

    pub fn next_in_turn(&self, version: u64) -> Option<(JobUid, bool)> {
        self.queue.next(version, |namespace| self.ledger.share(namespace))
    }

    pub fn rooms(&self) -> &[Room] {
        self.engine.rooms()
    }

    /// Takes a seat for a pod of `uid`, at once also of what the room's holder leaves to others: the next of its pods
    /// sees what this one took.
    pub fn charge(&mut self, uid: &JobUid, shape: &Shape, seat: &Seat) {
        self.engine.charge(shape, seat);
        self.holds.spare_for(uid, seat.room, |spare| spare.charge(shape, &seat.devices));
    }

    pub fn uncharge(&mut self, uid: &JobUid, shape: &Shape, seat: &Seat) {
        self.engine.release(shape, seat);
        self.holds.spare_for(uid, seat.room, |spare| spare.release(shape, &seat.devices));
    }

    /// Counts a placed pod in.
    pub fn count_in(&mut self, spec: &JobSpec, charge: &Charge) {
        self.ledger.take(&spec.namespace, Sum::of_charge(charge));
        *self.running.entry(spec.priority).or_default() += 1;
    }

    pub fn count_out(&mut self, spec: &JobSpec, charge: &Charge) {
        self.ledger.give_back(&spec.namespace, Sum::of_charge(charge));
        if let Some(pods) = self.running.get_mut(&spec.priority) {
            *pods = pods.saturating_sub(1);
        }
        self.running.retain(|_, pods| *pods > 0);
    }

    /// The lowest priority of a placed pod.
    pub fn lowest_running(&self) -> Option<i32> {
        self.running.keys().next().copied()
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
        self.reclass |= self.books.learn(has);
        let heard = node.liveness == Liveness::Online && node.session.is_some();
        // What strays take of the node is known to nobody but it, so nothing else comes until they are gone.
        let open = heard && !node.record.cordoned && node.record.strays.is_empty();
        let devices = has.gpus.iter().map(|gpu| Device {
            usable: gpu.unhealthy.is_none() && !gpu.mig,
            model: self.model(&gpu.model),
            milli: gpu.milli(),
            memory_bytes: gpu.memory.0.saturating_sub(gpu.outside.0),
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
        let empty = room.clone();
        let mut whole = true;
        for charge in charges {
            whole &= take(&mut room, has, charge);
        }
        let index = self.index.get(id).copied().unwrap_or(self.nodes.len());
        self.reserved_in(index).for_each(|charge| whole &= take(&mut room, has, charge));
        if whole {
            self.overfull.remove(&index)
        } else {
            self.overfull.insert(index)
        };
        let size = |room: &Room| if room.open { Sum::of_room(room) } else { Sum::default() };
        match self.index.get(id).copied() {
            Some(index) => {
                self.ledger.resize(size(&self.empty[index]), size(&empty));
                if self.empty[index] != empty {
                    Arc::make_mut(&mut self.empty)[index] = empty;
                    self.market.room_changed();
                }
                self.holds.resized(index, &self.engine.rooms()[index], &room);
                self.engine.refresh(index, room);
                if std::mem::replace(&mut self.versions[index], node.version) != node.version {
                    self.inventories += 1;
                }
            }
            None => {
                self.index.insert(id.clone(), self.nodes.len());
                self.engine.refresh(self.nodes.len(), room);
                self.nodes.push(id.clone());
                self.ledger.resize(Sum::default(), size(&empty));
                Arc::make_mut(&mut self.empty).push(empty);
                self.market.room_changed();
                self.versions.push(node.version);
                self.inventories += 1;
            }
        }
        self.layout += 1;
        self.version += 1;
        self.wanted = true;
    }

    /// Makes the node's images what it says that it holds. Nobody waits for an image, so nothing is looked at again.
    pub fn restock(&mut self, id: &NodeId, images: &Images) {
        let Some(room) = self.room(id) else { return };
        // Taken before others are given back: what stays keeps its number.
        let now: Vec<ImageId> = images.iter().map(|name| self.images.take(name)).collect();
        self.engine.stock(room).iter().for_each(|image| self.images.give_back(*image));
        self.engine.restock(room, now);
    }

    /// Those of the pod's images that some node holds.
    pub fn images_of(&self, pod: &PodTemplate) -> Vec<ImageId> {
        if self.images.is_empty() {
            return Vec::new();
        }
        let mut images: Vec<ImageId> = names(pod).filter_map(|name| self.images.id(&name)).collect();
        images.sort_unstable();
        images.dedup();
        images
    }

    /// Whether the node holds all of the pod's images. None: it needs none.
    pub fn has_images(&self, pod: &PodTemplate, node: &NodeId) -> Option<bool> {
        let stock = self.engine.stock(self.room(node)?);
        let has = |name: ImageName| self.images.id(&name).is_some_and(|image| stock.contains(&image));
        names(pod).map(has).reduce(|all, one| all && one)
    }

    /// A pod has left the node. `false`: its room is to be made anew, since its pods take more than there is.
    #[must_use]
    pub fn release(&mut self, id: &NodeId, has: &Inventory, pod: &PodId, charge: &Charge) -> bool {
        let Some(index) = self.index.get(id).copied() else { return true };
        self.engine.change(index, |room| give(room, has, charge));
        self.holds.left(index, pod, |spare| give(spare, has, charge));
        self.version += 1;
        self.wanted = true;
        !self.overfull.contains(&index)
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
            disk_bytes: wants.disk.0,
            gpus: gpu.map_or(0, |gpu| gpu.count as usize),
            gpu_milli: gpu.map_or(0, |gpu| gpu.milli),
            gpu_memory_bytes: gpu.and_then(|gpu| gpu.memory).map_or(0, |memory| memory.0),
            models: gpu.filter(|gpu| !gpu.model.is_empty()).map(|gpu| matching(&gpu.model)),
        }
    }
}

fn names(pod: &PodTemplate) -> impl Iterator<Item = ImageName> + '_ {
    pod.containers.iter().filter_map(ContainerSpec::image_name)
}

/// Takes a pod in that is there already, whether or not the node still has what it takes; tells whether it has.
fn take(room: &mut Room, has: &Inventory, charge: &Charge) -> bool {
    let mut whole = room.slots > 0;
    let mut less = |left: &mut u64, amount: u64| {
        whole &= *left >= amount;
        *left = left.saturating_sub(amount);
    };
    less(&mut room.cpu_milli, charge.cpu.0);
    less(&mut room.memory_bytes, charge.memory.0);
    less(&mut room.disk_bytes, charge.disk.0);
    for share in &charge.gpus {
        let Some(i) = has.gpus.iter().position(|gpu| gpu.uuid == share.uuid) else { continue };
        let device = &mut room.devices[i];
        let mut milli = u64::from(device.milli);
        less(&mut milli, share.milli.into());
        device.milli = milli as u32;
        less(&mut device.memory_bytes, charge.gpu_memory.0);
    }
    room.slots = room.slots.saturating_sub(1);
    whole
}

/// Gives back what `take` took; no more than there is.
fn give(room: &mut Room, has: &Inventory, charge: &Charge) {
    room.slots += 1;
    room.cpu_milli = (room.cpu_milli + charge.cpu.0).min(has.cpu.0);
    room.memory_bytes = (room.memory_bytes + charge.memory.0).min(has.memory.0);
    room.disk_bytes = (room.disk_bytes + charge.disk.0).min(has.disk.0);
    for share in &charge.gpus {
        let Some(i) = has.gpus.iter().position(|gpu| gpu.uuid == share.uuid) else { continue };
        let (device, gpu) = (&mut room.devices[i], &has.gpus[i]);
        device.milli = (device.milli + share.milli).min(gpu.milli());
        device.memory_bytes =
            (device.memory_bytes + charge.gpu_memory.0).min(gpu.memory.0.saturating_sub(gpu.outside.0));
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
    /// Places what can be placed.
    pub(super) fn schedule(&mut self, now: Now) {
        for _ in 0..PASSES_MAX {
            if !std::mem::take(&mut self.scheduler.wanted) {
                return;
            }
            if std::mem::take(&mut self.scheduler.reclass) {
                self.class_anew(now);
            }
            self.pass(now);
        }
    }

    /// Nodes ask for more than jobs were told apart by.
    fn class_anew(&mut self, now: Now) {
        for (uid, job) in &mut self.cluster.jobs {
            if job.class.is_some() {
                self.scheduler.forget(job);
                match self.scheduler.queue.ticket(uid).is_some() {
                    true => self.scheduler.enqueue(now, uid, job),
                    false => drop(self.scheduler.classify(job)),
                }
            }
        }
    }

    /// Brings a rulebook up to date with every node.
    pub(super) fn survey_book(&mut self, id: BookId) {
        let Scheduler { books, nodes, inventories, .. } = &mut self.scheduler;
        let Some(book) = books.get_mut(id).filter(|book| !book.is_current(*inventories, nodes.len())) else {
            return;
        };
        for (room, id) in nodes.iter().enumerate() {
            if let Some(node) = self.cluster.nodes.get(id) {
                book.ask(room, node.version, id, &node.record.inventory);
            }
        }
        book.all_asked(*inventories);
    }

    /// Brings the job's rulebook up to date with every node.
    pub(super) fn survey(&mut self, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let class = self.scheduler.classify(job).and_then(|id| self.scheduler.classes.get(id));
        if let Some(book) = class.map(place::Class::book) {
            self.survey_book(book);
        }
    }
}
