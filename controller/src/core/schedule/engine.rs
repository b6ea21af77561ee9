//! The cluster as the scheduler sees it, kept up to date by what changes: rooms, what each class of pods would score in
//! them, and the best seat for a pod. An event costs what it changed; nothing is computed twice for a room as it is.

use std::collections::BTreeMap;

use super::images::{Holders, ImageId};
use super::index::{BLOCK, Row};
use super::policy::{Cell, Class, Policy, Sigmoid, Verdict, fragments, value};
use super::prices::{Demand, Prices};
use super::problem::{Room, Seat, Shape};

/// Classes whose scores are kept: with a byte a room, 1 KiB a node.
const CLASSES_MAX: usize = 1024;

/// Rooms, prices and scores.
pub struct Engine {
    policy: Policy,
    sigmoid: Sigmoid,
    prices: Prices,
    rooms: Vec<Room>,
    /// By room: where its scores are.
    slots: Vec<u32>,
    /// By slot.
    cells: Vec<Cell>,
    /// By slot: free thousandths of each of its devices.
    remainders: Vec<u16>,
    /// Devices of the room that has most.
    stride: usize,
    segments: Vec<Segment>,
    /// By block: its segment.
    segment_of: Vec<usize>,
    /// By room: the images that it holds.
    stocks: Vec<Vec<ImageId>>,
    holders: Holders,
    /// Some room has devices of several models.
    mixed: bool,
    classes: Vec<(Class, Row)>,
    known: BTreeMap<Shape, usize>,
    /// Slots in the order in which they changed.
    changes: Vec<u32>,
    /// Changes forgotten before these.
    forgotten: u64,
    /// Counts questions.
    asked: u64,
    random: u64,
}

/// The rooms of one kind of devices: no pod that wants another model need look at them.
struct Segment {
    models: Vec<usize>,
    blocks: Vec<u32>,
    /// Slots taken of the last block.
    filled: usize,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new(Policy::default(), 0)
    }
}

impl Engine {
    /// `seed` is for the random policy alone.
    pub fn new(policy: Policy, seed: u64) -> Self {
        Self {
            policy,
            sigmoid: Sigmoid::default(),
            prices: Prices::new(&Demand::new(), &[]),
            rooms: Vec::new(),
            slots: Vec::new(),
            cells: Vec::new(),
            remainders: Vec::new(),
            stride: 0,
            segments: Vec::new(),
            segment_of: Vec::new(),
            stocks: Vec::new(),
            holders: Holders::default(),
            mixed: false,
            classes: Vec::new(),
            known: BTreeMap::new(),
            changes: Vec::new(),
            forgotten: 0,
            asked: 0,
            random: seed,
        }
    }

    pub fn rooms(&self) -> &[Room] {
        &self.rooms
    }

    /// Fragments of a room, in the prices' fine unit.
    pub fn fragments(&self, room: usize) -> i64 {
        self.cells[self.slots[room] as usize].fragments
    }

    /// Makes a room what it is now; `index` is a known one's or the next.
    pub fn refresh(&mut self, index: usize, room: Room) {
        let models = models(&room);
        let stays = self.slots.get(index).is_some_and(|slot| {
            self.segment(*slot as usize / BLOCK).models == models && room.devices.len() <= self.stride
        });
        if stays {
            self.rooms[index] = room;
            return self.update(index);
        }
        let fresh = index == self.rooms.len();
        if fresh {
            self.rooms.push(room);
            self.stocks.push(Vec::new());
        } else {
            self.rooms[index] = room;
        }
        let wide = self.rooms[index].devices.len() > self.stride;
        self.mixed |= models.len() > 1;
        if fresh && !wide {
            self.seat_room(index, models);
            self.update(index);
        } else {
            self.lay_out();
        }
    }

    /// Changes what a room has free; its devices stay the same ones.
    pub fn change(&mut self, index: usize, change: impl FnOnce(&mut Room)) {
        change(&mut self.rooms[index]);
        self.update(index);
    }

    /// Images that a room holds.
    pub fn stock(&self, room: usize) -> &[ImageId] {
        &self.stocks[room]
    }

    /// Makes a room's images what they are now. No score depends on them.
    pub fn restock(&mut self, room: usize, images: Vec<ImageId>) {
        let slot = self.slots[room] as usize;
        for image in std::mem::replace(&mut self.stocks[room], images) {
            self.holders.unset(image, slot);
        }
        self.shelve(room);
    }

    fn shelve(&mut self, room: usize) {
        for image in &self.stocks[room] {
            self.holders.set(*image, self.slots[room] as usize);
        }
    }

