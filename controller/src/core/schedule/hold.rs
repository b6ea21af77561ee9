//! Room that is held for a job: what it waits for to end there, and what of the room is left for others meanwhile.
//! Whoever else is placed in a held room can never make the holder's start later.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, PodId};
use berth_protocol::units::BootMs;

use super::problem::{Room, Shape};

/// Why room is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It is the first that waits.
    Head,
    /// It has waited for longer than any job should.
    Overdue,
    /// Others make way for it.
    Preemption,
    /// Others move for it, or it moves for others.
    Move,
}

#[derive(Debug, Clone)]
pub struct Hold {
    pub kind: Kind,
    pub since: BootMs,
    pub rooms: BTreeMap<usize, Held>,
}

/// What is held of one room.
#[derive(Debug, Clone)]
pub struct Held {
    /// Pods of the holder's that go here.
    pub pods: usize,
    /// Pods that have to leave first.
    pub waits_for: BTreeSet<PodId>,
    /// The room as it will be without those, and with the holder's pods.
    pub spare: Room,
}

#[derive(Debug, Default)]
pub struct Holds {
    jobs: BTreeMap<JobUid, Hold>,
    rooms: BTreeMap<usize, JobUid>,
}

impl Holds {
    pub fn get(&self, uid: &JobUid) -> Option<&Hold> {
        self.jobs.get(uid)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&JobUid, &Hold)> {
        self.jobs.iter()
    }

    /// Pods of the job's that have a room held.
    pub fn pods_of(&self, uid: &JobUid) -> usize {
        self.jobs.get(uid).map_or(0, |hold| hold.rooms.values().map(|held| held.pods).sum())
    }

    pub fn rooms_of(&self, uid: &JobUid) -> impl Iterator<Item = usize> {
        self.jobs.get(uid).into_iter().flat_map(|hold| hold.rooms.keys().copied())
    }

    pub fn is_any(&self) -> bool {
        !self.jobs.is_empty()
    }

    pub fn is_held(&self, room: usize) -> bool {
        self.rooms.contains_key(&room)
    }

    /// Rooms held for others than the job.
    pub fn others(&self, uid: &JobUid) -> impl Iterator<Item = usize> {
        self.rooms.iter().filter(move |(_, holder)| *holder != uid).map(|(room, _)| *room)
    }

    pub fn holder(&self, room: usize) -> Option<(&JobUid, &Held)> {
        let uid = self.rooms.get(&room)?;
        Some((uid, self.jobs.get(uid)?.rooms.get(&room)?))
    }

    /// Holds rooms that nobody holds yet, beside those that the job holds already.
    pub fn add(&mut self, uid: &JobUid, kind: Kind, since: BootMs, rooms: BTreeMap<usize, Held>) {
        let hold =
            self.jobs.entry(uid.clone()).or_insert_with(|| Hold { kind, since, rooms: BTreeMap::new() });
        for (room, held) in rooms {
            self.rooms.insert(room, uid.clone());
            hold.rooms.insert(room, held);
        }
    }

    /// Whether there was one.
    pub fn drop(&mut self, uid: &JobUid) -> bool {
        let Some(hold) = self.jobs.remove(uid) else { return false };
        for room in hold.rooms.keys() {
            self.rooms.remove(room);
        }
        true
    }

    /// The room is no longer what it was: whoever held it looks anew.
    pub fn drop_room(&mut self, room: usize) -> bool {
        let Some(uid) = self.rooms.get(&room).cloned() else { return false };
        self.drop(&uid)
    }

    /// Whether a pod of `uid` may take these devices of the room.
    pub fn allow(&self, uid: &JobUid, room: usize, shape: &Shape, devices: &[usize]) -> bool {
        let Some((holder, held)) = self.holder(room) else { return true };
        if holder == uid {
            return true;
        }
        let spare = &held.spare;
        spare.slots > 0
            && spare.cpu_milli >= shape.cpu_milli
            && spare.memory_bytes >= shape.memory_bytes
            && devices.iter().all(|device| spare.devices[*device].fits(shape))
    }

    /// What of the room those who do not hold it may take.
    pub fn reduced(&self, room: usize, free: &Room) -> Room {
        let Some((_, held)) = self.holder(room) else { return free.clone() };
        let mut less = free.clone();
        less.cpu_milli = less.cpu_milli.min(held.spare.cpu_milli);
        less.memory_bytes = less.memory_bytes.min(held.spare.memory_bytes);
        less.slots = less.slots.min(held.spare.slots);
        for (device, spare) in less.devices.iter_mut().zip(&held.spare.devices) {
            device.milli = device.milli.min(spare.milli);
            device.memory_bytes = device.memory_bytes.min(spare.memory_bytes);
        }
        less
    }

    /// What of the room is left for a job that does not hold it; nothing where it does, or nobody holds it.
    pub fn spare_for(&mut self, uid: &JobUid, room: usize, change: impl FnOnce(&mut Room)) {
        let Some(holder) = self.rooms.get(&room).filter(|holder| *holder != uid) else { return };
        if let Some(held) = self.jobs.get_mut(holder).and_then(|hold| hold.rooms.get_mut(&room)) {
            change(&mut held.spare);
        }
    }

    /// A pod has its seat in the room: one less to hold it for, where it is the holder's.
    pub fn seated(&mut self, uid: &JobUid, room: usize) {
        if self.rooms.get(&room) != Some(uid) {
            return;
        }
        let Some(hold) = self.jobs.get_mut(uid) else { return };
        let Some(held) = hold.rooms.get_mut(&room) else { return };
        held.pods -= 1;
        if held.pods == 0 {
            hold.rooms.remove(&room);
            self.rooms.remove(&room);
        }
        if hold.rooms.is_empty() {
            self.jobs.remove(uid);
        }
    }

    /// A pod has left the room; whether the holder waited for it. What another leaves is spare.
    pub fn left(&mut self, room: usize, pod: &PodId, give: impl FnOnce(&mut Room)) -> bool {
        let Some(uid) = self.rooms.get(&room) else { return false };
        let Some(held) = self.jobs.get_mut(uid).and_then(|hold| hold.rooms.get_mut(&room)) else {
            return false;
        };
        let waited = held.waits_for.remove(pod);
        if !waited {
            give(&mut held.spare);
        }
        waited
    }
}
