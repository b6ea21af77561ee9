//! The cheapest set of pods whose leaving makes room for another one: exact where few could leave, else without any
//! that could stay. Pure arithmetic.

use super::problem::{Room, Shape};

/// Among so many every set is tried.
const EXACT_MAX: usize = 10;

/// What one pod takes of a room, and what its leaving costs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Load {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Device, thousandths and memory of it.
    pub devices: Vec<(usize, u32, u64)>,
    pub cost: u64,
}

impl Load {
    /// The room without the pod.
    pub fn leave(&self, room: &mut Room) {
        room.slots += 1;
        room.cpu_milli += self.cpu_milli;
        room.memory_bytes += self.memory_bytes;
        room.disk_bytes += self.disk_bytes;
        for (device, milli, memory) in &self.devices {
            room.devices[*device].milli += milli;
            room.devices[*device].memory_bytes += memory;
        }
    }
}

/// Whether `pods` of the shape fit the room together.
pub fn fits(room: &Room, shape: &Shape, pods: usize) -> bool {
    if pods == 1 {
        return room.fit(shape).is_some();
    }
    let mut room = room.clone();
    (0..pods).all(|_| match room.fit(shape) {
        Some(devices) => {
            room.charge(shape, &devices);
            true
        }
        None => false,
    })
}

fn without(room: &Room, loads: &[Load], leaving: impl Iterator<Item = usize>) -> Room {
    let mut room = room.clone();
    for i in leaving {
        loads[i].leave(&mut room);
    }
    room
}

/// What must leave so that `pods` more of the shape fit, by index, and what it costs. None: all of it would not do.
/// None of the answer could stay.
pub fn free_up(room: &Room, shape: &Shape, pods: usize, loads: &[Load]) -> Option<(u64, Vec<usize>)> {
    if fits(room, shape, pods) {
        return Some((0, Vec::new()));
    }
    if !fits(&without(room, loads, 0..loads.len()), shape, pods) {
        return None;
    }
    if loads.len() <= EXACT_MAX {
        return exact(room, shape, pods, loads);
    }
    // Whoever costs most stays first.
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(loads[*i].cost), *i));
    let mut leaving: Vec<usize> = order.clone();
    for i in order {
        let rest = leaving.iter().copied().filter(|other| *other != i);
        if fits(&without(room, loads, rest), shape, pods) {
            leaving.retain(|other| *other != i);
        }
    }
    leaving.sort_unstable();
    Some((leaving.iter().map(|i| loads[*i].cost).sum(), leaving))
}

fn exact(room: &Room, shape: &Shape, pods: usize, loads: &[Load]) -> Option<(u64, Vec<usize>)> {
    let members = |set: u32| (0..loads.len()).filter(move |i| set >> i & 1 == 1);
    let price =
        |set: u32| -> (u64, u32, u32) { (members(set).map(|i| loads[i].cost).sum(), set.count_ones(), set) };
    let mut sets: Vec<u32> = (1..1_u32 << loads.len()).collect();
    sets.sort_by_key(|set| price(*set));
    let set = sets.into_iter().find(|set| fits(&without(room, loads, members(*set)), shape, pods))?;
    Some((price(set).0, members(set).collect()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::problem::Device;
    use super::*;

    fn load() -> impl Strategy<Value = Load> {
        let device = (0..2usize, 1..=10u32, 0..3u64);
        (0..4u64, 0..4u64, proptest::collection::vec(device, 0..2), 0..9u64).prop_map(
            |(cpu_milli, memory_bytes, devices, cost)| {
                let devices =
                    devices.into_iter().map(|(i, milli, memory)| (i, milli * 100, memory)).collect();
                Load { cpu_milli, memory_bytes, disk_bytes: 0, devices, cost }
            },
        )
    }

    proptest! {
        /// Whatever leaves makes room, and nothing of it could stay; of few the set is the cheapest there is.
        #[test]
        fn the_cheapest_set_and_never_more_than_needed(
            free in (0..3u64, 0..3u64, 0..3u32, 0..3u32),
            loads in proptest::collection::vec(load(), 0..14),
            wants in (0..6u64, 0..6u64, 0..3usize, 1..=10u32),
            pods in 1..3usize,
        ) {
            let device = |milli: u32| Device { usable: true, model: 0, milli: milli * 100, memory_bytes: 1 };
            let room = super::super::tests::room(free.0, free.1, vec![device(free.2), device(free.3)]);
            let (cpu_milli, memory_bytes, gpus, milli) = wants;
            let gpu_milli = milli * 100;
            let shape = Shape { cpu_milli, memory_bytes, gpus, gpu_milli, ..Shape::default() };
            let Some((cost, leaving)) = free_up(&room, &shape, pods, &loads) else {
                prop_assert!(!fits(&without(&room, &loads, 0..loads.len()), &shape, pods));
                return Ok(());
            };
            prop_assert!(fits(&without(&room, &loads, leaving.iter().copied()), &shape, pods));
            prop_assert_eq!(cost, leaving.iter().map(|i| loads[*i].cost).sum::<u64>());
            for spared in &leaving {
                let rest = leaving.iter().copied().filter(|i| i != spared);
                let enough = fits(&without(&room, &loads, rest), &shape, pods);
                prop_assert!(!enough, "{spared} could stay");
            }
            if loads.len() <= EXACT_MAX {
                let all = 0..1_u32 << loads.len();
                let members = |set: u32| (0..loads.len()).filter(move |i| set >> i & 1 == 1);
                let least = all
                    .filter(|set| fits(&without(&room, &loads, members(*set)), &shape, pods))
                    .map(|set| members(set).map(|i| loads[i].cost).sum::<u64>())
                    .min();
                prop_assert_eq!(Some(cost), least);
            }
        }
    }
}