    /// Gives every room its slot anew, in the order of the rooms.
    fn lay_out(&mut self) {
        self.stride = self.rooms.iter().map(|room| room.devices.len()).max().unwrap_or(0);
        self.mixed = self.rooms.iter().any(|room| models(room).len() > 1);
        self.segments.clear();
        self.segment_of.clear();
        self.holders.clear();
        self.slots.clear();
        self.cells.clear();
        self.remainders.clear();
        self.classes.clear();
        self.known.clear();
        self.forgotten += self.changes.len() as u64;
        self.changes.clear();
        for index in 0..self.rooms.len() {
            self.seat_room(index, models(&self.rooms[index]));
            self.update(index);
            self.shelve(index);
        }
    }

    fn seat_room(&mut self, index: usize, models: Vec<usize>) {
        let number = self.segments.iter().position(|segment| segment.models == models).unwrap_or_else(|| {
            self.segments.push(Segment { models, blocks: Vec::new(), filled: BLOCK });
            self.segments.len() - 1
        });
        let segment = &mut self.segments[number];
        if segment.filled == BLOCK {
            segment.filled = 0;
            self.segment_of.push(number);
            segment.blocks.push((self.cells.len() / BLOCK) as u32);
            self.cells.resize(self.cells.len() + BLOCK, Cell::default());
            self.remainders.resize(self.cells.len() * self.stride, 0);
        }
        let block = segment.blocks[segment.blocks.len() - 1];
        self.slots.push(block * BLOCK as u32 + segment.filled as u32);
        segment.filled += 1;
        debug_assert_eq!(self.slots.len(), index + 1);
    }

    /// The room changed: its cell follows, and scores of it are no longer good.
    fn update(&mut self, index: usize) {
        let (slot, room) = (self.slots[index] as usize, &self.rooms[index]);
        let remainders = &mut self.remainders[slot * self.stride..(slot + 1) * self.stride];
        remainders.fill(0);
        for (device, remainder) in room.devices.iter().zip(remainders.iter_mut()).filter(|(d, _)| d.usable) {
            *remainder = device.milli.min(1000) as u16;
        }
        let cores = (room.size.cpu_milli / 1000).max(1);
        let mut cell = Cell {
            cpu_milli: room.cpu_milli,
            memory_bytes: room.memory_bytes,
            disk_bytes: room.disk_bytes,
            fragments: 0,
            value: 0,
            stamp: self.forgotten + self.changes.len() as u64,
            room: index as u32,
            slots: if room.open { room.slots.min(usize::from(u16::MAX)) as u16 } else { 0 },
            devices_milli: remainders.iter().map(|r| u32::from(*r)).sum(),
            whole: remainders.iter().filter(|r| **r == 1000).count() as u8,
            model: room.devices.first().map_or(u16::MAX, |device| device.model.min(65_535) as u16),
            devices_per_core: (room.devices.len() as u64 * 1_000_000 / (cores * 1000)) as u32,
        };
        cell.fragments = fragments(&self.prices, &cell, remainders);
        cell.value = value(&self.prices, &cell, remainders);
        self.cells[slot] = cell;
        if self.changes.len() >= 2 * self.cells.len() + 4096 {
            let half = self.changes.len() / 2;
            self.changes.drain(..half);
            self.forgotten += half as u64;
        }
        self.changes.push(slot as u32);
    }

    /// New prices, made elsewhere; every score is judged anew as it is asked for. False: they are those in use.
    pub fn adopt(&mut self, prices: Prices) -> bool {
        if self.prices == prices {
            return false;
        }
        self.prices = prices;
        for (class, row) in &mut self.classes {
            class.worth = self.prices.worth(&class.shape);
            row.stale = true;
        }
        for slot in 0..self.cells.len() {
            let remainders = &self.remainders[slot * self.stride..(slot + 1) * self.stride];
            self.cells[slot].fragments = fragments(&self.prices, &self.cells[slot], remainders);
            self.cells[slot].value = value(&self.prices, &self.cells[slot], remainders);
        }
        true
    }

    /// A pod takes a seat that fits.
    pub fn charge(&mut self, shape: &Shape, seat: &Seat) {
        self.rooms[seat.room].charge(shape, &seat.devices);
        self.update(seat.room);
    }

    /// A pod leaves its seat.
    pub fn release(&mut self, shape: &Shape, seat: &Seat) {
        self.rooms[seat.room].release(shape, &seat.devices);
        self.update(seat.room);
    }

