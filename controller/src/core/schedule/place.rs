//! The seats of one job's pods: its class, where its pods may go, and taking the place there.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, NodeId};
use berth_protocol::job::VolumeSource;
use berth_protocol::resources::{GpuShare, Inventory, Resources};
use berth_protocol::units::{Bytes, MilliCpu};

use super::super::cluster::{Charge, Job, Node};
use super::super::{Controller, Now};
use super::Scheduler;
use super::images::ImageId;
use super::problem::{Seat, Shape, Zoning};
use super::quota::Sum;
use super::rulebook::BookId;

/// A class's place among them.
pub type ClassId = usize;

/// Jobs whose pods want the same amounts of the same nodes.
pub struct Class {
    key: (Resources, BookId),
    pub shape: Shape,
    /// Models known when the shape was made.
    models: usize,
    jobs: usize,
    /// Seats that the rooms would have for it if they were empty, and at which layout.
    pub seats: Option<(u64, usize)>,
    /// Why one more pod of it has no node, and at which version of the rooms that was so.
    pub why: Option<(u64, String)>,
}

impl Class {
    pub fn wants(&self) -> &Resources {
        &self.key.0
    }

    pub fn book(&self) -> BookId {
        self.key.1
    }
}

/// What a choice of seats for a job's pods goes by, beside their shape.
pub(super) struct Terms {
    pub images: Vec<ImageId>,
    pub book: BookId,
    /// The job's pods by zone.
    pub zoned: BTreeMap<usize, usize>,
    /// Rooms that hold its named volumes.
    pub homes: BTreeSet<usize>,
    /// Rooms that are passed over.
    pub but: BTreeSet<usize>,
}

#[derive(Default)]
pub struct Classes {
    ids: BTreeMap<(Resources, BookId), ClassId>,
    list: Vec<Option<Class>>,
}

impl Classes {
    fn open(&mut self, key: (Resources, BookId), shape: impl FnOnce() -> Shape) -> ClassId {
        if let Some(id) = self.ids.get(&key) {
            if let Some(class) = &mut self.list[*id] {
                class.jobs += 1;
            }
            return *id;
        }
        let class = Class { key: key.clone(), shape: shape(), models: 0, jobs: 1, seats: None, why: None };
        let free = self.list.iter().position(Option::is_none).unwrap_or(self.list.len());
        if free == self.list.len() {
            self.list.push(None);
        }
        self.list[free] = Some(class);
        self.ids.insert(key, free);
        free
    }

    /// The rulebook of a job's class, which the job leaves.
    fn close(&mut self, id: ClassId) -> Option<BookId> {
        let class = self.list.get_mut(id)?.as_mut()?;
        let book = class.key.1;
        class.jobs -= 1;
        if class.jobs == 0 {
            self.ids.remove(&class.key);
            self.list[id] = None;
        }
        Some(book)
    }

    pub fn get(&self, id: ClassId) -> Option<&Class> {
        self.list.get(id)?.as_ref()
    }

    pub fn get_mut(&mut self, id: ClassId) -> Option<&mut Class> {
        self.list.get_mut(id)?.as_mut()
    }
}

/// What became of an offer of seats.
pub enum Offer {
    Placed,
    /// No room, for one pod more or for the whole gang.
    Refused,
    /// The namespace may not have more, or lacks a secret that it names.
    Barred,
}

impl Scheduler {
    /// The job's class, from its first look for a node until it has ended. None: its conditions are of a version that
    /// knew more.
    pub fn classify(&mut self, job: &mut Job) -> Option<ClassId> {
        if job.class.is_none() {
            let book = self.books.open(&job.file.spec).ok()?;
            let wants = job.file.spec.pod.resources();
            let shape = self.shape(&wants);
            job.class = Some(self.classes.open((wants, book), || shape));
        }
        job.class
    }

    /// The job has no more pods to place.
    pub fn forget(&mut self, job: &mut Job) {
        let book = job.class.take().and_then(|class| self.classes.close(class));
        if let Some(book) = book {
            self.books.close(book);
        }
    }

    /// The class's shape, with the models that are known now.
    pub fn shape_of(&mut self, id: ClassId) -> Option<Shape> {
        let class = self.classes.get(id)?;
        if class.models != self.models.len() {
            let shape = self.shape(&class.key.0.clone());
            let models = self.models.len();
            let class = self.classes.get_mut(id)?;
            (class.shape, class.models) = (shape, models);
        }
        Some(self.classes.get(id)?.shape.clone())
    }

