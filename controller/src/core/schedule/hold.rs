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

    /// The room is no longer what it was. What it lost is taken from what was spare; where that does not do, or the room
    /// is another one, whoever held it looks anew.
    pub fn resized(&mut self, room: usize, was: &Room, is: &Room) {
        let Some(uid) = self.rooms.get(&room).cloned() else { return };
        let held = self.jobs.get_mut(&uid).and_then(|hold| hold.rooms.get_mut(&room));
        if held.is_none_or(|held| !lessen(&mut held.spare, was, is)) {
            self.drop(&uid);
        }
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
            && spare.disk_bytes >= shape.disk_bytes
            && devices.iter().all(|device| spare.devices[*device].fits(shape))
    }

    /// What of the room those who do not hold it may take.
    pub fn reduced(&self, room: usize, free: &Room) -> Room {
        let Some((_, held)) = self.holder(room) else { return free.clone() };
        let mut less = free.clone();
        less.cpu_milli = less.cpu_milli.min(held.spare.cpu_milli);
        less.memory_bytes = less.memory_bytes.min(held.spare.memory_bytes);
        less.disk_bytes = less.disk_bytes.min(held.spare.disk_bytes);
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

/// Takes from `spare` what a room lost; `false` where there is less, or the room is another one.
fn lessen(spare: &mut Room, was: &Room, is: &Room) -> bool {
    let kinds = |room: &Room| room.devices.iter().map(|d| (d.usable, d.model)).collect::<Vec<_>>();
    let mut enough = was.open == is.open && kinds(was) == kinds(is);
    let mut less = |left: &mut u64, was: u64, is: u64| match left.checked_sub(was.saturating_sub(is)) {
        Some(rest) => *left = rest,
        None => enough = false,
    };
    less(&mut spare.cpu_milli, was.cpu_milli, is.cpu_milli);
    less(&mut spare.memory_bytes, was.memory_bytes, is.memory_bytes);
    less(&mut spare.disk_bytes, was.disk_bytes, is.disk_bytes);
    let mut slots = spare.slots as u64;
    less(&mut slots, was.slots as u64, is.slots as u64);
    spare.slots = slots as usize;
    for (device, (was, is)) in spare.devices.iter_mut().zip(was.devices.iter().zip(&is.devices)) {
        let mut milli = u64::from(device.milli);
        less(&mut milli, was.milli.into(), is.milli.into());
        device.milli = milli as u32;
        less(&mut device.memory_bytes, was.memory_bytes, is.memory_bytes);
    }
    enough
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::schedule::problem::{Device, Shape, Size};

    #[test]
    fn a_hold_outlives_what_its_room_can_spare() {
        let room = |cpu_milli: u64, disk_bytes: u64, milli: u32| Room {
            open: true,
            cpu_milli,
            memory_bytes: 10,
            disk_bytes,
            slots: 4,
            devices: vec![Device { usable: true, model: 0, milli, memory_bytes: 10 }],
            size: Size { cpu_milli: 4000, memory_bytes: 10 },
        };
        let uid = JobUid::parse("u").unwrap();
        let held = || Held { spare: room(1000, 5, 500), pods: 1, waits_for: BTreeSet::new() };
        let mut holds = Holds::default();
        holds.add(&uid, Kind::Head, BootMs(0), BTreeMap::from([(0, held())]));
        let other = JobUid::parse("v").unwrap();
        let wants = |disk_bytes| Shape { disk_bytes, ..Shape::default() };
        assert!(holds.allow(&other, 0, &wants(5), &[]) && !holds.allow(&other, 0, &wants(6), &[]));
        assert_eq!(holds.reduced(0, &room(4000, 100, 1000)).disk_bytes, 5);
        holds.resized(0, &room(4000, 100, 1000), &room(3500, 100, 750));
        let spare = holds.holder(0).map(|(_, held)| (held.spare.cpu_milli, held.spare.devices[0].milli));
        assert_eq!(spare, Some((500, 250)));
        holds.resized(0, &room(3500, 100, 750), &room(4000, 100, 1000));
        assert!(holds.holder(0).is_some(), "more is no reason");
        holds.resized(0, &room(4000, 100, 1000), &room(3000, 100, 1000));
        assert!(holds.holder(0).is_none(), "it can no longer be kept");
    }
}