    /// The best seat of those rooms that `allowed` lets through: of equals one in a room that holds all of `images`, the
    /// first then.
    pub fn place(
        &mut self,
        shape: &Shape,
        images: &[ImageId],
        allowed: Option<&dyn Fn(usize) -> bool>,
    ) -> Option<Seat> {
        let class = self.class(shape);
        let row = &self.classes[class].1;
        let mut best: Option<(u8, u32, usize)> = None;
        for segment in self.segments.iter().filter(|segment| segment.holds(shape)) {
            let found = match allowed {
                None => row.best(&segment.blocks),
                Some(allowed) => row.best_of(&segment.blocks, |slot| allowed(self.cells[slot].room as usize)),
            };
            let Some((score, slot)) = found else { continue };
            let room = self.cells[slot].room;
            if best.is_none_or(|(top, first, _)| score > top || score == top && room < first) {
                best = Some((score, room, slot));
            }
        }
        let (score, _, mut slot) = best?;
        let equal = |room: usize| allowed.is_none_or(|allowed| allowed(room));
        slot = self.at_hand(row, shape, images, score, equal).unwrap_or(slot);
        if self.policy == Policy::Random {
            slot = self.any(class, shape, allowed)?;
        }
        Some(self.seat(class, shape, slot))
    }

    /// A seat in that very room.
    pub fn place_in(&mut self, shape: &Shape, room: usize) -> Option<Seat> {
        self.rooms[room].fit(shape)?;
        let class = self.known(shape);
        Some(self.seat(class, shape, self.slots[room] as usize))
    }

    /// The best seat by `rank` first, the lowest, by score then, and of equals as `place` has it; without a rank a room
    /// is out of the question.
    pub fn place_by<R: Ord>(
        &mut self,
        shape: &Shape,
        images: &[ImageId],
        rank: impl Fn(usize) -> Option<R>,
    ) -> Option<Seat> {
        let class = self.class(shape);
        let row = &self.classes[class].1;
        let rooms = self.segments.iter().filter(|segment| segment.holds(shape));
        let slots = rooms.flat_map(|segment| &segment.blocks).flat_map(|block| {
            let first = *block as usize * BLOCK;
            (first..first + BLOCK).filter(|slot| row.score(*slot) > 0)
        });
        let ranked = slots.filter_map(|slot| {
            let room = self.cells[slot].room;
            Some(((rank(room as usize)?, u8::MAX - row.score(slot), room), slot))
        });
        let ((best, short, _), slot) = ranked.min_by(|a, b| a.0.cmp(&b.0))?;
        let equal = |room: usize| rank(room).is_some_and(|rank| rank == best);
        let slot = self.at_hand(row, shape, images, u8::MAX - short, equal).unwrap_or(slot);
        Some(self.seat(class, shape, slot))
    }

    /// Of the rooms of that very score that `equal` lets through, and that hold all of `images`, the first one's slot.
    fn at_hand(
        &self,
        row: &Row,
        shape: &Shape,
        images: &[ImageId],
        score: u8,
        equal: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let mut first: Option<(u32, usize)> = None;
        for (block, mut bits) in self.holders.of(images) {
            if row.highest(block) < score || !self.segment(block).holds(shape) {
                continue;
            }
            while bits != 0 {
                let slot = block * BLOCK + bits.trailing_zeros() as usize;
                let room = self.cells[slot].room;
                if row.score(slot) == score && equal(room as usize) {
                    // Rooms of a block are in order.
                    if first.is_none_or(|(other, _)| room < other) {
                        first = Some((room, slot));
                    }
                    break;
                }
                bits &= bits - 1;
            }
        }
        first.map(|(_, slot)| slot)
    }

    fn segment(&self, block: usize) -> &Segment {
        &self.segments[self.segment_of[block]]
    }

    fn any(&mut self, class: usize, shape: &Shape, allowed: Option<&dyn Fn(usize) -> bool>) -> Option<usize> {
        let row = &self.classes[class].1;
        let mut slots: Vec<(u32, usize)> = self
            .segments
            .iter()
            .filter(|segment| segment.holds(shape))
            .flat_map(|segment| &segment.blocks)
            .flat_map(|block| (0..BLOCK).map(move |i| *block as usize * BLOCK + i))
            .filter(|slot| row.score(*slot) > 0)
            .map(|slot| (self.cells[slot].room, slot))
            .filter(|(room, _)| allowed.is_none_or(|allowed| allowed(*room as usize)))
            .collect();
        slots.sort_unstable();
        // splitmix64
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let pick = (z ^ (z >> 31)) % (slots.len() as u64).max(1);
        slots.get(pick as usize).map(|(_, slot)| *slot)
    }