    /// The job's pods by zone; empty where zones do not matter.
    pub fn zoned(&self, job: &Job) -> BTreeMap<usize, usize> {
        let book =
            job.class.and_then(|id| self.classes.get(id)).and_then(|class| self.books.get(class.book()));
        let mut zoned = BTreeMap::new();
        let Some(book) = book.filter(|book| book.zoning != Zoning::Free) else { return zoned };
        for index in job.placed() {
            let room = job.assignment(*index).and_then(|assignment| self.room(&assignment.node));
            if let Some(site) = room.and_then(|room| book.sites().get(room)) {
                *zoned.entry(site.zone).or_default() += 1;
            }
        }
        zoned
    }

    /// The best seat for one more pod; charges nothing.
    pub(super) fn pick(&mut self, uid: &JobUid, shape: &Shape, terms: &Terms) -> Option<Seat> {
        let Self { engine, books, holds, .. } = self;
        let Terms { images, book, zoned, homes, but } = terms;
        let book = books.get(*book)?;
        let crowd = |room: usize| zoned.get(&book.sites()[room].zone).copied().unwrap_or(0);
        let open = |room: usize| {
            let apart = book.zoning != Zoning::Apart || crowd(room) == 0;
            book.sites()[room].eligible && apart && !but.contains(&room)
        };
        // Room that is held for it, then where its volumes are.
        for room in holds.rooms_of(uid).chain(homes.iter().copied()).filter(|room| open(*room)) {
            let free = &engine.rooms()[room];
            let own = holds.holder(room).is_none_or(|(holder, _)| holder == uid);
            let devices = if own { free.fit(shape) } else { holds.reduced(room, free).fit(shape) };
            if let Some(devices) = devices {
                return Some(Seat { room, devices });
            }
        }
        let plain = book.zoning == Zoning::Free && !book.has_preferences();
        if plain && book.is_everywhere() && !holds.is_any() && but.is_empty() {
            return engine.place(shape, images, None);
        }
        // The engine may choose devices of a held room that are not spare: then another room does.
        let mut passed = BTreeSet::new();
        loop {
            let rooms = engine.rooms();
            let spare: BTreeSet<usize> = holds
                .others(uid)
                .filter(|room| holds.reduced(*room, &rooms[*room]).fit(shape).is_none())
                .collect();
            let allowed = |room: usize| open(room) && !spare.contains(&room) && !passed.contains(&room);
            let seat = if plain {
                engine.place(shape, images, Some(&allowed))?
            } else {
                let rank = |room: usize| {
                    let crowd = if book.zoning == Zoning::Spread { crowd(room) } else { 0 };
                    allowed(room).then(|| (-book.sites()[room].bonus, crowd))
                };
                engine.place_by(shape, images, rank)?
            };
            if holds.allow(uid, seat.room, shape, &seat.devices) {
                return Some(seat);
            }
            let reduced = holds.reduced(seat.room, &engine.rooms()[seat.room]);
            if let Some(devices) = reduced.fit(shape) {
                return Some(Seat { room: seat.room, devices });
            }
            passed.insert(seat.room);
        }
    }
}

/// What a pod takes at a seat of the node that has that.
pub(super) fn charge_of(shape: &Shape, seat: &Seat, has: &Inventory) -> Charge {
    let share = |i: &usize| GpuShare { uuid: has.gpus[*i].uuid.clone(), milli: shape.gpu_milli };
    Charge {
        cpu: MilliCpu(shape.cpu_milli),
        memory: Bytes(shape.memory_bytes),
        disk: Bytes(shape.disk_bytes),
        gpus: seat.devices.iter().map(share).collect(),
        gpu_memory: Bytes(shape.gpu_memory_bytes),
    }
}

impl Controller {
    /// Places up to `most` of the job's ready pods, a gang all or none.
    pub(super) fn offer(&mut self, now: Now, uid: &JobUid, most: usize) -> Offer {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return Offer::Refused };
        let Some(class) = self.scheduler.classify(job) else { return Offer::Refused };
        let Some(shape) = self.scheduler.shape_of(class) else { return Offer::Refused };
        let Some((wants, book)) = self.scheduler.classes.get(class).map(|c| c.key.clone()) else {
            return Offer::Refused;
        };
        self.survey_book(book);
        let Some(job) = self.cluster.jobs.get(uid) else { return Offer::Refused };
        let spec = &job.file.spec;
        let gang = spec.gang;
        let ready = job.ready().count();
        if ready == 0 {
            self.unqueue(uid);
            return Offer::Placed;
        }
        let pods = if gang { ready } else { ready.min(most) };
        let over = |n: usize| self.scheduler.ledger.over_quota(&spec.namespace, Sum::of_pods(&wants, n));
        if over(if gang { pods } else { 1 }).is_some() || self.missing_secret(spec).is_some() {
            return Offer::Barred;
        }
        let mut terms = Terms {
            images: self.scheduler.images_of(&spec.pod),
            book,
            zoned: self.scheduler.zoned(job),
            homes: self.homes(job),
            but: BTreeSet::new(),
        };
        let mut seats: Vec<Seat> = Vec::new();
        while seats.len() < pods {
            if !gang && !seats.is_empty() && self.over_quota(uid, &wants, seats.len() + 1) {
                break;
            }
            let seat = self.scheduler.pick(uid, &shape, &terms);
            let Some(seat) = seat else { break };
            self.scheduler.charge(uid, &shape, &seat);
            let zone = self.scheduler.books.get(book).map_or(0, |book| book.sites()[seat.room].zone);
            *terms.zoned.entry(zone).or_default() += 1;
            seats.push(seat);
        }
        if gang && seats.len() < pods {
            for seat in seats.drain(..) {
                self.scheduler.uncharge(uid, &shape, &seat);
            }
        }
        if self.seat(now, uid, &shape, seats) == 0 { Offer::Refused } else { Offer::Placed }
    }

    fn unqueue(&mut self, uid: &JobUid) {
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            self.scheduler.dequeue(uid, job);
        }
    }

    fn over_quota(&self, uid: &JobUid, wants: &Resources, pods: usize) -> bool {
        let Some(job) = self.cluster.jobs.get(uid) else { return false };
        let more = Sum::of_pods(wants, pods);
        self.scheduler.ledger.over_quota(&job.file.spec.namespace, more).is_some()
    }

    /// Rooms that hold the job's named volumes: where its pods were.
    pub(super) fn homes(&self, job: &Job) -> BTreeSet<usize> {
        let named = |source: &VolumeSource| matches!(source, VolumeSource::Named(_));
        if !job.file.spec.pod.volumes.iter().any(|volume| named(&volume.source)) {
            return BTreeSet::new();
        }
        let nodes = job.pods().values().flat_map(|pod| pod.logs.iter().filter_map(|log| log.node.as_ref()));
        nodes.filter_map(|node| self.scheduler.room(node)).collect()
    }

    /// Takes a seat that is charged; false: a pod whose older epoch is still being stopped there waits.
    pub(super) fn seat_one(
        &mut self,
        now: Now,
        uid: &JobUid,
        index: u32,
        shape: &Shape,
        seat: &Seat,
    ) -> bool {
        let id: NodeId = self.scheduler.nodes[seat.room].clone();
        let free = |node: &&Node| !node.record.strays.contains_key(&uid.pod(index));
        let Some(node) = self.cluster.nodes.get(&id).filter(free) else { return false };
        let charge = charge_of(shape, seat, &node.record.inventory);
        self.scheduler.holds.seated(uid, seat.room);
        self.scheduler.market.placed(shape);
        self.place(now, uid, index, id, charge);
        true
    }

    /// Takes the seats, which are charged; how many pods got one.
    fn seat(&mut self, now: Now, uid: &JobUid, shape: &Shape, seats: Vec<Seat>) -> usize {
        let Some(job) = self.cluster.jobs.get(uid) else { return 0 };
        let ready: Vec<u32> = job.ready().take(seats.len()).collect();
        let mut placed = 0;
        for (index, seat) in ready.into_iter().zip(seats) {
            let id: NodeId = self.scheduler.nodes[seat.room].clone();
            if !self.is_general(uid, index, &id, &seat) {
                self.scheduler.uncharge(uid, shape, &seat);
                continue;
            }
            if !self.seat_one(now, uid, index, shape, &seat) {
                self.scheduler.uncharge(uid, shape, &seat);
                continue;
            }
            placed += 1;
        }
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return placed };
        if placed > 0 {
            job.waits_since = Some(now.boot);
            self.scheduler.queue.served(uid, now.boot);
        }
        if job.ready().next().is_none() {
            self.scheduler.dequeue(uid, job);
        }
        placed
    }
}