    /// The devices that the pod gets in that slot.
    fn seat(&self, class: usize, shape: &Shape, slot: usize) -> Seat {
        let room = self.cells[slot].room as usize;
        let fitting = self.fitting(shape, slot);
        let devices = if shape.gpus == 1 && shape.gpu_milli < 1000 {
            vec![self.judge(&self.classes[class].0, slot, fitting).device]
        } else {
            (0..64).filter(|i| fitting >> i & 1 == 1).take(shape.gpus).collect()
        };
        Seat { room, devices }
    }

    fn judge(&self, class: &Class, slot: usize, fitting: u64) -> Verdict {
        let remainders = &self.remainders[slot * self.stride..(slot + 1) * self.stride];
        self.policy.judge(&self.prices, &self.sigmoid, class, &self.cells[slot], remainders, fitting)
    }

    /// The devices of that slot which would do, as bits.
    #[inline]
    fn fitting(&self, shape: &Shape, slot: usize) -> u64 {
        let mut bits = 0;
        if shape.gpus == 0 {
            return 0;
        }
        if self.mixed || shape.gpu_memory_bytes > 0 {
            let room = &self.rooms[self.cells[slot].room as usize];
            for (i, _) in room.devices.iter().enumerate().filter(|(_, device)| device.fits(shape)) {
                bits |= 1 << i;
            }
        } else {
            let remainders = &self.remainders[slot * self.stride..(slot + 1) * self.stride];
            for (i, remainder) in remainders.iter().enumerate() {
                bits |= u64::from(u32::from(*remainder) >= shape.gpu_milli) << i;
            }
        }
        bits
    }

    fn rate(&self, class: &Class, slot: usize) -> u8 {
        let (cell, shape) = (&self.cells[slot], &class.shape);
        let enough = cell.slots > 0
            && cell.cpu_milli >= shape.cpu_milli
            && cell.memory_bytes >= shape.memory_bytes
            && cell.disk_bytes >= shape.disk_bytes;
        if !enough {
            return 0;
        }
        let fitting = self.fitting(shape, slot);
        if (fitting.count_ones() as usize) < shape.gpus {
            return 0;
        }
        self.judge(class, slot, fitting).score
    }

    /// The class of a shape, its scores up to date.
    fn class(&mut self, shape: &Shape) -> usize {
        let index = self.known(shape);
        self.asked += 1;
        let (class, mut row) = (self.classes[index].0.clone(), std::mem::take(&mut self.classes[index].1));
        row.used = self.asked;
        row.grow(self.cells.len() / BLOCK);
        let now = self.forgotten + self.changes.len() as u64;
        if row.stale || row.seen < self.forgotten {
            for slot in 0..self.cells.len() {
                row.set(slot, self.rate(&class, slot));
            }
        } else {
            for at in row.seen..now {
                let slot = self.changes[(at - self.forgotten) as usize] as usize;
                if self.cells[slot].stamp == at {
                    row.set(slot, self.rate(&class, slot));
                }
            }
        }
        row.seen = now;
        row.stale = false;
        self.classes[index].1 = row;
        index
    }

    fn known(&mut self, shape: &Shape) -> usize {
        // Models are a matter of segments, unless some room mixes them.
        let known = if self.mixed || shape.models.is_none() {
            self.known.get(shape).copied()
        } else {
            self.known.get(&Shape { models: None, ..shape.clone() }).copied()
        };
        known.unwrap_or_else(|| self.learn(shape))
    }

    fn learn(&mut self, shape: &Shape) -> usize {
        let models = shape.models.clone().filter(|_| self.mixed);
        let shape = Shape { models, ..shape.clone() };
        let class = Class { worth: self.prices.worth(&shape), shape: shape.clone() };
        let row = Row::stale();
        let index = if self.classes.len() < CLASSES_MAX {
            self.classes.push((class, row));
            self.classes.len() - 1
        } else {
            // The one not asked for longest makes place.
            let oldest = (0..self.classes.len()).min_by_key(|i| self.classes[*i].1.used).unwrap_or(0);
            self.known.remove(&self.classes[oldest].0.shape);
            self.classes[oldest] = (class, row);
            oldest
        };
        self.known.insert(shape, index);
        index
    }
}

impl Segment {
    fn holds(&self, shape: &Shape) -> bool {
        match (&shape.models, shape.gpus) {
            (_, 0) => true,
            (None, _) => !self.models.is_empty(),
            (Some(wanted), _) => self.models.iter().any(|model| wanted.contains(model)),
        }
    }
}

fn models(room: &Room) -> Vec<usize> {
    let mut models: Vec<usize> = room.devices.iter().map(|device| device.model).collect();
    models.sort_unstable();
    models.dedup();
    models
}

#[cfg(test)]
mod tests;
